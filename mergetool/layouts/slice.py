"""One slice as a recipe says it: layers of which models, with settings of its own."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_BASE = "base"


def _as_span(value: Any) -> Any:
    whole = isinstance(value, list | tuple) and len(value) == 2 and all(type(each) is int for each in value)
    if not whole or value[0] < 0:
        raise ValueError("expected the first layer and the end, as in [0, 16]")
    return tuple(value)


Span = Annotated[
    tuple[int, int],
    BeforeValidator(
        _as_span,
        json_schema_input_type=Annotated[list[int], Field(min_length=2, max_length=2)],
    ),
]


class SlicePart(BaseModel):
    """Strict and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Slice(SlicePart):
    """Some layers of one model, or as many of each of several."""

    layers: dict[str, Span] = Field(min_length=1, description="MODEL: [first, end), for each of the models")
    base: Annotated[dict[str, Span], Field(min_length=1, max_length=1)] | None = Field(
        None, description="MODEL: [first, end) of the model that is the base of this slice, in place of the recipe's"
    )
    set: dict[str, Any] = Field({}, description="other settings of the method for these layers")
    overrides: tuple[dict[str, Any], ...] = Field((), description="overrides for tensors of these layers")
    outside: bool = Field(
        False,
        strict=True,
        description="whether `set` and `overrides` hold for what lies outside the layers, too: beside the first slice "
        "for the embeddings, beside the last one for the final norm and head",
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are merged, or the one that is copied."""
        return tuple(name for name in self.layers if name != _BASE) or (_BASE,)

    @property
    def is_of_one(self) -> bool:
        """Whether one model is all that it names."""
        return len(self.spans) == 1

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """The layers of all models that it names, those of its base too."""
        return {**self.layers, **(self.base or {})}

    @property
    def own_base(self) -> str:
        """The model that a method takes for the base."""
        return next(iter(self.base or (_BASE,)))

    @property
    def length(self) -> int:
        """How many layers it makes."""
        start, end = self.layers[self.models[0]]
        return end - start

    def layer(self, model: str, offset: int) -> int | None:
        """Which layer of a model goes into a layer of this slice; None where the recipe does not say."""
        if model in self.layers:
            return self.layers[model][0] + offset
        starts = {start for start, _ in self.layers.values()}
        return starts.pop() + offset if len(starts) == 1 else None

    def base_layer(self, offset: int) -> int | None:
        """The same for its base."""
        return self.layer(_BASE, offset) if self.base is None else self.base[self.own_base][0] + offset

    def depth(self, offset: int) -> float:
        """How far up a layer is in this slice, from 0 to 1; a single one is at the top, as mergekit has it."""
        return offset / (self.length - 1) if self.length > 1 else 1.0


def _long_form(value: Any) -> Any:
    """`{a: [0, 16]}` as `{layers: {a: [0, 16]}}`."""
    long = not isinstance(value, dict) or isinstance(value.get("layers"), dict)
    return value if long else {"layers": value}


AnySlice = Annotated[Slice, BeforeValidator(_long_form, json_schema_input_type=Slice | dict[str, Span])]

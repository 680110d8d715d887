"""The sections of a recipe, as strict models: unknown keys, wrong types and bad names are errors."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from mergetool.arch.code import code_of
from mergetool.bundle.manifest import Task
from mergetool.evaluate.options import TaskOptions
from mergetool.layouts.base import Layout
from mergetool.layouts.same import Same
from mergetool.methods.base import Method
from mergetool.methods.then import After
from mergetool.recipe.data import Data
from mergetool.recipe.words import ChatTemplate, PathText, Section, Tokenizer
from mergetool.units import parse_size as parse_size


def expanded(text: str) -> Path:
    """A path with `~` replaced; left as it is where there is no such user."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  (pathlib's raises for an unknown user)


INLINE = "a recipe written here"
"""What the source of a model is called that a recipe within the recipe makes."""


def _as_reference(value: Any) -> Any:
    """The long form of a reference; what stands for a source is called so, too."""
    if isinstance(value, str):
        return {"source": value}
    if not isinstance(value, dict):
        return value
    instead = next((value[key] for key in ("recipe", "adapter") if value.get(key) is not None), None)
    return value if instead is None else {**value, "source": instead if isinstance(instead, str) else INLINE}


def _one_of_three(schema: dict[str, Any]) -> None:
    """One is required, which the class itself cannot say."""
    schema["anyOf"] = [{"required": [key]} for key in ("source", "recipe", "adapter")]
    schema["required"] = [key for key in schema["required"] if key != "source"]
    if not schema["required"]:
        del schema["required"]


class HeadReference(Section):
    """A task's classifier, for a bundle."""

    weights: Annotated[str, Field(min_length=1, strict=True)] = Field(
        description="a .safetensors file with `weight` and `bias`, or a model folder with a classifier inside"
    )
    pool: Literal["cls", "mean", "last"] = Field("mean", description="which token the head reads, or the mean of all")
    normalize: bool = Field(False, strict=True, description="divide what the head reads by its length first")
    labels: tuple[str, ...] = Field((), description="names of the classes")


class ModelReference(Section):
    """Where a model is: a folder, a file of weights, a model on the Hub, or the result of another recipe."""

    model_config = ConfigDict(json_schema_extra=_one_of_three)

    source: PathText = Field(
        description="a folder, a file of weights, or a model on the Hub (`org/name@revision`); a bundle with `select`"
    )
    adapters: tuple[PathText, ...] = Field(
        (), description="PEFT adapters (folders or Hub ids), merged into the model in this order while it is read"
    )
    adapter: PathText | None = Field(
        None,
        description="instead of `source`, of a model: a PEFT adapter (a folder or Hub id), merged into the `base` of "
        "the recipe",
    )
    select: Annotated[str, Field(min_length=1, strict=True)] | None = Field(
        None, description="the task whose expert is meant, where `source` is a bundle"
    )
    recipe: PathText | dict[str, Any] | None = Field(
        None, description="instead of `source`: a recipe's file, or the recipe itself, whose result is the model"
    )
    folder: PathText | None = Field(
        None, description="what relative paths of a `recipe` written here are relative to, where it is another folder"
    )
    head: HeadReference | None = Field(
        None, description="the classifier of this task, for a bundle, where it is not in the checkpoint of the model"
    )


Reference = Annotated[ModelReference, BeforeValidator(_as_reference, json_schema_input_type=str | ModelReference)]


class Compute(Section):
    """How the arithmetic is done. Changes here change the result."""

    dtype: Literal["float32", "float64"] = Field("float32", description="dtype of sums, norms and thresholds")
    seed: int = Field(0, ge=0, lt=2**63, strict=True, description="seed of every random draw")


class Check(Section):
    """What to do when models do not hold the same tensors, or a result is not finite."""

    missing: Literal["error", "base", "skip"] = Field(
        "error", description="where a model lacks a tensor: stop, use the base's, or merge it without that model"
    )
    extra: Literal["keep", "drop", "error"] = Field(
        "keep", description="where a model has a tensor that the base lacks: copy it over, leave it out, or stop"
    )
    non_finite: Literal["error", "keep"] = Field(
        "error", description="where a result is NaN or infinite: stop, or write it"
    )


class HubOutput(Section):
    """The repository on the Hub to which the result is pushed."""

    repo: Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")] = Field(
        description="the repository, ORG/NAME"
    )
    private: bool = Field(False, strict=True, description="make it as a private repository; refuse one that is public")
    create: bool = Field(False, strict=True, description="make the repository if there is none; `private` does, too")
    pull_request: bool = Field(False, strict=True, description="open a pull request instead of a commit")


def _rank(value: Any) -> Any:
    """A rank as it is written: a number, `exact`, or a share of energy."""
    whole = type(value) is int and value > 0
    share = isinstance(value, dict) and set(value) == {"energy"} and type(value["energy"]) in (int, float)
    if whole or value in ("exact", None) or (share and 0 < value["energy"] < 1):
        return value
    raise ValueError("expected a whole number above 0 such as 32, exact, or {energy: 0.99} (a share between 0 and 1)")


class Output(Section):
    """Where the result goes and how it is stored."""

    path: PathText | None = Field(None, description="folder to write; `-o PATH` in the command goes first")
    dtype: Literal["source", "float32", "bfloat16", "float16"] = Field(
        "source", description="storage dtype of floating-point tensors; `source` keeps each tensor's own"
    )
    keep_float32: bool = Field(
        True,
        strict=True,
        description="under a `dtype` of 16 bits, leave in float32 what models keep so among 16-bit weights "
        "(corrections of routers, norms), and Mamba's A_log, D and dt_bias",
    )
    shard_size: Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str)] = Field(
        5 * 10**9, description="largest size of one output file, in bytes or like 5GB"
    )
    kind: Literal["checkpoint", "adapter"] | None = Field(
        None,
        description="whole weights, or a LoRA adapter for `base` that PEFT loads; by default an adapter where all "
        "models are adapters and there is no base, else a checkpoint",
    )
    rank: Annotated[
        int | dict[str, float] | Literal["exact"] | None,
        BeforeValidator(_rank, json_schema_input_type=int | dict[str, float] | Literal["exact"] | None),
    ] = Field(
        None,
        description="of an adapter's products: at most so many directions, as many as hold a share of what was changed "
        "(`{energy: 0.99}`), or all that there are",
    )
    base: Annotated[str, Field(min_length=1, strict=True)] | None = Field(
        None, description="what the adapter calls its base model, where that is not what the recipe's `base` is called"
    )
    hub: HubOutput | None = Field(None, description="push the result there, once it is complete")


class Override(Section):
    """Other settings for the tensors whose names match a glob. Concrete classes add the method's fields."""

    match: Annotated[str, Field(min_length=1, strict=True)] = Field(
        description="glob on names of output tensors: `*` is any text (dots, too), `?` one character, `[ab]` a or b"
    )
    use: Annotated[str, Field(strict=True)] | None = Field(
        None, description="copy these tensors from `base` or this model, as they are"
    )

    def settings(self) -> dict[str, Any]:
        """The method fields set here."""
        return {key: getattr(self, key) for key in self.model_fields_set - {"match", "use"}}


@dataclass(frozen=True)
class Past:
    """What is known of models that are taken from an earlier result: where that one had them from."""

    place: Path | None = None
    """That result, which a new one may replace."""
    tasks: Mapping[str, Task] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """By model, as in a lock."""
    origins: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of that result's files by path, if they were just compared."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `document` is what was asked, as plain data, with defaults left out."""

    base: ModelReference | None
    models: Mapping[str, ModelReference]
    architecture: str | None
    """A family, a spec file, FILE.py:FUNCTION, `auto`, or None: as config.json and the tensors' names tell."""
    method: Method
    overrides: tuple[Override, ...]
    compute: Compute
    check: Check
    tokenizer: Tokenizer | None
    output: Output
    folder: Path
    """What relative paths are relative to."""
    name: str = "recipe"
    """What messages call this recipe: its path, or `recipe` for one made in Python."""
    document: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    """The `--set` arguments that were applied."""
    evaluate: tuple[TaskOptions, ...] = ()
    """Tasks that the result is scored on."""
    then: tuple[After, ...] = ()
    """Steps on what merging changed."""
    chat_template: ChatTemplate | None = None
    """Whose chat template goes with the result, if it is not the tokenizer's own."""
    calibration: "Data | Mapping[str, Data] | None" = None
    """What statistics of the models are measured on."""
    layout: Layout = field(default_factory=Same)
    """Which tensors of the models each output tensor comes from."""
    layout_overrides: tuple[Override, ...] = ()
    """Overrides that the layout's sections hold; where they apply, the layout says."""
    points: "Mapping[str, Recipe]" = field(default_factory=dict)
    """Of a sweep, the recipes of its results by name; all else here is that of the first."""
    inner: "Mapping[str, Recipe]" = field(default_factory=dict)
    """The recipes that make some of the models, by name (the base under "base")."""
    intermediate: bool = False
    """Whether the result is only read by another recipe: it is then kept as it was computed, unless it says how."""
    warnings: tuple[str, ...] = ()
    """What was found when it was read that its author should know."""
    past: Past = field(default_factory=Past)

    @property
    def adapters_alone(self) -> bool:
        """Whether its models are adapters and nothing else, to be opened by themselves."""
        return all(reference.adapter is not None for reference in self.models.values())

    @property
    def measuring_step(self) -> After | None:
        """The step after merging that needs a statistic of the base, if there is one."""
        return next((step for step in self.then if step.statistic), None)

    @property
    def measures(self) -> bool:
        """Whether it needs statistics."""
        return bool(self.method.statistic) or self.measuring_step is not None

    @property
    def stages(self) -> tuple[str, ...]:
        """What a run does, one after the other."""
        stages = self.method.stages()
        return stages if "measure" in stages or not self.measures else ("measure", *stages)

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """What was found in it and in the recipes inside it."""
        inner = [f"{name}: {text}" for name, each in self.inner.items() for text in each.all_warnings]
        return (*inner, *self.warnings)

    @property
    def result(self) -> str:
        """The kind of output that a run leaves."""
        if self.points:
            return "sweep"
        if self.method.result != "checkpoint":
            return self.method.result
        return "adapter" if self.adapters_alone or self.output.kind == "adapter" else "checkpoint"

    @property
    def architecture_file(self) -> Path | None:
        """The file that `architecture` names, a description or Python code; None for a family."""
        if self.architecture is None:
            return None
        code = code_of(self.architecture)
        path = self.path_of(code[0] if code else self.architecture)
        return path if code or path.is_file() else None

    def path_of(self, text: str) -> Path:
        """A path written in the recipe, made absolute by the recipe's folder."""
        return (self.folder / expanded(text)).absolute()

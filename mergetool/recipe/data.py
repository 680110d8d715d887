"""The section `calibration`: data that statistics of the models are measured on."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from mergetool.recipe.words import PathText, Section

_Text = Annotated[str, Field(min_length=1, strict=True)]
_Count = Annotated[int, Field(ge=1, strict=True)]


SHARED, _EACH = "(shared)", "(per model)"


class Data(Section):
    """What one model, or every model, is measured on."""

    data: PathText | None = Field(None, description="a file of JSON lines, one row each")
    field: _Text = Field(
        "text",
        description="the field of a row with its text, a list of ids of tokens, or for models of images a file .npy",
    )
    pair: _Text = Field("pair", description="the field that holds a second segment, where a row has one")
    label: _Text = Field("label", description="the field that holds the class of a row, for `labels: given`")
    samples: _Count | None = Field(256, description="rows that are used, from the first on; null: all")
    length: _Count | None = Field(
        None, description="tokens at which rows are cut; without it a row that is too long for a model is an error"
    )
    tokenizer: PathText | None = Field(
        None, description="`base`, a model or a folder whose tokenizer reads the text (each model's own)"
    )
    measured: PathText | None = Field(
        None, description="instead of `data`, of one model: the statistic itself, a file that was measured before"
    )

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.data is None) == (self.measured is None):
            raise ValueError("expected `data`, a file of JSON lines, or of one model `measured`, a statistic")
        if self.measured is not None and self.model_fields_set != {"measured"}:
            raise ValueError("`measured` is the statistic itself: nothing beside it would have an effect")
        return self


def form_of(value: Any) -> str:
    """Whether a section is for all models or for each, as pydantic is to read it."""
    if isinstance(value, Data):
        return SHARED
    own = isinstance(value, dict) and value and not value.keys() <= Data.model_fields.keys()
    apart = own and all(isinstance(each, dict | Data) for each in value.values())
    return _EACH if apart else SHARED


Calibration = Annotated[Annotated[Data, Tag(SHARED)] | Annotated[dict[str, Data], Tag(_EACH)], Discriminator(form_of)]
"""One for all models, or one for each."""


def data_of(calibration: "Data | Mapping[str, Data]", model: str) -> Data:
    """What a model is measured on."""
    return calibration if isinstance(calibration, Data) else calibration[model]

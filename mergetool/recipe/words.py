"""The sections about words: which vocabulary the result has, where its rows come from, and how a chat is written."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PathText = Annotated[str, Field(min_length=1, strict=True, pattern=r"^[^\x00]+$")]
_Text = Annotated[str, Field(min_length=1, strict=True)]

UNION = "union"
"""The tokenizer source that stands for the vocabularies of all models together."""
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""Chat templates that come with the package."""
AUTO = "auto"
"""The chat template that most models have."""


class Section(BaseModel):
    """One mapping of the recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenRow(Section):
    """Where the rows of one token come from."""

    model: Annotated[_Text | None, Field(alias="from")] = Field(None, description="the model, or `base`")
    token: _Text | None = Field(None, description="that model's token (the same)")
    id: Annotated[int, Field(ge=0, strict=True)] | None = Field(None, description="that model's row, by its number")
    zero: bool = Field(False, strict=True, description="rows of zeros")
    force: bool = Field(False, strict=True, description="in place of the rows of models that have the token, too")

    @model_validator(mode="after")
    def _means_one_row(self) -> Self:
        if self.zero and self.model is not None:
            raise ValueError("zero: true and from: MODEL are two different rows")
        if self.token is not None and self.id is not None:
            raise ValueError("token and id may be two different rows: give one of them")
        if self.model is None and (self.token is not None or self.id is not None):
            raise ValueError("a token or an id of which model? add from: MODEL")
        return self


def _as_row(value: Any) -> Any:
    return {"from": value} if isinstance(value, str) else value


Row = Annotated[TokenRow, BeforeValidator(_as_row, json_schema_input_type=str | TokenRow)]


class Tokenizer(Section):
    """Which vocabulary the result has. Embeddings and heads are matched by the text of tokens."""

    source: PathText = Field(
        description="`base`, the name of a model, `union` (the base's or first model's, and the tokens that others "
        "have beyond it), or a folder with a tokenizer"
    )
    tokens: dict[_Text, Row] = Field(
        {},
        description="TOKEN: whose row it gets where a model has none (MODEL, {from: MODEL, token: TEXT}, "
        "{from: MODEL, id: N}, {zero: true}; with force: true where a model has one, too); new tokens are added",
    )
    missing: Literal["mean", "zero", "nearest", "omp"] = Field(
        "mean",
        description="rows of tokens that no model has: the mean of all rows, zeros, the mean of the pieces of its "
        "text, or (omp) made of shared tokens as the donor's row is, where `source` is a folder of another model",
    )
    prefer: _Text | None = Field(
        None, description="the model whose rows stand in for those that others lack (the base; else the mean of all)"
    )
    pad_to: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        None, description="round the number of rows up to a multiple of this (as many rows as the source has)"
    )


class ChatTemplate(Section):
    """How a chat is written."""

    name: _Text | None = Field(None, description="a model, `auto` (what most models have), or one that comes with us")
    file: PathText | None = Field(None, description="a Jinja file")
    text: _Text | None = Field(None, description="the template itself")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(each is not None for each in (self.name, self.file, self.text)) != 1:
            raise ValueError("expected a model's name, a template's name, {file: PATH} or {text: TEMPLATE}")
        return self


def _as_template(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Template = Annotated[ChatTemplate, BeforeValidator(_as_template, json_schema_input_type=str | ChatTemplate)]


def is_place(text: str) -> bool:
    """Whether the source of a tokenizer is a folder or a repository rather than a name."""
    return "/" in text or text.startswith((".", "~"))


def models_named(tokenizer: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """Models that a tokenizer section names, as it was written, by their places in it."""
    references: dict[tuple[str, ...], str] = {}
    source = tokenizer.get("source")
    if isinstance(source, str) and source != UNION and not is_place(source):
        references["source",] = source
    if isinstance(tokenizer.get("prefer"), str):
        references["prefer",] = tokenizer["prefer"]
    tokens = tokenizer.get("tokens")
    for token, row in tokens.items() if isinstance(tokens, dict) else ():
        if isinstance(row, str):
            references["tokens", token] = row
        elif isinstance(row, dict) and isinstance(row.get("from"), str):
            references["tokens", token, "from"] = row["from"]
    return references

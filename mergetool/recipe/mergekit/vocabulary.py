"""What a mergekit recipe says of tokens and templates, in our words: sections `tokenizer` and `chat_template`.

    tokenizer_source: union | base | MODEL      the same as tokenizer: {source: ...}
    tokenizer: {source, tokens: {TOKEN: {source: MODEL | {kind, model, token | token_id}, force}}, pad_to_multiple_of}
    chat_template: auto | NAME | the template itself

Rows of tokens that no model has are zeros in mergekit.
"""

from collections.abc import Mapping
from typing import Any

from mergetool.errors import RecipeError
from mergetool.recipe.document import Place
from mergetool.recipe.mergekit.findings import Findings
from mergetool.recipe.mergekit.reading import Reading
from mergetool.recipe.mergekit.roster import Roster
from mergetool.recipe.mergekit.scalars import scalar
from mergetool.recipe.words import AUTO, TEMPLATES, UNION, is_place

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_SHORTEST = 20
"""Characters that mergekit takes for a template rather than a name."""


class Words:
    """Both sections of one recipe; what is wrong goes to `findings`."""

    def __init__(self, findings: Findings, data: Mapping[str, Any], reading: Reading, roster: Roster) -> None:
        self.findings = findings
        self.data = data
        self.reading = reading
        self.roster = roster

    def sections(self) -> dict[str, Any]:
        sections: dict[str, Any] = {}
        for key, translated in (("tokenizer", self._tokenizer), ("chat_template", self._template)):
            try:
                section = translated()
            except RecipeError as error:
                self.findings.problems += error.problems
            else:
                sections |= {key: section} if section is not None else {}
        if "tokenizer" in sections:
            sections["tokenizer"] |= self._preferred()
        return sections

    def _preferred(self) -> dict[str, Any]:
        """mergekit's base goes before the mean of several even where it is one of the models that are merged."""
        name = self.roster.called(self.reading.base) if self.reading.base else None
        return {} if name in (None, "base") else {"prefer": name}

    def _tokenizer(self) -> dict[str, Any] | None:
        written, source = self.data.get("tokenizer"), self.data.get("tokenizer_source")
        if written is None:
            return None if source is None else {"source": self._source(source, ("tokenizer_source",))}
        place: Place = ("tokenizer",)
        held = self.findings.mapping(written, place, _KEYS)
        if source and held:
            raise self.findings.stop(place, "`tokenizer` and `tokenizer_source` say the same", "keep one of them")
        self.findings.stray(held, place, _KEYS, {})
        out: dict[str, Any] = {"source": self._source(held.get("source") or UNION, (*place, "source"))}
        if held.get("tokens"):
            out["tokens"] = self._tokens(held["tokens"], (*place, "tokens"))
            out["missing"] = "zero"
        if held.get("pad_to_multiple_of"):
            out["pad_to"] = self._count(held["pad_to_multiple_of"], (*place, "pad_to_multiple_of"))
        return out

    def _source(self, value: Any, place: Place) -> str:
        """A model of ours, `union`, or another place whose tokenizer is taken."""
        if value == UNION:
            return UNION
        if value == "base" and self.reading.base is None:
            return next(iter(self.roster.names.values()), "base")
        reference = self.reading.base if value == "base" else self.reading.reference(value, place)
        model = self.roster.called(str(reference)) or str(reference)
        return model if is_place(model) or model in (*self.roster.names.values(), "base") else f"./{model}"

    def _tokens(self, tokens: Any, place: Place) -> dict[str, Any]:
        held = self.findings.mapping(tokens, place, ("TOKEN",))
        return {token: self._row(rule, (*place, token)) for token, rule in held.items()}

    def _row(self, rule: Any, place: Place) -> Any:
        """Whose row a token gets."""
        held = self.findings.mapping(rule, place, ("source", "force"))
        self.findings.stray(held, place, ("source", "force"), {})
        source, here = held.get("source"), (*place, "source")
        row: dict[str, Any] = {"force": True} if self._switch(held.get("force", False), (*place, "force")) else {}
        if isinstance(source, dict) and source.get("kind") == "zero":
            return {"zero": True, **row}
        if isinstance(source, dict) and source.get("kind") == "model_token":
            return {**self._other_row(source, here), **row}
        if source is None:
            return row
        name = self._model(source, here)
        return {"from": name, **row} if row else name

    def _other_row(self, source: Mapping[str, Any], place: Place) -> dict[str, Any]:
        """The row of another token, by its text or its number."""
        known = ("kind", "model", "token", "token_id")
        self.findings.stray(source, place, known, {})
        token, number = source.get("token"), source.get("token_id")
        if (token is None) == (number is None):
            raise self.findings.stop(place, "one of `token` and `token_id` is needed", "write token: TEXT")
        row = {"from": self._model(source.get("model"), (*place, "model"))}
        if token is not None:
            return {**row, "token": str(token)}
        return {**row, "id": self._count(number, (*place, "token_id"))}

    def _model(self, value: Any, place: Place) -> str:
        reference = self.reading.reference(value, place)
        name = self.roster.called(reference)
        if name is None:
            known = ", ".join(self.roster.names)
            raise self.findings.stop(place, f"{reference} is none of the models", f"write one of: {known}")
        return name

    def _count(self, value: Any, place: Place) -> int:
        return int(self._scalar(value, int, place))

    def _switch(self, value: Any, place: Place) -> bool:
        return bool(self._scalar(value, bool, place))

    def _scalar(self, value: Any, kind: type, place: Place) -> Any:
        try:
            return scalar(value, kind)
        except ValueError as error:
            raise self.findings.stop(place, str(error), "write it plainly") from None

    def _template(self) -> Any:
        """A name that comes with us, or the template itself."""
        written = self.data.get("chat_template")
        if not written:
            return None
        if written in (AUTO, *TEMPLATES):
            return written
        if not isinstance(written, str) or len(written) < _SHORTEST or "{" not in written:
            what = f"there is no chat template {written!r}"
            fix = f"write one of {', '.join((AUTO, *TEMPLATES))}, or the template itself"
            raise self.findings.stop(("chat_template",), what, fix)
        return {"text": written}

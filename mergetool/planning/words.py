"""The vocabulary of a result: models whose tokenizers differ are shown under one, their rows matched by token.

Without a `tokenizer` section that is the leader's, where one number means two tokens; what then differs in size only is
left to the checks of shapes, which say what to write.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergetool.checkpoints.donor import Donor, memory_of
from mergetool.checkpoints.gathered import GatheredModel
from mergetool.checkpoints.notation import in_notation_of
from mergetool.checkpoints.side_files import has_tokenizer
from mergetool.checkpoints.token_rows import DONATED_ROWS, RowMap, RowRule, Wanted, row_maps
from mergetool.checkpoints.tokens_added import AddedTokens, added_tokens_of
from mergetool.checkpoints.vocabulary import PackedTexts, Vocabulary, disagreement, tokens_of
from mergetool.checkpoints.vocabulary_axes import axes_of
from mergetool.errors import PlanError
from mergetool.planning.sources import Lookup
from mergetool.recipe.schema import Recipe
from mergetool.recipe.words import UNION, Tokenizer
from mergetool.tensors.source import FileStamp, ModelSource

Sources = Mapping[str, ModelSource]
Rows = Mapping[str, Mapping[str, Mapping[str, int]]]
"""By tensor and model: how many rows come from where."""
_BASE = "base"
_TOKEN_BYTES = 1000
"""A token of the result where rows are matched: its text, also in the models' vocabularies and in the file written."""
_PLAIN: Mapping[str, Any] = {}
"""The flags of a token that has none; one for all of them."""
_SAVE = "save its tokenizer with transformers' save_pretrained, which writes tokenizer.json"


@dataclass(frozen=True)
class Lexicon:
    """What a plan knows of its vocabulary."""

    sources: Sources
    """The models as they show their rows."""
    digest: str = ""
    """SHA-256 of all that decides about rows, where they were matched."""
    home: Path | None = None
    """The folder of the tokenizer, where it is no model's."""
    texts: Mapping[int, str] | None = None
    """The tokens of the result, where rows were matched."""
    added: AddedTokens = field(default_factory=AddedTokens)
    """Tokens that the tokenizer's files lack."""
    rows: Rows = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    donor: ModelSource | None = None
    """The model whose rows tell how rows that no model has are made."""

    @property
    def read(self) -> dict[str, FileStamp]:
        """The donor's files."""
        files = () if self.donor is None else self.donor.files
        return {f"tokenizer.source {stamp.path.name}": stamp for stamp in files}

    @property
    def memory(self) -> int:
        """Bytes that texts of tokens take, and a donor's rows."""
        held = len(self.texts or ()) * _TOKEN_BYTES
        if self.donor is None:
            return held
        shared = {
            name: sum(counts.get(model, 0) for model, counts in models.items())
            for name, models in self.rows.items()
            if any(DONATED_ROWS in counts for counts in models.values())
        }
        return held + memory_of(self.donor, shared)


def in_one_vocabulary(recipe: Recipe, sources: Sources, template: str, lookup: Lookup) -> Lexicon:
    """The models as the result's vocabulary shows them. Raises PlanError where tokens cannot be matched."""
    asked = recipe.tokenizer
    if recipe.method.arranges and asked is not None and asked != Tokenizer(source="base"):
        what = "all outside the MLPs is the base's, its vocabulary too"
        raise PlanError(what, "tokenizer", "remove tokenizer, or merge the base with it first: base: {recipe: FILE}")
    if recipe.method.result == "bundle" or recipe.method.arranges:
        return Lexicon(sources)
    if asked is None and not _conflicts(sources, template):
        return Lexicon(sources)
    return _Matching(recipe, sources, template, lookup).words()


def _conflicts(sources: Sources, template: str) -> bool:
    """Whether a number means one token to the leader and another to a model."""
    home, *others = (sources[each].tokenizer_folder for each in (_holder(sources, template), *sources))
    differing = [other for other in others if disagreement(home, other)]
    return bool(differing) and tokens_of(home) is not None and any(tokens_of(other) for other in differing)


def _holder(sources: Sources, template: str) -> str:
    """The leader, or the first model that has a tokenizer where it has none."""
    order = (template, *(model for model in sources if model != template))
    return next((model for model in order if has_tokenizer(sources[model].tokenizer_folder)), template)


class _Matching:
    """One decision about the vocabulary."""

    def __init__(self, recipe: Recipe, sources: Sources, template: str, lookup: Lookup) -> None:
        self.recipe, self.sources, self.template = recipe, sources, template
        self.asked = recipe.tokenizer or Tokenizer(source=_holder(sources, template))
        self.leader = _holder(sources, template)
        self.donor: ModelSource | None = None
        self.home = self._home(lookup)
        self.axes = {model: axes_of(source) for model, source in sources.items()}

    def _home(self, lookup: Lookup) -> Path | None:
        """The folder of the tokenizer that the result's is made from, and the donor, if there is to be one."""
        if self.asked.missing == "omp":
            self.donor = lookup.open("tokenizer.source", self.asked.source)
            return self.donor.tokenizer_folder
        if self.asked.source in self.sources:
            return self.sources[self.asked.source].tokenizer_folder
        if self.asked.source == UNION:
            return self.sources[self.leader].tokenizer_folder
        return lookup.folder(self.asked.source)

    def words(self) -> Lexicon:
        own = self._is_own
        texts = tokens_of(self.home)
        if texts is None:
            return self._as_they_are()
        vocabularies = self._vocabularies(texts)
        added = self._added(texts, vocabularies)
        target = self._target(texts, added)
        self._check_overlap(target, vocabularies)
        shown, rows = self._shown(target, vocabularies)
        if not rows and not added and not own:
            return Lexicon(self.sources)
        return Lexicon(
            shown,
            self._digest(target, added, shown),
            self.home if own else None,
            PackedTexts(target.texts),
            added,
            rows,
            tuple(self._remarks(target, vocabularies)),
            self.donor,
        )

    @property
    def _is_own(self) -> bool:
        """Whether the tokenizer is no model's of the recipe."""
        return self.asked.source not in (*self.sources, UNION)

    def _as_they_are(self) -> Lexicon:
        """For a tokenizer that cannot be read: its files go along, where nothing has to be matched by it."""
        asked = self.recipe.tokenizer
        if asked is None or (asked.source in self.sources and not asked.model_fields_set - {"source"}):
            return Lexicon(self.sources)
        raise PlanError(f"tokens are to be matched, and none can be read in {self.home}", "tokenizer.source", _SAVE)

    def _vocabularies(self, texts: Mapping[int, str]) -> dict[str, Vocabulary]:
        """The tokens of every model; a model that has no tokenizer is taken to have the result's source's."""
        vocabularies = {}
        for model, source in self.sources.items():
            own = tokens_of(source.tokenizer_folder)
            if own is None and disagreement(self.home, source.tokenizer_folder):
                raise PlanError(f"the tokens of model {model!r} cannot be read", str(source.tokenizer_folder), _SAVE)
            if own is not None and self._is_own:
                own = in_notation_of(own, source.tokenizer_folder, texts, self.home)
            vocabularies[model] = Vocabulary(texts if own is None else own)
        return vocabularies

    # ------------------------------------------------------------------ the target

    def _added(self, texts: Mapping[int, str], vocabularies: Mapping[str, Vocabulary]) -> AddedTokens:
        """Tokens that the source lacks: those of the other models for a union, and those that rules name."""
        known = set(texts.values())
        new: dict[str, Mapping[str, Any]] = {}
        for text, flags in self._wanted(vocabularies):
            if text not in known:
                new.setdefault(text, flags)
        return AddedTokens(max(texts, default=-1) + 1, tuple(new), {text: each for text, each in new.items() if each})

    def _wanted(self, vocabularies: Mapping[str, Vocabulary]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        union = self.asked.source == UNION
        order = (self.leader, *(model for model in self.sources if model != self.leader)) if union else ()
        for model in order:
            flags = added_tokens_of(self.sources[model].tokenizer_folder)
            own, rows = vocabularies[model].texts, self._rows_of(model)
            yield from ((own[number], flags.get(own[number], _PLAIN)) for number in sorted(own) if number < rows)
        for text, row in self.asked.tokens.items():
            donor = self.sources[row.model or self.leader].tokenizer_folder
            yield text, added_tokens_of(donor).get(row.token or text, {})

    def _rows_of(self, model: str) -> int:
        """Rows of a model's embeddings (of its head, where it has none)."""
        specs, axes = self.sources[model].specs, self.axes[model]
        return next((specs[name].shape[axis] for name, axis in axes.items()), 0)

    def _target(self, texts: Mapping[int, str], added: AddedTokens) -> Wanted:
        tokens = {**texts, **{each.number: each.text for each in added}}
        rules = {
            text: RowRule(row.model, row.token, row.id, row.zero, row.force) for text, row in self.asked.tokens.items()
        }
        leads = self.asked.prefer or (_BASE if _BASE in self.sources else None)
        target = Wanted(tokens, 0, rules, self.asked.missing, leads)
        return replace(target, num_rows=self._num_rows(target.num_tokens, grown=bool(added)))

    def _num_rows(self, tokens: int, *, grown: bool) -> int:
        if self.asked.pad_to is not None:
            return -(-tokens // self.asked.pad_to) * self.asked.pad_to
        source = self.leader if self.asked.source == UNION else self.asked.source
        rows = self._rows_of(source) if source in self.sources else 0
        return max(rows, tokens) if grown or not rows else rows

    # ------------------------------------------------------------------ rows

    def _shown(
        self, target: Wanted, vocabularies: Mapping[str, Vocabulary]
    ) -> tuple[Sources, dict[str, dict[str, dict[str, int]]]]:
        """The models as they show their rows, and where these come from."""
        maps: dict[str, dict[str, RowMap]] = {model: {} for model in self.sources}
        told: dict[str, dict[str, dict[str, int]]] = {}
        known: dict[object, dict[str, RowMap]] = {}
        for name in dict.fromkeys(name for axes in self.axes.values() for name in axes):
            rows = self._rows(name)
            flat = any(len(self.sources[model].specs[name].shape) == 1 for model in rows)
            wanted = replace(target, missing="zero") if flat and self.donor else target  # no sum of biases means much
            key = (flat, tuple(rows.items()))
            if key not in known:
                known[key] = row_maps(wanted, vocabularies, rows, name) if rows else {}
            by_model = known[key]
            if all(each.is_plain(rows[model]) for model, each in by_model.items()):
                continue
            told[name] = {model: each.counts() for model, each in by_model.items()}
            for model, each in by_model.items():
                maps[model][name] = each
        return {model: self._gathered(model, maps[model]) for model in self.sources}, told

    def _gathered(self, model: str, maps: Mapping[str, RowMap]) -> ModelSource:
        source = self.sources[model]
        if not maps:
            return source
        donor = None if self.donor is None else Donor(self.donor, source, maps)
        return GatheredModel(source, maps, self.sources, donor)

    def _digest(self, target: Wanted, added: AddedTokens, shown: Sources) -> str:
        """Of all tokens, and of where every row comes from."""
        digest = hashlib.sha256()
        for number, text in sorted(target.texts.items()):
            digest.update(f"{number} {text}\n".encode("utf-8", "surrogatepass"))
        for token in added:
            digest.update(repr(sorted(token.flags.items())).encode())
        for model, source in shown.items():
            for name, each in source.maps.items() if isinstance(source, GatheredModel) else ():
                digest.update(repr((model, name, each.sources, sorted(each.mixed.items()))).encode())
                digest.update(each.source.tobytes() + each.row.tobytes())
        return digest.hexdigest()

    def _rows(self, name: str) -> dict[str, int]:
        """Rows of a tensor in every model that has it; none where their other sizes differ."""
        axes = {model: axes[name] for model, axes in self.axes.items() if name in axes}
        shapes = {model: list(self.sources[model].specs[name].shape) for model in axes}
        rows = {model: shapes[model].pop(axis) for model, axis in axes.items()}
        return rows if len({tuple(shape) for shape in shapes.values()}) == 1 else {}

    def _check_overlap(self, target: Wanted, vocabularies: Mapping[str, Vocabulary]) -> None:
        kept = set(target.texts.values())
        for model, own in vocabularies.items():
            if own.texts and not kept & own.ids.keys():
                what = f"model {model!r} shares no token with the tokenizer of the result"
                fix = f"check the paths; or write tokenizer: {{source: {UNION}}} to have the tokens of both"
                raise PlanError(what, "tokenizer", fix)

    def _remarks(self, target: Wanted, vocabularies: Mapping[str, Vocabulary]) -> Iterator[str]:
        kept = set(target.texts.values())
        for model, own in vocabularies.items():
            lost = [text for text in own.ids if text not in kept]
            if lost and self.recipe.tokenizer is None:
                yield (
                    f"the tokenizer of model {model!r} is another one: rows are matched by token, and its {len(lost)} "
                    f"tokens that the result lacks are left out; to keep them: tokenizer: {{source: {UNION}}}"
                )
            elif self.recipe.tokenizer is None and own.texts != target.texts:
                yield f"the tokenizer of model {model!r} orders tokens otherwise: rows are matched by token"

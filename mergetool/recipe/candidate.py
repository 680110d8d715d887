"""Candidates of a search as documents of their own, so that they can be checked before the first is tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergetool.errors import RecipeError
from mergetool.methods.families.search import SearchMethod
from mergetool.recipe.document import Document, Place
from mergetool.search.space import Gene, Value


@dataclass
class CandidateDocument(Document):
    """A recipe as if `merge` had been written with plain numbers; messages point to where `merge.inner` was."""

    written: Document = field(default_factory=lambda: Document("", None))

    def where(self, place: Place) -> str:
        return self.written.where(("merge", "inner", *place[1:]) if place[:1] == ("merge",) else place)


def candidate_data(data: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a plain recipe with this `merge` section."""
    return {**{key: value for key, value in data.items() if key != "evaluate"}, "merge": dict(section)}


def corners(genes: Sequence[Gene]) -> list[tuple[Value, ...]]:
    """Where a search starts, and the lowest and the highest values of all genes; every choice occurs."""
    ends = [tuple(gene.value(share) for gene in genes) for share in (0.0, 1.0)]
    longest = max((len(gene.choices) for gene in genes), default=0)
    chosen = [
        tuple(gene.choices[turn % len(gene.choices)] if gene.choices else gene.start for gene in genes)
        for turn in range(longest)
    ]
    return [tuple(gene.start for gene in genes), *ends, *chosen]


def candidate_documents(document: Document, method: SearchMethod) -> list[CandidateDocument]:
    """The recipes at the corners of a search, for checking. Raises RecipeError."""
    models = document.data.get("models")
    if not isinstance(models, dict):
        return []  # which will be said
    return [
        CandidateDocument(
            document.name,
            candidate_data(document.data, method.candidate(values, tuple(models))),
            folder=document.folder,
            written=document,
        )
        for values in corners(method.space(tuple(models)).genes)
    ]


def unique(problems: Sequence[RecipeError]) -> list[RecipeError]:
    """Problems that several candidates share, once."""
    return list({str(problem): problem for problem in problems}.values())

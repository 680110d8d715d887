"""How much a search asks: known from the recipe, but for the number of items, which the tasks tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mergetool.methods.families.judged import JudgedSearch
from mergetool.planning.graph import BASE


@dataclass(frozen=True)
class SearchSize:
    """Who answers what. At most: what is known already is not asked again."""

    calibration: int
    """Models and random merges that answer all search items first."""
    candidates: int
    """Of all generations."""
    each: int | None
    """Items that a candidate answers; None: all search items."""
    finalists: int
    """Candidates that answer all search items in the end."""
    reported: int
    """Models and candidates that answer the items of the final report."""

    @classmethod
    def of(cls, method: JudgedSearch, names: Sequence[str]) -> "SearchSize":
        """The size of a search over these models, and the base, if it is among them."""
        search, estimator = method.search, method.estimator
        merges = estimator.num_calibration + (1 if estimator.num_calibration else 0)
        asked = estimator.kind != "full" and (estimator.needs_answers or merges > 0)
        each = None
        if estimator.kind != "full":
            given = estimator.ids
            each = estimator.items * len(method.tasks) if given is None else sum(map(len, given.values()))
        return cls(
            calibration=len(names) + merges if asked else 0,
            candidates=_candidates(method, [name for name in names if name != BASE]),
            each=each,
            finalists=search.rerank,
            reported=len(names) + 2,  # and the winner, and the start of the search
        )

    def items(self, num_search: int, num_report: int) -> int:
        """All questions, where the tasks have so many search items and report items."""
        each = num_search if self.each is None else self.each
        whole = self.calibration + (0 if self.each is None else self.finalists)
        return whole * num_search + self.candidates * each + self.reported * num_report


def _candidates(method: JudgedSearch, models: Sequence[str]) -> int:
    """Of all generations, at most."""
    search, space = method.search, method.space(models)
    if search.algorithm == "greedy":
        return 2 * len(space.genes) - 1
    if search.algorithm == "grid":
        return prod(space.counts)
    return search.population * search.generations

"""What comparing all tensors comes to: an answer, and its reason."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mergetool.engine.comparing import Compared, settle
from mergetool.engine.opposites import Matched
from mergetool.errors import MergeError, MergetoolError, SourceError
from mergetool.layouts.experts import GATES
from mergetool.methods.base import Method
from mergetool.outputs.push import read_lock
from mergetool.planning import Plan
from mergetool.planning.inner import inside

Answer = Literal["yes", "no", "cannot tell"]
_VERDICTS = ("same", "rounded", "near", "different")
_SHOWN = 20
_MANY = 100
"""Units in the last place that are no matter of rounding."""


@dataclass(frozen=True)
class Agreement:
    """Whether a checkpoint is what a recipe says, and why."""

    path: Path
    recipe: str
    answer: Answer
    reason: str
    fix: str = ""
    tensors: Mapping[str, int] = field(default_factory=dict)
    """How many are the same, rounded, near, different."""
    worst: tuple[Compared, ...] = ()
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def error(self) -> MergetoolError | None:
        """What a command ends with, unless the answer is yes."""
        if self.answer == "yes":
            return None
        if self.answer == "no":
            return SourceError(f"is not what {self.recipe} says: {self.reason}", str(self.path), self.fix)
        return MergeError(f"cannot tell whether it is what {self.recipe} says: {self.reason}", str(self.path), self.fix)

    def as_dict(self) -> dict[str, Any]:
        """The answer as JSON-able data."""
        return {
            "path": str(self.path),
            "recipe": self.recipe,
            "answer": self.answer,
            "exit_code": 0 if self.error is None else self.error.exit_code,
            "reason": self.reason,
            "fix": self.fix,
            "tensors": dict(self.tensors),
            "problems": list(self.problems),
            "differing": [each.as_dict() for each in self.worst],
            "remarks": list(self.remarks),
        }


class Judged:
    """What all tensors together come to."""

    def __init__(
        self, path: Path, plan: Plan, pairs: Matched, compared: Mapping[str, Compared], drawn: Collection[str]
    ) -> None:
        """`drawn`: tensors that another seed would make otherwise."""
        self._path, self._plan, self._pairs = path, plan, pairs
        every = list(compared.values())
        settle(every)
        self._counts = {word: sum(each.verdict == word for each in every) for word in _VERDICTS}
        self._total = len(every)
        self._off = sorted((each for each in every if each.beyond), key=lambda each: -each.worst)
        self._different = [each for each in self._off if each.verdict == "different"]
        self._seed = _seed_of(path)
        self._drawn = () if self._seed == plan.seed else drawn

    def agreement(self) -> Agreement:
        answer, reason, fix = self._decided()
        name, told = self._plan.recipe.name, {word: count for word, count in self._counts.items() if count}
        remarks = (*self._pairs.remarks, *self._remarks())
        return Agreement(
            self._path, name, answer, reason, fix, told, tuple(self._off[:_SHOWN]), tuple(self._pairs.problems), remarks
        )

    def _decided(self) -> tuple[Answer, str, str]:
        problems = self._pairs.problems
        unordered = [each for each in self._different if each.name in self._pairs.unordered]
        known = [each for each in self._different if each.name not in self._drawn and each not in unordered]
        again = f"to have what it says: mergetool run {self._plan.recipe.name} -o FOLDER"
        if problems or known:
            told = [*([self._told(known)] if known else []), *problems]
            return "no", "; ".join(told), again
        if unordered:
            what = f"{unordered[0].name} differs, and there is no tokenizer beside it to tell which row is which token"
            return "cannot tell", what, "put the tokenizer that belongs to it beside it: tokenizer.json"
        if self._different:
            return "cannot tell", *self._words_about_draws()
        if self._off:
            what = (
                f"{len(self._off)} of {self._total} tensors are off by more than one rounding of their dtype, by up to "
                f"{max(each.units for each in self._off):.2g} units in the last place, and much nearer to what the "
                "recipe makes than to any input: so a tool leaves them that computes in a narrow dtype"
            )
            return "cannot tell", what, again
        same, rounded = self._counts["same"], self._counts["rounded"]
        parts = [f"{same} bit for bit"] * bool(same) + [f"{rounded} to one rounding of their dtype"] * bool(rounded)
        return "yes", f"{self._total} tensors are what {self._plan.recipe.name} says ({', '.join(parts)})", ""

    def _told(self, known: list[Compared]) -> str:
        first = known[0]
        units = f", {first.units:.2g} units in the last place" if 0 < first.units < _MANY else ""
        return (
            f"{len(known)} of {self._total} tensors differ, most of all {first.name}: {first.beyond} of "
            f"{first.entries} entries, by up to {first.worst:.3g} (at flat index {first.place}: {first.found:.6g} "
            f"here, {first.expected:.6g} by the recipe{units})"
        )

    def _words_about_draws(self) -> tuple[str, str]:
        seed = self._seed
        where = f"its lock says seed {seed}" if seed is not None else "nothing here says with which seed it was made"
        what = (
            f"{len(self._different)} of {self._total} tensors differ in what is drawn at random: the recipe's seed is "
            f"{self._plan.seed}, {where}"
        )
        return what, f"name the seed: --set compute.seed={'N' if seed is None else seed}"

    def _remarks(self) -> Iterator[str]:
        here = self._path.resolve()
        for name, source in self._plan.sources.items():
            if source.folder is not None and source.folder.resolve() == here:
                yield f"it is {name!r} of the recipe itself"


def drawn_tensors(plan: Plan) -> set[str]:
    """Output tensors whose numbers the seed decides, or the measuring of gates."""
    inner = any(draws(step.operation.method) for each in inside(plan).values() for step in each.steps)
    steps = (
        step
        for step in plan.steps
        if inner
        or draws(step.operation.method)
        or step.is_measured
        or any(operand.source == GATES for operand in step.operands)
    )
    return {slot.spec.name for step in steps for slot in step.slots}


def draws(method: Method | None) -> bool:
    """Whether another seed gives another result."""
    for key in method.exempt if method is not None else ():
        law, _, option = key.partition(" ")
        name, _, value = option.partition("=")
        if law == "seed-free" and (not option or str(getattr(method, name)) == value):
            return True
    return False


def _seed_of(path: Path) -> int | None:
    """The seed that a checkpoint's lock tells."""
    try:
        seed = read_lock(path).get("seed")
    except SourceError:
        return None
    return seed if isinstance(seed, int) else None

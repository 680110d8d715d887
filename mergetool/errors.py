"""Every error a user can meet, as one small tree.

    MergetoolError            what went wrong, where, and what to type to fix it
     +- RecipeError       2   the recipe is wrong
     +- SourceError       3   a model is missing, truncated, corrupt or hostile, or not what a recipe says
     +- PlanError         4   models do not fit together, or do not fit the memory given
     +- MergeError        5   a result is not finite, a fit did not converge; what --against cannot tell
     +- OutputError       6   exists, is an input, no space, cannot be written, another run holds it
     +- EvaluationError   7   a task is unknown or failed
     +- HubError          8   the Hub refused, or cannot be reached

The number is the exit code of the command line. Anything that is not in this tree is a bug of ours: exit 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar


class MergetoolError(Exception):
    """An error made of three parts: `what` (with the values that disagree), `where`, and `fix` (something to type)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The error as JSON-able data, for `--json`."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "what": self.what,
            "where": self.where,
            "fix": self.fix,
        }


class RecipeError(MergetoolError):
    """The recipe is wrong. Holds every problem found, not only the first (`problems`)."""

    exit_code = 2

    def __init__(self, what: str, where: str = "", fix: str = "", problems: Sequence["RecipeError"] = ()) -> None:
        super().__init__(what, where, fix)
        self.problems: tuple[RecipeError, ...] = tuple(problems) or (self,)

    @classmethod
    def of(cls, problems: Sequence["RecipeError"]) -> "RecipeError":
        """One error that carries `problems` (at least one)."""
        if len(problems) == 1:
            return problems[0]
        return cls(f"{len(problems)} problems in the recipe", problems=problems)

    def __str__(self) -> str:
        if self.problems == (self,):
            return super().__str__()
        return "\n".join(str(problem) for problem in self.problems)

    def as_dict(self) -> dict[str, object]:
        if self.problems == (self,):
            return super().as_dict()
        return super().as_dict() | {"problems": [problem.as_dict() for problem in self.problems]}


class SourceError(MergetoolError):
    """A model is missing, truncated, corrupt or hostile."""

    exit_code = 3


class PlanError(MergetoolError):
    """Models do not fit together, or do not fit the memory given."""

    exit_code = 4


class MergeError(MergetoolError):
    """A result is not finite, or a fit did not converge."""

    exit_code = 5


class OutputError(MergetoolError):
    """The output exists, is an input, has no space, cannot be written, or another run holds it."""

    exit_code = 6


class EvaluationError(MergetoolError):
    """An evaluation task is unknown or failed."""

    exit_code = 7


class HubError(MergetoolError):
    """The Hub refused, or cannot be reached."""

    exit_code = 8


@contextmanager
def at(where: str) -> Iterator[None]:
    """Add `where` in front of the place named by any MergetoolError raised inside the block."""
    try:
        yield
    except MergetoolError as error:
        error.where = f"{where}: {error.where}" if error.where else where
        raise

"""What a run remembers of what is done: a journal on the disk, or only what passes have found."""

import json
from collections.abc import Sequence
from typing import Protocol

from mergetool.methods.base import Stats
from mergetool.methods.group import Note
from mergetool.outputs.journal import Done
from mergetool.planning import Step
from mergetool.planning.operations import Merge


class Log(Protocol):
    """Where stages look what is done already, and say what they have done. `Journal` is one."""

    done: Done

    def unit(self, stage: str, step: Step, start: int, notes: list[Note]) -> None:
        """A unit is written."""
        ...

    def known(self, stage: str, steps: Sequence[Step]) -> Stats | None:
        """What all passes over these steps have found, if they were counted before."""
        ...

    def counted(self, stage: str, steps: Sequence[Step], stats: Stats) -> None:
        """All passes over these steps are finished."""
        ...


class MemoryLog(Log):
    """Remembers what was counted, under all that it depends on but the weights: for merges of the same models."""

    def __init__(self) -> None:
        self.done = Done()
        self._known: dict[str, Stats] = {}

    def unit(self, stage: str, step: Step, start: int, notes: list[Note]) -> None:
        pass

    def known(self, stage: str, steps: Sequence[Step]) -> Stats | None:
        return self._known.get(_settings(stage, steps))

    def counted(self, stage: str, steps: Sequence[Step], stats: Stats) -> None:
        self._known[_settings(stage, steps)] = stats


def _settings(stage: str, steps: Sequence[Step]) -> str:
    """Tensors, models, and the settings that decide what the passes find."""
    operation = steps[0].operation
    assert isinstance(operation, Merge)
    return json.dumps([stage, [step.name for step in steps], steps[0].reads, *operation.pass_settings], default=str)

"""What a run learns while it works, and how what several processes learnt is put together."""

import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.methods.group import Note

if TYPE_CHECKING:
    from torch import Tensor


NOT_FINITE = "holds values that are not finite"
KEPT_WIDE = "stays in float32 (output.keep_float32)"
INFINITE = "holds infinite values, as all that it was made from"
"""What is noted of tensors that were let through, so that a later look at them knows."""
RANK, LOST = "rank", "lost by the rank"
"""What is measured of changes that are kept as factors: directions, and the share of its length that the rest has."""


@dataclass
class Record:
    """What a run learnt: digests of files, remarks on tensors, bytes read for merging (surveys included)."""

    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[Note]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    """On the output as a whole."""
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was measured on the models, and on what."""
    bytes_read: int = 0
    device: str = "cpu"
    """Where the arithmetic was done, of the first process."""
    why: str = ""
    """What was expected there and elsewhere, where there was a choice."""
    resumed: bool = False
    """Whether something that an earlier run had made was taken up, beside units of merging."""
    workers_memory: int = 0
    """Bytes that processes of workers had of their own."""

    def note(self, name: str, notes: Sequence[Note]) -> None:
        """Keep what was noted of a tensor, each remark once."""
        known = self.notes.setdefault(name, []) if notes else []
        known += [note for note in notes if note not in known]

    @classmethod
    def of(cls, records: "Sequence[Record]") -> "Record":
        """What several processes learnt together."""
        joined = cls(device=records[0].device, why=records[0].why)
        for record in records:
            joined.inputs |= record.inputs
            joined.outputs |= record.outputs
            joined.remarks += record.remarks
            joined.statistics |= record.statistics
            joined.bytes_read += record.bytes_read
            joined.resumed |= record.resumed
            joined.workers_memory += record.workers_memory
            for name, notes in record.notes.items():
                joined.note(name, notes)
        return joined


def peak_memory() -> int:
    """The most bytes that this process has had, as far as the system tells.

    Not what getrusage tells on Linux, if that can be helped: it counts the process that started this one.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def joined_counts(counts: "list[list[Tensor | None]]") -> "list[Tensor | None]":
    """The counts of several processes, piece by piece."""
    joined = counts[0]
    for others in counts[1:]:
        for place, other in enumerate(others):
            if other is not None:
                known = joined[place]
                joined[place] = other if known is None else known.add_(other)
    return joined

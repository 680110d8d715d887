"""What a finished run reports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergetool.tensors.hub_upload import Pushed


@dataclass(frozen=True)
class Result:
    """A finished run."""

    path: Path
    seconds: float
    bytes_read: int
    """Bytes read for merging; surveys and resumed work count only what this process read."""
    bytes_written: int
    peak_memory: int
    """Largest resident size of this process and what its workers' processes had of their own, in bytes."""
    num_tensors: int
    resumed: bool
    notes: dict[str, int] = field(default_factory=dict)
    """How many tensors carry each remark."""
    warnings: tuple[str, ...] = ()
    num_processes: int = 1
    results: tuple[Path, ...] = ()
    """Of a sweep, the folders inside `path`."""
    pushed: Pushed | None = None
    """Where on the Hub it is now."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for `--json`."""
        return {
            "path": str(self.path),
            **({"results": [str(each) for each in self.results]} if self.results else {}),
            "seconds": round(self.seconds, 3),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory": self.peak_memory,
            "tensors": self.num_tensors,
            "resumed": self.resumed,
            "processes": self.num_processes,
            "notes": self.notes,
            "warnings": list(self.warnings),
            "pushed": None if self.pushed is None else self.pushed.as_dict(),
        }

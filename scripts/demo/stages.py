"""Reuse by content: a result is made again unless it is, byte for byte, what was made before from the same inputs."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .sources import sha256


def digest(*parts: str) -> str:
    """One digest of several strings, in order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def digest_of_files(paths: Iterable[Path]) -> str:
    """Digest of the contents of files, whatever their order."""
    return digest(*sorted(sha256(path) for path in paths))


@dataclass(frozen=True)
class Stage:
    """A folder or file, and the digest of everything that its content follows from; its stamp lies beside it."""

    path: Path
    inputs: str

    @property
    def stamp(self) -> Path:
        """Where the inputs and the hash of every file are written down."""
        return self.path.with_name(f"{self.path.name}.stamp.json")

    def is_current(self) -> bool:
        """Whether every file is there unchanged, and was made from the same inputs."""
        try:
            stamp = json.loads(self.stamp.read_text())
        except (FileNotFoundError, ValueError):
            return False
        return bool(stamp == self._state())

    def build(self, make: Callable[[Path], object]) -> None:
        """Let `make` fill a new folder, put it in place of the old one, and seal it."""
        partial = self.path.with_name(f"{self.path.name}.making")
        for folder in (partial, self.path):
            shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(self.path)
        self.seal()

    def seal(self) -> None:
        """Stamp what is at `path` now."""
        self.stamp.write_text(json.dumps(self._state(), indent=1))

    def output(self) -> str:
        """Digest of the content: an input of the stages that read it."""
        return digest(json.dumps(self._state()["files"]))

    def _state(self) -> dict[str, object]:
        paths = [self.path] if self.path.is_file() else sorted(self.path.rglob("*"))
        files = {path.relative_to(self.path).as_posix(): sha256(path) for path in paths if path.is_file()}
        return {"inputs": self.inputs, "files": files}

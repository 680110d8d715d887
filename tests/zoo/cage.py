"""Models of the zoo, each made once a test session and then shared, by all workers; nobody may change them."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.zoo.build import build, tuned
from tests.zoo.families import FAMILIES
from tests.zoo.oracle import State, state_of


class Zoo:
    """Folders by what is in them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}
        self._states: dict[tuple[Path, type], State] = {}

    def base(self, family: str, **changes: Any) -> Path:
        """The base of a family."""
        return self.made(_key(family, "base", **changes), lambda folder: build(folder, family, **changes))

    def tuned(
        self, family: str, seed: int, *, model: type | None = None, base: Path | None = None, **more: Any
    ) -> Path:
        """A fine-tune of a family's base (or of `base`), of the same class unless `model` says another."""
        origin = base or self.base(family)
        cls = model or FAMILIES[family].model
        key = _key(family, origin.name, seed, cls.__name__, **more)
        return self.made(key, lambda folder: tuned(folder, origin, seed, model=cls, **more))

    def made(self, key: str, make: Callable[[Path], Path]) -> Path:
        """What `make` writes into a folder of this name; written once."""
        if key not in self._made:
            folder = self._root / f"{key[:60]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            if not folder.exists():
                self._write(folder, make)
            self._made[key] = folder
        return self._made[key]

    def _write(self, folder: Path, make: Callable[[Path], Path]) -> None:
        """All of the folder at once, unless another worker was faster."""
        begun = Path(tempfile.mkdtemp(dir=self._root))
        make(begun / folder.name)
        try:
            (begun / folder.name).rename(folder)
        except OSError:
            assert folder.is_dir()
        shutil.rmtree(begun)

    def state(self, folder: Path, model: type) -> State:
        """The tensors of a folder as the module of this class has them, in float64. Not to be changed."""
        if (folder, model) not in self._states:
            self._states[folder, model] = state_of(folder, model)
        return self._states[folder, model]


def _key(*parts: object, **changes: Any) -> str:
    settings = [f"{key}={value}" for key, value in sorted(changes.items())]
    return "-".join(str(part).replace("/", "_") for part in [*parts, *settings])

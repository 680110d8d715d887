"""What a calibration has learnt of unknown inputs: examples of known and of strange ones, beside `calibration.json`.

What the router reads of an input is held against what it read of the examples (see `mergetool.kernels.claims`). Doubt
is 1 less what the task says that claims most of it. The file is written by `mergetool.bundle.learn`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mergetool.bundle.calibration import AGAIN, Calibration
from mergetool.bundle.files import read_all
from mergetool.errors import SourceError
from mergetool.kernels.claims import claims
from mergetool.tensors.io import sha256_file

EXAMPLES = "calibration.safetensors"


class Examples:
    """Examples (N, D) and their weights (N, tasks), and what features are made comparable with. Only ever read."""

    def __init__(self, tensors: Mapping[str, Tensor], most: float) -> None:
        """`most`: the most doubt about a known input."""
        self.most = most
        self._tensors = {name: values.float() for name, values in tensors.items()}

    @classmethod
    def read(cls, folder: Path, found: Calibration | None, shape: tuple[int, int] | None = None) -> Self | None:
        """Those of a bundle's calibration, if it has any; `shape`: of how many features and tasks they should be.

        Raises SourceError for a file that is damaged, or not that of the calibration.
        """
        if found is None or found.examples is None or found.doubt is None:
            return None
        path = folder / EXAMPLES
        if not path.is_file() or sha256_file(path) != found.examples:
            raise SourceError("is not there, or not as it was written", str(path), AGAIN)
        tensors = read_all(path)
        if not _fits(tensors, shape):
            raise SourceError("holds no examples of this bundle", str(path), AGAIN)
        return cls(tensors, found.doubt)

    def to(self, device: torch.device) -> None:
        """Keep everything on `device`."""
        self._tensors = {name: values.to(device) for name, values in self._tensors.items()}

    def doubt(self, features: Sequence[Tensor]) -> Tensor:
        """(samples,) of what was read of whole samples, (samples, D_i) float32 at every matrix."""
        x = (torch.cat(list(features), -1) - self._tensors["centre"]) / self._tensors["scale"]
        return 1 - claims(x, self._tensors["examples"], self._tensors["weights"]).amax(-1)


def _fits(tensors: Mapping[str, Tensor], shape: tuple[int, int] | None) -> bool:
    """Whether they are those that belong together, all of them finite."""
    if set(tensors) != {"centre", "scale", "examples", "weights"} or tensors["weights"].ndim != 2:
        return False
    count, tasks = tensors["weights"].shape
    width = tensors["centre"].numel()
    expected = {"centre": (width,), "scale": (width,), "examples": (count, width), "weights": (count, tasks)}
    alike = all(tuple(values.shape) == expected[name] for name, values in tensors.items())
    finite = all(values.is_floating_point() and bool(values.isfinite().all()) for values in tensors.values())
    return (
        alike
        and finite
        and count * tasks > 0
        and bool((tensors["scale"] > 0).all())
        and shape in (None, (width, tasks))
    )

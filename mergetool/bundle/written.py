"""Files of all tasks' factors, filled tensor by tensor, and what is measured of all tasks while a tensor is at hand.

A task has a file of its own, and a tensor's factors of all tasks are written together: so nothing is read again to
tell how much they are in each other's way, and which experts changed nearly the same.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mergetool.bundle.alike import changes_in_full, leading_products
from mergetool.bundle.files import TensorWriter, factors_path, triplet_names, whole_name
from mergetool.bundle.manifest import Parameter
from mergetool.bundle.options import Options
from mergetool.bundle.ranks import factor_specs, full_spec
from mergetool.bundle.task_vector import check_finite
from mergetool.kernels.spectral import Factors, concatenated, grams, interference_of
from mergetool.kernels.sums import all_finite
from mergetool.tensors.dtypes import BY_TORCH_NAME, torch_dtype
from mergetool.tensors.header import TensorSpec


class Overlap(NamedTuple):
    """What is found of one tensor's changes, as they are stored."""

    interference: float | None
    """Singular task interference, over the sum of singular values; None of what is no product."""
    inner: Tensor
    """Inner products of the changes of every two tasks, (T, T), float64; of products, of their leading directions."""


class FactorFiles:
    """The files of a bundle's factors."""

    def __init__(
        self, folder: Path, names: Sequence[str], parameters: Mapping[str, Parameter], options: Options
    ) -> None:
        self._folder, self._names, self._parameters, self._options = folder, names, parameters, options
        self._writers: dict[str, TensorWriter] = {}
        self._dtype = torch_dtype(BY_TORCH_NAME[options.dtype])

    def create(self, task: str) -> str:
        """Give a task's file its final size; its path in the bundle."""
        self._open(task)
        return factors_path(task)

    def open(self) -> None:
        """Open the files of all tasks, which are there."""
        for task in self._names:
            if task not in self._writers:
                self._open(task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def _open(self, task: str) -> None:
        place = self._names.index(task)
        specs: list[TensorSpec] = []
        for name, parameter in self._parameters.items():
            if parameter.policy == "svd" and (rank := parameter.ranks[place]):
                specs += factor_specs(name, parameter.shape, rank, self._options)
            elif parameter.policy == "full":
                specs += [full_spec(name, parameter.shape, self._options)]
        self._writers[task] = TensorWriter(self._folder, factors_path(task), specs)

    def put_whole(self, name: str, changes: Sequence[Tensor]) -> Overlap:
        """Keep all tasks' changes of a tensor in full."""
        stored = [change.to(self._dtype) for change in changes]
        for task, change in zip(self._names, stored, strict=True):
            self._writers[task].put(whole_name(name), change)
        return self._checked(name, Overlap(None, changes_in_full(stored)), [[change] for change in stored])

    def put(self, name: str, factors: Sequence[Factors]) -> Overlap:
        """Keep all tasks' factors of a tensor."""
        stored = [Factors(each.u.to(self._dtype), each.s.float(), each.v.to(self._dtype)) for each in factors]
        for task, each in zip(self._names, stored, strict=True):
            for key, part in zip(triplet_names(name), (each.u, each.s, each.v.mT), strict=True):
                if each.rank:
                    self._writers[task].put(key, part)
        every = concatenated(stored).to(torch.float32)
        left, right = grams(every)
        ranks = [each.rank for each in stored]
        inner, between = leading_products(left, right, every.s, ranks), interference_of(left, right, every.s)
        return self._checked(name, Overlap(between.normalised, inner), [(each.u, each.s, each.v) for each in stored])

    def _checked(self, name: str, measured: Overlap, parts: Sequence[Sequence[Tensor]]) -> Overlap:
        """What was measured; it would not be finite if any of all tasks' `parts` was not."""
        if not (math.isfinite(measured.interference or 0.0) and all_finite(measured.inner)):
            for task, own in zip(self._names, parts, strict=True):
                check_finite(task, name, all(map(all_finite, own)))
        return measured

"""From sums to figures: rows for the whole, for layers, roles, cells of both, tensors, models and pairs of models."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import combinations
from operator import add
from statistics import median
from typing import Any

import numpy as np

from mergetool.analysis.beside import Beside
from mergetool.analysis.measure import DIRECTIONS, Matrix, Readings, interference_by_chance, kept_directions
from mergetool.arch.depth import role, structural_depths
from mergetool.kernels.differences import cosine, ratio
from mergetool.kernels.task_vectors import Array, SliceSums, density_of_energy, energy_in_largest

Row = dict[str, Any]
OUTSIDE = "outside the layers"
_DENSITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_ENERGY = 0.9


@dataclass(frozen=True)
class Standing:
    """Where a tensor stands in the network."""

    layer: str
    """What stands before and with the number of the layer."""
    depth: int | None
    role: str
    """What stands behind that number: the same in every layer, and for every expert."""


class Grouped:
    """Figures of some tensors together."""

    def __init__(self, tallies: Iterable[SliceSums], models: Beside) -> None:
        self.tally = reduce(add, (each.in_full() for each in tallies))
        self._models = models
        self.count = len(models.models)

    @property
    def gram(self) -> Array:
        """Products of task vectors."""
        return self.tally.gram[1:, 1:]

    @cached_property
    def weights(self) -> Array:
        """Products of the weights themselves, what changes are measured from first."""
        turn = np.eye(self.count + 1)
        turn[:, 0] = 1.0
        products: Array = turn @ self.tally.gram @ turn.T
        return products

    def cosine(self, i: int, j: int) -> float:
        """Of two task vectors."""
        return cosine(self.gram[i, j], self.gram[i, i], self.gram[j, j])

    def kinship(self, i: int, j: int) -> float:
        """Cosine of the weights of two models; -1 is the base."""
        w = self.weights
        return cosine(w[i + 1, j + 1], w[i + 1, i + 1], w[j + 1, j + 1])

    def distance(self, i: int, j: int) -> float:
        """Of the weights of two models, over the mean of their norms."""
        apart = max(0.0, self.gram[i, i] + self.gram[j, j] - 2 * self.gram[i, j])
        mean = (math.sqrt(self.weights[i + 1, i + 1]) + math.sqrt(self.weights[j + 1, j + 1])) / 2
        return ratio(apart, mean**2)

    def norm(self, i: int) -> float:
        return math.sqrt(max(0.0, self.gram[i, i]))

    def relative(self, i: int) -> float:
        """Norm of a task vector over that of what it is measured from."""
        return ratio(self.gram[i, i], self.tally.gram[0, 0]) if self.tally.gram[0, 0] else math.nan

    def share_of_sum(self, i: int) -> float:
        """What a task vector adds to the sum of all, as a share of that; 1 for all together."""
        whole = float(self.gram.sum())
        return float(self.gram[i].sum()) / whole if whole > 0 and self._models.reference != "mean" else math.nan

    def facts(self) -> Row:
        """Figures of all models together."""
        drawn, pairs = self.tally.drawn, [*combinations(range(self.count), 2)]
        kin = [*combinations(range(-1 if self._models.reference == "base" else 0, self.count), 2)]
        based = self._models.reference == "base"
        return {
            "parameters": self.tally.entries,
            "conflict": drawn.conflicts / drawn.entries if self.count > 1 and drawn.entries else math.nan,
            "conflict_by_chance": 1 - 2.0 ** (1 - self.count) if self.count > 1 else math.nan,
            "cancelled": 1 - drawn.mass_of_sum / drawn.mass.sum() if drawn.mass.sum() else math.nan,
            "cosine": _mean(self.cosine(i, j) for i, j in pairs),
            "kinship": _mean(self.kinship(i, j) for i, j in kin),
            "survives_bfloat16": drawn.survived / drawn.touched if based and drawn.touched else math.nan,
            "error_bfloat16": ratio(drawn.lost2, drawn.mean2) if based and drawn.mean2 else math.nan,
        }

    def by_model(self) -> Iterator[Row]:
        """Figures of each model."""
        for i, model in enumerate(self._models.models):
            yield {
                "model": model,
                "norm": self.norm(i),
                "relative": self.relative(i),
                "max": float(self.tally.largest[i]),
                "share_changed": float(self.tally.changed[i]) / max(1, self.tally.entries),
                "kinship": self.kinship(-1, i) if self._models.reference != "zero" else math.nan,
                "share_of_sum": self.share_of_sum(i),
            }

    def pairs(self) -> Iterator[Row]:
        drawn = self.tally.drawn
        for i, j in combinations(range(self.count), 2):
            both, agreed = drawn.moved[i, j], drawn.agreement[i, j]
            yield {
                "a": self._models.models[i],
                "b": self._models.models[j],
                "cosine": self.cosine(i, j),
                "kinship": self.kinship(i, j),
                "opposed": (both - agreed) / (2 * both) if both else math.nan,
                "distance": self.distance(i, j),
            }


class Figures:
    """All rows of an analysis."""

    def __init__(self, models: Beside, measured: Readings) -> None:
        self.models, self.measured = models, measured
        self.places = places(list(measured.tallies))
        self.whole = self.group(measured.tallies)
        matrices = [name for name in measured.tallies if len(models.shape(name)) > 1 and name not in models.tokens]
        inside = [name for name in matrices if self.places[name].depth is not None]
        self.inside = self.group(inside or matrices or measured.tallies)
        self.tokens = self.group(models.tokens & measured.tallies.keys())

    def group(self, names: Iterable[str]) -> Grouped | None:
        tallies = [self.measured.tallies[name] for name in self.measured.tallies if name in set(names)]
        return Grouped(tallies, self.models) if tallies else None

    def rows(self) -> dict[str, list[Row]]:
        """Every section."""
        by_layer = self._groups(lambda place: {"layer": place.layer, "depth": place.depth})
        by_role = self._groups(lambda place: {"role": place.role})
        by_cell = self._groups(lambda place: {"layer": place.layer, "depth": place.depth, "role": place.role})
        return {
            "models": [*self._models()],
            "pairs": [*self.whole.pairs()] if self.whole else [],
            "layers": [*self._facts(by_layer)],
            "roles": [*self._facts(by_role)],
            "cells": [head | {"tensors": len(names)} | group.facts() for head, names, group in by_cell],
            "layers_by_model": [head | row for head, _, group in by_layer for row in group.by_model()],
            "roles_by_model": [head | row for head, _, group in by_role for row in group.by_model()],
            "pairs_by_layer": [head | row for head, _, group in by_layer for row in group.pairs()],
            "pairs_by_role": [head | row for head, _, group in by_role for row in group.pairs()],
            "tensors": [*self._tensors()],
            "tensors_by_model": [*self._tensors_by_model()],
            "redundancy": [*self._redundancy()],
            "spectra": [row for name in self.measured.matrices for row in self._spectra(name)],
            "interference": [self._interference(name) for name in self.measured.matrices],
            "alignment": [row for name in self.measured.matrices for row in self._alignment(name)],
            "settings": [*self.models.settings],
            "missing": [*self.models.missing()],
        }

    def interference(self, names: Iterable[str]) -> float:
        """The mean over those of these tensors that were decomposed."""
        every = (self.measured.matrices[name] for name in names if name in self.measured.matrices)
        return _mean(each.interference.normalised for each in every)

    def chance(self, name: str) -> float:
        """The interference of a matrix by chance."""
        return interference_by_chance(self.models.matrix(name), len(self.models.models))

    def median_of(self, model: int, figure: Callable[[Any], float]) -> float:
        """Over all matrices that a model changes."""
        values = [figure(each.spectra[model]) for each in self.measured.matrices.values()]
        known = [value for value in values if not math.isnan(value)]
        return median(known) if known else math.nan

    def _groups(self, head: Callable[[Standing], Row]) -> list[tuple[Row, list[str], Grouped]]:
        groups: dict[tuple[Any, ...], list[str]] = {}
        heads: dict[tuple[Any, ...], Row] = {}
        for name in sorted(self.measured.tallies, key=self._order):
            row = head(self.places[name])
            key = tuple(row.values())
            heads[key] = row
            groups.setdefault(key, []).append(name)
        made = [(heads[key], names, self.group(names)) for key, names in groups.items()]
        return [(row, names, group) for row, names, group in made if group is not None]

    def _order(self, name: str) -> tuple[str, int]:
        """What is outside first, then layer by layer, towers one after the other."""
        place = self.places[name]
        return ("", -1) if place.depth is None else (place.layer.rpartition(".")[0], place.depth)

    def _facts(self, groups: Sequence[tuple[Row, list[str], Grouped]]) -> Iterator[Row]:
        for head, names, group in groups:
            yield head | {"tensors": len(names)} | group.facts() | {"interference": self.interference(names)}

    def _models(self) -> Iterator[Row]:
        whole, tallies = self.whole, self.measured.tallies
        if whole is None:
            return
        norms2 = float(np.trace(whole.gram))
        for i, row in enumerate(whole.by_model()):
            source = self.models.sources[row["model"]]
            magnitudes = whole.tally.drawn.magnitudes[i]
            yield row | {
                "dtypes": sorted({source.specs[name].dtype.name for name in tallies}),
                "identical": sum(not each.changed[i] for each in tallies.values()),
                "tensors": len(tallies),
                "kinship_layers": _of(self.inside, partial(Grouped.kinship, i=-1, j=i)),
                "kinship_tokens": _of(self.tokens, partial(Grouped.kinship, i=-1, j=i)),
                "share_of_norms": whole.gram[i, i] / norms2 if norms2 else math.nan,
                "density_90": density_of_energy(magnitudes, whole.tally.entries, _ENERGY),
                "effective_rank": self.median_of(i, lambda each: each.effective_rank),
                "stable_rank": self.median_of(i, lambda each: each.stable_rank),
                "edge": self.median_of(i, lambda each: each.edge),
                "not_finite": int(whole.tally.broken[-len(self.models.models) :][i]),
            }

    def _tensors(self) -> Iterator[Row]:
        for name, found in self.measured.tallies.items():
            stored = {source.specs[name].dtype.name: None for source in self.models.sources.values()}
            yield (
                {"tensor": name}
                | self._place(name)
                | {
                    "shape": list(self.models.shape(name)),
                    "dtypes": list(stored),
                    "state": "changed" if found.changed.any() else "identical",
                    "base_norm": math.sqrt(found.gram[0, 0]),
                }
                | Grouped([found], self.models).facts()
            )

    def _tensors_by_model(self) -> Iterator[Row]:
        for name, found in self.measured.tallies.items():
            for i, row in enumerate(Grouped([found], self.models).by_model()):
                yield {"tensor": name} | self._place(name) | {"identical": not found.changed[i]} | row

    def _place(self, name: str) -> Row:
        place = self.places[name]
        return {"layer": place.layer, "depth": place.depth, "role": place.role}

    def _redundancy(self) -> Iterator[Row]:
        if self.whole is None:
            return
        tally = self.whole.tally
        for model, magnitudes in zip(self.models.models, tally.drawn.magnitudes, strict=True):
            for density in _DENSITIES:
                energy, mass = (energy_in_largest(magnitudes, tally.entries, density, power) for power in (2, 1))
                yield {"model": model, "density": density, "energy": energy, "mass": mass}

    def _spectra(self, name: str) -> Iterator[Row]:
        for model, each in zip(self.models.models, self.measured.matrices[name].spectra, strict=True):
            first = float(each.leading[0]) if len(each.leading) else 1.0
            yield (
                {"tensor": name}
                | self._place(name)
                | {
                    "model": model,
                    "directions": min(each.shape),
                    "effective_rank": each.effective_rank,
                    "stable_rank": each.stable_rank,
                    "energy_1": each.energy(1),
                    "energy_4": each.energy(4),
                    "energy_16": each.energy(DIRECTIONS),
                    "edge": each.edge,
                    "leading": [float(value) / first for value in each.leading],
                }
            )

    def _interference(self, name: str) -> Row:
        found = self.measured.matrices[name]
        kept = kept_directions(self.models.matrix(name), len(self.models.models))
        return (
            {"tensor": name}
            | self._place(name)
            | {
                "kept": kept,
                "interference": found.interference.normalised,
                "chance": self.chance(name),
                "total": found.interference.total,
            }
        )

    def _alignment(self, name: str) -> Iterator[Row]:
        found: Matrix = self.measured.matrices[name]
        shape = self.models.matrix(name)
        kept = kept_directions(shape, len(self.models.models))
        for i, j, output, read in found.alignment:
            a, b = self.models.models[i], self.models.models[j]
            shares = {"output": output, "input": read, "chance": kept / min(shape)}
            yield {"tensor": name} | self._place(name) | {"a": a, "b": b, "kept": kept} | shares


def places(names: Sequence[str]) -> Mapping[str, Standing]:
    """Layer, depth and role of every tensor."""
    layers: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                layers.setdefault(".".join(parts[:place]), set()).add(part)
    return {name: _placed(name, depth, layers) for name, depth in structural_depths(names).items()}


def _placed(name: str, depth: tuple[int, int] | None, layers: Mapping[str, set[str]]) -> Standing:
    parts = name.split(".")
    numbers = (place for place, part in enumerate(parts) if part.isdecimal())
    number = next((place for place in numbers if len(layers[".".join(parts[:place])]) > 1), None)
    if depth is None or number is None:
        return Standing(OUTSIDE, None, name)
    return Standing(".".join(parts[: number + 1]), depth[0], role(parts[number + 1 :]))


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _of(group: Grouped | None, figure: Callable[[Grouped], float]) -> float:
    return math.nan if group is None else figure(group)

"""Analyze a recipe: open its models, read them once, and put together what was found."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mergetool._version import __version__
from mergetool.analysis.advice import WEIGHTS, Advice, Adviser
from mergetool.analysis.beside import Beside, beside
from mergetool.analysis.clusters import clustered
from mergetool.analysis.descent import Rows
from mergetool.analysis.figures import Figures, Row
from mergetool.analysis.follow import Following, descent_advice, followed
from mergetool.analysis.hints import hints
from mergetool.analysis.measure import Readings, measure
from mergetool.analysis.methods import methods_to_try
from mergetool.analysis.numbers import coefficients_of, words_about_numbers
from mergetool.analysis.problems import problems
from mergetool.analysis.result import Analysis, plain
from mergetool.engine.devices import one_thread
from mergetool.engine.progress import Progress, Silent
from mergetool.errors import PlanError
from mergetool.pages.cells import share
from mergetool.recipe.schema import Recipe
from mergetool.units import counted

VERSION = 1
"""Of the JSON."""


def analyze_recipe(
    recipe: Recipe,
    progress: Progress | None = None,
    workers: int | None = None,
    following: Following | None = None,
) -> Analysis:
    """What the models of a recipe are to each other. Raises SourceError, PlanError or HubError."""
    progress = progress or Silent()
    started = time.monotonic()
    with one_thread(), beside(recipe, progress) as models:
        if not models.names:
            what = "the models have no floating-point tensor in common, by name and shape"
            raise PlanError(what, recipe.name, "mergetool diff A B tells what each of two of them holds")
        measured = measure(models, progress, workers)
        progress.stop()
        rows, remarks = followed(recipe, models.opened, following or Following(), progress)
        return _analysis(recipe, models, measured, rows, remarks, time.monotonic() - started)


def _analysis(
    recipe: Recipe, models: Beside, measured: Readings, rows: Rows, remarks: Sequence[str], seconds: float
) -> Analysis:
    figures = Figures(models, measured)
    advice = advise(Adviser(figures, coefficients_of(recipe)), descent_advice(rows))
    order, linkage = clusters(figures)
    facts = {
        "version": VERSION,
        "mergetool": __version__,
        "recipe": recipe.name,
        "method": recipe.method.method_name(),
        "base": None if recipe.base is None else recipe.base.source,
        "models": {name: reference.source for name, reference in recipe.models.items()},
        "compared_with": models.reference,
        "summary": [*_summary(figures, advice)],
        "advice": [each.row() for each in advice],
        "whole": _whole(figures),
        "order": order,
        "linkage": linkage,
        "rows": {**_with_sources(figures.rows(), recipe), **rows},
        "remarks": [*models.remarks, *_remarks(measured), *remarks],
        "cost": _cost(figures, measured, seconds),
    }
    return Analysis(plain(facts))


def _with_sources(rows: dict[str, list[Row]], recipe: Recipe) -> dict[str, list[Row]]:
    """With where each model is from beside its name."""
    models = [{"model": row["model"], "source": recipe.models[row["model"]].source} | row for row in rows["models"]]
    return rows | {"models": models}


def advise(adviser: Adviser, more: Sequence[Advice] = ()) -> list[Advice]:
    """Problems first; models that do not belong are left out of what comes after them."""
    found = [*problems(adviser), *words_about_numbers(adviser), *hints(adviser), *methods_to_try(adviser), *more]
    return sorted(found, key=lambda each: WEIGHTS.index(each.weight))


def _whole(figures: Figures) -> Row:
    assert figures.whole is not None
    tallies = figures.measured.tallies
    norm = {"base_norm": float(np.sqrt(figures.whole.tally.gram[0, 0]))}
    return {"tensors": len(tallies)} | figures.whole.facts() | norm | {"interference": figures.interference(tallies)}


def _remarks(measured: Readings) -> Iterator[str]:
    if measured.skipped:
        yield f"{len(measured.skipped)} matrices are too large to be taken apart: {', '.join(measured.skipped[:3])}"


def _cost(figures: Figures, measured: Readings, seconds: float) -> Row:
    drawn = sum(each.drawn.entries for each in measured.tallies.values())
    entries = sum(each.entries for each in measured.tallies.values())
    return {
        "seconds": seconds,
        "bytes_read": measured.bytes_read,
        "parameters": entries,
        "sampled": drawn / max(1, entries),
        "matrices": len(measured.matrices),
        "matrices_of": len(measured.matrices) + len(measured.skipped),
        "workers": measured.workers,
    }


def clusters(figures: Figures) -> tuple[list[str], list[list[float]]]:
    """An order in which relatives stand side by side, and what joins what at which height.

    By average linkage of 1 - cosine: of task vectors, or, where there is no base, of the weights.
    """
    models, whole = figures.models.models, figures.whole
    if len(models) < 2 or whole is None:
        return list(models), []
    of_cosine = whole.kinship if figures.models.reference == "mean" else whole.cosine
    cosines = np.array([[of_cosine(i, j) for j in range(len(models))] for i in range(len(models))])
    order, linkage = clustered(1 - np.nan_to_num(cosines, nan=0.0))
    return [models[place] for place in order], linkage


def _summary(figures: Figures, advice: Sequence[Advice]) -> Iterator[str]:
    """What people want to know first."""
    assert figures.whole is not None
    facts = plain(figures.whole.facts())
    names = ", ".join(figures.models.models)
    beside = {"base": " and the base", "mean": "", "zero": " (adapters by themselves)"}[figures.models.reference]
    yield f"{names}{beside}: {len(figures.measured.tallies)} tensors, {counted(facts['parameters'])} parameters"
    kin = _range(row["kinship"] for row in figures.whole.pairs())
    if kin and figures.models.reference != "zero":
        yield f"kinship (cosine of weights) of the models {kin}"
    if figures.models.reference != "mean":
        sizes = {row["model"]: row["relative"] for row in figures.whole.by_model()}
        if figures.whole.tally.gram[0, 0] and figures.models.reference == "base":
            told = ", ".join(f"{model} {size:.3g}" for model, size in sizes.items())
            yield f"task vectors, relative to the base: {told}"
        if cosines := _range(row["cosine"] for row in figures.whole.pairs()):
            yield f"cosine of task vectors {cosines}"
    if facts["conflict"] is not None and figures.models.reference != "mean":
        found, chance = (share(facts[key]) for key in ("conflict", "conflict_by_chance"))
        yield f"opposite signs on {found} of the entries (chance: {chance})"
    if missing := sum(1 for _ in figures.models.missing()):
        yield f"{missing} tensors are not in all models in one shape, and are left out"
    if not any(each.weight == "problem" for each in advice):
        yield "nothing speaks against merging them"


def _range(values: Any) -> str:
    known = [value for value in values if value == value]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"

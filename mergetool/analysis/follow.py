"""Follow models on data they were trained for, and along their runs: what is asked, and what it advises."""

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from mergetool.analysis.advice import Advice
from mergetool.analysis.descent import SCALES, DescentStudy, Row, Rows, path_rows
from mergetool.analysis.likeness import likeness_rows
from mergetool.engine.progress import Progress
from mergetool.engine.run import Flags, run_recipe
from mergetool.errors import PlanError
from mergetool.pages.cells import share
from mergetool.planning.graph import BASE
from mergetool.recipe.schema import Recipe
from mergetool.tensors.folder import open_model
from mergetool.tensors.source import ModelSource

_NEAR = 0.9
"""Cosine with the finished task vector from which on a checkpoint has its direction."""
_CLIMBS = -0.1
"""Cross-talk below which a task vector is said to hurt another task."""


@dataclass(frozen=True)
class Following:
    """What is known of models beside their weights."""

    data: Mapping[str, Path] = field(default_factory=dict)
    """Rows of what a model was trained for, by model."""
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    """Folders of a run's checkpoints, by model."""
    cache: Path | None = None
    device: str = "cpu"


def followed(
    recipe: Recipe, sources: Mapping[str, ModelSource], asked: Following, progress: Progress
) -> tuple[Rows, list[str]]:
    """Tables of what was found, and remarks. Raises PlanError, SourceError or MergeError."""
    if not (asked.data or asked.checkpoints):
        return {}, []
    if BASE not in sources:
        what = "the recipe has no base, and gradients and checkpoints are seen from there"
        raise PlanError(what, recipe.name, "add base: MODEL, or leave --data and --checkpoints out")
    models = {name: source for name, source in sources.items() if name != BASE}
    _check_names({"--data": asked.data, "--checkpoints": asked.checkpoints}, models)
    rows: Rows = {}
    remarks: list[str] = []
    if asked.data:
        rows, remarks = _on_data(recipe, sources[BASE], models, asked, progress)
    if asked.checkpoints:
        every = (path_rows(sources[BASE], name, models[name], each) for name, each in asked.checkpoints.items())
        rows["path"] = [row for several in every for row in several]
    return rows, remarks


def _on_data(
    recipe: Recipe, base: ModelSource, models: Mapping[str, ModelSource], asked: Following, progress: Progress
) -> tuple[Rows, list[str]]:
    import torch

    study = DescentStudy(base, models, asked.data, asked.cache, torch.device(asked.device))
    rows = study.rows(progress.say)
    progress.say("comparing what the models make of all rows")
    rows["likeness"] = likeness_rows({BASE: base, **models}, study.examples, torch.device(asked.device))
    if recipe.result != "checkpoint" or recipe.method.searches or recipe.method.code():
        return rows, [f"{recipe.method.method_name()} makes no one checkpoint to follow losses to: no table of scales"]
    with tempfile.TemporaryDirectory(prefix="mergetool-analyze-") as folder:
        merged = run_recipe(recipe, Flags(Path(folder) / "merged", push=False)).path
        with closing(open_model(merged)) as model:
            rows["scales"] = study.along(model, progress.say)
    return rows, []


def _check_names(given: Mapping[str, Mapping[str, Path]], models: Iterable[str]) -> None:
    """Raise PlanError for something that is given of a model that there is not."""
    for flag, paths in given.items():
        for name in paths:
            if name not in models:
                what = f"there is no model {name!r}"
                raise PlanError(what, f"{flag} {name}={paths[name]}", f"the models are: {', '.join(models)}")


def descent_advice(rows: Rows) -> list[Advice]:
    """The scale with the least loss, earlier checkpoints that will do, and task vectors that hurt other tasks."""
    return [*_scale(rows.get("scales", [])), *_early(rows.get("path", [])), *_crossed(rows.get("crosstalk", []))]


def _scale(rows: list[Row]) -> list[Advice]:
    if not rows:
        return []
    models = list(dict.fromkeys(row["model"] for row in rows))
    loss = {(row["model"], row["scale"]): row["loss"] for row in rows}
    mean = {scale: fmean(loss[model, scale] / loss[model, 0.0] for model in models) for scale in SCALES}
    best = min(mean, key=lambda scale: mean[scale])
    if best == 1.0:
        return []
    why = f"the tasks' losses, relative to the base's, are least at {best:g} times the merge's change, not at all of it"
    if best == 0.0:
        why = "on these rows no scale of this merge is better than the base"
    return [
        Advice(
            kind="scale",
            weight="warning" if best == 0.0 else "hint",
            models=tuple(models),
            title=f"scale the merge's change by {best:g}",
            why=why,
            evidence={f"at {scale:g}": value for scale, value in mean.items()},
            formula="mean over tasks of loss(base + s (merged - base)) / loss(base)",
            fix=f"multiply `scale` of the method by {best:g}, or try another method" if best else "try another method",
        )
    ]


def _early(rows: list[Row]) -> list[Advice]:
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        path = [row for row in rows if row["model"] == model]
        first = next((row for row in path if row["cosine"] > _NEAR), None)
        if first is not None and first is not path[-1]:
            found.append(
                Advice(
                    kind="checkpoint",
                    weight="hint",
                    models=(model,),
                    title=f"{first['checkpoint']} of {model} has the direction of the finished model",
                    why="shorter task vectors of the same direction are closer to gradients, and merge more easily",
                    evidence={row["checkpoint"]: row["cosine"] for row in path},
                    formula=f"the first checkpoint with cos(t_k, t) > {_NEAR}",
                    fix=f"try it in the recipe: {model}: .../{first['checkpoint']}",
                )
            )
    return found


def _crossed(rows: list[Row]) -> list[Advice]:
    bad = [row for row in rows if row["model"] != row["loss"] and row["crosstalk"] < _CLIMBS]
    return [
        Advice(
            kind="crosstalk",
            weight="warning",
            models=(row["model"], row["loss"]),
            title=f"{row['model']} climbs the loss of {row['loss']}",
            why=f"to first order, its task vector undoes {share(-row['crosstalk'])} of what {row['loss']} gained",
            evidence={"crosstalk": row["crosstalk"]},
            formula="<g_s, t_t> / <g_s, t_s>, g_s the gradient of the loss of s at the base",
            fix=f"give {row['model']} a smaller weight, or a method that removes interference: tsv-merge",
        )
        for row in bad
    ]

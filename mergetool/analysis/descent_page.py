"""The chapter of the page of an analysis about models that were followed on data and along their runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from mergetool.analysis.drawings import depths_of, over_depth
from mergetool.pages import Chapter, Column, Picture, Piece, Table, heat, lines

Told: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Sequence[Told]

_WHOLE = (
    ("model", Column("model")),
    ("rows", Column("rows", "count")),
    ("loss_base", Column("loss at the base", "number")),
    ("loss_tuned", Column("loss of the model", "number")),
    ("alignment", Column("alignment", "fixed", "cosine of the task vector and minus the gradient at the base")),
    ("preconditioned", Column("preconditioned", "fixed", "the same with the gradient as Adam scales it")),
    ("step", Column("step", "number", "length along the gradient, as a learning rate")),
    ("linearity", Column("linearity", "number", "share of the fall that the gradient promises that really comes")),
)


def descent(told: Told) -> Chapter | None:
    """Task vectors as steps down the loss, cross-talk, losses along the merge, and checkpoints along a run."""
    pieces = [*_gradients(told), *_crosstalk(told["rows"].get("crosstalk", [])), *_curves(told["rows"])]
    lead = (
        "How the models go down the losses of their tasks. Task vectors that follow the gradient (alignment and "
        "linearity near 1) add up; negative cross-talk says that one undoes another."
    )
    return Chapter("Task vectors and losses", pieces, lead) if pieces else None


def _gradients(told: Told) -> Iterator[Piece]:
    if rows := told["rows"].get("descent"):
        yield Table([column for _, column in _WHOLE], [[row[key] for key, _ in _WHOLE] for row in rows])
    if (layers := told["rows"].get("descent_by_layer")) and (depth := depths_of(told)):
        series = {
            f"{name}{ending}": points
            for key, ending in (("alignment", ""), ("preconditioned", ", preconditioned"))
            for name, points in over_depth(layers, depth, ("model",), key).items()
        }
        yield Picture(lines(series, "layer", "cosine with the way down", least=(0, 0.1)), "Alignment, layer by layer.")


def _crosstalk(rows: Rows) -> Iterator[Piece]:
    losses, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("loss", "model"))
    if len(models) < 2:
        return
    values = {(row["loss"], row["model"]): row["crosstalk"] for row in rows}
    grid = [[values.get((loss, model)) for model in models] for loss in losses]
    draw = heat(
        grid, losses, models, "share of the gain", diverging=True, numbers=".2f", xlabel="task vector", ylabel="loss"
    )
    caption = "How much of what a task gains each task vector brings, to first order."
    yield Picture(draw, caption, (min(3.5 + 0.8 * len(models), 9), min(1.6 + 0.6 * len(losses), 9)))


def _curves(rows: Mapping[str, Rows]) -> Iterator[Piece]:
    if scales := rows.get("scales"):
        draw = lines(_series(scales, "scale", "loss"), "times the change of the merge", "loss")
        yield Picture(draw, "The loss of each task along the merge: 0 is the base, 1 the merge as the recipe says.")
    if likeness := rows.get("likeness"):
        pairs = [{**row, "model": f"{row['a']}, {row['b']}"} for row in likeness]
        caption = "How alike what two models make of the rows is: linear CKA of each block's mean over tokens."
        yield Picture(lines(_series(pairs, "block", "cka"), "block", "CKA", least=(0, 1)), caption)
    if path := rows.get("path"):
        steps = [{**row, "at": number} for number, row in enumerate(path, 1)]
        series = {
            f"{name}, {key}": points
            for key in ("length", "cosine")
            for name, points in _series(steps, "at", key).items()
        }
        yield Picture(
            lines(series, "checkpoint", "of the finished task vector", least=(0, 1)),
            "Length and direction of a run's checkpoints, relative to where it ended.",
        )


def _series(rows: Rows, x: str, y: str) -> dict[str, tuple[list[float], list[float | None]]]:
    models = dict.fromkeys(row["model"] for row in rows)
    own = {model: [row for row in rows if row["model"] == model] for model in models}
    return {model: ([row[x] for row in several], [row[y] for row in several]) for model, several in own.items()}

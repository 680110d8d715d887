"""The chapters of the page of an analysis that have pictures."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any, TypeAlias

from mergetool.pages import Chapter, Column, Picture, Piece, Table, bars, heat, lines
from mergetool.pages.cells import share
from mergetool.pages.plots import Points
from mergetool.pages.words import MOST_OF_ROW

Told: TypeAlias = Mapping[str, Any]

_WRITTEN = 8
"""Models up to which matrices have their numbers written in."""
_PAIRS = 6
"""Pairs up to which each has a line of its own."""


def norms(told: Told) -> Chapter | None:
    """How far every model went, over depth and by role."""
    depth, models = depths_of(told), list(told["models"])
    against = "norm of the change / norm of the base"
    pieces: list[Piece] = []
    if depth:
        series = over_depth(told["rows"]["layers_by_model"], depth, ("model",), "relative")
        caption = f"The size of every model's change, layer by layer.{stacks(told)}"
        pieces.append(
            Picture(lines(series, "layer", against, log=_is_wide(series), zero=not _is_wide(series)), caption)
        )
    if grid := _grid(told["rows"]["roles_by_model"], "role", "model", "relative"):
        known = (row["role"] for row in told["rows"]["roles_by_model"] if row["relative"] is not None)
        roles = list(dict.fromkeys(known))
        values = [[grid.get((role, model)) for model in models] for role in roles]
        numbers = ".2g" if len(models) <= _WRITTEN else None
        size = _size(len(roles), len(models), numbers is not None, longest=roles)
        pieces.append(Picture(heat(values, roles, models, against, numbers=numbers), "The same by role.", size))
    lead = (
        "How far each model went from the base. Lines of one height merge well as they are; one far above the others "
        "wins everywhere (give it a smaller weight), one at the bottom hardly learnt anything."
    )
    return Chapter("Size of the changes", pieces, lead) if pieces else None


def agreement(told: Told) -> Chapter | None:
    """Matrices of kinship and cosine, relatives side by side, and the cosines over depth."""
    pairs = told["rows"]["pairs"]
    if not pairs:
        return None
    order, depth = told["order"], depths_of(told)
    numbers = ".2f" if len(order) <= _WRITTEN else None
    size = _size(len(order), len(order), numbers is not None, longest=order)
    finer = (
        ".4f"
        if numbers and min((p["kinship"] for p in pairs if p["kinship"] is not None), default=0) > 0.9
        else numbers
    )
    cosines = heat(
        _square(pairs, order, "cosine"),
        order,
        order,
        "cosine of changes",
        low=-1,
        high=1,
        diverging=True,
        numbers=numbers,
    )
    kinship = heat(_square(pairs, order, "kinship"), order, order, "cosine of weights", high=1, low=0, numbers=finer)
    pieces: list[Piece] = [
        Picture(cosines, "Cosine of the changes: 0 for models that learnt unrelated things, 1 for the same.", size),
        Picture(kinship, "Kinship, the cosine of the weights themselves: far from 1 are strangers.", size),
    ]
    if depth:
        series = _pair_lines(told["rows"]["pairs_by_layer"], depth, len(pairs))
        pieces.append(
            Picture(
                lines(series, "layer", "cosine of changes", reference=("unrelated", 0.0), least=(-0.2, 0.2)),
                "Over depth.",
            )
        )
    pieces.append(_pair_table(pairs))
    lead = (
        "Which models belong together; neighbours in the matrices are the most alike. Strangers cannot be averaged; "
        "two models with a cosine near 1 are one model twice; negative ones undo each other."
    )
    return Chapter("Do the models agree?", pieces, lead)


def _pair_table(pairs: Sequence[Told]) -> Table:
    columns: list[Column | str] = ["model", "and", Column("cosine of changes", "signed"), Column("kinship", "number")]
    columns += [Column("opposite signs", "share", "of the entries that both move"), Column("distance", "number")]
    keys = ("a", "b", "cosine", "kinship", "opposed", "distance")
    return Table(columns, [[row[key] for key in keys] for row in pairs], show=12)


def conflicts(told: Told) -> Chapter | None:
    """The map of layers and roles."""
    cells = [row for row in told["rows"]["cells"] if row["conflict"] is not None]
    if not cells or len(told["models"]) < 2:
        return None
    layers = [row["layer"] for row in sorted(told["rows"]["layers"], key=lambda row: row["depth"] is None)]
    roles = list(dict.fromkeys(row["role"] for row in cells))
    found = _grid(cells, "role", "layer", "conflict")
    values = [[found.get((role, layer)) for layer in layers] for role in roles]
    depth = depths_of(told)
    names = [str(depth[layer]) if layer in depth else "other" for layer in layers]
    chance = told["whole"]["conflict_by_chance"]
    picture = Picture(
        heat(
            values,
            roles,
            names,
            "share of entries in conflict",
            low=0,
            high=max(chance or 0, 1e-9),
            xlabel="layer (other: outside of all)",
        ),
        f"The far end of the scale is what signs by chance would have ({share(chance)}).{stacks(told)}",
        _size(len(roles), len(layers), False, longest=roles),
    )
    lead = (
        "The share of entries that some models raise and others lower. Where it is high, plain sums cancel: "
        "methods that settle signs (`ties`, `della`, `sce`) or keep fewer entries help there."
    )
    return Chapter("Where signs are in conflict", [picture], lead)


def dominance(told: Told) -> Chapter | None:
    """Shares of squared norms, by role and as a whole; what each model has of the sum, over depth."""
    models, depth = list(told["models"]), depths_of(told)
    if len(models) < 2:
        return None
    squares = {("all", row["model"]): _square_of(row) for row in told["rows"]["models"]}
    squares |= {(row["role"], row["model"]): _square_of(row) for row in told["rows"]["roles_by_model"]}
    names = list(dict.fromkeys(name for name, _ in squares))
    names = [name for name in names if sum(squares.get((name, model), 0.0) for model in models)]
    if not names:
        return None
    totals = {name: sum(squares.get((name, model), 0.0) for model in models) for name in names}
    parts = {model: [100 * squares.get((name, model), 0.0) / totals[name] for name in names] for model in models}
    size = (8.0, min(0.8 + 0.28 * len(names), 12.0))
    pieces: list[Piece] = [Picture(bars(parts, names, "% of all squared changes"), "By role of the tensors.", size)]
    if depth:
        series = over_depth(told["rows"]["layers_by_model"], depth, ("model",), "share_of_sum")
        fair = ("an equal share", 1 / len(models))
        caption = "What part of the summed change points along each model: negative where the others undo it."
        pieces.append(Picture(lines(series, "layer", "share of the sum", reference=fair, least=(0, 0.1)), caption))
    lead = (
        "Whose changes the merge will mostly be made of, when all weights are 1. Give a smaller weight to a model "
        "that has nearly everything, or use a method that evens norms out."
    )
    return Chapter("Who dominates", pieces, lead)


def _square_of(row: Told) -> float:
    return float(row["norm"] or 0.0) ** 2


def redundancy(told: Told) -> Chapter | None:
    """How much of a change its largest entries hold."""
    curves: dict[str, tuple[list[float], list[float | None]]] = defaultdict(lambda: ([], []))
    for row in told["rows"]["redundancy"]:
        if row["energy"] is not None:
            curves[row["model"]][0].append(100 * row["density"])
            curves[row["model"]][1].append(100 * row["energy"])
    if not curves:
        return None
    drawn = lines(
        curves, "% of entries kept, the largest first", "% of the squared change", logx=True, reference=("90 %", 90.0)
    )
    found = {row["model"]: row["density_90"] for row in told["rows"]["models"] if row["density_90"] is not None}
    told_of = "; ".join(f"{model}: {share(value)}" for model, value in found.items())
    lead = (
        "How few entries hold most of a change. A curve that is high at the left can be trimmed hard (a small "
        "`density`); one that rises late needs nearly all of its entries."
    )
    return Chapter("Redundancy", [Picture(drawn, f"Share of entries that holds 90 %: {told_of}.")], lead)


def spaces(told: Told) -> Chapter | None:
    """Spectra, effective ranks, interference and alignment."""
    depth, rows = depths_of(told), told["rows"]
    pieces: list[Piece] = []
    if rows["spectra"]:
        leading = {model: _leading(rows["spectra"], model) for model in told["models"]}
        caption = "The first singular values of the changes, as a share of the largest; median of the matrices."
        series = {model: values for model, values in leading.items() if values[0]}
        pieces.append(Picture(lines(series, "singular value", "size / the largest", zero=True), caption))
        ranks = [row | {"used": _used(row)} for row in rows["spectra"]]
        if depth:
            drawn = lines(
                over_depth(ranks, depth, ("model",), "used"), "layer", "effective rank, % of directions", zero=True
            )
            pieces.append(
                Picture(drawn, "How many directions the changes really use; median of the matrices of a layer.")
            )
    if depth and rows["interference"]:
        by_chance = [row["chance"] for row in rows["interference"] if row["chance"] is not None]
        drawn = lines(over_depth(rows["interference"], depth, (), "interference"), "layer", "interference", zero=True,
                      reference=("by chance", fmean(by_chance)) if by_chance else None)  # fmt: skip
        pieces.append(
            Picture(drawn, "Overlap of the leading directions of all models (singular task interference); 0: none.")
        )
    if depth and rows["alignment"]:
        shared = [row | {"both": _both(row)} for row in rows["alignment"]]
        chance = fmean(row["chance"] for row in shared)
        drawn = lines(_pair_lines(shared, depth, len(rows["pairs"]), "both"), "layer", "share of directions in common",
                      zero=True, reference=("by chance", chance))  # fmt: skip
        pieces.append(Picture(drawn, "Leading directions that two models have in common, mean of both sides."))
    lead = (
        "Changes that use few directions can be merged there (`tsv-merge`, `iso-c`, `knots`); a change that uses "
        "nearly all of them looks like noise. Where interference is high, those methods help most."
    )
    return Chapter("Directions of the changes", pieces, lead) if pieces else None


def _used(row: Told) -> float | None:
    """How many of its directions a change uses; of a matrix that is not changed, none is known."""
    return None if row["effective_rank"] is None else 100 * row["effective_rank"] / row["directions"]


def _leading(rows: Sequence[Told], model: str) -> Points:
    found = [row["leading"] for row in rows if row["model"] == model and row["leading"]]
    longest = max(map(len, found), default=0)
    places = list(range(1, longest + 1))
    return places, [median(each[place - 1] for each in found if len(each) >= place) for place in places]


def _both(row: Told) -> float | None:
    sides = [row[side] for side in ("output", "input") if row[side] is not None]
    return fmean(sides) if sides else None


def rounding(told: Told) -> Chapter | None:
    """What bfloat16 costs."""
    survives, error = (told["whole"][key] for key in ("survives_bfloat16", "error_bfloat16"))
    if survives is None or error is None:
        return None
    depth, layers = depths_of(told), told["rows"]["layers"]
    pieces: list[Piece] = []
    if depth:
        named = (("entries that stay changed", "survives_bfloat16"), ("error / change", "error_bfloat16"))
        rows = [row | {"what": name, "value": _percent(row[key])} for row in layers for name, key in named]
        drawn = lines(over_depth(rows, depth, ("what",), "value"), "layer", "share, %", zero=True)
        pieces.append(Picture(drawn, "Of the mean of the models, stored in bfloat16.", (8, 3)))
    lead = (
        f"{share(survives)} of the entries that a plain mean changes are still changed after rounding to bfloat16; the "
        f"rounding error is {share(error)} of the change. Where little is left, write "
        f"`output: {{dtype: float32}}`, or scale up."
    )
    return Chapter("What bfloat16 costs", pieces, lead)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def depths_of(told: Told) -> dict[str, int]:
    """Layer -> place on the axis: its number, or where several stacks have the same numbers its place among all."""
    found = {row["layer"]: row["depth"] for row in told["rows"]["layers"] if row["depth"] is not None}
    if len(set(found.values())) < len(found):
        return {layer: place for place, layer in enumerate(found)}
    return found if len(found) > 1 else {}


def stacks(told: Told) -> str:
    """Which stack has which numbers on the axis of layers, where there are several."""
    found: dict[str, list[int]] = defaultdict(list)
    for layer, place in depths_of(told).items():
        found[layer.rpartition(".")[0]].append(place)
    named = (f"`{stack}` {min(places)} to {max(places)}" for stack, places in found.items())
    return f" Layers are numbered through: {', '.join(named)}." if len(found) > 1 else ""


def over_depth(
    rows: Iterable[Told], depth: Mapping[str, int], by: Sequence[str], key: str,
    of: Callable[[Sequence[float]], float] = median,
) -> Mapping[str, Points]:  # fmt: skip
    """One line for each value of `by`: the median of `key` in each layer, or something else `of` all of them."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["layer"] in depth:
            at = found[" and ".join(row[name] for name in by) or key][depth[row["layer"]]]
            at += [] if row[key] is None else [row[key]]
    return {
        name: (sorted(places), [of(places[place]) if places[place] else None for place in sorted(places)])
        for name, places in found.items()
    }


def _pair_lines(
    rows: Iterable[Told], depth: Mapping[str, int], pairs: int, key: str = "cosine"
) -> Mapping[str, Points]:
    """One line for each pair; of many pairs their lowest, median and highest."""
    if pairs <= _PAIRS:
        return over_depth(rows, depth, ("a", "b"), key)
    found = list(rows)
    named: dict[str, Callable[[Sequence[float]], float]] = {"highest pair": max, "median": median, "lowest pair": min}
    return {name: over_depth(found, depth, (), key, of).get(key, ((), ())) for name, of in named.items()}


def _is_wide(series: Mapping[str, Points]) -> bool:
    """Whether values are too far apart for an even scale."""
    found = [value for _, values in series.values() for value in values if value]
    return bool(found) and max(found) > 20 * min(found)


def _grid(rows: Iterable[Told], row: str, column: str, key: str) -> dict[tuple[str, str], float | None]:
    return {(each[row], each[column]): each[key] for each in rows}


def _square(pairs: Sequence[Told], order: Sequence[str], key: str) -> list[list[float | None]]:
    """The matrix of all pairs in this order: with itself a model agrees."""
    found = {frozenset((row["a"], row["b"])): row[key] for row in pairs}
    return [[1.0 if a == b else found.get(frozenset((a, b))) for b in order] for a in order]


def _size(rows: int, columns: int, written: bool, longest: Sequence[str]) -> tuple[float, float]:
    """Room for the names at the left and the cells, no wider than the page."""
    names = min(max(map(len, longest), default=0), MOST_OF_ROW) * 0.075
    width = names + 1.6 + columns * (0.62 if written else 0.24)
    return min(max(width, 4.0), 9.0), min(1.2 + rows * (0.42 if written else 0.27), 11.0)

"""Ready drawings for pictures: lines, points, bars, maps of colours. Axes say what they show, with the unit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from mergetool.pages import cells
from mergetool.pages.colours import DIVERGING, LEVELS, LIGHT, SEQUENTIAL, SERIES
from mergetool.pages.pictures import DASHES, MARKERS
from mergetool.pages.words import MOST_OF_ROW, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw: TypeAlias = "Callable[[Axes], None]"
Points: TypeAlias = tuple[Sequence[float], Sequence[float | None]]


def style(place: int, many: int = 1) -> dict[str, Any]:
    """Colour, mark and dash of the line at `place`: no two of many lines look alike, also in grey."""
    colours = SERIES["light"]
    return {
        "color": colours[place % len(colours)],
        "marker": MARKERS[place % len(MARKERS)] if many <= 40 else "",
        "linestyle": DASHES[place // len(colours) % len(DASHES)],
    }


def lines(
    series: Mapping[str, Points], xlabel: str, ylabel: str, *, log: bool = False,
    logx: bool = False, zero: bool = False,
    reference: tuple[str, float] | None = None, least: tuple[float, float] | None = None,
) -> Draw:  # fmt: skip
    """One line for each name, with a gap where a value is None. `zero`: the axis starts there; `reference`: a level.

    `least`: what the axis shows at least, so that next to nothing does not look like much.
    """

    def draw(axes: "Axes") -> None:
        longest = max((len(x) for x, _ in series.values()), default=0)
        for place, (name, (x, y)) in enumerate(series.items()):
            axes.plot(x, _gaps(y), label=label(name), **style(place, longest))
        if reference:
            axes.axhline(reference[1], color=LIGHT["muted"], lw=1, ls="--", label=label(reference[0], 60))
        _finish(axes, xlabel, ylabel, log)
        if logx:
            axes.set_xscale("log")
        elif all(isinstance(value, int) for x, _ in series.values() for value in x):
            axes.locator_params(axis="x", integer=True)
        if zero:
            axes.set_ylim(0, 1.05 * max(axes.get_ylim()[1], 0) or 1)
        if least:
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, least[0]), max(high, least[1]))
        legend(axes)

    return draw


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def points(groups: Mapping[str, Points], xlabel: str, ylabel: str, *, diagonal: bool = False) -> Draw:
    """A cloud for each name; `diagonal`: where both axes agree."""

    def draw(axes: "Axes") -> None:
        for place, (name, (x, y)) in enumerate(groups.items()):
            axes.plot(x, _gaps(y), label=label(name), **style(place) | {"linestyle": "", "alpha": 0.8})
        if diagonal:
            axes.axline((0, 0), slope=1, color=LIGHT["muted"], lw=1, ls="--")
            axes.set_aspect("equal", "datalim")
        _finish(axes, xlabel, ylabel, False)
        legend(axes)

    return draw


def bars(
    parts: Mapping[str, Sequence[float]], names: Sequence[str], xlabel: str, *, stacked: bool = True,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Draw:  # fmt: skip
    """One bar for each name, from top to bottom, made of `parts` one after (or below) the other.

    `intervals`: from where to where each value may lie, of parts that are not stacked.
    """

    def draw(axes: "Axes") -> None:
        thick = 0.8 if stacked else 0.8 / len(parts)
        left = [0.0] * len(names)
        for place, (part, values) in enumerate(parts.items()):
            shift = 0.0 if stacked else (place - (len(parts) - 1) / 2) * thick
            rows = [row + shift for row in range(len(names))]
            axes.barh(
                rows, values, thick, left=left, label=label(part), color=style(place)["color"],
                edgecolor=LIGHT["paper"], linewidth=0.8,
            )  # fmt: skip
            for row, (low, high) in zip(rows, (intervals or {}).get(part, ()), strict=False):
                axes.plot((low, high), (row, row), color=LIGHT["ink"], lw=1.2, marker="|", ms=6)
            if stacked:
                left = [start + value for start, value in zip(left, values, strict=True)]
        axes.set_yticks(range(len(names)), [label(name, MOST_OF_ROW) for name in names])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        _finish(axes, xlabel, "", False)
        legend(axes)

    return draw


def heat(
    values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], unit: str, *,
    low: float | None = None, high: float | None = None, diverging: bool = False,
    numbers: str | None = None, xlabel: str = "", ylabel: str = "",
) -> Draw:  # fmt: skip
    """A map of colours, the first row at the top; `numbers` is the format of what is written in the cells (".2f").

    Colours follow the reader's mode: small values are near the paper; a diverging map is so in its middle.
    Of many rows or columns only some are named.
    """

    def draw(axes: "Axes") -> None:
        import numpy as np
        from matplotlib.colors import BoundaryNorm, ListedColormap

        grid = np.ma.masked_invalid(np.array(values, dtype=np.float64).reshape(len(rows), len(columns)))
        bounds = np.linspace(*_limits(grid, low, high, diverging), LEVELS + 1)
        colours = ListedColormap(DIVERGING if diverging else SEQUENTIAL)
        norm = BoundaryNorm(bounds, LEVELS, clip=True)
        edges = 1.0 if grid.size <= 400 else 0.0
        mesh = axes.pcolormesh(grid, cmap=colours, norm=norm, edgecolors=LIGHT["paper"], linewidth=edges)
        if numbers is not None:
            _write(axes, grid, numbers, norm, diverging)
        _frame(axes, rows, columns)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        ticks = np.linspace(bounds[0], bounds[-1], 5)
        bar = axes.figure.colorbar(
            mesh,
            ax=axes,
            label=unit,
            pad=0.02,
            aspect=max(15, 3 * len(rows)),
            ticks=ticks,
            spacing="proportional",
            drawedges=False,
        )
        bar.ax.tick_params(which="both", length=0)
        bar.ax.grid(visible=False, which="both")
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        bar.outline.set_visible(False)

    return draw


def _limits(grid: Any, low: float | None, high: float | None, diverging: bool) -> tuple[float, float]:
    """From where to where the colours go: given, or what there is; around zero where they diverge."""
    seen = grid.compressed()
    most = float(seen.max()) if len(seen) else 1.0
    least = float(seen.min()) if len(seen) else 0.0
    if diverging:
        reach = max(abs(most), abs(least), 1e-12)
        return (-reach if low is None else low), (reach if high is None else high)
    bottom, top = (min(0.0, least) if low is None else low), (most if high is None else high)
    return bottom, top if top > bottom else bottom + 1.0


def _write(axes: "Axes", grid: Any, numbers: str, norm: Any, diverging: bool) -> None:
    """Numbers in the cells, in the colour that can be read there."""
    for (row, column), value in _cells(grid):
        level = int(norm(value))
        far = abs(level - LEVELS // 2) > LEVELS // 4 if diverging else level > LEVELS // 2
        axes.text(
            column + 0.5, row + 0.5, cells.written(value, numbers), ha="center", va="center",
            color=LIGHT["paper" if far else "ink"],
        )  # fmt: skip


def _cells(grid: Any) -> Iterator[tuple[tuple[int, int], float]]:
    for row, line in enumerate(grid):
        for column, value in enumerate(line.tolist()):
            if value is not None:
                yield (row, column), value


def _frame(axes: "Axes", rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names at the cells (of many only some), the first row at the top, no frame."""
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for axis, names, most, longest in ((axes.xaxis, columns, 20, 28), (axes.yaxis, rows, 40, MOST_OF_ROW)):
        step = max(1, -(-len(names) // most))
        places = range(0, len(names), step)
        axis.set_ticks([place + 0.5 for place in places], [label(names[place], longest) for place in places])
    if max(map(len, columns), default=0) > 5:
        axes.tick_params(axis="x", rotation=40)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")


def _finish(axes: "Axes", xlabel: str, ylabel: str, log: bool) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        axes.set_yscale("log")


def legend(axes: "Axes") -> None:
    """Names above the plot, where they hide nothing; none where there is one thing only."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        columns = max(1, min(4, 100 // max(12, max(map(len, names)) + 4)))
        axes.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2)

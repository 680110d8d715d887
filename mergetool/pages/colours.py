"""The colours of all pages, light and dark: everybody can tell them apart, also who sees no red or no green.

A picture is drawn once, with the light colours; on the page each of them becomes a CSS variable, so that a picture
follows the reader's mode as text does.
"""

from collections.abc import Mapping, Sequence

LIGHT = {
    "ink": "#1d2027",
    "muted": "#666d79",
    "line": "#d9dce2",
    "shade": "#c3c8d1",
    "paper": "#fefefe",
    "panel": "#f5f6f8",
    "link": "#0b5cad",
    "good": "#00795a",
    "warn": "#9a5b00",
    "bad": "#b3261e",
}
DARK = {
    "ink": "#e4e6eb",
    "muted": "#9aa1ad",
    "line": "#3a3f49",
    "shade": "#000000",
    "paper": "#16181d",
    "panel": "#20232a",
    "link": "#7ab8f5",
    "good": "#41c99b",
    "warn": "#f0b04a",
    "bad": "#ff8a80",
}

SERIES = {
    "light": ("#004db3", "#cc5700", "#00966c", "#a25daf", "#ca9800", "#3fa1d8", "#5a5f69", "#6b2f89"),
    "dark": ("#4b93ec", "#f8843f", "#2fcc9c", "#de4b82", "#f0c63b", "#9bd5ff", "#9a8cb8", "#b5a8ef"),
}
"""Near those of Okabe and Ito; tests/pages measures how far apart they are for every kind of sight."""

LEVELS = 13
"""Steps of a map of colours: few enough to be told apart, odd so that a diverging map has a middle."""

_SEQUENTIAL = {
    "light": ("#f3f6fa", "#8fbbe0", "#2b7bba", "#08306b"),
    "dark": ("#23272f", "#26517c", "#4c93cf", "#cfe6fb"),
}
_DIVERGING = {
    "light": ("#7f2f00", "#d55e00", "#f3c3a0", "#f4f4f5", "#a3c8e8", "#2b7bba", "#083a70"),
    "dark": ("#ffd9bd", "#e57f3d", "#6f3c1c", "#272a31", "#25507a", "#559fdd", "#d0e7fc"),
}


def _ramp(stops: Sequence[str]) -> list[str]:
    """`LEVELS` colours through `stops`, evenly."""
    return [_between(stops, place / (LEVELS - 1) * (len(stops) - 1)) for place in range(LEVELS)]


def _between(stops: Sequence[str], place: float) -> str:
    left = min(int(place), len(stops) - 2)
    share = place - left
    mixed = (round(a + (b - a) * share) for a, b in zip(_rgb(stops[left]), _rgb(stops[left + 1]), strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _named(plain: Mapping[str, str], mode: str) -> dict[str, str]:
    """Every colour of one mode under the name of its CSS variable."""
    lists = {"s": SERIES[mode], "q": _ramp(_SEQUENTIAL[mode]), "d": _ramp(_DIVERGING[mode])}
    return dict(plain) | {f"{kind}{place}": colour for kind, row in lists.items() for place, colour in enumerate(row)}


NAMED = {"light": _named(LIGHT, "light"), "dark": _named(DARK, "dark")}
"""Mode -> name of a CSS variable -> colour."""
VARIABLES = {colour: f"var(--{name})" for name, colour in NAMED["light"].items()}
"""What a picture is drawn with -> what the page shows."""
SEQUENTIAL = [NAMED["light"][f"q{place}"] for place in range(LEVELS)]
DIVERGING = [NAMED["light"][f"d{place}"] for place in range(LEVELS)]


def css() -> str:
    """The colours as CSS: light, and dark where the reader prefers that and is not printing."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in NAMED[mode].items()) for mode in ("light", "dark"))
    return (
        f":root{{color-scheme:light dark;{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )

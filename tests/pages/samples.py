"""A page with one of everything, and names that no one would wish for."""

import math
from functools import cache

from mergetool.pages import (
    Bullets,
    Chapter,
    Code,
    Column,
    Details,
    Facts,
    Finding,
    Note,
    Page,
    Picture,
    Table,
    Text,
    bars,
    heat,
    lines,
    points,
    render,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(2)>",
    "]]> --> <!-- &amp; {{ 7 * 7 }} {% raw %}",
    "$\\frac{1 $ #d55e00 var(--s1)",
    "שלום \u202e abc",
    "nul \x00 bell \x07 \ud800",
    "日本語/モデル",
    "long-" * 40,
]
LAYERS = list(range(12))
COLUMNS = [
    Column("tensor", "code"),
    Column("model", hint=HOSTILE[1]),
    Column("norm", "number"),
    Column("share", "share"),
    Column("size", "bytes"),
]
ROWS = [
    (
        f"layers.{place // 4}.{'qkvo'[place % 4]}",
        HOSTILE[place % 8],
        None if place == 5 else (place * 37) % 101 / 7,
        place / 59,
        place * 10**6,
    )
    for place in range(60)
]


def pictures():
    waves = {name: (LAYERS, [math.sin(x + y) + 1.1 for x in LAYERS]) for y, name in enumerate(HOSTILE)}
    grid = [[None if x == y else (x - y) / 8 for x in range(8)] for y in range(8)]
    return [
        Picture(lines(waves, "layer", HOSTILE[0], log=True, reference=("level", 1.0)), HOSTILE[1]),
        Picture(lines({"one": ([1, 2, 3], [1, None, 2])}, "layer", "norm", zero=True)),
        Picture(heat(grid, HOSTILE, HOSTILE, "cosine", diverging=True, numbers=".2f"), "agreement", (6, 5)),
        Picture(heat([[0.0] * 40] * 3, ["q", "k", "v"], [str(x) for x in range(40)], "share", xlabel="layer")),
        Picture(
            bars({"a": [1, 2], "b": [3, 4]}, HOSTILE[:2], "share", stacked=False, intervals={"a": [(0, 2), (1, 3)]})
        ),
        Picture(bars({"a": [1, 2], "b": [3, 4]}, ["x", "y"], "items")),
        Picture(points({"all": ([1, 2], [2, 1]), "some": ([1], [1])}, "score", "estimate", diagonal=True)),
    ]


def everything():
    said = "`code` and " + " ".join(HOSTILE)
    findings = [
        Finding(name, said, HOSTILE, HOSTILE[0], HOSTILE[2], level)
        for name, level in zip(HOSTILE, LEVELS, strict=False)
    ]
    return Page(
        HOSTILE[0],
        said,
        [
            Chapter("Advice", [*findings, *(Note(said, level) for level in LEVELS)], said),
            Chapter(HOSTILE[1], pictures()),
            Chapter("Tensors", [Table(COLUMNS, ROWS, said, show=10, strong=[1]), Code(said)]),
            Chapter("Tensors", [Details(said, [Text(said), Bullets(HOSTILE), Table(HOSTILE[:2], [HOSTILE[2:4]])])]),
            Chapter("日本語"),
        ],
        [Facts([(name, name) for name in HOSTILE])],
        said,
    )


@cache
def rendered():
    return render(everything())


LEVELS = ("plain", "good", "warn", "bad")

"""The page of an analysis, from what its JSON says: advice first, then what it follows from."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mergetool._version import __version__
from mergetool.analysis.descent_page import descent
from mergetool.analysis.drawings import agreement, conflicts, dominance, norms, redundancy, rounding, spaces
from mergetool.pages import Bullets, Chapter, Column, Details, Facts, Finding, Note, Page, Piece, Table, Text, render
from mergetool.pages.cells import share, short
from mergetool.pages.parts import Cell, Level
from mergetool.units import counted, filesize, setting, timespan

Told: TypeAlias = Mapping[str, Any]

MOST_TENSORS = 500
"""Rows of the table of tensors: of larger models those that change most; all are in the JSON."""
_LEVELS: dict[str, Level] = {"problem": "bad", "warning": "warn", "hint": "plain"}
_BESIDE = 8
"""Models up to which each has a column of its own in the table of tensors."""


def analysis_page(told: Told) -> str:
    """The page as HTML. Raises ModuleNotFoundError where the extra `report` is not installed."""
    chapters = [_advice(told), _models(told), norms(told), agreement(told), conflicts(told), dominance(told)]
    chapters += [
        descent(told),
        redundancy(told),
        spaces(told),
        rounding(told),
        _tensors(told),
        _beside(told),
        _method(told),
    ]
    title = f"Analysis of {Path(told['recipe']).name}"
    found = [each for each in chapters if each]
    return render(Page(title, _lead(told), found, _intro(told), f"mergetool {__version__}"))


def _lead(told: Told) -> str:
    against = {
        "base": f"Changes are measured from the base `{told['base']}`.",
        "mean": "There is no base: changes are measured from the mean of the models.",
        "zero": "Adapters are looked at by themselves, without their base.",
    }[told["compared_with"]]
    count = len(told["models"])
    return f"{count} model{'s' * (count != 1)} before {'they are' if count > 1 else 'it is'} merged. {against}"


def _intro(told: Told) -> list[Piece]:
    whole, cost = told["whole"], told["cost"]
    figures = [
        ("models", str(len(told["models"]))),
        ("tensors", f"{whole['tensors']:,}"),
        ("parameters", counted(whole["parameters"])),
        ("read", filesize(cost["bytes_read"])),
        ("time", timespan(cost["seconds"])),
    ]
    summary = Bullets([_sentence(line, told) for line in told["summary"]])
    return [summary, Facts(figures), *(Note(_sentence(text, told), "warn") for text in told["remarks"])]


def _sentence(text: str, told: Told) -> str:
    """With a capital and a full stop; a model keeps its name as it is."""
    if not any(text.startswith(name) for name in told["models"]):
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _advice(told: Told) -> Chapter:
    findings = [
        Finding(
            _sentence(each["title"], told).removesuffix("."),
            _sentence(each["why"], told),
            [f"{name.replace('_', ' ')}: {_figure(value)}" for name, value in each["evidence"].items()],
            each["formula"],
            each["fix"],
            _LEVELS[each["weight"]],
        )
        for each in told["advice"]
    ]
    lead = (
        "What the figures suggest. A problem asks for a change of the recipe, a warning for a look; the others tell "
        "where to begin."
    )
    return Chapter("Advice", findings or [Note("Nothing stands out.", "good")], lead)


def _figure(value: Any) -> str:
    """A piece of evidence as people read it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_figure(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_figure, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    return short(value) if isinstance(value, int | float) else str(value)


_MODEL_COLUMNS = (
    ("norm", Column("norm of change", "number", "square root of the sum of squares of all changes")),
    ("relative", Column("relative", "share", "norm of the change / norm of the base")),
    ("share_changed", Column("entries changed", "share")),
    ("identical", Column("tensors as in base", "count")),
    ("kinship", Column("kinship", "number", "cosine between its weights and those of the base: 1 for the same")),
    (
        "density_90",
        Column("density for 90 %", "share", "smallest share of entries that holds 90 % of the squared norm"),
    ),
    ("effective_rank", Column("effective rank", "number", "median of its matrices")),
    ("edge", Column("above noise", "number", "largest singular value / that of noise of the same size: 1 for noise")),
    ("not_finite", Column("not finite", "count", "entries that are NaN or infinite")),
)


def _models(told: Told) -> Chapter:
    rows = told["rows"]["models"]
    used = [(key, column) for key, column in _MODEL_COLUMNS if any(row.get(key) is not None for row in rows)]
    columns: list[Column | str] = ["model", Column("from", "code"), "dtype", *(column for _, column in used)]
    body = [
        (row["model"], told["models"][row["model"]], " ".join(row["dtypes"]), *(row.get(key) for key, _ in used))
        for row in rows
    ]
    lead = (
        "One row for each model. Fine-tunes of one base have a kinship near 1 and changes of a like size; "
        "one that is far off has another ancestor, or was trained much longer."
    )
    return Chapter("The models", [Table(columns, body)], lead)


def _tensors(told: Told) -> Chapter | None:
    names = list(told["models"]) if len(told["models"]) <= _BESIDE else []
    relative = {(row["tensor"], row["model"]): row["relative"] for row in told["rows"]["tensors_by_model"]}
    most: dict[str, float] = {}
    for (tensor, _), value in relative.items():
        most[tensor] = max(most.get(tensor, 0.0), value or 0.0)
    found = sorted(told["rows"]["tensors"], key=lambda row: -most.get(row["tensor"], 0.0))
    shown = found[:MOST_TENSORS]
    columns: list[Column | str] = [
        Column("tensor", "code"),
        "shape",
        "dtype",
        Column("largest change", "share", "of any model, relative"),
    ]
    columns += [Column(name, "share", "norm of its change / norm of the base") for name in names]
    columns += [Column("conflict", "share"), Column("cosine", "signed"), Column("survives bfloat16", "share")]
    body: list[list[Cell]] = [
        [row["tensor"], "×".join(map(str, row["shape"])), " ".join(row["dtypes"]), most.get(row["tensor"])]
        + [relative.get((row["tensor"], name)) for name in names]
        + [row["conflict"], row["cosine"], row["survives_bfloat16"]]
        for row in shown
    ]
    still = sum(row["state"] == "identical" for row in found)
    lead = f"The most changed come first; a click on a column sorts by it. {still} of {len(found)} are as in the base."
    left = [Text(f"The other {len(found) - len(shown)} are in analysis.json.")] if len(found) > len(shown) else []
    return Chapter("Tensors", [Table(columns, body), *left], lead) if found else None


def _beside(told: Told) -> Chapter | None:
    """What differs beside the weights, and tensors that not all models have alike."""
    settings, missing = told["rows"]["settings"], told["rows"]["missing"]
    pieces = list(_differences(settings, missing))
    lead = (
        "Settings, tokens and templates in which models differ, and tensors that not all of them have alike. "
        "The result takes them from one model: see that it is the right one."
    )
    return Chapter("Differences beside the weights", pieces, lead) if pieces else None


def _differences(settings: Sequence[Told], missing: Sequence[Told]) -> Iterator[Piece]:
    if settings:
        keys = ("model", "file", "key", "reference", "value")
        rows = [[None if row[key] is None else setting(row[key]) for key in keys] for row in settings]
        yield Table(["model", "file", Column("key", "code"), "in the reference", "in the model"], rows)
    if missing:
        rows = [
            [row["tensor"], row["why"], ", ".join(row["models"]), ", ".join(map(_plain, row.get("shapes", ())))]
            for row in missing
        ]
        yield Table([Column("tensor", "code"), "what", "models", "shapes"], rows)


def _plain(value: Any) -> str:
    return "–" if value is None else "×".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _method(told: Told) -> Chapter:
    """What was read and how, and what words mean."""
    cost = told["cost"]
    lines = [
        f"Read {filesize(cost['bytes_read'])} with {cost['workers']} workers in {timespan(cost['seconds'])}.",
        f"Signs, magnitudes and rounding were looked at in {share(cost['sampled'])} of all entries, norms and cosines "
        f"in all of them.",
        f"{cost['matrices']} of {cost['matrices_of']} matrices were decomposed.",
    ]
    words = Table(["word", "what it means"], _WORDS)
    return Chapter("How this was measured", [*map(Text, lines), Details("What the words mean", [words])])


_WORDS = (
    ("task vector, change", "a model minus what it is compared with, entry by entry"),
    ("kinship", "cosine between the weights themselves: near 1 for relatives, near 0 for strangers"),
    ("cosine", "between two task vectors: 1 for the same direction, 0 for nothing in common, -1 for the opposite"),
    ("conflict", "share of entries that some models raise and others lower"),
    ("survives bfloat16", "share of merged changes that are still there after rounding to bfloat16"),
    (
        "effective rank",
        "how many directions a change really uses: (sum s^2)^2 / sum s^4 of its singular values s",
    ),
    ("interference", "singular task interference: how much the leading directions of different models overlap"),
    ("alignment", "share of the leading directions that two models have in common"),
)

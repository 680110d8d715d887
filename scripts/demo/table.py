"""The table: a row per model, a column per task, every accuracy also as a share of the expert's."""

from collections.abc import Mapping

Scores = Mapping[str, Mapping[str, float]]  # row -> task -> accuracy between 0 and 1
EXPERTS = "experts"


def mean(row: Mapping[str, float]) -> float:
    """Mean over the tasks, each counting the same."""
    return sum(row.values()) / len(row)


def normalised(row: Mapping[str, float], experts: Mapping[str, float]) -> dict[str, float]:
    """Each accuracy divided by that of the task's expert."""
    return {task: value / experts[task] for task, value in row.items()}


def means(scores: Scores) -> dict[str, dict[str, float]]:
    """Row -> its mean accuracy and its mean normalised accuracy."""
    return {
        name: {"accuracy": mean(row), "normalised": mean(normalised(row, scores[EXPERTS]))}
        for name, row in scores.items()
    }


def render(scores: Scores) -> str:
    """Plain text: accuracy in percent and, after it, percent of the expert's accuracy; the last column is the mean."""
    tasks = list(scores[EXPERTS])
    lines = [["", *tasks, "mean"]]
    for name, row in scores.items():
        share = normalised(row, scores[EXPERTS])
        pairs = [*((row[task], share[task]) for task in tasks), (mean(row), mean(share))]
        lines.append([name, *(f"{100 * value:.1f} ({100 * part:3.0f})" for value, part in pairs)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in lines)

"""The study's results as one table: accuracy as a share of the experts', with intervals."""

from collections.abc import Mapping

import torch
from torch import Tensor

Results = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Set -> candidate -> task -> a digit for every test input, 1 where the answer was right; and `seconds`."""
EXPERTS, SECONDS = "experts", "seconds"


def share(merged: Mapping[str, str], experts: Mapping[str, str]) -> tuple[float, float, float]:
    """The mean over tasks of accuracy over the expert's, half its 95% interval over test inputs, the worst task."""
    shares, variance = [], 0.0
    for task in (each for each in experts if each != SECONDS):
        own, other = bits(merged[task]), bits(experts[task])
        ratio = float(own.mean() / other.mean())
        variance += float((own - ratio * other).var()) / len(own) / float(other.mean()) ** 2
        shares.append(ratio)
    return sum(shares) / len(shares), 1.96 * variance**0.5 / len(shares), min(shares)


def render(results: Results) -> str:
    """In Markdown, the best on the first set first."""
    sets = [name for name in results if EXPERTS in results[name]]
    order = {name: share(each, results[sets[0]][EXPERTS])[0] for name, each in results[sets[0]].items()}
    names = sorted((name for name in order if name != EXPERTS), key=lambda name: -order[name])
    head = ["", *(told for name in sets for told in (name, "worst task")), "seconds"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in names:
        cells = [cell for one in sets for cell in _cells(results[one].get(name), results[one][EXPERTS])]
        lines.append([name, *cells, f"{float(results[sets[0]][name][SECONDS]):.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def accuracies(results: Results) -> str:
    """The experts' own accuracy, in words."""
    lines = []
    for name, each in results.items():
        told = ", ".join(f"{task} {float(bits(seen).mean()):.3f}" for task, seen in each[EXPERTS].items())
        lines.append(f"{name}: {told}")
    return "\n\n".join(lines) + "\n"


def bits(seen: str) -> Tensor:
    return torch.tensor([float(digit) for digit in seen], dtype=torch.float64)


def _cells(merged: Mapping[str, str] | None, experts: Mapping[str, str]) -> list[str]:
    if merged is None:
        return ["", ""]
    mean, half, worst = share(merged, experts)
    return [f"{mean:.3f} ± {half:.3f}", f"{worst:.3f}"]

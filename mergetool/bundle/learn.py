"""Learn from rows whose tasks are known what unknown inputs look like, beside those that are made up.

Examples of no task are random and repeated ones, as when a bundle is made, and beginnings of rows of two tasks in one.
A row's own doubt, by which the limit is set, is that of all other examples but those that were made of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergetool.bundle.examples import EXAMPLES, Examples
from mergetool.bundle.first_pass import FirstPass
from mergetool.bundle.made_up import Markup, glued, made_up, markup
from mergetool.bundle.mass_model import MassModel
from mergetool.bundle.rows import on_device_of
from mergetool.kernels.claims import fit, left_out
from mergetool.tensors.writer import write_tensors

_REFUSED = 0.01
"""Share of known rows that may count as unknown."""
_MOST_ROWS = 1024
"""Rows that become examples: what is learnt takes their number's square of memory, and its cube of time."""


def learn(model: MassModel, batches: Sequence[dict[str, Tensor]], tasks: Tensor) -> Examples:
    """Examples of rows (N of them in batches of the model's inputs; tasks (N,)), which are written into the bundle."""
    around = markup(model) or Markup()
    strange = [batch for several in made_up(model, around, None).values() for batch in several]
    rows = len(tasks)
    kept = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:_MOST_ROWS]
    tasks = tasks[kept]
    mixed, parents = _glued(model, batches, kept, tasks, around)
    read = _read(model, [*batches, *strange, *mixed])
    features = [torch.cat([each[kept], each[rows:]]) for each in read]
    targets = torch.zeros(len(features[0]), len(model.task_names), dtype=torch.float64)
    targets[range(len(tasks)), tasks] = 1
    tensors = _comparable(features, len(tasks))
    weights, inverse = fit(tensors["examples"], targets)
    first = len(targets) - len(parents)
    groups = [[row, *(first + place for place, pair in enumerate(parents) if row in pair)] for row in range(len(tasks))]
    doubt = 1 - left_out(targets, weights, inverse, groups).amax(-1)
    tensors["weights"] = weights.float()
    write_tensors(model.folder / EXAMPLES, tensors, {"format": "pt"})
    return Examples(tensors, float(doubt.quantile(1 - _REFUSED, interpolation="higher")))


def _glued(
    model: MassModel, batches: Sequence[dict[str, Tensor]], kept: Tensor, tasks: Tensor, around: Markup
) -> tuple[list[dict[str, Tensor]], list[tuple[int, int]]]:
    """Inputs of two tasks, and which rows they are made of; none of images."""
    if any("input_ids" not in batch for batch in batches):
        return [], []
    ids = [row for batch in batches for row in _words(batch, around)]
    return glued(model, [ids[row] for row in kept.tolist()], tasks.tolist(), around)


def _words(batch: dict[str, Tensor], around: Markup) -> list[Tensor]:
    """Tokens of every row, without what is put around them: masked words, and unknown ones, are part of a text."""
    ids = batch["input_ids"].cpu()
    words = torch.isin(ids, torch.tensor(around.before + around.after, dtype=ids.dtype), invert=True)
    mask = batch.get("attention_mask")
    words = words if mask is None or mask.shape != ids.shape else words & mask.cpu().ne(0)
    return [row[own] for row, own in zip(ids, words, strict=True)]


@torch.inference_mode()
def _read(model: MassModel, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """What the router reads of inputs, (samples, D_i) at every matrix, on the CPU."""
    first = model.first_pass
    assert isinstance(first, FirstPass)
    read = [first.features(on_device_of(model, batch)) for batch in batches]
    return [torch.cat([each.cpu() for each in several]) for several in zip(*read, strict=True)]


def _comparable(features: Sequence[Tensor], known: int) -> dict[str, Tensor]:
    """Features of all matrices side by side, as far from their mean as each other over the first `known` rows."""
    centres = [each[:known].mean(0) for each in features]
    lengths = [
        (each[:known] - centre).square().sum(-1).mean().sqrt() for each, centre in zip(features, centres, strict=True)
    ]
    tiny, several = torch.finfo(torch.float32).eps, len(features) ** 0.5
    scale = torch.cat([each.clamp_min(tiny).expand(len(c)) * several for each, c in zip(lengths, centres, strict=True)])
    centre = torch.cat(centres)
    examples = ((torch.cat(list(features), -1) - centre) / scale).to(torch.bfloat16)
    return {"centre": centre, "scale": scale.contiguous(), "examples": examples}

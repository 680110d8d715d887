"""Measure, on made-up inputs, what strange and what usual ones look like to a bundle's router; as the bundle is made.

No data are needed: the base runs on inputs that are drawn (see `mergetool.bundle.made_up`). What is usual for a task is
told by the tokens whose embeddings its training has moved; where embeddings were left alone (adapters) or there are
none (images), usual is what lies clearly beyond noise.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mergetool.bundle.files import REFERENCE
from mergetool.bundle.known import Knowing
from mergetool.bundle.made_up import made_up, markup
from mergetool.bundle.manifest import Manifest, Unknown, UnknownRule
from mergetool.bundle.mass_model import MassModel
from mergetool.bundle.opening import load_bundle
from mergetool.bundle.options import RouterOptions
from mergetool.kernels.known import participation
from mergetool.tensors.io import sha256_file
from mergetool.tensors.writer import write_tensors

_STRANGE = {
    "nearness": ("random", 0.5),
    "spread": ("repeated", 0.75),
    "seen": ("random", 0.5),
    "whole": ("glued", 0.25),
    "seen_whole": ("glued", 0.25),
}
"""Which made-up inputs fail a score, and the quantile of theirs that counts as strange."""
_MOVED_ALIKE = 50.0
"""How many times as far as most the farthest token must have moved for the others to count as never seen."""
_BEYOND = 3.0
"""How many times as far beyond noise's own spread usual inputs lie, where none can be made up."""

Change = Callable[[str, str], Tensor | None]
"""What a task's expert changed of a tensor, or None where it is none of those that experts may change."""


def with_reference(
    folder: Path, manifest: Manifest, options: RouterOptions, change: Change, device: torch.device
) -> Manifest:
    """The manifest of a bundle that lies in `folder` with what tells unknown inputs. Raises PlanError.

    `device`: where the base runs; on the CPU where that has too little memory, or no float64.
    """
    assert options.unknown is not None
    assert manifest.router is not None
    model = load_bundle(folder, verify=False)
    try:
        there = model if device.type in ("cpu", "mps") else model.to(device)
        unknown = measure(there, options.unknown, options.doubt, change)
    except torch.OutOfMemoryError:
        unknown = measure(load_bundle(folder, verify=False), options.unknown, options.doubt, change)
    files = dict(manifest.files)
    if (folder / REFERENCE).is_file():
        files[REFERENCE] = sha256_file(folder / REFERENCE)
    router = manifest.router.model_copy(update={"unknown": unknown})
    return manifest.model_copy(update={"router": router, "files": files})


def measure(model: MassModel, answer: UnknownRule, most_doubt: float, change: Change) -> Unknown:
    """What a bundle's manifest says of unknown inputs; beside it, the tokens that were seen are written."""
    around, moved = markup(model), _moved(model, change)
    tensors = {} if moved is None else {"seen": moved.gt(0).to(torch.uint8)}
    special = () if around is None else around.every
    if moved is not None or special:
        tensors["markup"] = torch.tensor(special, dtype=torch.int64)
    if tensors:
        write_tensors(model.folder / REFERENCE, tensors, {"format": "pt"})
    nothing = Unknown(answer=answer, doubt=most_doubt, scores=(), strange=(), usual=(), sharpness=1.0)
    knowing = Knowing(nothing, tensors.get("seen"), tensors.get("markup"))
    knowing.to(model.device)
    batches = made_up(model, around, moved)
    read = {kind: _scores(model, knowing, several) for kind, several in batches.items()}
    scored = {kind: found for kind, (found, _) in read.items()}
    if "usual" in read:
        scored["usual"] = _where_they_belong(*read["usual"], len(model.task_names))
    anchors = {name: _anchors(name, scored) for name in scored["random"]}
    told = {name: pair for name, pair in anchors.items() if pair is not None}
    return Unknown(
        answer=answer,
        doubt=most_doubt,
        scores=tuple(told),
        strange=tuple(strange for strange, _ in told.values()),
        usual=tuple(usual for _, usual in told.values()),
        sharpness=_sharpness(model, batches["random"]),
    )


def _scores(
    model: MassModel, knowing: Knowing, batches: Sequence[dict[str, Tensor]]
) -> tuple[dict[str, Tensor], Tensor]:
    """All scores of all inputs, and their nearest tasks."""
    first = model.first_pass
    assert first is not None
    found, nearest = list[dict[str, Tensor]](), list[Tensor]()
    for inputs in batches:
        with torch.inference_mode():
            distances, scored = knowing.scores(first, _there(inputs, model))
            found.append({name: values.cpu() for name, values in scored.items()})
            nearest.append(distances.argmin(-1).cpu())
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}, torch.cat(nearest)


def _there(inputs: dict[str, Tensor], model: MassModel) -> dict[str, Tensor]:
    return {name: values.to(model.device) for name, values in inputs.items()}


def _where_they_belong(scored: dict[str, Tensor], nearest: Tensor, num_tasks: int) -> dict[str, Tensor]:
    """Scores of the usual inputs that went to the tasks that they were made up for, in turn; of all, where none did."""
    right = nearest == torch.arange(len(nearest)) % num_tasks
    return {name: values[right] for name, values in scored.items()} if bool(right.any()) else scored


def _anchors(name: str, scored: dict[str, dict[str, Tensor]]) -> tuple[float, float] | None:
    """A score of strange and of usual inputs; None where it does not tell them apart."""
    kind, quantile = _STRANGE[name]
    if kind not in scored:
        return None
    strange = float(scored[kind][name].quantile(quantile))
    if "usual" in scored:
        usual = float(scored["usual"][name].median())
    elif kind == "random":
        middle, strange = strange, float(scored[kind][name].quantile(0.99))
        usual = strange + _BEYOND * (strange - middle)
    else:
        usual = float(scored["random"][name].median())
    return (round(strange, 4), round(usual, 4)) if usual - strange > 1e-3 * max(1.0, abs(usual)) else None


def _sharpness(model: MassModel, batches: Sequence[dict[str, Tensor]]) -> float:
    """Dimensions that all that is read of a token of noise really has, as a share of one matrix' numbers."""
    first = model.first_pass
    assert first is not None
    shares = []
    for inputs in batches:
        tokens: list[Tensor] = []
        with torch.inference_mode():
            first.read(_there(inputs, model), closely=True, watch=tokens.append)
        shares.append(participation(tokens) / (sum(each.shape[1] for each in tokens) / len(tokens)))
    return round(min(1.0, sum(shares) / len(shares)), 4)


def _moved(model: MassModel, change: Change) -> Tensor | None:
    """(tasks, vocabulary): how far each task's training has moved each token, 0 where it was not seen.

    Decay moves all of them a little, and gradients only those that were there. None where a task has moved none.
    """
    name = _embedding(model)
    if name is None:
        return None
    rows = []
    for task in model.task_names:
        changed = change(task, name)
        if changed is None or not bool(changed.any()):
            return None
        length = changed.float().norm(dim=1).cpu()
        middle = float(length.median())
        floor = 10 * middle if middle * _MOVED_ALIKE < float(length.max()) else 0.0
        rows.append(torch.where(length > floor, length, 0.0))
    return torch.stack(rows)


def _embedding(model: MassModel) -> str | None:
    """What the checkpoint calls the embeddings of tokens."""
    find = getattr(model.base, "get_input_embeddings", None)
    table = find() if find is not None else None
    if not isinstance(table, nn.Embedding) or model.first_pass is None:
        return None
    path = next(path for path, module in model.base.named_modules() if module is table)
    return model.first_pass.names.get(f"{path}.weight")

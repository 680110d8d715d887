"""From what heads say to an answer: the best of a sample's heads is the one that is surest, on a common scale.

Where all heads answer once a sample, each says how probable its answer is, and the task how much it claims the sample.
Where some answer for every token, or with a span, their scores are of different things, and the nearest task answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mergetool.bundle.manifest import ClassHead, Head, HeadKind, Manifest
from mergetool.bundle.readout import calibrated

_SHOWN = 4
"""Samples that are shown in a line."""
UNKNOWN = "unknown"
"""What is said of a sample that belongs to no task."""


@dataclass(frozen=True)
class Scored:
    """What one head says of some samples."""

    samples: list[int]
    values: Tensor
    """(samples, classes); (samples, tokens, classes); (samples, tokens, 2), the start and the end of a span."""
    features: Tensor | None = None
    """(samples, features): what the head read, where it is a matrix."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Several parts of a batch as one."""
        return cls([sample for part in parts for sample in part.samples], torch.cat([part.values for part in parts]))


@dataclass(frozen=True)
class Routing:
    """Where each sample belongs."""

    tasks: tuple[tuple[str, ...], ...]
    """Tasks chosen for every sample, in the bundle's order."""
    coefficients: Tensor
    """(samples, tasks): how much every task claims the sample; rows sum to 1."""
    distances: Tensor
    """(samples, tasks): distance from the span of the task's directions."""
    known: Tensor
    """(samples,): whether a sample is like inputs of any of the tasks."""
    probabilities: Tensor
    """(samples, tasks): how probable every task is."""
    doubt: Tensor
    """(samples,): how unlike the inputs of all tasks a sample is: 0 for usual ones, 1 for strange ones."""


@dataclass(frozen=True)
class Answer:
    """What a bundle says about a batch."""

    task: tuple[str | None, ...]
    """The task whose head answered, per sample (without heads: the task with the largest coefficient); None for a
    sample that belongs to none and got no answer."""
    tasks: tuple[tuple[str, ...], ...]
    coefficients: Tensor
    logits: Tensor
    """(samples, most classes): scores of the head that answered, -inf beyond its classes. Where one answers for every
    token (samples, tokens, most classes), where one answers questions (samples, tokens, start and end first); a head
    that answers once a sample then has its scores at the first token. Language models: theirs."""
    features: Tensor | None = None
    """(samples, features): what the head that answered read, where heads are matrices."""
    heads: tuple[Head | ClassHead | None, ...] = ()
    """The head that answered, per sample."""
    known: tuple[bool, ...] = ()
    """Whether a sample is like inputs of any of the tasks."""
    probability: tuple[float, ...] = ()
    """How probable it is that a sample is of the task that answered (where none did: of the nearest one)."""
    runner_up: tuple[str | None, ...] = ()
    """The task that is most probable after that one."""

    def __repr__(self) -> str:
        """The first samples in one line."""
        words = self.labels or [None] * len(self.task)
        said = [_in_words(task, label) for task, label in zip(self.task, words, strict=True)]
        more = [f"and {len(said) - _SHOWN} more"] if len(said) > _SHOWN else []
        return f"Answer({', '.join([*said[:_SHOWN], *more])})"

    @property
    def labels(self) -> tuple[str, ...]:
        """What the head that answered says in words, per sample; empty where some answer token by token, or nothing."""
        if not self.heads or any(kind_of(head) != "sample" for head in self.heads):
            return ()
        scores = zip(self.heads, self._scores_of_samples(), strict=True)
        return tuple(UNKNOWN if head is None else label_of(head, own)["label"] for head, own in scores)

    def _scores_of_samples(self) -> list[Tensor]:
        """The scores of heads that answer once a sample."""
        return list((self.logits if self.logits.ndim == 2 else self.logits[:, 0]).cpu())

    @property
    def start_logits(self) -> Tensor:
        """(samples, tokens): where a span starts (question answering)."""
        return self.logits[..., 0]

    @property
    def end_logits(self) -> Tensor:
        """(samples, tokens): where a span ends (question answering)."""
        return self.logits[..., 1]


def _in_words(task: str | None, label: str | None) -> str:
    return UNKNOWN if task is None else task if label is None else f"{task}: {label}"


def kind_of(head: Head | ClassHead | None) -> HeadKind:
    """What a head answers."""
    return head.kind if isinstance(head, ClassHead) else "sample"


def label_of(head: Head | ClassHead, scores: Tensor) -> dict[str, Any]:
    """The best class; the value of a regression; all labels of a head that gives several at once."""
    scores = scores[: head.num_classes]
    problem = head.problem if isinstance(head, ClassHead) else None
    if problem == "regression" or (isinstance(head, ClassHead) and len(scores) == 1):
        values = [round(float(value), 6) for value in scores]
        return {"value": values[0] if len(values) == 1 else values, "label": ", ".join(map(str, values))}
    best = int(scores.argmax())
    names = head.labels or tuple(map(str, range(len(scores))))
    if problem == "multi_label_classification":
        chosen = [name for name, score in zip(names, scores.tolist(), strict=True) if score > 0]
        probability = round(float(scores[best].sigmoid()), 6)
        return {"labels": chosen, "label": ", ".join(chosen) or "-", "probability": probability}
    return {"class": best, "label": names[best], "probability": round(float(scores.softmax(-1)[best]), 6)}


def answer(
    manifest: Manifest, tasks: tuple[tuple[str, ...], ...], coefficients: Tensor, scored: dict[int, Scored]
) -> Answer:
    """Let the surest head of every sample answer."""
    confidence = _confidence(manifest, coefficients, scored)
    best = [None if not tasks[sample] else place for sample, place in enumerate(confidence.argmax(-1).tolist())]
    answering = [said for place, said in scored.items() if place in best]
    logits = confidence.new_full((len(best), *_shape(manifest, answering)), float("-inf"))
    features: dict[int, Tensor] = {}
    for place, said in scored.items():
        rows = [row for row, sample in enumerate(said.samples) if best[sample] == place]
        samples = [said.samples[row] for row in rows]
        values = said.values[rows]
        if values.ndim < logits.ndim:
            logits[samples, 0, : values.shape[-1]] = values
        elif values.ndim == 2:
            logits[samples, : values.shape[1]] = values
        else:
            logits[samples, : values.shape[1], : values.shape[2]] = values
        if said.features is not None:
            features |= dict(zip(samples, said.features[rows], strict=True))
    stacked = torch.stack([features[sample] for sample in range(len(best))]) if len(features) == len(best) else None
    names = tuple(None if task is None else manifest.names[task] for task in best)
    heads = tuple(None if task is None else manifest.tasks[task].head for task in best)
    return Answer(names, tasks, coefficients, logits, stacked, heads)


def standing(
    names: Sequence[str], probabilities: Tensor, answered: Sequence[str | None]
) -> tuple[tuple[float, ...], tuple[str | None, ...]]:
    """How probable the task of every sample is, and the most probable other one (None where there is but one)."""
    order = probabilities.sort(dim=-1, descending=True, stable=True).indices.tolist()
    told, others = [], []
    for sample, (row, task) in enumerate(zip(order, answered, strict=True)):
        own = row[0] if task is None else names.index(task)
        told.append(float(probabilities[sample, own]))
        others.append(next((names[other] for other in row if other != own), None))
    return tuple(told), tuple(others)


def _confidence(manifest: Manifest, coefficients: Tensor, scored: dict[int, Scored]) -> Tensor:
    """(samples, tasks): how sure every head is, -inf where it was not asked."""
    alike = all(kind_of(task.head) == "sample" for task in manifest.tasks)
    device = next((said.values.device for said in scored.values()), coefficients.device)
    confidence = torch.full(coefficients.shape, float("-inf"), device=device)
    for place, said in scored.items():
        claim = coefficients[said.samples, place].to(said.values)
        head = manifest.tasks[place].head
        problem = head.problem if isinstance(head, ClassHead) else None
        confidence[said.samples, place] = calibrated(said.values, claim, manifest.heads, problem) if alike else claim
    return confidence


def _shape(manifest: Manifest, answering: Sequence[Scored]) -> tuple[int, ...]:
    """The shape that holds one sample's scores of any head that answers."""
    heads = [task.head for task in manifest.tasks if task.head is not None]
    width = max([head.num_classes for head in heads] + [said.values.shape[-1] for said in answering])
    tokens = [said.values.shape[1] for said in answering if said.values.ndim == 3]
    return (max(tokens), width) if tokens else (width,)

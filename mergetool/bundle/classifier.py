"""A bundle in the place of transformers' pipeline("text-classification"): the same call, the same shape of results.

    classify = TextClassifier(mergetool.load_bundle("out/bundle"))
    classify("a text")                                  # [{"label": "sport", "score": 0.98, "task": "topics"}]
    classify(["several", "texts"], batch_size=32)       # one each, in order
    classify("a text", top_k=None)                      # all classes of the task that answered, the surest first

A text that belongs to no task has the label "unknown", score 0 and no task. transformers' own class reads labels off
the model's config, one set for all inputs; here each task has its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from torch import Tensor

from mergetool.bundle.answer import UNKNOWN, kind_of
from mergetool.bundle.manifest import ClassHead, Head
from mergetool.bundle.mass_model import MassModel
from mergetool.bundle.texts import Text, Texts, listed, parts_of
from mergetool.errors import PlanError


class TextClassifier:
    """Classes of texts, each by the head of its own task."""

    def __init__(self, model: MassModel, batch_size: int = 32) -> None:
        """Raises PlanError for a bundle whose heads do not answer once a text."""
        if any(task.head is None or kind_of(task.head) != "sample" for task in model.manifest.tasks):
            what = "not all of its tasks have a head that gives a text a class"
            raise PlanError(what, str(model.folder), "ask the model itself: model(text), model.generate(text)")
        self.model = model
        self.batch_size = batch_size

    def __call__(
        self, texts: Texts, *, batch_size: int | None = None, top_k: int | Literal["best"] | None = "best"
    ) -> list[Any]:
        """One dict per text; with `top_k`, a list of so many (None: all), and for a single text that alone.

        Texts of like length go together.
        """
        given, found = listed(texts), dict[int, list[dict[str, Any]]]()
        for places in _batches(given, batch_size or self.batch_size):
            found |= dict(zip(places, self._ranked([given[place] for place in places]), strict=True))
        ranked = [found[place] for place in range(len(given))]
        if top_k == "best":
            return [each[0] for each in ranked]
        first = [each[:top_k] for each in ranked]
        return first[0] if isinstance(texts, str | Mapping) else first

    def _ranked(self, texts: Sequence[Text]) -> list[list[dict[str, Any]]]:
        """All classes of the head that answers, the surest first."""
        answer = self.model(texts)
        every = zip(answer.task, answer.heads, answer.logits.float().cpu(), strict=True)
        return [_classes(task, head, scores) for task, head, scores in every]


def _classes(task: str | None, head: Head | ClassHead | None, scores: Tensor) -> list[dict[str, Any]]:
    if head is None:
        return [{"label": UNKNOWN, "score": 0.0, "task": None}]
    values = _probabilities(head, scores[: head.num_classes]).tolist()
    names = head.labels or tuple(map(str, range(len(values))))
    classes = [{"label": name, "score": value, "task": task} for name, value in zip(names, values, strict=True)]
    return sorted(classes, key=lambda each: -each["score"])


def _probabilities(head: Head | ClassHead, scores: Tensor) -> Tensor:
    """As transformers' pipeline has them: values of a regression as they are."""
    problem = head.problem if isinstance(head, ClassHead) else None
    if problem == "regression":
        return scores
    return scores.sigmoid() if problem == "multi_label_classification" or len(scores) == 1 else scores.softmax(-1)


def _batches(texts: Sequence[Text], size: int) -> Iterator[list[int]]:
    """Places of texts that are answered together: of like length, pairs apart from others."""
    parts = [parts_of(text) for text in texts]
    kinds = [pair is None for _, pair in parts]
    order = sorted(range(len(texts)), key=lambda place: (kinds[place], sum(len(part or "") for part in parts[place])))
    for _, alike in groupby(order, key=lambda place: kinds[place]):
        places = list(alike)
        yield from (places[start : start + size] for start in range(0, len(places), size))

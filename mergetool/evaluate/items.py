"""One task, item by item: prompts are built once, for all of its documents; then any model answers any of them.

That makes the prompt of an item the same whatever else is asked with it (lm-eval draws few-shot examples in the order
of the documents that it is given), and saves building prompts again for every candidate of a search. Answers go
through lm-eval's own filters and metrics.

An item's score is its metric, in [0, 1]. `soft` is the probability that the model gives to the right choice, among the
choices: a finer signal where two models are right equally often. (Free answers have none; there it is the metric.)
"""

import copy
import hashlib
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.errors import EvaluationError
from mergetool.evaluate.harness import quiet
from mergetool.evaluate.options import TaskOptions

_SEED = 0
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
KEY_LENGTH = 24
"""Hex digits of an item's key: 96 bits, of which no two items share all."""


@dataclass(frozen=True)
class Score:
    """What a model made of one item."""

    value: float
    soft: float
    confidence: float | None = None
    """The probability of the choice that it likes best, where there are choices."""


class TaskItems:
    """The items of one task. Made once; `score` may be called with any model of the same tokenizer."""

    def __init__(self, options: TaskOptions, task: Any, lm: Any) -> None:
        self.options = options
        self.name = options.name
        self._task = task
        self.metric, self.filter = self._chosen()
        with quiet(), _no_random_numbers_used():
            task.build_all_requests(
                rank=0,
                world_size=1,
                apply_chat_template=options.chat_template,
                chat_template=lm.apply_chat_template if options.chat_template else None,
                tokenizer_name=lm.tokenizer_name if options.chat_template else "",
            )
        self._requests: dict[int, list[Any]] = defaultdict(list)
        for request in task.instances:
            self._requests[request.doc_id].append(request)
        for requests in self._requests.values():
            requests.sort(key=lambda request: request.idx)
        self.num_items = len(self._requests)
        self.hashes = tuple(_sha256(self._requests[place][0].doc) for place in range(self.num_items))
        settings = _sha256([_settings(task), self.metric, self.filter, options.chat_template])
        self.keys = tuple(self._key(settings, place)[:KEY_LENGTH] for place in range(self.num_items))
        """Of every item, all that a model's score on it depends on but the model, whatever else is in the task."""

    @property
    def dataset(self) -> dict[str, str]:
        """Which dataset of the Hub the items are; nothing where they are files here."""
        place, local = str(self._task.get_config("dataset_path") or ""), self._task.get_config("dataset_kwargs") or {}
        if not _ON_HUB.fullmatch(place) or "data_files" in local or Path(place).exists():
            return {}
        config = self._task.get_config("dataset_name")
        return {"id": place, **({"config": str(config)} if config else {})}

    def _key(self, settings: str, place: int) -> str:
        requests = self._requests[place]
        asked = [[request.request_type, request.arguments, request.repeats] for request in requests]
        return _sha256([settings, self.hashes[place], asked])

    def _chosen(self) -> tuple[str, str]:
        """The metric and filter that count. Raises EvaluationError for unknown ones."""
        where = f"task {self.name!r}"
        metrics, filters = list(self._task.aggregation()), [ensemble.name for ensemble in self._task._filters]
        for kind, asked, known in (("metric", self.options.metric, metrics), ("filter", self.options.filter, filters)):
            if asked is not None and asked not in known:
                raise EvaluationError(f"has no {kind} {asked!r}", where, f"write {kind}: {' or '.join(known)}")
        metric = self.options.metric or metrics[0]
        aggregation = getattr(self._task.aggregation()[metric], "__name__", "")
        if aggregation != "mean":
            what = f"metric {metric!r} is not a mean over items (its aggregation is {aggregation or 'unnamed'!r})"
            raise EvaluationError(what, where, "choose another `metric`, e.g. acc or exact_match")
        if not self._task.higher_is_better().get(metric, True):
            raise EvaluationError(f"of metric {metric!r} less is better", where, "choose another `metric`")
        return metric, self.options.filter or filters[0]

    def num_requests(self, ids: Sequence[int]) -> int:
        """How many requests these items make."""
        return sum(len(self._requests[item]) for item in ids)

    def score(self, lm: Any, ids: Sequence[int]) -> dict[int, Score]:
        """Scores of these items (sorted, unique, at least one) under a wrapped model.

        Raises EvaluationError for answers that are no numbers.
        """
        if not ids or list(ids) != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < self.num_items:
            raise ValueError(f"ids must be sorted, unique, and of [0, {self.num_items}), not {list(ids)[:10]}")
        asked = {item: [self._fresh(request) for request in self._requests[item]] for item in ids}
        requests = [request for part in asked.values() for request in part]
        with quiet(), _no_random_numbers_used():
            _answer(lm, requests)
            self._task._instances = requests
            self._task.apply_filters()
        return {item: self._score(item, part) for item, part in asked.items()}

    @staticmethod
    def _fresh(request: Any) -> Any:
        """The same request without answers. (Its arguments are never changed by a model.)"""
        fresh = copy.copy(request)
        fresh.resps, fresh.filtered_resps = [], {}
        return fresh

    def _score(self, item: int, requests: list[Any]) -> Score:
        answers = [request.filtered_resps[self.filter] for request in requests]
        where = f"task {self.name!r}, item {item}"
        if any(isinstance(a, tuple) and math.isnan(a[0]) for a in answers):
            raise EvaluationError("the model's log-likelihood is NaN", where, "look at its weights: mergetool verify")
        value = self._task.process_results(requests[0].doc, answers).get(self.metric)
        try:
            number = float(value)
        except (TypeError, ValueError):
            fix = "choose another `metric`"
            raise EvaluationError(f"metric {self.metric!r} gives {value!r}, not one number", where, fix) from None
        if not 0.0 <= number <= 1.0:
            what = f"metric {self.metric!r} gives {number}, which is not in [0, 1]"
            raise EvaluationError(what, where, "choose another `metric`, e.g. acc or exact_match")
        if not self.has_choices:
            return Score(number, number)
        return Score(number, *self._chances(requests[0].doc, answers))

    @property
    def has_choices(self) -> bool:
        """Whether a model chooses among answers, so that it can be told how sure it is."""
        return bool(self._task.OUTPUT_TYPE == "multiple_choice")

    def _chances(self, doc: Mapping[str, Any], answers: Sequence[Any]) -> tuple[float, float]:
        """Probability of the right choice, and of the likeliest, normalised by length as the metric is."""
        choices = self._task.doc_to_choice(doc)
        gold = self._task.doc_to_text(doc) if self._task.multiple_input else self._task.doc_to_target(doc)
        right = {choices.index(g) if isinstance(g, str) and g in choices else g for g in _as_list(gold)}
        scaled = [answer[0] / self._length(text) for answer, text in zip(answers, choices, strict=False)]
        largest = max(scaled)
        weights = [math.exp(x - largest) for x in scaled]
        soft = sum(weight for place, weight in enumerate(weights) if place in right) / sum(weights)
        return soft, max(weights) / sum(weights)

    def _length(self, choice: str) -> int:
        """What the metric divides a choice's log-likelihood by."""
        return {"acc_norm": len(choice), "acc_bytes": len(choice.encode())}.get(self.metric, 1) or 1


def _answer(lm: Any, requests: Sequence[Any]) -> None:
    """Have the model answer; every request gets its answers."""
    kinds = sorted({request.request_type for request in requests})
    for kind in kinds:
        repeated = [r for r in requests if r.request_type == kind for _ in range(r.repeats or 1)]
        for request, answer in zip(repeated, getattr(lm, kind)(repeated, disable_tqdm=True), strict=True):
            request.resps.append(answer)


@contextmanager
def _no_random_numbers_used() -> Iterator[None]:
    """Inside, global generators start from one seed; afterwards they are where they were."""
    import numpy as np
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def _settings(task: Any) -> dict[str, Any]:
    """A task's settings, but for where its files lie."""
    return {key: value for key, value in task.dump_config().items() if key not in ("metadata", "dataset_kwargs")}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()

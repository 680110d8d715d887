"""What is compared: every method that merges any number of fine-tunes without data, as it comes, and some settings."""

from collections.abc import Iterator
from typing import Any

from mergetool.methods import registry
from mergetool.methods.base import Method

Sections = dict[str, Any]

OTHER_MODELS = ("bezier", "ema", "factor-sum", "swag")
"""Methods for the checkpoints of one run, for points of a curve, for adapters."""
ALL = {"filter": "fusionbench"}
"""Embeddings are matrices, too."""
BY_TENSOR = {"recover": "tensor", "cap": 3.0}


def candidates() -> Iterator[tuple[str, Sections]]:
    """Sections of recipes by what they are called in the table."""
    for name, method in registry().items():
        if is_compared(name, method):
            yield name, {"merge": {"method": name}}
    yield from _settings()


def is_compared(name: str, method: type[Method]) -> bool:
    """Whether it needs neither data nor a certain number of models, nor looks for permutations or makes experts."""
    special = method.searches or method.arranges or method.uses_architecture or method.statistic
    return method.result == "checkpoint" and method.max_models is None and not special and name not in OTHER_MODELS


def _settings() -> Iterator[tuple[str, Sections]]:
    for scale in (0.3, 0.4, 0.6):
        yield f"task-arithmetic, {scale}", {"merge": {"method": "task-arithmetic", "scale": scale}}
    for method in ("iso-c", "iso-cts", "dc-merge"):
        yield f"{method}, 1", {"merge": {"method": method, "scale": 1.0}}
    yield "tsv-merge, recover", {"merge": {"method": "tsv-merge", "scale": "recover"}}
    for method, scale in (("tsv-merge", 1.0), ("iso-c", "recover"), ("iso-cts", "recover"), ("dc-merge", "recover")):
        yield f"{method}, recover by tensor", {"merge": {"method": method, "scale": BY_TENSOR}}
        yield f"{method}, {scale}, with embeddings", {"merge": {"method": method, "scale": scale, **ALL}}
    yield "tsv-merge, recover, with embeddings", {"merge": {"method": "tsv-merge", "scale": "recover", **ALL}}
    for called, rule in (("of the base", {"use": "base"}), ("twice their average", {"scale": 2.0})):
        overrides = [{"match": "*embed*", **rule}]
        yield f"tsv-merge, embeddings {called}", {"merge": {"method": "tsv-merge", "overrides": overrides}}
    yield "swudi, with embeddings", {"merge": {"method": "swudi", **ALL}}
    for name, method, step in (
        ("task-arithmetic, 1", "task-arithmetic", {"step": "svc"}),
        ("iso-cts, 1", "iso-cts", {"step": "svc"}),
        ("wudi, 1", "wudi", {"step": "svc"}),
        ("swudi, 1", "swudi", {"step": "svc"}),
        ("task-arithmetic, 1", "task-arithmetic", {"step": "match-norm"}),
        ("ties, 1", "ties", {"step": "match-norm"}),
        ("task-arithmetic, 1", "task-arithmetic", {"step": "subspace-boosting", "share": 0.2}),
    ):
        yield f"{name}, then {step['step']}", {"merge": {"method": method, "scale": 1.0}, "then": [step]}

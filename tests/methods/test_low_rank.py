"""Adapters merged by themselves come to what their dense task vectors come to, method by method."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from mergetool.kernels.low_rank import Pair
from mergetool.methods import registry
from mergetool.methods.base import TensorMethod
from mergetool.methods.families.low_rank import Products, merged_products, merged_rows
from mergetool.testing.cases import all_cases, each_once
from tests.files import LONG
from tests.turns import some

RANKS = (2, 1, 3)
TENSORS = {
    "layers.0.mlp.up_proj.weight": (12, 8),
    "layers.0.mlp.down_proj.weight": (8, 12),
    "model.embed_tokens.weight": (20, 6),
    "conv.weight": (8, 3, 2, 2),
}
CASES = [case for case in all_cases() if issubclass(case.kind, TensorMethod)]
ALONE = [case for case in CASES if case.kind(**case.settings).needs_weights() is None]
TRIED = ALONE if LONG else each_once(ALONE)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_64ths(x):
    """So that products are exact, and thresholds the same, however many rows are multiplied at once."""
    return (64 * x).round() / 64


def products(name, models, shape=None, ranks=RANKS):
    shape = shape or TENSORS[name]
    n = torch.Size(shape[1:]).numel()
    pairs = [
        Pair(in_64ths(randn(shape[0], rank, seed=7 * rank + place)), in_64ths(randn(rank, n, seed=place + 50)))
        for place, rank in enumerate(ranks[: len(models)])
    ]
    return Products(name, shape, tuple(models), pairs, seed=5)


def in_factors(case, found, keep=None):
    """The merged change as a dense matrix, without cutting anything; what it is made of is as small as it can be."""
    method = case.kind(**case.settings)
    p = method.params(0.0, found.names)
    if method.in_factors(found.name, found.shape) == "product":
        rows = merged_rows(method, found, p, dtype=torch.float64)
        return torch.cat([rows(start, min(start + 5, found.shape[0])) for start in range(0, found.shape[0], 5)])
    return merged_products(method, found, p, None)[0].dense()


def densely(case, *every):
    models = {
        name: {found.name: found.pairs[place].dense().view(found.shape) for found in every}
        for place, name in enumerate(every[0].names)
    }
    base = {found.name: torch.zeros(found.shape, dtype=torch.float64) for found in every}
    merged = case.merge(base, models, dtype="float64", seed=every[0].seed)
    return {name: value.flatten(1) for name, value in merged.items()}


@pytest.mark.parametrize("case", some(TRIED), ids=str)
def test_adapters_alone_come_to_what_their_task_vectors_come_to(case):
    every = [products(name, case.names) for name in TENSORS]
    alone = "independent" in case.kind.exempt  # else all are merged at once
    for setting, part in product((case, case.uneven()), [[found] for found in every] if alone else [every]):
        merged = {found.name: in_factors(setting, found) for found in part}
        torch.testing.assert_close(merged, densely(setting, *part), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", TRIED, ids=str)
def test_a_model_that_leaves_a_tensor_counts_as_one_without_change(case):
    found = products("layers.0.mlp.up_proj.weight", case.names, ranks=(2, 0, 3))
    torch.testing.assert_close(in_factors(case, found), densely(case, found)[found.name], rtol=0, atol=1e-9)
    nothing = products("layers.0.mlp.up_proj.weight", case.names, ranks=(0, 0, 0))
    assert not in_factors(case, nothing).any()


@pytest.mark.parametrize("case", [case for case in TRIED if case.option != "null_policy=reference"], ids=str)
def test_what_is_kept_is_the_best_of_its_rank(case):
    found = products("layers.0.mlp.up_proj.weight", case.names)
    for pair in found.pairs:  # all agree somewhat
        pair.b[:, 0], pair.a[0] = found.pairs[0].b[:, 0], found.pairs[0].a[0]
    method = case.kind(**case.settings)
    pair, lost = merged_products(method, found, method.params(0.0, found.names), 2)
    dense = densely(case, found)[found.name]
    s = torch.linalg.svdvals(dense)
    assert pair.b.shape == (12, 2)
    assert float((pair.dense() - dense).norm() / s.norm()) == pytest.approx(lost, abs=1e-6)
    assert lost == pytest.approx(float(s[2:].norm() / s.norm()), abs=1e-5)


ORACLES = {"task-arithmetic": 2.0793536651, "tsv-merge": 2.1482931842, "iso-c": 1.3756656819 * (6 / 9) ** 0.5}
"""Frobenius norms from independent float64 code, whose Iso-C also raises the 3 of 9 directions that nobody changed."""


@pytest.mark.parametrize("method", ORACLES)
def test_adapters_merge_in_core_space_as_others_found(method):
    def drawn(seed, *shape):
        return torch.from_numpy(np.random.RandomState(seed).randn(*shape))

    pairs = [Pair(drawn(600 + t, 10, 2), drawn(700 + t, 2, 9) / 10) for t in range(3)]
    found = Products("mlp.weight", (10, 9), ("a", "b", "c"), pairs)
    kind = registry()[method](scale=1.0)
    merged, _ = merged_products(kind, found, kind.params(0.0, found.names), None)
    assert float(merged.dense().norm()) == pytest.approx(ORACLES[method], rel=1e-9)


def test_methods_that_need_weights_say_why():
    reasons = {str(case): case.kind(**case.settings).needs_weights() for case in CASES if case not in ALONE}
    measured = {str(case) for case in CASES if case.kind.statistic}
    whole = {name for name, reason in reasons.items() if reason and "scope: tensor" in reason}
    assert whole == {
        str(case)
        for case in CASES
        if getattr(case.kind(**case.settings), "scope", "") == "model" and "fuse" not in str(case)
    }
    fused = {str(case) for case in CASES if "fuse=qkv" in str(case)}
    assert set(reasons) - measured - whole - fused == SEE_WHOLE
    assert {reasons[name] for name in measured} == {"it runs whole models on data", "it runs the base on data"}
    assert "`nuslerp`" in reasons["slerp"]
    assert "scope: tensor" in reasons["ties scope=model"]


SEE_WHOLE = {"arcee-fusion", "slerp"}


WAYS = {
    "sums are sums": {"sum"},
    "in cores": {"cores"},
    "one side turned": {"outputs", "inputs"},
    "entry by entry": {"product"},
    "half by half": {"halves"},
}


def test_the_page_about_adapters_says_how_every_method_does_it():
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text("utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")]
    said = {how.strip(): re.findall(r"`(.*?)`", methods) for how, methods, *_ in rows}
    for how, ways in WAYS.items():
        found = [
            case.method
            for case in ALONE
            if not case.option and case.kind().in_factors("mlp.up_proj.weight", (8, 8)) in ways
        ]
        assert said[how] == sorted([*found, *(["factor-sum"] if how == "half by half" else [])])

"""Methods by singular vectors on a device, where directions are found by products: as on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from mergetool.kernels import spectral, subspace
from mergetool.kernels.subspace import leading_spaces
from mergetool.methods import registry
from mergetool.methods.base import TensorGroup
from tests.elsewhere import DEVICE, Elsewhere
from tests.methods.test_tsv_merge import relative, task

EXACT = {"dc-merge": {"density": 1.0, "combine": "sum"}}
"""Options without thresholds, which rounding may cross."""
SEARCHING = {"iso-cts", "dc-merge", "tsv-merge"}
"""Methods that want a few directions; the others need all, which products do not find."""


def merge_of(method, deltas):
    """The merged task vector, and what was noted in words."""
    method = registry()[method](scale=1.0, **EXACT.get(method, {}))
    names = tuple(f"m{index}" for index in range(len(deltas)))
    base = torch.zeros_like(deltas[0])
    group = TensorGroup("mlp.weight", tuple(base.shape), names, base, [delta.clone() for delta in deltas])
    merged = method.merge(group, method.params(0.0, names), {})
    return merged, [note for note in group.notes if isinstance(note, str)]


def merge_there(method, deltas):
    with Elsewhere():
        merged, notes = merge_of(method, [delta.to(DEVICE) for delta in deltas])
        return merged.cpu(), notes


@pytest.fixture
def searches(monkeypatch):
    """Every search for directions, which matrices of 96 rows are enough for."""
    told = []
    monkeypatch.setattr(spectral, "_SMALLEST", 96)
    monkeypatch.setattr(spectral, "leading_spaces", lambda *given: told.append(given) or leading_spaces(*given))
    return told


@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "dc-merge", "tsv-merge"])
def test_a_device_merges_by_products_what_the_cpu_merges_by_decompositions(searches, method, shape):
    deltas = [task(*shape, seed).float() for seed in range(6)]
    here, _ = merge_of(method, deltas)
    assert not searches
    there, notes = merge_there(method, deltas)
    few = method == "iso-cts" and shape[0] < shape[1]  # all directions of the rows are known: it looks in those left
    assert bool(searches) is (method in SEARCHING and not few)
    assert relative(there, here) < 1e-5
    assert notes == []


@pytest.mark.parametrize("method", ["dc-merge", "lors", "tsv-merge"])
def test_what_products_do_not_find_is_noted(searches, monkeypatch, method):
    monkeypatch.setattr(subspace, "_ROUNDS", 1)
    deltas = [task(96, 128, seed).float() for seed in range(6)]
    there, notes = merge_there(method, deltas)
    assert len(searches) == 1  # for all matrices together
    assert notes == ["6 of 6 matrices by eigh: their leading directions were not found by products"]
    assert relative(there, merge_of(method, deltas)[0]) < 1e-5


def test_the_benchmark_of_a_layer_measures_every_shape(forks, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "bench_tsv.py"
    told = tmp_path / "layer.json"
    (done,) = forks.python(script, "--layer", "--shrink", "64", "--rounds", "1", "--json", told).wait()
    assert done.code == 0, done.err
    figures = json.loads(told.read_text())
    shapes = [(each["count"], *each["shape"]) for each in figures["matrices"]]
    assert shapes == [(2, 64, 64), (2, 16, 64), (2, 224, 64), (1, 64, 224)]
    assert all(each["error"] < 1e-5 for each in figures["matrices"])
    assert f"one layer of 8 models on cpu: {figures['seconds_a_layer']:.2f} s" in done.out

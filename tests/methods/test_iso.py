"""iso-c and iso-cts against the authors' numbers, naive float64 versions, and what must hold whatever the input."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergetool.api import merge_state_dicts
from mergetool.kernels.isotropic import space_sizes
from tests.kernels.tsv_reference import reference_deltas

AUTHORS = load_file(Path(__file__).parents[1] / "kernels" / "data" / "iso_reference.safetensors")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates(method, deltas, scale=1.0, **fields):
    base = {name: torch.zeros_like(delta) for name, delta in deltas[0].items()}
    return merge_state_dicts(method, deltas, base, dtype="float64", scale=scale, **fields)


def update(method, deltas, **fields):
    return updates(method, [{"mlp.weight": delta} for delta in deltas], **fields)["mlp.weight"]


@pytest.mark.parametrize(
    ("tag", "method", "fields"),
    [("iso_c", "iso-c", {}), ("iso_cts", "iso-cts", {}), ("iso_cts_half", "iso-cts", {"common": 0.5})],
)
@pytest.mark.parametrize("name", ["mlp.up", "mlp.down", "attn.out", "norm"])
def test_a_model_merges_as_the_authors_code_merges_it(tag, method, fields, name):
    found = updates(method, reference_deltas(), filter="reference", **fields)[name]
    torch.testing.assert_close(found, AUTHORS[f"{tag}.{name}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (12, 12)])
def test_iso_c_gives_every_direction_the_mean_singular_value_of_the_sum(shape):
    deltas = [randn(*shape, seed=seed) for seed in range(3)]
    found = torch.linalg.svdvals(update("iso-c", deltas))
    mean = torch.linalg.svdvals(sum(deltas)).mean()
    torch.testing.assert_close(found, mean.expand_as(found))


def test_iso_cts_gives_every_direction_one_singular_value():
    deltas = [randn(30, 20, seed=seed) for seed in range(3)]
    found = torch.linalg.svdvals(update("iso-cts", deltas))
    torch.testing.assert_close(found, found.mean().expand_as(found))


def test_iso_cts_with_common_directions_only_is_iso_c():
    deltas = [randn(30, 20, seed=seed) for seed in range(3)]
    torch.testing.assert_close(update("iso-cts", deltas, common=1.0), update("iso-c", deltas))


@pytest.mark.parametrize("size", [1, 2, 5, 20, 768])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("common", [0.0, 0.3, 0.8, 1.0])
def test_common_and_own_directions_fill_the_matrix(size, num_tasks, common):
    shared, own = space_sizes(size, num_tasks, common)
    assert 0 <= shared <= size
    assert 0 <= own <= size
    assert shared + own * num_tasks == size


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_directions_in_which_nothing_changed_stay_unchanged(method):
    low_rank = [randn(30, 2, seed=seed) @ randn(2, 20, seed=9 + seed) for seed in range(3)]
    stored = [delta.float() for delta in low_rank]  # float32: rounding noise fills the other 14 directions
    base = {"mlp.weight": torch.zeros(30, 20)}
    merged = merge_state_dicts(method, [{"mlp.weight": delta} for delta in stored], base)["mlp.weight"]
    strengths = torch.linalg.svdvals(merged.double())
    assert int((strengths > 1e-4 * strengths[0]).sum()) == 6


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_turning_features_turns_the_merge(method):
    deltas = [randn(12, 8, seed=seed) for seed in range(3)]
    left, right = torch.linalg.qr(randn(12, 12, seed=7))[0], torch.linalg.qr(randn(8, 8, seed=8))[0]
    found = update(method, [left @ delta @ right for delta in deltas])
    torch.testing.assert_close(found, left @ update(method, deltas) @ right)


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_a_model_of_weight_0_is_left_out(method):
    deltas = [{"w": randn(12, 8, seed=seed), "b": randn(5, seed=seed)} for seed in range(3)]
    found = updates(method, deltas, weight={"m0": 1.0, "m1": 0.0, "m2": 1.0})
    expected = updates(method, [deltas[0], deltas[2]])
    torch.testing.assert_close(found, expected)

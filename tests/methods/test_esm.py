"""Merging in the essential subspace: numbers of the authors' code, the formula in float64, and cases by hand."""

import numpy as np
import pytest
import torch

from mergetool import RecipeError, merge_state_dicts
from mergetool.testing.toys import assert_near


def drawn(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def case(outputs, inputs, tasks, turned=False):
    """(base, models, Gram matrices) of one layer."""
    changes = [drawn(100 + task, outputs, inputs) / 10 for task in range(tasks)]
    rows = [drawn(200 + task, 30, inputs) for task in range(tasks)]
    base = drawn(7, outputs, inputs)
    models = {"abc"[task]: {"w": base + change} for task, change in enumerate(changes)}
    return {"w": base}, models, {"abc"[task]: {"w": x.T @ x / len(x)} for task, x in enumerate(rows)}


def change_of(base, models, grams, **settings):
    merged = merge_state_dicts("esm", models, base, statistics=grams, dtype="float64", **settings)
    return merged["w"] - base["w"]


@pytest.mark.parametrize(
    ("shape", "norm", "first"),
    [((12, 8, 3), 2.866464924440405, 0.45070008523985194), ((8, 12, 2), 2.412570315660705, 0.49607032312249604)],
)
def test_it_is_what_the_authors_code_makes(shape, norm, first):
    """Their `esm_merge` (ESM-ViT) on eigenvectors of `X D^T`, in float64."""
    change = change_of(*case(*shape))
    assert float(change.norm()) == pytest.approx(norm, rel=1e-9)
    assert float(change[0, 0]) == pytest.approx(first, rel=1e-8)


def test_one_task_with_everything_kept_is_that_task():
    base, models, grams = case(6, 6, 1)
    plain = {"rank": 1.0, "energy": 0.0, "contrast": 0.0}
    left, s, right = torch.linalg.svd(models["a"]["w"] - base["w"])
    del left, right
    change = change_of(base, models, grams, **plain)
    # Directions of outputs are orthonormal already; what reads them gets one length, that of the mean.
    assert torch.linalg.svdvals(change).tolist() == pytest.approx([2 * float(s.mean())] * 6)


def test_what_data_never_show_is_left_out():
    """Inputs that never occur change no output, however large the change of their weights is."""
    base = {"w": torch.zeros(4, 4, dtype=torch.float64)}
    change = torch.diag(torch.tensor([1.0, 1.0, 100.0, 100.0], dtype=torch.float64))
    seen = torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64))
    models = {"a": {"w": change}, "b": {"w": change.flip(0, 1) / 100}}
    grams = {"a": {"w": seen}, "b": {"w": torch.eye(4, dtype=torch.float64)}}
    found = change_of(base, models, grams, contrast=0.0, energy=0.0, rank=4)
    assert float(found[:, 2:].abs().max()) < 4  # of model b, not of a


def test_a_layer_without_a_statistic_is_merged_by_its_own_directions():
    base, models, _ = case(8, 8, 2)
    other = {"v.weight": torch.eye(2, dtype=torch.float64)}
    grams = dict.fromkeys(models, other)
    assert_near(
        merge_state_dicts("esm", models, base, statistics=grams, dtype="float64"),
        merge_state_dicts("tsv-merge", models, base, dtype="float64"),
        1e-10,
    )


def test_a_model_that_is_left_out_changes_nothing():
    base, models, grams = case(8, 8, 3)
    two = {name: models[name] for name in "ac"}
    weight = {"a": 1.0, "b": 0.0, "c": 1.0}
    wanted = merge_state_dicts("esm", two, base, statistics={name: grams[name] for name in "ac"}, dtype="float64")
    assert_near(merge_state_dicts("esm", models, base, statistics=grams, dtype="float64", weight=weight), wanted, 1e-12)


def test_layers_are_not_fused():
    base, models, grams = case(8, 8, 2)
    with pytest.raises(RecipeError, match="write `fuse: none`"):
        merge_state_dicts("esm", models, base, statistics=grams, fuse="qkv")

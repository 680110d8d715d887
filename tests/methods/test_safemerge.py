"""Fine-tunes mended where they leave the subspace of alignment, against the formula in float64 and planted cases."""

import pytest
import torch

from mergetool import RecipeError, merge_state_dicts
from mergetool.testing.toys import assert_near, uniform

NAME = "model.layers.0.mlp.up_proj.weight"


def drawn(name, shape=(6, 5)):
    return uniform(shape, name)


def merged(base, tuned, safe, unaligned, **settings):
    """One matrix and one vector by it."""
    states = ({NAME: each, "v": each[0].clone()} for each in (base, tuned, safe, unaligned))
    aligned, *models = states
    return merge_state_dicts(
        "safemerge", dict(zip(("tuned", "safe", "unaligned"), models, strict=True)), aligned, **settings
    )


def by_formula(base, tuned, safe, unaligned, threshold=0.35, keep=0.8):
    """With the projection written out, in float64."""
    base, tuned, safe, unaligned = (each.double() for each in (base, tuned, safe, unaligned))
    v, d = base - unaligned, tuned - base
    projection = v @ v.T / v.norm()
    cosine = ((projection @ d) * d).sum() / (projection @ d).norm() / d.norm()
    return (tuned if cosine >= threshold else base + keep * d + (1 - keep) * (safe - base)), float(cosine)


@pytest.mark.parametrize("threshold", [-1.0, 0.35, 0.6, 1.0])
def test_the_result_is_the_formula_in_float64(threshold):
    given = [drawn(name) for name in ("base", "tuned", "safe", "unaligned")]
    expected, cosine = by_formula(*given, threshold=threshold, keep=0.7)
    assert 0.36 < cosine < 0.99
    assert_near({NAME: merged(*given, threshold=threshold, keep=0.7)[NAME]}, {NAME: expected}, tolerance=1e-6)


def test_a_change_inside_the_subspace_of_alignment_stays_and_one_outside_does_not():
    base, inside, outside, safe = (torch.zeros(4, 3) for _ in range(4))
    unaligned = torch.zeros(4, 3)
    unaligned[0], inside[0], outside[1], safe[2] = -1.0, 2.0, 2.0, 5.0
    assert merged(base, inside, safe, unaligned)[NAME].equal(inside)
    assert torch.allclose(merged(base, outside, safe, unaligned)[NAME], 0.8 * outside + 0.2 * safe)


def test_what_is_no_matrix_is_that_of_the_fine_tune():
    given = [drawn(name) for name in ("base", "tuned", "safe", "unaligned")]
    assert_near({"v": merged(*given, threshold=1.0)["v"]}, {"v": given[1][0]}, tolerance=1e-6)


def test_where_alignment_changed_nothing_the_fine_tune_stays():
    base, tuned, safe = (drawn(name) for name in ("base", "tuned", "safe"))
    assert_near({NAME: merged(base, tuned, safe, base.clone())[NAME]}, {NAME: tuned}, tolerance=1e-6)


def test_it_takes_three_models():
    state = {NAME: drawn("base")}
    with pytest.raises(RecipeError, match="3 models"):
        merge_state_dicts("safemerge", {"tuned": state, "safe": state}, state)

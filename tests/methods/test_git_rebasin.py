"""git-rebasin and merge-many on checkpoints in planted orders."""

import pytest

import mergetool
from mergetool.errors import RecipeError
from mergetool.testing.toys import assert_near
from tests.alignment import nets


def merge(models, method="git-rebasin", **parameters):
    return mergetool.merge_state_dicts(method, models, architecture="mlp", **parameters)


def test_the_result_is_in_the_order_of_the_reference():
    models = nets.copies(nets.mlp(widths=(8, 30, 4)), 3, architecture="mlp")
    assert_near(merge(models), models["a"], 1e-6)
    assert_near(merge(models, reference="c"), models["c"], 1e-6)


def test_an_unknown_reference_is_named():
    with pytest.raises(RecipeError, match="there is no model 'd'"):
        merge(nets.copies(nets.mlp(), 2, architecture="mlp"), reference="d")

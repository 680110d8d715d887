"""Passthrough copies, scales, and changes how a model is stored."""

import pytest
import torch

import mergetool
from mergetool import RecipeError, merge_state_dicts
from mergetool.testing.toys import INTEGERS, assert_same_bytes, read, times, toy_models, write


@pytest.fixture
def model():
    return toy_models("a", exact=False)[1]["a"] | INTEGERS


def test_a_model_is_copied_to_the_bit(model):
    assert_same_bytes(merge_state_dicts("passthrough", [model]), model)


def test_values_that_are_odd_but_finite_are_copied_to_the_bit():
    odd = torch.tensor([0.0, -0.0, 1e-45, -1.1754942e-38, 3.4028235e38])
    assert_same_bytes(merge_state_dicts("passthrough", [{"w": odd}]), {"w": odd})


def test_every_value_is_scaled_but_no_integer(model):
    merged = merge_state_dicts("passthrough", [model], scale=0.5)
    floats = {name: value for name, value in model.items() if value.is_floating_point()}
    assert_same_bytes(merged, model | times(floats, 0.5))


def test_only_the_storage_changes(model, tmp_path):
    paths = write(tmp_path, {"a": model})
    output = {"path": str(tmp_path / "out"), "dtype": "bfloat16", "shard_size": 400}
    result = mergetool.run({"models": {"a": str(paths["a"])}, "merge": {"method": "passthrough"}, "output": output})
    cast = {name: value.bfloat16() if value.is_floating_point() else value for name, value in model.items()}
    assert_same_bytes(read(result.path), cast)
    assert len(list(result.path.glob("*.safetensors"))) > 1


def test_two_models_are_too_many(model):
    with pytest.raises(RecipeError, match="at most 1"):
        merge_state_dicts("passthrough", [model, model])

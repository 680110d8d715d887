"""Methods of the literature that are a setting of another one: their recipes, run, give what they promise."""

from pathlib import Path

import torch
import yaml

import mergetool
from mergetool.testing.toys import assert_near, read, toy_models, write

RECIPES = Path(__file__).parents[2] / "recipes"


def result_of(name, folder, base, models):
    """What a recipe of this name makes of these models."""
    document = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    paths = write(folder / "models", {"base": base, **models})
    document["base"] = str(paths["base"])
    document["models"] = {key: str(paths[key]) for key in document["models"]}
    assert document["output"]["path"] == f"./out/{name}"
    return read(mergetool.run(document, output=folder / "out").path)


def test_expo_goes_beyond_the_aligned_model(tmp_path):
    base, models = toy_models("a", exact=False)
    found = result_of("expo", tmp_path, base, {"aligned": models["a"]})
    assert_near(found, {name: value + 0.3 * (value - base[name]) for name, value in models["a"].items()})


def test_a_sparse_delta_keeps_the_largest_tenth_of_the_changes(tmp_path):
    base, models = toy_models("a", exact=False)
    found = result_of("sparse-delta", tmp_path, base, {"model": models["a"]})
    before, after = (
        torch.cat([(state[name] - base[name]).flatten() for name in base]) for state in (models["a"], found)
    )
    kept = after != 0
    assert abs(int(kept.sum()) - before.numel() // 10) <= 1
    assert after[kept].equal(before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()


def test_subspace_interpolation_keeps_the_leading_directions_of_a_mean(tmp_path):
    base, models = toy_models("ab", exact=False)
    found = result_of("subspace-interpolation", tmp_path, base, {"math": models["a"], "code": models["b"]})
    name = "model.layers.0.mlp.up_proj.weight"
    mean = 0.6 * models["a"][name].double() + 0.4 * models["b"][name].double() - base[name].double()
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    kept = int(((s.square().cumsum(0) / s.square().sum()) < 0.9).sum()) + 1
    assert kept < len(s)
    expected = base[name].double() + (u[:, :kept] * s[:kept]) @ v[:kept]
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5)

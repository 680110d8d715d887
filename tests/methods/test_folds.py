"""Averages over the checkpoints of one run: against sums in float64, read one by one, found by a glob."""

import json

import pytest
import torch

import mergetool
from mergetool import RecipeError, merge_state_dicts
from mergetool.engine.folding import OneByOne
from mergetool.kernels.rng import normal, stream_key
from mergetool.methods.base import TensorGroup
from mergetool.methods.linear import Linear
from mergetool.planning import make_plan
from mergetool.planning.cost import bytes_per_element
from mergetool.recipe.load import load_recipe
from mergetool.testing.toys import assert_near, assert_same_bytes, read, toy_models
from tests.files import write_model

NAMES = "abcdefg"
NAME = "model.layers.0.mlp.up_proj.weight"


def checkpoints():
    return toy_models(NAMES, exact=False)[1]


def stacked():
    return torch.stack([state[NAME].double() for state in checkpoints().values()])


def test_the_moving_average_is_the_recursion():
    found = merge_state_dicts("ema", checkpoints(), decay=0.7)[NAME]
    average, *others = stacked()
    for other in others:
        average = 0.7 * average + 0.3 * other
    assert_near({"x": found}, {"x": average}, tolerance=1e-6)


@pytest.mark.parametrize(("decay", "name"), [(1.0, "a"), (0.0, "g")])
def test_at_its_ends_it_is_the_first_or_the_last(decay, name):
    assert_same_bytes(merge_state_dicts("ema", checkpoints(), decay=decay), checkpoints()[name])


def test_swag_without_a_draw_is_the_mean():
    mean = stacked().mean(0)
    assert_near({"x": merge_state_dicts("swag", checkpoints(), scale=0.0)[NAME]}, {"x": mean}, tolerance=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 3, 20])
def test_swag_draws_from_variance_and_deviations(rank):
    values, seed, sample = stacked(), 5, 2
    kept = min(rank, len(values))
    drawn = values.var(0, correction=0).div(2).sqrt() * normal(stream_key(seed, NAME, "swag", "2"), 0, values[0])
    for place in range(len(values) - kept, len(values)) if kept > 1 else ():
        z = float(normal(stream_key(seed, "swag", "2"), place + 1, torch.empty(1)))
        drawn += z * (values[place] - values[: place + 1].mean(0)) / (2 * (kept - 1)) ** 0.5
    found = merge_state_dicts("swag", checkpoints(), rank=rank, sample=sample, scale=0.5, seed=seed)[NAME]
    assert_near({"x": found}, {"x": values.mean(0) + 0.5 * drawn}, tolerance=1e-6)


def test_models_are_read_one_by_one_and_the_first_is_read_once():
    asked = []

    def read_model(place):
        asked.append(place)
        return torch.full((3,), float(place))

    models = OneByOne(read_model, range(5))
    group = TensorGroup("w", (3,), tuple("abcde"), None, models)
    merged = Linear().merge(group, Linear().params(0.0, group.names), {})
    assert merged.tolist() == pytest.approx([2.0] * 3)
    assert (asked, len(models), len(models[1:]), merged.data_ptr()) == ([0, 1, 2, 3, 4], 5, 4, models[0].data_ptr())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of one run, whose names sort otherwise as text."""
    folder = tmp_path_factory.mktemp("run")
    for count, state in enumerate(checkpoints().values(), 8):
        write_model(folder / "runs" / f"checkpoint-{count}", state)
    (folder / "runs" / "checkpoint-notes.txt").write_text("no model")
    return folder


def recipe_of(run, models, **merge):
    return load_recipe({"models": models, "merge": merge}, folder=run)


def test_a_glob_takes_checkpoints_in_natural_order(run, tmp_path):
    recipe = recipe_of(run, {"glob": "runs/checkpoint-*", "last": 5}, method="ema")
    assert list(recipe.models) == [f"checkpoint-{count}" for count in (10, 11, 12, 13, 14)]
    result = mergetool.run(recipe, output=tmp_path / "out")
    named = dict(list(checkpoints().items())[2:])
    assert_same_bytes(read(result.path), merge_state_dicts("ema", named))
    lock = json.loads((result.path / "mergetool.json").read_text())
    assert lock["recipe"]["models"]["checkpoint-10"] == "runs/checkpoint-10"
    whole = recipe_of(run, {"glob": str(run / "*" / "checkpoint-*")}, method="linear")
    assert len(whole.models) == 7


def test_memory_does_not_grow_with_the_number_of_checkpoints(run):
    few, many = (
        bytes_per_element(make_plan(recipe_of(run, {"glob": "runs/checkpoint-*", "last": n}, method="swag")))
        for n in (3, 7)
    )
    assert few == many


def test_samples_are_several_results_of_one_run(run, tmp_path):
    document = {
        "models": {"glob": str(run / "runs" / "checkpoint-*")},
        "merge": {"method": "swag"},
        "sweep": {"sample": [0, 1]},
    }
    one, two = (read(path)[NAME] for path in mergetool.run(document, output=tmp_path / "out").results)
    assert not one.equal(two)
    assert one.equal(
        merge_state_dicts("swag", {f"checkpoint-{n}": s for n, s in enumerate(checkpoints().values(), 8)})[NAME]
    )


@pytest.mark.parametrize(
    ("models", "what"),
    [
        ({"glob": "nowhere/*"}, "nothing matches"),
        ({"glob": "runs/*.txt"}, "files only, and none of weights"),
        ({"glob": "runs/*", "last": 0}, "above 0"),
        ({"glob": "runs/*", "x": "./x"}, "stands for all models"),
    ],
)
def test_wrong_globs_are_told(run, models, what):
    with pytest.raises(RecipeError, match=what):
        recipe_of(run, models, method="linear")


def test_what_is_made_is_not_one_of_its_own_models(run):
    """Not the result, which the next run would find, and not what a killed run leaves where `-o` puts it there."""
    models = {"glob": "runs/checkpoint-*"}
    for path in ("runs/checkpoint-mean", "./other/../runs/checkpoint-mean", str(run / "runs" / "checkpoint-mean")):
        with pytest.raises(RecipeError, match="would itself be one of the models") as caught:
            load_recipe({"models": models, "merge": {"method": "linear"}, "output": {"path": path}}, folder=run)
        assert caught.value.problems[0].where.endswith("output.path")
    left = [run / "runs" / f"checkpoint-mean.partial{end}" for end in ("", ".parts", ".journal")]
    for folder in left:
        folder.mkdir()
    assert len(recipe_of(run, models, method="linear").models) == 7
    for folder in left:
        folder.rmdir()


def test_a_model_may_be_called_glob(run):
    assert list(recipe_of(run, {"glob": "runs/checkpoint-8", "b": "runs/checkpoint-9"}, method="linear").models) == [
        "glob",
        "b",
    ]

"""What `mergetool plan` tells people: layers that are alike in one row, words for what is done, amounts with units."""

import re

import pytest

import mergetool
from mergetool.planning.cost import estimate
from mergetool.planning.patterns import patterns
from mergetool.planning.report import describe, rows, totals
from mergetool.recipe import load_recipe
from tests.files import write_models

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    **{f"model.layers.{layer}.norm.weight": (8,) for layer in range(5)},
    **{f"model.layers.{layer}.mlp.weight": (8, 8) for layer in range(5) if layer != 2},
    "model.layers.2.mlp.weight": (9, 8),
    **{f"model.layers.{layer}.experts.{expert}.weight": (4, 8) for layer in (1, 2, 4) for expert in range(3)},
}


@pytest.fixture
def plan_of(tmp_path):
    write_models(tmp_path, shapes=SHAPES)
    models = {name: str(tmp_path / name) for name in "ab"}

    def plan(base=True, **merge):
        return mergetool.plan({"models": models, "merge": merge, **({"base": str(tmp_path / "base")} if base else {})})

    return plan


def test_layers_that_are_treated_alike_are_one_row(plan_of):
    plan = plan_of(method="ties")
    found = {row[0]: row[1:3] for row in rows(plan)}
    assert found == {
        "model.embed_tokens.weight": ("", "16x8"),
        "model.layers.{0..4}.norm.weight": ("x5", "8"),
        "model.layers.{0..1,3..4}.mlp.weight": ("x4", "8x8"),
        "model.layers.2.mlp.weight": ("", "9x8"),
        "model.layers.{1..2,4}.experts.{0..2}.weight": ("x9", "4x8"),
    }
    assert [row[0] for row in rows(plan, full=True)] == [step.spec.name for step in plan.steps]
    assert sum(len(pattern.steps) for pattern in patterns(plan)) == len(plan.steps)


@pytest.mark.parametrize(
    ("merge", "told"),
    [
        ({"density": 0.2}, "density=0.2, weight=1, scale=1"),
        ({"scale": {"gradient": [0.3, 1.0]}}, "density=0.2, weight=1, scale=0.3 .. 1"),
        ({"scale": {"gradient": [1.0, 0.3]}}, "density=0.2, weight=1, scale=1 .. 0.3"),
        ({"scale": {"gradient": [1.0, 0.2, 1.0]}}, "density=0.2, weight=1, scale=0.2 .. 1"),
        ({"weight": {"a": 0.5, "b": {"gradient": [0, 2]}}}, "density=0.2, weight=(0.5, 0 .. 2), scale=1"),
    ],
)
def test_numbers_are_told_along_depth(plan_of, merge, told):
    (found,) = [row[-1] for row in rows(plan_of(method="ties", **merge)) if row[0] == "model.layers.{0..4}.norm.weight"]
    assert found == told


def test_an_override_makes_rows_of_its_own(plan_of):
    overrides = [{"match": "*.3.*", "use": "b"}, {"match": "*.0.norm*", "density": 0.5}]
    found = {row[0]: row[4:] for row in rows(plan_of(method="ties", overrides=overrides))}
    assert found["model.layers.3.norm.weight"][:2] == ("copy", "b")
    assert found["model.layers.0.norm.weight"][2].startswith("density=0.5, ")
    assert found["model.layers.{1..2,4}.norm.weight"][2].startswith("density=0.2, ")


@pytest.mark.parametrize(
    ("merge", "matrix", "norm", "embedding"),
    [
        ({"method": "tsv-merge"}, "tsv-merge", "average", "average"),
        ({"method": "iso-c", "filter": "fusionbench"}, "iso-c", "average", "iso-c"),
        ({"method": "ties"}, "ties", "ties", "ties"),
        ({"method": "tsv-compress", "rank": 1}, "factors", "in full", "factors"),
    ],
)
def test_a_tensor_is_said_to_be_treated_as_it_is(plan_of, merge, matrix, norm, embedding):
    how = {row[0]: row[4] for row in rows(plan_of(**merge))}
    assert how["model.layers.2.mlp.weight"] == matrix
    assert how["model.layers.{0..4}.norm.weight"] == norm
    assert how["model.embed_tokens.weight"] == embedding


def test_totals_come_in_units_that_fit_and_for_this_machine(plan_of):
    plan = plan_of(method="tsv-merge")
    costs = estimate(plan, workers=2, memory=None)
    facts = dict(totals(plan, costs))
    assert facts["tensors"] == "20 (14 tsv-merge, 6 average)"
    assert facts["to write"].endswith(" kB in model.safetensors")
    assert re.fullmatch(r"[0-9.]+ MiB with 2 workers", facts["memory, at most"])
    assert re.fullmatch(r"[0-9.]+ s", facts["expected time, here"])
    assert not any("GPU" in key for key in facts)
    assert any("GPU" in key for key, _ in totals(plan, costs, machines=True))


SEARCH = {
    "method": "merge3",
    "inner": {"method": "ties", "density": {"search": [0.1, 0.9]}},
    "tasks": [{"name": "arc_easy"}, {"name": "piqa"}],
    "search": {"population": 8, "generations": 5},
}


@pytest.mark.parametrize(
    ("estimator", "each", "calibration"),
    [
        ({}, 100, 3),
        ({"kind": "gmp-irt"}, 100, 3 + 17),
        ({"kind": "full"}, None, 0),
        ({"kind": "mean", "subset": "random", "items": 7}, 14, 0),
    ],
)
def test_a_search_says_how_many_candidates_answer_how_much(plan_of, estimator, each, calibration):
    merge = {**SEARCH, "estimator": estimator}
    plan = plan_of(**merge)
    search = load_recipe({"base": "x", "models": {"a": "x", "b": "x"}, "merge": merge}).method
    costs = estimate(plan, workers=2, memory=None)
    facts = dict(totals(plan, costs, search=search))
    asked = "all search items" if each is None else f"{each} items"
    assert facts["candidates"] == f"40, each merged in memory and asked {asked}"
    assert ("asked all search items" in facts) is (each is not None)
    told = describe(plan, costs, search)["search"]
    assert (told["candidates"], told["each"], told["calibration"]) == (40, each, calibration)

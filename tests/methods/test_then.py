"""Steps after merging, against sums in float64: after any method, in slices or whole, alone or one after the other."""

from pathlib import Path

import pytest
import torch

import mergetool
from mergetool import RecipeError, merge_state_dicts
from mergetool.methods import registry
from mergetool.methods.then import steps
from mergetool.planning import make_plan
from mergetool.planning.numbers import with_numbers
from mergetool.planning.report import rows
from mergetool.recipe.load import load_recipe
from mergetool.testing.toys import assert_near, assert_same_bytes, read, toy_models
from tests.files import content, write_model, write_recipe

ROOT = Path(__file__).parents[2]
LINES = {"step": "lines", "first": 0.4, "last": 1.0}
MATCH = {"step": "match-norm"}
AFTER = ["ties", "dare-linear", "tsv-merge", "karcher", "linear"]
FIRST, LAST = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"


def merged(method, then=(), **settings):
    base, models = toy_models(exact=False)
    return merge_state_dicts(method, models, base, then=then, **settings)


def change(state):
    base, _ = toy_models(exact=False)
    return {name: value.double() - base[name].double() for name, value in state.items()}


def plain(method):
    """What a method changes by itself; of one that uses no base, what it would."""
    base, models = toy_models(exact=False)
    uses_base = registry()[method].needs_base != "unused"
    return change(merge_state_dicts(method, models, base if uses_base else None))


@pytest.mark.parametrize("name", steps())
def test_every_step_has_a_recipe_and_documentation(name):
    assert load_recipe(ROOT / "recipes" / f"then-{name}.yaml").then[0].step_name() == name
    text = steps()[name].documentation()
    assert "\nReference: " in text
    assert "\nDiffers from the paper: " in text
    assert all(info.description for key, info in steps()[name].model_fields.items() if key != "step")


@pytest.mark.parametrize("method", AFTER)
def test_lines_multiply_what_was_changed_by_a_line_over_the_layers(method):
    expected = plain(method)
    found = change(merged(method, [LINES]))
    for name, value in expected.items():
        factor = 1.0 if ".layers.1." in name else 0.4
        assert_near({"x": found[name]}, {"x": factor * value}, tolerance=1e-6)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "tsv-merge"])
def test_a_line_of_ones_leaves_every_bit(method):
    assert_same_bytes(merged(method, [{"step": "lines", "first": 1.0, "last": 1.0}]), merged(method))


@pytest.mark.parametrize("method", AFTER)
def test_changes_get_the_mean_norm_of_the_models_changes(method):
    _, models = toy_models(exact=False)
    before, found = plain(method), change(merged(method, [MATCH]))
    for name, value in before.items():
        norm = sum(change(model)[name].norm() for model in models.values()) / len(models)
        factor = norm / value.norm() if value.norm() else 1.0
        assert_near({"x": found[name]}, {"x": factor * value}, tolerance=2e-6)


@pytest.mark.parametrize("method", ["ties", "tsv-merge"])
def test_rows_can_have_norms_of_their_own(method):
    _, models = toy_models(exact=False)
    before, found = plain(method)[FIRST], change(merged(method, [{**MATCH, "axis": "row"}]))[FIRST]
    norms = sum(change(model)[FIRST].norm(dim=1) for model in models.values()) / len(models)
    assert_near({"x": found}, {"x": before * (norms / before.norm(dim=1))[:, None]}, tolerance=2e-6)


def test_without_a_base_weights_get_the_mean_norm_of_the_models():
    _, models = toy_models(exact=False)
    found = merge_state_dicts("linear", models, then=[MATCH])
    norm = sum(model[FIRST].double().norm() for model in models.values()) / 3
    assert float(found[FIRST].norm()) == pytest.approx(float(norm), rel=1e-6)


def test_the_average_of_one_model_keeps_its_length():
    base, models = toy_models("a", exact=False)
    assert_near(merge_state_dicts("linear", models, base, then=[MATCH]), models["a"], tolerance=1e-6)


def test_a_line_can_give_back_what_a_vote_takes():
    _, models = toy_models(exact=False)
    before = plain("ties")
    found = change(merged("ties", [{"step": "lines", "first": 1.0, "last": 2.0, "balance": True}]))
    for name, factor in ((FIRST, 1.0), (LAST, 2.0)):
        whole = sum(change(model)[name] for model in models.values())
        ratio = whole.abs().sum() / before[name].abs().sum() / 3
        assert_near({"x": found[name]}, {"x": factor * ratio * before[name]}, tolerance=2e-6)


@pytest.mark.parametrize("method", ["ties", "tsv-merge", "linear"])
def test_the_leading_directions_of_a_change_are_kept(method):
    before, found = plain(method), change(merged(method, [{"step": "truncate", "rank": 2}]))
    for name, value in before.items():
        if value.dim() > 1 and value.numel() and value.flatten(1).shape[0] > 1:
            u, s, v = torch.linalg.svd(value.flatten(1), full_matrices=False)
            value.copy_(((u[:, :2] * s[:2]) @ v[:2]).view_as(value))
        assert_near({"x": found[name]}, {"x": value}, tolerance=1e-6)


def test_directions_can_be_counted_by_their_share():
    values = torch.linalg.svdvals(plain("ties")[FIRST]).square()
    kept = int((values.cumsum(0) / values.sum() < 0.7).sum()) + 1
    found = torch.linalg.svdvals(change(merged("ties", [{"step": "truncate", "energy": 0.7}]))[FIRST])
    assert int((found > 1e-5).sum()) == kept


def test_steps_come_one_after_the_other():
    together = merged("ties", [MATCH, LINES, {**LINES, "first": 2.0, "last": 2.0}])
    longer = change(merged("ties", [MATCH]))
    assert_near({"x": change(together)[FIRST]}, {"x": 0.8 * longer[FIRST]}, tolerance=2e-6)
    assert_near(merged("ties", [LINES, MATCH]), merged("ties", [MATCH]), tolerance=1e-6)


def test_a_step_can_be_for_some_tensors_and_a_glob_for_none_is_told(tmp_path):
    found, without = merged("ties", [{**LINES, "match": "*.layers.0.*"}]), merged("ties")
    assert_same_bytes({LAST: found[LAST]}, {LAST: without[LAST]})
    assert not found[FIRST].equal(without[FIRST])
    recipe = recipe_of(tmp_path, then=[{**LINES, "match": "*.layer.*"}])
    assert any("'*.layer.*' matches no tensor" in each for each in make_plan(load_recipe(recipe)).warnings)


def test_what_is_copied_stays_as_it_is():
    found = merged("ties", [LINES], overrides=[{"match": FIRST, "use": "a"}])
    assert found[FIRST].equal(toy_models(exact=False)[1]["a"][FIRST])


# -------------------------------------------------------------------- recipes


def recipe_of(folder, method="ties", **sections):
    base, models = toy_models("ab", exact=False)
    for name, state in {"base": base, **models}.items():
        write_model(folder / name, state)
    files = {name: str(folder / name) for name in ("base", "a", "b")}
    merge = {"method": method, **sections.pop("merge", {})}
    given = {"base": files.pop("base"), "models": files, "merge": merge, **sections}
    return write_recipe(folder / "recipe.yaml", **{key: each for key, each in given.items() if each is not None})


def test_plan_lock_and_card_say_it(tmp_path):
    recipe = recipe_of(tmp_path, then=[LINES, MATCH])
    table = rows(make_plan(load_recipe(recipe)))
    assert {row[4] for row in table} >= {"ties, then lines, match-norm"}
    assert any("lines.factor=0.4 .. 1" in row[6] for row in table)
    result = mergetool.run(recipe, output=tmp_path / "out")
    assert "by `ties`, then `lines`, then `match-norm`" in (result.path / "README.md").read_text()
    assert '"match-norm factor"' in (result.path / "mergetool.json").read_text()
    base, models = toy_models("ab", exact=False)
    assert_same_bytes(read(result.path), merge_state_dicts("ties", models, base, then=[LINES, MATCH]))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Models of one tensor of several units, and a small one."""
    folder, generator = tmp_path_factory.mktemp("large"), torch.Generator().manual_seed(0)
    shapes = {"w": (1100, 4096), "v": (7, 5)}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    write_model(folder / "base", base)
    for name in "ab":
        noise = {key: torch.randn(shape, generator=generator) / 8 for key, shape in shapes.items()}
        write_model(folder / name, {key: (base[key] + noise[key]).bfloat16() for key in shapes})
    return folder


def test_several_workers_write_the_same_bytes_in_slices(large):
    then = [MATCH, {**MATCH, "axis": "row"}, LINES]
    recipe = write_recipe(
        large / "r.yaml", base="base", models={"a": "a", "b": "b"}, merge={"method": "ties"}, then=then
    )
    one, three = (mergetool.run(recipe, output=large / f"out{n}", workers=n).path for n in (1, 3))
    assert content(one) == content(three)
    found = read(one)["w"].double() - read(large / "base")["w"].double()
    expected = sum((read(large / n)["w"].double() - read(large / "base")["w"].double()).norm(dim=1) for n in "ab") / 2
    assert_near({"x": found.norm(dim=1)}, {"x": 0.4 * expected}, tolerance=1e-2)


def test_numbers_of_candidates_follow_the_recipe(tmp_path):
    path = recipe_of(tmp_path, then=[LINES, MATCH])
    first, other = load_recipe(path), load_recipe(path, ["merge.density=0.9"])
    plan = with_numbers(make_plan(first), other)
    assert [step.operation.numbers for step in plan.steps] == [
        step.operation.numbers for step in make_plan(other).steps
    ]
    assert any(step.operation.counts is not None for step in plan.steps)


WRONG = {
    "no list": ({"then": {"step": "lines"}}, "expected a list"),
    "no step": ({"then": [{"first": 1.0}]}, "'step' is missing"),
    "unknown": ({"then": [{"step": "line"}]}, "there is no step 'line'"),
    "a key": ({"then": [{**LINES, "frist": 1.0}]}, "unknown key 'frist'"),
    "a number": ({"then": [{**LINES, "first": "x"}]}, "expected a number"),
    "lacking": ({"then": [{"step": "lines", "first": 1.0}]}, "required"),
    "two of one": ({"then": [{"step": "truncate", "rank": 2, "energy": 0.5}]}, "one of them"),
    "a bundle": ({"method": "mass", "then": [LINES]}, "no step can follow"),
    "no base": ({"method": "linear", "base": None, "then": [LINES]}, "the recipe has none"),
    "aligned": ({"method": "git-rebasin", "base": None, "then": [LINES]}, "without a common ancestor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_place(tmp_path, case):
    sections, what = WRONG[case]
    path = recipe_of(tmp_path, **sections)
    with pytest.raises(RecipeError, match=what) as caught:
        load_recipe(path)
    assert all(problem.fix for problem in caught.value.problems)
    assert any(f"{path}:" in problem.where for problem in caught.value.problems)


def test_a_base_that_only_a_step_uses_is_accepted(tmp_path):
    path = recipe_of(tmp_path, method="linear", then=[LINES])
    assert load_recipe(path).base is not None
    with pytest.raises(RecipeError, match="does not use a base"):
        load_recipe(recipe_of(tmp_path, method="linear"))

"""The plan of one candidate with the numbers of another is the plan of the other."""

import pytest

from mergetool.errors import PlanError
from mergetool.planning import make_plan
from mergetool.planning.numbers import keeps_operands, with_numbers
from mergetool.recipe import load_recipe
from mergetool.recipe.candidate import candidate_recipe, settings_of
from mergetool.tensors.source import MemorySource
from mergetool.testing.toys import INTEGERS, toy_models

NARROW = {"search": [0.1, 0.9]}
GATED = [{"match": "*.mlp.*", "weight": {"search": [0.0, 2.0], "groups": 2}}, {"match": "lm_head.*", "use": "a"}]
INNER = [
    {"method": "task-arithmetic", "weight": {"search": [0.0, 2.0]}, "overrides": GATED},
    {"method": "ties", "density": NARROW, "scale": {"search": [0.5, 2.0], "groups": 2}},
    {"method": "ties", "density": {"choices": [0.2, 1.0]}, "boundary": {"choices": ["keep", "drop", "random"]}},
    {"method": "ties", "density": {**NARROW, "shared": True}, "scope": {"choices": ["tensor", "model"]}},
    {"method": "knots", "density": NARROW},
    {"method": "slerp", "t": {"search": [0, 1]}},
    {"method": "dare-ties", "density": NARROW, "overrides": [{"match": {"choices": ["*.bias", "*"]}, "density": 0.5}]},
]


@pytest.fixture
def sources():
    base, models = toy_models("ab")
    states = {"base": base, **models}
    return {name: MemorySource(state | INTEGERS, name) for name, state in states.items()}


def searched(inner, sources):
    """A search recipe, and the values of every gene at some places."""
    recipe = load_recipe(
        {
            **({} if inner["method"] in ("slerp", "linear") else {"base": "base"}),
            "models": {"a": "a", "b": "b"},
            "merge": {"method": "merge3", "inner": inner, "tasks": [{"name": "anything"}]},
        }
    )
    space = recipe.method.space(("a", "b"))
    points = [[share] * len(space.genes) for share in (0.1, 0.6, 0.99)]
    used = {name: source for name, source in sources.items() if name != "base" or recipe.base}
    return recipe, [space.values(point) for point in points], used


@pytest.mark.parametrize("inner", INNER, ids=lambda inner: "-".join(map(str, inner.values()))[:40])
def test_a_plan_with_the_numbers_of_another_candidate_is_that_ones(inner, sources):
    recipe, points, sources = searched(inner, sources)
    first = make_plan(recipe, sources=sources)
    plans = [candidate_recipe(recipe, values) for values in points]
    for plain in plans:
        if keeps_operands(first, plain):
            again = with_numbers(first, plain)
            assert again.steps == make_plan(plain, sources=sources).steps
            assert again.stages == make_plan(plain, sources=sources).stages
            assert again.recipe == plain
    assert any(first.steps != make_plan(plain, sources=sources).steps for plain in plans)


def test_a_candidate_that_copies_other_tensors_has_a_plan_of_its_own(sources):
    chosen = [{"match": "lm_head.*", "use": {"choices": ["a", "b"]}}]
    recipe, (low, _, high), sources = searched({**INNER[0], "overrides": chosen}, sources)
    first = make_plan(recipe, sources=sources)
    assert keeps_operands(first, candidate_recipe(recipe, low))
    assert not keeps_operands(first, candidate_recipe(recipe, high))


@pytest.mark.parametrize("inner", INNER, ids=lambda inner: "-".join(map(str, inner.values()))[:40])
def test_a_candidate_is_what_its_written_recipe_loads_as(inner, sources):
    recipe, points, _ = searched(inner, sources)
    for values in points:
        made = candidate_recipe(recipe, values)
        loaded = load_recipe({**recipe.document, **settings_of(recipe, values)})
        assert (made.method, made.overrides, made.document) == (loaded.method, loaded.overrides, loaded.document)


def test_numbers_that_cannot_go_together_are_refused(sources):
    recipe, _, sources = searched({"method": "linear", "weight": {"search": [-1.0, 1.0]}}, sources)
    first = make_plan(candidate_recipe(recipe, (0.5, 0.25)), sources=sources)
    with pytest.raises(PlanError, match="add up to 0"):
        with_numbers(first, candidate_recipe(recipe, (0.5, -0.5)))

import pytest

from mergetool import RecipeError
from mergetool.recipe import load_recipe


def recipe(inner, models="ab", **merge):
    return {
        "base": "base",
        "models": dict.fromkeys(models, "x"),
        "merge": {"method": "merge3", "inner": inner, "tasks": [{"name": "t"}], **merge},
    }


def space(inner, **merge):
    loaded = load_recipe(recipe(inner, **merge))
    return [gene.name for gene in loaded.method.space(("a", "b")).genes]


def candidate(inner, values, **merge):
    return load_recipe(recipe(inner, **merge)).method.candidate(values, ("a", "b"))


RANGE = {"search": [0.1, 0.9]}


def test_a_range_of_a_per_model_setting_is_a_gene_for_each_model():
    inner = {"method": "ties", "density": RANGE, "scale": RANGE, "weight": {"a": RANGE, "b": 0.5}}
    assert space(inner) == ["density.a", "density.b", "scale", "weight.a"]
    assert candidate(inner, (0.2, 0.3, 0.4, 0.5)) == {
        "method": "ties",
        "density": {"a": 0.2, "b": 0.3},
        "scale": 0.4,
        "weight": {"a": 0.5, "b": 0.5},
    }


def test_groups_of_layers_are_knots_of_a_gradient():
    inner = {"method": "task-arithmetic", "weight": RANGE | {"shared": True}, "scale": 0.5}
    assert space(inner, search={"groups": 3}) == ["weight[0]", "weight[1]", "weight[2]"]
    assert candidate(inner, (0.2, 0.3, 0.4), search={"groups": 3})["weight"] == {"gradient": [0.2, 0.3, 0.4]}
    own = {"method": "task-arithmetic", "scale": RANGE | {"groups": 2}, "weight": {"gradient": [RANGE, 1.0]}}
    assert candidate(own, (0.2, 0.3, 0.4)) == {
        "method": "task-arithmetic",
        "scale": {"gradient": [0.2, 0.3]},
        "weight": {"gradient": [0.4, 1.0]},
    }


def test_overrides_and_choices_may_be_searched():
    overrides = [{"match": "*.mlp.*", "scale": RANGE}, {"match": "x", "use": "a"}]
    inner = {"method": "task-arithmetic", "scale": RANGE, "overrides": overrides}
    assert candidate(inner, (0.2, 0.3)) == {
        "method": "task-arithmetic",
        "scale": 0.2,
        "overrides": [{"match": "*.mlp.*", "scale": 0.3}, {"match": "x", "use": "a"}],
    }
    chosen = {"method": "ties", "boundary": {"choices": ["keep", "drop"]}}
    assert candidate(chosen, ("drop",)) == {"method": "ties", "boundary": "drop"}


@pytest.mark.parametrize(
    ("inner", "where", "what"),
    [
        ({"method": "ties"}, "merge.inner", "nothing to search"),
        ({"method": "tie", "density": RANGE}, "merge.inner", "there is no method"),
        ({"method": "ties", "density": {"search": [0.9, 0.1]}}, "merge.inner", "goes up"),
        ({"method": "ties", "density": {"search": [0.1, 0.9], "stp": 1}}, "merge.inner", "density.stp"),
        ({"method": "ties", "density": {"search": [0.0, 0.9]}}, "merge.inner.density.a", "greater than 0"),
        ({"method": "ties", "density": {"search": [0.1, 1.5]}}, "merge.inner.density.b", "less than or equal to 1"),
        ({"method": "ties", "dens": RANGE}, "merge.inner.dens", "unknown key"),
        ({"method": "ties", "density": {"a": RANGE}}, "merge.inner.density", "no value for model 'b'"),
        ({"method": "ties", "boundary": {"choices": ["keep", "none"]}}, "merge.inner.boundary", "is not one of"),
        ({"method": "linear", "weight": RANGE}, "base", "linear does not use a base"),
    ],
)
def test_ranges_that_cannot_be_are_refused_before_anything_is_opened(inner, where, what):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(inner))
    assert any(what in problem.what and problem.where.endswith(where) for problem in caught.value.problems), str(
        caught.value
    )


def test_overrides_belong_to_the_inner_method():
    with pytest.raises(RecipeError, match="settings of the inner method"):
        load_recipe(recipe({"method": "ties", "density": RANGE}, overrides=[{"match": "x", "use": "a"}]))

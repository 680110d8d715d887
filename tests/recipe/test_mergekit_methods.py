"""Every method of mergekit's has a counterpart, and its options become ours."""

import pytest

from mergetool.methods import registry
from mergetool.recipe.document import parse_document
from mergetool.recipe.mergekit import convert
from mergetool.recipe.mergekit.counterparts import METHODS

THEIRS = [
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]


def merge_of(method, parameters="{}", weight="{weight: 1}", base="base_model: base"):
    text = f"""\
merge_method: {method}
{base}
models:
  - {{model: a, parameters: {weight}}}
  - {{model: b, parameters: {weight}}}
parameters: {parameters}
"""
    return convert(parse_document(text, "x.yml")).data


def test_every_method_of_mergekit_is_here_under_its_name():
    assert sorted(METHODS) == THEIRS
    for name, target in METHODS.items():
        assert target.method == name.replace("_", "-")
        assert target.method in registry()


@pytest.mark.parametrize("name", THEIRS)
def test_what_mergekit_always_does_is_said_in_fields_that_the_method_has(name):
    target = METHODS[name]
    fields = set(registry()[target.method].model_fields)
    settled = set(target.settle({parameter.field: None for parameter in target.parameters.values()}))
    assert {*target.constants, *settled} <= fields


@pytest.mark.parametrize(
    ("parameters", "per"),
    [
        ("{}", None),
        ("{nuslerp_row_wise: true}", None),
        ("{nuslerp_flatten: true, nuslerp_row_wise: true}", "tensor"),
        ("{nuslerp_flatten: false}", "row"),
        ("{nuslerp_flatten: false, nuslerp_row_wise: true}", "column"),
        ("{nuslerp_flatten: false, nuslerp_row_wise: false}", "row"),
    ],
)
def test_the_axis_of_nuslerp_is_one_field(parameters, per):
    assert merge_of("nuslerp", parameters)["merge"].get("per") == per


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_a_base_model_may_be_missing_on_a_sphere(method):
    assert merge_of(method)["base"] == "base"
    assert "base" not in merge_of(method, base="")


def test_the_base_model_of_karcher_is_one_more_model():
    data = merge_of("karcher", "{max_iter: 3, tol: 1e-4}", "{}")
    assert list(data["models"].values()) == ["base", "a", "b"]
    assert data["merge"] == {"method": "karcher", "max_iter": 3, "tol": 1e-4}


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("della", "{}", {"density": 1.0, "epsilon": 0.15, "rescale": "l1"}),
        ("della_linear", "{rescale: false, density: 0.6}", {"density": 0.6, "epsilon": 0.15, "rescale": "none"}),
        ("breadcrumbs", "{density: 0.6}", {"density": 0.6, "gamma": 0.01, "boundary": "random"}),
        ("breadcrumbs_ties", "{rescale: true}", {"density": 1.0, "gamma": 0.01, "rescale": "l1", "boundary": "random"}),
    ],
)
def test_defaults_of_mergekit_that_are_not_ours_are_written_down(method, parameters, expected):
    found = merge_of(method, parameters)["merge"]
    assert {"method": method.replace("_", "-"), "weight": 1, **expected} == found


def test_sce_and_model_stock_say_what_mergekit_does():
    assert merge_of("sce", weight="{}")["merge"] == {"method": "sce", "density": 1.0, "negligible": 1e-6}
    assert merge_of("model_stock", "{filter_wise: true}", "{}")["merge"] == {
        "method": "model-stock",
        "clamp": False,
        "per": "row",
    }


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("nearswap", "{t: -1}", {"t": 0.0}),
        ("karcher", "{tol: 0, max_iter: -1}", {"tol": 1e-300, "max_iter": 0}),
        ("slerp", "{t: 1.5}", {"t": 1.5}),
        ("slerp", "{t: [-0.2, 1.5]}", {"t": {"gradient": [-0.2, 1.5]}}),
    ],
)
def test_numbers_that_mergekit_takes_are_ones_that_the_method_takes(method, parameters, expected):
    merge = merge_of(method, parameters, "{}", base=f"base_model: {'base' if method == 'karcher' else 'a'}")["merge"]
    assert merge.items() >= expected.items()
    registry()[merge["method"]].model_validate(merge)

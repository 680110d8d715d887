"""Slices of a mergekit recipe: every slice arrives with its own settings, and what lies outside follows the ends."""

import pytest

from mergetool.errors import RecipeError
from mergetool.recipe.document import parse_document
from mergetool.recipe.load import check_document
from mergetool.recipe.mergekit import convert
from mergetool.recipe.mergekit.renumbered import Renumbered


def converted(text):
    document = convert(parse_document(text, "x.yml"))
    check_document(document)
    return document.data


STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: org/a, layer_range: [0, 24]}]
  - sources: [{model: org/b, layer_range: [8, 32]}]
  - sources: [{model: org/a, layer_range: [30, 32]}]
"""


def test_a_stack_is_a_stack_of_copies():
    assert converted(STACK) == {
        "models": {"a": "org/a", "b": "org/b"},
        "slices": [{"a": [0, 24]}, {"b": [8, 32]}, {"a": [30, 32]}],
        "merge": {"method": "passthrough"},
    }


def test_a_scale_for_all_slices_is_one_number():
    assert converted(STACK + "parameters: {scale: 0.5}\n")["merge"] == {"method": "passthrough", "scale": 0.5}


def test_a_slice_with_a_scale_of_its_own_has_settings_and_so_do_the_ends():
    text = STACK.replace("[8, 32]}", "[8, 32], parameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}}")
    assert converted(text) == {
        "models": {"a": "org/a", "b": "org/b"},
        "slices": [
            {"a": [0, 24]},
            {
                "layers": {"b": [8, 32]},
                "set": {"scale": 1},
                "overrides": [{"match": "*o_proj*", "scale": 0}],
            },
            {"a": [30, 32]},
        ],
        "merge": {"method": "passthrough"},
    }
    text = STACK.replace("[0, 24]}", "[0, 24], parameters: {scale: 0.5}}")
    assert converted(text)["slices"][0] == {"layers": {"a": [0, 24]}, "set": {"scale": 0.5}, "outside": True}


SLICES = """\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {weight: 0.5}}
      - {model: b, layer_range: [4, 8], parameters: {weight: 0.5}}
  - sources:
      - {model: a, layer_range: [4, 8], parameters: {weight: 0.5}}
      - {model: c, layer_range: [4, 8], parameters: {weight: 0.5}}
"""


def test_what_all_slices_agree_on_is_said_once():
    data = converted(SLICES)
    assert data["slices"] == [{"a": [0, 4], "b": [4, 8]}, {"a": [4, 8], "c": [4, 8]}]
    assert data["merge"] == {"method": "linear", "weight": 0.5}


def test_models_that_are_elsewhere_have_no_say():
    data = converted(SLICES.replace("model: c, layer_range: [4, 8], parameters: {weight: 0.5}",
                                    "model: c, layer_range: [4, 8], parameters: {weight: 0.9}"))  # fmt: skip
    assert "set" not in data["slices"][1]
    assert data["merge"]["weight"] == {"a": 0.5, "b": 0.5, "c": 0.9}


def test_what_differs_is_each_slices_own():
    data = converted(SLICES.replace("a, layer_range: [4, 8], parameters: {weight: 0.5}",
                                    "a, layer_range: [4, 8], parameters: {weight: 0.1}"))  # fmt: skip
    assert data["slices"] == [
        {"layers": {"a": [0, 4], "b": [4, 8]}, "set": {"weight": 0.5}, "outside": True},
        {"layers": {"a": [4, 8], "c": [4, 8]}, "set": {"weight": {"a": 0.1, "b": 0.1, "c": 0.5}}, "outside": True},
    ]


def test_gradients_run_along_each_slice():
    data = converted(SLICES.replace("{weight: 0.5}", "{weight: [0.2, 0.8]}"))
    assert [each["set"] for each in data["slices"]] == [{"weight": {"gradient": [0.2, 0.8]}}] * 2
    assert data["merge"] == {"method": "linear"}


def test_a_gradient_along_one_layer_is_that_slices_own():
    one = "merge_method: linear\nslices:\n"
    one += "  - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [1, 2]}]\n"
    data = converted(one + "    parameters: {weight: [0, 1]}\n")
    assert data["slices"] == [
        {"layers": {"a": [0, 1], "b": [1, 2]}, "set": {"weight": {"gradient": [0, 1]}}, "outside": True}
    ]
    assert converted(one + "    parameters: {weight: 1}\n")["slices"] == [{"a": [0, 1], "b": [1, 2]}]


def test_a_sum_of_one_summand_that_is_not_divided_is_no_copy():
    one = "merge_method: linear\nparameters: {normalize: false, weight: 0.5}\nslices:\n"
    one += "  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources: [{model: b, layer_range: [0, 2]}]\n"
    assert [each["set"] for each in converted(one)["slices"]] == [{"normalize": False, "weight": 0.5}] * 2
    assert converted(one.replace("0.5", "1"))["slices"] == [{"a": [0, 2]}, {"b": [0, 2]}]


BASED = """\
merge_method: task_arithmetic
base_model: base
parameters: {weight: 1}
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: base, layer_range: [4, 8]}
  - sources:
      - {model: base, layer_range: [8, 12]}
"""


def test_the_base_of_a_slice_is_named_with_its_layers():
    assert converted(BASED) == {
        "base": "base",
        "models": {"a": "a"},
        "slices": [{"a": [0, 4], "base": [4, 8]}, {"base": [8, 12]}],
        "merge": {"method": "task-arithmetic", "weight": 1},
    }


def test_a_slice_may_have_a_base_of_its_own():
    text = (
        BASED
        + """\
  - base_model: a
    sources:
      - {model: a, layer_range: [0, 4]}
      - {model: base, layer_range: [0, 4]}
      - {model: c, layer_range: [0, 4]}
"""
    )
    data = converted(text)
    assert data["models"] == {"a": "a", "base-model": "base", "c": "c"}
    assert data["slices"][2] == {"layers": {"base-model": [0, 4], "c": [0, 4]}, "base": {"a": [0, 4]}}


def test_slerp_begins_with_the_base_of_each_slice():
    text = """\
merge_method: slerp
base_model: a
parameters: {t: 0.25}
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
  - sources: [{model: a, layer_range: [4, 8]}, {model: b, layer_range: [4, 8]}]
    base_model: b
"""
    assert converted(text)["slices"] == [{"a": [0, 4], "b": [0, 4]}, {"b": [4, 8], "a": [4, 8]}]


def test_filters_of_a_slice_stay_in_it():
    text = SLICES.replace("{weight: 0.5}", "{weight: [{filter: mlp, value: 0.1}, {value: 0.5}]}", 2)
    assert converted(text)["slices"] == [
        {
            "layers": {"a": [0, 4], "b": [4, 8]},
            "overrides": [{"match": "*mlp*", "weight": 0.1}],
            "outside": True,
        },
        {"a": [4, 8], "c": [4, 8]},
    ]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (STACK.replace("[0, 24]", "[24, 0]"), "3", "[24, 0] holds no layer: the end is not part of it"),
        (STACK.replace("[0, 24]", "24"), "3", "expected the first layer and the end, found 24"),
        (STACK.replace("{model: org/a, layer_range: [0, 24]}",
         "{model: org/a, layer_range: [0, 4]}, {model: org/b, layer_range: [0, 4]}"), "3", "passthrough takes 1 model"),
        (BASED.replace("      - {model: base, layer_range: [4, 8]}\n", ""), "5", "the base_model base is none of"),
        (SLICES.replace("[4, 8]", "[4, 9]", 1), "3", "layers are merged one by one, but there are 4 of a, 5 of b"),
    ],
)  # fmt: skip
def test_slices_that_cannot_be_are_refused_at_their_lines(text, line, what):
    with pytest.raises(RecipeError) as raised:
        converted(text)
    (problem,) = raised.value.problems
    assert (problem.where.split(":")[1], problem.what[: len(what)]) == (line, what)


@pytest.mark.parametrize(
    ("text", "span", "place", "found"),
    [
        ("mlp", (4, 8), 0, ["mlp"]),
        ("model.layers.5.", (4, 8), 4, ["model.layers.5."]),
        ("model.layers.5.", (4, 8), 0, ["model.layers.1."]),
        ("layers.5.mlp", (4, 8), 10, ["layers.11.mlp"]),
        ("h.3.", (4, 8), 10, []),
        ("layers.1", (8, 12), 0, ["layers.2.", "layers.3."]),
        ("5.mlp", (4, 18), 0, [".1.mlp", ".11.mlp"]),
        ("experts.5.w1", (4, 8), 0, ["experts.5.w1"]),
    ],
)
def test_filters_with_numbers_of_layers_follow_these_layers(text, span, place, found):
    assert Renumbered(span[0], place, span[1] - span[0]).texts(text) == found


def test_filters_of_models_name_their_layers_and_those_of_all_the_results():
    text = """\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
parameters: {t: [{filter: layers.1., value: 0.1}, {value: 0.5}]}
"""
    assert converted(text)["merge"]["overrides"] == [{"match": "*layers.1.*", "t": 0.1}]
    text = text.replace("slerp", "task_arithmetic").replace("t: [", "weight: [").replace("layers.1.", "layers.3.")
    assert converted(text)["merge"]["overrides"] == [{"match": "*layers.1.*", "weight": 0.1}]


@pytest.mark.parametrize("span", ["[0, 0]", "[8, 4]"])
def test_a_slice_without_a_layer_is_told(span):
    text = f"merge_method: passthrough\nslices:\n  - sources: [{{model: a, layer_range: {span}}}]\n"
    with pytest.raises(RecipeError, match="holds no layer: the end is not part of it") as caught:
        convert(parse_document(text, "x.yml"))
    assert "leave the slice out" in caught.value.fix

"""mergekit recipes, converted: every setting arrives, and what cannot arrive is refused at its line."""

import json

import pytest

from mergetool.errors import RecipeError
from mergetool.recipe import load_recipe
from mergetool.recipe.document import parse_document
from mergetool.recipe.load import check_document
from mergetool.recipe.mergekit import convert, is_mergekit


def converted(text):
    return convert(parse_document(text, "x.yml")).data


def problems(text):
    with pytest.raises(RecipeError) as raised:
        convert(parse_document(text, "x.yml"))
    return {
        (problem.where.partition(" ")[0].split(":")[1], problem.what): problem.fix for problem in raised.value.problems
    }


LINEAR = """\
merge_method: linear
models:
  - model: org/first
    parameters: {weight: 0.3}
  - model: ./second
    parameters: {weight: 0.7}
"""


def test_merge_method_is_the_sign_of_a_mergekit_recipe():
    assert is_mergekit({"merge_method": "linear"})
    assert not is_mergekit({"merge": {"method": "linear"}})
    assert not is_mergekit(["merge_method"])


def test_models_get_names_and_weights_go_by_name():
    assert converted(LINEAR) == {
        "models": {"first": "org/first", "second": "./second"},
        "merge": {"method": "linear", "weight": {"first": 0.3, "second": 0.7}},
    }


def test_equal_names_are_numbered_and_reserved_ones_avoided():
    text = (
        LINEAR.replace("org/first", "x/base").replace("./second", "y/base")
        + "  - {model: base, parameters: {weight: 1}}\n"
    )
    assert list(converted(text)["models"]) == ["base-model", "base-model-2", "base-model-3"]


def test_a_weight_for_all_models_is_one_number():
    data = converted("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n")
    assert data["merge"] == {"method": "linear", "weight": 0.5}


def test_a_list_is_a_gradient_and_a_list_of_one_a_number():
    data = converted(LINEAR.replace("0.3", "[0, 1]").replace("0.7", "[0.7]"))
    assert data["merge"]["weight"] == {"first": {"gradient": [0, 1]}, "second": 0.7}


def test_filters_become_overrides_and_fall_through_to_the_next_scope():
    text = """\
merge_method: linear
models:
  - model: a
    parameters: {weight: [{filter: mlp, value: 0.8}]}
  - model: b
parameters: {weight: [{filter: bias, value: [0, 1]}, {value: 0.5}]}
"""
    assert converted(text)["merge"] == {
        "method": "linear",
        "weight": 0.5,
        "overrides": [
            {"match": "*bias*mlp*", "weight": {"a": 0.8, "b": {"gradient": [0, 1]}}},
            {"match": "*mlp*bias*", "weight": {"a": 0.8, "b": {"gradient": [0, 1]}}},
            {"match": "*mlp*", "weight": {"a": 0.8, "b": 0.5}},
            {"match": "*bias*", "weight": {"gradient": [0, 1]}},
        ],
    }


def test_the_base_of_a_linear_merge_is_one_more_model_and_leads():
    data = converted(LINEAR + "base_model: ./second\n")
    assert "base" not in data
    assert list(data["models"]) == ["second", "first"]


def test_a_parameter_of_the_only_model_is_ours_for_all():
    data = converted("merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 0.5}}]\n")
    assert data["merge"] == {"method": "passthrough", "scale": 0.5}


DARE = """\
merge_method: dare_ties
base_model: base
models:
  - model: base
    parameters: {weight: 9}
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1, density: 0.5}}
parameters: {int8_mask: true, lambda: 0.7}
"""


def test_the_common_ancestor_is_not_merged():
    data = converted(DARE)
    assert data["base"] == "base"
    assert data["models"] == {"a": "a", "b": "b"}


def test_defaults_of_mergekit_that_are_not_ours_are_written_down():
    assert converted(DARE)["merge"] == {
        "method": "dare-ties",
        "weight": 1,
        "density": {"a": 1.0, "b": 0.5},
        "rescale": "l1",
        "scale": 0.7,
    }


def test_ties_keeps_no_more_than_the_density_as_mergekit_does():
    data = converted(DARE.replace("dare_ties", "ties"))
    assert data["merge"] == {
        "method": "ties",
        "boundary": "random",
        "weight": 1,
        "density": {"a": 1.0, "b": 0.5},
        "scale": 0.7,
    }


@pytest.mark.parametrize(("theirs", "ours"), [("true", "l1"), ("false", "none")])
def test_rescale_has_other_words(theirs, ours):
    assert converted(DARE.replace("int8_mask: true", f"rescale: {theirs}"))["merge"]["rescale"] == ours


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("dtype: bfloat16", {"output": {"dtype": "bfloat16"}}),
        ("dtype: torch.float32\nout_dtype: float16", {"output": {"dtype": "float16"}}),
        ("dtype: float64\nout_dtype: float32", {"compute": {"dtype": "float64"}, "output": {"dtype": "float32"}}),
        ("tokenizer_source: ./second", {"tokenizer": {"source": "second"}}),
        ("tokenizer_source: base\nbase_model: org/first", {"tokenizer": {"source": "first"}}),
    ],
)
def test_storage_and_tokenizer(lines, expected):
    data = converted(LINEAR + lines + "\n")
    assert {key: data[key] for key in data if key not in ("models", "merge")} == expected


def test_a_slice_that_is_the_whole_model_is_taken_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    text = """\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 3]}
      - {model: b, layer_range: [0, 3], parameters: {weight: 2}}
    parameters: {weight: 1}
"""
    assert converted(text)["merge"] == {"method": "linear", "weight": {"a": 1, "b": 2}}
    assert problems(text.replace("b, layer_range: [0, 3]", "b, layer_range: [1, 3]")) == {
        ("5", "layer_range is [1, 3], the layers of b are [0, 3]"): "layers cannot be cut or stacked; take all of them"
    }


def test_paths_are_relative_to_the_current_folder_not_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.yml").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("elsewhere/x.yml", ["merge.weight.first=0.5"])
    assert recipe.path_of(recipe.models["second"].source) == tmp_path / "second"
    assert recipe.method.weight == {"first": 0.5, "second": 0.7}


def test_errors_of_our_checks_point_to_the_lines_of_the_original():
    document = convert(parse_document(LINEAR.replace("0.7", "heavy"), "x.yml"))
    with pytest.raises(RecipeError, match=r"x.yml:6:18 merge.weight.second: expected a number"):
        check_document(document)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (LINEAR + "normalize: true\n", "7", "unknown key 'normalize'"),
        (LINEAR + "modules: {}\n", "7", "unknown key 'modules'"),
        (LINEAR + "parameters: {normalise: true}\n", "7", "parameter 'normalise' of mergekit's linear"),
        (LINEAR + "tokenizer_source: union\n", "7", "tokenizer_source 'union' is not supported"),
        (LINEAR + "dtype: int64\n", "7", "results cannot be stored as int64"),
        (LINEAR + "base_model: [a]\n", "7", "expected a path or model id"),
        (LINEAR + "parameters: 3\n", "7", "expected a mapping"),
        (LINEAR.replace("./second", "org/first"), "5", "org/first is listed twice"),
        (LINEAR.replace("{weight: 0.7}", "{}"), "6", "weight is required"),
        (LINEAR.replace("0.7", "[{filter: mlp, value: 1}]"), "6", "weight is required for the names"),
        (LINEAR.replace("0.7", "[a, b]"), "6", "expected numbers from the first layer to the last, found ['a', 'b']"),
        (LINEAR.replace("0.7", "[]"), "6", "expected numbers from the first layer to the last, found []"),
        (LINEAR.replace("0.7", "[{filtre: mlp, value: 1}]"), "6", "unknown key 'filtre'"),
        (LINEAR.replace("weight: 0.7", "t: 0.7, weight: 1"), "6", "parameter 't' of mergekit's linear"),
        (LINEAR.replace("model: ./second", "modle: ./second"), "5", "expected `model`, a path or model id"),
        (LINEAR.replace("linear", "frankenmerge"), "1", "mergekit's method 'frankenmerge' has no counterpart here"),
        ("merge_method: linear\n", "1", "one of `models` and `slices` is needed"),
        ("merge_method: linear\nslices: [{sources: []}, {sources: []}]\n", "2", "slices that cut or stack layers"),
        ("merge_method: linear\nmodels: {a: b}\n", "2", "expected a list of models"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_at_its_line(text, line, what):
    found = problems(text)
    assert any(at == line and problem.startswith(what) for at, problem in found)
    assert all(fix for fix in found.values())


def test_all_problems_are_told_at_once():
    assert len(problems(LINEAR + "dtype: int8\ntokenizer_source: union\nparameters: {wieght: 1}\n")) == 3

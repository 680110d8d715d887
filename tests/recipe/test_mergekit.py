"""mergekit recipes, converted: every setting arrives, and what cannot arrive is refused at its line."""

import pytest
import yaml

from mergetool.errors import RecipeError
from mergetool.recipe import load_recipe
from mergetool.recipe.document import parse_document, read_documents
from mergetool.recipe.load import check_document, imported_text
from mergetool.recipe.mergekit import convert, is_mergekit
from mergetool.recipe.mergekit.counterparts import METHODS


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
        ("tokenizer_source: base\nbase_model: org/first", {"tokenizer": {"source": "first", "prefer": "first"}}),
    ],
)
def test_storage_and_tokenizer(lines, expected):
    data = converted(LINEAR + lines + "\n")
    assert {key: data[key] for key in data if key not in ("models", "merge")} == expected


def test_one_slice_of_all_models_needs_neither_files_nor_network():
    text = """\
merge_method: linear
slices:
  - sources:
      - {model: org/a, layer_range: [0, 32]}
      - {model: org/b, layer_range: [0, 32], parameters: {weight: 2}}
    parameters: {weight: 1}
"""
    assert converted(text) == {
        "models": {"a": "org/a", "b": "org/b"},
        "slices": [{"a": [0, 32], "b": [0, 32]}],
        "merge": {"method": "linear", "weight": {"a": 1, "b": 2}},
    }


SLICE = """\
merge_method: slerp
base_model: a
parameters: {t: 0.5}
slices:
  - sources:
      - {model: a, layer_range: [0, 32]}
      - {model: b, layer_range: [0, 32]}
"""


def test_a_slice_of_slerp_begins_with_its_base():
    assert converted(SLICE)["slices"] == [{"a": [0, 32], "b": [0, 32]}]
    assert converted(SLICE.replace("base_model: a", "base_model: b"))["slices"] == [{"b": [0, 32], "a": [0, 32]}]


@pytest.mark.parametrize(
    ("text", "what", "fix", "mended"),
    [
        (
            SLICE.replace("base_model: a", "base_model: c"),
            ("5", "the base_model c is none of the models of this slice, which are a, b"),
            "write base_model: a",
            SLICE,
        ),
        (
            "merge_method: slerp\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n",
            ("3", "slerp takes 2 models, and here are c, a, b"),
            "leave 1 out, or write base_model: a",
            "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n",
        ),
        (
            "merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n",
            ("1", "slerp needs a base model"),
            "add base_model: a",
            "merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\nbase_model: a\n",
        ),
    ],
)
def test_a_base_that_does_not_fit_is_refused_with_the_one_that_does(text, what, fix, mended):
    assert problems(text) == {what: fix}
    check_document(convert(parse_document(mended, "x.yml")))


def test_paths_are_relative_to_the_current_folder_not_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.yml").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("elsewhere/x.yml", ["merge.weight.first=0.5"])
    assert recipe.path_of(recipe.models["second"].source) == tmp_path / "second"
    assert recipe.method.weight == {"first": 0.5, "second": 0.7}


def test_errors_of_our_checks_point_to_the_lines_of_the_original():
    document = convert(parse_document(LINEAR.replace("0.7", ".inf"), "x.yml"))
    with pytest.raises(RecipeError, match=r"x.yml:6:18 merge.weight.second: inf is not a finite number"):
        check_document(document)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (LINEAR + "tokenizer_source: union\ntokenizer: {source: base}\n", "8", "`tokenizer` and `tokenizer_source`"),
        (LINEAR + "tokenizer: {tokens: {a: {source: org/third}}}\n", "7", "org/third is none of the models"),
        (LINEAR + "tokenizer: {tokens: {a: {source: {kind: model_token, model: ./second}}}}\n", "7", "one of `token`"),
        (LINEAR + "tokenizer: {tokens: {a: ./second}}\n", "7", "expected a mapping, found './second'"),
        (LINEAR + "tokenizer: {pad_to_multiple_of: much}\n", "7", "expected a number, found 'much'"),
        (LINEAR + "chat_template: chatlm\n", "7", "there is no chat template 'chatlm'"),
        (LINEAR + "dtype: int64\n", "7", "results cannot be stored as int64"),
        (LINEAR + "base_model: [a]\n", "7", "expected a path or model id, found ['a']"),
        (LINEAR + "parameters: 3\n", "7", "expected a mapping"),
        (LINEAR.replace("./second", "org/first"), "5", "org/first is listed twice"),
        (LINEAR.replace("{weight: 0.7}", "{}"), "6", "weight is required"),
        (LINEAR.replace("0.7", "[{filter: mlp, value: 1}]"), "6", "weight is required for the names"),
        (LINEAR.replace("0.7", "[a, b]"), "6", "expected a number, found 'a'"),
        (LINEAR.replace("0.7", "[]"), "6", "weight is required"),
        (LINEAR.replace("0.7", "[{filter: mlp}]"), "6", "a line of filters needs a value"),
        (LINEAR + "parameters: {normalize: [true, false]}\n", "7", "expected numbers from the first layer to the last"),
        (LINEAR + "parameters: {normalize: 2}\n", "7", "expected true or false, found 2"),
        (LINEAR.replace("model: ./second", "modle: ./second"), "5", "expected `model`, a path or model id"),
        (LINEAR.replace("linear", "frankenmerge"), "1", "mergekit has no method 'frankenmerge' (a fork of it may)"),
        (LINEAR.partition("\n")[2], "1", "`merge_method` is required"),
        ("merge_method: linear\n", "1", "one of `models`, `slices`, `modules` is needed"),
        ("merge_method: linear\nslices: [{sources: []}]\n", "2", "expected a list of models"),
        ("merge_method: linear\nslices: [{sources: [{model: a}]}]\n", "2", "`layer_range` is required"),
        ("merge_method: linear\nmodules: {a: {models: []}, b: {models: [1]}}\n", "2", "the modules a, b are merged by"),
        ("merge_method: linear\nmodels: {a: b}\n", "2", "expected a list of models"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_at_its_line(text, line, what):
    found = problems(text)
    assert any(at == line and problem.startswith(what) for at, problem in found)
    assert all(fix for fix in found.values())


def test_all_problems_are_told_at_once():
    assert len(problems(LINEAR.replace("0.7", "heavy") + "dtype: int8\nchat_template: none\n")) == 3


def test_a_method_that_is_absent_hides_no_other_problem():
    text = "merge_method: cabs\ndtype: fp16\nmodels: [{model: a}, {model: a}]\n"
    assert {what for _, what in problems(text)} == {
        "mergekit has no method 'cabs' (a fork of it may)",
        "results cannot be stored as fp16",
        "a is listed twice",
    }


def warnings(text):
    """What is told of a recipe that is converted, by line; the words behind the place."""
    told = convert(parse_document(text, "x.yml")).warnings
    return {(each.split(":")[1], each.split(": ", 1)[0].split(" ")[1]): each.split(": ", 1)[1] for each in told}


NO_KEY = "mergekit knows no such key here, so it has no effect"


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        (LINEAR + "normalize: true\n", ("7", "normalize"), f"{NO_KEY}; write it inside `parameters`"),
        (LINEAR + "dype: float32\n", ("7", "dype"), f"{NO_KEY}; did you mean 'dtype'?"),
        (LINEAR + "parmeters: {normalize: true}\n", ("7", "parmeters"), f"{NO_KEY}; did you mean 'parameters'?"),
        (LINEAR + "out_path: x\n", ("7", "out_path"), NO_KEY),
        (LINEAR.replace("org/first", "org/first\n    revision: v1"), ("4", "models.0.revision"),
         f"{NO_KEY}; write it behind the model: model: PATH@REVISION"),
        (LINEAR.replace("org/first", "org/first\n    weight: 1"), ("4", "models.0.weight"),
         f"{NO_KEY}; write it inside `parameters`"),
        (LINEAR + "parameters: {normalise: true}\n", ("7", "parameters.normalise"),
         "mergekit's linear has no such parameter, so it has no effect; did you mean 'normalize'?"),
        (LINEAR.replace("weight: 0.7", "t: 0.7, weight: 1"), ("6", "models.1.parameters.t"),
         "mergekit's linear has no such parameter, so it has no effect"),
        (LINEAR.replace("weight: 0.7", "normalize: no, weight: 1"), ("6", "models.1.parameters.normalize"),
         "it has no effect here: normalize is one number for all models; write it under `parameters` of the recipe"),
        (LINEAR.replace("0.7", "[{filtre: mlp, value: 1}]"), ("6", "models.1.parameters.weight.0.filtre"),
         f"{NO_KEY}; did you mean 'filter'?"),
    ],
)  # fmt: skip
def test_what_mergekit_passes_over_is_passed_over_and_told(text, place, said):
    assert warnings(text)[place] == said
    assert convert(parse_document(text, "x.yml")).data["merge"]["method"] == "linear"


def test_parameters_of_the_common_ancestor_are_told_to_be_idle():
    assert warnings(DARE) == {
        ("5", "models.0.parameters.weight"): "the base_model takes no parameters, so it has no effect"
    }


def test_a_name_and_parameters_that_change_nothing_are_not_worth_a_word():
    assert warnings("name: mine\n" + LINEAR) == {}


def test_warnings_go_with_the_checked_recipe(tmp_path):
    (tmp_path / "x.yml").write_text(LINEAR + "dype: float32\n")
    (warning,) = load_recipe(tmp_path / "x.yml").warnings
    assert warning == f"{tmp_path}/x.yml:7:1 dype: {NO_KEY}; did you mean 'dtype'?"


@pytest.mark.parametrize(
    ("written", "meant"),
    [('"0.5"', 0.5), ("1e-1", 0.1), ("true", 1), ("yes", 1), ("[0.5]", 0.5), ('["0", 1e-1]', {"gradient": [0.0, 0.1]}),
     ("{value: 0.5}", 0.5), ("[{filter: null, value: 0.5}]", 0.5), ("[{filter: '*', value: 0.5}]", 0.5)],
)  # fmt: skip
def test_numbers_are_taken_as_mergekit_takes_them(written, meant):
    assert converted(LINEAR.replace("0.7", written))["merge"]["weight"]["second"] == meant


@pytest.mark.parametrize("written", ["false", "no", "off", "'False'", "0", "0.0", '"no"', "[false]"])
def test_switches_are_taken_as_mergekit_takes_them(written):
    assert converted(LINEAR + f"parameters: {{normalize: {written}}}\n")["merge"]["normalize"] is False


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{model: {path: org/x}}", "org/x"),
        ("{model: org/x}", "org/x"),
        ("{model: {path: org/x, revision: v1}}", "org/x@v1"),
        ("org/x@v1+org/lora@v2", {"source": "org/x@v1", "adapters": ["org/lora@v2"]}),
        ("{model: {path: org/x}, lora: {path: org/lora}}", {"source": "org/x", "adapters": ["org/lora"]}),
    ],
)
def test_a_model_in_every_form_that_mergekit_takes(written, meant):
    assert next(iter(converted(LINEAR.replace("org/first", written))["models"].values())) == meant
    based = DARE.replace("base_model: base", f"base_model: {written}").replace("- model: base", f"- model: {written}")
    assert converted(based)["base"] == meant


def test_the_only_module_is_the_model():
    listed = LINEAR.partition("models:")[2]
    inside = "modules:\n  default:\n    parameters: {normalize: false}\n    models:" + listed.replace("\n", "\n    ")
    assert converted("merge_method: linear\n" + inside) == converted(LINEAR + "parameters: {normalize: false}\n")


def test_imported_paths_are_right_from_the_folder_of_the_new_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "x.yml").write_text(DARE.replace("model: a", "model: ./a+there").replace("model: b", "model: org/b"))
    data = yaml.safe_load(imported_text(tmp_path / "x.yml", tmp_path / "sub" / "deeper")[0])
    assert data["models"] == {"a": {"source": "../../a", "adapters": ["../../there"]}, "b": "org/b"}


def test_the_folder_of_a_tokenizer_is_a_path_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, seen in (("./words", "../words"), ("~/words", "~/words"), ("./second", "second")):
        (tmp_path / "x.yml").write_text(LINEAR + f"tokenizer_source: {source}\n")
        assert yaml.safe_load(imported_text(tmp_path / "x.yml", tmp_path / "sub")[0])["tokenizer"] == {"source": seen}


@pytest.mark.parametrize(
    ("dtype", "fix"),
    [("bf16", "write dtype: bfloat16"), ("fp16", "write dtype: float16"), ("int8", "write dtype: bfloat16"),
     ("float64", "write out_dtype: float32")],
)  # fmt: skip
def test_a_dtype_that_cannot_be_is_refused_with_the_one_that_was_meant(dtype, fix):
    assert problems(LINEAR + f"dtype: {dtype}\n") == {("7", f"results cannot be stored as {dtype}"): fix}
    convert(parse_document(LINEAR + f"dtype: {dtype}\n{fix.removeprefix('write ')}\n", "x.yml"))


def test_import_writes_nothing_that_would_be_refused(tmp_path):
    (tmp_path / "x.yml").write_text(LINEAR.replace("0.3", ".inf"))
    with pytest.raises(RecipeError, match=r"x.yml:4:18 merge.weight.first: inf is not a finite number"):
        imported_text(tmp_path / "x.yml", tmp_path)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("tokenizer_source: union", {"source": "union"}),
        ("tokenizer_source: base", {"source": "first"}),
        ("tokenizer_source: ./second", {"source": "second"}),
        ("tokenizer_source: {model: {path: ./second}}", {"source": "second"}),
        ("tokenizer_source: org/third@v1", {"source": "org/third@v1"}),
        ("tokenizer_source: third", {"source": "./third"}),
        ("tokenizer: {}", {"source": "union"}),
        ("tokenizer: {source: base, pad_to_multiple_of: 64}", {"source": "first", "pad_to": 64}),
        (
            "tokenizer: {tokens: {a: {source: org/first}, b: {source: ./second, force: yes}, c: {}}}",
            {
                "source": "union",
                "tokens": {"a": "first", "b": {"from": "second", "force": True}, "c": {}},
                "missing": "zero",
            },
        ),
        (
            "tokenizer: {tokens: {a: {source: {kind: zero}}, "
            "b: {source: {kind: model_token, model: ./second, token: x}},"
            " c: {source: {kind: model_token, model: ./second, token_id: 3}, force: true}}}",
            {
                "source": "union",
                "tokens": {
                    "a": {"zero": True},
                    "b": {"from": "second", "token": "x"},
                    "c": {"from": "second", "id": 3, "force": True},
                },
                "missing": "zero",
            },
        ),
    ],
)
def test_tokens_are_asked_for_in_our_words(theirs, ours):
    document = convert(parse_document(LINEAR + theirs + "\n", "x.yml"))
    assert document.data["tokenizer"] == ours
    check_document(document)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("auto", "auto"), ("chatml", "chatml"), ("'{{ messages[0].content }}'", {"text": "{{ messages[0].content }}"})],
)
def test_a_chat_template_is_a_name_or_a_text(theirs, ours):
    document = convert(parse_document(LINEAR + f"chat_template: {theirs}\n", "x.yml"))
    assert document.data["chat_template"] == ours
    check_document(document)


def test_models_are_not_called_by_words_that_mean_something_else():
    text = LINEAR.replace("org/first", "org/union").replace("./second", "org/chatml")
    assert list(converted(text)["models"]) == ["union-model", "chatml-model"]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("dare-ties", "did you mean 'dare_ties'?"),
        ("Task_Arithmetc", "did you mean 'task_arithmetic'?"),
        ("iso_c", "there is one of our own: mergetool init iso-c -o recipe.yaml"),
        ("rcz", f"choose one of {', '.join(METHODS)}, or one of our own: mergetool methods"),
    ],
)
def test_a_method_that_mergekit_lacks_is_told_from_a_slip(name, fix):
    assert problems(LINEAR.replace("linear", name)) == {
        ("1", f"mergekit has no method {name!r} (a fork of it may)"): fix
    }


@pytest.mark.parametrize(
    ("method", "normalize", "merge"),
    [
        ("ties", True, {"weight": {"a": 0.0, "b": 1}, "density": {"a": 1.0, "b": 0.5}}),
        ("dare_linear", False, {"weight": {"a": 0.0, "b": 1}, "density": {"a": 1.0, "b": 0.5}}),
        ("dare_linear", True, {"weight": 1, "density": {"a": 1e-12, "b": 0.5}}),
    ],
)
def test_a_density_of_zero_keeps_nothing_of_a_model(method, normalize, merge):
    text = f"""\
merge_method: {method}
base_model: base
models:
  - {{model: a, parameters: {{weight: 1, density: 0}}}}
  - {{model: b, parameters: {{weight: 1, density: 0.5}}}}
parameters: {{normalize: {normalize}}}
"""
    document = convert(parse_document(text, "x.yml"))
    check_document(document)
    assert {key: document.data["merge"][key] for key in merge} == merge


def test_a_density_of_zero_where_a_filter_matches_is_said_there():
    weight = "parameters: {weight: 1, density: [{filter: mlp, value: 0}, {value: 2}]}"
    text = f"merge_method: ties\nbase_model: base\nmodels: [{{model: a, {weight}}}, {{model: b}}]\n{weight}\n"
    merge = converted(text)["merge"]
    assert (merge["weight"], merge["density"]) == (1, 1.0)
    assert merge["overrides"] == [{"match": "*mlp*", "weight": 0.0, "density": 1.0}]


@pytest.mark.parametrize(("share", "density"), [(1.5, 1.0), (0, 1e-12), (0.5, 0.5)])
def test_a_share_of_all_entries_is_kept_within_its_limits(share, density):
    text = "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    document = convert(parse_document(text + f"parameters: {{select_topk: {share}}}\n", "x.yml"))
    check_document(document)
    assert document.data["merge"]["density"] == density


def test_a_gradient_of_densities_may_end_at_nothing():
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 1, density: [1, 0]}\n"
    document = convert(parse_document(text, "x.yml"))
    check_document(document)
    assert document.data["merge"]["density"] == {"gradient": [1.0, 1e-12]}


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        (
            "merge_method: della_linear\nbase_model: base\n"
            "models: [{model: a, parameters: {weight: 1, density: 0.9}}]\n",
            "density 0.9 and epsilon 0.15 make chances from 0.75 to 1.05, not 0 to 1",
            "write epsilon: 0.1, or less",
        ),
        (
            LINEAR.replace("0.3", "-0.7"),
            "the weights (-0.7, 0.7) add up to 0, so their average does not exist",
            "add parameters: {normalize: false}",
        ),
        (
            LINEAR.replace("0.3", "[{filter: mlp, value: 1}, {value: [0.2, -0.7]}]"),
            "the weights (-0.7, 0.7) add up to 0, so their average does not exist",
            "add parameters: {normalize: false}",
        ),
    ],
)
def test_numbers_that_cannot_work_together_are_told_before_any_model_is_opened(text, what, fix):
    assert problems(text) == {("1", what): fix}
    mended = text + (fix.partition(" ")[2] if "normalize" in fix else "parameters: {epsilon: 0.1}") + "\n"
    convert(parse_document(mended, "x.yml"))


def test_keys_given_twice_and_merge_keys_are_read_as_mergekit_reads_them(tmp_path):
    text = LINEAR.replace("{weight: 0.3}", "&p {weight: 0.3}").replace("{weight: 0.7}", "{<<: *p}")
    (tmp_path / "x.yml").write_text(text + "dtype: float32\ndtype: bfloat16\n")
    recipe = load_recipe(tmp_path / "x.yml")
    assert recipe.method.weight == 0.3
    assert recipe.output.dtype == "bfloat16"
    twice = "x.yml:8:1 dtype: key 'dtype' is given twice (first on line 7): the last one counts"
    assert [each.replace(f"{tmp_path}/", "") for each in recipe.warnings] == [twice]


def test_text_that_looks_like_something_else_is_quoted(tmp_path):
    (tmp_path / "x.yml").write_text(LINEAR.replace("org/first", "'1e5'") + "tokenizer: {tokens: {1e3: {}, 0o7: {}}}\n")
    (tmp_path / "ours.yaml").write_text(imported_text(tmp_path / "x.yml", tmp_path)[0])
    written = load_recipe(tmp_path / "ours.yaml")
    assert written.models["1e5"].source == "1e5"
    assert list(written.tokenizer.tokens) == ["1e3", "0o7"]


def test_modules_that_are_alike_are_the_model():
    listed = LINEAR.partition("models:")[2].replace("\n", "\n    ")
    both = f"modules:\n  text_decoder:\n    models:{listed}\n  vision_tower:\n    models:{listed}\n"
    assert converted("merge_method: linear\n" + both) == converted(LINEAR)


def test_models_of_any_system_are_called_by_the_end_of_their_path():
    text = LINEAR.replace("org/first", "'C:\\models\\first-12B'").replace("./second", "D:/more/second/")
    assert list(converted(text)["models"]) == ["first-12B", "second"]


def test_a_parameter_that_stands_one_level_too_high_is_asked_for_where_it_belongs():
    text = LINEAR.replace("    parameters: {weight: 0.7}", "    weight: 0.7")
    fix = "write it inside `parameters`: parameters: {weight: 0.7}"
    assert problems(text) == {("5", "weight is required"): fix}
    assert converted(text.replace("weight: 0.7", "parameters: {weight: 0.7}")) == converted(LINEAR)


def test_the_base_of_a_vocabulary_is_preferred_where_it_is_merged_too():
    text = LINEAR + "base_model: ./second\ntokenizer_source: union\n"
    assert converted(text)["tokenizer"] == {"source": "union", "prefer": "second"}
    assert converted(DARE + "tokenizer_source: union\n")["tokenizer"] == {"source": "union"}


def test_parameters_of_another_method_are_told_where_one_is_missing():
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: [0, 1]}\n"
    fix = "add weight: VALUE; mergekit's task_arithmetic has no parameter t"
    assert problems(text) == {("3", "weight is required"): fix}


@pytest.mark.parametrize("number", ["nan", ".nan", "NaN"])
def test_what_is_no_number_is_no_weight(number):
    found = problems(LINEAR.replace("0.3", number))
    assert [(line, what.partition(",")[0]) for line, what in found] == [("4", "expected a number")]


def test_a_share_of_outliers_beyond_all_is_all():
    weight = "parameters: {weight: 1, density: 0.5, gamma: 1.5}"
    merge = converted(f"merge_method: breadcrumbs\nbase_model: base\nmodels: [{{model: a, {weight}}}]\n")["merge"]
    assert merge["gamma"] == 1.0


def test_the_base_alone_is_no_model_to_merge():
    found = problems("merge_method: ties\nbase_model: base\nmodels: [{model: base}]\n")
    assert found == {("3", "ties takes at least 1 model, and here are none"): "add one"}


def test_a_folder_that_is_here_has_no_revisions(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path)
    text = LINEAR.replace("org/first", "./first@v1+org/lora@v2").replace("./second", "org/second@v3")
    document = convert(parse_document(text, "x.yml"))
    assert document.data["models"] == {
        "first": {"source": "./first", "adapters": ["org/lora@v2"]},
        "second": "org/second@v3",
    }
    assert document.warnings == ["x.yml:3:5 models.0: ./first is a folder here, so the revision v1 has no effect"]


FORMS = {
    "lines end as on Windows": LINEAR.replace("\n", "\r\n"),
    "lines end as on old machines": LINEAR.replace("\n", "\r"),
    "a mark of the byte order": "\ufeff" + LINEAR,
    "comments and markers": f"%YAML 1.1\n# top\n---\n{LINEAR}\n# end\n...\n",
    "merge keys": "x: &x {weight: 0.3}\n" + LINEAR.replace("{weight: 0.3}", "{<<: *x}"),
    "a merge key that is overruled": "x: &x {weight: 9}\n" + LINEAR.replace("{weight: 0.3}", "{<<: [*x], weight: 0.3}"),
    "a key given twice": "merge_method: slerp\n" + LINEAR,
    "folded text": LINEAR.replace("linear", ">-\n  linear").replace("org/first", "|-\n      org/first"),
    "complex keys": LINEAR.replace("merge_method: linear", "? merge_method\n: linear"),
    "numbers as text": LINEAR.replace("0.3", "'3e-1'").replace("0.7", "+.7"),
    "nothing where something may stand": LINEAR
    + "parameters:\ntokenizer_source: null\nbase_model:\ndtype: ~\nslices: []\n",
    "a value in a mapping": LINEAR.replace("weight: 0.3", "weight: {value: 0.3}"),
    "a lone filter that is none": LINEAR.replace("weight: 0.3", "weight: [{filter: '*', value: 0.3}, {value: 5}]"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_yaml_lets_people_write_means_the_same(form, tmp_path):
    (tmp_path / "odd.yml").write_bytes(FORMS[form].encode())
    (document,) = read_documents(tmp_path / "odd.yml")
    assert convert(document).data == converted(LINEAR)

"""Files of mergekit-evolve become searches of merge3; what differs is told."""

import json

import pytest

from mergetool.errors import RecipeError
from mergetool.recipe import load_recipe
from mergetool.recipe.document import parse_document
from mergetool.recipe.load import check_document
from mergetool.recipe.mergekit import convert

EVOLVE = """\
genome:
  models: [org/a, org/b]
  merge_method: ties
  base_model: org/base
  layer_granularity: 8
  allow_negative_weights: true
  filters: [mlp]
tasks:
  - sums
  - {name: programs, weight: "0.4", metric: "acc_norm,none"}
limit: 100
"""


def converted(text):
    document = convert(parse_document(text, "x.yml"))
    check_document(document)
    return document


def test_a_search_arrives_with_its_ranges_tasks_and_groups():
    weight = {"search": [-1.5, 1.5], "init": 0.5}
    density = {"search": [0.01, 1.0], "init": 1.0}
    assert converted(EVOLVE).data == {
        "base": "org/base",
        "models": {"a": "org/a", "b": "org/b"},
        "merge": {
            "method": "merge3",
            "inner": {
                "method": "ties",
                "boundary": "random",
                "normalize": True,
                "scale": 1.0,
                "rescale": "none",
                "weight": weight,
                "density": density,
                "overrides": [{"match": "*mlp*", "weight": weight, "density": density}],
            },
            "tasks": [{"name": "sums"}, {"name": "programs", "metric": "acc_norm", "filter": "none", "weight": 0.4}],
            "search": {"groups": 4},
        },
        "output": {"dtype": "bfloat16"},
    }


def test_what_differs_is_told_with_its_lines():
    told = converted(EVOLVE + "model_name: mine\n").warnings
    assert [each.split(": ")[0] for each in told] == [
        "x.yml:12:1 model_name",
        "x.yml:1:1",
        "x.yml:11:1 limit",
        "x.yml:5:3 genome.layer_granularity",
    ]


def test_the_layers_are_counted_where_the_model_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({"num_hidden_layers": 24}))
    (tmp_path / "x.yml").write_text(EVOLVE.replace("org/a", "./a"))
    recipe = load_recipe("x.yml")
    assert recipe.method.search.groups == 3
    assert not any("layer_granularity" in each for each in recipe.warnings)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
def test_every_method_that_it_searches_is_searched_here(method):
    text = EVOLVE.replace("merge_method: ties", f"merge_method: {method}").replace("  filters: [mlp]\n", "")
    if method in ("slerp", "linear"):
        text = text.replace("org/base", "org/a")
    ranges = converted(text).data["merge"]["inner"]
    assert sorted(key for key, value in ranges.items() if isinstance(value, dict)) == {
        "slerp": ["t"], "linear": ["weight"], "task_arithmetic": ["weight"],
    }.get(method, ["density", "weight"])  # fmt: skip


def test_slerp_is_searched_between_two_models_whatever_the_base():
    text = EVOLVE.replace("merge_method: ties", "merge_method: slerp").replace("  filters: [mlp]\n", "")
    for based in (text, text.replace("  base_model: org/base\n", "")):
        assert converted(based).data["models"] == {"a": "org/a", "b": "org/b"}


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (EVOLVE.replace("ties", "della"), "3", "mergekit-evolve does not search 'della'"),
        (EVOLVE.replace("  base_model: org/base\n", ""), "1", "ties needs a base model"),
        (EVOLVE.replace("  - sums\n", "  - {name: sums, weight: much}\n"), "9", "expected a number, found 'much'"),
        (EVOLVE.partition("tasks:")[0], "1", "expected a list of tasks"),
        (EVOLVE.replace("[org/a, org/b]", "[]"), "2", "expected a list of models"),
        (EVOLVE.replace("genome", "multi_method_genome"), "1", "mergekit-evolve searches one method at a time"),
        (EVOLVE.replace("name: programs, ", ""), "10", "this key is required"),
    ],
)
def test_a_search_that_cannot_be_is_refused_at_its_line(text, line, what):
    with pytest.raises(RecipeError) as raised:
        converted(text)
    assert (line, what) in {(each.where.split(":")[1], each.what) for each in raised.value.problems}

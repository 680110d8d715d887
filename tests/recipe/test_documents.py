"""Files of several recipes: one is the result, the others become recipes inside it, and every line number is right."""

import subprocess
import sys

import pytest
import yaml

import mergetool
from mergetool.errors import RecipeError
from mergetool.recipe import load_recipe
from mergetool.recipe.load import imported_text
from tests.files import content, write_models

FIRST = "name: mix\nmodels: {a: a, b: b}\nmerge: {method: linear}\n"
SECOND = "models: {mix: mix, c: c}\nmerge: {method: slerp}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_models(tmp_path, names="abc")


def write(*texts, name="r.yaml"):
    with open(name, "w") as file:
        file.write("---\n".join(texts))
    return name


def problems(*texts):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(*texts))
    return [(problem.where, problem.what, problem.fix) for problem in caught.value.problems]


def test_a_lock_is_no_recipe_and_the_advice_gets_it_out(here):
    mergetool.run(write(f"{FIRST}output: {{path: out}}\n"))
    with pytest.raises(RecipeError, match="this is the lock of a merge") as caught:
        load_recipe("out/mergetool.json")
    code = caught.value.fix.partition("python -c ")[2].strip('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    assert load_recipe("recipe.yaml").models.keys() == {"a", "b"}


def test_a_pattern_that_finds_a_base_names_the_others(here):
    (here / "a").rename(here / "base")
    ((_, what, fix),) = problems("models: {glob: '[abc]*'}\nmerge: {method: linear}\n")
    assert "no model can be called 'base'" in what
    models = yaml.safe_load(fix.partition("models: ")[2])
    assert (
        load_recipe(write(yaml.safe_dump({"models": models, "merge": {"method": "linear"}}))).models.keys()
        == models.keys()
    )


@pytest.mark.parametrize(
    "order", [(FIRST, SECOND), (SECOND, FIRST), (FIRST, f"name: end\n{SECOND}"), (f"name: end\n{SECOND}", FIRST)]
)
def test_the_result_is_that_of_the_nameless_document_or_of_the_last_that_no_other_needs(here, order):
    recipe = load_recipe(write(*order))
    assert recipe.method.method_name() == "slerp"
    assert recipe.inner["mix"].method.method_name() == "linear"
    mergetool.run({"models": {"a": "a", "b": "b"}, "merge": {"method": "linear"}}, output="1")
    mergetool.run({"models": {"mix": "1", "c": "c"}, "merge": {"method": "slerp"}}, output="2")
    assert content(mergetool.run("r.yaml", output="out").path) == content(here / "2")


def test_names_lead_on_and_may_be_bases_and_stand_under_adapters(here):
    third = "base: mix\nmodels: {more: more, c: {source: mix, adapters: [x]}}\nmerge: {method: ties}\n"
    recipe = load_recipe(write(FIRST, f"name: more\n{SECOND}", third))
    assert list(recipe.inner) == ["base", "more", "c"]
    assert list(recipe.inner["more"].inner) == ["mix"]
    assert recipe.models["c"].adapters == ("x",)


def test_a_file_with_one_document_may_have_a_name_and_a_path_may_be_called_like_it(here):
    recipe = load_recipe(write("---\nname: a\nmodels: {a: a, b: b}\nmerge: {method: linear}\n---\n"))
    assert recipe.models["a"].source == "a"
    assert not recipe.inner


def test_a_recipe_inside_may_be_a_file_of_several(here):
    write(FIRST, SECOND, name="several.yaml")
    recipe = load_recipe(write("models: {x: {recipe: several.yaml}, c: c}\nmerge: {method: linear}\n"))
    assert list(recipe.inner["x"].inner) == ["mix"]


def test_mistakes_are_told_at_their_lines(here):
    found = problems(FIRST.replace("linear", "lineal"), SECOND.replace("c: c", "c: {sorce: c}"))
    assert [where for where, _, _ in found] == ["r.yaml:5:20 models.c.source", "r.yaml:5:24 models.c.sorce"]
    found = problems(FIRST.replace("linear", "lineal"), SECOND.replace("slerp", "slurp"))
    assert [where for where, _, _ in found] == ["r.yaml:6:9 merge.method", "r.yaml:3:9 models.mix.recipe.merge.method"]


@pytest.mark.parametrize(
    ("texts", "where", "what"),
    [
        ((SECOND, SECOND), "r.yaml:4:1 name", "there are two documents without a name"),
        ((FIRST, FIRST, SECOND), "r.yaml:5:1 name", "'mix' is there twice"),
        (("name: 3\n" + SECOND,), "r.yaml:1:1 name", "expected a name"),
        ((FIRST, "just text\n"), "r.yaml:5:1", "a recipe is a mapping"),
        ((FIRST, SECOND.replace("mix: mix", "mix: a")), "r.yaml:1:1", "document 'mix' has no part in the result"),
        (
            (f"name: x\n{SECOND}", "name: mix\n" + SECOND.replace("mix: mix", "x: x")),
            "r.yaml:2:10 models.mix",
            "mix -> x -> mix",
        ),
    ],
)
def test_documents_that_do_not_make_one_recipe_are_refused(here, texts, where, what):
    (found,) = problems(*texts)
    assert found[0] == where
    assert what in found[1]
    assert found[2]


def test_too_many_are_refused_rather_than_unfolded(here):
    texts = [FIRST.replace("mix", "m0")]
    texts += [f"name: m{n}\nmodels: {{x: m{n - 1}, y: m{n - 1}}}\nmerge: {{method: linear}}\n" for n in range(1, 30)]
    assert "more than 100 recipes" in problems(*texts)[0][1]


MERGEKIT = """\
name: stage-1
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]
merge_method: linear
---
name: stage-2
models: [{model: stage-1}, {model: c}]
base_model: stage-1
merge_method: slerp
parameters: {t: 0.3}
dtype: float32
"""


def test_mergekits_documents_are_imported_as_documents(here):
    (here / "x.yml").write_text(MERGEKIT)
    (here / "stage-1").mkdir()  # a folder of that name is not meant
    (here / "sub").mkdir()
    text, warnings = imported_text(here / "x.yml", here / "sub")
    assert not warnings
    first, second = yaml.safe_load_all(text)
    assert (first["name"], first["models"]) == ("stage-1", {"a": "../a", "b": "../b"})
    assert (second["name"], second["models"]) == ("stage-2", {"stage-1": "stage-1", "c": "../c"})
    (here / "sub/ours.yaml").write_text(text)
    ours, theirs = (mergetool.run(name, output=f"out{n}").path for n, name in enumerate(("sub/ours.yaml", "x.yml")))
    assert content(ours) == content(theirs)


def test_a_stage_of_mergekits_that_nobody_needs_is_told(here):
    (here / "x.yml").write_text(
        MERGEKIT.replace("model: stage-1", "model: a").replace("base_model: stage-1", "base_model: a")
    )
    (told,) = load_recipe("x.yml").all_warnings
    assert told.startswith("x.yml:1:1: document 'stage-1' has no part in the result")


def test_mistakes_of_all_of_mergekits_documents_are_told_at_once(here):
    (here / "x.yml").write_text(MERGEKIT.replace("linear", "liner").replace("slerp", "slurp"))
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.yml")
    assert [each.where for each in caught.value.problems] == ["x.yml:3:1 merge_method", "x.yml:8:1 merge_method"]


def test_set_changes_one_use_of_a_document_that_is_used_twice(here):
    name = write(FIRST.replace("linear", "slerp"), "models: {x: mix, y: mix}\nmerge: {method: linear}\n")
    recipe = load_recipe(name, ["models.x.recipe.merge.t=0.25"])
    assert [recipe.inner[each].document["merge"] for each in "xy"] == [
        {"method": "slerp", "t": 0.25},
        {"method": "slerp"},
    ]

"""Recipes inside a recipe: one run gives what runs one after the other give, and leaves nothing but the result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Qwen2ForCausalLM

import mergetool
from mergetool.errors import OutputError, PlanError, RecipeError, SourceError
from mergetool.planning import make_plan
from mergetool.planning.inner import bytes_on_disk
from mergetool.planning.key import plan_key
from mergetool.recipe import load_recipe
from tests.dense import write_dense
from tests.files import (
    LONG,
    StoppedError,
    Watch,
    content,
    tensors,
    write_model,
    write_models,
    write_recipe,
    write_sparse,
)
from tests.forks import clean_environment
from tests.held import is_measured
from tests.words import models as words
from tests.zoo.build import build, tuned

FIRST = {"models": {"a": "a", "b": "b"}, "merge": {"method": "linear", "weight": {"a": 0.7, "b": 0.3}}}
ROOT = Path(__file__).resolve().parents[2]
DEEP = {"recipe": {"models": {"y": {"recipe": "first.yaml"}, "c": "c"}, "merge": {"method": "slerp"}}}
TIES = {"method": "ties", "density": 0.4}
LARGEST = {"LARGEST": "2000"}
"""No file grows beyond that: less than the first result has."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with toy models of 16 bits, and a recipe that others name."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, names=("base", "a", "b", "c"), dtype=torch.bfloat16)
    write_recipe(tmp_path / "first.yaml", **FIRST, output={"path": "elsewhere"})
    return tmp_path


def outer(mix, **sections):
    return {"base": "base", "models": {"mix": mix, "c": "c"}, "merge": TIES, **sections}


def left(folder):
    """What lies in a folder that was not there before a run."""
    known = {"base", "a", "b", "c", "first.yaml"}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


# -------------------------------------------------------------------- what is made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_run_gives_the_bytes_of_two(here, dtype):
    asked = {} if dtype == "float32" else {"output": {"dtype": dtype}}
    mergetool.run({**FIRST, "output": {"dtype": dtype}}, output="two/first")
    mergetool.run(outer("two/first", output={"dtype": "bfloat16"}), output="two/second")
    result = mergetool.run(outer({"recipe": {**FIRST, **asked}}), output="one")
    assert content(here / "one") == content(here / "two/second")  # 16 bits, as the models are
    assert result.num_tensors == 6
    assert left(here) == ["one", "two"]


def test_an_intermediate_result_is_rounded_once(here):
    exact = mergetool.run(outer({"recipe": "first.yaml"}), output="exact").path
    rounded = mergetool.run(outer({"recipe": {**FIRST, "output": {"dtype": "bfloat16"}}}), output="rounded").path
    assert content(exact) != content(rounded)


def test_a_file_and_the_same_recipe_written_in_place_are_one(here):
    (here / "sub").mkdir()
    moved = {**FIRST, "models": {name: f"../{name}" for name in "ab"}}
    write_recipe(here / "sub/moved.yaml", **moved)
    results = [{"recipe": "first.yaml"}, {"recipe": "sub/moved.yaml"}, {"recipe": FIRST}]
    results.append({"recipe": moved, "folder": "sub"})
    found = [content(mergetool.run(outer(mix), output=f"out{n}").path) for n, mix in enumerate(results)]
    assert all(each == found[0] for each in found)


def test_recipes_of_recipes_and_a_base_that_is_one(here):
    write_recipe(here / "second.yaml", models={"mix": {"recipe": "first.yaml"}, "c": "c"}, merge={"method": "slerp"})
    merge = {"method": "task-arithmetic", "scale": 0.5}
    deep = {"base": {"recipe": "first.yaml"}, "models": {"deep": {"recipe": "second.yaml"}, "c": "c"}, "merge": merge}
    mergetool.run({**FIRST, "output": {"dtype": "float32"}}, output="1")
    second = {"models": {"mix": "1", "c": "c"}, "merge": {"method": "slerp"}, "output": {"dtype": "float32"}}
    mergetool.run(second, output="2")
    asked = {"base": "1", "models": {"deep": "2", "c": "c"}, "merge": merge, "output": {"dtype": "bfloat16"}}
    mergetool.run(asked, output="3")
    watch = Watch()
    assert content(mergetool.run(deep, output="out", progress=watch).path) == content(here / "3")
    made = [text.partition(":")[0] for text in watch.said if text.startswith("first ")]
    assert made == ["first base (1)", "first deep (2)"]  # what both need was made once


def test_the_networks_of_transformers_go_through_with_all_that_belongs_to_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    for seed, name in enumerate("abc", 1):
        tuned(tmp_path / name, tmp_path / "base", seed, model=Qwen2ForCausalLM)
    mergetool.run({**FIRST, "output": {"dtype": "float32"}}, output="1")
    mergetool.run(outer("1"), output="2")
    mergetool.run(outer({"recipe": FIRST}), output="out")
    assert content(tmp_path / "out") == content(tmp_path / "2")
    assert {"config.json", "tokenizer.json"} <= content(tmp_path / "out").keys()
    from mergetool.outputs.verify import verify_output

    assert "opens as Qwen2ForCausalLM and runs" in verify_output(tmp_path / "out", load=True)["summary"]


def test_layers_may_be_cut_and_stacked_on_the_way(here):
    cut = {"models": {"a": "a"}, "merge": {"method": "passthrough"}, "slices": [{"a": [0, 2]}, {"a": [1, 2]}]}
    asked = {
        "models": {"x": {"recipe": cut}, "y": {"recipe": {**cut, "models": {"a": "b"}}}},
        "merge": {"method": "linear"},
    }
    plan = make_plan(load_recipe(asked))
    assert [slot.spec.dtype.name for slot in next(iter(plan.inner.values())).slots] == [
        "BF16"
    ] * 8  # copies stay as they are
    mergetool.run(asked, output="out")
    assert "model.layers.2.mlp.weight" in mergetool.plan({**asked, "models": {"x": "out", "y": "out"}}).specs


def test_set_reaches_recipes_written_inside_and_paths_stay_where_they_lead(here, monkeypatch):
    (here / "sub").mkdir()
    inner = {"recipe": {**FIRST, "models": {"a": "../a", "b": "../b"}}}
    path = write_recipe(here / "sub/r.yaml", base="../base", models={"mix": inner, "c": "../c"}, merge=TIES)
    setting = "models.mix.recipe.merge.weight={a: 0.2, b: 0.8}"
    changed = mergetool.run(path, settings=[setting], output="1").path
    assert content(changed) != content(mergetool.run(path, output="2").path)
    assert content(mergetool.run(load_recipe(path), settings=[setting], output="3").path) == content(changed)


# -------------------------------------------------------------------- what is told


def test_a_plan_tells_of_every_recipe(here, capsys):
    plan = make_plan(load_recipe(outer({"recipe": "first.yaml"})), here / "out")
    assert list(plan.inner["mix"].sources) == ["a", "b"]
    assert sorted(plan.stamps) == ["base", "c", "mix/a", "mix/b"]
    assert not list(here.glob("out*"))


def test_lock_and_card_hold_all_that_is_needed_to_do_it_again(here, forks):
    (here / "sub").mkdir()
    write_recipe(
        here / "sub/outer.yaml", base="../base", models={"mix": {"recipe": "../first.yaml"}, "c": "../c"}, merge=TIES
    )
    env = clean_environment()
    run = ["run", "sub/outer.yaml", "-o", "out", "--overwrite"]
    assert forks.run(run, cwd=here, env=env).code == 0
    first = content(here / "out")
    lock = json.loads((here / "out/mergetool.json").read_text())
    assert all(file["sha256"] for files in lock["inputs"].values() for file in files)
    assert sorted(lock["inputs"]) == ["base", "c", "mix/a", "mix/b"]
    assert lock["inner"]["mix"]["output"]["files"].keys() == {"model.safetensors", "README.md"}
    assert forks.run([*run, "--locked"], cwd=here, env=env).code == 0
    card = (here / "out/README.md").read_text()
    assert "| mix | a merge by `linear` |" in card
    (here / "sub/recipe.yaml").write_text(card.partition("```yaml\n")[2].partition("```")[0])
    (here / "first.yaml").unlink()
    again = forks.run(["run", "sub/recipe.yaml", "-o", "again"], cwd=here, env=env)
    assert again.code == 0, again.err
    assert content(here / "again") == first
    write_model(here / "a", tensors(9, dtype=torch.bfloat16))
    refused = forks.run(["run", "sub/recipe.yaml", "-o", "out", "--overwrite", "--locked"], cwd=here, env=env)
    assert (refused.code, "input 'mix/a': SHA-256 differ" in refused.err) == (3, True)


# -------------------------------------------------------------------- what is refused


def problems(recipe):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    return {problem.where.partition(" ")[2]: (problem.what, problem.fix) for problem in caught.value.problems}


def test_mistakes_inside_are_told_at_their_place(here):
    write_recipe(here / "wrong.yaml", models={"a": "a"}, merge={"method": "lineal"})
    mix = {"models": {"x": {"recipe": "wrong.yaml"}, "y": "b"}, "merge": {"method": "slerp", "u": 1}}
    recipe = {"models": {"one": {"recipe": mix}, "two": {"recipe": "nowhere.yaml"}}, "merge": {"method": "linear"}}
    path = write_recipe(here / "outer.yaml", **recipe)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    told = [problem.where for problem in caught.value.problems]
    assert told == [
        f"{path}:10:9 models.one.recipe.merge.u",
        f"{here}/wrong.yaml:4:3 merge.method",
        f"{path}:12:5 models.two.recipe",
    ]


def test_a_recipe_that_needs_its_own_result_is_refused_with_the_chain(here):
    for name, other in (("x", "y"), ("y", "z"), ("z", "x")):
        write_recipe(
            here / f"{name}.yaml", models={"m": {"recipe": f"{other}.yaml"}, "c": "c"}, merge={"method": "linear"}
        )
    found = problems(here / "x.yaml")
    assert found == {
        "models.m.recipe": (
            "the recipe needs its own result: x.yaml -> y.yaml -> z.yaml -> x.yaml",
            "name another recipe",
        )
    }


def test_what_cannot_be_made_on_the_way_is_refused_and_the_advice_helps(here):
    write_recipe(here / "bundle.yaml", base="base", models={"a": "a", "b": "b"}, merge={"method": "tsv-compress"})
    what, fix = problems(outer({"recipe": "bundle.yaml"}))["models.mix.recipe"]
    assert "makes a bundle" in what
    assert "mergetool run bundle.yaml -o FOLDER" in fix
    mergetool.run(here / "bundle.yaml", output="FOLDER")
    assert mergetool.run(outer({"source": "FOLDER", "select": "a"}), output="out").num_tensors == 6


@pytest.mark.parametrize(
    ("reference", "place"),
    [
        ({"recipe": "first.yaml", "source": "a"}, "models.mix.source"),
        ({"recipe": "first.yaml", "select": "a"}, "models.mix.select"),
        ({"recipe": "first.yaml", "folder": "a"}, "models.mix.folder"),
        ({"recipe": 7}, "models.mix.recipe"),
        ({"recipe": []}, "models.mix.recipe"),
        ({"source": "a", "folder": "b"}, "models.mix.folder"),
    ],
)
def test_references_that_say_two_things_or_none_are_refused(here, reference, place):
    found = problems(outer(reference))
    assert list(found) == [place]
    assert all(found[place])


def test_models_that_cannot_be_opened_are_told_by_the_names_that_lead_to_them(here):
    (here / "b/model.safetensors").unlink()
    with pytest.raises(SourceError) as caught:
        make_plan(load_recipe(outer(DEEP)))
    assert caught.value.where.startswith("mix: y: model 'b': ")


def test_code_of_a_recipe_inside_needs_trust_too(here):
    (here / "mine.py").write_text("raise SystemExit")
    inner = {"models": {"a": "a", "b": "b"}, "merge": {"method": "git-rebasin"}, "architecture": "mine.py:make"}
    with pytest.raises(RecipeError, match="would execute Python code"):
        mergetool.run(outer({"recipe": inner}), output="out")


def test_a_search_is_a_run_of_its_own(here):
    search = yaml.safe_load((ROOT / "recipes/merge3.yaml").read_text())
    search["models"] = {"mix": {"recipe": "first.yaml"}, "c": "c"}  # over what others make
    what, fix = problems({"models": {"found": {"recipe": search}}, "merge": {"method": "linear"}})[
        "models.found.recipe"
    ]
    assert "merge3 is a search, which is a run of its own" in what
    assert "mergetool run INNER.yaml -o FOLDER" in fix


# -------------------------------------------------------------------- places


def test_nothing_of_others_is_touched(here):
    (here / "out.partial.parts").mkdir()
    (here / "out.partial.parts/thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="is in the way"):
        mergetool.run(outer({"recipe": "first.yaml"}), output="out")
    assert (here / "out.partial.parts/thesis.tex").read_text() == "mine"


def stopped_in_the_second(here, recipe):
    """A run that ends while the result itself is being merged."""
    count = 0

    def on_advance(_):
        nonlocal count
        count += 1
        if count > 9:
            raise StoppedError

    with pytest.raises(StoppedError):
        mergetool.run(recipe, output="out", progress=Watch(on_advance))
    assert (here / "out.partial.parts").is_dir()


def test_what_is_made_serves_another_recipe_that_needs_it(here):
    stopped_in_the_second(here, outer({"recipe": "first.yaml"}))
    watch = Watch()
    mergetool.run(outer({"recipe": "first.yaml"}, merge={**TIES, "scale": 0.5}), output="out", progress=watch)
    assert not any(text.startswith("first mix") for text in watch.said)
    assert left(here) == ["out"]


@pytest.mark.parametrize("flags", [{}, {"resume": False}])
def test_what_is_made_goes_when_it_is_not_wanted(here, flags):
    stopped_in_the_second(here, outer({"recipe": "first.yaml"}))
    other = outer("a") if not flags else outer({"recipe": "first.yaml"})
    watch = Watch()
    mergetool.run(other, output="out", progress=watch, **flags)
    assert any(text.startswith("first mix") for text in watch.said) == bool(flags)
    assert left(here) == ["out"]


def test_an_error_leaves_nothing(here):
    state = tensors(1, dtype=torch.bfloat16)
    state["lm_head.weight"][0, 0] = float("nan")
    write_model(here / "a", state)
    with pytest.raises(mergetool.MergetoolError) as caught:
        mergetool.run(outer({"recipe": "first.yaml"}), output="out")
    assert "lm_head.weight" in caught.value.where
    assert caught.value.where.startswith("mix: ")
    assert left(here) == []


def test_memory_that_is_too_small_for_a_recipe_inside_is_told_before(here):
    with pytest.raises(PlanError) as caught:
        mergetool.run(outer({"recipe": "first.yaml"}), output="out", memory="1MiB")
    assert caught.value.where.startswith("mix: ")
    assert left(here) == []


# -------------------------------------------------------------------- moments


@pytest.mark.skipif(is_measured(), reason="a fork that begins to be measured holds the lock meanwhile")
@pytest.mark.parametrize("kind", ["files", "journal"])
def test_a_run_killed_at_any_moment_is_ended_by_the_same_command(forks, here, kind):
    """Before files are made, renamed or removed, or after lines of a journal; some of these, as each takes two runs."""
    write_recipe(here / "r.yaml", **outer(DEEP))
    env, command = clean_environment(), ["run", "r.yaml", "-o", "out"]
    assert forks.run(["run", "r.yaml", "-o", "undisturbed"], cwd=here, env=env).code == 0
    wanted = content(here / "undisturbed")
    for moment in range(1 if kind == "files" else 2, 200, 3 if LONG else 11):
        files = {"KILL_AT": str(moment), "KILL_IN": str(here / "out")}
        lines = {"KILL_AFTER": f"mergetool.outputs.journal:Journal._write {moment}"}
        code = forks.run(command, cwd=here, env=env | (files if kind == "files" else lines)).code
        if (here / "out").exists():
            assert content(here / "out") == wanted
        again = forks.run(command, cwd=here, env=env)
        assert again.code == 0, (moment, again.err)
        assert content(here / "out") == wanted
        assert sorted(path.name for path in here.glob("out*")) == ["out"], moment
        shutil.rmtree(here / "out")
        if code == 0:
            break
        assert code == -9
    assert moment > 30


def test_a_disk_that_is_too_small_is_told_at_once_and_left_as_it_was(here):
    huge = {"models": {"a": "huge.safetensors"}, "merge": {"method": "passthrough"}}
    write_sparse(here / "huge.safetensors", shutil.disk_usage(here).free + 2**30)
    with pytest.raises(OutputError, match="with what the recipes inside it make"):
        mergetool.run({"models": {"x": {"recipe": huge}}, "merge": {"method": "passthrough"}}, output="out")
    assert left(here) == ["huge.safetensors"]


@pytest.mark.skipif(is_measured(), reason="what is measured is written to the disk that is full")
def test_a_disk_that_is_full_on_the_way_is_gone_on_with_when_there_is_room(forks, here):
    write_recipe(here / "r.yaml", **outer({"recipe": "first.yaml"}))
    mergetool.run("r.yaml", output="undisturbed")

    done = forks.run(["run", "r.yaml", "-o", "out"], cwd=here, env=clean_environment() | LARGEST)
    assert (done.code, "first mix" in done.err) == (6, True), done.err
    assert not (here / "out").exists()
    mergetool.run("r.yaml", output="out")
    assert content(here / "out") == content(here / "undisturbed")
    assert left(here) == ["out", "r.yaml", "undisturbed"]


def test_room_on_the_disk_is_counted_as_results_come_and_go(here):
    plan = make_plan(load_recipe(outer(DEEP)), here / "out")
    deep = plan.inner["mix"]
    first = deep.inner["y"]
    assert bytes_on_disk(plan) == max(first.bytes_out + deep.bytes_out, deep.bytes_out + plan.bytes_out)
    assert bytes_on_disk(plan, lambda each: each is deep) == plan.bytes_out
    assert bytes_on_disk(plan, lambda each: each is first) == deep.bytes_out


def test_two_runs_at_once_make_one_result(forks, here):
    write_recipe(here / "r.yaml", **outer({"recipe": "first.yaml"}))
    both = forks.start(["run", "r.yaml", "-o", "out"], cwd=here, envs=[clean_environment()] * 2).wait()
    assert sorted(each.code for each in both) in ([0, 0], [0, 6])
    assert left(here) == ["out", "r.yaml"]


def test_several_processes_write_the_bytes_of_one(forks, here):
    write_recipe(here / "r.yaml", **outer({"recipe": "first.yaml"}))
    for size in (1, 2):
        done = forks.team(size, ["run", "r.yaml", "-o", f"out{size}"], cwd=here).wait()
        assert [each.code for each in done] == [0] * size, done[0].err
    assert content(here / "out1") == content(here / "out2")
    assert left(here) == ["out1", "out2", "r.yaml"]


def test_the_recipe_that_is_shown_runs(here):
    document = yaml.safe_load((ROOT / "recipes/merge-of-merges.yaml").read_text())
    for name, other in (("base", "base"), ("first", "a"), ("second", "b"), ("third", "c")):
        shutil.copytree(here / other, here / "models" / name)
    assert mergetool.run(document).num_tensors == 6


# -------------------------------------------------------------------- with what other sections do


def test_a_union_of_vocabularies_may_be_made_on_the_way(tmp_path):
    """The outer plan knows the tokens of a tokenizer that is not written yet."""
    a, b = (
        words.build(tmp_path / "a", "llama", "stories", 1),
        words.build(tmp_path / "b", "llama", "letters", 2, size=320),
    )
    union = {"models": {"a": str(a), "b": str(b)}, "merge": {"method": "linear"}, "tokenizer": {"source": "union"}}
    after = {"merge": {"method": "slerp"}, "tokenizer": {"source": "mix"}, "output": {"dtype": "float32"}}
    mergetool.run({**union, "output": {"dtype": "float32"}}, output=tmp_path / "1")
    mergetool.run({"models": {"mix": str(tmp_path / "1"), "b": str(b)}, **after}, output=tmp_path / "2")
    one = mergetool.run({"models": {"mix": {"recipe": union}, "b": str(b)}, **after}, output=tmp_path / "out").path
    assert content(one) == content(tmp_path / "2")
    assert words.vocabulary(one).keys() >= words.vocabulary(a).keys() | words.vocabulary(b).keys()
    words.opened(one)


def test_merges_may_be_experts_and_the_base_of_a_mixture(tmp_path):
    for seed, name in enumerate("abc"):
        write_dense(tmp_path / name, seed=seed)
    a, b, c = (str(tmp_path / name) for name in "abc")
    mix = {"models": {"a": a, "b": b}, "merge": {"method": "linear"}}
    mergetool.run(mix, output=tmp_path / "1")
    merge = {"method": "moe", "experts": {"mix": {"prompts": ["w1 w2"]}, "c": {"prompts": ["w3"]}}}
    two = {"base": str(tmp_path / "1"), "models": {"mix": str(tmp_path / "1"), "c": c}, "merge": merge}
    mergetool.run(two, output=tmp_path / "2")
    one = {"base": {"recipe": mix}, "models": {"mix": {"recipe": mix}, "c": c}, "merge": merge}
    assert content(mergetool.run(one, output=tmp_path / "out").path) == content(tmp_path / "2")


def test_experts_and_base_of_a_bundle_may_be_merges(here):
    bundle = {
        "base": {"recipe": "first.yaml"},
        "models": {"b": "b", "mix": {"recipe": FIRST}},
        "merge": {"method": "tsv-compress"},
    }
    out = mergetool.run(bundle, output="out").path
    assert mergetool.run(outer({"source": str(out), "select": "b"}), output="expert").num_tensors == 6
    what, fix = problems({**bundle, "merge": {"method": "tsv-compress", "base": "reference"}})["base.recipe"]
    assert "would refer to a base that is gone" in what
    assert fix == "write merge: {base: copy}"


def test_networks_from_different_seeds_may_be_merges(tmp_path):
    perceptron = {"fc1.weight": (32, 16), "fc1.bias": (32,), "fc2.weight": (24, 32), "fc2.bias": (24,)}
    write_models(tmp_path, names="abc", shapes={**perceptron, "fc3.weight": (10, 24), "fc3.bias": (10,)})
    a, b, c = (str(tmp_path / name) for name in "abc")
    aligned = {"models": {"a": a, "b": b}, "merge": {"method": "git-rebasin"}, "architecture": "mlp"}
    mergetool.run(aligned, output=tmp_path / "1")
    after = {"merge": {"method": "git-rebasin"}, "architecture": "mlp"}
    mergetool.run({"models": {"mix": str(tmp_path / "1"), "c": c}, **after}, output=tmp_path / "2")
    one = mergetool.run({"models": {"mix": {"recipe": aligned}, "c": c}, **after}, output=tmp_path / "out").path
    assert content(one)["model.safetensors"] == content(tmp_path / "2")["model.safetensors"]


def test_what_is_planned_is_known_again(tmp_path):
    """A killed run finds its journal again: nothing of the folder that stands in for a result is in the key."""
    a, b = (
        words.build(tmp_path / "a", "llama", "stories", 1),
        words.build(tmp_path / "b", "llama", "letters", 2, size=320),
    )
    union = {"models": {"a": str(a), "b": str(b)}, "merge": {"method": "linear"}, "tokenizer": {"source": "union"}}
    recipe = {
        "models": {"mix": {"recipe": union}, "b": str(b)},
        "merge": {"method": "slerp"},
        "tokenizer": {"source": "union"},
    }
    keys = [plan_key(make_plan(load_recipe(recipe), tmp_path / "out")) for _ in range(2)]
    assert keys[0] == keys[1]
    mergetool.run(recipe, output=tmp_path / "out")
    watch = Watch()
    assert mergetool.run(recipe, output=tmp_path / "out", progress=watch).resumed
    assert any("done already" in text for text in watch.said)
    assert "/mergetool-" not in (tmp_path / "out/mergetool.json").read_text() + (tmp_path / "out/README.md").read_text()

"""Statistics in runs: planned, measured once, kept, taken up after a kill, named in the lock."""

import json
import os
import shutil
import signal

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mergetool
from mergetool import OutputError, PlanError, RecipeError, SourceError
from mergetool.cli.app import app
from mergetool.planning.cost import estimate
from mergetool.planning.measures import to_measure
from tests.files import StoppedError, Watch, content, stop_after
from tests.statistics.networks import TEXTS, opened, write_classifier, write_dense, write_rows
from tests.zoo.text import save_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        write_classifier(folder / name, seed)
        write_dense(folder / f"llama-{name}", seed=seed)
    write_rows(folder / "a.jsonl", TEXTS[:4])
    write_rows(folder / "b.jsonl", TEXTS[4:])
    return folder


@pytest.fixture
def recipe(place):
    def make(method="regmean", kind="", data=None, **more):
        each = {name: {"data": str(place / f"{name}.jsonl")} for name in "ab"}
        return {
            "models": {name: str(place / f"{kind}{name}") for name in "ab"},
            "calibration": each if data is None else data,
            "merge": {"method": method, **more},
        }

    return make


def run(recipe, output, **flags):
    return mergetool.run(recipe, output=output, cache=output.parent / "cache", **flags)


def kept(folder):
    return sorted((folder / "cache" / "statistics").glob("*.safetensors"))


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("kind", ["", "llama-"])
def test_a_run_merges_by_what_it_measures(place, recipe, tmp_path, method, kind):
    """What comes out is what the method makes of the statistics, and transformers opens it."""
    result = run(recipe(method, kind), tmp_path / "out")
    names = {"fisher": "fisher", "regmean": "gram"}
    models = {name: load_file(place / f"{kind}{name}" / "model.safetensors") for name in "ab"}
    statistics = {
        name: mergetool.measure(
            place / f"{kind}{name}", names[method], place / f"{name}.jsonl", cache=tmp_path / "other"
        )
        for name in "ab"
    }
    expected = mergetool.merge_state_dicts(method, models, statistics=statistics)
    found = load_file(result.path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name
    opened(result.path, "AutoModelForCausalLM" if kind else "AutoModelForSequenceClassification")


def test_merged_layers_answer_more_like_the_models_than_an_average_does(place, recipe, tmp_path):
    """On the rows that were measured, in the layers that only they go into."""
    result = run(recipe(alpha=1.0), tmp_path / "out")
    merged = load_file(result.path / "model.safetensors")
    models = {name: load_file(place / name / "model.safetensors") for name in "ab"}
    errors = {"merged": 0.0, "average": 0.0}
    name = "bert.encoder.layer.0.attention.self.query.weight"
    for each in "ab":
        gram = mergetool.measure(place / each, "gram", place / f"{each}.jsonl", cache=tmp_path / "cache")[name]
        average = (models["a"][name] + models["b"][name]) / 2
        for what, weight in (("merged", merged[name]), ("average", average)):
            away = weight - models[each][name]
            errors[what] += float((away @ gram * away).sum())
    assert errors["merged"] < 0.5 * errors["average"]


def test_each_model_is_measured_once(recipe, tmp_path):
    first, again = Watch(), Watch()
    run(recipe(), tmp_path / "one", progress=first)
    assert [text for text in first.said if "measured on" in text] == [
        "gram of model 'a': measured on 4 rows",
        "gram of model 'b': measured on 3 rows",
    ]
    before = {path: path.stat().st_mtime_ns for path in kept(tmp_path)}
    run(recipe(alpha=0.3), tmp_path / "two", progress=again)
    assert [text for text in again.said if "kept from before" in text] != []
    assert {path: path.stat().st_mtime_ns for path in kept(tmp_path)} == before
    assert len(before) == 2


def test_other_rows_settings_or_weights_are_measured_anew(place, recipe, tmp_path):
    run(recipe("fisher"), tmp_path / "out")
    assert len(kept(tmp_path)) == 2
    run(recipe("fisher", labels="exact"), tmp_path / "out2")
    assert len(kept(tmp_path)) == 4
    shared = {"data": str(place / "a.jsonl")}
    run(recipe("fisher", data=shared), tmp_path / "out3")
    assert len(kept(tmp_path)) == 5  # b on the rows of a
    shutil.copytree(place / "b", tmp_path / "b")
    state = load_file(tmp_path / "b" / "model.safetensors")
    save_file({**state, "classifier.bias": state["classifier.bias"] + 1}, tmp_path / "b" / "model.safetensors")
    asked = recipe("fisher", data=shared)
    run({**asked, "models": {**asked["models"], "b": str(tmp_path / "b")}}, tmp_path / "out4")
    assert len(kept(tmp_path)) == 6


@pytest.mark.parametrize(
    ("statistic", "changes"),
    [("fisher", {"seed": 1}), ("gradient", {"batch": 2}), ("gram", {"dtype": "float64"}), ("gram", {"length": 2})],
)
def test_whatever_decides_a_statistic_is_in_its_name(place, tmp_path, statistic, changes):
    for more in ({}, changes, {}):
        mergetool.measure(place / "a", statistic, place / "a.jsonl", cache=tmp_path / "cache", **more)
    assert len(kept(tmp_path)) == 2


def test_where_a_model_lies_and_how_rows_are_written_does_not_matter(place, recipe, tmp_path):
    run(recipe(), tmp_path / "out")
    before = kept(tmp_path)
    shutil.copytree(place, tmp_path / "elsewhere")
    write_rows(tmp_path / "elsewhere" / "a.jsonl", TEXTS[:4], labels=False, note="another field")
    asked = recipe(data={name: {"data": str(tmp_path / "elsewhere" / f"{name}.jsonl")} for name in "ab"})
    models = {name: str(tmp_path / "elsewhere" / name) for name in "ab"}
    run({**asked, "models": models}, tmp_path / "out2")
    assert kept(tmp_path) == before


def test_a_run_that_was_stopped_goes_on_with_the_next_model(recipe, tmp_path):
    with pytest.raises(StoppedError):
        run(recipe(), tmp_path / "out", progress=stop_after(5))  # in the rows of the second
    assert len(kept(tmp_path)) == 1
    watch = Watch()
    run(recipe(), tmp_path / "out", progress=watch)
    assert "gram of model 'a': kept from before" in watch.said
    assert "gram of model 'b': measured on 3 rows" in watch.said
    run(recipe(), tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


KILLED = """
import os, signal, sys
import mergetool.statistics.store

def begun(self, key, found, turned):
    self.path(key).with_name(f".{self.path(key).name}.{os.getpid()}.1").write_bytes(b"begun")
    os.kill(os.getpid(), signal.SIGKILL)

mergetool.statistics.store.StatisticStore.keep = begun
mergetool.measure(sys.argv[1], "fisher", sys.argv[2], cache=sys.argv[3], memory=1)
"""


def test_what_a_killed_process_left_half_written_goes(network_forks, place, tmp_path):
    """Layer by layer, too, where what waits lies in files."""
    arguments = [str(place / "a"), str(place / "a.jsonl"), str(tmp_path / "cache")]
    (killed,) = network_forks.python("-c", KILLED, *arguments).wait()
    assert killed.code == -signal.SIGKILL
    folder = tmp_path / "cache" / "statistics"
    left = list(folder.iterdir())
    assert len(left) == 2, left  # what was begun, and a folder of what waited
    for each in left:
        os.utime(each, (0, 0))
    mergetool.measure(place / "a", "fisher", place / "a.jsonl", cache=tmp_path / "cache", memory=1)
    assert [each.suffix for each in folder.iterdir()] == [".safetensors"]
    expected = mergetool.measure(place / "a", "fisher", place / "a.jsonl", cache=tmp_path / "other")
    found = mergetool.measure(place / "a", "fisher", place / "a.jsonl", cache=tmp_path / "cache")
    assert all(found[name].equal(value) for name, value in expected.items())


def test_a_run_that_was_stopped_while_it_merged_measures_nothing_again(recipe, tmp_path):
    with pytest.raises(StoppedError):
        run(recipe(), tmp_path / "out", progress=stop_after(12))
    assert len(kept(tmp_path)) == 2
    result = run(recipe(), tmp_path / "out")
    assert result.resumed
    lock = json.loads((result.path / "mergetool.json").read_text())
    assert len(lock["statistics"]) == 2


def test_a_damaged_statistic_is_measured_again(recipe, tmp_path):
    expected = run(recipe(), tmp_path / "out")
    for path in kept(tmp_path):
        os.truncate(path, path.stat().st_size // 2)
    again = run(recipe(), tmp_path / "again")
    assert content(again.path) == content(expected.path)


def test_without_a_cache_they_lie_in_the_users(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    mergetool.run(recipe(), output=tmp_path / "out")
    assert len(list((tmp_path / "home" / "mergetool" / "statistics").iterdir())) == 2
    assert not list(tmp_path.glob("out.partial*"))


def test_a_cache_that_cannot_be_written_is_told_with_a_fix(recipe, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(OutputError, match="cannot be written") as error:
        run(recipe(), tmp_path / "out")
    assert error.value.fix.endswith("--cache DIR")
    mergetool.run(recipe(), output=tmp_path / "out", cache=tmp_path / "other")


def test_the_lock_names_each_statistic(place, recipe, tmp_path):
    result = run(recipe("fisher"), tmp_path / "out")
    lock = json.loads((result.path / "mergetool.json").read_text())
    told = lock["statistics"]["model 'a'"]
    assert (told["statistic"], told["rows"]) == ("fisher", 4)
    assert told["settings"] == {"labels": "sampled", "seed": 0}
    assert (tmp_path / "cache" / "statistics" / f"{told['key']}.safetensors").is_file()
    assert lock["inputs"].keys() == {"a", "b", "calibration.a.data", "calibration.b.data"}
    (data,) = lock["inputs"]["calibration.a.data"]
    assert data["sha256"] is not None
    assert mergetool.run(recipe("fisher"), output=tmp_path / "out", cache=tmp_path / "cache").resumed


def test_a_plan_lists_what_will_be_measured_and_measures_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe(), "output": {"path": "out"}}))
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    (row,) = (line for line in shown.stdout.splitlines() if line.startswith("gram of model 'a'"))
    assert "on 4 rows (" in row
    answer = json.loads(CliRunner().invoke(app, ["plan", str(path), "--json"]).stdout)
    told = answer["statistics"]["model 'b'"]
    assert told["rows"] == 3
    assert told["bytes"] >= 4 * 16 * 16
    assert told["memory"] > told["bytes"]
    assert {step["how"] for step in answer["steps"]} == {"regmean", "average"}
    assert not (tmp_path / "home").exists()


def test_the_plan_counts_the_memory_of_networks(recipe):
    plan = mergetool.plan(recipe())
    assert estimate(plan, workers=1, memory=None).peak_memory > max(asked.memory for asked in to_measure(plan.sources))


def test_what_was_measured_before_can_be_given(recipe, tmp_path):
    expected = run(recipe(), tmp_path / "out")
    lock = json.loads((expected.path / "mergetool.json").read_text())
    each = {
        name: {
            "measured": str(
                tmp_path / "cache" / "statistics" / f"{lock['statistics'][f'model {name!r}']['key']}.safetensors"
            )
        }
        for name in "ab"
    }
    found = mergetool.run(recipe(data=each), output=tmp_path / "given")
    assert content(found.path) == content(expected.path)
    inputs = json.loads((found.path / "mergetool.json").read_text())["inputs"]
    assert [len(inputs[f"(statistic) {name}"]) for name in "ab"] == [1, 1]


def test_a_model_made_by_another_recipe_is_measured_too(place, recipe, tmp_path):
    mixed = {"models": {name: str(place / name) for name in "ab"}, "merge": {"method": "linear"}}
    asked = recipe(data={"data": str(place / "a.jsonl")})
    asked["models"]["b"] = {"recipe": mixed}
    result = run(asked, tmp_path / "out")
    assert opened(result.path).num_labels == 3
    assert len(kept(tmp_path)) == 2
    mergetool.run(mixed, output=tmp_path / "mixed")
    asked["models"]["b"] = str(tmp_path / "mixed")
    assert content(run(asked, tmp_path / "apart").path) == content(result.path)


def test_a_model_made_by_another_recipe_without_a_tokenizer_is_told(place, recipe, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(place / name / file, tmp_path / name / file)
    mixed = {"models": {name: str(tmp_path / name) for name in "ab"}, "merge": {"method": "linear"}}
    asked = recipe(data={"data": str(place / "a.jsonl")})
    asked["models"]["b"] = {"recipe": mixed}
    with pytest.raises(PlanError, match="no tokenizer") as error:
        run(asked, tmp_path / "out")
    assert "tokenizer: MODEL" in error.value.fix
    asked["calibration"]["tokenizer"] = "a"
    run(asked, tmp_path / "out")


def test_heads_of_other_sizes_are_refused_as_in_all_methods(place, tmp_path, recipe):
    write_classifier(tmp_path / "two", num_labels=2, id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})
    asked = recipe()
    asked["models"]["b"] = str(tmp_path / "two")
    with pytest.raises(PlanError, match="shape"):
        run(asked, tmp_path / "out")
    asked["merge"]["overrides"] = [{"match": "classifier.*", "use": "a"}]
    assert opened(run(asked, tmp_path / "out").path).num_labels == 3


@pytest.mark.parametrize(
    ("changes", "told", "fix"),
    [
        ({"calibration": None}, "measures the models on data", "add calibration: {data: ./FILE.jsonl}"),
        ({"calibration": {"data": "x.jsonl", "smaples": 3}}, "unknown key 'smaples'", "did you mean 'samples'?"),
        ({"calibration": {"field": "text"}}, "expected `data`", ""),
        ({"calibration": {"data": "x.jsonl", "samples": 0}}, "samples", ""),
        ({"calibration": {"a": {"data": "x.jsonl"}}}, "nothing for model 'b'", "add b: {data: ./FILE.jsonl}"),
        ({"calibration": {"a": {"data": "x"}, "b": {"data": "x"}, "bb": {"data": "x"}}}, "no model 'bb'", "'b'"),
        ({"calibration": {"measured": "x.safetensors"}}, "is the statistic of one model", "a: {measured: x.saf"),
        ({"merge": {"method": "linear"}}, "linear measures nothing on data", "remove `calibration`"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(recipe, changes, told, fix):
    asked = {key: value for key, value in {**recipe(), **changes}.items() if value is not None}
    with pytest.raises(RecipeError, match=told) as error:
        mergetool.load_recipe(asked)
    assert any(fix in problem.fix for problem in error.value.problems)


def test_wrong_rows_are_told_by_the_plan(place, recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n{"txt": "w2"}\n')
    with pytest.raises(SourceError, match=r"rows\.jsonl:2"):
        mergetool.plan(recipe(data={"data": str(tmp_path / "rows.jsonl")}))


def test_an_adapter_can_be_made_of_the_result(place, recipe, tmp_path):
    asked = {**recipe(), "base": str(place / "a"), "output": {"kind": "adapter", "rank": 4}}
    result = run(asked, tmp_path / "out")
    assert (result.path / "adapter_model.safetensors").is_file()


def test_weights_that_are_stored_turned_are_merged_by_their_inputs(place, tmp_path):
    """Of a square one no shape tells which side the inputs are on."""
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    asked = {
        "models": {name: str(tmp_path / name) for name in "ab"},
        "calibration": {name: {"data": str(place / f"{name}.jsonl")} for name in "ab"},
        "merge": {"method": "regmean", "alpha": 0.7, "ridge": 0.0},
    }
    found = load_file(run(asked, tmp_path / "out").path / "model.safetensors")
    for name in ("transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_fc.weight"):
        left = right = 0
        for each in "ab":
            gram = mergetool.measure(tmp_path / each, "gram", place / f"{each}.jsonl", cache=tmp_path / "cache")[name]
            gram = 0.7 * gram.double() + 0.3 * gram.double().diagonal().diag()
            weight = load_file(tmp_path / each / "model.safetensors")[name].double()
            left, right = left + gram, right + gram @ weight  # (inputs, outputs)
        assert torch.allclose(found[name].double(), torch.linalg.solve(left, right), atol=1e-5), name


def test_experts_of_a_bundle_are_measured_like_models(place, recipe, tmp_path):
    """The same, whole or layer by layer, as of the model that such an expert is when it is taken out."""
    write_classifier(tmp_path / "base", 9)
    bundle = {**recipe("tall-masks"), "base": str(tmp_path / "base")}
    del bundle["calibration"]
    mergetool.run(bundle, output=tmp_path / "bundle")
    asked = recipe()
    experts = {name: {"source": str(tmp_path / "bundle"), "select": name} for name in "ab"}
    for name, expert in experts.items():
        alone = {"models": {name: expert}, "merge": {"method": "passthrough"}}
        mergetool.run(alone, output=tmp_path / name)
    out = mergetool.run({**asked, "models": experts}, output=tmp_path / "out", cache=tmp_path / "cache")
    plain = {**asked, "models": {name: str(tmp_path / name) for name in "ab"}}
    expected = mergetool.run(plain, output=tmp_path / "plain", cache=tmp_path / "other")
    found, wanted = (load_file(each.path / "model.safetensors") for each in (out, expected))
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in wanted.items())

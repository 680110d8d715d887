"""Bundles that get and lose experts: as if made of all at once, in their own place, killed at whatever moment."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.bundle import store
from mergetool.bundle.manifest import read_manifest
from mergetool.engine.growing import change_bundle
from mergetool.engine.run import Flags, Silent
from mergetool.errors import MergeError, PlanError, RecipeError, SourceError
from mergetool.testing.classifiers import expert_answer, save_experts, text_inputs, tiny_config
from tests.bundle.test_adapters import SETTINGS, write_adapters
from tests.bundle.tiny import tiny_inputs, tiny_model, write_models
from tests.files import LONG
from tests.forks import clean_environment

KIND = transformers.BertForSequenceClassification
SETTINGS_OF = {
    "mass": {"method": "mass"},
    "library": {"method": "tsv-compress"},
    "small": {"method": "mass", "size": 0.3},
    "energy": {"method": "tsv-compress", "rank": {"energy": 0.5}},
    "rank": {"method": "tsv-compress", "rank": 3},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return save_experts(folder, KIND, tiny_config(KIND), transformers.BertModel, tasks="abcd", a=2, d=5)


def recipe(paths, tasks, **merge):
    return {"base": str(paths["base"]), "models": {task: str(paths[task]) for task in tasks}, "merge": merge}


def numbers(bundle):
    """Every stored number by file and tensor, and what the manifest says of them."""
    files = sorted([*bundle.glob("factors/*"), *bundle.glob("heads/*/*.safetensors"), *bundle.glob("spectra*")])
    values = {(str(path.relative_to(bundle)), key): each for path in files for key, each in load_file(path).items()}
    manifest = read_manifest(bundle)
    told = manifest.model_dump(exclude={"parameters": {"__all__": {"interference"}}, "files": True})
    return values, told, {name: each.interference or 0.0 for name, each in manifest.parameters.items()}


def assert_same(one, other):
    (values, told, overlap), (values2, told2, overlap2) = numbers(one), numbers(other)
    assert told == told2
    assert values.keys() == values2.keys()
    for key, value in values.items():
        assert value.dtype == values2[key].dtype
        torch.testing.assert_close(
            value.double(), values2[key].double(), rtol=0, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert overlap == pytest.approx(overlap2, rel=1e-9)


@pytest.mark.parametrize("settings", SETTINGS_OF if LONG else [name for name in SETTINGS_OF if name != "library"])
def test_a_bundle_that_grew_is_the_one_made_of_all_at_once(paths, tmp_path, monkeypatch, settings):
    merge = SETTINGS_OF[settings]
    whole = mergetool.run(recipe(paths, "abcd", **merge), output=tmp_path / "whole").path
    grown = mergetool.run(recipe(paths, "abc", **merge), output=tmp_path / "grown").path
    computed, compute = [], store.live_factors
    monkeypatch.setattr(store, "live_factors", lambda delta, k: computed.append(k) or compute(delta, k))
    result = change_bundle(grown, {"d": str(paths["d"])})
    assert result.path == grown
    assert len(computed) <= sum(each.policy == "svd" for each in read_manifest(whole).parameters.values())
    assert_same(grown, whole)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["grown", "whole"]
    locks = [json.loads((bundle / "mergetool.json").read_text()) for bundle in (grown, whole)]
    assert locks[0]["recipe"]["models"].keys() == locks[1]["recipe"]["models"].keys()
    assert locks[0]["inputs"] == locks[1]["inputs"]
    assert locks[0]["origins"] == locks[1]["origins"]
    assert locks[0]["output"]["files"].keys() == locks[1]["output"]["files"].keys()
    mergetool.load_bundle(grown)


def test_experts_answer_after_others_went_as_before(paths, tmp_path):
    """Nothing of those that stay is computed anew, and none of their directions lost."""
    bundle = mergetool.run(recipe(paths, "abcd", method="mass"), output=tmp_path / "out").path
    before = mergetool.load_bundle(bundle)(tasks=["b"], **text_inputs()).logits
    fewer = change_bundle(bundle, {}, ["a", "d"], Flags(tmp_path / "fewer")).path
    assert read_manifest(fewer).names == ("b", "c")
    assert read_manifest(bundle).names == ("a", "b", "c", "d")
    after = mergetool.load_bundle(fewer)(tasks=["b"], **text_inputs()).logits
    torch.testing.assert_close(after, before[:, :3], rtol=0, atol=1e-6)
    for task in "bc":
        old, new = load_file(bundle / f"factors/{task}.safetensors"), load_file(fewer / f"factors/{task}.safetensors")
        assert all(torch.equal(old[name], new[name]) for name in old)
    again = change_bundle(fewer, {"a": str(paths["a"]), "d": str(paths["d"])}).path
    assert read_manifest(again).names == ("b", "c", "a", "d")


def test_the_base_is_copied_but_in_its_own_place(paths, tmp_path):
    """It may be large, and nobody else has it where its bundle goes."""
    bundle = mergetool.run(recipe(paths, "ab", method="tsv-compress", rank=2), output=tmp_path / "out").path
    weights = bundle / "base/model.safetensors"
    before = weights.stat().st_ino
    copied = change_bundle(bundle, {}, ["a"], Flags(tmp_path / "copied")).path / "base/model.safetensors"
    assert copied.read_bytes() == weights.read_bytes()
    assert copied.stat().st_ino != before
    elsewhere = weights.rename(tmp_path / "weights")
    weights.symlink_to(elsewhere)
    change_bundle(bundle, {"c": str(paths["c"])})
    assert not weights.is_symlink()
    assert weights.stat().st_ino != before
    there = weights.stat().st_ino
    change_bundle(bundle, {}, ["a"])
    assert (weights.stat().st_ino, weights.stat().st_nlink) == (there, 1)


@pytest.mark.parametrize("kept", ["svd", "full"])
def test_a_number_that_was_spoilt_in_a_bundle_is_named(paths, tmp_path, kept):
    bundle = mergetool.run(recipe(paths, "ab", method="mass"), output=tmp_path / "out").path
    name = next(name for name, each in read_manifest(bundle).parameters.items() if each.policy == kept)
    values = load_file(bundle / "factors/b.safetensors")
    values[f"{name}.Vh" if kept == "svd" else f"{name}.delta"].view(-1)[0] = torch.nan
    save_file(values, bundle / "factors/b.safetensors")
    models = {task: {"source": str(bundle), "select": task} for task in "ab"}
    with pytest.raises(MergeError, match=rf"model 'b': {name}: holds values that are not finite"):
        mergetool.run(
            {**recipe(paths, "", method="mass"), "base": str(bundle / "base"), "models": models}, output=tmp_path / "no"
        )


def test_adapters_and_heads_that_were_saved_apart_are_added_too(tmp_path):
    folder = write_adapters(tmp_path, "llama")
    models = {task: {"source": str(folder / "base"), "adapters": [str(folder / task)]} for task in SETTINGS["llama"]}
    asked = {"base": str(folder / "base"), "merge": {"method": "tsv-compress"}}
    whole = mergetool.run({**asked, "models": models}, output=tmp_path / "whole").path
    two = {task: models[task] for task in "ab"}
    grown = mergetool.run({**asked, "models": two}, output=tmp_path / "grown").path
    change_bundle(grown, {"c": str(folder / "c")})
    assert_same(grown, whole)
    named = mergetool.run({**asked, "models": two}, output=tmp_path / "named").path
    change_bundle(named, {"c": {"adapter": str(folder / "c")}})
    assert_same(named, whole)

    places = write_models(tmp_path / "bert", tiny_model("bert"), "abcd", classes=(3, 5, 2, 4))
    head = {task: {"weights": str(places[task].parent / f"{task}.head.safetensors"), "pool": "cls"} for task in "abcd"}
    models = {task: {"source": str(places[task]), "head": {**head[task], "labels": []}} for task in "abcd"}
    asked = {"base": str(places["base"]), "merge": {"method": "mass"}}
    whole = mergetool.run({**asked, "models": models}, output=tmp_path / "heads").path
    grown = mergetool.run({**asked, "models": {task: models[task] for task in "abc"}}, output=tmp_path / "more").path
    change_bundle(grown, {"d": models["d"]})
    assert_same(grown, whole)
    assert mergetool.load_bundle(grown)(**tiny_inputs("bert")).task


def test_an_expert_comes_out_as_a_checkpoint_with_its_head_and_labels(paths, tmp_path, forks):
    exact = {"method": "tsv-compress", "rank": 1.0, "factors": "float32", "size": 100.0}
    mergetool.run(recipe(paths, "ad", **exact), output=tmp_path / "library")
    done = forks.run(["bundle", "dense", "library", "d", "-o", "d"], cwd=tmp_path, env=clean_environment())
    assert done.code == 0, done.err
    inputs = text_inputs()
    found, wanted = (expert_answer(place, KIND, inputs).logits for place in (tmp_path / "d", paths["d"]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    opened = KIND.from_pretrained(tmp_path / "d")
    assert opened.config.id2label == {number: f"d{number}" for number in range(5)}


def test_a_change_that_was_killed_is_ended_by_the_same_command(paths, tmp_path, forks):
    small = {"method": "tsv-compress", "rank": 2}
    mergetool.run(recipe(paths, "ab", **small), output=tmp_path / "old")
    mergetool.run(recipe(paths, "ab", **small), output=tmp_path / "undisturbed")
    change_bundle(tmp_path / "undisturbed", {"c": str(paths["c"])})
    command, env = ["bundle", "add", "out", f"c={paths['c']}"], clean_environment()
    said = []
    for moment in range(1, 400, 3 if LONG else 17):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        code = forks.run(
            command, cwd=tmp_path, env=env | {"KILL_AT": str(moment), "KILL_IN": str(tmp_path / "out")}
        ).code
        again = forks.run(command, cwd=tmp_path, env=env)
        said.append("done already" in again.err)
        if code == 0:
            assert again.code == 2
            break
        assert (code, again.code) == (-9, 0), (moment, again.err)
        assert_same(tmp_path / "out", tmp_path / "undisturbed")
        assert [path.name for path in tmp_path.glob("out*")] == ["out"], moment
    assert moment > 30


def test_what_cannot_be_changed_says_why_and_leaves_the_bundle(paths, tmp_path):
    bundle = mergetool.run(recipe(paths, "ab", method="mass"), output=tmp_path / "out").path
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match="expert 'a' already") as taken:
        change_bundle(bundle, {"a": str(paths["c"])})
    assert "bundle remove" in str(taken.value)
    with pytest.raises(RecipeError, match="no expert 'x'"):
        change_bundle(bundle, {}, ["x"])
    with pytest.raises(RecipeError, match="no expert would be left"):
        change_bundle(bundle, {}, ["a", "b"])
    with pytest.raises(SourceError, match="not a bundle"):
        change_bundle(paths["base"], {"c": str(paths["c"])})
    other = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(other)
    with pytest.raises(PlanError):
        change_bundle(bundle, {"c": str(other)})
    config = tiny_config(KIND)
    config.intermediate_size += 8
    KIND(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(PlanError, match="shape") as shaped:
        change_bundle(bundle, {"c": str(tmp_path / "wide")})
    assert shaped.value.fix.startswith("add a fine-tune of the bundle's base; or, in the recipe of")
    assert before == {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    factors = bundle / "factors/a.safetensors"
    factors.write_bytes(factors.read_bytes()[:-1] + b"x")
    with pytest.raises(SourceError, match="SHA-256"):
        change_bundle(bundle, {"c": str(paths["c"])})
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_a_calibration_for_other_experts_is_left_out(paths, tmp_path):
    bundle = mergetool.run(recipe(paths, "ab", method="mass"), output=tmp_path / "out").path
    names = "calibration.json", "calibration.safetensors"
    for name in names:
        (bundle / name).write_text("{}")
    told = []

    class Told(Silent):
        def say(self, text):
            told.append(text)

    change_bundle(bundle, {"c": str(paths["c"])}, progress=Told())
    assert not any((bundle / name).exists() for name in names)
    assert any("calibrate again" in text for text in told)


def test_the_commands_list_add_and_remove(paths, tmp_path, forks):
    mergetool.run(recipe(paths, "ab", method="mass"), output=tmp_path / "out")

    def run(*command):
        return forks.run(["bundle", *command], cwd=tmp_path, env=clean_environment())

    assert run("add", "out", f"c={paths['c']}", f"d={paths['d']}").code == 0
    listed = run("list", "out", "--json")
    assert [(each["name"], each["classes"]) for each in json.loads(listed.out)] == [
        ("a", 2),
        ("b", 3),
        ("c", 3),
        ("d", 5),
    ]
    assert run("remove", "out", "c", "-o", "fewer").code == 0
    assert [line.split()[0] for line in run("list", "fewer").out.splitlines()[1:]] == ["a", "b", "d"]
    assert "is not NAME=SOURCE" in run("add", "out", "e").err

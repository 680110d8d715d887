"""Bundles through recipes: built by a run, resumed after a kill, taken apart again by other recipes."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.bundle import store
from mergetool.bundle.manifest import read_manifest
from mergetool.errors import OutputError, PlanError, RecipeError, SourceError
from tests.bundle.tiny import tiny_inputs, tiny_model, write_models
from tests.files import Watch


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), tiny_model("bert"))


def recipe(models, method="mass", *, heads=True, **merge):
    references = {
        task: {"source": str(models[task])}
        | ({"head": {"weights": str(models[task].parent / f"{task}.head.safetensors")}} if heads else {})
        for task in "abc"
    }
    return {"base": str(models["base"]), "models": references, "merge": {"method": method, **merge}}


def test_a_recipe_makes_a_bundle_that_answers(models, tmp_path):
    result = mergetool.run(recipe(models), output=tmp_path / "out", workers=2)
    assert result.path == tmp_path / "out"
    assert sorted(path.name for path in result.path.iterdir()) == [
        "README.md", "base", "config.json", "factors", "heads", "manifest.json", "mergetool.json", "modeling_mass.py",
        "spectra.safetensors",
    ]  # fmt: skip
    assert not (tmp_path / "out.partial").exists()
    answer = mergetool.load_bundle(result.path)(**tiny_inputs("bert"))
    assert len(answer.task) == len(answer.tasks) == len(answer.logits) == 7
    lock = json.loads((result.path / "mergetool.json").read_text())
    assert {"manifest.json", "base/model.safetensors", "factors/a.safetensors"} <= lock["output"]["files"].keys()
    assert all(entry["sha256"] for files in lock["inputs"].values() for entry in files)


def test_a_build_says_how_far_it_is(models, tmp_path):
    told = []

    class Listening(Watch):
        def start(self, total, label, unit="B"):
            told.append([label, total, 0])

        def advance(self, num_bytes):
            told[-1][2] += num_bytes

    mergetool.run(recipe(models), output=tmp_path / "out", workers=2, progress=Listening())
    stages = {label: (total, done) for label, total, done in told}
    total, done = stages["taking models apart"]
    assert total == done > 1000
    assert "writing factors" in stages


def test_the_same_recipe_gives_the_same_bytes_whatever_the_workers(models, tmp_path):
    first = mergetool.run(recipe(models), output=tmp_path / "one", workers=1).path
    second = mergetool.run(recipe(models), output=tmp_path / "two", workers=3).path
    assert read_manifest(first).files == read_manifest(second).files


def test_a_run_that_was_killed_finds_the_factors_it_had_computed(models, tmp_path, monkeypatch):
    asked = []

    def count_then_die(delta, k):
        asked.append(k)
        if len(asked) == 20:
            raise KeyboardInterrupt
        return live_factors(delta, k)

    live_factors = store.live_factors
    monkeypatch.setattr(store, "live_factors", count_then_die)
    with pytest.raises(KeyboardInterrupt):
        mergetool.run(recipe(models), output=tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    result = mergetool.run(recipe(models), output=tmp_path / "out", workers=1)
    assert result.resumed
    num_matrices = sum(p.policy == "svd" for p in read_manifest(result.path).parameters.values())
    assert len(asked) - 1 == 3 * num_matrices
    assert not list(result.path.glob(".*"))


def test_a_build_that_is_killed_outright_goes_on(models, tmp_path, forks):
    document = recipe(models) | {"output": {"path": str(tmp_path / "out")}}
    (tmp_path / "r.yaml").write_text(json.dumps(document))
    held = ("mergetool.bundle.store:live_factors", 6)
    run = forks.open("run", tmp_path / "r.yaml", "--workers", "1", held=held)
    factors = tmp_path / "out.partial" / ".factors"
    while run.poll() is None and len(list(factors.glob("*.safetensors"))) < 5:
        time.sleep(0.001)
    run.kill()
    run.wait()
    assert not (tmp_path / "out").exists()
    assert mergetool.run(str(tmp_path / "r.yaml")).resumed
    whole = mergetool.run(recipe(models), output=tmp_path / "whole").path
    assert read_manifest(tmp_path / "out").files == read_manifest(whole).files


def test_factors_are_shared_between_runs_through_a_cache(models, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    mergetool.run(recipe(models), output=tmp_path / "mass", cache=cache)

    def never(delta, k):
        raise AssertionError("factors were computed again")

    monkeypatch.setattr(store, "live_factors", never)
    result = mergetool.run(recipe(models, "tsv-compress"), output=tmp_path / "library", cache=cache)
    fewer = recipe(models, rank=4)  # leading triplets of what is there
    del fewer["models"]["b"]
    mergetool.run(fewer, output=tmp_path / "fewer", cache=cache)
    assert read_manifest(result.path).kind == "tsv-compress"


def test_a_scale_sweep_a_subset_a_library_and_a_bundle_share_their_factors(models, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    sweep = recipe(models, "tsv-merge", heads=False, filter="fusionbench")
    plain = load_file(mergetool.run(sweep, output=tmp_path / "plain").path / "model.safetensors")
    first = mergetool.run(sweep, output=tmp_path / "first", cache=cache)
    for name, value in load_file(first.path / "model.safetensors").items():
        assert torch.equal(value, plain[name])

    def never(delta, k):
        raise AssertionError("factors were computed again")

    monkeypatch.setattr(store, "live_factors", never)
    sweep["merge"]["scale"] = 0.5
    half = load_file(mergetool.run(sweep, output=tmp_path / "half", cache=cache).path / "model.safetensors")
    base = load_file(models["base"] / "model.safetensors")
    for name, value in plain.items():
        torch.testing.assert_close(half[name] - base[name], (value - base[name]) / 2, rtol=0, atol=1e-6)
    mergetool.run(recipe(models, "mass"), output=tmp_path / "mass", cache=cache)
    mergetool.run(recipe(models, "tsv-compress"), output=tmp_path / "library", cache=cache)
    fewer = recipe(models, "tsv-merge", heads=False, rank=4)
    del fewer["models"]["b"]
    mergetool.run(fewer, output=tmp_path / "fewer", cache=cache)


def test_a_cache_that_nothing_would_use_is_an_error(models, tmp_path):
    with pytest.raises(PlanError, match="computes no factors"):
        mergetool.run(recipe(models, "ties", heads=False), output=tmp_path / "out", cache=tmp_path / "cache")


def test_the_interference_of_every_matrix_is_reported(models, tmp_path):
    result = mergetool.run(recipe(models, "tsv-merge", heads=False), output=tmp_path / "merged")
    measured = json.loads((result.path / "mergetool.json").read_text())["measured"]
    bundle = mergetool.run(recipe(models, size=9.0, factors="float32"), output=tmp_path / "bundle").path
    expected = {name: p.interference for name, p in read_manifest(bundle).parameters.items() if p.policy == "svd"}
    assert len(measured) == 19  # six a layer and the pooler's
    for name, found in measured.items():
        assert found["interference"] == pytest.approx(expected[name], rel=1e-3)
    assert not any("interference" in note for note in result.notes)  # a number without a scale tells people nothing


def test_an_expert_keeps_as_many_directions_as_hold_the_energy_asked_for(models, tmp_path):
    settings = {"rank": {"energy": 0.7}, "factors": "float32"}
    folder = mergetool.run(recipe(models, "tsv-compress", **settings), output=tmp_path / "out").path
    base = load_file(models["base"] / "model.safetensors")
    experts = [load_file(models[task] / "model.safetensors") for task in "abc"]
    for name, parameter in read_manifest(folder).parameters.items():
        if parameter.policy == "svd":
            for expert, rank in zip(experts, parameter.ranks, strict=True):
                energy = torch.linalg.svdvals((expert[name] - base[name]).double()).square().cumsum(0)
                assert energy[rank - 1] >= 0.7 * energy[-1]
                assert rank == 1 or energy[rank - 2] < 0.7 * energy[-1]
    assert mergetool.load_bundle(folder)(tasks=["b"], **tiny_inputs("bert")).task == ("b",) * 7
    everything = recipe(models, "tsv-compress", rank={"energy": 1.0})
    policies = {
        p.policy for p in read_manifest(mergetool.run(everything, output=tmp_path / "all").path).parameters.values()
    }
    assert policies == {"full"}  # all directions take more space than the matrix itself


@pytest.mark.parametrize(
    ("size", "dtype"), [(None, "bfloat16"), (None, "float32"), (0.5, "float32"), (0.3, "bfloat16")]
)
def test_factors_take_no_more_space_than_they_may(size, dtype, models, tmp_path):
    settings = {"factors": dtype} | ({"size": size} if size else {})
    folder = mergetool.run(recipe(models, "tsv-compress", heads=False, **settings), output=tmp_path / "out").path
    tensors = [value for task in "abc" for value in load_file(folder / f"factors/{task}.safetensors").values()]
    base = [value for value in load_file(models["base"] / "model.safetensors").values() if value.is_floating_point()]
    share = size or 0.59 * (2 if dtype == "float32" else 1)  # the default counts numbers, not bytes
    assert sum(value.nbytes for value in tensors) <= 1.001 * share * sum(value.nbytes for value in base)
    assert all(min(p.ranks) >= 1 for p in read_manifest(folder).parameters.values() if p.policy == "svd")


def test_the_dtype_that_models_and_factors_are_stored_in_does_not_decide_on_ranks(models, tmp_path):
    for name, path in models.items():
        half = {key: value.bfloat16() for key, value in load_file(path / "model.safetensors").items()}
        wide = {key: value.float() for key, value in half.items()}
        for kind, tensors in (("half", half), ("wide", wide)):
            shutil.copytree(path, tmp_path / kind / name)
            save_file(tensors, tmp_path / kind / name / "model.safetensors", {"format": "pt"})
    kept = []
    for kind, factors in (("wide", "bfloat16"), ("half", "bfloat16"), ("wide", "float32")):
        paths = {name: tmp_path / kind / name for name in models}
        made = recipe(paths, "tsv-compress", heads=False, factors=factors)
        result = mergetool.run(made, output=tmp_path / f"{kind}-{factors}")
        kept.append({name: each.ranks for name, each in read_manifest(result.path).parameters.items()})
    assert kept[0] == kept[1] == kept[2]


def test_an_expert_is_rebuilt_from_a_library(models, tmp_path):
    settings = {"factors": "float32", "size": 10.0}
    library = mergetool.run(recipe(models, "tsv-compress", **settings), output=tmp_path / "library").path
    one = {"models": {"b": {"source": str(library), "select": "b"}}, "merge": {"method": "passthrough"}}
    rebuilt = load_file(mergetool.run(one, output=tmp_path / "b").path / "model.safetensors")
    base, expert = (load_file(models[name] / "model.safetensors") for name in ("base", "b"))
    kept = read_manifest(library).parameters
    for name, value in expert.items():
        delta = (value - base[name]).double()
        error = float((rebuilt[name].double() - value.double()).norm())
        if kept[name].policy == "svd":  # the best there is at this rank (Eckart and Young)
            tail = torch.linalg.svdvals(delta)[min(delta.shape) // 3 :]
            assert error == pytest.approx(float(tail.norm()), rel=1e-3)
        else:
            assert error < 1e-5


def test_experts_of_a_library_can_be_merged_again(models, tmp_path):
    library = mergetool.run(recipe(models, "tsv-compress", rank=1.0), output=tmp_path / "library").path
    again = {
        "models": {task: {"source": str(library), "select": task} for task in "ab"},
        "merge": {"method": "linear"},
    }
    found = load_file(mergetool.run(again, output=tmp_path / "mean").path / "model.safetensors")
    a, b = (load_file(models[task] / "model.safetensors") for task in "ab")
    for name in a:
        torch.testing.assert_close(found[name], (a[name] + b[name]) / 2, rtol=0, atol=5e-3)  # factors are bfloat16


def test_at_full_rank_nothing_is_lost(models, tmp_path):
    settings = {"rank": 1.0, "factors": "float32"}
    library = mergetool.run(recipe(models, "tsv-compress", **settings), output=tmp_path / "library").path
    one = {"models": {"c": {"source": str(library), "select": "c"}}, "merge": {"method": "passthrough"}}
    rebuilt = load_file(mergetool.run(one, output=tmp_path / "c").path / "model.safetensors")
    for name, value in load_file(models["c"] / "model.safetensors").items():
        torch.testing.assert_close(rebuilt[name], value, rtol=0, atol=2e-6)


def test_tensors_that_are_taken_from_the_base_are_not_in_the_bundle(models, tmp_path):
    document = recipe(models, overrides=[{"match": "embeddings.*", "use": "base"}])
    manifest = read_manifest(mergetool.run(document, output=tmp_path / "out").path)
    assert not any(name.startswith("embeddings") for name in manifest.parameters)
    assert mergetool.load_bundle(tmp_path / "out")(**tiny_inputs("bert")).logits.shape[0] == 7


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda r: r["models"]["b"].pop("head"), PlanError, "task 'b' has no head"),
        (lambda r: r["merge"].update(router={"layers": ["*.nothing.*"]}), PlanError, "no changed matrix"),
        (lambda r: r["merge"].update(rank=-1), RecipeError, "rank"),
        (lambda r: r["merge"].update(router={"treshold": 0.1}), RecipeError, "treshold"),
        (lambda r: r["merge"].update(router={"redundancy": 0.3}), RecipeError, "would have no effect"),
        (lambda r: r["models"]["a"]["head"].update(weights="nowhere.safetensors"), SourceError, "head of task 'a'"),
        (lambda r: r["models"]["a"]["head"].update(labels=["x"]), PlanError, "1 labels for 3 classes"),
        (lambda r: r.pop("base"), RecipeError, "common ancestor"),
    ],
)
def test_what_cannot_work_is_said(models, tmp_path, change, error, says):
    document = recipe(models)
    change(document)
    with pytest.raises(error, match=says):
        mergetool.run(document, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_where_nothing_reads_it_is_an_error(models, tmp_path):
    with pytest.raises(RecipeError, match="does not use heads"):
        mergetool.run(recipe(models, "ties"), output=tmp_path / "out")


def test_a_bundle_is_no_model_unless_one_says_which_expert(models, tmp_path):
    library = mergetool.run(recipe(models, "tsv-compress"), output=tmp_path / "library").path
    whole = {"models": {"x": str(library)}, "merge": {"method": "passthrough"}}
    with pytest.raises(SourceError, match="bundle of several experts"):
        mergetool.run(whole, output=tmp_path / "out")
    wrong = {"models": {"x": {"source": str(library), "select": "nope"}}, "merge": {"method": "passthrough"}}
    with pytest.raises(SourceError, match="no task 'nope'"):
        mergetool.run(wrong, output=tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        mergetool.run(recipe(models), output=library)

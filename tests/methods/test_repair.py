"""REPAIR as the last step of a recipe: what it changes, what it needs, and how a killed run ends."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.errors import PlanError, RecipeError, SourceError
from mergetool.testing.toys import assert_same_bytes
from tests.alignment import nets

BUILD = """
from tests.arch.networks import MLP, ResNetCifar

def mlp():
    return MLP((6, 20, 16, 4))

def resnet():
    return ResNetCifar("B")

def nothing():
    return 3

def leaves():
    raise SystemExit

def fails():
    raise OSError("no such thing")
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "build.py").write_text(BUILD)
    generator = torch.Generator().manual_seed(0)
    save_file({"x": torch.randn(250, 6, generator=generator)}, tmp_path / "rows.safetensors")
    save_file({"x": torch.randn(60, 3, 8, 8, generator=generator)}, tmp_path / "images.safetensors")
    return tmp_path


def run(path, **flags):
    return mergetool.run(path, trust_code=True, **flags)


def recipe(folder, models, repair, method="git-rebasin", architecture="mlp", **output):
    document = {
        "models": nets.write(folder / "models", models) if not (folder / "models").exists() else _paths(folder, models),
        "architecture": architecture,
        "merge": {"method": method, "repair": repair},
        "output": {"path": str(folder / "out"), **output},
    }
    (folder / "recipe.json").write_text(json.dumps(document))
    return folder / "recipe.json"


def _paths(folder, models):
    return {name: str(folder / "models" / name) for name in models}


def unrelated():
    return {"abc"[i]: nets.mlp(seed=i) for i in range(3)}


MLP_REPAIR = {"mode": "full", "data": "rows.safetensors", "network": "build.py:mlp"}


@pytest.mark.parametrize("method", ["c2m3", "git-rebasin", "merge-many"])
def test_hidden_layers_are_corrected_and_the_rest_is_as_without(method, folder):
    plain = load_file(run(recipe(folder, unrelated(), {}, method)).path / "model.safetensors")
    path = run(recipe(folder, unrelated(), MLP_REPAIR, method), overwrite=True).path
    repaired = load_file(path / "model.safetensors")
    changed = {name for name in plain if not torch.equal(plain[name], repaired[name])}
    assert changed == {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"}
    ratios = json.loads((path / "alignment" / "repair.json").read_text())["std over parents'"]
    assert all(0.2 < ratio < 1 for ratio in ratios.values())
    files = json.loads((path / "mergetool.json").read_text())["output"]["files"]
    assert "alignment/repair.safetensors" in files


def test_statistics_of_batch_norm_are_measured_anew(folder):
    models = {"ab"[i]: nets.resnet(seed=i) for i in range(2)}
    options = {"mode": "bn-stats", "data": "images.safetensors", "network": "build.py:resnet"}
    plain = load_file(run(recipe(folder, models, {}, architecture="resnet")).path / "model.safetensors")
    path = run(recipe(folder, models, options, architecture="resnet"), overwrite=True).path
    repaired = load_file(path / "model.safetensors")
    for name in plain:
        assert torch.equal(plain[name], repaired[name]) != name.endswith(("running_mean", "running_var")), name


def test_a_network_that_config_json_tells_needs_no_code(folder):
    state, config, _, _ = nets.tiny_transformer("ViTForImageClassification")
    models = {"ab"[i]: nets.noisy(state, i, 0.5) for i in range(2)}
    save_file({"pixel_values": torch.randn(20, 3, 8, 8)}, folder / "pixels.safetensors")
    document = {
        "models": nets.write(folder / "models", models, config),
        "merge": {"method": "git-rebasin", "repair": {"mode": "full", "data": str(folder / "pixels.safetensors")}},
        "output": {"path": str(folder / "out")},
    }
    path = mergetool.run(document).path
    assert len(json.loads((path / "alignment" / "repair.json").read_text())["std over parents'"]) > 8


def test_memory_and_files_give_the_same_bits_also_in_bfloat16(folder, monkeypatch):
    models = {name: {k: x.bfloat16() for k, x in state.items()} for name, state in unrelated().items()}
    path = run(recipe(folder, models, MLP_REPAIR, shard_size=1000)).path
    monkeypatch.chdir(folder)
    memory = mergetool.merge_state_dicts(
        {"method": "git-rebasin", "repair": MLP_REPAIR}, models, architecture="mlp", trust_code=True
    )
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 1
    assert_same_bytes({name: x for shard in shards for name, x in load_file(shard).items()}, memory)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_killed_while_tensors_are_replaced_ends_the_same(after, folder, monkeypatch):
    whole = run(recipe(folder, unrelated(), MLP_REPAIR), output=folder / "whole")
    put, calls = mergetool.engine.worker.Worker._put, []

    def dies(self, step, start, merged, notes):
        calls.append(step.spec.name)
        if len(calls) > 6 + after:  # six tensors are merged first
            raise KeyboardInterrupt
        put(self, step, start, merged, notes)

    monkeypatch.setattr("mergetool.engine.worker.Worker._put", dies)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(folder, unrelated(), MLP_REPAIR))
    monkeypatch.undo()
    again = run(recipe(folder, unrelated(), MLP_REPAIR))
    assert again.resumed
    assert (again.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def refused(folder, error, models=None, **changes):
    with pytest.raises(error) as caught:
        run(recipe(folder, models or unrelated(), {**MLP_REPAIR, **changes}))
    return str(caught.value)


def test_what_is_missing_or_does_not_fit_is_named(folder):
    assert "needs data" in refused(folder, RecipeError, data=None)
    assert "no effect" in refused(folder, RecipeError, mode="none")
    assert "no such file" in refused(folder, SourceError, network="elsewhere.py:mlp").lower()
    assert "merge.repair.network" in refused(folder, RecipeError, network="build.mlp")
    assert "AttributeError" in refused(folder, PlanError, network="build.py:lost")
    assert "no such thing" in refused(folder, PlanError, network="build.py:fails")
    assert "returned a int" in refused(folder, PlanError, network="build.py:nothing")
    assert "has no tensor 'layers.0.bias'" in refused(folder, PlanError, network="build.py:resnet")
    assert "there is no config.json" in refused(folder, PlanError, network=None)
    assert "cannot be run through" in refused(folder, PlanError, data="images.safetensors")
    assert not list(folder.glob("out*"))  # said before anything was searched, and nothing is left
    assert "no batch norm" in refused(folder, PlanError, mode="bn-stats")
    assert "cannot be read as data" in refused(folder, SourceError, data="build.py")
    assert "SystemExit" in refused(folder, PlanError, network="build.py:leaves")
    save_file({"x": torch.full((3, 6), torch.nan)}, folder / "nan.safetensors")
    assert "not finite" in refused(folder, SourceError, data="nan.safetensors")
    save_file({"x": torch.zeros(3, 6), "y": torch.zeros(4, 6)}, folder / "uneven.safetensors")
    assert "one row per sample" in refused(folder, SourceError, data="uneven.safetensors")
    save_file({"x": torch.zeros(3, 6), "y": torch.zeros(3, 6)}, folder / "two.safetensors")
    assert "not 'y'" in refused(folder, SourceError, data="two.safetensors")


SPY = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
from tests.methods.test_repair import BUILD
exec(BUILD)
"""


def test_a_recipe_runs_no_code_unless_the_user_says_so(folder, monkeypatch, forks):
    (folder / "spy.py").write_text(SPY)
    options = {**MLP_REPAIR, "network": "spy.py:mlp"}
    path = recipe(folder, unrelated(), options)
    with pytest.raises(RecipeError, match="spy") as caught:
        mergetool.run(path)
    assert "merge.repair.network" in caught.value.where
    assert "--trust-code" in caught.value.fix
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeError, match="spy"):
        mergetool.merge_state_dicts({"method": "git-rebasin", "repair": options}, unrelated(), architecture="mlp")
    mergetool.plan(path)
    assert not (folder / "spy.ran").exists()
    assert not list(folder.glob("out*"))
    assert forks.open("run", path).returncode == 2
    assert not (folder / "spy.ran").exists()
    assert forks.open("run", path, "--trust-code").returncode == 0
    assert (folder / "spy.ran").exists()


def test_code_and_data_are_in_the_lock_and_a_change_of_them_starts_over(folder, monkeypatch):
    path = recipe(folder, unrelated(), MLP_REPAIR)
    monkeypatch.setattr("mergetool.outputs.output.describe_run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(path)
    monkeypatch.undo()
    save_file({"x": torch.randn(250, 6, generator=torch.Generator().manual_seed(1))}, folder / "rows.safetensors")
    result = run(path)
    assert not result.resumed
    inputs = json.loads((result.path / "mergetool.json").read_text())["inputs"]
    for field, name in (("merge.repair.data", "rows.safetensors"), ("merge.repair.network", "build.py")):
        assert inputs[field][0]["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()

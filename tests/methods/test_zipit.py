"""ZipIt!: planted copies, features that two tasks share, and what cannot be zipped."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.errors import PlanError, RecipeError
from mergetool.kernels.zipping import zip_units
from mergetool.testing.toys import assert_near
from tests.alignment import nets
from tests.arch.networks import MLP

BUILD = "from tests.arch.networks import MLP\n\ndef build():\n    return MLP((6, 20, 16, 4))\n"

EMBEDDED = """from torch import nn, tensor

def build():
    return nn.Sequential(nn.Embedding(9, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)), tensor([[1, 2, 3]])
"""


def merge(models, architecture="mlp", **settings):
    return mergetool.merge_state_dicts({"method": "zipit", **settings}, models, architecture=architecture)


@pytest.fixture
def match(tmp_path):
    (tmp_path / "nets.py").write_text(BUILD)
    save_file({"x": torch.randn(200, 6, generator=torch.Generator().manual_seed(0))}, tmp_path / "x.safetensors")
    return {"by": "activations", "data": str(tmp_path / "x.safetensors"), "network": f"{tmp_path}/nets.py:build"}


@pytest.mark.parametrize("num_models", [2, 3])
def test_copies_in_any_order_merge_to_the_first(num_models, match):
    models = nets.copies(nets.mlp(), num_models, architecture="mlp")
    assert_near(merge(models), models["a"], 1e-5)
    section = {"method": "zipit", "match": match}
    by_data = mergetool.merge_state_dicts(section, models, architecture="mlp", trust_code=True)
    assert_near(by_data, models["a"], 1e-5)


def test_channels_and_their_statistics_are_joined():
    models = nets.copies(nets.resnet(), 2, architecture="resnet")
    floats = {name: x for name, x in models["a"].items() if x.is_floating_point()}
    merged = merge(models, "resnet")
    assert_near({name: merged[name] for name in floats}, floats, 1e-5)


def two_tasks():
    """Networks of six units, of which each uses three that the other lacks, each of them twice, and their inputs."""
    generator = torch.Generator().manual_seed(1)
    rows, heads = torch.randn(6, 8, generator=generator), torch.randn(4, 6, generator=generator)
    models = {}
    for name, mine in (("a", [0, 1, 2]), ("b", [3, 4, 5])):
        twice = mine + mine
        weights = {"layers.0.weight": rows[twice], "layers.0.bias": torch.zeros(6), "layers.1.bias": torch.zeros(4)}
        models[name] = {**weights, "layers.1.weight": heads[:, twice] / 2}
    return models, torch.randn(50, 8, generator=generator)


def answers(state, x):
    net = MLP((8, 6, 4))
    net.load_state_dict(state)
    with torch.no_grad():
        return net(x)


def test_what_is_twice_in_one_model_makes_room_for_what_only_the_other_has():
    models, x = two_tasks()
    wanted = (answers(models["a"], x) + answers(models["b"], x)) / 2
    zipped = answers(merge(models, within=1.0), x)
    torch.testing.assert_close(zipped, wanted, atol=1e-5, rtol=1e-5)
    assert (answers(merge(models, within=0.0), x) - wanted).norm() > 0.1 * wanted.norm()
    assert (answers(mergetool.merge_state_dicts("linear", models), x) - wanted).norm() > 0.1 * wanted.norm()


def test_units_are_joined_by_hand():
    owners = np.array([0, 0, 1, 1])
    alike = np.array([[1, 0.9, 0.8, 0], [0.9, 1, 0, 0.1], [0.8, 0, 1, 0.2], [0, 0.1, 0.2, 1]])
    assert zip_units(alike, owners, 2, 1.0, 1.0).tolist() == [0, 0, 1, 1]  # 0 and 1, then 2 and 3
    assert zip_units(alike, owners, 2, 1.0, 0.0).tolist() == [0, 1, 0, 1]
    alone = np.eye(3)
    assert zip_units(alone, np.array([0, 0, 0]), 1, 1.0, 0.0).tolist() == [0, 0, 0]  # though it has no budget


def test_half_precision_is_rounded_once():
    models = {name: {k: x.bfloat16() for k, x in nets.mlp(seed).items()} for seed, name in enumerate("ab")}
    wide = {name: {k: x.float() for k, x in state.items()} for name, state in models.items()}
    narrow = merge(models)
    for name, x in merge(wide).items():
        assert torch.equal(narrow[name], x.bfloat16()), name


def test_transformers_are_zipped_where_units_are_plain(tmp_path):
    state, config, _, _ = nets.tiny_transformer("BertForMaskedLM")
    models = {"ab"[i]: nets.noisy(state, i, 0.02) for i in range(2)}
    document = {"models": nets.write(tmp_path / "m", models, config), "merge": {"method": "zipit"}}
    merged = load_file(
        mergetool.run({**document, "output": {"path": str(tmp_path / "out")}}).path / "model.safetensors"
    )
    assert_near(merged, {name: (models["a"][name] + x) / 2 for name, x in models["b"].items()}, 1e-5)


def test_what_cannot_be_zipped_is_told(tmp_path):
    with pytest.raises(RecipeError, match="no parents to be repaired"):
        merge({"a": nets.mlp(), "b": nets.mlp()}, repair={"mode": "full", "data": "x.safetensors"})
    state = {"0.weight": torch.randn(9, 7), "2.weight": torch.randn(3, 7)}  # an embedding looks like a head
    (tmp_path / "nets.py").write_text(EMBEDDED)
    with pytest.raises(PlanError, match="no units that could be mixed"):
        mergetool.merge_state_dicts(
            "zipit", {"a": state, "b": state}, architecture=f"{tmp_path}/nets.py:build", trust_code=True
        )


def test_a_killed_run_goes_on_with_the_maps_it_found(tmp_path, monkeypatch):
    models = nets.write(tmp_path / "m", {name: nets.mlp(seed) for seed, name in enumerate("ab")})
    document = {"models": models, "architecture": "mlp", "merge": {"method": "zipit"}}
    whole = mergetool.run({**document, "output": {"path": str(tmp_path / "whole")}}).path
    again = {**document, "output": {"path": str(tmp_path / "again")}}
    monkeypatch.setattr("mergetool.outputs.output.describe_run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mergetool.run(again)
    monkeypatch.undo()
    monkeypatch.setattr("mergetool.methods.zipit.ZipIt.maps", lambda *_: 1 / 0)
    result = mergetool.run(again)
    assert result.resumed
    assert (result.path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (result.path / "alignment" / "maps.safetensors").is_file()

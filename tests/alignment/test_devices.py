"""Alignment and REPAIR on a device: permutations of the CPU, and its result up to rounding."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.alignment.fitted import PERMUTATIONS
from mergetool.testing.toys import assert_near, read
from tests.alignment import nets
from tests.devices import STAND_IN, every_device, present
from tests.files import LONG
from tests.turns import some

METHODS = ["c2m3", "git-rebasin", "merge-many"]
MIXED = [("zipit", "weights"), ("ot-fusion", "weights"), ("zipit", "activations"), ("ot-fusion", "activations")]
"""Methods that mix units, and what tells these apart."""
REPAIRED = [("mlp", "full"), ("resnet", "full"), ("resnet", "bn-stats")]
NETWORKS = """
from tests.arch.networks import MLP, ResNetCifar

def mlp():
    return MLP((6, 20, 16, 4))

def resnet():
    return ResNetCifar("B")
"""


class Said:
    """What a run tells."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def start(self, total, label, unit="B"):
        pass

    advance = stop = lambda *_: None


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "build.py").write_text(NETWORKS)
    save_file({"x": torch.randn(150, 6, generator=generator)}, tmp_path / "mlp.safetensors")
    save_file({"x": torch.randn(60, 3, 8, 8, generator=generator)}, tmp_path / "resnet.safetensors")
    return tmp_path


def merged(folder, models, device, architecture="mlp", room=None, **section):
    paths = folder / "models"
    if not paths.exists():
        nets.write(paths, models)
    recipe = {
        "models": {name: str(paths / name) for name in models},
        **({"architecture": architecture} if architecture else {}),
        "merge": {"method": "c2m3", **section},
    }
    said = Said()
    with present(device, room):
        out = folder / f"{device} {room}".replace(":", "")
        result = mergetool.run(recipe, output=out, device=device, trust_code=True, progress=said)
    return result.path, said.lines


def by_activations(folder):
    return {"by": "activations", "data": f"{folder}/mlp.safetensors", "network": f"{folder}/build.py:mlp"}


def lock_of(path):
    return json.loads((path / "mergetool.json").read_text())


@every_device
@pytest.mark.parametrize("method", METHODS)
def test_planted_orders_are_found_on_a_device_as_on_the_cpu(method, device, folder):
    models = nets.copies(nets.mlp(widths=(6, 40, 40, 4)), 4, architecture="mlp", noise=0.1)
    align = {"align": {"releases": 2}} if method == "c2m3" else {}
    (there, _), (here, _) = (merged(folder, models, each, method=method, **align) for each in (device, "cpu"))
    assert lock_of(there)["run"]["device"].startswith(device)
    assert (there / PERMUTATIONS).read_bytes() == (here / PERMUTATIONS).read_bytes()
    assert_near(read(there), read(here))


@every_device
@pytest.mark.parametrize(("method", "by"), MIXED if LONG else MIXED[1:3])
def test_units_are_mixed_on_a_device_as_on_the_cpu(method, by, device, folder):
    models = nets.copies(nets.mlp(), 3, architecture="mlp", noise=0.1)
    section = {"method": method} | ({"masses": "outgoing"} if method == "ot-fusion" else {})
    section |= {"match": by_activations(folder)} if by == "activations" else {}
    (there, _), (here, _) = (merged(folder, models, each, **section) for each in (device, "cpu"))
    assert lock_of(there)["run"]["device"].startswith(device)
    assert_near(read(there), read(here))


@every_device
@pytest.mark.parametrize("method", METHODS if LONG else METHODS[1:2])
def test_units_are_matched_by_what_they_say_on_a_device_as_on_the_cpu(method, device, folder):
    models = nets.copies(nets.mlp(), 3, architecture="mlp", noise=0.1)
    section = {"method": method, "match": by_activations(folder)}
    (there, _), (here, _) = (merged(folder, models, each, **section) for each in (device, "cpu"))
    assert (there / PERMUTATIONS).read_bytes() == (here / PERMUTATIONS).read_bytes()
    assert_near(read(there), read(here))


@every_device
@pytest.mark.parametrize("mode", ["joint", "block"] if LONG else ["block"])
def test_soft_steps_and_signs_are_taken_on_a_device(mode, device, folder):
    state, config, _, _ = nets.tiny_transformer("LlamaForCausalLM", num_hidden_layers=2 if LONG else 1)
    models = nets.copies(state, 3, config=config, noise=0.05)
    nets.write(folder / "models", models, config)
    align = {"mode": mode, "init": "barycenter", "starts": 1, "iterations": 2, "releases": 1}
    (there, _), (here, _) = (merged(folder, models, each, None, align=align) for each in (device, "cpu"))
    assert (there / PERMUTATIONS).read_bytes() == (here / PERMUTATIONS).read_bytes()
    assert_near(read(there), read(here))


@every_device
@pytest.mark.parametrize(("architecture", "mode"), some(REPAIRED))
def test_a_device_repairs_as_the_cpu_does(architecture, mode, device, folder):
    state = {"mlp": nets.mlp, "resnet": nets.resnet}[architecture]()
    models = nets.copies(state, 2, architecture=architecture, noise=0.3)
    repair = {"mode": mode, "data": str(folder / f"{architecture}.safetensors")}
    repair |= {"network": f"{folder / 'build.py'}:{architecture}"}
    section = {"method": "git-rebasin", "repair": repair}
    (there, _), (here, _) = (merged(folder, models, each, architecture, **section) for each in (device, "cpu"))
    assert (there / "alignment/repair.safetensors").is_file()
    assert_near(read(there), read(here), 1e-4)
    for name, tensor in load_file(here / "alignment/repair.safetensors").items():
        found = load_file(there / "alignment/repair.safetensors")[name]
        assert float((found - tensor).norm()) <= 1e-5 * float(tensor.norm())


def test_what_does_not_fit_a_device_is_aligned_on_the_cpu_and_says_so(folder):
    models = nets.copies(nets.mlp(widths=(6, 40, 40, 4)), 3, architecture="mlp", noise=0.1)
    there, said = merged(folder, models, STAND_IN, room=1000)
    here, _ = merged(folder, models, "cpu")
    assert f"{STAND_IN} has too little memory: aligned on the CPU" in said
    assert (there / PERMUTATIONS).read_bytes() == (here / PERMUTATIONS).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_sums_over_whole_models_need_float64(method, folder):
    models = nets.write(folder / "models", nets.copies(nets.mlp(), 2, architecture="mlp"))
    assert mergetool.plan({"models": models, "architecture": "mlp", "merge": {"method": method}}).needs_float64

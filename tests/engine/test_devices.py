"""Devices: what their names mean, and what happens when one has no memory left."""

import json
from dataclasses import replace

import pytest
import torch

from mergetool.engine import devices
from mergetool.engine.devices import devices_here, own_device, usable_device
from mergetool.engine.run import Flags, run_recipe
from mergetool.engine.worker import Worker
from mergetool.errors import PlanError
from mergetool.methods.base import TensorMethod
from mergetool.planning import make_plan
from mergetool.planning.graph import SLICE_ELEMENTS
from mergetool.recipe import load_recipe
from tests.elsewhere import DEVICE, Elsewhere
from tests.files import content, tensors, write_model, write_recipe

SHAPES = {"w": (900, 1000), "v": (7,)}


class Greedy(TensorMethod):
    """The sum of two models; needs a device with room for more than `room` elements."""

    needs_base = "unused"
    granularity = "element"
    room: int = 0

    def merge(self, group, p, stats):
        if group.models[0].numel() > self.room:
            raise torch.cuda.OutOfMemoryError("no room")
        return group.models[0] + group.models[1]


class Slots:
    def __init__(self, plan):
        self.bytes = {step.spec.name: bytearray(step.spec.num_bytes) for step in plan.steps}

    def write(self, shard, name, begin, data):
        self.bytes[name][begin : begin + len(data)] = data


@pytest.fixture
def recipe(tmp_path):
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, tensors(seed, SHAPES))
    return write_recipe(tmp_path / "r.yaml", models={"a": "a", "b": "b"}, merge={"method": "linear"})


def test_a_device_without_memory_gets_smaller_slices_and_says_so(recipe):
    plan = make_plan(load_recipe(recipe))
    slots = Slots(plan)
    worker = Worker(plan, slots, torch.device("cpu"))
    a, b = tensors(0, SHAPES), tensors(1, SHAPES)
    step = next(step for step in plan.steps if step.spec.name == "w")
    room = SLICE_ELEMENTS // 4
    notes = worker.perform(
        replace(step, operation=replace(step.operation, method=Greedy(room=room))), 0, step.spec.num_elements, {}
    )
    assert notes == [f"the device has too little memory: slices of {n} elements" for n in (2 * room, room)]
    assert bytes(slots.bytes["w"]) == (a["w"] + b["w"]).numpy().tobytes()


def test_names_of_devices(monkeypatch):
    assert [own_device(name) for name in ("cpu", "cuda:3", "mps")] == ["cpu", "cuda:3", "mps"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert own_device("cuda") == "cuda:2"
    with pytest.raises(PlanError, match="cannot be used"):
        usable_device("nonsense")


def test_auto_is_the_first_device_that_can_be_used(monkeypatch):
    assert usable_device("auto") == (devices_here() or ["cpu"])[0]
    for here, chosen in (([], "cpu"), (["cuda:99"], "cpu"), (["cuda:99", str(DEVICE)], str(DEVICE))):
        monkeypatch.setattr(devices, "devices_here", lambda found=here: found)
        with Elsewhere():
            assert usable_device("auto") == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_auto_takes_the_gpu_and_the_lock_says_so(recipe, tmp_path):
    run_recipe(load_recipe(recipe), Flags(output=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "mergetool.json").read_text())["run"]["device"] == "cuda:0"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_gives_nearly_the_bytes_of_the_cpu(recipe, tmp_path):
    for device in ("cpu", "cuda"):
        run_recipe(load_recipe(recipe), Flags(output=tmp_path / device, device=device))
    assert content(tmp_path / "cpu") == content(tmp_path / "cuda")

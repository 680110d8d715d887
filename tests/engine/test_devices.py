"""Devices: what their names mean, and what happens when one has no memory left."""

import json
from dataclasses import replace
from math import prod
from unittest.mock import patch

import pytest
import torch

from mergetool.engine import devices, transfers, worker
from mergetool.engine.device_worker import DeviceWorker, slice_elements
from mergetool.engine.devices import devices_here, own_device, usable_device
from mergetool.engine.run import Flags, run_recipe
from mergetool.engine.schedule import Schedule
from mergetool.engine.sinks import MemorySink
from mergetool.errors import PlanError
from mergetool.kernels import spectral
from mergetool.methods.base import TensorMethod
from mergetool.outputs.journal import Journal
from mergetool.planning import cost, make_plan
from mergetool.planning.cost import bytes_per_element, step_memory
from mergetool.planning.graph import SLICE_ELEMENTS
from mergetool.recipe import load_recipe
from mergetool.tensors.source import MemorySource
from mergetool.testing.runs import cut_finely
from tests.elsewhere import DEVICE, Elsewhere
from tests.files import content, tensors, write_model, write_recipe
from tests.streams import streaming

SHAPES = {"w": (900, 1000), "v": (7,)}
SQUARE = (192, 192)
SEARCHING = ("dc-merge", "lors", "tsv-merge")
"""Methods that look for the leading directions of several models at once."""


class Greedy(TensorMethod):
    """The sum of two models; needs a device with room for more than `room` elements."""

    needs_base = "unused"
    granularity = "element"
    room: int = 0

    def merge(self, group, p, stats):
        if group.models[0].device.type != "cpu" and group.models[0].numel() > self.room:
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


@pytest.fixture
def step_of(recipe):
    """The plan, and the step of the large tensor, done by a greedy method."""
    plan = make_plan(load_recipe(recipe))
    step = next(step for step in plan.steps if step.spec.name == "w")
    return plan, lambda room: replace(step, operation=replace(step.operation, method=Greedy(room=room)))


@pytest.mark.parametrize(("room", "told"), [(1 << 18, 2), (0, 7)])
def test_a_device_without_memory_gets_smaller_slices_then_the_cpu_and_says_so(step_of, room, told):
    plan, step = step_of
    slots = Slots(plan)
    with Elsewhere(), streaming(), patch.object(devices, "LEAST_SLICE", 1 << 14):
        worker = DeviceWorker(plan, slots, DEVICE, length=1 << 20)
        notes = worker.perform(step(room), 0, 900_000, {})
    halved = [f"the device has too little memory: slices of {1 << n} elements" for n in range(19, 13, -1)]
    assert notes == (halved[:told] if room else [*halved, "the device has too little memory: merged on the CPU"])
    a, b = tensors(0, SHAPES), tensors(1, SHAPES)
    assert bytes(slots.bytes["w"]) == (a["w"] + b["w"]).numpy().tobytes()


def test_slices_are_as_long_as_the_memory_of_a_device_allows(recipe):
    plan = make_plan(load_recipe(recipe))
    each = bytes_per_element(plan)
    with Elsewhere():
        assert slice_elements(plan, DEVICE, 4) == SLICE_ELEMENTS  # nothing is known
        for free, workers, expected in (
            (1 << 50, 4, 24),
            (each << 20, 1, 19),
            (each << 20, 4, 17),
            (each << 24, 1, 23),
        ):
            with streaming(free):
                assert slice_elements(plan, DEVICE, workers) == 1 << expected


def test_whole_tensors_wait_for_each_other_where_a_device_has_too_little_memory(tmp_path, monkeypatch):
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, tensors(seed, {f"{layer}": (768, 512) for layer in range(4)}))
    recipe = write_recipe(tmp_path / "r.yaml", base="base", models={"a": "a", "b": "b"}, merge={"method": "iso-c"})
    held, most, perform = set(), [], DeviceWorker.perform

    def performing(self, step, *given):
        held.add(step.index)
        most.append(len(held))
        done = perform(self, step, *given)
        held.discard(step.index)
        return done

    monkeypatch.setattr(DeviceWorker, "perform", performing)
    step = step_memory(plan := make_plan(load_recipe(recipe)), plan.steps[0], on_device=True)
    for room, together in ((1.5, 1), (2.5, 2)):
        most.clear()
        _run(recipe, tmp_path / f"{together}", free=2 * int(room * step), workers=4)
        assert max(most) == together


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        *((method, SQUARE) for method in (*SEARCHING, "iso-c", "iso-cts", "knots", "opcm", "star", "wudi")),
        *((method, (96, 384)) for method in ("tsv-merge", "knots", "wudi")),
    ],
)
def test_whole_tensors_take_no_more_memory_of_a_device_than_is_reckoned_with(method, shape, monkeypatch):
    monkeypatch.setattr(spectral, "_SMALLEST", 96)
    for module in (cost, worker):  # or whatever is small would lie in buffers of this length
        monkeypatch.setattr(module, "SLICE_ELEMENTS", 0)
    names = ["base", *"abcdefgh"]
    sources = {name: MemorySource(tensors(seed, {"w": shape}), name) for seed, name in enumerate(names)}
    recipe = {"base": "unused", "models": dict.fromkeys(names[1:], "unused"), "merge": {"method": method}}
    plan = make_plan(load_recipe(recipe), sources=sources)
    with Elsewhere(), streaming() as streams:
        DeviceWorker(plan, MemorySink(plan), DEVICE).perform(plan.steps[0], 0, prod(shape), {})
    reckoned = step_memory(plan, plan.steps[0], on_device=True)
    most = streams.counts["most"] - transfers.PIECES * transfers.PIECE_BYTES
    assert most < reckoned
    assert method not in SEARCHING or shape != SQUARE or most > 0.8 * reckoned


def test_small_tensors_and_copies_stay_on_the_cpu(recipe):
    plan = make_plan(load_recipe(recipe, ["merge.overrides=[{match: w, use: a}]"]))
    slots = Slots(plan)
    with Elsewhere(), streaming() as streams, patch.object(devices, "LEAST_SLICE", 1 << 14):
        worker = DeviceWorker(plan, slots, DEVICE)
        for step in plan.steps:
            worker.perform(step, 0, step.spec.num_elements, {})
        assert streams.counts["copies"] == 0
    assert bytes(slots.bytes["w"]) == tensors(0, SHAPES)["w"].numpy().tobytes()


def test_units_that_a_killed_run_has_done_are_not_taken_again(recipe, tmp_path, monkeypatch):
    seen, write = [], Journal.unit

    def unit(self, *about):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(about)
        write(self, *about)

    with cut_finely(1 << 16, 1 << 17):
        monkeypatch.setattr(Journal, "unit", unit)
        with pytest.raises(KeyboardInterrupt):
            _run(recipe, tmp_path / "there", workers=1)
        monkeypatch.setattr(Journal, "unit", write)
        result, streams = _run(recipe, tmp_path / "there", workers=1)
    assert result.resumed
    assert streams.counts["up"] < 2 * 4 * (900_007 - 2 * (1 << 17)) + 1
    run_recipe(load_recipe(recipe), Flags(output=tmp_path / "here", device="cpu"))
    assert content(result.path) == content(tmp_path / "here")


def _run(recipe, output, free=1 << 40, **flags):
    """On the stand-in, with threads."""

    def there(self, work=Schedule.work):
        with Elsewhere():  # modes belong to threads
            work(self)

    with Elsewhere(), streaming(free) as streams, patch.object(Schedule, "work", there):
        return run_recipe(load_recipe(recipe), Flags(output=output, device=str(DEVICE), **flags)), streams


def test_a_worker_takes_several_units_to_a_device_at_once_and_each_is_journalled(recipe, tmp_path, monkeypatch):
    with cut_finely(1 << 16, 1 << 17):
        seen = []
        monkeypatch.setattr(
            Journal, "unit", lambda self, *unit, write=Journal.unit: seen.append(unit) or write(self, *unit)
        )
        result, streams = _run(recipe, tmp_path / "there", workers=2)
    assert [start for _, step, start, _ in seen if step.name == "w"] == list(range(0, 900_000, 1 << 17))
    assert streams.counts["copies"] == 6  # two up, one down, of each tensor
    run_recipe(load_recipe(recipe), Flags(output=tmp_path / "here", device="cpu"))
    assert content(result.path) == content(tmp_path / "here")


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
def test_auto_says_in_the_lock_what_it_took(recipe, tmp_path):
    run_recipe(load_recipe(recipe), Flags(output=tmp_path / "out"))
    run = json.loads((tmp_path / "out" / "mergetool.json").read_text())["run"]
    assert run["device"] in ("cpu", "cuda:0")
    assert " expected, cuda:0: " in run["device_chosen"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_gives_nearly_the_bytes_of_the_cpu(recipe, tmp_path):
    for device in ("cpu", "cuda"):
        run_recipe(load_recipe(recipe), Flags(output=tmp_path / device, device=device))
    assert content(tmp_path / "cpu") == content(tmp_path / "cuda")

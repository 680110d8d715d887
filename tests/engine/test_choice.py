"""`auto`: the faster of CPU and device, by the plan and by what this machine is known to do."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from mergetool.cli.app import app
from mergetool.engine import choice, devices, rates
from mergetool.engine.choice import settled
from mergetool.engine.rates import Rates, measure, rates_of
from mergetool.engine.run import Flags, run_recipe
from mergetool.engine.schedule import Schedule
from mergetool.recipe import load_recipe
from tests.elsewhere import DEVICE, Elsewhere
from tests.files import tensors, write_model, write_recipe
from tests.planning.test_duration import plan_of
from tests.streams import streaming

FAST = Rates(
    element_rate=1e8,
    hash_rate=1e12,
    copy_rate=1e12,
    disk_read=1e12,
    disk_write=1e12,
    bus=1e11,
    device_memory=1e12,
    device_flops=1e13,
    device_start=0.0,
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "devices_here", lambda: [str(DEVICE)])


def plant(monkeypatch, **changes):
    monkeypatch.setattr(rates, "rates_of", lambda device, threads: replace(FAST, **changes))


def chosen(plan, device="auto"):
    with Elsewhere(), streaming():
        return settled(plan, device, workers=2, memory=None)


@pytest.mark.parametrize("method", ["linear", "ties", "tsv-merge"])
@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({}, str(DEVICE)),
        ({"bus": 1e8}, "cpu"),
        ({"device_memory": 1e8}, "cpu"),
        ({"device_start": 1e9}, "cpu"),
        ({"element_rate": 1e14, "device_flops": 1e9}, "cpu"),
        ({"disk_read": 1e5}, "cpu"),  # both wait for it
    ],
)
def test_auto_takes_what_should_be_clearly_faster(monkeypatch, method, changes, device):
    plant(monkeypatch, **changes)
    costs = chosen(plan_of(method))
    if method == "tsv-merge" and set(changes) & {"bus", "device_memory"}:
        device = str(DEVICE)  # the decompositions weigh more
    assert costs.device == device
    assert costs.why.startswith("cpu: ")
    assert f" expected, {DEVICE}: " in costs.why
    assert costs.seconds is not None


def test_a_device_that_is_asked_for_is_taken_and_pinned_memory_is_counted(monkeypatch):
    monkeypatch.setattr(choice, "_faster", None)  # nobody asks
    plan = plan_of("linear")
    here, there = chosen(plan, "cpu"), chosen(plan, str(DEVICE))
    assert (here.device, there.device, here.why, there.why) == ("cpu", str(DEVICE), "", "")
    assert there.peak_memory > here.peak_memory + 2 * 3 * 8_000_000


def test_nothing_is_measured_where_there_is_no_device(monkeypatch):
    monkeypatch.setattr(devices, "devices_here", list)
    monkeypatch.setattr(rates, "measure", None)
    costs = chosen(plan_of("linear"))
    assert (costs.device, costs.why, costs.seconds) == ("cpu", "", None)


@pytest.mark.parametrize("found", ["cuda:99", "mps"])
def test_a_device_that_cannot_be_used_is_left_alone(monkeypatch, found):
    monkeypatch.setattr(devices, "devices_here", lambda: [found])
    assert chosen(plan_of("tsv-merge")).device == "cpu"


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"_SECONDS": 0.001, "_COPIED": 1 << 20, "_SIDE": 16}.items():
        monkeypatch.setattr(rates, name, value)


def test_rates_are_measured_once_for_each_machine(quick, monkeypatch, tmp_path):
    with Elsewhere(), streaming():
        first = rates_of(DEVICE, 2)
        assert all(value > 0 for value in asdict(first).values())
        monkeypatch.setattr(rates, "measure", None)
        assert rates_of(DEVICE, 2) == first
        with pytest.raises(TypeError):  # another machine
            rates_of(DEVICE, 3)


def test_a_device_is_known_by_what_its_driver_says(monkeypatch, tmp_path):
    monkeypatch.setattr(rates, "_DRIVER", tmp_path)
    (tmp_path / "0000:19:00.0").mkdir()
    (tmp_path / "0000:19:00.0" / "information").write_text("Model: \t NVIDIA H100 80GB HBM3\nIRQ: 3\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    about = rates._about(torch.device("cuda:0"), 2)
    assert "cuda:0: NVIDIA H100 80GB HBM3, 0; torch" in about
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert rates._about(torch.device("cuda:0"), 2) != about


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"ABOUT": {"bus": 1}}', '{"ABOUT": 3}'])
def test_a_damaged_memory_is_measured_anew(quick, tmp_path, damage):
    with Elsewhere(), streaming():
        rates_of(DEVICE, 1)
        path = tmp_path / "cache" / "mergetool" / "rates.json"
        (about,) = json.loads(path.read_text())
        path.write_text(damage.replace("ABOUT", about))
        found = rates_of(DEVICE, 1)
    assert json.loads(path.read_text())[about] == asdict(found)


def test_measuring_takes_a_second_at_most_for_everything_but_the_start(monkeypatch):
    monkeypatch.setattr(rates, "_SIDE", 64)
    spent = []
    monkeypatch.setattr(rates, "_rate", lambda call: (call(), spent.append(rates._SECONDS), 1.0)[-1])
    with Elsewhere(), streaming():
        measure(DEVICE, 1)
    assert sum(spent) < 0.7


def test_the_run_its_lock_and_the_plan_say_what_was_chosen_and_why(monkeypatch, tmp_path):
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, tensors(seed, {"w": (300, 1000)}))
    recipe = write_recipe(tmp_path / "r.yaml", models={"a": "a", "b": "b"}, merge={"method": "linear"})
    work = Schedule.work
    monkeypatch.setattr(Schedule, "work", lambda self: _there(work, self))
    for name, changes in (("there", {"element_rate": 1e5}), ("here", {"bus": 1e5})):
        plant(monkeypatch, **changes)
        with Elsewhere(), streaming():
            run_recipe(load_recipe(recipe), Flags(output=tmp_path / name))
            told = CliRunner().invoke(app, ["plan", str(recipe)])
        run = json.loads((tmp_path / name / "mergetool.json").read_text())["run"]
        assert run["device"] == (str(DEVICE) if name == "there" else "cpu")
        assert run["device_chosen"].startswith("cpu: ")
        assert f"{run['device']} ({run['device_chosen']})" in told.output.replace("\n", "")


def _there(work, schedule):
    with Elsewhere():  # modes belong to threads
        work(schedule)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_rates_of_a_gpu_are_those_of_one():
    found = measure(torch.device("cuda"), 4)
    assert found.bus > 1e9
    assert found.device_memory > 5e10

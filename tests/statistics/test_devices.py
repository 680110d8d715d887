"""What is measured on a device is what is measured on the CPU, and merged from there."""

from contextlib import nullcontext

import pytest

import mergetool
from mergetool.statistics import fisher, gradient
from mergetool.testing.toys import read
from tests.devices import STAND_IN, every_device, present
from tests.files import LONG
from tests.statistics.networks import write_near

SINGLE = {"fisher": {"labels": "given"}, "gradient": {}, "activation": {}, "gram": {}, "loss": {}}
JOINT = {"regmean-plus": {}, "ada-merging": {"steps": 2, "batch": 2, "rate": 0.02, "density": 0.5}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_near(tmp_path_factory.mktemp("devices"))


@every_device
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("statistic", SINGLE)
def test_a_device_measures_what_the_cpu_does(statistic, kind, device, place, tmp_path, monkeypatch):
    if device == STAND_IN:  # which has no sparse tensors
        for module in (fisher, gradient):
            monkeypatch.setattr(module, "sparse_embeddings", nullcontext)

    def found(on):
        settings = {"cache": tmp_path / on.replace(":", ""), "device": on, **SINGLE[statistic]}
        return mergetool.measure(place / f"{kind}-a", statistic, place / "a.jsonl", **settings)

    with present(device):
        there = found(device)
    assert_alike(there, found("cpu"))


@every_device
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("bert", "ada-merging"),
        ("llama", "regmean-plus"),
        *([("llama", "ada-merging"), ("bert", "regmean-plus")] * LONG),
    ],
)
def test_models_that_are_measured_together_are_merged_on_a_device(method, kind, device, place, tmp_path):
    recipe = {
        **({"base": str(place / f"{kind}-base")} if method == "ada-merging" else {}),
        "models": {name: str(place / f"{kind}-{name}") for name in "ab"},
        "calibration": {name: {"data": str(place / f"{name}.jsonl")} for name in "ab"},
        "merge": {"method": method, **JOINT[method]},
    }

    def made(on):
        place = tmp_path / on.replace(":", "")
        return read(mergetool.run(recipe, output=place / "out", device=on, cache=place / "cache").path)

    with present(device):
        there = made(device)
    assert_alike(there, made("cpu"))


def assert_alike(there, here):
    assert there.keys() == here.keys()
    for name, expected in here.items():
        assert float((there[name] - expected).norm()) <= 1e-4 * float(expected.norm()), name

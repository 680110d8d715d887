"""Searches whose candidates are merged and scored on a device find what they find on the CPU (a test of `--long`)."""

import json

import pytest

import mergetool
from mergetool.testing.toys import assert_near, read
from tests.devices import every_device, present
from tests.elsewhere import There
from tests.evaluate import test_spread
from tests.files import LONG
from tests.tuning import test_data_flow

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not LONG, reason="scripts/test --long: two searches, each twice")]
folder = test_spread.folder
paths = pytest.fixture(scope="module", name="paths")(test_data_flow.folder.__wrapped__)


def winner(output):
    report = json.loads(output.with_name(f"{output.name}.search").joinpath("report.json").read_text())
    return report["winner"]["report_mean"]


def assert_found_alike(run, device, tmp_path):
    with present(device):
        there = run(tmp_path / "there", device)
    here = run(tmp_path / "here", "cpu")
    assert winner(there) == winner(here)
    assert_near(read(there), read(here))


@every_device
def test_a_merge_is_searched_on_a_device(device, folder, tmp_path, monkeypatch):
    """Addresses tell which tensors are one; nothing is read there."""
    monkeypatch.setattr(There, "data_ptr", lambda self: self.data_here.data_ptr(), raising=False)
    assert_found_alike(lambda out, on: test_spread.searched(folder, out, device=on), device, tmp_path)


@every_device
def test_a_path_is_searched_on_a_device(device, paths, tmp_path):
    few = {"population": 3, "generations": 1, "rerank": 1}
    asked = test_data_flow.recipe(paths, search=few, scale=[0.8, 1.25])
    assert_found_alike(lambda out, on: mergetool.run(asked, output=out, device=on).path, device, tmp_path)

"""The law about devices is tried on an accelerator where there is one (`-m gpu` chooses it), else on the stand-in.

There only with each method's defaults: `test_devices.py` tries every option on it, more strictly.
"""

from contextlib import contextmanager

import pytest
import torch

from mergetool.testing import work
from tests.devices import STAND_IN, present


def pytest_collection_modifyitems(config, items):
    about = [item for item in items if getattr(item, "callspec", None) and is_about_devices(item.callspec.params)]
    for item in about:
        item.add_marker(pytest.mark.gpu)
    if not torch.cuda.is_available():
        twice = {item for item in about if item.callspec.params["case"].option}
        config.hook.pytest_deselected(items=[*twice])
        items[:] = [item for item in items if item not in twice]


def is_about_devices(params):
    return getattr(params.get("law"), "name", "") == "device"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Where there is no accelerator, the law about devices is tried on the stand-in."""

    @contextmanager
    def accelerator():
        with present(STAND_IN):
            yield STAND_IN

    if not torch.cuda.is_available():
        monkeypatch.setattr(work, "accelerator", accelerator)

"""The law about devices is tried on an accelerator where there is one (`-m gpu` chooses it), else on the stand-in."""

from contextlib import contextmanager

import pytest
import torch

from mergetool.testing import work
from tests.devices import STAND_IN, present


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "callspec", None) and getattr(item.callspec.params.get("law"), "name", "") == "device":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Where there is no accelerator, the law about devices is tried on the stand-in."""

    @contextmanager
    def accelerator():
        with present(STAND_IN):
            yield STAND_IN

    if not torch.cuda.is_available():
        monkeypatch.setattr(work, "accelerator", accelerator)

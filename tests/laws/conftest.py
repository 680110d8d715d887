"""The law about devices is tried on an accelerator where there is one (`-m gpu` chooses it), else on the stand-in.

There only once for each kind of stages with the defaults: `test_devices.py` tries every option on it, more strictly.
What the engine sees to is tried once for each kind of work: integers that are copied, and runs with several workers;
the law about files and memory is tried for the methods without these.
"""

from contextlib import contextmanager

import pytest
import torch

from mergetool.testing import work
from tests.devices import STAND_IN, present
from tests.files import LONG

ENGINE = ("device", "integers", "memory", "workers")


def pytest_collection_modifyitems(config, items):
    tried = [item for item in items if getattr(item, "callspec", None)]
    about = {law: [item for item in tried if is_about(law, item.callspec.params)] for law in ENGINE}
    for item in about["device"]:
        item.add_marker(pytest.mark.gpu)
    here = [] if torch.cuda.is_available() else about["device"]
    twice = {item for item in here if item.callspec.params["case"].option}
    if not LONG:
        workers = repeated(about["workers"])
        twice |= repeated(item for item in here if item not in twice) | repeated(about["integers"]) | workers
        twice |= {item for item in about["memory"] if str(item.callspec.params["case"]) not in names(workers)}
    config.hook.pytest_deselected(items=[*twice])
    items[:] = [item for item in items if item not in twice]


def names(items):
    return {str(item.callspec.params["case"]) for item in items}


def is_about(law, params):
    return getattr(params.get("law"), "name", "") == law


def repeated(items):
    """Those of a law that another one of it repeats: the engine has the same work with both methods."""
    known, found = set(), set()
    for item in items:
        case = item.callspec.params["case"]
        if item.get_closest_marker("xfail") or case.architecture:
            continue  # it must break the law; or it is tried nowhere else
        seen = case.work()[:2] if is_about("device", item.callspec.params) else case.work()
        work = str((seen, case.has_base, case.kind.statistic))
        if work in known:
            found.add(item)
        known.add(work)
    return found


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Where there is no accelerator, the law about devices is tried on the stand-in."""

    @contextmanager
    def accelerator():
        with present(STAND_IN):
            yield STAND_IN

    if not torch.cuda.is_available():
        monkeypatch.setattr(work, "accelerator", accelerator)

"""One zoo for all tests of a session, and for all its workers."""

import os

import pytest

from tests.zoo.cage import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "zoo"
    root.mkdir(exist_ok=True)
    return Zoo(root)

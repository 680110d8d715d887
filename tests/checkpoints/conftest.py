"""One zoo for all tests of a session."""

import pytest

from tests.zoo.cage import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    return Zoo(tmp_path_factory.mktemp("zoo"))

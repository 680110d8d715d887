import pytest

from tests.pages.browsing import CHROMIUM
from tests.pages.browsing import browser as started


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    with started() as found:
        yield found

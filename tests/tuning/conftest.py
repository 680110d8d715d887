"""What the tests of searches share."""

import pytest


@pytest.fixture
def pictures():
    """For tests that look at the pictures of a report; a search of the others is spared the half that drawing takes."""


@pytest.fixture(autouse=True)
def spared(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("mergetool.pages.pictures.drawn", lambda *_: "")

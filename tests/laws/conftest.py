"""The law about devices needs one: `-m gpu` chooses it."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "callspec", None) and getattr(item.callspec.params.get("law"), "name", "") == "device":
            item.add_marker(pytest.mark.gpu)

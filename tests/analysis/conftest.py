"""A base and three fine-tunes, made once."""

import pytest

from tests.analysis.models import ancestor, fine_tuned


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A folder with `base` and its fine-tunes `tales`, `code`, `letters`."""
    folder = tmp_path_factory.mktemp("family")
    ancestor(folder / "base")
    for name, text in (("tales", "stories"), ("code", "code"), ("letters", "letters")):
        fine_tuned(folder / "base", folder / name, text)
    return folder


@pytest.fixture
def recipe(family):
    """A recipe of these models and of others: `recipe(other=PATH)`; `base=None` leaves the base out."""

    def made(names=("tales", "code", "letters"), base="base", method="task-arithmetic", **others):
        models = {name: str(family / name) for name in names} | {name: str(path) for name, path in others.items()}
        data = {"models": models, "merge": {"method": method}}
        return data | ({"base": str(family / base)} if base else {})

    return made

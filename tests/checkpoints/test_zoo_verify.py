"""Nothing that transformers saved is refused by `verify`, and it opens and runs."""

import pytest

from mergetool.outputs.opening import open_and_run
from mergetool.outputs.verify import verify_output
from tests.zoo.families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saved_is_right(zoo, name):
    verify_output(zoo.base(name))
    assert open_and_run(zoo.base(name)).startswith("opens as ")

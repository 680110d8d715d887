"""Every method of the registry obeys the laws of `mergetool.testing`; exceptions are declared on the method."""

import pytest

from mergetool.methods import registry
from mergetool.methods.base import TensorMethod
from mergetool.methods.families.fitted import FittedMethod
from mergetool.testing import LAWS, cases, laws
from tests.files import LONG

METHODS = [kind for kind in registry().values() if issubclass(kind, TensorMethod | FittedMethod)]

test_every_method_obeys = laws(*METHODS, in_turn=not LONG)


@pytest.mark.parametrize(("name", "kind"), registry().items())
def test_every_exemption_names_a_law_and_a_reason(name, kind):
    known = {*LAWS, *(f"{key} {case.option}" for key in LAWS for case in cases(kind))}
    assert {key for key in kind.exempt if key not in known} == set()
    assert all(reason is None or len(reason) > 10 for reason in kind.exempt.values())

"""Every method of the registry obeys the laws of `mergetool.testing`; exceptions are declared on the method."""

import pytest

from mergetool.methods import registry
from mergetool.methods.base import TensorMethod
from mergetool.methods.families.fitted import FittedMethod
from mergetool.testing import LAWS, cases, laws

test_every_method_obeys = laws(*(kind for kind in registry().values() if issubclass(kind, TensorMethod | FittedMethod)))


@pytest.mark.parametrize(("name", "kind"), registry().items())
def test_every_exemption_names_a_law_and_a_reason(name, kind):
    known = {*LAWS, *(f"{key} {case.option}" for key in LAWS for case in cases(kind))}
    assert {key for key in kind.exempt if key not in known} == set()
    others = {key for key, reason in kind.exempt.items() if not reason}  # under these options the law holds after all
    assert {key.partition(" ")[0] for key in others} <= kind.exempt.keys() - others
    assert all(len(reason) > 10 for key, reason in kind.exempt.items() if key not in others)

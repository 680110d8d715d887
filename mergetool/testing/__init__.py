"""The laws that every merging method obeys, for methods of this project and for plug-ins.

    from mergetool.testing import laws
    from my_package import AbsoluteMean

    test_laws = laws(AbsoluteMean)        # pytest runs every law under every choice of every option

    law     what a law is                   cases   a method under some settings
    values  laws about values               work    laws about how the work is done
    runs    real runs of a case             toys    small models with known numbers, and how results are compared
    classifiers                             tiny classifiers of any class of transformers, with experts around them

`docs/laws.md` lists the laws. A method says itself which of them it does not obey: `exempt: ClassVar = {LAW: REASON}`.
"""

from mergetool.testing import values, work
from mergetool.testing.cases import MethodCase, cases
from mergetool.testing.law import LAWS, Law, laws

__all__ = ["LAWS", "Law", "MethodCase", "cases", "laws", "values", "work"]

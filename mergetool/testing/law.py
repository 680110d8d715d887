"""What a law is, and how pytest tries it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mergetool.methods.base import Method, TensorMethod
from mergetool.methods.families.fitted import FittedMethod
from mergetool.testing.cases import MethodCase, cases, each_once

Check = Callable[[MethodCase], None]

LAWS: dict[str, "Law"] = {}
"""Every law by name."""


@dataclass(frozen=True)
class Law:
    """A claim about every method, and the function that tries it on a case (AssertionError where it is broken)."""

    name: str
    claim: str
    holds: Check
    applies: Callable[[MethodCase], bool]
    fitted: bool
    """Whether it is for methods that see whole models first, too."""

    def covers(self, case: MethodCase) -> bool:
        return (self.fitted or not issubclass(case.kind, FittedMethod)) and self.applies(case)

    def exemption(self, case: MethodCase) -> str | None:
        """Why the method need not obey under this option, if it says so."""
        exempt = case.kind.exempt
        return exempt.get(f"{self.name} {case.option}", exempt.get(self.name))

    def check(self, case: MethodCase) -> None:
        """Try it. Raises AssertionError that says which law is broken, how, and what can be done."""
        __tracebackhide__ = True
        try:
            self.holds(case)
        except AssertionError as error:
            key = f"{self.name} {case.option}".strip()
            raise AssertionError(
                f"{case} breaks the law {self.name!r}: {self.claim}\n  {error}\n"
                f"  fix: mend {case.kind.__name__}; or, if it is meant, say so there: "
                f'exempt: ClassVar = {{"{key}": "the reason"}}'
            ) from None


def law(
    name: str, applies: Callable[[MethodCase], bool] = lambda case: True, *, fitted: bool = False
) -> Callable[[Check], Check]:
    """Make a function of a case a law; its docstring is the claim."""

    def decorate(holds: Check) -> Check:
        LAWS[name] = Law(name, " ".join((holds.__doc__ or "").split()), holds, applies, fitted)
        return holds

    return decorate


def laws(*kinds: type[Method], in_turn: bool = False) -> Callable[[Law, MethodCase], None]:
    """A test for pytest: every law on every case of these methods. Give it a name that begins with `test`.

    `in_turn`: an option that some of them have from one family is tried under each law with one of them, in turn; one
    that changes only arithmetic, under every fifth law.
    """
    import pytest

    for kind in kinds:
        if not issubclass(kind, TensorMethod | FittedMethod) or kind.method_name() is None:
            raise TypeError(f"{kind.__name__}: laws are for concrete classes made from TensorMethod or FittedMethod")

    def marks(law: Law, case: MethodCase) -> list[pytest.MarkDecorator]:
        reason = law.exemption(case)
        return [pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)] if reason else []

    pairs = _pairs(kinds, in_turn)
    tried = [pytest.param(law, case, id=f"{law.name} {case}", marks=marks(law, case)) for law, case in pairs]

    @pytest.mark.parametrize(("law", "case"), tried)
    def test(law: Law, case: MethodCase) -> None:
        __tracebackhide__ = True
        law.check(case)

    return test


def _pairs(kinds: tuple[type[Method], ...], in_turn: bool) -> Iterator[tuple[Law, MethodCase]]:
    every = [case for kind in kinds for case in cases(kind)]
    chosen = {law.name: _in_turn(law, every, turn) if in_turn else every for turn, law in enumerate(LAWS.values())}
    for case in every:
        yield from ((law, case) for law in LAWS.values() if case in chosen[law.name] and law.covers(case))


def _in_turn(law: Law, every: Iterable[MethodCase], turn: int) -> list[MethodCase]:
    """Each option of a family with one method that obeys, those about arithmetic in turn; and whatever is told to be
    exempt under its option."""
    tried = [case for case in every if law.covers(case)]
    told = [case for case in tried if f"{law.name} {case.option}" in case.kind.exempt]
    obedient = [case for case in tried if not law.exemption(case)]
    origins = {case.origin for case in obedient}
    rest = [case for case in tried if case.origin not in origins]
    once = enumerate(each_once(obedient, turn) + each_once(rest, turn), turn)
    return told + [case for place, case in once if place % 5 == 0 or case.works_in_another_way]

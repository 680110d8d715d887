"""Laws about values: what a merge must be in cases where that is known without knowing the method."""

from itertools import cycle

import torch

from mergetool.errors import MergeError
from mergetool.testing.cases import MethodCase
from mergetool.testing.law import law
from mergetool.testing.toys import INTEGERS, State, assert_near, assert_same_bytes, minus, plus, times


def _is_unlike_neutral(case: MethodCase) -> bool:
    """Whether the neutral settings leave this case's own option alone (else it is the default case once more)."""
    return not case.settings.keys() & case.kind.neutral.keys()


def _takes_one(case: MethodCase) -> bool:
    return case.kind.min_models <= 1 and _is_unlike_neutral(case)


def _takes_several(case: MethodCase) -> bool:
    return len(case.names) > 1


def _takes_copies(case: MethodCase) -> bool:
    return _takes_several(case) and _is_unlike_neutral(case)


def _adds_to_a_base(case: MethodCase) -> bool:
    return case.kind.needs_base == "required"


def _has_scale(case: MethodCase) -> bool:
    return _adds_to_a_base(case) and "scale" in case.kind.schedulables()


def _has_weights(case: MethodCase) -> bool:
    schedulable = case.kind.schedulables().get("weight")
    takes_fewer = len(case.names) > case.kind.min_models
    return _takes_several(case) and takes_fewer and schedulable is not None and schedulable.per_model


# ---------------------------------------------------------------- identities


@law("single", _takes_one)
def a_merge_of_one_model_is_that_model(case: MethodCase) -> None:
    """A merge of one model is that model, at the method's neutral settings."""
    base, models = case.toys("a")
    assert_near(case.neutral().merge(base, models), models["a"])


@law("copies", _takes_copies, fitted=True)
def a_merge_of_copies_of_one_model_is_that_model(case: MethodCase) -> None:
    """A merge of copies of one model is that model, at the method's neutral settings."""
    base, models = case.toys("a")
    for names in ("ab",) if case.option else ("ab", "abc"):
        if case.kind.min_models <= len(names) <= len(case.names):
            assert_near(case.neutral().merge(base, dict.fromkeys(names, models["a"])), models["a"])


@law("order", _takes_several, fitted=True)
def the_order_of_the_models_does_not_matter(case: MethodCase) -> None:
    """The order of the models does not matter (their settings go with them)."""
    base, models = case.toys()
    case = case.uneven()
    turned = (*case.names[1:], case.names[0])
    for order in (turned,) if case.option else (turned, case.names[::-1]):
        assert_near(case.merge(base, {name: models[name] for name in order}), case.merged())


@law("zero-weight", _has_weights)
def a_model_of_weight_zero_might_as_well_not_be_there(case: MethodCase) -> None:
    """A model of weight 0 might as well not be there."""
    base, models = case.toys()
    kept = dict(list(models.items())[:-1])
    weights = dict(zip(case.names, (1.0, 2.0, 0.0), strict=True))
    without = case.with_settings(weight={name: weights[name] for name in kept}).merge(base, kept)
    assert_near(case.with_settings(weight=weights).merge(base, models), without)


@law("scale-zero", _has_scale)
def at_scale_zero_nothing_is_added_to_the_base(case: MethodCase) -> None:
    """At scale 0 nothing is added to the base."""
    base, models = case.toys()
    assert_near(case.with_settings(scale=0.0).merge(base, models), base, tolerance=0.0)


@law("zero-deltas", _adds_to_a_base)
def models_that_equal_the_base_give_the_base(case: MethodCase) -> None:
    """Models that equal the base give the base, to the bit."""
    base, _ = case.toys(exact=False)
    assert_same_bytes(case.merge(base, dict.fromkeys(case.names, base)), base)


@law("zeros", fitted=True)
def tensors_of_zeros_give_zeros(case: MethodCase) -> None:
    """Tensors of zeros give zeros: nothing divides by a norm or a count that is zero."""
    zeros = times(case.toys()[0], 0.0)
    assert_near(case.merge(zeros, dict.fromkeys(case.names, zeros)), zeros, tolerance=0.0)


# ---------------------------------------------------------------- symmetries


@law("scaling", _adds_to_a_base)
def task_vectors_twice_as_long_give_a_change_twice_as_large(case: MethodCase) -> None:
    """Task vectors twice as long give a change twice as large."""
    base, deltas = case.toy_parts()
    twice = case.merge(base, {name: plus(base, delta, 2.0) for name, delta in deltas.items()})
    assert_near(minus(twice, base), times(minus(case.merged(), base), 2.0))


@law("sign-flip", _adds_to_a_base)
def task_vectors_turned_round_turn_the_change_round(case: MethodCase) -> None:
    """Task vectors turned round turn the change round."""
    base, deltas = case.toy_parts()
    back = case.merge(base, {name: minus(base, delta) for name, delta in deltas.items()})
    assert_near(minus(base, back), minus(case.merged(), base))


@law("shift", _adds_to_a_base)
def a_constant_added_to_everything_is_added_to_the_result(case: MethodCase) -> None:
    """A constant added to the base and to all models is added to the result."""
    base, models = case.toys()
    ones = {name: torch.ones_like(value) for name, value in base.items()}
    moved = case.merge(plus(base, ones), {name: plus(model, ones) for name, model in models.items()})
    assert_near(moved, plus(case.merged(), ones))


@law("units", fitted=True)
def everything_doubled_doubles_the_result(case: MethodCase) -> None:
    """Everything doubled doubles the result: no threshold or guard has a size of its own."""
    base, models = case.toys()
    for factor in (2.0**-20, 2.0**20):
        scaled = case.merge(times(base, factor), {name: times(model, factor) for name, model in models.items()})
        assert_near(times(scaled, 1 / factor), case.merged())


# ---------------------------------------------------------------- form and numbers


@law("form", fitted=True)
def names_shapes_and_dtypes_are_those_of_the_base(case: MethodCase) -> None:
    """Names, shapes and dtypes are those of the base (or the first model); all values are finite."""
    base, models = case.toys(exact=False)
    _assert_form(case.merged(), base)
    for dtype in (torch.float16,) if case.option else (torch.float64, torch.bfloat16, torch.float16):
        cast = {name: value.to(dtype) for name, value in base.items()}
        merged = case.merge(cast, {n: {k: v.to(dtype) for k, v in model.items()} for n, model in models.items()})
        _assert_form(merged, cast)


def _assert_form(merged: State, base: State) -> None:
    found, expected = ({k: (v.dtype, tuple(v.shape)) for k, v in state.items()} for state in (merged, base))
    assert found == expected, f"{found}, expected {expected}"
    for name, value in merged.items():
        assert bool(value.isfinite().all()), f"{name} is not finite, with models in {value.dtype}"


@law("float64", _is_unlike_neutral, fitted=True)
def models_stored_in_float64_are_merged_in_float64(case: MethodCase) -> None:
    """Models stored in float64 are merged in float64: nothing on the way is rounded to float32."""
    base, models = case.toys("a")
    third = {name: value.double() / 3 for name, value in models["a"].items()}
    double = {name: value.double() for name, value in base.items()}
    copies = dict.fromkeys(case.names[: case.kind.min_models], third)
    assert_near(case.neutral().merge(double, copies), third, tolerance=1e-14)


@law("precision", fitted=True)
def merging_in_float32_and_in_float64_agree(case: MethodCase) -> None:
    """Merging in float32 and in float64 agree, up to rounding."""
    base, models = case.toys()
    case = case.uneven()
    assert_near(case.merged(), case.merge(base, models, dtype="float64"))


@law("inputs", fitted=True)
def what_was_passed_is_not_changed(case: MethodCase) -> None:
    """What was passed is not changed, and how it lies in memory does not matter."""
    base, models = case.toys()
    states = [base, *models.values()]
    before = [{name: value.clone() for name, value in state.items()} for state in states]
    assert_same_bytes(case.merge(base, models), case.merged())
    for state, copy in zip(states, before, strict=True):
        assert_same_bytes(state, copy)
    if case.option:
        return  # what lies how in memory is settled before a method sees it
    strided = [
        {name: value.mT.contiguous().mT if value.ndim > 1 else value for name, value in s.items()} for s in states
    ]
    assert_same_bytes(case.merge(strided[0], dict(zip(models, strided[1:], strict=True))), case.merged())


@law("integers", fitted=True)
def tensors_of_integers_and_booleans_are_copied(case: MethodCase) -> None:
    """Tensors of integers and booleans are copied from the base (or the first model)."""
    base, models = case.toys()
    other = {"position_ids": INTEGERS["position_ids"] + 5, "causal": ~INTEGERS["causal"]}
    first, *rest = models
    given = {first: models[first] | (other if case.has_base else INTEGERS), **{n: models[n] | other for n in rest}}
    merged = case.merge(base | INTEGERS, given)
    assert_same_bytes({name: merged[name] for name in INTEGERS}, INTEGERS)


@law("non-finite", fitted=True)
def a_value_that_is_not_finite_is_never_lost(case: MethodCase) -> None:
    """A value that is not finite is never lost: the merge stops and says whose it is."""
    values = (float("nan"), float("-inf")) if case.option else (float("nan"), float("-inf"), float("nan"))
    for value, culprit in zip(values, cycle(case.names), strict=False):
        base, models = case.toys()
        name = next(name for name, tensor in base.items() if tensor.ndim == 2)
        models[culprit][name][2, 3] = value
        said = _error(case, base, models)
        assert name in said, f"{value} in {name} of model {culprit!r}: the error does not name the tensor: {said}"
        assert f"model '{culprit}'" in said, f"{value} in model {culprit!r}: the error does not name it: {said}"


def _error(case: MethodCase, base: State, models: dict[str, State]) -> str:
    try:
        case.merge(base, models)
    except MergeError as error:
        return str(error)
    return "nothing was said"

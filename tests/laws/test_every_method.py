"""The laws that every method obeys, whatever it does; exceptions are declared on the method (see cases.py).

single        a merge of one model is that model              (at the method's neutral settings)
copies        a merge of copies of one model is that model    (at the method's neutral settings)
order         the order of the models does not matter
zero-weight   a model of weight 0 might as well not be there
scale-zero    at scale 0 nothing is added to the base
zero-deltas   models that equal the base give the base, to the bit
zeros         tensors of zeros give zeros
scaling       task vectors twice as long give a change twice as large
sign-flip     task vectors turned round turn the change round
shift         a constant added to the base and to all models is added to the result
units         everything doubled doubles the result
form          names, shapes and dtypes are those of the base; all values are finite
float64       models stored in float64 are merged in float64
precision     merging in float32 and in float64 agree
inputs        what was passed is not changed, and how it lies in memory does not matter
integers      tensors of integers and booleans are copied
independent   a tensor's result does not depend on what else is merged
tied          tensors that are equal in every model are equal in the result
seed-free     the seed does not matter                       (a method exempt from this draws at random)
repeatable    the same seed gives the same bits
slices        how finely tensors are cut does not matter, to the bit
workers       neither the number of workers nor the sharding of the output matters, to the bit
memory        merging in memory and from files give the same bits
buffers       no more scratch space is used than the memory plan counts
non-finite    a value that is not finite is never lost: the merge stops and says whose it is
device        an accelerator gives what the CPU gives
"""

from importlib import import_module
from itertools import product
from pkgutil import walk_packages

import pytest
import torch

import mergetool.engine
import mergetool.planning
from mergetool import MergeError
from mergetool.methods import registry
from mergetool.methods.base import TensorGroup
from tests.laws.cases import LAWS, Case, all_cases, cases, law
from tests.toys import (
    INTEGERS,
    assert_near,
    assert_same_bytes,
    minus,
    plus,
    read,
    times,
    write,
)


def is_unlike_neutral(case: Case) -> bool:
    """Whether the neutral settings leave this case's own option alone (else it is the default case once more)."""
    return not case.settings.keys() & case.kind.neutral.keys()


def takes_one(case):
    return case.kind.min_models <= 1 and is_unlike_neutral(case)


def takes_several(case):
    return len(case.names) > 1


def takes_copies(case):
    return takes_several(case) and is_unlike_neutral(case)


def adds_to_a_base(case):
    return case.kind.needs_base == "required"


def has_scale(case):
    return adds_to_a_base(case) and "scale" in case.kind.schedulables()


def has_weights(case):
    schedulable = case.kind.schedulables().get("weight")
    return takes_several(case) and schedulable is not None and schedulable.per_model


# ---------------------------------------------------------------- identities


@law("single", takes_one)
def test_a_merge_of_one_model_is_that_model(case):
    """A merge of one model is that model, at the method's neutral settings."""
    base, models = case.toys("a")
    assert_near(case.neutral().merge(base, models), models["a"])


@law("copies", takes_copies, fitted=True)
def test_a_merge_of_copies_of_one_model_is_that_model(case):
    """A merge of copies of one model is that model, at the method's neutral settings."""
    base, models = case.toys("a")
    for names in ("ab", "abc"):
        if len(names) <= len(case.names):
            assert_near(case.neutral().merge(base, dict.fromkeys(names, models["a"])), models["a"])


@law("order", takes_several, fitted=True)
def test_the_order_of_the_models_does_not_matter(case):
    """The order of the models does not matter (their settings go with them)."""
    base, models = case.toys()
    case = case.uneven()
    expected = case.merge(base, models)
    assert_near(case.merge(base, dict(reversed(models.items()))), expected)
    assert_near(case.merge(base, {name: models[name] for name in (*case.names[1:], case.names[0])}), expected)


@law("zero-weight", has_weights)
def test_a_model_of_weight_zero_might_as_well_not_be_there(case):
    """A model of weight 0 might as well not be there."""
    base, models = case.toys()
    kept = dict(list(models.items())[:-1])
    weights = dict(zip(case.names, (1.0, 2.0, 0.0), strict=True))
    without = case.with_settings(weight={name: weights[name] for name in kept}).merge(base, kept)
    assert_near(case.with_settings(weight=weights).merge(base, models), without)


@law("scale-zero", has_scale)
def test_at_scale_zero_nothing_is_added_to_the_base(case):
    """At scale 0 nothing is added to the base."""
    base, models = case.toys()
    assert_near(case.with_settings(scale=0.0).merge(base, models), base, tolerance=0.0)


@law("zero-deltas", adds_to_a_base)
def test_models_that_equal_the_base_give_the_base(case):
    """Models that equal the base give the base, to the bit."""
    base, _ = case.toys(exact=False)
    assert_same_bytes(case.merge(base, dict.fromkeys(case.names, base)), base)


@law("zeros", fitted=True)
def test_tensors_of_zeros_give_zeros(case):
    """Tensors of zeros give zeros: nothing divides by a norm or a count that is zero."""
    zeros = times(case.toys()[0], 0.0)
    assert_near(case.merge(zeros, dict.fromkeys(case.names, zeros)), zeros, tolerance=0.0)


# ---------------------------------------------------------------- symmetries


@law("scaling", adds_to_a_base)
def test_task_vectors_twice_as_long_give_a_change_twice_as_large(case):
    """Task vectors twice as long give a change twice as large."""
    base, deltas = case.toy_parts()
    once = case.merge(base, {name: plus(base, delta) for name, delta in deltas.items()})
    twice = case.merge(base, {name: plus(base, delta, 2.0) for name, delta in deltas.items()})
    assert_near(minus(twice, base), times(minus(once, base), 2.0))


@law("sign-flip", adds_to_a_base)
def test_task_vectors_turned_round_turn_the_change_round(case):
    """Task vectors turned round turn the change round."""
    base, deltas = case.toy_parts()
    there = case.merge(base, {name: plus(base, delta) for name, delta in deltas.items()})
    back = case.merge(base, {name: minus(base, delta) for name, delta in deltas.items()})
    assert_near(minus(base, back), minus(there, base))


@law("shift", adds_to_a_base)
def test_a_constant_added_to_everything_is_added_to_the_result(case):
    """A constant added to the base and to all models is added to the result."""
    base, models = case.toys()
    ones = {name: torch.ones_like(value) for name, value in base.items()}
    moved = case.merge(plus(base, ones), {name: plus(model, ones) for name, model in models.items()})
    assert_near(moved, plus(case.merge(base, models), ones))


@law("units", fitted=True)
def test_everything_doubled_doubles_the_result(case):
    """Everything doubled doubles the result: no threshold or guard has a size of its own."""
    base, models = case.toys()
    for factor in (2.0, 2.0**-20, 2.0**20):
        scaled = case.merge(times(base, factor), {name: times(model, factor) for name, model in models.items()})
        assert_near(times(scaled, 1 / factor), case.merge(base, models))


# ---------------------------------------------------------------- form and numbers


@law("form", fitted=True)
def test_names_shapes_and_dtypes_are_those_of_the_base(case):
    """Names, shapes and dtypes are those of the base (or the first model); all values are finite."""
    base, models = case.toys(exact=False)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        cast = {name: value.to(dtype) for name, value in base.items()}
        merged = case.merge(cast, {n: {k: v.to(dtype) for k, v in model.items()} for n, model in models.items()})
        assert {k: (v.dtype, v.shape) for k, v in merged.items()} == {k: (v.dtype, v.shape) for k, v in cast.items()}
        assert all(bool(value.isfinite().all()) for value in merged.values())


@law("float64", is_unlike_neutral, fitted=True)
def test_models_stored_in_float64_are_merged_in_float64(case):
    """Models stored in float64 are merged in float64: nothing on the way is rounded to float32."""
    base, models = case.toys("a")
    third = {name: value.double() / 3 for name, value in models["a"].items()}
    double = {name: value.double() for name, value in base.items()}
    copies = dict.fromkeys(case.names[: case.kind.min_models], third)
    assert_near(case.neutral().merge(double, copies), third, tolerance=1e-14)


@law("precision", fitted=True)
def test_merging_in_float32_and_in_float64_agree(case):
    """Merging in float32 and in float64 agree, up to rounding."""
    base, models = case.toys()
    case = case.uneven()
    assert_near(case.merge(base, models), case.merge(base, models, dtype="float64"))


@law("inputs", fitted=True)
def test_what_was_passed_is_not_changed(case):
    """What was passed is not changed, and how it lies in memory does not matter."""
    base, models = case.toys()
    states = [base, *models.values()]
    before = [{name: value.clone() for name, value in state.items()} for state in states]
    expected = case.merge(base, models)
    for state, copy in zip(states, before, strict=True):
        assert_same_bytes(state, copy)
    strided = [
        {name: value.mT.contiguous().mT if value.ndim > 1 else value for name, value in s.items()} for s in states
    ]
    assert_same_bytes(case.merge(strided[0], dict(zip(models, strided[1:], strict=True))), expected)


@law("integers", fitted=True)
def test_tensors_of_integers_and_booleans_are_copied(case):
    """Tensors of integers and booleans are copied from the base (or the first model)."""
    base, models = case.toys()
    other = {"position_ids": INTEGERS["position_ids"] + 5, "causal": ~INTEGERS["causal"]}
    first, *rest = models
    given = {first: models[first] | (other if case.has_base else INTEGERS), **{n: models[n] | other for n in rest}}
    merged = case.merge(base | INTEGERS, given)
    assert_same_bytes({name: merged[name] for name in INTEGERS}, INTEGERS)


@law("non-finite", fitted=True)
def test_a_value_that_is_not_finite_is_never_lost(case):
    """A value that is not finite is never lost: the merge stops and says whose it is."""
    for value in (float("nan"), float("-inf")):
        for culprit in case.names:
            base, models = case.toys()
            name = next(name for name, tensor in base.items() if tensor.ndim == 2)
            models[culprit][name][2, 3] = value
            with pytest.raises(MergeError) as raised:
                case.merge(base, models)
            assert name in str(raised.value)
            assert f"model '{culprit}'" in str(raised.value)


# ---------------------------------------------------------------- what a result may depend on


@law("independent")
def test_a_tensors_result_does_not_depend_on_what_else_is_merged(case):
    """A tensor's result does not depend on what else is merged."""
    base, models = case.toys()
    together = case.merge(base, models)
    for name in base:
        alone = case.merge({name: base[name]}, {key: {name: model[name]} for key, model in models.items()})
        assert_same_bytes(alone, {name: together[name]})


@law("tied")
def test_tensors_that_are_equal_in_every_model_are_equal_in_the_result(case):
    """Tensors that are equal in every model (tied weights stored twice) are equal in the result."""
    base, models = case.toys()
    name, twin = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    doubled = {key: model | {twin: model[name].clone()} for key, model in models.items()}
    merged = case.merge(base | {twin: base[name].clone()}, doubled)
    assert_same_bytes({twin: merged[name]}, {twin: merged[twin]})


@law("seed-free", fitted=True)
def test_the_seed_does_not_matter(case):
    """The seed does not matter; a method that is exempt draws at random, and another seed must show."""
    base, models = case.toys()
    assert_same_bytes(case.merge(base, models, seed=1), case.merge(base, models, seed=2))


@law("repeatable", fitted=True)
def test_the_same_seed_gives_the_same_bits(case):
    """The same seed gives the same bits, whatever was drawn before."""
    base, models = case.toys(exact=False)
    expected = case.merge(base, models, seed=7)
    torch.rand(3)
    case.merge(base, models, seed=8)
    assert_same_bytes(case.merge(base, models, seed=7), expected)


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Toy models on disk: folders by name, for exact and for arbitrary numbers, of both shapes."""
    written = {}
    for fitted, exact in product((True, False), repeat=2):
        kind = next(case for case in all_cases() if bool(case.architecture) == fitted)
        base, models = kind.toys("abc", exact=exact)
        states = {name: state | INTEGERS for name, state in {"base": base, **models}.items()}
        written[fitted, exact] = write(tmp_path_factory.mktemp("toys"), states)
    return written


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """Run a case on the toy files, cut into slices and units of some sizes, and read the result back."""

    def run_case(case, *, exact, slices=None, shard_size="5GB", **flags):
        if slices is not None:
            cut_finely(monkeypatch, *slices)
        paths = files[bool(case.architecture), exact]
        recipe = {
            **({"base": str(paths["base"])} if case.has_base else {}),
            "models": {name: str(paths[name]) for name in case.names},
            **case.architecture,
            "merge": case.section(),
            "output": {"shard_size": shard_size},
        }
        result = mergetool.run(recipe, output=tmp_path / "out", overwrite=True, **flags)
        return read(result.path), len(list(result.path.glob("*.safetensors")))

    return run_case


def cut_finely(monkeypatch, slice_elements, unit_elements):
    """The two sizes are constants that several modules import; give all of them other values."""
    modules = [
        import_module(found.name)
        for package in (mergetool.engine, mergetool.planning)
        for found in walk_packages(package.__path__, f"{package.__name__}.")
    ]
    for key, value in (("SLICE_ELEMENTS", slice_elements), ("UNIT_ELEMENTS", unit_elements)):
        holders = [module for module in modules if hasattr(module, key)]
        assert holders
        for module in holders:
            monkeypatch.setattr(module, key, value)


@law("slices", fitted=True)
def test_how_finely_tensors_are_cut_does_not_matter(case, run):
    """How finely tensors are cut into slices and units of work does not matter, to the bit."""
    expected, _ = run(case, exact=True)
    for slices in ((5, 10), (16, 48)):
        assert_same_bytes(run(case, exact=True, slices=slices)[0], expected)


@law("workers", fitted=True)
def test_neither_the_number_of_workers_nor_the_sharding_matters(case, run):
    """Neither the number of workers nor the sharding of the output matters, to the bit."""
    expected, num_files = run(case, exact=False, slices=(8, 16), workers=1)
    assert num_files == 1
    for workers, shard_size in ((2, 200), (4, 1)):
        found, num_files = run(case, exact=False, slices=(8, 16), workers=workers, shard_size=shard_size)
        assert num_files > 1
        assert_same_bytes(found, expected)


@law("memory", fitted=True)
def test_merging_in_memory_and_from_files_give_the_same_bits(case, run):
    """Merging in memory and from files give the same bits."""
    base, models = case.toys(exact=False)
    found, _ = run(case, exact=False)
    expected = case.merge(base | INTEGERS, {name: model | INTEGERS for name, model in models.items()})
    assert_same_bytes(found, expected)


@law("buffers")
def test_no_more_scratch_space_is_used_than_is_counted(case, monkeypatch):
    """No more scratch space is used than the memory plan counts."""
    used = set()
    scratch = TensorGroup.scratch

    def counted(group, name, dtype=None):
        used.add((name, dtype or group.models[0].dtype))
        return scratch(group, name, dtype)

    monkeypatch.setattr(TensorGroup, "scratch", counted)
    case.uneven().merge(*case.toys())
    assert len(used) <= case.kind.buffers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")
@law("device", fitted=True)
def test_an_accelerator_gives_what_the_cpu_gives(case, run):
    """An accelerator gives what the CPU gives, up to rounding: the same draws, the same thresholds."""
    assert_near(run(case, exact=True, device="cuda:0")[0], run(case, exact=True, device="cpu")[0])


# ---------------------------------------------------------------- the laws themselves


@pytest.mark.parametrize(("name", "kind"), registry().items())
def test_every_exemption_names_a_law_and_a_reason(name, kind):
    known = {*LAWS, *(f"{key} {case.option}" for key in LAWS for case in cases(kind))}
    assert {key for key in kind.exempt if key not in known} == set()
    assert all(len(reason) > 10 for reason in kind.exempt.values())


def test_the_list_of_laws_above_is_complete():
    listed = {line.split("  ")[0] for line in __doc__.splitlines()[2:] if "  " in line}
    assert listed == LAWS.keys()

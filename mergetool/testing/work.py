"""Laws about what a result may depend on: not on slices, workers, order of work, files or memory; to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor

from mergetool.methods.base import TensorGroup, TensorMethod
from mergetool.testing.cases import MethodCase
from mergetool.testing.law import LAWS, law
from mergetool.testing.runs import cut_finely, replaced, run
from mergetool.testing.toys import INTEGERS, State, assert_near, assert_same_bytes


@law("independent")
def a_tensors_result_does_not_depend_on_what_else_is_merged(case: MethodCase) -> None:
    """A tensor's result does not depend on what else is merged."""
    base, models = case.toys()
    together = case.merged()
    for names in (list(base)[start::3] for start in range(3)):
        few, *rest = ({name: state[name] for name in names} for state in (base, *models.values()))
        alone = case.merge(few, dict(zip(models, rest, strict=True)))
        assert_same_bytes(alone, {name: together[name] for name in names})


@law("tied")
def tensors_that_are_equal_in_every_model_are_equal_in_the_result(case: MethodCase) -> None:
    """Tensors that are equal in every model (tied weights stored twice) are equal in the result."""
    base, models = case.toys()
    name, twin = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    doubled = {key: model | {twin: model[name].clone()} for key, model in models.items()}
    merged = case.merge(base | {twin: base[name].clone()}, doubled)
    assert_same_bytes({twin: merged[name]}, {twin: merged[twin]})


@law("seed-free", fitted=True)
def the_seed_does_not_matter(case: MethodCase) -> None:
    """The seed does not matter; a method that is exempt draws at random, and another seed must show."""
    base, models = case.toys()
    assert_same_bytes(case.merge(base, models, seed=1), case.merged())


@law("repeatable", fitted=True)
def the_same_seed_gives_the_same_bits(case: MethodCase) -> None:
    """The same seed gives the same bits, whatever was drawn before."""
    base, models = case.toys(exact=False)
    expected = case.merge(base, models, seed=7)
    torch.rand(3)
    if not case.option and LAWS["seed-free"].exemption(case):
        case.merge(base, models, seed=8)
    assert_same_bytes(case.merge(base, models, seed=7), expected)


@law("slices", fitted=True)
def how_finely_tensors_are_cut_does_not_matter(case: MethodCase) -> None:
    """How finely tensors are cut into slices and units of work does not matter, to the bit."""
    expected = case.merged()
    with cut_finely(11, 22):
        assert_same_bytes(case.merge(*case.toys()), expected)


_works_in_another_way = attrgetter("works_in_another_way")


@law("workers", _works_in_another_way, fitted=True)
def neither_the_number_of_workers_nor_the_sharding_matters(case: MethodCase) -> None:
    """Neither the number of workers nor the sharding of the output matters, to the bit."""
    with cut_finely(16, 32):
        found, num_files = run(case, workers=3, shard_size=200)
        expected = _in_memory(case)
    assert num_files > 1, "one file"
    assert_same_bytes(found, expected)


@law("memory", _works_in_another_way, fitted=True)
def merging_in_memory_and_from_files_give_the_same_bits(case: MethodCase) -> None:
    """Merging in memory and from files give the same bits."""
    found, num_files = run(case, workers=1)
    assert num_files == 1, f"{num_files} files"
    assert_same_bytes(found, _in_memory(case))


def _in_memory(case: MethodCase) -> State:
    """What one thread makes of the models that `run` merges, with all tensors in one place."""
    base, models = case.toys(exact=False)
    return case.merge(base | INTEGERS, {name: model | INTEGERS for name, model in models.items()})


@law("buffers")
def no_more_scratch_space_is_used_than_is_counted(case: MethodCase) -> None:
    """No more scratch space is used than the memory plan counts."""
    assert issubclass(case.kind, TensorMethod)
    used = set()
    scratch = TensorGroup.scratch

    def counted(group: TensorGroup, place: str, dtype: torch.dtype | None = None) -> Tensor:
        used.add((place, dtype or group.models[0].dtype))
        return scratch(group, place, dtype)

    with replaced(TensorGroup, "scratch", counted):
        case.uneven().merge(*case.toys())
    assert len(used) <= case.kind.buffers, f"{len(used)} temporaries, and `buffers` says {case.kind.buffers}"


@law("device", fitted=True)
def an_accelerator_gives_what_the_cpu_gives(case: MethodCase) -> None:
    """An accelerator gives what the CPU gives, up to rounding: the same draws, the same thresholds."""
    with accelerator() as device:
        there, _ = run(case, exact=True, device=device)
    assert_near(there, run(case, exact=True, device="cpu")[0])


@contextmanager
def accelerator() -> Iterator[str]:
    """The device that the law is tried on."""
    if not torch.cuda.is_available():
        import pytest

        pytest.skip("no accelerator here")
    yield "cuda:0"

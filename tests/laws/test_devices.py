"""Every method on a stand-in for a device, which is as strict as a GPU: what would fail there fails here."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from mergetool.bundle.store import FactorStore
from mergetool.engine import devices, transfers
from mergetool.engine.device_worker import DeviceWorker
from mergetool.engine.devices import usable_device
from mergetool.engine.memory import here
from mergetool.engine.pool import WorkerPool
from mergetool.engine.sinks import MemorySink
from mergetool.engine.stages import run_stages
from mergetool.methods.tsv_merge import TsvMerge
from mergetool.planning import make_plan
from mergetool.recipe import load_recipe
from mergetool.tensors.source import MemorySource
from mergetool.testing.cases import MethodCase, all_cases, each_once
from tests.elsewhere import DEVICE, Elsewhere, NoDoubleError, algebra
from tests.files import LONG
from tests.streams import streaming
from tests.turns import some

TRIED = [case for case in all_cases() if not case.architecture]
CASES = [pytest.param(case, id=str(case)) for case in (TRIED if LONG else each_once(TRIED))]


def toys(case, exact):
    base, models = case.toys(exact=exact)
    return base, *models.values()


def recipe_of(case):
    base = {"base": "unused"} if case.has_base else {}
    if case.kind.statistic:
        base["calibration"] = {name: {"measured": "unused"} for name in case.statistics(case.toys()[1]) or {}}
    return load_recipe({**base, "models": dict.fromkeys(case.names, "unused"), "merge": case.section()})


def merged(case, device, store=None, *, exact=False, length=None, part=""):
    base, *models = ({key: each[key] for key in each if part in key} for each in toys(case, exact))
    models = dict(zip(case.names, models, strict=True))
    given = {"base": base, **models} if case.has_base else models
    measured = {name: MemorySource(state, name) for name, state in (case.statistics(models) or {}).items()}
    sources = {name: MemorySource(state, name) for name, state in given.items()}
    plan = make_plan(recipe_of(case), sources=sources, statistics=measured)
    sink = MemorySink(plan)
    pool = WorkerPool(plan, sink)
    pool.device, pool.store, pool._slice = str(device), store, length
    run_stages(here(plan, sink, pool))
    return sink.tensors


def assert_alike(there, here):
    """Up to rounding: the CPU takes ways of its own."""
    for name, expected in here.items():
        torch.testing.assert_close(there[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_method_works_on_a_device_and_says_whether_it_needs_float64(case):
    """And nothing is used before somebody has waited for it."""
    try:
        with Elsewhere(double=False), streaming():
            there = merged(case, DEVICE)
        needed = False
    except NoDoubleError:
        needed = True
        with Elsewhere(), streaming():
            there = merged(case, DEVICE)
    assert needed is recipe_of(case).method.needs_float64
    assert_alike(there, merged(case, "cpu"))


SLICED = [
    case
    for case in CASES
    if case.values[0].option in ("", "rescale=l1") and recipe_of(*case.values).method.granularity != "tensor"
]


@pytest.mark.parametrize("case", SLICED)
def test_the_host_waits_only_a_few_times_for_a_slice(case, monkeypatch):
    """For what a pass has counted, once for all models; for whether a result is finite, and for the result."""
    monkeypatch.setattr(transfers, "PIECES", 64)  # or it would wait for room, too
    monkeypatch.setattr(transfers, "PIECE_BYTES", 1 << 16)
    waits, tried = [], DeviceWorker._tried

    def watched(*given):
        before = streams.counts["waits"]
        done = tried(*given)
        waits.append(streams.counts["waits"] - before)
        return done

    monkeypatch.setattr(DeviceWorker, "_tried", watched)
    for _ in range(2):
        waits.clear()
        with Elsewhere(), streaming() as streams:
            merged(case, DEVICE, part="up_proj")
        if max(waits) <= 4:  # else there were tables to be made, once
            break
    assert waits
    assert max(waits) <= 4


@pytest.mark.parametrize("case", some(SLICED))
def test_bytes_do_not_depend_on_the_length_of_slices(case):
    with Elsewhere(), streaming():
        long, short = (merged(case, DEVICE, exact=True, length=length, part="up_proj") for length in (1 << 20, 24))
    for name, expected in long.items():
        assert torch.equal(short[name], expected), name


def test_threads_that_begin_linear_algebra_at_once_do_not_load_it_twice(monkeypatch):
    case, together = MethodCase(TsvMerge), Barrier(4)

    def work(_):
        together.wait()
        with Elsewhere():  # modes belong to threads
            return merged(case, DEVICE)

    monkeypatch.setattr(devices, "_loaded", set())
    monkeypatch.setattr(algebra, "loaded", False)
    with ThreadPoolExecutor(4) as pool:
        for there in pool.map(work, range(4)):
            assert_alike(there, merged(case, "cpu"))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda there: torch.zeros(()).add_(there.sum()),
        lambda there: torch.zeros(3)[0].mul_(there[0]),
        lambda there: torch.zeros(3).index_put_((torch.tensor([0]),), there[0]),
        lambda there: torch.arange(3.0)[there.long()],
        lambda there: torch.stack([there.sum(), torch.tensor(1.0)]),
        lambda there: there + torch.ones(3),
    ],
)
def test_the_stand_in_refuses_what_a_gpu_refuses(wrong):
    with Elsewhere(), pytest.raises(RuntimeError, match="same device"):
        wrong(torch.ones(3, device=DEVICE))


def test_the_stand_in_takes_what_a_gpu_takes():
    with Elsewhere():
        there, zeros = torch.ones(3, device=DEVICE), torch.zeros(3)
        zeros[0] = there.sum()
        assert zeros.tolist() == [3.0, 0.0, 0.0]
        assert (there[torch.tensor([0, 2])] * torch.tensor(2.0) + 1).tolist() == [3.0, 3.0]


def test_kept_factors_go_to_the_device_and_come_back(tmp_path):
    case, expected = MethodCase(TsvMerge), merged(MethodCase(TsvMerge), "cpu")
    for _ in ("made", "found"):
        with Elsewhere():
            there = merged(case, DEVICE, FactorStore(tmp_path))
        assert_alike(there, expected)
    assert list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("case", CASES)
def test_a_method_gives_the_same_on_a_gpu(case):
    assert_alike(merged(case, usable_device("cuda")), merged(case, "cpu"))

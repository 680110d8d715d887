"""Workers in processes of their own: the same bytes as threads, and nothing left behind whatever dies."""

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import mergetool
from mergetool.engine.fork import Fork
from mergetool.errors import MergeError
from tests.files import write_model, write_recipe
from tests.held import JOURNALLED, is_measured

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the command forks on Linux only")
SHAPE, NUM_TENSORS = (400, 500), 24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for model in ("base", "a", "b", "broken"):
        tensors = {f"layers.{i}.weight": torch.randn(SHAPE, generator=generator) for i in range(NUM_TENSORS)}
        if model == "broken":
            tensors["layers.7.weight"][3, 4] = float("nan")
        write_model(folder / model, {name: value.bfloat16() for name, value in tensors.items()})
    return folder


TIES = {"method": "ties", "density": 0.3}


def recipe(folder, models, names="ab", merge=TIES):
    return write_recipe(
        folder / "r.yaml",
        **({} if merge["method"] in ("linear", "slerp") else {"base": str(models / "base")}),
        models={name: str(models / name) for name in names},
        merge=merge,
        output={"path": str(folder / "out")},
    )


@pytest.fixture
def start(forks):
    """A run with three workers; with `units`, one that waits for a signal once so many units are done."""

    def run(path, *, units=None):
        return forks.open("run", path, "--workers", "3", held=units and (JOURNALLED, units))

    return run


def children(process):
    """Living processes that a process has started."""
    try:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        return []
    return [int(each) for each in listed]


def forked(process):
    """Wait for the processes of three workers."""
    found = []
    while process.poll() is None and len(found := children(process)) < 3:
        time.sleep(0.002)
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_end(pids):
    """Whether they are gone within 20 seconds: a worker ends after the unit in hand."""
    end = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize(
    "merge", [TIES, {**TIES, "scope": "model"}, {"method": "linear"}, {"method": "slerp", "t": 0.3}]
)
def test_processes_write_what_threads_write(tmp_path, models, merge, start):
    path = recipe(tmp_path, models, merge=merge)
    mergetool.run(path, output=tmp_path / "threads", workers=3)
    process = start(path)
    assert len(forked(process)) == 3
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "threads/model.safetensors").read_bytes()


def test_an_error_in_a_worker_is_told_like_any_other(tmp_path, models, start):
    process = start(recipe(tmp_path, models, ["a", "broken"], {"method": "task-arithmetic"}))
    _, told = process.communicate()
    assert process.returncode == 5
    assert "layers.7.weight" in told
    assert "flat index 1504: it is not finite in model 'broken'" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_a_worker_that_is_killed_ends_the_run_which_then_resumes(tmp_path, models, start):
    path = recipe(tmp_path, models)
    mergetool.run(path, output=tmp_path / "whole")
    process = start(path, units=1)
    worker = forked(process)[1]
    os.kill(worker, signal.SIGKILL)
    assert all_end([worker])
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate()
    assert process.returncode == 5
    assert "a worker process was killed" in told
    assert "run again, it resumes" in told
    _, told = (process := start(path)).communicate()
    assert process.returncode == 0, told
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.skipif(is_measured(), reason="a fork that begins to be measured holds the lock meanwhile")
def test_workers_do_not_outlive_a_killed_run_nor_hold_its_lock(tmp_path, models, start):
    process = start(recipe(tmp_path, models), units=1)
    workers = forked(process)
    process.kill()
    process.communicate()
    with (tmp_path / "out.partial.journal").open("rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert all_end(workers)


def test_ctrl_c_reaches_all_and_the_parent_decides(tmp_path, models, forks):
    held = (JOURNALLED, 1)
    process = forks.open("run", recipe(tmp_path, models), "--workers", "3", held=held, session=True)
    workers = forked(process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in told
    assert "killed" not in told
    assert all_end(workers)


def test_ctrl_c_is_not_lost_while_a_process_is_being_started(tmp_path, models, forks):
    """Python drops what is raised in the hooks of a fork, and another thread may take the signal in."""
    (told,) = forks.python("-c", INTERRUPTED_FORK, "run", recipe(tmp_path, models), "--workers", "3").wait()
    assert told.code == 130, told.err
    assert "interrupted; what was finished is kept" in told.err
    assert not (tmp_path / "out").exists()


INTERRUPTED_FORK = """
import os, signal, sys, time
from mergetool.cli import main

def interrupt():
    if signal.SIGINT in once:
        once.clear()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

once = {signal.SIGINT}
os.register_at_fork(after_in_parent=interrupt)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "mergetool"
main()
"""
"""The command, interrupted inside its first fork."""


@pytest.mark.parametrize(
    ("refusing", "why"), [("few", "Resource temporarily unavailable"), ("large", "Cannot allocate memory")]
)
def test_where_no_process_may_be_started_threads_do_the_work_and_say_so(tmp_path, models, forks, refusing, why):
    path = recipe(tmp_path, models)
    mergetool.run(path, output=tmp_path / "whole")
    (told,) = forks.python("-c", REFUSING[refusing] + COMMAND, "run", path, "--workers", "3").wait()
    if told.code == 77:
        pytest.skip("this machine promises more memory than it has")
    assert told.code == 0, told.err
    assert f"threads do the work of the workers: no process could be started ({why})" in told.err
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


REFUSING = {
    "few": """
import os

forks = iter([os.fork])
def fork():
    for one in forks:
        return one()
    raise BlockingIOError(11, "Resource temporarily unavailable")

os.fork = fork
""",
    "large": """
import mmap, os

quarter = (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4) & -4096
kept = [mmap.mmap(-1, quarter, flags=mmap.MAP_PRIVATE) for _ in range(9)]  # neighbours become one
try:
    os._exit(77 if os.fork() else 0)
except OSError as error:
    assert error.errno == 12
""",
}
"""The second fork fails as it does at the limit on processes (which does not bind root); more memory than there is."""
COMMAND = """
import sys
from mergetool.cli import main

sys.argv[0] = "mergetool"
main()
"""


class Odd:
    """A worker whose every answer is a surprise."""

    def count(self, *request):
        return torch.tensor(request[1:3])

    def perform(self, step, start, stop, stats):
        if start == 0:
            raise MergeError("what", "where", "fix")
        raise ZeroDivisionError("a bug")


def test_errors_keep_their_parts_and_bugs_their_traceback():
    step = type("Step", (), {"index": 4})()
    fork = Fork(Odd(), {4: step}, [])
    assert fork.count(step, 2, 3, None).tolist() == [2, 3]
    with pytest.raises(MergeError) as caught:
        fork.perform(step, 0, 1, {})
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("what", "where", "fix")
    with pytest.raises(RuntimeError, match=r"(?s)in a worker process.*ZeroDivisionError: a bug"):
        fork.perform(step, 1, 2, {})
    assert 1 << 16 < fork.close() < 1 << 40

"""Several processes at one merge: `accelerate launch --num_processes N -m mergetool run recipe.yaml`.

The launcher starts the same command N times, on one machine or on several that share a file system. All make the same
plan. Process 0 leads: it downloads, claims the output, creates the files, and finishes. Units of work are dealt out by
cost; every process fills its own slots of the same files and keeps a journal of its own, so a run that died resumes
with any number of processes. Which units are done is told through the launcher's store; a file is hashed by one
process from its front on, as it would be by one alone. Work whose cost nobody knows (a fit's searches from several
starts, the factors of a bundle) is taken piece by piece by whoever is free. Where all must have got as far (a count
over the whole model, a fit, the end) they exchange values over gloo.

One process is a team of one: the same code, nothing exchanged.
"""

import fcntl
import json
import os
import pickle
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import mergetool.errors as errors
from mergetool.errors import MergetoolError, OutputError

_T = TypeVar("_T")
_I = TypeVar("_I")
_EVER = timedelta(days=30)
_SIOCGIFADDR = 0x8915
_AGAIN = "run the same command again: what is finished is kept"


class Stopped(Exception):  # noqa: N818  (no error of this process)
    """Another process has failed, and will say why."""


class Team:
    """The processes of one run. This class is a team of one."""

    rank = 0
    size = 1
    local_size = 1
    """How many of them are on this machine."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        """The values that all processes give, in order. Raises the error of any process that gives none."""
        return [value]

    def leader_first(self, call: Callable[[], _T]) -> _T:
        """Everybody's own result of `call`; the others call when the leader has come back."""
        if self.leads:
            result = call()
            self.all_gather(None)
            return result
        self.all_gather(None)
        return call()

    def share(self, call: Callable[[_I], _T], items: Sequence[_I], threads: int = 1) -> list[_T]:
        """`call` of every item, in order. Each process, and each of its threads, takes the next when it is free.

        All processes must call this alike; in all of them the results are the same.
        """
        take, results = self._turns(len(items)), dict[int, _T]()

        def work() -> None:
            while (place := take()) is not None:
                results[place] = call(items[place])

        if threads == 1:
            work()
        else:
            with ThreadPoolExecutor(threads) as pool:
                for done in [pool.submit(work) for _ in range(threads)]:
                    done.result()
        every = {place: result for share in self.all_gather(results) for place, result in share.items()}
        return [every[place] for place in range(len(items))]

    def _turns(self, count: int) -> Callable[[], int | None]:
        """What gives each of the numbers below `count` once, to whichever process and thread asks next; then None."""
        numbers = iter(range(count))
        lock = threading.Lock()

        def take() -> int | None:
            with lock:
                return next(numbers, None)

        return take

    def agree(self, error: BaseException) -> BaseException:
        """The error that ends the run, whichever process met it first."""
        return error

    def publish(self, units: Sequence[tuple[int, int]]) -> None:
        """Tell the others that these units are written."""

    def poll(self) -> list[tuple[int, int]]:
        """Units that others have written since the last call. Raises Stopped when one of them has failed."""
        return []

    @property
    def one_machine(self) -> bool:
        """Whether what one process has written can be read by all at once."""
        return self.local_size == self.size


class Processes(Team):
    """A team of several, joined by the variables that a launcher sets."""

    def __init__(self) -> None:
        import torch.distributed

        dist: Any = torch.distributed

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if not self.one_machine and (interface := _interface_to(address)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        try:
            dist.init_process_group("gloo", rank=self.rank, world_size=self.size, timeout=_EVER)
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        except (RuntimeError, ValueError) as error:
            what = f"process {self.rank} of {self.size} cannot join the others: {str(error).splitlines()[0][:200]}"
            raise OutputError(what, f"{address}:{port}", "check the launcher's addresses and the network") from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"mergetool/{attempt}", store)
        self._group = dist
        self._sent = self._shared = 0
        self._seen = dict.fromkeys((rank for rank in range(self.size) if rank != self.rank), 0)
        self._agreed: BaseException | None = None
        self._lost = threading.Event()
        self._watched = dist.new_group(backend="gloo", timeout=_EVER)
        self._watches = [threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in self._seen]
        for watch in self._watches:
            watch.start()
        _places.extend(self.all_gather((socket.gethostname(), os.getpid())))

    def _watch(self, rank: int) -> None:
        """Wait for another process to say goodbye. One that dies says nothing, and its connection breaks."""
        import torch

        try:
            self._group.recv(torch.zeros(1), src=rank, group=self._watched)
        except RuntimeError:
            self._lost.set()

    def leave(self) -> None:
        """Say goodbye, and wait until the others do."""
        import torch

        if self._lost.is_set() or _ended:
            return
        try:
            for rank in self._seen:
                self._group.send(torch.ones(1), dst=rank, group=self._watched)
            for watch in self._watches:
                watch.join()
            self._group.destroy_process_group()
        except RuntimeError:  # somebody has just died, and nobody needs it any more
            return

    def all_gather(self, value: Any) -> list[Any]:
        answers = self._gather((None, value))
        if failed := next((failure for failure, _ in answers if failure is not None), None):
            _told.append(failed)
            self._agreed = _decoded(failed)
            raise self._agreed
        if any(isinstance(given, Stopped) for _, given in answers):
            raise Stopped
        return [given for _, given in answers]

    def _gather(self, value: Any) -> list[Any]:
        """Everybody's value. In a thread of its own: signals must reach this one."""
        answers: list[Any] = [None] * self.size
        failures: list[BaseException] = []
        done = threading.Event()

        def talk() -> None:
            try:
                self._group.all_gather_object(answers, value)
            except BaseException as error:
                failures.append(error)
            done.set()

        threading.Thread(target=talk, daemon=True).start()
        while not done.wait(0.2):
            if self._lost.is_set():
                raise self._died()
        if failures:
            raise self._died()
        return answers

    def _died(self) -> OutputError:
        self._agreed = OutputError(
            "another process of this run has died", f"process {self.rank} of {self.size}", _AGAIN
        )
        return self._agreed

    def agree(self, error: BaseException) -> BaseException:
        if error is self._agreed or error in _ended or not isinstance(error, Exception):  # told already, or Ctrl-C
            return error
        try:
            self._store.set("failed", "1")
            answers = self._gather((None, error) if isinstance(error, Stopped) else (_encoded(error, self.rank), None))
        except OutputError as died:
            return died
        except RuntimeError:  # the store has gone, and the leader with it
            return self._died()
        failed = next((failure for failure, _ in answers if failure is not None), None)
        _told.extend([failed] if failed is not None else [])
        self._agreed = error if failed is None else _decoded(failed)
        return self._agreed

    def _turns(self, count: int) -> Callable[[], int | None]:
        self._shared += 1
        key = f"share/{self._shared}"

        def take() -> int | None:
            self._check()
            place = self._store.add(key, 1) - 1
            return place if place < count else None

        return take

    def publish(self, units: Sequence[tuple[int, int]]) -> None:
        if units:
            self._store.set(f"{self.rank}/{self._sent}", json.dumps(units))
            self._sent += 1

    def poll(self) -> list[tuple[int, int]]:
        self._check()
        units: list[tuple[int, int]] = []
        for rank in self._seen:
            while self._store.check([key := f"{rank}/{self._seen[rank]}"]):
                units += [(step, start) for step, start in json.loads(self._store.get(key))]
                self._seen[rank] += 1
        return units

    def _check(self) -> None:
        if self._lost.is_set():
            raise self._died()
        if self._store.check(["failed"]):
            raise Stopped


_places: list[tuple[str, int]] = []
"""Host and process id of every process, once they have met."""
_told: list[bytes] = []
"""Errors that the leader has heard of."""


def _interface_to(address: str) -> str | None:
    """The network interface that leads to `address` (IPv4), if it can be told.

    gloo by itself takes that of this host's own name, which many systems say is the loopback: nobody else is there.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                told = fcntl.ioctl(probe, _SIOCGIFADDR, name.encode().ljust(256, b"\0"))
                if socket.inet_ntoa(told[20:24]) == own:
                    return name
    return None


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def leads() -> bool:
    """Whether this process is alone, or leads the others."""
    return not launched() or int(os.environ["RANK"]) == 0


def reports_errors() -> bool:
    """Whether people hear of an error from this process: from the leader, or else the first that is left here."""
    if leads() or _told:
        return leads()
    here = socket.gethostname()
    return not any(host != here or _lives(process) for host, process in _places[: int(os.environ["RANK"])])


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def terminated() -> OutputError:
    """What a launcher's SIGTERM means: it ends the others when one process has died."""
    what = "ended from outside (SIGTERM): another process of this run has died, or the job was stopped"
    _ended.append(OutputError(what, f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}", _AGAIN))
    return _ended[-1]


_ended: list[OutputError] = []


@contextmanager
def joined() -> Iterator[Team]:
    """The team of this run; inside another `joined`, the same one. An error inside ends the run of all of them."""
    if _current or not launched():
        yield _current[0] if _current else Team()
        return
    team = Processes()
    _current.append(team)
    try:
        yield team
    except Exception as error:
        raise team.agree(error) from error.__cause__
    finally:
        _current.clear()
        team.leave()


_current: list[Team] = []


def _encoded(error: Exception, rank: int) -> bytes:
    if isinstance(error, MergetoolError):
        return pickle.dumps((type(error).__name__, error.what, error.where, error.fix))
    text = "".join(traceback.format_exception(error))
    return pickle.dumps(("", f"in process {rank}:\n{text}", "", ""))


def _decoded(failure: bytes) -> Exception:
    kind, what, where, fix = pickle.loads(failure)
    return getattr(errors, kind)(what, where, fix) if kind else RuntimeError(what)

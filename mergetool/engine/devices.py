"""Where the arithmetic happens: on the CPU, or on a device on which every worker computes in a stream of its own.

What all workers copy to a device goes through one stream, and what they copy back through another: a bus has two ways.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergetool.errors import PlanError

if TYPE_CHECKING:
    import torch

LEAST_SLICE = 1 << 14
"""Elements below which slices, or tensors, are not worth a device."""
_local = threading.local()
_loading = threading.Lock()
_loaded: set[str] = set()
"""Devices whose linear algebra is ready."""
_ways: dict[Any, "Ways"] = {}


def own_device(asked: str) -> str:
    """The device of this process: each takes its own of a machine's where `cuda` without a number is asked for."""
    return f"{asked}:{os.environ.get('LOCAL_RANK') or 0}" if asked == "cuda" else asked


def usable_device(name: str, *, double: bool = False) -> str:
    """The device that `--device NAME` means, for a run that needs float64 if `double`.

    Raises PlanError for one that cannot be used.
    """
    import torch

    if name == "auto":
        for here in devices_here():
            with suppress(PlanError):
                return usable_device(here, double=double)
        return "cpu"
    try:
        device = torch.device(own_device(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).strip().splitlines()[0][:200]
        raise PlanError(f"device {name!r} cannot be used: {first_line}", "--device", "use --device cpu") from None
    if device.type == "mps" and double:
        raise PlanError("mps has no float64, which this recipe computes in", "--device", "use --device cpu")
    return str(device)


def device_for_networks(name: str) -> str:
    """The device that `--device NAME` means where whole networks run: `auto` leaves out Metal, which lacks float64.

    Raises PlanError for one that cannot be used.
    """
    return usable_device(name, double=name == "auto")


def devices_here() -> list[str]:
    """Devices that this process may choose from, the fastest first. Processes of one machine take turns."""
    import torch

    devices = []
    if torch.cuda.is_available():
        devices.append(f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


@contextmanager
def one_thread() -> Iterator[int]:
    """While inside, torch computes in one thread. Gives the number of threads it had.

    How sums are split up depends on the number of threads, and with it their last bit: a result must not depend on
    the number of cores, workers or processes. Nor is more worth having: slices are too short, and the threads of
    several workers get in each other's way.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def library(device: "torch.device") -> Any:
    """torch's module for the streams of a device; None where there are none."""
    import torch

    return torch.cuda if device.type == "cuda" else None


@contextmanager
def own_stream(device: "torch.device") -> Iterator[None]:
    """Do what is inside in this thread's own stream of the device, and wait for it; nothing special without streams."""
    streams = library(device)
    if streams is None:
        yield
        return
    known: dict[Any, Any] = _local.__dict__.setdefault("streams", {})
    if (streams, device) not in known:
        known[streams, device] = streams.Stream(device)
    with streams.stream(known[streams, device]):
        yield
        known[streams, device].synchronize()


@dataclass(frozen=True)
class Ways:
    """The streams in which all copies to a device are made, and all from it."""

    up: Any
    down: Any


def ways(device: "torch.device") -> Ways:
    """Those of a device that has streams, the same for every thread."""
    streams = library(device)
    with _loading:
        if (streams, device) not in _ways:
            _ways[streams, device] = Ways(streams.Stream(device), streams.Stream(device))
        return _ways[streams, device]


def free_memory(device: "torch.device") -> int | None:
    """Bytes that a device has left, as far as is known."""
    streams = library(device)
    return None if streams is None else int(streams.mem_get_info(device)[0])


def load_linear_algebra(device: "torch.device") -> None:
    """Have torch load the linear algebra of a device, which threads that use it first must not do at once.

    torch loads CUDA's at the first call, without a lock; two at once end in "lazy wrapper
    should be called at most once".
    """
    import torch

    with _loading:
        if device.type != "cpu" and str(device) not in _loaded:
            with suppress(NotImplementedError):  # Metal has none: a method that wants it says so
                torch.linalg.eigh(torch.ones(1, 1, device=device))
            _loaded.add(str(device))


def free_device(device: "torch.device") -> None:
    """Give back what torch keeps of a device's memory for itself."""
    streams = library(device)
    if streams is not None:
        streams.empty_cache()

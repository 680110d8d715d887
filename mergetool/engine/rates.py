"""What this machine can do, measured in less than a second where there is a device to choose, and remembered.

The memory is `rates.json` in the user's cache folder. It is measured again on another machine, with another device or
version of torch, and where it cannot be read.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from mergetool.engine import devices
from mergetool.errors import MergetoolError
from mergetool.planning.graph import SLICE_ELEMENTS
from mergetool.tensors.digests import cache_folder
from mergetool.tensors.io import bytes_of, read_exact
from mergetool.tensors.writer import write_file

_DRIVER = Path("/proc/driver/nvidia/gpus")
_VERSION = 1
"""Of how these are measured."""
_SECONDS = 0.08
"""For each of them, at most about."""
_LEAST_START = 1.0
"""Seconds that a device takes at least to get ready: here it may have been so before, and kernels are loaded, too."""
_COPIED = 1 << 25
_EIGEN = 1 / 8
"""Of the rate of a product, what a decomposition on a device reaches."""
_SIDE = 2048


@dataclass(frozen=True)
class Rates:
    """Names and units are those of `planning.duration.Machine`."""

    element_rate: float
    hash_rate: float
    copy_rate: float
    disk_read: float
    disk_write: float
    bus: float
    device_memory: float
    device_flops: float
    device_start: float


def rates_of(device: torch.device, threads: int) -> Rates:
    """Those of this machine with so many threads, and of a device."""
    about = _about(device, threads)
    path = cache_folder() / "rates.json"
    known = _read(path)
    with suppress(TypeError):
        return Rates(**known.get(about, {}))
    measured = measure(device, threads)
    with suppress(OSError, MergetoolError):  # it is only a memory
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(_read(path) | {about: asdict(measured)}, indent=2))
    return measured


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text("utf-8"))
        return known if isinstance(known, dict) else {}
    return {}


def _about(device: torch.device, threads: int) -> str:
    """What the rates belong to, in words."""
    machine = f"{platform.machine()} {_processor()}, {os.cpu_count()} cores, {threads} threads"
    return f"version {_VERSION}; {machine}; {device}: {_model(device)}; torch {torch.__version__}"


def _model(device: torch.device) -> str:
    """What a device is; on Linux without waking it up."""
    told = [line for path in sorted(_DRIVER.glob("*/information")) for line in path.read_text().splitlines()]
    models = [line.partition(":")[2].strip() for line in told if line.startswith("Model:")]
    if device.type != "cuda" or models:
        return ", ".join([*models, os.environ.get("CUDA_VISIBLE_DEVICES", "")])
    return torch.cuda.get_device_name(device)


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def measure(device: torch.device, threads: int) -> Rates:
    """Look at the clock, in the folder for temporary files."""
    with TemporaryFile() as file, ThreadPoolExecutor(threads) as pool, devices.one_thread():
        data = os.urandom(1 << 20) * (_COPIED >> 20)
        begun = time.perf_counter()
        os.pwrite(file.fileno(), data, 0)
        disk_write = len(data) / (time.perf_counter() - begun)
        elements = sum(pool.map(_elements, [file.fileno()] * threads))
        copy_rate = sum(pool.map(_reading, [file.fileno()] * threads))
    begun = time.perf_counter()
    torch.zeros(1, device=device).cpu()
    start = max(_LEAST_START, time.perf_counter() - begun)
    square = torch.rand(_SIDE, _SIDE, dtype=torch.float32 if device.type == "mps" else torch.float64)
    bus, device_flops = _to_device(device, square)
    return Rates(
        element_rate=elements / threads,
        hash_rate=_rate(lambda: hashlib.sha256(data[: 1 << 22]).digest()) * (1 << 22),
        copy_rate=copy_rate / threads,
        disk_read=copy_rate,
        disk_write=disk_write,
        bus=bus,
        device_memory=_device_memory(device),
        device_flops=device_flops,
        device_start=start,
    )


def _rate(call: Callable[[], Any]) -> float:
    """Calls a second, without the first."""
    call()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < _SECONDS:
        call()
        count += 1
    return count / (time.perf_counter() - begun)


def _elements(file: int) -> float:
    """Elements a second that one of several threads reads, widens and adds."""
    length = min(SLICE_ELEMENTS, _COPIED // 2)
    stored = torch.empty(length, dtype=torch.bfloat16)
    values, total = torch.empty(length), torch.zeros(length)

    def one() -> None:
        read_exact(file, bytes_of(stored), 0, "a file to measure with")
        total.add_(values.copy_(stored), alpha=0.5)

    return _rate(one) * length


def _reading(file: int) -> float:
    """Bytes a second that one of several threads reads."""
    room = bytes_of(torch.empty(_COPIED // 4, dtype=torch.uint8))
    return _rate(lambda: read_exact(file, room, 0, "a file to measure with")) * len(room)


def _to_device(device: torch.device, square: Tensor) -> tuple[float, float]:
    """Bytes a second to a device, and multiply-adds a second of a decomposition there, as products tell."""
    pinned = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=devices.library(device) is not None)
    there, factor = torch.empty(_COPIED, dtype=torch.uint8, device=device), square.to(device)
    bus = _rate(lambda: there.copy_(pinned)) * _COPIED

    def product() -> None:
        torch.mm(factor, factor)[0, :1].cpu()

    return bus, _rate(product) * _SIDE**3 * _EIGEN


def _device_memory(device: torch.device) -> float:
    """Bytes a second that are read and written there."""
    values = torch.zeros(_COPIED // 4, device=device)
    repeats = 8

    def some() -> None:
        for _ in range(repeats):
            values.add_(1.0)
        values[:1].cpu()

    return _rate(some) * repeats * 2 * _COPIED

"""Between files and a device, in pieces: while one is read, another is copied, and the one before is computed with.

file -> pinned memory -> (stream up) -> device, as stored -> (own stream) -> device, as computed; and all the way back.
The memory of a piece is used again once its copy has ended; nobody waits otherwise. Values travel as they are stored:
a device widens and rounds faster than a bus brings it twice the bytes.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mergetool.engine import devices
from mergetool.tensors.io import bytes_of

PIECE_BYTES = 1 << 23
"""Long enough for a copy to reach the speed of the bus."""
PIECES = 3
PINNED_BYTES = PIECES * PIECE_BYTES
"""What each worker has of memory that is never swapped."""

Fill = Callable[[int, memoryview], None]
"""Reads stored elements from the given one on."""
Take = Callable[[int, memoryview], None]
"""Takes stored bytes that begin at the given one."""


class Transfers:
    """The ring of pieces of one worker, which alone uses it, in its own stream."""

    def __init__(self, device: torch.device) -> None:
        streams = devices.library(device)
        piece: Callable[[], _Piece] = (lambda: _Piece(device)) if streams is None else (lambda: _Streamed(device))
        self._ring = deque(piece() for _ in range(1 if streams is None else PIECES))

    def up(self, values: Tensor, dtype: torch.dtype, fill: Fill) -> None:
        """Fill `values`, on the device, with elements that are stored in this dtype."""
        flat, length = values.view(-1), PIECE_BYTES // dtype.itemsize
        for begin in range(0, len(flat), length):
            count = min(length, len(flat) - begin)
            piece = self._next()
            fill(begin, piece.bytes[: count * dtype.itemsize])
            with piece.lifted(count * dtype.itemsize) as stored:
                flat[begin : begin + count].copy_(stored.view(dtype))

    def down(self, stored: Tensor, take: Take) -> None:
        """Give the bytes of a tensor on the device away, in order. They have been copied when this returns."""
        whole = stored.reshape(-1).view(torch.uint8)
        waiting: deque[tuple[int, int, _Piece]] = deque()
        for begin in range(0, len(whole), PIECE_BYTES):
            if len(waiting) == len(self._ring):
                _give(take, *waiting.popleft())
            piece, size = self._next(), min(PIECE_BYTES, len(whole) - begin)
            piece.drop(whole[begin : begin + size])
            waiting.append((begin, size, piece))
        for each in waiting:
            _give(take, *each)

    def _next(self) -> "_Piece":
        """The piece that was used longest ago, free to be used again."""
        self._ring.rotate(-1)
        self._ring[-1].wait()
        return self._ring[-1]


def _give(take: Take, begin: int, size: int, piece: "_Piece") -> None:
    piece.wait()
    take(begin, piece.bytes[:size])


class _Piece:
    """Memory of the host, of a device without streams: copies are over when they return."""

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self._here = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned)
        self._there = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device)
        self.bytes = bytes_of(self._here)

    def wait(self) -> None:
        """Until what was copied last from or to the host's memory has arrived."""

    @contextmanager
    def lifted(self, size: int) -> Iterator[Tensor]:
        """The first bytes, on the device; whoever is inside may use them."""
        self._there[:size].copy_(self._here[:size])
        yield self._there[:size]

    def drop(self, stored: Tensor) -> None:
        """Copy bytes from the device."""
        self._here[: len(stored)].copy_(stored)


class _Streamed(_Piece):
    """Pinned memory of the host: copies go on in the background."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, pinned=True)
        self._streams: Any = devices.library(device)
        self._ways = devices.ways(device)
        self._copied, self._used = self._streams.Event(blocking=True), self._streams.Event()
        self._used.record()

    def wait(self) -> None:
        self._copied.synchronize()

    @contextmanager
    def lifted(self, size: int) -> Iterator[Tensor]:
        with self._beside(self._ways.up, self._used):
            self._there[:size].copy_(self._here[:size], non_blocking=True)
        self._streams.current_stream().wait_event(self._copied)
        yield self._there[:size]
        self._used.record()

    def drop(self, stored: Tensor) -> None:
        computed = self._streams.Event()
        computed.record()
        with self._beside(self._ways.down, computed):
            self._here[: len(stored)].copy_(stored, non_blocking=True)

    @contextmanager
    def _beside(self, stream: Any, after: Any) -> Iterator[None]:
        """In another stream, after something."""
        stream.wait_event(after)
        with self._streams.stream(stream):
            yield
            self._copied.record()

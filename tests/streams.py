"""Streams of the stand-in, and a watch over them: what comes out right on a GPU only by luck fails here.

Copies from pinned memory are taken to end when somebody waits for them, not before: whoever changes such memory earlier
is told so, and what is copied into it is not there until then. A tensor that one stream writes while another may still
use it, because nothing made the second wait, is an error: of every stream it is known what it and those it has waited
for have done (vector clocks). The threads of the host are taken for one.

Also counted: bytes up and down, how often the host waits, operations, and the most bytes that were there at once.
"""

import threading
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import torch

from mergetool.engine import devices
from tests import elsewhere
from tests.elsewhere import DEVICE, There, schema_of, tensors_in

_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select", "aten::_unique2"}
"""The host must know the result to go on."""


class RaceError(RuntimeError):
    """Two who may work at the same time use the same memory."""


@dataclass
class Past:
    """Who wrote a tensor's memory last, and who has read it since: (stream, its how manieth operation)."""

    written: tuple = ()
    read: list = field(default_factory=list)


class Stream:
    def __init__(self, *_, **__):
        self.clock = Counter()
        self.unfinished = []
        """(its how manieth operation, what is to be done when the host has waited for it)."""

    def wait_event(self, event):
        self.clock |= event.clock

    def wait_stream(self, other):
        self.clock |= other.clock

    def synchronize(self):
        event = Event()
        event.record(self)
        event.synchronize()


class Event:
    def __init__(self, *_, **__):
        self.clock = Counter()

    def record(self, stream=None):
        self.clock = Counter(Streams.now.current_stream().clock if stream is None else stream.clock)

    def synchronize(self):
        Streams.now.host_waits(self.clock)


class Streams:
    """What `torch.cuda` is to a GPU."""

    now = None
    Stream, Event = Stream, Event

    def __init__(self, free):
        self.free = free
        self.counts = Counter()
        self._host = Counter()
        self._default = Stream()
        self._local = threading.local()
        self._lock = threading.RLock()
        self._streams = []
        self._pinned = {}

    def current_stream(self, *_):
        return getattr(self._local, "stream", self._default)

    @contextmanager
    def stream(self, stream):
        before = self.current_stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def mem_get_info(self, *_):
        return self.free, self.free

    def empty_cache(self):
        pass

    def past(self):
        return Past()

    def pin(self, tensor):
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def host_waits(self, clock):
        """The host knows from now on that all this has been done."""
        with self._lock:
            self.counts["waits"] += any(count > self._host[stream] for stream, count in clock.items())
            self._host |= clock
            for stream in self._streams:
                done = [each for each in stream.unfinished if each[0] <= clock[stream]]
                stream.unfinished = [each for each in stream.unfinished if each[0] > clock[stream]]
                for _, finish in done:
                    finish()

    def wait(self):
        """The host waits for the stream it works in."""
        self.current_stream().synchronize()

    def finish(self):
        """What was never waited for ends, too."""
        for stream in self._streams:
            stream.synchronize()

    def ran(self, func, args, kwargs):
        """An operation is begun in the current stream."""
        reads, writes = [], []
        for argument, value in zip(schema_of(func), args, strict=False):
            if argument.is_write or not argument.is_view:
                (writes if argument.is_write else reads).extend(tensors_in(value))
        writes += tensors_in(kwargs.get("out"))
        reads, writes = ([each for each in all_ if isinstance(each, There)] for all_ in (reads, writes))
        self.counts["operations"] += bool(reads or writes)
        self._note(reads, writes)
        if func._schema.name in _WAITING or _chooses(func, args):
            self.wait()

    def _note(self, reads, writes):
        with self._lock:
            stream = self.current_stream()
            if stream not in self._streams:
                self._streams.append(stream)
            stream.clock |= self._host
            stream.clock[stream] += 1
            for tensor in (*reads, *writes):
                tensor.past = tensor.past or Past()
            for tensor in reads:
                self._check(stream, [tensor.past.written])
                tensor.past.read.append((stream, stream.clock[stream]))
            for tensor in writes:
                self._check(stream, [tensor.past.written, *tensor.past.read])
                tensor.past.written, tensor.past.read = (stream, stream.clock[stream]), []

    def _check(self, stream, others):
        for other, count in filter(None, others):
            if other in self._streams and stream.clock[other] < count:
                raise RaceError("used while another stream may not be done with it: nothing has waited for that")

    def made(self, tensor):
        """Its memory belongs to the current stream: others must wait until that is there."""
        self._note([], [tensor])
        size = tensor.data_here.untyped_storage().nbytes()
        self._hold(size)
        weakref.finalize(tensor.past, self._hold, -size)

    def _hold(self, size):
        with self._lock:
            self.counts["held"] += size
            self.counts["most"] = max(self.counts["most"], self.counts["held"])

    def waited_for(self, copy):
        """A copy between the host and the device has been made, and the host has waited for it."""
        self.counts["up" if isinstance(copy, There) else "down"] += copy.numel() * copy.element_size()
        self.counts["copies"] += 1
        self.wait()

    def copied(self, target, source, *, later):
        """A copy between the host and the device, `later` if the host goes on meanwhile."""
        up = isinstance(target, There)
        here = source if up else target
        self.counts["up" if up else "down"] += source.numel() * source.element_size()
        self.counts["copies"] += 1
        self._note([] if up else [source], [target] if up else [])
        if not later or here.untyped_storage().data_ptr() not in self._pinned:
            self.wait()
            _copy(target, source)
            return
        stream = self.current_stream()
        if up:
            target.data_here.copy_(source)
            stream.unfinished.append((stream.clock[stream], partial(_check_unchanged, source, source.clone())))
        else:
            assert here.dtype == source.dtype, "a copy that also converts is no copy in the background"
            stream.unfinished.append((stream.clock[stream], partial(_copy, target, source)))


def _copy(target, source):
    values = source.data_here if isinstance(source, There) else source
    (target.data_here if isinstance(target, There) else target).copy_(values)


def _check_unchanged(pinned, before):
    if not torch.equal(before.view(torch.uint8), pinned.view(torch.uint8)):
        raise RaceError("pinned memory was changed before its copy to the device had ended")


def _chooses(func, args):
    """Whether how much comes out depends on the values of a mask."""
    if func._schema.name != "aten::index":
        return False
    return any(isinstance(x, There) and x.dtype == torch.bool for x in tensors_in(args[1:]))


@contextmanager
def streaming(free=1 << 40):
    """While inside, the stand-in has streams, and so much memory.

    Nobody keeps them afterwards: they hold what is pinned.
    """
    made = Streams(free)
    there = dict.fromkeys((DEVICE, torch.device(DEVICE.type)), made)
    with (
        patch.object(devices, "library", there.get),
        patch.object(devices, "_ways", {}),
        patch.object(devices, "_local", threading.local()),
        patch.object(elsewhere, "watch", made),
        patch.object(Streams, "now", made),
    ):
        yield made
        made.finish()

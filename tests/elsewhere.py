"""A stand-in for a device: its tensors keep their data here, and are as strict as those of a GPU.

`torch.device("xpu")` is taken for it. What fails here as on a real device:

- an operation that mixes its tensors with others; a single number may lie on the CPU where an operation goes entry by
  entry and only reads it, but an accumulator of one number may not, nor may what is put at places of a tensor
- whatever reads its memory directly (numpy, addresses)
- float64 with `double=False`: mps has none
- linear algebra that two threads use for the first time at once: it is loaded then, as torch loads CUDA's
- with `tests.streams`: memory that two streams use at once, pinned memory that is changed while it is copied, or read
  before its values have come; and the waits of the host are counted

Nothing is too small to be computed there while it is active.
"""

import threading
import time
from functools import cache
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from mergetool.engine import devices

watch = None
"""Who hears of all that is done, where the stand-in has streams (`tests.streams`)."""
DEVICE = torch.device("xpu", 0)
_INDEXED = {"aten::index", "aten::index_put_"}
"""The places may lie on the CPU, the values may not."""
_ALGEBRA = ("linalg_", "_linalg_", "cholesky", "geqrf", "ormqr", "orgqr", "triangular_solve", "lu_")
_FORBIDDEN = {torch.Tensor.numpy, torch.Tensor.data_ptr, torch.Tensor.__array__}


class NoDoubleError(TypeError):
    """This device has no float64."""


class There(torch.Tensor):
    """A tensor of the stand-in; `data_here` are its values."""

    @staticmethod
    def __new__(cls, here):
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype
        )
        made.data_here = here
        made.past = None
        return made

    device = property(lambda _: DEVICE)
    is_cpu = property(lambda _: False)

    def __repr__(self):
        return f"There({self.data_here})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        _check_one_device(func, args, kwargs)
        name = func._schema.name
        if name.removeprefix("aten::").startswith(_ALGEBRA):
            algebra.load()
        if watch is not None:
            if name == "aten::copy_" and not all(isinstance(each, There) for each in args[:2]):
                watch.copied(*args[:2], later=args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                return args[0]
            watch.ran(func, args, kwargs)
        out = func(*_here(args), **_here(kwargs))
        if name.endswith("_") and not name.endswith("__"):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        return _there(out, args)


def _check_one_device(func, args, kwargs):
    """Nothing is written on one device from another but by a copy, and what is read lies where the rest does."""
    names = [argument.name for argument in schema_of(func)]
    for argument, value in (*zip(names, args, strict=False), *kwargs.items()):
        for each in tensors_in(value):
            if not isinstance(each, There) and not _may_be_here(func, argument, each):
                raise RuntimeError(f"{func}: expected all tensors to be on the same device")


@cache
def schema_of(func):
    """The arguments of an operation: what torch tells of them is slow to ask for."""
    return [Argument(each.name, each.is_write, each.alias_info is not None) for each in func._schema.arguments]


class Argument(NamedTuple):
    name: str
    is_write: bool
    is_view: bool
    """Or it is written."""


def tensors_in(values):
    """All of them, in lists and tuples, too: `tree_leaves` takes several times as long."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [each for value in values for each in tensors_in(value)] if isinstance(values, list | tuple) else []


def _may_be_here(func, argument, value):
    name = func._schema.name
    if name == "aten::copy_" or (name in _INDEXED and argument == "indices"):
        return True
    written = {argument.name for argument in schema_of(func) if argument.is_write}
    return value.dim() == 0 and torch.Tag.pointwise in func.tags and argument not in written


class _Algebra:
    """Whether the library is loaded. When two threads load it at once, the second ends as it does in torch."""

    def __init__(self):
        self.loaded = False
        self._loading = threading.Lock()

    def load(self):
        if self.loaded:
            return
        if not self._loading.acquire(blocking=False):
            raise RuntimeError("lazy wrapper should be called at most once")
        time.sleep(0.05)
        self.loaded = True
        self._loading.release()


algebra = _Algebra()
_entering, _inside, _least = threading.Lock(), [0], devices.LEAST_SLICE


def _nothing_is_small(more):
    """Modes belong to threads, the size that a device is worth to all."""
    with _entering:
        _inside[0] += more
        devices.LEAST_SLICE = 0 if _inside[0] else _least


class Elsewhere(TorchFunctionMode):
    """While this is active, the stand-in is there."""

    def __init__(self, *, double=True):
        super().__init__()
        self.double = double

    def __enter__(self):
        _nothing_is_small(1)
        return super().__enter__()

    def __exit__(self, *error):
        _nothing_is_small(-1)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _FORBIDDEN and isinstance(args[0], There):
            raise TypeError(f"{func.__name__}: the memory of a device cannot be read directly")
        if func is torch.Tensor.cpu:
            return self._moved(args[0], "cpu")
        if func is torch.Tensor.tolist:
            return _here(self._moved(args[0], "cpu")).tolist()
        if func is torch._has_compatible_shallow_copy_type:  # by which modules that move decide to make new parameters
            return isinstance(args[0], There) is isinstance(args[1], There)
        if func is torch.Tensor.to:
            return self._moved(*args, **kwargs)
        device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        there = device is not None and torch.device(device).type == DEVICE.type
        out = func(*args, **kwargs, **({} if there or device is None else {"device": device}))
        if there:
            out = _there(out)
        self._check(out)
        return watch.pin(out) if pinned and watch is not None else out

    def _moved(self, tensor, *args, **kwargs):
        target = next((each for each in args if isinstance(each, torch.device | str)), kwargs.pop("device", None))
        other = next((each for each in args if isinstance(each, torch.Tensor)), None)
        rest = [each for each in args if isinstance(each, torch.dtype)]
        if other is not None:
            target, kwargs = other.device, {"dtype": other.dtype, **kwargs}
        there = isinstance(tensor, There) if target is None else torch.device(target).type not in ("cpu", "meta")
        data = tensor.data_here if isinstance(tensor, There) else tensor
        data = data.to(*rest, **kwargs)
        if there and isinstance(tensor, There) and data is tensor.data_here:
            return tensor
        between = there != isinstance(tensor, There)
        out = _there(data.clone() if between else data) if there else data.clone() if between else data
        if between and watch is not None:
            watch.waited_for(out)
        self._check(out)
        return out

    def _check(self, out):
        if self.double:
            return
        for each in tensors_in(out):
            if isinstance(each, There) and each.dtype == torch.float64:
                raise NoDoubleError


def _here(values):
    if isinstance(values, There):
        return values.data_here
    if isinstance(values, dict):
        return {key: _here(each) for key, each in values.items()}
    return type(values)(map(_here, values)) if type(values) in (list, tuple) else values


def _there(values, given=()):
    """What an operation made on the device; views have the past of what they are of."""
    known = {each.data_here.untyped_storage().data_ptr(): each.past for each in _tensors(given) if each.numel()}

    def made(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, There):
            return value
        out = There(value)
        if watch is not None:
            out.past = known.get(value.untyped_storage().data_ptr()) or watch.past()
            if out.past.written == ():
                watch.made(out)
        return out

    return made(values) if isinstance(values, torch.Tensor) else tree_map(made, values)


def _tensors(values):
    return [each for each in tensors_in(values) if isinstance(each, There)]

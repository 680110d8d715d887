"""Other weights for the calling thread alone: a model that several threads share answers each with its own.

    make_local(module)
    with replaced(module, {"weight": mine}):     # module.weight is mine here, and what it was in every other thread
        module(x)

Attributes of a module are looked up in its tables of parameters and buffers. `make_local` puts tables in their place
that remember, for each thread, what it is to see instead. Nothing that is stored changes, so that no thread can leave
anything behind, and copies, state dicts and moves between devices see the module's own tensors.

Some modules read a tensor of another one instead of calling it. What they are to find may be expensive to make, and
often all that they ask for is its dtype; so they find a `pending` tensor, which is made once someone computes with it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Offered = Callable[[str], Tensor | None]
"""What the calling thread finds under a name instead of a module's own tensor, or None where it finds that."""


class _LocalTable(dict[str, "Tensor | None"]):
    """A table of tensors; `seen` holds what the calling thread finds instead, if anything, or `offered` makes it."""

    def __init__(self, own: Mapping[str, Tensor | None]) -> None:
        super().__init__(own)
        self._local = threading.local()
        self.offered: Offered | None = None

    @property
    def seen(self) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = self._local.__dict__
        return seen

    def __getitem__(self, key: str) -> Tensor | None:
        seen = self.seen
        if getattr(_placing, "now", False):
            return super().__getitem__(key)
        if key in seen:
            return seen[key]
        offered = None if self.offered is None else self.offered(key)
        return super().__getitem__(key) if offered is None else offered

    def __reduce__(self) -> tuple[Any, ...]:
        return _LocalTable, (dict(self),)


_placing = threading.local()


@dataclass(frozen=True)
class _Placing:
    """What accelerate does to bring a module's own tensors and to take them away: it must find those."""

    call: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, _placing.now = getattr(_placing, "now", False), True
        try:
            return self.call(*args, **kwargs)
        finally:
            _placing.now = before


def make_local(module: nn.Module, offered: Offered | None = None) -> None:
    """Let threads replace this module's tensors for themselves. A second call only adds what is `offered`."""
    for name in ("_parameters", "_buffers"):
        table = module.__dict__[name]
        if not isinstance(table, _LocalTable):
            table = module.__dict__[name] = _LocalTable(table)
        table.offered = offered or table.offered
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None and not isinstance(vars(hook).get("pre_forward"), _Placing):
        hook.pre_forward, hook.post_forward = _Placing(hook.pre_forward), _Placing(hook.post_forward)


def own_tensor(module: nn.Module, key: str) -> Tensor | None:
    """A module's own parameter or buffer, whatever a thread sees in its place."""
    table: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
    tensor: Tensor | None = dict.__getitem__(table, key)
    return tensor


class _Pending(Tensor):
    """Tells shape, dtype and device of a tensor, and makes it once more is asked."""

    make: Callable[[], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _FACTS:
            args, kwargs = tree_map_only(_Pending, lambda tensor: tensor.make(), (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_FACTS = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_mps")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size),
    )
)


def pending(like: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """A tensor of the shape, dtype and device of another one, which `make` makes when it is needed."""
    tensor = like.detach().as_subclass(_Pending)
    tensor.make = make
    return tensor


@contextmanager
def replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While inside, this thread finds other tensors in the place of the module's own, which `make_local` prepared."""
    tables = {key: module._parameters if key in module._parameters else module._buffers for key in values}
    before: dict[str, Tensor] = {}
    for key, value in values.items():
        table = tables[key]
        assert isinstance(table, _LocalTable), type(module).__name__
        if key in table.seen:
            before[key] = table.seen[key]
        table.seen[key] = value
    try:
        yield
    finally:
        for key, table in tables.items():
            assert isinstance(table, _LocalTable)
            if key in before:
                table.seen[key] = before[key]
            else:
                del table.seen[key]

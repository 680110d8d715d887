"""Other weights for the calling thread alone: a model that several threads share answers each with its own.

    make_local(module)
    with replaced(module, {"weight": mine}):     # module.weight is mine here, and what it was in every other thread
        module(x)

Attributes of a module are looked up in its tables of parameters and buffers. `make_local` puts tables in their place
that remember, for each thread, what it is to see instead. Nothing that is stored changes, so that no thread can leave
anything behind, and copies, state dicts and moves between devices see the module's own tensors.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _LocalTable(dict[str, "Tensor | None"]):
    """A table of tensors; `seen` holds what the calling thread finds instead, if anything."""

    def __init__(self, own: Mapping[str, Tensor | None]) -> None:
        super().__init__(own)
        self._local = threading.local()

    @property
    def seen(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._local.__dict__
        return found

    def __getitem__(self, key: str) -> Tensor | None:
        seen = self.seen
        return seen[key] if key in seen else super().__getitem__(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return _LocalTable, (dict(self),)


def make_local(module: nn.Module) -> None:
    """Let threads replace this module's tensors for themselves. A second call changes nothing."""
    for table in ("_parameters", "_buffers"):
        own = module.__dict__[table]
        if not isinstance(own, _LocalTable):
            module.__dict__[table] = _LocalTable(own)


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

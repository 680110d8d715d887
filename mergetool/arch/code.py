"""`architecture: FILE.py:FUNCTION`: a module of the user's own, built by the user's own code, then traced and proved.

`FUNCTION()` returns `(module, inputs)`: the network, whose tensors have the names of the checkpoint, and one batch of
inputs to trace it with: a tensor, a tuple of positional arguments, or a mapping of keyword arguments. The weights of
the module mean nothing. Whoever calls this has made sure that the user trusts the file.
"""

import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.arch.bind import Shapes
from mergetool.arch.spec import ArchSpec, renamed
from mergetool.errors import PlanError

if TYPE_CHECKING:
    from torch import nn

_CODE = re.compile(r"(.+\.py):([A-Za-z_][A-Za-z0-9_]*)")
_RETURN = "return (module, inputs): a torch.nn.Module, and a tensor, a tuple or a mapping of arguments"


def code_of(text: str) -> tuple[str, str] | None:
    """(file, function) of `FILE.py:FUNCTION`; None for anything else."""
    match = _CODE.fullmatch(text)
    return None if match is None else (match[1], match[2])


def call(path: Path, function: str, where: str) -> Any:
    """What `function()` of a Python file returns: the user's own code. It may import what lies beside it."""
    name = f"_mergetool_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    namespace = importlib.util.module_from_spec(spec)
    sys.modules[name] = namespace  # dataclasses look themselves up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(namespace)
        return getattr(namespace, function)()
    except (Exception, SystemExit) as error:
        what = f"{function}() failed: {type(error).__name__}: {error}"
        raise PlanError(what, where=where, fix="call it by hand in Python") from error
    finally:
        sys.path.remove(str(path.parent))


def derive_from_code(path: Path, function: str, shapes: Shapes) -> ArchSpec:
    """The proved spec of the network that `function()` returns, for the tensors that the checkpoint stores.

    Raises PlanError if the function fails, or its network has not the tensors of the checkpoint.
    """
    from mergetool.arch.trace import derive

    where = f"architecture: {path.name}:{function}"
    module, positional, named = _example(call(path, function, where), f"{function}()", where)
    spec = derive(module, *positional, **named)
    stored = {name: name for name in spec.tensors if name in shapes}
    unknown = sorted(set(shapes) - set(stored))
    if unknown:
        what = f"the module has no tensor {unknown[0]!r}, the models have"
        raise PlanError(what, where=where, fix="return the network of these models")
    tied = {name: group for group in spec.tied for name in group}
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not stored.keys() & {name, *tied.get(name, ())}:
            what = f"the models have no tensor {name!r}, the module has"
            raise PlanError(what, where=where, fix="return the network of these models")
    return renamed(spec, stored)


def _example(returned: Any, function: str, where: str) -> tuple["nn.Module", tuple[Any, ...], Mapping[str, Any]]:
    """(module, positional arguments, keyword arguments) of what a function returned."""
    from torch import Tensor, nn

    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], nn.Module)):
        raise PlanError(f"{function} returned {type(returned).__name__}", where=where, fix=_RETURN)
    module, inputs = returned
    if isinstance(inputs, Tensor):
        return module, (inputs,), {}
    if isinstance(inputs, tuple | list):
        return module, tuple(inputs), {}
    if isinstance(inputs, Mapping):
        return module, (), dict(inputs)
    raise PlanError(f"{function} returned inputs of type {type(inputs).__name__}", where=where, fix=_RETURN)

"""A traced architecture as a file: what `derive_architecture` gives, in the language of `mergetool.arch.language`.

The names of the module stand in the file as they are, and a space is called after the tensor where it is first met.
Its size is written only where no axis of a tensor tells it (heads, and channels within them).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.arch.spec import ArchSpec
from mergetool.errors import PlanError
from mergetool.kernels.spaces import Layout
from mergetool.tensors.writer import write_file

if TYPE_CHECKING:
    from torch import nn

_MET = re.compile(r"(.+?)(?:\.weight)?\[(\d+)\](?:\.(\d+))?")
"""How tracing names a space: the tensor, the axis, and of several spaces on one axis which."""


@dataclass(frozen=True)
class Architecture:
    """Which axes of a network's tensors may be permuted together, proved by running it.

    `save(path)` writes it as a file for `architecture:` of a recipe; `text` is that file.
    """

    spec: ArchSpec
    floats: frozenset[str]
    """Tensors of the module that hold floating-point numbers: those that a recipe merges."""

    @property
    def text(self) -> str:
        """The architecture file."""
        return _text(self.spec, self.floats)

    def save(self, path: str | Path) -> Path:
        """Write the file, and return its path. Raises PlanError for a name that a recipe would not take for a file."""
        path = Path(path)
        if path.suffix not in (".yaml", ".yml"):
            fix = f"save it as {path.with_suffix('.yaml').name}"
            raise PlanError("an architecture file ends in .yaml", where=str(path), fix=fix)
        write_file(path, self.text)
        return path


def derive_architecture(module: "nn.Module", *example: Any, **kwargs: Any) -> Architecture:
    """Trace a module on one batch of inputs, `module(*example, **kwargs)`, and prove what was found in float64.

        architecture = mergetool.derive_architecture(net, torch.randn(2, 3, 32, 32))
        architecture.save("net.yaml")               # then in a recipe: `architecture: net.yaml`

    The module is left as it was. Raises PlanError if it cannot be traced (control flow that depends on values).
    """
    from mergetool.arch.trace import derive

    _check(module, bool(example or kwargs))
    modes = [(part, part.training) for part in module.modules()]
    try:
        spec = derive(module, *example, **kwargs)
    finally:
        for part, training in modes:
            part.training = training
    floats = (name for name, tensor in module.state_dict().items() if tensor.is_floating_point())
    return Architecture(spec, frozenset(floats))


def _check(module: object, has_example: bool) -> None:
    from torch import nn

    what = None if has_example else "there are no inputs to trace the module with"
    if not isinstance(module, nn.Module):
        what = f"expected a torch.nn.Module, found a {type(module).__name__}"
    if what is not None:
        raise PlanError(what, where="derive_architecture", fix="derive_architecture(module, inputs)")


def _text(spec: ArchSpec, floats: frozenset[str]) -> str:
    import yaml

    names = _names(spec)
    tied = {name for group in spec.tied for name in group}
    tensors = {name: tensor for name, tensor in spec.tensors.items() if name in floats}
    told = {name: ", ".join(_axis(layout, names) for layout in tensor.axes) for name, tensor in tensors.items()}
    matched = {name: axes for name, axes in told.items() if spec.tensors[name].matched or name in tied}
    data = {
        "about": "Derived by tracing a module, and proved on it",
        "spaces": _spaces(spec, names),
        "tensors": matched,
        "buffers": {name: axes for name, axes in told.items() if name not in matched},
        "tied": [{"names": sorted(group, key=lambda name: spec.tensors[name].matched)} for group in spec.tied],
    }
    filled = {key: value for key, value in data.items() if value}
    return str(yaml.safe_dump(filled, sort_keys=False, allow_unicode=True, width=120))


def _names(spec: ArchSpec) -> dict[str, str]:
    """The name in the file of every space: that of the tensor where it was met, in letters that the language reads."""
    names: dict[str, str] = {}
    for space in spec.spaces:
        match = _MET.fullmatch(space)
        tensor, axis, nth = match.groups() if match else (space, "0", None)
        name = re.sub(r"[^A-Za-z0-9_.]+", "_", tensor)
        name = name if name[:1].isalpha() else f"space.{name}"
        name += f".{axis}" if axis != "0" else ""
        name += f".inner{nth if nth != '1' else ''}" if nth else ""
        while name in names.values():
            name += "_"
        names[space] = name
    return names


def _spaces(spec: ArchSpec, names: dict[str, str]) -> dict[str, Any]:
    alone = {
        layout[0][0].space
        for tensor in spec.tensors.values()
        for layout in tensor.axes
        if len(layout) == 1 and len(layout[0]) == 1
    }
    rules: dict[str, Any] = {}
    for key, space in spec.spaces.items():
        rule: dict[str, Any] = {} if space.within is None else {"within": names[space.within]}
        rule |= {} if key in alone else {"size": space.size}
        rule |= {"symmetry": space.symmetry} if rule and space.symmetry != "permutation" else {}
        rules[names[key]] = rule or space.symmetry
    return rules


def _axis(layout: Layout, names: dict[str, str]) -> str:
    if all(factor.space is None for segment in layout for factor in segment):
        return "_"
    segments = (" ".join(names[f.space] if f.space else str(f.size) for f in segment) for segment in layout)
    return " + ".join(segments)

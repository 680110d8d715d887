"""Which architecture a checkpoint has: from what the user says, from config.json, or from names alone.

Everything here works on names and shapes, so it is known before a weight is read. `resolve` finds the full spec that an
alignment needs and says which file to write if there is none; `describe` never fails: for an unknown checkpoint it
gives the structural spec, in which no axis moves but depth is told.
"""

import fnmatch
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mergetool.arch.bind import Shapes, architectures, covers
from mergetool.arch.build import build
from mergetool.arch.chain import build_chain
from mergetool.arch.code import code_of, derive_from_code
from mergetool.arch.depth import structural_depths
from mergetool.arch.language import ArchFamily, read_family
from mergetool.arch.spec import ArchSpec, TensorAxes, check_structure
from mergetool.errors import PlanError
from mergetool.kernels.spaces import Factor

_DATA = Path(str(files("mergetool.arch") / "data"))


@cache
def families() -> dict[str, ArchFamily]:
    """The families that come with the tool, by name."""
    return {path.stem: read_family(path, _locate) for path in sorted(_DATA.glob("*.yaml"))}


def resolve(architecture: str | None, shapes: Shapes, config: Mapping[str, Any] | None = None) -> ArchSpec:
    """The spec of a checkpoint with these shapes.

    `architecture`: a family, the path of an architecture file, FILE.py:FUNCTION (trace the network that the function
    returns; runs that code), or None: the family that config.json or the names tell. For "auto", which needs
    transformers, ask `mergetool.networks.trace`.
    Raises PlanError if nothing fits, naming the tensor and the axis where it is the shapes that do not.
    """
    config = config or {}
    if architecture is None:
        name = recognise(shapes, config)
        if name is None:
            raise PlanError(
                f"no known architecture has these {len(shapes)} tensors (first: {min(shapes, default='none')})",
                where="architecture",
                fix=f"`architecture:` one of {', '.join(families())}, auto, FILE.py:FUNCTION, or the path of an "
                "architecture file",
            )
        return _build(name, families()[name], shapes, config)
    if code := code_of(architecture):
        return derive_from_code(Path(code[0]), code[1], shapes)
    if architecture in families():
        return _build(architecture, families()[architecture], shapes, config)
    path = Path(architecture)
    if path.suffix in (".yaml", ".yml"):
        return _build(path.stem, read_family(path, _locate), shapes, config)
    near = get_close_matches(architecture, families(), n=1)
    raise PlanError(
        f"unknown architecture {architecture!r}",
        where="architecture",
        fix=f"did you mean {near[0]!r}?"
        if near
        else f"one of {', '.join(families())}, auto, FILE.py:FUNCTION, or the path of a .yaml file",
    )


def recognise(shapes: Shapes, config: Mapping[str, Any] | None = None) -> str | None:
    """The family that config.json tells, or else the only one that describes every tensor name; None if there is none.

    A family that extends another one is told from it by config.json alone, if their names are the same.
    """
    config = config or {}
    for name, family in families().items():
        told = config.get("model_type") in family.match.model_type or any(
            fnmatch.fnmatchcase(said, glob) for said in architectures(config) for glob in family.match.architectures
        )
        if told:
            return name
    named = {name: family.extends for name, family in families().items() if covers(family, shapes)}
    originals = [name for name, parent in named.items() if parent not in named]
    return originals[0] if len(originals) == 1 else None


def describe(shapes: Shapes, config: Mapping[str, Any] | None = None) -> ArchSpec:
    """The spec of the checkpoint if its architecture is known and fits, otherwise the structural one. Never fails."""
    try:
        return resolve(None, shapes, config)
    except PlanError:
        return structural(shapes)


def structural(shapes: Shapes) -> ArchSpec:
    """Names and shapes only: every axis fixed, depth told by the integers in the names."""
    depths = structural_depths(shapes)
    tensors = {
        name: TensorAxes(tuple(shape), tuple(((Factor(size),),) for size in shape), False, depths[name])
        for name, shape in sorted(shapes.items())
    }
    return ArchSpec("structural", {}, tensors)


def _build(name: str, family: ArchFamily, shapes: Shapes, config: Mapping[str, Any]) -> ArchSpec:
    spec = build_chain(name, family.chain, shapes) if family.chain else build(name, family, shapes, config)
    check_structure(spec)
    return spec


def _locate(name: str, path: Path) -> Path:
    """The file that `extends: name` in the file `path` means: a family of ours, or a path relative to the file."""
    ours = _DATA / f"{name}.yaml"
    return ours if ours.exists() else path.parent / name

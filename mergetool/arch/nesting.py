"""From equations between atoms to a spec: which atoms may move, and which of them lie within others.

An atom c may have an element of its own for every index of an atom h if h is there wherever c is: in every tensor of
the graph, and beside it in every product on an axis of a parameter. Channels of queries and keys meet their heads
everywhere, so they lie within; a gain over the channels that all heads share has no heads, and then they do not.
"""

from collections.abc import Iterable, Mapping
from itertools import chain

from torch import Tensor, nn

from mergetool.arch.atoms import (
    Atom,
    Axis,
    Product,
    atoms_of,
    chosen,
    collapse,
    families_over,
    fresh,
    is_pinned,
    resolve,
    root,
    size_of,
)
from mergetool.arch.call import Value
from mergetool.arch.depth import structural_depths
from mergetool.arch.spec import ArchSpec, TensorAxes, check
from mergetool.kernels.spaces import Factor, Layout, Space


def spec_of(weights: Mapping[str, Tensor], parameters: Mapping[int, Value], values: list[Value]) -> ArchSpec:
    """The spec of a traced network: its tensors, their axes by identity of the tensor, and the axes of all values."""
    _settle_families(values, parameters.values())
    axes = {
        name: [_written_out(axis) for axis in parameters[id(tensor)]]
        if id(tensor) in parameters
        else [fresh(size, pinned=True) for size in tensor.shape]
        for name, tensor in weights.items()
    }
    outer = _nested(axes, values)
    names = _names(axes, outer)
    spaces = {
        name: Space(name, atom.size, within=names.get(outer[atom][-1]) if outer[atom] else None)
        for atom, name in names.items()
    }
    same: dict[int, list[str]] = {}
    for name, tensor in weights.items():
        same.setdefault(id(tensor), []).append(name)
    depths = structural_depths(weights)
    tensors = {
        name: TensorAxes(
            tuple(tensor.shape),
            tuple(_layout(axis, names) for axis in axes[name]),
            matched=isinstance(tensor, nn.Parameter) and same[id(tensor)][0] == name,
            depth=depths[name],
        )
        for name, tensor in weights.items()
    }
    return check(ArchSpec("auto", spaces, tensors, tuple(tuple(tied) for tied in same.values() if len(tied) > 1)))


def _settle_families(values: list[Value], parameters: Iterable[Value]) -> None:
    """Collapse every family that some tensor uses as a whole, without the atom that tells its members apart."""
    changed = True
    while changed:
        changed = False
        for axes in chain(values, parameters):
            present = {root(atom) for atom in atoms_of(map(resolve, axes))}
            for atom in present:
                for outer in families_over(atom) - present:
                    collapse(atom, outer)
                    changed = True
        for axis in chain.from_iterable(parameters):
            for product in resolve(axis):
                for atom in product:
                    for outer in families_over(atom) - {product[0]}:
                        collapse(atom, outer)
                        changed = True


def _written_out(axis: Axis) -> Axis:
    """The axis with every family over the first atom of a product told apart: one segment per index of that atom."""
    parts: list[Product] = []
    for product in resolve(axis):
        if not any(families_over(atom) for atom in product):
            parts.append(product)
            continue
        first, *others = product
        for index in range(first.size):
            members = tuple(chosen(atom, first, index) if families_over(atom) else atom for atom in others)
            parts.extend(resolve((members,)))
    return tuple(parts)


def _nested(axes: Mapping[str, list[Axis]], values: list[Value]) -> dict[Atom, tuple[Atom, ...]]:
    """For every free atom of the parameters, the atoms it lies within, outermost first."""
    beside: dict[Atom, set[Atom]] = {}
    order: dict[Atom, int] = {}
    for axis in chain.from_iterable(axes.values()):
        for product in axis:
            for atom in product:
                order.setdefault(atom, len(order))
                beside[atom] = beside.get(atom, set(product)) & set(product)
    for value in values:
        present = _present(value)
        for atom in present & beside.keys():
            beside[atom] &= present
    free = {
        atom: {o for o in others if not o.pinned and o is not atom}
        for atom, others in beside.items()
        if not atom.pinned
    }
    nested: dict[Atom, tuple[Atom, ...]] = {}
    for atom in sorted(free, key=lambda atom: (len(free[atom]), order[atom])):
        # Of two atoms that are only ever met together, the one written first is the outer one.
        outer = {o for o in free[atom] if atom not in free[o] or order[o] < order[atom]}
        chains = [
            (*nested[o], o) for o in sorted(outer & nested.keys(), key=order.__getitem__) if set(nested[o]) <= outer
        ]
        nested[atom] = max(chains, key=len, default=())
    return nested


def _present(value: Value) -> set[Atom]:
    """The atoms of a tensor, and the members of the families among them."""
    present = {root(atom) for atom in atoms_of(map(resolve, value))}
    members = [((choice,),) for atom in present for choice in atom.family.values()]
    return present | {root(atom) for atom in atoms_of(map(resolve, members))}


def _names(axes: Mapping[str, list[Axis]], nested: Mapping[Atom, tuple[Atom, ...]]) -> dict[Atom, str]:
    """A name for every atom that moves: the axis where it is first met. An atom in a single matrix has nothing to
    undo its moves, so it gets none.
    """
    matrices: dict[Atom, int] = {}
    for tensor in axes.values():
        for product in chain.from_iterable(tensor if len(tensor) > 1 else []):
            for atom in product:
                matrices[atom] = matrices.get(atom, 0) + 1
    names: dict[Atom, str] = {}
    for tensor_name, tensor in axes.items():
        for number, axis in enumerate(tensor):
            label = f"{tensor_name}[{number}]"
            for atom in dict.fromkeys(atoms_of([axis])):
                if atom in nested and atom not in names and matrices.get(atom, 0) > 1:
                    taken = sum(name.startswith(label) for name in names.values())
                    names[atom] = f"{label}.{taken}" if taken else label
    return names


def _layout(axis: Axis, names: Mapping[Atom, str]) -> Layout:
    if is_pinned(axis):
        return ((Factor(size_of(axis)),),)
    return tuple(tuple(Factor(atom.size, names.get(atom)) for atom in product) or (Factor(1),) for product in axis)

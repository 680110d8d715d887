"""What is known of the axes of a traced network, as equations between atoms.

Every axis of every tensor in a graph is a concatenation of products of *atoms*, the unknown spaces of the network.
At first each axis of each parameter is one atom of its own. Operations then say what must be equal (`unify`), where an
atom is really a product or a concatenation of smaller ones (found when a reshape or a slice cuts through it), and which
atoms cannot move (`pin`: inputs, outputs, positions). What is still free at the end may be permuted.

An atom may be a *family* over another one: after a reshape to (3, heads, channels) and a choice of one of the three,
the heads and channels of each choice are atoms of their own (`chosen`), as long as the whole is never used without
the 3.

Whatever cannot be said in this language is pinned, which is always safe: a smaller group, never a wrong one.
"""

from collections.abc import Iterable, Iterator
from math import prod


class Atom:
    """An unknown space of `size` coordinates. Compared by identity, after `root`."""

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self.size = size
        self.pinned = pinned
        self.link: Atom | None = None  # the atom it was found equal to
        self.bound: Axis | None = None  # what it is really made of
        self.outer: set[Atom] = set()  # atoms before it in a product that one atom was split into
        self.family: dict[tuple[Atom, int], Atom] = {}
        self.member = False  # of a family; then it has none of its own


Product = tuple[Atom, ...]
Axis = tuple[Product, ...]
ONE: Axis = ((),)


def fresh(size: int, *, pinned: bool = False) -> Axis:
    """A new axis about which nothing is known; with `pinned`, one that cannot move."""
    return ((Atom(size, pinned=pinned),),) if size != 1 else ONE


def root(atom: Atom) -> Atom:
    """The atom that stands for all those found equal to this one."""
    while atom.link is not None:
        atom = atom.link
    return atom


def size_of(axis: Axis) -> int:
    """Number of indices along an axis."""
    return sum(prod(atom.size for atom in product) for product in axis)


def atoms_of(axes: Iterable[Axis]) -> Iterator[Atom]:
    """The atoms of resolved axes."""
    return (atom for axis in axes for product in axis for atom in product)


def resolve(axis: Axis) -> Axis:
    """The same axis in terms of atoms that stand for themselves."""
    return tuple(part for product in axis for part in _expand(product))


def _expand(product: Product) -> list[Product]:
    parts: list[Product] = [()]
    for atom in map(root, product):
        inner: Axis = ((atom,),) if atom.bound is None else resolve(atom.bound)
        if len(inner) > 1 and parts != [()]:
            # A concatenation inside a product is no concatenation of products.
            pin(inner)
            atom.bound, atom.pinned = None, True
            inner = ((atom,),)
        parts = [left + right for left in parts for right in inner]
    return parts


def pin(axis: Axis) -> None:
    """Declare that nothing on this axis can move."""
    for atom in atoms_of([resolve(axis)]):
        if not atom.pinned:
            atom.pinned = True
            for choice in atom.family.values():
                pin(((choice,),))


def is_pinned(axis: Axis) -> bool:
    """Whether nothing on this axis can move."""
    return all(atom.pinned for atom in atoms_of([resolve(axis)]))


def unify(first: Axis, second: Axis) -> None:
    """Declare that two axes of one length are permuted alike."""
    first, second = resolve(first), resolve(second)
    if is_pinned(first) or is_pinned(second):
        pin(first)
        pin(second)
    elif len(first) == 1 and len(second) == 1:
        _unify_products(list(first[0]), list(second[0]))
    else:
        _unify_sums(list(first), list(second))


def _unify_products(first: list[Atom], second: list[Atom]) -> None:
    while first and second:
        (a, *first), (b, *second) = _front(first), _front(second)
        if a.size == b.size:
            _union(a, b)
        elif a.size % b.size == 0:
            head, rest = _split(a, b.size)
            _union(head, b)
            first.insert(0, rest)
        elif b.size % a.size == 0:
            head, rest = _split(b, a.size)
            _union(head, a)
            second.insert(0, rest)
        else:
            pin(((a, b, *first, *second),))
            return


def _front(product: list[Atom]) -> list[Atom]:
    """The product with its first atom standing for itself; a concatenation there is given up."""
    parts = resolve((tuple(product),))
    if len(parts) == 1:
        return list(parts[0])
    pin(parts)
    size = root(product[0]).size
    return [Atom(size, pinned=True), *product[1:]]


def _union(a: Atom, b: Atom) -> None:
    if root(a).member or root(b).member:
        for atom in (root(a), root(b)):
            for outer in families_over(atom):
                collapse(atom, outer)
    a, b = root(a), root(b)
    if a is b:
        return
    b.link = a
    a.outer |= b.outer
    a.member = a.member or b.member
    moved = a.pinned == b.pinned
    a.pinned = a.pinned or b.pinned
    for (outer, index), choice in b.family.items():
        unify(((chosen(a, outer, index),),), ((choice,),))
    if not moved:
        a.pinned = False
        pin(((a,),))


def _bind(atom: Atom, made_of: Axis) -> None:
    families = list(atom.family.values())
    atom.family = {}
    atom.bound = made_of
    for part in atoms_of([made_of]):
        part.outer |= atom.outer
        part.pinned = atom.pinned
    for choice in families:
        unify(((choice,),), made_of)


def _split(atom: Atom, size: int) -> tuple[Atom, Atom]:
    """Two factors of an atom, the first of this size."""
    head, rest = Atom(size), Atom(atom.size // size)
    _bind(atom, ((head, rest),))
    rest.outer.add(head)
    return head, rest


def _unify_sums(first: list[Product], second: list[Product]) -> None:
    while first and second:
        first, second = list(resolve(tuple(first))), list(resolve(tuple(second)))
        a, b = first[0], second[0]
        length = min(size_of((a,)), size_of((b,)))
        for product, others in ((a, first), (b, second)):
            if size_of((product,)) > length:
                pieces = _cut(product, length)
                if pieces is None:
                    pin(tuple(first + second))
                    return
                others[:1] = pieces
        _unify_products(list(first.pop(0)), list(second.pop(0)))


def _cut(product: Product, length: int) -> tuple[Product, Product] | None:
    """A product as the concatenation of its first `length` indices and the rest, if its first atom can be cut so."""
    first, *others = product
    inner = prod(atom.size for atom in others)
    if length % inner:
        return None
    head = length // inner
    front, back = Atom(head), Atom(first.size - head)
    _bind(first, ((front,), (back,)))
    return (front, *others), (back, *others)


def part_of(axis: Axis, start: int, stop: int) -> Axis:
    """The slice [start, stop) of an axis; pinned if it cuts through something that cannot be cut."""
    if start == 0 and stop == size_of(axis):
        return axis
    if is_pinned(axis):
        return fresh(stop - start, pinned=True)
    taken: list[Product] = []
    position, left = 0, list(resolve(axis))
    while left and position < stop:
        product = left.pop(0)
        length = size_of((product,))
        cut = next((c - position for c in (start, stop) if position < c < position + length), None)
        if cut is not None:
            pieces = _cut(product, cut)
            if pieces is None:
                pin(axis)
                return fresh(stop - start, pinned=True)
            left[:0] = pieces
            continue
        if start <= position:
            taken.append(product)
        position += length
    return tuple(taken)


def regroup(axes: Iterable[Axis], sizes: Iterable[int]) -> list[Axis]:
    """The axes of a row-major reshape to `sizes`."""
    result: list[Axis] = []
    pending = [axis for axis in axes if size_of(axis) != 1]
    wanted = list(sizes)
    while wanted:
        if wanted[0] == 1:
            result.append(ONE)
            wanted.pop(0)
            continue
        group, targets = [pending.pop(0)], [wanted.pop(0)]
        while prod(map(size_of, group)) != prod(targets):
            if prod(map(size_of, group)) < prod(targets):
                group.append(pending.pop(0))
            else:
                targets.append(wanted.pop(0))
        result.extend(_regroup(group, targets))
    return result


def _regroup(group: list[Axis], targets: list[int]) -> list[Axis]:
    """The same within the smallest block of axes that is reshaped as a whole."""
    if len(group) == 1 and len([size for size in targets if size != 1]) == 1:
        return [group[0] if size != 1 else ONE for size in targets]
    group = [fresh(size_of(axis), pinned=True) if is_pinned(axis) else resolve(axis) for axis in group]
    if len(targets) == 1 and all(len(axis) == 1 for axis in group[1:]):
        inner = tuple(atoms_of(group[1:]))
        return [tuple(product + inner for product in group[0])]
    if any(len(axis) > 1 for axis in group):
        for axis in group:
            pin(axis)
        return [fresh(size, pinned=True) for size in targets]
    return _deal(list(atoms_of(group)), targets)


def _deal(atoms: list[Atom], targets: list[int]) -> list[Axis]:
    """Products of these sizes from a row of atoms, splitting atoms that reach over a border."""
    given = list(atoms)
    result: list[Axis] = []
    for size in targets:
        product: list[Atom] = []
        left = size
        while left > 1:
            atom, *atoms = _front(atoms)
            if atom.size > left and atom.size % left == 0:
                atom, rest = _split(atom, left)
                atoms.insert(0, rest)
            if left % atom.size:
                pin((tuple(given),))
                return [fresh(target, pinned=True) for target in targets]
            product.append(atom)
            left //= atom.size
        result.append((tuple(product),))
    return result


def choose(axes: list[Axis], axis: int, index: int) -> list[Axis]:
    """The axes that are left after index `index` of one of them is taken. That axis can no longer move."""
    taken = resolve(axes[axis])
    pin(taken)
    others = [resolve(other) for k, other in enumerate(axes) if k != axis]
    if len(taken) != 1 or len(taken[0]) != 1:
        return others
    outer = taken[0][0]

    def choice(atom: Atom) -> Atom:
        inside = any(root(before) is outer for before in atom.outer)
        return chosen(atom, outer, index) if inside and not atom.pinned else atom

    return [tuple(tuple(choice(atom) for atom in product) for product in other) for other in others]


def chosen(atom: Atom, outer: Atom, index: int) -> Atom:
    """The atom that stands for `atom` where `outer` has this index: itself, if it is such a choice already."""
    if atom.member:
        return atom
    for (known, at), choice in atom.family.items():
        if root(known) is root(outer) and at == index:
            return choice
    choice = Atom(atom.size, pinned=atom.pinned)
    choice.member = True
    atom.family[outer, index] = choice
    return choice


def families_over(atom: Atom) -> set[Atom]:
    """The atoms over which this one is a family."""
    return {root(outer) for outer, _ in atom.family}


def collapse(atom: Atom, outer: Atom) -> None:
    """Give up the distinction between the members of a family: all move like the whole."""
    members = {key: choice for key, choice in atom.family.items() if root(key[0]) is root(outer)}
    atom.family = {key: choice for key, choice in atom.family.items() if key not in members}
    for choice in members.values():
        unify(((choice,),), ((atom,),))

"""Soft elements: gathers against dense matrices, and the mean of a whole group."""

from itertools import permutations, product

import pytest
import torch

from mergetool.kernels.permute import Element
from mergetool.kernels.soft import Soft, transform
from mergetool.kernels.spaces import Factor, Space
from tests.kernels import toys


def faces_of(spaces, *faces):
    signed = {name: space.symmetry in ("signed", "flip") for name, space in spaces.items()}
    return [tuple(Factor(spaces[name].size, name, signed[name]) for name in face) for face in faces]


def test_transform_is_the_matrix_product():
    spaces = toys.space_map(Space("a", 5, "signed"))
    (face,) = faces_of(spaces, ["a"])
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (Soft.at(Element.random(spaces, generator), [face]) for _ in range(4))
    soft = [a.toward(b, 0.3).toward(c, 0.2), d]
    x = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    dense = torch.stack([s.matrix(face) @ x[i] for i, s in enumerate(soft)])
    torch.testing.assert_close(transform(spaces, soft, face, x), dense)


def test_a_full_step_leaves_only_the_target():
    spaces = toys.space_map(Space("a", 5))
    faces = faces_of(spaces, ["a"])
    generator = torch.Generator().manual_seed(0)
    start, end = (Soft.at(Element.random(spaces, generator), faces) for _ in range(2))
    arrived = start.toward(end, 1.0)
    assert arrived.hard
    assert arrived.elements == end.elements
    assert not start.toward(end, 0.5).hard


def elements(spaces):
    """Every element of a group of at most two levels without signs."""
    names = [name for name, space in spaces.items() if space.symmetry == "permutation"]
    rows = {name: spaces[spaces[name].within].size if spaces[name].within else 1 for name in names}
    options = [list(product(permutations(range(spaces[n].size)), repeat=rows[n])) for n in names]
    for choice in product(*options):
        index = {}
        for name, orders in zip(names, choice, strict=True):
            index[name] = torch.tensor(orders if spaces[name].within else orders[0])
        yield Element(spaces, index, {})


@pytest.mark.parametrize(
    "spaces",
    [
        toys.space_map(Space("a", 4)),
        toys.space_map(Space("a", 2), Space("b", 3, within="a")),
        toys.space_map(Space("a", 2, "fixed"), Space("b", 3, within="a")),
        toys.space_map(Space("a", 2), Space("b", 3)),
    ],
    ids=["plain", "nested", "nested in fixed", "side by side"],
)
def test_the_middle_is_the_mean_over_all_elements(spaces):
    (face,) = faces_of(spaces, list(spaces))
    size = 4 if len(spaces) == 1 else 6
    x = torch.randn(1, size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    group = [Soft.at(element, [face]) for element in elements(spaces)]
    mean = torch.stack([transform(spaces, [soft], face, x) for soft in group]).mean(dim=0)
    torch.testing.assert_close(transform(spaces, [Soft.middle([face])], face, x), mean)
    mixed = Soft.middle([face]).toward(group[3], 0.25)
    torch.testing.assert_close(
        transform(spaces, [mixed], face, x), 0.75 * mean + 0.25 * transform(spaces, [group[3]], face, x)
    )


def test_the_middle_of_a_group_with_signs_is_zero():
    spaces = toys.space_map(Space("a", 4, "signed"))
    (face,) = faces_of(spaces, ["a"])
    assert not transform(spaces, [Soft.middle([face])], face, torch.ones(1, 4, 2)).any()
    unsigned = (Factor(4, "a", signed=False),)
    x = torch.arange(4.0).reshape(1, 4, 1)
    torch.testing.assert_close(transform(spaces, [Soft.middle([unsigned])], unsigned, x), torch.full_like(x, 1.5))

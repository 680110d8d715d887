"""The assignment oracles against brute force over all elements of small groups."""

from itertools import permutations, product

import numpy as np
import pytest
import torch

from mergetool.kernels.assignment import Choice, assign, best_element
from mergetool.kernels.permute import Element
from mergetool.kernels.spaces import Factor, Space

rng = np.random.default_rng


def element_of(spaces, choice):
    return Element(
        spaces,
        {name: torch.from_numpy(np.asarray(index)) for name, index in choice.index.items()},
        {name: torch.from_numpy(np.asarray(sign)) for name, sign in choice.sign.items()},
    )


def total(spaces, element, scores):
    """The sum of scores of an element, from its action on each axis: nothing shared with the oracle."""
    value = 0.0
    for face, score in scores.items():
        index, sign = element.along((face,))
        size = len(score)
        index = np.arange(size) if index is None else index.numpy()
        sign = np.ones(size) if sign is None else sign.numpy()
        value += float((sign * score[np.arange(size), index]).sum())
    return value


def all_elements(spaces):
    """Every element of the group, by the product of every row of every index (and sign) array."""
    identity = Element.identity(spaces)
    choices = []
    for name, space in spaces.items():
        if space.symmetry == "fixed":
            continue
        outer = [spaces[o].size for o in _outer(spaces, name)]
        rows = int(np.prod(outer)) if outer else 1
        orders = [list(t) for t in product(permutations(range(space.size)), repeat=rows)]
        signs = [None]
        if space.symmetry == "signed":
            signs = [list(t) for t in product(product([1, -1], repeat=space.size), repeat=rows)]
        if space.symmetry == "flip":
            signs = [[[s] * space.size for s in t] for t in product([1, -1], repeat=rows)]
        shape = (*outer, space.size)
        choices.append([(name, np.array(o).reshape(shape), s, shape) for o in orders for s in signs])
    for combination in product(*choices):
        index = {name: torch.from_numpy(order) for name, order, _, _ in combination}
        sign = {
            name: torch.tensor(s, dtype=torch.int8).reshape(shape) for name, _, s, shape in combination if s is not None
        }
        yield Element(identity.spaces, index, sign)


def _outer(spaces, name):
    chain = []
    while (name := spaces[name].within) is not None:
        chain.append(name)
    return chain[::-1]


def space_map(*spaces):
    return {space.name: space for space in spaces}


def face(spaces, *names, signed=True):
    return tuple(Factor(spaces[name].size, name, signed) for name in names)


def random_scores(seed, faces):
    sizes = [int(np.prod([factor.size for factor in face])) for face in faces]
    generator = rng(seed)
    return {face: generator.normal(size=(d, d)) for face, d in zip(faces, sizes, strict=True)}


PLAIN = space_map(Space("a", 5))
SIGNED = space_map(Space("a", 4, "signed"))
FLIP = space_map(Space("a", 4, "flip"))
HEADS = space_map(Space("head", 2), Space("qk", 3, within="head"), Space("vo", 2, within="head"))
GQA = space_map(Space("kv", 2), Space("q", 2, within="kv"), Space("vo", 3, within="kv"))
GQA_NO_ROPE = space_map(
    Space("kv", 2), Space("q", 2, within="kv"), Space("qk", 2, within="kv"), Space("vo", 2, within="kv")
)
PINNED_HEADS = space_map(Space("head", 2, "fixed"), Space("vo", 3, within="head"))
SIGNED_INSIDE = space_map(Space("head", 2), Space("vo", 2, "signed", within="head"))
SHARED = space_map(Space("head", 3), Space("qk", 3))  # the same channel order in every head
DEEP = space_map(Space("a", 2), Space("b", 2, within="a"), Space("c", 2, within="b"))

GROUPS = {
    "plain": (PLAIN, [face(PLAIN, "a")]),
    "signed": (SIGNED, [face(SIGNED, "a"), face(SIGNED, "a", signed=False)]),
    "flip": (FLIP, [face(FLIP, "a"), face(FLIP, "a", signed=False)]),
    "heads": (HEADS, [face(HEADS, "head", "qk"), face(HEADS, "head", "vo"), face(HEADS, "head")]),
    "gqa under rope": (
        GQA,
        [face(GQA, "kv", "q"), face(GQA, "kv"), face(GQA, "kv", "vo"), face(GQA, "kv", "q", "vo")],
    ),
    "gqa": (
        GQA_NO_ROPE,
        [
            face(GQA_NO_ROPE, "kv", "q", "qk"),
            face(GQA_NO_ROPE, "kv", "qk"),
            face(GQA_NO_ROPE, "kv", "vo"),
            face(GQA_NO_ROPE, "kv", "q", "vo"),
        ],
    ),
    "heads that stay": (PINNED_HEADS, [face(PINNED_HEADS, "head", "vo")]),
    "signs inside heads": (SIGNED_INSIDE, [face(SIGNED_INSIDE, "head", "vo")]),
    "channels shared by heads": (SHARED, [face(SHARED, "head", "qk"), face(SHARED, "qk")]),
    "factors in the other order": (HEADS, [face(HEADS, "qk", "head"), face(HEADS, "head", "qk")]),
    "three levels": (DEEP, [face(DEEP, "a", "b", "c"), face(DEEP, "a", "b")]),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", GROUPS)
def test_the_element_found_is_the_best_of_all_elements(kind, seed):
    spaces, faces = GROUPS[kind]
    scores = random_scores(seed, faces)
    choice = best_element(spaces, scores)
    best = max(total(spaces, element, scores) for element in all_elements(spaces))
    assert total(spaces, element_of(spaces, choice), scores) == pytest.approx(best, abs=1e-12)
    assert choice.value == pytest.approx(best, abs=1e-12)


def test_large_coupled_groups_alternate_and_still_find_a_planted_element():
    spaces = space_map(Space("kv", 2), Space("q", 6, within="kv"), Space("vo", 8, within="kv"))
    faces = [face(spaces, "kv", "q"), face(spaces, "kv", "vo"), face(spaces, "kv", "q", "vo")]
    planted = Element.random(spaces, torch.Generator().manual_seed(3))
    scores = random_scores(0, faces)
    for where, score in scores.items():
        index = planted.along((where,))[0]
        score[np.arange(len(score)), index] += 2.5
    assert element_of(spaces, best_element(spaces, scores)).equals(planted)


def test_alternation_never_loses_against_the_incumbent():
    spaces = space_map(Space("q", 6), Space("vo", 7))
    faces = [face(spaces, "q"), face(spaces, "vo"), face(spaces, "q", "vo")]
    for seed in range(10):
        scores = random_scores(seed, faces)
        incumbent = best_element(spaces, random_scores(seed + 100, faces))
        found = best_element(spaces, scores, incumbent)
        assert found.value >= total(spaces, element_of(spaces, incumbent), scores) - 1e-12
        assert found.value == pytest.approx(total(spaces, element_of(spaces, found), scores))


def test_rows_with_maxima_of_their_own_need_no_assignment_problem(monkeypatch):
    order = rng(0).permutation(50)
    score = rng(1).normal(size=(50, 50))
    score[np.arange(50), order] += 10
    monkeypatch.setattr("mergetool.kernels.assignment.extension", None)
    assert np.array_equal(assign(score), order)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_go_to_the_incumbent(dtype):
    incumbent = rng(0).permutation(6)
    assert np.array_equal(assign(np.zeros((6, 6), dtype), incumbent), incumbent)
    assert np.array_equal(assign(np.zeros((6, 6), dtype)), np.arange(6))
    # two living neurons that want the same place, and four dead ones that stay where they were
    score = np.zeros((6, 6), dtype)
    score[0, :2] = 5, 4
    score[1, 0] = 5
    assert np.array_equal(assign(score, np.array([0, 1, 4, 5, 2, 3])), [1, 0, 4, 5, 2, 3])


def test_differences_below_the_rounding_of_the_scores_are_ties():
    score = np.full((3, 3), 100, np.float32)
    score[0, 1] = np.nextafter(np.float32(100), np.float32(200))
    assert np.array_equal(assign(score), [0, 1, 2])


def test_a_sign_without_evidence_stays_as_it_was():
    incumbent = Choice(0.0, {"a": np.arange(4)}, {"a": np.array([1, -1, 1, -1], np.int8)})
    scores = {face(SIGNED, "a"): np.diag([0.0, 0.0, -3.0, 3.0])}
    assert best_element(SIGNED, scores, incumbent).sign["a"].tolist() == [1, -1, -1, 1]
    flipped = Choice(0.0, {"a": np.arange(4)}, {"a": np.full(4, -1, np.int8)})
    assert best_element(FLIP, {face(FLIP, "a"): np.zeros((4, 4))}, flipped).sign["a"].tolist() == [-1] * 4


def test_scores_that_are_not_finite_are_refused():
    score = np.eye(3)
    score[1, 1] = np.nan
    with pytest.raises(ValueError, match="invalid"):
        assign(score)


def test_signs_around_nested_spaces_are_refused():
    spaces = space_map(Space("head", 2, "signed"), Space("vo", 2, within="head"))
    with pytest.raises(ValueError, match="no oracle"):
        best_element(spaces, random_scores(0, [face(spaces, "head", "vo")]))


def test_a_space_of_one_coordinate_has_one_choice_but_for_its_sign():
    plain, signed = space_map(Space("a", 1)), space_map(Space("a", 1, "signed"))
    assert best_element(plain, {face(plain, "a"): np.array([[-2.0]])}).value == -2
    assert best_element(signed, {face(signed, "a"): np.array([[-2.0]])}).value == 2

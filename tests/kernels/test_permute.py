import itertools

import pytest
import torch

from mergetool.kernels.permute import Element, check_element
from mergetool.kernels.spaces import Factor, Space, ancestors, check_layout, groups, incidences, length

SPACES = {
    space.name: space
    for space in [
        Space("d", 6, "signed"),
        Space("n", 5, "flip"),
        Space("f", 7),
        Space("vocab", 4, "fixed"),
        Space("kv", 2),
        Space("q", 3, within="kv"),
        Space("vo", 4, "signed", within="kv"),
        Space("deep", 2, within="q"),
    ]
}


def factor(name, signed=True):
    return Factor(SPACES[name].size, name, signed)


ROWS = (
    (factor("kv"), factor("q"), factor("vo")),
    (Factor(2), factor("f")),
    (factor("kv"), factor("q"), factor("deep")),
)
LAYOUTS = (ROWS, ((factor("d"),),), ((factor("n"), Factor(3)),))
SHAPE = tuple(length(layout) for layout in LAYOUTS)


def elements(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Element.random(SPACES, generator) for _ in range(number)]


def tensor(seed=1):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_nested_element_reads_head_p_of_h_and_channel_q_of_h_and_j():
    element = elements(1)[0]
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layout = ((factor("kv"), factor("q"), factor("vo")),)
    moved = element.apply(x.reshape(24), (layout,)).reshape(2, 3, 4)
    p, q, v, s = element.index["kv"], element.index["q"], element.index["vo"], element.sign["vo"]
    for g, h, j in itertools.product(range(2), range(3), range(4)):
        assert moved[g, h, j] == s[g, j] * x[p[g], q[g, h], v[g, j]]


def test_composition_acts_like_one_after_the_other():
    p, q = elements(2)
    x = tensor()
    assert torch.equal((p @ q).apply(x, LAYOUTS), p.apply(q.apply(x, LAYOUTS), LAYOUTS))


def test_the_inverse_undoes_the_action_on_either_side():
    p = elements(1)[0]
    x = tensor()
    assert torch.equal(p.inverse().apply(p.apply(x, LAYOUTS), LAYOUTS), x)
    identity = Element.identity(SPACES)
    assert (p @ p.inverse()).equals(identity)
    assert (p.inverse() @ p).equals(identity)


def test_every_cycle_of_pairwise_maps_through_the_universe_is_the_identity():
    models = elements(4)
    pair = {(i, j): models[i] @ models[j].inverse() for i in range(4) for j in range(4)}
    for i, j, k in itertools.product(range(4), repeat=3):
        assert (pair[i, j] @ pair[j, k] @ pair[k, i]).equals(Element.identity(SPACES))
        assert pair[i, j].equals(pair[j, i].inverse())


def test_the_action_on_a_matrix_is_the_product_with_permutation_matrices():
    p = elements(1)[0]
    w = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows = torch.zeros(6, 6, dtype=torch.float64)
    rows[torch.arange(6), p.index["d"]] = p.sign["d"].double()
    columns = torch.eye(7, dtype=torch.float64)[p.index["f"]]
    assert torch.equal(p.apply(w, (((factor("d"),),), ((factor("f"),),))), rows @ w @ columns.T)


def test_an_unsigned_factor_moves_without_its_signs():
    p = elements(1)[0]
    gamma = torch.rand(6)
    assert torch.equal(p.apply(gamma, (((factor("d", signed=False),),),)), gamma[p.index["d"]])


def test_packed_arrays_are_int32_and_read_back_as_the_same_element():
    p = elements(1)[0]
    arrays = p.pack()
    assert {array.dtype for array in arrays.values()} == {torch.int32}
    assert Element.unpack(SPACES, arrays).equals(p)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("f", [0, 0, 1, 2, 3, 4, 5], "not a permutation"),
        ("f", [0, 1], "wants"),
        ("vocab", [1, 0, 2, 3], "not a movable space"),
        ("nowhere", [0], "not a movable space"),
        ("f:sign", [1] * 7, "no signs"),
        ("d:sign", [1, 1, 1, 0, 1, 1], r"\+1 or -1"),
        ("n:sign", [1, -1, 1, 1, 1], "all be equal"),
    ],
)
def test_arrays_that_are_no_element_are_refused(name, array, message):
    with pytest.raises(ValueError, match=message):
        Element.unpack(SPACES, {name: torch.tensor(array, dtype=torch.int32)})


def test_random_elements_are_elements_and_follow_the_generator():
    first, again = elements(1)[0], elements(1)[0]
    check_element(first)
    assert first.equals(again)
    assert first.index["deep"].shape == (2, 3, 2)
    assert "vocab" not in first.index


def test_dtype_is_kept_and_the_identity_copies_nothing():
    p = elements(1)[0]
    x = tensor().to(torch.float16)
    assert p.apply(x, LAYOUTS).dtype == torch.float16
    assert Element.identity(SPACES).apply(x, LAYOUTS) is x


def test_a_tensor_that_does_not_fit_the_layout_is_refused():
    p = elements(1)[0]
    with pytest.raises(ValueError, match="axis 1 has length 5, the layout describes 6"):
        p.apply(torch.zeros(SHAPE[0], 5, SHAPE[2]), LAYOUTS)
    with pytest.raises(ValueError, match="2 axes"):
        p.apply(torch.zeros(2, 2), LAYOUTS)


def test_groups_gather_what_is_nested_outer_spaces_first():
    found = {group.name: [space.name for space in group.spaces] for group in groups(SPACES)}
    assert found == {"d": ["d"], "n": ["n"], "f": ["f"], "kv": ["kv", "q", "vo", "deep"]}
    kinds = {group.name: group.kind for group in groups(SPACES)}
    assert kinds == {"d": "signed", "n": "flip", "f": "permutation", "kv": "nested"}
    nested = groups(SPACES)[-1]
    assert [space.name for space in nested.spaces if space.within == "kv"] == ["q", "vo"]
    assert nested.size == 2


def test_incidences_locate_the_space_as_the_middle_axis_of_its_segment():
    places = incidences({"w": LAYOUTS})
    assert [(place.axis, place.segment, place.position) for place in places["q"]] == [(0, 0, 1), (0, 2, 1)]
    second = places["q"][1]
    assert (second.start, second.outer, second.size, second.inner) == (24 + 14, 2, 3, 2)
    x = tensor()
    block = x.narrow(0, second.start, second.outer * second.size * second.inner)
    assert block.reshape(second.outer, second.size, second.inner, *SHAPE[1:]).shape[1] == SPACES["q"].size


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (((factor("q"),),), "lies within 'kv', which is not in its segment"),
        (((Factor(3, "d"),),), "3 coordinates of 'd', of size 6"),
        (((factor("d"), factor("d")),), "twice"),
        (((Factor(3, "nowhere"),),), "unknown space"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        check_layout(SPACES, layout)


def test_a_space_within_itself_is_refused():
    with pytest.raises(ValueError, match="lies within itself"):
        ancestors({"a": Space("a", 2, within="b"), "b": Space("b", 2, within="a")}, "a")
    with pytest.raises(ValueError, match="does not exist"):
        ancestors({"a": Space("a", 2, within="b")}, "a")

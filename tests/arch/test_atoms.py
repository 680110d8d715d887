from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.arch.atoms import (
    ONE,
    choose,
    fresh,
    is_pinned,
    part_of,
    pin,
    regroup,
    resolve,
    root,
    size_of,
    unify,
)


def sizes(axis):
    return [[atom.size for atom in product] for product in resolve(axis)]


def same(first, second):
    return resolve(first) == resolve(second)


def test_axes_of_one_size_become_one():
    a, b = fresh(6), fresh(6)
    unify(a, b)
    assert same(a, b)
    assert not is_pinned(a)


def test_an_atom_is_split_by_the_product_it_is_equal_to():
    whole, heads, channels = fresh(12), fresh(3), fresh(4)
    unify(whole, ((heads[0][0], channels[0][0]),))
    assert sizes(whole) == [[3, 4]]
    assert same(regroup([whole], [3, 4])[0], heads)


def test_two_ways_to_split_meet_in_their_common_refinement():
    whole = fresh(24)
    regroup([whole], [4, 6])
    first, second, third = regroup([whole], [2, 2, 6])
    assert sizes(whole) == [[2, 2, 6]]
    regroup([whole], [12, 2])
    assert sizes(whole) == [[2, 2, 3, 2]]
    assert sizes(third) == [[3, 2]]
    assert [sizes(axis) for axis in (first, second)] == [[[2]], [[2]]]


def test_splits_without_a_common_refinement_cannot_move():
    whole = fresh(12)
    regroup([whole], [3, 4])
    parts = regroup([whole], [2, 6])
    assert is_pinned(whole)
    assert all(is_pinned(part) for part in parts)


def test_a_slice_cuts_an_atom_and_a_second_slice_finds_the_pieces():
    whole = fresh(9)
    first, rest = part_of(whole, 0, 4), part_of(whole, 4, 9)
    assert sizes(whole) == [[4], [5]]
    assert same(part_of(whole, 0, 4), first)
    assert same(part_of(whole, 4, 9), rest)
    assert sizes(part_of(whole, 2, 6)) == [[2], [2]]
    assert sizes(whole) == [[2], [2], [2], [3]]


def test_a_slice_of_a_product_cuts_its_first_factor_or_nothing():
    heads, channels = fresh(3), fresh(4)
    both = ((heads[0][0], channels[0][0]),)
    assert sizes(part_of(both, 4, 12)) == [[2, 4]]
    assert sizes(heads) == [[1], [2]]
    assert is_pinned(part_of(both, 0, 6))
    assert is_pinned(channels)


def test_swapped_halves_are_one_atom():
    channels = fresh(6)
    first, second = part_of(channels, 0, 3), part_of(channels, 3, 6)
    unify(second + first, channels)
    assert same(first, second)
    assert not is_pinned(channels)


def test_a_concatenation_is_unified_piece_by_piece():
    a, b, whole = fresh(2), fresh(3), fresh(5)
    unify(a + b, whole)
    assert sizes(whole) == [[2], [3]]
    pin(a)
    assert not is_pinned(whole)
    assert is_pinned(part_of(whole, 0, 2))
    assert not is_pinned(part_of(whole, 2, 5))


def test_pins_travel_through_equations_and_splits():
    a, b = fresh(12), fresh(12)
    left, right = regroup([a], [3, 4])
    pin(left)
    unify(a, b)
    assert is_pinned(regroup([b], [3, 4])[0])
    assert not is_pinned(right)
    unify(b, fresh(12, pinned=True))
    assert is_pinned(right)


def test_what_is_left_of_a_pinned_atom_when_it_is_split_stays_pinned():
    rows, columns = fresh(6, pinned=True), fresh(2)
    both = ((*rows[0], *columns[0]),)
    first, rest = regroup([both], [3, 4])
    assert sizes(both) == [[3, 2, 2]]
    assert is_pinned(first)
    assert [atom.pinned for atom in resolve(rest)[0]] == [True, False]


def test_flattening_pixels_keeps_padded_channels_apart():
    lo, channels, hi, pixels = fresh(1), fresh(4), fresh(2), fresh(9, pinned=True)
    (flat,) = regroup([lo + channels + hi, pixels], [63])
    assert sizes(flat) == [[9], [4, 9], [2, 9]]


def test_regrouping_ignores_axes_of_size_one():
    a, b = fresh(2), fresh(6)
    assert regroup([ONE, a, ONE, b], [2, 1, 1, 6, 1]) == [a, ONE, ONE, b, ONE]
    assert [size_of(axis) for axis in regroup([a, b], [4, 1, 3])] == [4, 1, 3]


def test_the_choices_of_a_fused_axis_are_atoms_of_their_own():
    fused = fresh(24)
    which, heads, channels = regroup([fused], [3, 2, 4])
    query = choose([which, heads, channels], 0, 0)
    key = choose([which, heads, channels], 0, 1)
    again = choose([which, heads, channels], 0, 0)
    assert is_pinned(which)
    assert same(query[1], again[1])
    assert not same(query[1], key[1])
    unify(query[1], key[1])
    assert root(query[1][0][0]) is root(key[1][0][0])
    assert not is_pinned(query[1])
    pin(channels)
    assert is_pinned(query[1])
    assert not is_pinned(query[0])


def test_a_choice_that_equals_the_whole_makes_all_choices_equal():
    fused = fresh(24)
    which, heads, channels = regroup([fused], [3, 2, 4])
    first, second = (choose([which, heads, channels], 0, index) for index in (0, 1))
    unify(first[1], channels)
    assert same(second[1], channels)
    assert not same(first[0], second[0])
    assert not is_pinned(channels)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_equations_between_axes_end_and_keep_their_sizes(data):
    axes = [fresh(12) for _ in range(5)]
    for _ in range(data.draw(st.integers(1, 14))):
        pick = st.sampled_from(axes)
        action = data.draw(st.sampled_from(["unify", "pin", "split", "cut", "choose", "swap"]))
        axis = data.draw(pick)
        if action == "unify":
            unify(axis, data.draw(pick))
        elif action == "pin" and data.draw(st.integers(0, 3)) == 0:
            pin(axis)
        elif action == "split":
            parts = regroup([axis], data.draw(st.sampled_from([[3, 4], [4, 3], [2, 6], [2, 2, 3]])))
            assert [size_of(part) for part in parts] in ([3, 4], [4, 3], [2, 6], [2, 2, 3])
            axes += regroup(parts, [12])
        elif action == "choose":
            (which, rest) = regroup([axis], [3, 4])
            (choice,) = choose([which, rest], 0, data.draw(st.integers(0, 2)))
            assert size_of(choice) == 4
            unify(choice, regroup([data.draw(pick)], [3, 4])[1])
        else:
            at = data.draw(st.integers(1, 11))
            first, second = part_of(axis, 0, at), part_of(axis, at, 12)
            assert (size_of(first), size_of(second)) == (at, 12 - at)
            axes.append(second + first if action == "swap" else first + second)
    assert all(size_of(resolve(axis)) == 12 for axis in axes)

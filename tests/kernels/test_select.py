"""The k-th largest magnitude by counting, against a full sort."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.kernels.select import Bracket, Count, RankedMagnitude, RankSearch, Tally, places_of
from mergetool.testing.toys import uniform
from tests.elsewhere import DEVICE, Elsewhere
from tests.streams import streaming

KINDS = {32: (torch.float32, np.float32), 64: (torch.float64, np.float64)}


def select(slices, rank, bits):
    """Run all passes over slices of |x|; returns the result and the number of passes."""
    search, passes = RankSearch.begin(rank, bits), 0
    while isinstance(search, RankSearch):
        count = Count(search)
        for part in slices:
            count.add(part)
        search, passes = search.narrow(count.histogram()), passes + 1
    return search, passes


def sorted_out(x, rank):
    """The same by sorting: the magnitude, how many are larger, how many are equal."""
    ordered = x.abs().flatten().sort(descending=True).values
    value = ordered[rank - 1]
    return RankedMagnitude(float(value), int((ordered > value).sum()), int((ordered == value).sum()))


def check(x, ranks=None):
    bits = 32 if x.dtype == torch.float32 else 64
    n = x.numel()
    for rank in ranks or {1, 2, max(1, n // 5), max(1, n // 2), n - 1 or 1, n}:
        found, passes = select([x.abs()], rank, bits)
        assert found == sorted_out(x, rank), rank
        assert passes == bits // 16


@pytest.mark.parametrize("bits", [32, 64])
def test_any_rank_of_continuous_values_is_that_of_a_sort(bits):
    x = uniform((3_001,), "values").to(KINDS[bits][0]).pow(3) / 7
    check(x, range(1, 3_002, 300))


@pytest.mark.parametrize("bits", [32, 64])
def test_values_that_differ_only_in_their_last_bits_are_told_apart(bits):
    dtype, number = KINDS[bits]
    step = np.finfo(number).eps
    check(torch.tensor([1 + k * step for k in (5, 3, 9, 3, 0, 1, 7)], dtype=dtype), range(1, 8))


def test_differences_of_sixteen_bit_models_have_many_equal_magnitudes():
    base = uniform((20_000,), "base").bfloat16()
    delta = (base.float() + uniform((20_000,), "delta") / 64).bfloat16().float() - base.float()
    found, _ = select([delta.abs()], 4_000, 32)
    assert found.equal > 100
    check(delta)


@pytest.mark.parametrize("bits", [32, 64])
def test_zeros_of_both_signs_denormals_and_huge_values_have_their_places(bits):
    dtype, number = KINDS[bits]
    info = np.finfo(number)
    values = [0.0, -0.0, info.smallest_subnormal, -3 * info.smallest_subnormal, info.tiny, -info.max, info.max, 1.0]
    check(torch.tensor(np.array(values, dtype=number)), range(1, 9))
    assert torch.tensor(np.array(values, dtype=number)).dtype == dtype


def test_vectors_of_zeros_have_threshold_zero():
    assert select([torch.zeros(10)], 3, 32)[0] == RankedMagnitude(0.0, 0, 10)


def test_infinity_is_the_largest_magnitude():
    assert select([torch.tensor([1.0, math.inf, 2.0])], 1, 32)[0] == RankedMagnitude(math.inf, 0, 1)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("length", [1, 7, 64, 399])
def test_slices_add_up(bits, length):
    x = (uniform((400,), "values").to(KINDS[bits][0]) * 50).round() / 3
    for rank in (1, 80, 400):
        assert select([x.abs()], rank, bits) == select(x.abs().split(length), rank, bits)


def test_histograms_of_two_places_add_up_to_that_of_both():
    x = uniform((1_000,), "values").abs()
    search = RankSearch.begin(100, 32)
    while isinstance(search, RankSearch):
        parts = []
        for part in (x[:300], x[300:], x[:0]):
            parts.append(Count(search))
            parts[-1].add(part)
        search = search.narrow(sum(part.histogram() for part in parts))
    assert search == sorted_out(x, 100)


def test_the_values_counted_are_not_changed():
    x = uniform((100,), "values").abs()
    copy = x.clone()
    select([x], 10, 32)
    assert x.equal(copy)


def bracket_of(sample, rank, total):
    count = Count(RankSearch.begin(rank, 32))
    count.add(sample.abs())
    return Bracket.around(rank, total, count.histogram())


def settled(bracket, slices):
    """The result of one pass over |x| in slices, each tallied in its own place."""
    tables = []
    for part in slices:
        tally = Tally(bracket)
        for piece in part.abs().split(1_000):
            tally.add(piece)
        tables.append(tally.table())
    return bracket.settle(torch.cat(tables))


@pytest.mark.parametrize("rank", [1, 60, 6_000, 30_000, 50_000, 59_990, 60_000])
def test_a_bracket_from_a_sample_holds_what_a_sort_finds(rank):
    x = uniform((60_000,), "values").pow(3)
    bracket = bracket_of(x[::16], rank, len(x))
    assert settled(bracket, x.split(25_000)) == sorted_out(x, rank)


@pytest.mark.parametrize("rank", [50, 500, 1_500])
def test_a_bracket_counts_equal_magnitudes_of_sixteen_bit_models(rank):
    base = uniform((20_000,), "base").bfloat16()
    delta = (base.float() + uniform((20_000,), "delta") / 64).bfloat16().float() - base.float()
    found = settled(bracket_of(delta[:10_000], rank, len(delta)), [delta])
    assert found == sorted_out(delta, rank)
    assert found.equal > 1


def test_a_sample_that_misleads_is_noticed():
    x = uniform((20_000,), "values")
    small, large = bracket_of(x / 100, 4_000, len(x)), bracket_of(x * 100, 4_000, len(x))
    assert settled(small, [x]) is None
    assert settled(large, [x]) is None


@pytest.mark.parametrize("rank", [1, 3, 59_998, 60_000])
def test_the_ends_are_found_even_where_no_sample_has_them(rank):
    x = uniform((60_000,), "values") + 2.0
    places = x.topk(10, largest=rank < 10).indices
    x[places] *= 1e3 if rank < 10 else 1e-3
    others = torch.ones(len(x), dtype=torch.bool)
    others[places] = False
    assert settled(bracket_of(x[others][::16], rank, len(x)), x.split(25_000)) == sorted_out(x, rank)


def test_a_bracket_that_holds_all_entries_finds_every_rank():
    x = torch.tensor([0.0, -0.0, 2.0, -2.0, 2.0**-149, math.inf, -3.0e38, 1.0])
    for rank in range(1, len(x) + 1):
        assert settled(Bracket.of_all(rank), x.split(3)) == sorted_out(x, rank)


def test_a_bracket_that_would_hold_most_entries_is_not_made():
    x = uniform((20_000,), "values")
    x[:15_000] = 0.0
    assert bracket_of(x, 12_000, len(x)) is None
    assert bracket_of(x, 2_000, len(x)) is not None


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_any_finite_floats_are_ranked_as_by_a_sort(data):
    bits = data.draw(st.sampled_from([32, 64]))
    values = data.draw(st.lists(st.floats(width=bits, allow_nan=False), min_size=1, max_size=30))
    x = torch.tensor(np.array(values, dtype=KINDS[bits][1]))
    rank = data.draw(st.integers(1, len(values)))
    assert select(x.abs().split(data.draw(st.integers(1, 30))), rank, bits)[0] == sorted_out(x, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_places_of_a_magnitude_have_either_sign(dtype):
    x = torch.tensor([0.1, -0.1, 0.2, 0.0, -0.0, 0.1], dtype=dtype)
    assert places_of(x, float(x[0])).tolist() == [0, 1, 5]
    assert places_of(x, 0.0).tolist() == [3, 4]
    assert places_of(x, 0.3).tolist() == []


@pytest.mark.parametrize("bits", [32, 64])
def test_a_device_counts_what_the_cpu_counts_and_nobody_waits(bits):
    slices = [part.abs() for part in uniform((3_001,), "values").to(KINDS[bits][0]).pow(3).split(1_000)]
    search = RankSearch.begin(700, bits)
    while isinstance(search, RankSearch):
        here = Count(search)
        for part in slices:
            here.add(part)
        with Elsewhere(), streaming() as streams:
            there = Count(search)
            for part in [part.to(DEVICE) for part in slices]:
                there.add(part)
            assert streams.counts["waits"] == len(slices)  # for copies to the device, which are no part of it
            assert there.histogram().tolist() == here.histogram().tolist()
        search = search.narrow(here.histogram())


def test_a_device_finds_what_lies_in_brackets_and_the_host_waits_for_all_of_them_at_once():
    slices = [uniform((2_000,), f"slice {place}").pow(3).bfloat16().float().abs() for place in range(3)]
    cuts = [torch.tensor(cut, dtype=torch.float32).view(torch.int32).item() for cut in (0.0, 0.001, 0.1, 0.2, 0.9)]
    brackets = [Bracket(1, low, end) for low, end in pairwise(cuts)]
    here, there = ([Tally(bracket) for bracket in brackets] for _ in "ab")
    for part in slices:
        Tally.add_all(here, [part] * len(here))
        with Elsewhere(), streaming() as streams:
            moved = part.to(DEVICE)
            Tally.add_all(there, [moved] * len(there))
            assert streams.counts["waits"] == 1 + 3  # the copy; which lie there, how many differ, and their way back
    for bracket, one, other in zip(brackets, here, there, strict=True):
        held = int(one.table()[:, 1].sum()) - one._larger
        for rank in range(one._larger + 1, one._larger + held + 1, 1 + held // 20):
            found = replace(bracket, rank=rank).settle(one.table())
            assert found is not None
            assert replace(bracket, rank=rank).settle(other.table()) == found

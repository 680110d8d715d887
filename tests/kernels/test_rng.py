"""Counter-based draws: the bits of plain integer arithmetic, blind to slicing, and without a pattern to be found."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from mergetool.kernels import rng
from mergetool.kernels.rng import draw, hash_words, keep_at, keep_mask, normal, resolved, stream_key, uniform
from tests.elsewhere import DEVICE, Elsewhere
from tests.streams import streaming

WORD = 0xFFFFFFFF
MANY = 1 << 18
RARE = 1e-7
"""Chance that one test of randomness fails for true random numbers; keys are fixed, so it fails always or never."""
STREAMS = [stream_key(seed, f"model.layers.{i}.weight", "math", "dare") for seed in range(2) for i in range(3)]


def plain_word(key, counter):
    """The hash of one counter, in Python's integers."""
    block, counter = divmod(counter, 1 << 32)
    if block:
        digest = hashlib.blake2b(f"{block}\0{key[0]}\0{key[1]}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    x = counter ^ key[0]
    x = (x ^ x >> 16) * 0x85EBCA6B & WORD
    x = ((x ^ x >> 13) + key[1]) * 0xC2B2AE35 & WORD
    return x ^ x >> 16


def plain_draw(key, index):
    """Element `index` of a stream, unsigned: the low half of a word for even ones, the high half for odd ones."""
    return plain_word(key, index // 2) >> 16 * (index % 2) & 0xFFFF


def ints(count):
    return torch.empty(count, dtype=torch.int32)


def words(key, start, count):
    return hash_words(key, start, ints(count), ints(count)).numpy().view(np.uint32)


def draws(key, start, count):
    """Elements of a stream, unsigned."""
    return draw(key, start, ints(count), ints(count)).numpy().view(np.uint16)


def mask(key, start, probability, count, dtype=torch.float32):
    def scratch(place, kind):
        return torch.empty(count, dtype=kind)

    return keep_mask(key, start, probability, torch.empty(count, dtype=dtype), scratch)


word = st.integers(0, WORD)
keys = st.tuples(word, word)


# ---------------------------------------------------------------- the same bits everywhere


@settings(max_examples=100, deadline=None, derandomize=True)
@given(keys, st.integers(0, 1 << 40), st.integers(1, 20))
def test_draws_are_those_of_plain_integer_arithmetic(key, start, count):
    assert words(key, start, count).tolist() == [plain_word(key, start + i) for i in range(count)]
    assert draws(key, start, count).tolist() == [plain_draw(key, start + i) for i in range(count)]


@pytest.mark.parametrize("start", [0, (1 << 31) - 3, (1 << 32) - 3, (1 << 33) - 3, (3 << 33) - 4, (1 << 45) - 1])
def test_draws_are_right_across_the_ends_of_words_and_blocks(start):
    for count in (6, 7):
        assert draws(STREAMS[0], start, count).tolist() == [plain_draw(STREAMS[0], start + i) for i in range(count)]


def test_the_hash_is_the_published_finaliser_where_the_key_is_zero():
    assert words((0, 0), 1, 1).tolist() == [0x514E28B7]


def test_keys_are_the_digest_of_seed_and_names():
    digest = hashlib.blake2b(b"5\0lm_head.weight\0math\0dare", digest_size=8).digest()
    key = stream_key(5, "lm_head.weight", "math", "dare")
    assert b"".join(part.to_bytes(4, "little") for part in key) == digest


def test_keys_differ_by_every_part_of_the_name():
    keys = {stream_key(0, "a", "b"), stream_key(1, "a", "b"), stream_key(0, "ab"), stream_key(0, "b", "a")}
    assert len(keys) == 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(keys, st.integers(0, 1 << 34), st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_a_stream_is_the_same_however_it_is_sliced(key, start, lengths):
    whole = draws(key, start, sum(lengths))
    offsets = np.cumsum([0, *lengths])[:-1].tolist()
    parts = [draws(key, start + offset, length) for offset, length in zip(offsets, lengths, strict=True)]
    assert np.concatenate(parts).tolist() == whole.tolist()


@pytest.mark.parametrize("key", [*STREAMS[:2], (0, 0), (WORD, WORD)])
def test_no_word_comes_twice_within_a_block(key):
    assert len(np.unique(words(key, 12345, MANY))) == MANY


# ---------------------------------------------------------------- statistics


def uniform_enough(observed):
    """Chi-square of counts that should be equal."""
    expected = np.mean(observed)
    distance = np.sum((np.asarray(observed) - expected) ** 2) / expected
    return special.chdtrc(np.size(observed) - 1, distance) > RARE


def cells(*columns):
    """Counts of combinations of four-bit numbers."""
    place = sum((column >> 12).astype(np.int64) << 4 * i for i, column in enumerate(columns))
    return np.bincount(place, minlength=16 ** len(columns))


@pytest.mark.parametrize("key", [*STREAMS, (0, 0), (0, 1), (1, 0)])
def test_every_byte_of_either_half_is_uniform(key):
    found = draws(key, 0, 2 * MANY).reshape(-1, 2)
    for half in (0, 1):
        for shift in (8, 4, 0):
            assert uniform_enough(np.bincount((found[:, half] >> shift) & 0xFF, minlength=256)), (half, shift)


@pytest.mark.parametrize("key", STREAMS[:3])
@pytest.mark.parametrize("lag", [1, 2, 3, 64, 4096, 1 << 16])
def test_neighbours_are_independent(key, lag):
    """Halves of a word, next to each other in a row, above each other in a column, at powers of two."""
    found = draws(key, 0, MANY + lag)
    assert uniform_enough(cells(found[:-lag], found[lag:]))
    assert uniform_enough(cells(found[:-lag:2], found[lag::2]))


def test_three_in_a_row_are_independent():
    found = draws(STREAMS[0], 0, MANY)
    assert uniform_enough(cells(found[:-2], found[1:-1], found[2:]))


def test_models_tensors_seeds_and_purposes_draw_independently():
    others = [
        stream_key(0, "w", "math", "dare"),
        stream_key(0, "w", "code", "dare"),
        stream_key(0, "v", "math", "dare"),
        stream_key(1, "w", "math", "dare"),
        stream_key(0, "w", "math", "ties boundary"),
    ]
    found = [draws(key, 0, MANY) for key in others]
    for i, one in enumerate(found):
        for two in found[:i]:
            assert uniform_enough(cells(one, two))
            assert uniform_enough(cells(one[1:], two[:-1]))


def test_correlations_between_many_streams_are_those_of_chance():
    size = 1 << 13
    masks = np.stack([mask(stream_key(0, f"t{i}", "m"), 0, 0.5, size).numpy() for i in range(100)]) - 0.5
    correlations = (masks @ masks.T)[np.triu_indices(100, 1)] * 4 / math.sqrt(size)
    steps = np.arange(len(correlations) + 1) / len(correlations)
    normal_steps = special.ndtr(np.sort(correlations))
    apart = max((steps[1:] - normal_steps).max(), (normal_steps - steps[:-1]).max())  # Kolmogorov and Smirnov
    assert special.kolmogorov(apart * math.sqrt(len(correlations))) > 1e-4
    assert np.abs(correlations).max() < 5.5  # the largest of 4950 standard normals


def test_turning_a_bit_of_the_counter_turns_each_bit_with_chance_a_half():
    counters = np.arange(2048) * 104_729
    before = np.array([plain_word(STREAMS[0], int(i)) for i in counters])
    for bit in range(32):
        turned = before ^ np.array([plain_word(STREAMS[0], int(i) ^ 1 << bit) for i in counters])
        shares = [float((turned >> place & 1).mean()) for place in range(32)]
        assert max(abs(share - 0.5) for share in shares) < 0.08, bit


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probability", [2.0**-16, 1e-3, 0.2, 0.5, 0.7, 1 - 2.0**-16, 1.0])
def test_a_mask_keeps_the_draws_below_its_probability(dtype, probability):
    signed = draws(STREAMS[0], 99, 5000).view(np.int16).astype(np.int64)
    expected = (signed + 2**15) / 2**16 < resolved(probability)
    found = mask(STREAMS[0], 99, probability, 5000, dtype)
    assert found.dtype == dtype
    assert found.tolist() == expected.astype(float).tolist()


def test_the_draws_kept_are_the_lowest_and_no_value_is_on_both_sides():
    found = draws(STREAMS[0], 0, MANY).view(np.int16)
    for probability in (2.0**-16, 0.5, 1 - 2.0**-16):
        kept = mask(STREAMS[0], 0, probability, MANY).numpy() == 1
        edge = round(probability * 2**16) - 2**15
        assert found[kept].max() < edge <= found[~kept].min()


def test_probability_one_keeps_everything():
    assert bool(mask(STREAMS[0], 0, 1.0, MANY).all())


@pytest.mark.parametrize("probability", [2.0**-16, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_share_kept_is_the_probability_within_four_sigma(probability):
    exact = resolved(probability)
    for key in STREAMS:
        kept = int(mask(key, 0, probability, MANY).sum())
        assert abs(kept - exact * MANY) < 4 * math.sqrt(MANY * exact * (1 - exact))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(keys, st.floats(0, 1), st.floats(0, 1))
def test_masks_of_one_stream_are_nested(key, one, two):
    smaller, larger = (mask(key, 7, probability, 500) for probability in sorted((one, two)))
    assert bool((smaller <= larger).all())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(0, 1))
def test_probabilities_are_resolved_to_the_sixteenth_bit_and_never_to_zero(probability):
    used = resolved(probability)
    assert used * 2**16 == int(used * 2**16) >= 1
    assert used == 2.0**-16 or abs(used - probability) <= 2.0**-17


def test_nothing_is_drawn_for_an_empty_slice():
    assert draws(STREAMS[0], 5, 0).tolist() == []
    assert mask(STREAMS[0], 5, 0.5, 0).tolist() == []


@pytest.mark.parametrize("start", [0, 2**33 - 1001])
def test_single_elements_are_kept_as_in_a_slice(start):
    whole = mask(STREAMS[0], start, 0.3, 2000)
    places = torch.arange(0, 2000, 7)
    assert keep_at(STREAMS[0], places + start, 0.3).equal(whole[places] == 1.0)
    assert keep_at(STREAMS[0], places[:0], 0.3).shape == (0,)


@pytest.mark.parametrize("drawn", [normal, uniform])
def test_numbers_of_a_stream_are_the_same_in_any_slices(drawn):
    key = stream_key(0, "w", "noise")
    whole = drawn(key, 0, torch.empty(1001))
    parts = [drawn(key, start, torch.empty(min(77, 1001 - start))) for start in range(0, 1001, 77)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(drawn(key, 0, torch.empty(7, 143)), whole.view(7, 143))
    assert not torch.equal(drawn(stream_key(1, "w", "noise"), 0, torch.empty(1001)), whole)


def test_normal_numbers_are_normal_and_uniform_ones_uniform():
    key, like = stream_key(3, "w"), torch.empty(200_000, dtype=torch.float64)
    x, u = normal(key, 0, like), uniform(key, 0, like)
    shares = [float((x < quantile).double().mean()) for quantile in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    assert shares == pytest.approx([0.02275, 0.15866, 0.5, 0.84134, 0.97725], abs=3e-3)
    assert float(x.std()) == pytest.approx(1.0, abs=5e-3)
    assert abs(float((x[1:] * x[:-1]).mean())) < 1e-2
    assert float(u.abs().max()) < 1
    assert float(u.var()) == pytest.approx(1 / 3, abs=3e-3)
    assert abs(float(u.mean())) < 3e-3


def test_streams_of_a_device_share_counters_without_waiting_for_each_other():
    for made in (rng._all_counters, rng._quantiles):
        made.cache_clear()
    with Elsewhere(), streaming() as streams:
        for _ in range(2):
            with streams.stream(streams.Stream()):
                like = torch.empty(64, device=DEVICE)
                normal((1, 2), 0, like)
                words = draw((1, 2), 0, *(torch.empty(64, dtype=torch.int32, device=DEVICE) for _ in range(2)))
        words = words.cpu()
    assert words.tolist() == draw((1, 2), 0, *(torch.empty(64, dtype=torch.int32) for _ in range(2))).tolist()

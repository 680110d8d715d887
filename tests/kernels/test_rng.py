"""Counter-based draws: equal to a scalar reference, blind to slicing, balanced, and independent between keys."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mergetool.kernels.rng import draw, hash_words, keep_mask, resolved, stream_key

KEY = stream_key(0, "tensor", "model")
SIZE = 1 << 17


def ints(n):
    return torch.empty(n, dtype=torch.int32)


def draws(key, start, n):
    return draw(key, start, ints(n), ints(n)).clone()


def mask(key, start, n, probability):
    return keep_mask(key, start, probability, torch.empty(n), lambda place, dtype: torch.empty(n, dtype=dtype))


def reference(key, counter):
    """The hash of one counter, in Python integers."""
    x = (counter ^ key[0]) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = ((x ^ x >> 13) + key[1]) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


@pytest.mark.parametrize("start", [0, 1, 12_345, 2**31 - 5, 2**32 - 10])
def test_words_are_those_of_a_scalar_hash(start):
    found = hash_words(KEY, start, ints(10), ints(10)).numpy().view(np.uint32)
    assert found.tolist() == [reference(KEY, start + i) for i in range(10)]


def test_neighbours_share_a_word():
    word = reference(KEY, 7)
    low, high = draws(KEY, 14, 2).numpy().view(np.uint16).tolist()
    assert (low, high) == (word & 0xFFFF, word >> 16)


@pytest.mark.parametrize(("start", "n"), [(0, 1), (1, 1), (1, 2), (3, 5), (4, 5), (7, 1000), (8, 999)])
def test_a_slice_has_the_draws_of_the_whole(start, n):
    assert draws(KEY, start, n).equal(draws(KEY, 0, 2000)[start : start + n])


def test_beyond_the_width_of_the_counter_draws_go_on_and_do_not_repeat():
    edge = 2**33
    across = draws(KEY, edge - 100, 200)
    assert across[100:].equal(draws(KEY, edge, 100))
    assert not across[100:].equal(draws(KEY, 0, 100))


def test_every_word_occurs_once():
    words = hash_words(KEY, 0, ints(SIZE), ints(SIZE))
    assert len(words.unique()) == SIZE


def test_draws_are_uniform():
    """Chi-squared of 256 bins, for each half of the words, within six sigma."""
    halves = draws(KEY, 0, 2 * SIZE).view(-1, 2)
    for half in (halves[:, 0], halves[:, 1]):
        counts = torch.bincount((half.int() + 2**15) >> 8, minlength=256).double()
        chi2 = float(((counts - SIZE / 256) ** 2 / (SIZE / 256)).sum())
        assert abs(chi2 - 255) < 6 * math.sqrt(2 * 255)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 4096])
def test_draws_do_not_depend_on_one_another(lag):
    x = draws(KEY, 0, SIZE).double()
    other = draws(stream_key(0, "tensor", "another model"), 0, SIZE).double()
    for a, b in ((x[:-lag], x[lag:]), (x[:-lag], other[lag:]), (x, other)):
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(SIZE)


@pytest.mark.parametrize("probability", [2**-16, 0.001, 0.1, 0.3, 0.5, 0.9, 0.99999, 1.0])
def test_the_share_kept_is_the_probability_within_five_sigma(probability):
    kept = mask(KEY, 0, SIZE, probability)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    sigma = math.sqrt(SIZE * probability * (1 - probability))
    assert abs(float(kept.sum()) - SIZE * resolved(probability)) <= 5 * sigma + 1


def test_masks_of_one_key_are_nested():
    masks = [mask(KEY, 5, SIZE, p) for p in (0.1, 0.2, 0.5, 0.9, 1.0)]
    assert all(bool((small <= large).all()) for small, large in pairwise(masks))


def test_probabilities_are_resolved_to_the_sixteenth_bit_and_never_to_zero():
    assert resolved(0.5) == 0.5
    assert resolved(0.3) == round(0.3 * 65536) / 65536
    assert resolved(1e-9) == 2**-16
    assert resolved(1.0) == 1.0


def test_keys_differ_by_every_part_of_the_name():
    keys = {stream_key(0, "a", "b"), stream_key(1, "a", "b"), stream_key(0, "ab"), stream_key(0, "b", "a")}
    assert len(keys) == 4

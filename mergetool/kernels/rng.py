"""Random draws that depend on what they are for, not on when they are made.

Element j of a stream has 16 bits of a hash of (key, j). So a draw is the same for any order of work, slicing, number
of workers, device, and after a resume; and masks of one key are nested: what is kept at density 0.2 is kept at 0.5.

The hash is the 32-bit finaliser of MurmurHash3 with a second key word added between its multiplications: eleven
integer operations that every device has. It is a bijection of the counter for each key, so bits are balanced exactly.
One hash serves two neighbours, element 2i its low half and element 2i + 1 its high half, which makes draws half as
dear; 16 bits resolve a probability to 0.000015.

Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (the idea of counter-based streams).
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Key = tuple[int, int]
"""Two 32-bit words."""

_RESOLUTION = 1 << 16
_BLOCK = 1 << 32


def stream_key(seed: int, *names: str) -> Key:
    """The key of the stream for these names (tensor, model, purpose) under a seed."""
    digest = hashlib.blake2b("\0".join((str(seed), *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def resolved(probability: float) -> float:
    """The probability that `keep_mask` really uses: the nearest multiple of 2^-16, and at least that."""
    return max(1, round(probability * _RESOLUTION)) / _RESOLUTION


def keep_mask(
    key: Key, start: int, probability: float, out: Tensor, scratch: Callable[[str, torch.dtype], Tensor]
) -> Tensor:
    """Fill `out` (float, 1-D) with 1 where the element is kept, with this probability, and 0 elsewhere.

    `scratch(name, dtype)` gives temporaries shaped like `out`.
    """
    last = _largest_kept(probability)
    if last == _RESOLUTION // 2 - 1:
        return out.fill_(1.0)
    draws = draw(key, start, scratch("draws", torch.int32), scratch("hashing", torch.int32))
    torch.clamp(draws, last, last + 1, out=draws).neg_().add_(last + 1)  # 1 and 0, whatever wraps around on the way
    return out.copy_(draws)


def keep_at(key: Key, places: Tensor, probability: float) -> Tensor:
    """What `keep_mask` says of the elements at `places` (int64, CPU, ascending): whether they are kept (bool).

    They are few, so that numpy's lower cost of a call counts.
    """
    if len(places) and int(places[0]) >> 33 != int(places[-1]) >> 33:  # hashed by different blocks
        cut = int(torch.searchsorted(places, (int(places[0] >> 33) + 1) << 33))
        return torch.cat([keep_at(key, part, probability) for part in (places[:cut], places[cut:])])
    at = places.numpy()
    first, second = (np.uint32(word) for word in _block_key(key, int(at[0]) >> 33 if len(at) else 0))
    x = (at >> 1).astype(np.uint32) ^ first
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x += second
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> 16
    draws = x.view(np.int16)[2 * np.arange(len(at)) + (at & 1)]
    return torch.from_numpy(draws <= _largest_kept(probability))


def _largest_kept(probability: float) -> int:
    """The largest draw that is kept with this probability."""
    return round(resolved(probability) * _RESOLUTION) - 1 - _RESOLUTION // 2


def draw(key: Key, start: int, words: Tensor, temporary: Tensor) -> Tensor:
    """Uniform int16 numbers for the elements start, start + 1, ... of a stream, as many as `words` has entries.

    The result lies in `words`; `words` and `temporary` are int32, 1-D, of one length, and are overwritten.
    """
    first, odd = divmod(start, 2)
    hash_words(key, first, words[: (len(words) + odd + 1) // 2], temporary)
    return words.view(torch.int16)[odd : odd + len(words)]


def hash_words(key: Key, start: int, out: Tensor, temporary: Tensor) -> Tensor:
    """Fill `out` (int32, 1-D) with the hashes of counters start, start + 1, ...; `temporary` is at least as long."""
    done = 0
    while done < len(out):
        block, offset = divmod(start + done, _BLOCK)
        count = min(len(out) - done, _BLOCK - offset)
        _fill(_block_key(key, block), offset, out[done : done + count], temporary[:count])
        done += count
    return out


def _block_key(key: Key, block: int) -> Key:
    """Counters are 32 bits wide; beyond 2^32 every block has a key of its own."""
    return key if block == 0 else stream_key(block, str(key[0]), str(key[1]))


def _fill(key: Key, offset: int, x: Tensor, shifted: Tensor) -> None:
    torch.add(_counters(len(x), x.device), _signed(offset), out=x).bitwise_xor_(_signed(key[0]))
    _xor_shift(x, 16, shifted).mul_(_signed(0x85EBCA6B))
    _xor_shift(x, 13, shifted).add_(_signed(key[1])).mul_(_signed(0xC2B2AE35))
    _xor_shift(x, 16, shifted)


def _counters(count: int, device: torch.device) -> Tensor:
    """0, 1, 2, ... (int32), the same memory every time: making them is dearer than hashing them."""
    return _all_counters(1 << (count - 1).bit_length() if count > 1 else 1, device)[:count]


@lru_cache(maxsize=8)
def _all_counters(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32).to(device)  # which has ended when it returns: all streams will use it


def _xor_shift(x: Tensor, by: int, shifted: Tensor) -> Tensor:
    """`x ^= x >>> by`, with zeros shifted in (torch shifts signed integers arithmetically, numpy has unsigned ones)."""
    if x.device.type == "cpu":
        np.right_shift(x.numpy().view(np.uint32), by, out=shifted.numpy().view(np.uint32))
    else:
        torch.bitwise_right_shift(x, by, out=shifted).bitwise_and_((1 << (32 - by)) - 1)
    return x.bitwise_xor_(shifted)


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def normal(key: Key, start: int, like: Tensor) -> Tensor:
    """Normal numbers for the elements start, start + 1, ... of a stream: shape, dtype and device of `like`.

    The quantiles of a draw of 16 bits, read from a table: so they do not depend on how a library slices its functions.
    """
    drawn = torch.index_select(_quantiles(like.device), 0, _indices(key, start, like))
    return drawn.to(like.dtype).view(like.shape)


def uniform(key: Key, start: int, like: Tensor) -> Tensor:
    """Numbers in (-1, 1), as `normal` gives its own."""
    return ((_indices(key, start, like) * 2 + 1) / _RESOLUTION - 1).to(like.dtype).view(like.shape)


def _indices(key: Key, start: int, like: Tensor) -> Tensor:
    """Uniform whole numbers below 2^16."""
    words = [torch.empty(like.numel() + 2, dtype=torch.int32, device=like.device) for _ in range(2)]
    return draw(key, start, *words)[: like.numel()].long() + _RESOLUTION // 2


@lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> Tensor:
    centres = (torch.arange(_RESOLUTION, dtype=torch.float64) + 0.5) / _RESOLUTION
    quantiles: Tensor = torch.special.ndtri(centres)
    return quantiles.to(device)

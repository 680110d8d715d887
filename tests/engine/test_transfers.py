"""Bytes to a device and back: what comes is what went, and nothing is touched before its copy has ended."""

import gc
import weakref
from unittest.mock import patch

import pytest
import torch

from mergetool.engine import transfers
from mergetool.engine.devices import own_stream
from mergetool.engine.transfers import PIECES, Transfers
from mergetool.tensors.io import bytes_of
from tests.elsewhere import DEVICE, Elsewhere
from tests.streams import RaceError, Stream, streaming

PIECE = 64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(transfers, "PIECE_BYTES", PIECE)


def reader(stored):
    """What fills memory with the stored elements from a given one on."""
    return lambda begin, room: room.__setitem__(slice(None), bytes_of(stored[begin:])[: len(room)])


def there_and_back(stored, ring, device=DEVICE):
    """Widened on the device, rounded there, and copied back."""
    values = torch.empty(len(stored), dtype=torch.float32, device=device)
    ring.up(values, stored.dtype, reader(stored))
    came = bytearray(stored.numel() * stored.element_size())
    ring.down(values.to(stored.dtype), lambda at, data: came.__setitem__(slice(at, at + len(data)), data))
    return torch.frombuffer(came, dtype=stored.dtype) if came else stored


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 1000])
def test_what_comes_back_is_what_went(dtype, length, streams):
    stored = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
    with Elsewhere(), streaming() if streams else patch.object(transfers, "PIECES", PIECES), own_stream(DEVICE):
        back = there_and_back(stored, Transfers(DEVICE))
    assert torch.equal(back.view(torch.uint8), stored.view(torch.uint8))


def test_values_travel_as_they_are_stored_and_the_host_waits_only_for_room():
    stored = torch.randn(PIECE // 2 * (PIECES + 2)).bfloat16()
    with Elsewhere(), streaming() as streams, own_stream(DEVICE):
        values = torch.empty(len(stored), device=DEVICE)
        Transfers(DEVICE).up(values, stored.dtype, reader(stored))
        assert streams.counts["up"] == 2 * len(stored)
        assert streams.counts["waits"] == 2  # for each piece that was used before


def test_memory_that_is_filled_again_too_early_is_noticed():
    stored = torch.arange(1.0, 200.0)
    changed = pytest.raises(RaceError, match="pinned memory was changed")
    hasty = patch.object(transfers._Streamed, "wait", lambda _: None)
    with changed, Elsewhere(), streaming(), own_stream(DEVICE), hasty:
        there_and_back(stored, Transfers(DEVICE))


def test_bytes_that_are_given_away_before_they_have_come_are_others():
    stored, came = torch.arange(1.0, 10.0), []
    with Elsewhere(), streaming(), own_stream(DEVICE), patch.object(transfers._Streamed, "wait", lambda _: None):
        Transfers(DEVICE).down(stored.to(DEVICE), lambda _, data: came.append(bytes(data)))
    assert came != [stored.numpy().tobytes()]


def test_streams_that_do_not_wait_for_each_other_are_noticed():
    stored = torch.arange(1.0, 200.0)
    race = pytest.raises(RaceError, match="another stream")
    deaf = patch.object(Stream, "wait_event", lambda *_: None)
    with race, Elsewhere(), streaming(), own_stream(DEVICE), deaf:
        there_and_back(stored, Transfers(DEVICE))


def test_streams_of_the_stand_in_are_gone_when_they_were_used():
    """They hold pinned memory: hundreds of tests would reserve more than the machine has, and could not fork."""
    with Elsewhere(), streaming() as streams, own_stream(DEVICE):
        there_and_back(torch.ones(100), Transfers(DEVICE))
        known = weakref.ref(streams)
    del streams
    gc.collect()
    assert known() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("piece", [PIECE, 1 << 20])
def test_what_comes_back_from_a_gpu_is_what_went(monkeypatch, piece):
    monkeypatch.setattr(transfers, "PIECE_BYTES", piece)
    stored, device = torch.randn(100 * piece // 2 + 7).bfloat16(), torch.device("cuda:0")
    with own_stream(device):
        ring = Transfers(device)
        for _ in range(3):
            assert torch.equal(there_and_back(stored, ring, device), stored)

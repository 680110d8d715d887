"""Leading directions by products are those of `eigh`, whatever the spectrum."""

import pytest
import torch

from mergetool.kernels import spectral, subspace
from mergetool.kernels.eigen import checked_eigh
from mergetool.kernels.spectral import concatenated, live_factors, live_factors_of, orthogonalised
from mergetool.kernels.subspace import leading_spaces, searching
from tests.elsewhere import DEVICE, Elsewhere, There
from tests.kernels.test_spectral import naive_merge, orthonormal, randn, relative, task

N, K = 192, 24
NOISE = 1e-4


def noise(m=N, n=N, seed=0):
    return randn(m, n, seed=seed) / n**0.5


def low_rank(rank, m=N, n=N, seed=0):
    return randn(m, rank, seed=seed) @ randn(rank, n, seed=seed + 1) / n


SPECTRA = {
    "j^-0.3": lambda: task(N, N, 0, 0.3),
    "j^-1": lambda: task(N, N, 1, 1.0),
    "j^-2": lambda: task(N, N, 2, 2.0),
    "down to the limit": lambda: (orthonormal(N, N) * torch.exp(-0.32 * torch.arange(N))) @ orthonormal(N, N, 1).mT,
    "flat noise": noise,
    "noise behind weak directions": lambda: noise() + 3 * low_rank(N // 16),
    "noise behind strong directions": lambda: noise() + 30 * low_rank(N // 16),
    "noise behind very strong directions": lambda: noise() + 3000 * low_rank(N // 16),
    "cut in noise behind all but one": lambda: noise() + 30 * low_rank(K - 1),
    "fewer directions than wanted": lambda: low_rank(K // 2),
    "one direction": lambda: low_rank(1),
    "equal values": lambda: orthonormal(N, N),
    "two steps": lambda: (
        (orthonormal(N, N) * torch.cat([torch.full((K,), 2.0), torch.ones(N - K)])) @ orthonormal(N, N, 1)
    ),
    "tiny": lambda: 1e-30 * noise(),
    "huge": lambda: 1e30 * noise(),
}


def cut(matrix, space):
    return matrix @ space @ space.mT


def by_eigh(matrix):
    """The matrix cut to its K leading directions that are no noise."""
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    live = values > NOISE**2 * values[-1]
    return cut(matrix, (vectors * live)[:, -K:])


@pytest.mark.parametrize("name", [name for name in SPECTRA if name != "equal values"])
def test_leading_directions_are_those_of_eigh(name):
    matrix = SPECTRA[name]()
    space, found = leading_spaces((matrix.mT @ matrix)[None], K, NOISE)
    assert found == [True]
    torch.testing.assert_close(space[0].mT @ space[0], torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-6)
    assert relative(cut(matrix, space[0]), by_eigh(matrix)) < max(2e-6, 3 * NOISE * (name in {"j^-2"}))


def test_what_is_found_beside_other_spectra_is_right():
    matrices = torch.stack([SPECTRA[name]() for name in SPECTRA] + [torch.zeros(N, N, dtype=torch.float64)])
    spaces, found = leading_spaces(matrices.mT @ matrices, K, NOISE)
    assert sum(found) > len(found) / 2  # in one batch all take the smallest steps of any, and time runs out
    for name, matrix, space, right in zip(SPECTRA, matrices, spaces, found, strict=False):
        if right and name not in {"j^-2", "equal values"}:
            assert relative(cut(matrix, space), by_eigh(matrix)) < 2e-6, name


def test_two_searches_give_the_same_bits():
    gram = noise().mT @ noise()
    assert torch.equal(leading_spaces(gram[None], K, NOISE)[0], leading_spaces(gram[None], K, NOISE)[0])


@pytest.mark.parametrize(("limit", "value"), [("_ROUNDS", 1), ("_GROWTH", 80.0)])
def test_what_is_not_found_is_left_to_eigh_and_counted(monkeypatch, limit, value):
    monkeypatch.setattr(subspace, limit, value)
    monkeypatch.setattr(spectral, "_SMALLEST", N)
    deltas = [SPECTRA[name]().float() for name in ("j^-1", "one direction", "flat noise")]
    with searching() as searches:
        factors = list(live_factors_of(deltas, K, together=True))
    assert searches.tried == 3
    assert searches.failed >= 2
    for each, delta in zip(factors, deltas, strict=True):
        assert relative(each.dense(), live_factors(delta, K).dense()) < 1e-6


# The merge


def deltas_of(kind, m, n, num_tasks=8):
    if kind == "power":
        return [task(m, n, seed, 0.3 + seed / 10).float() for seed in range(num_tasks)]
    rank = min(m, n) // 16
    return [(noise(m, n, seed) + 30 * low_rank(rank, m, n, 50 + 2 * seed)).float() for seed in range(num_tasks)]


@pytest.mark.parametrize("kind", ["power", "planted"])
@pytest.mark.parametrize("shape", [(256, 256), (256, 384)])
def test_a_merge_on_a_device_is_that_of_float64_eigh(monkeypatch, kind, shape):
    monkeypatch.setattr(spectral, "_SMALLEST", 256)
    deltas = deltas_of(kind, *shape)
    k = min(shape) // len(deltas)
    with Elsewhere(), searching() as searches:
        factors = list(live_factors_of([delta.to(DEVICE) for delta in deltas], k))
        every = concatenated(factors)
        merged = orthogonalised(every)
        assert isinstance(merged.u, There)
        found = merged.dense().cpu()
    assert (searches.tried, searches.failed) == (8, 0)
    live = min(each.rank for each in factors)
    assert live == k
    assert relative(found, naive_merge(deltas, k)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind", ["power", "planted"])
@pytest.mark.parametrize("shape", [(512, 512), (512, 1024), (1024, 512)])
def test_a_merge_on_a_gpu_is_that_of_float64_eigh(kind, shape):
    deltas = deltas_of(kind, *shape)
    with searching() as searches:
        factors = list(live_factors_of([delta.cuda() for delta in deltas], 64))
    assert (searches.tried, searches.failed) == (8, 0)
    assert relative(orthogonalised(concatenated(factors)).dense().cpu(), naive_merge(deltas, 64)) < 1e-5


def test_vectors_of_a_batch_are_taken_one_by_one_where_they_are_not_orthonormal():
    class Faulty(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.linalg.eigh and args[0].dim() == 3:
                return out[0], out[1] * 1.001
            return out

    batch = torch.stack([noise(20, 20, seed) for seed in range(3)])
    batch = batch.mT @ batch
    with Faulty():
        values, vectors = checked_eigh(batch)
    for one, *expected in zip(batch, values, vectors, strict=True):
        for found, wanted in zip(torch.linalg.eigh(one, UPLO="U"), expected, strict=True):
            assert torch.equal(found, wanted)

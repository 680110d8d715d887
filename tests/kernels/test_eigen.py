import subprocess
import sys
import threading

import pytest
import torch

from mergetool.kernels.eigen import _thread_setting, gram_eigh


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n, seed=0):
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


def with_spectrum(values, seed=0):
    return (
        rotation(len(values), seed)
        @ torch.diag(torch.tensor(values, dtype=torch.float64))
        @ rotation(len(values), 9).mT
    )


HARD = {
    "tall": randn(90, 40),
    "wide": randn(20, 40),
    "square": randn(40, 40),
    "one column": randn(7, 1),
    "one row": randn(1, 7),
    "identity": torch.eye(40, dtype=torch.float64),
    "diagonal": torch.diag(torch.arange(40, dtype=torch.float64)),
    "zero": torch.zeros(40, 40, dtype=torch.float64),
    "one entry": torch.zeros(40, 40, dtype=torch.float64).index_put(
        (torch.tensor([3]), torch.tensor([5])), torch.tensor(2.0).double()
    ),
    "rank two": randn(90, 2) @ randn(2, 60, seed=1),
    "multiple eigenvalues": with_spectrum([3.0] * 15 + [1.0] * 15 + [0.0] * 10),
    "equal blocks": torch.block_diag(*[randn(15, 15)] * 3),
    "steep": with_spectrum([10.0**-i for i in range(40)]),
    "tiny": 1e-30 * randn(40, 40),
    "huge": 1e30 * randn(40, 40),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_leading_eigenpairs_agree_with_the_full_decomposition(name, share):
    x = HARD[name]
    n = x.shape[1]
    k = max(1, int(share * n))
    values, vectors = gram_eigh(x, k)
    gram = x.mT @ x
    expected = torch.linalg.eigvalsh(gram).flip(0)[:k]
    size = max(float(expected[0]), 1e-300)
    assert values.shape == (k,)
    assert vectors.shape == (n, k)
    assert (values - expected).abs().max() <= 1e-13 * size
    assert (vectors.mT @ vectors - torch.eye(k, dtype=torch.float64)).abs().max() <= 1e-12
    assert (gram @ vectors - vectors * values).abs().max() <= 1e-13 * size


def test_memory_order_does_not_matter_and_the_argument_is_not_touched():
    x = randn(30, 20)
    by_columns = x.mT.contiguous().mT
    strided = randn(30, 40)
    strided[:, ::2] = x
    before = x.clone()
    values, vectors = gram_eigh(x, 5)
    for other in (by_columns, strided[:, ::2]):
        same_values, same_vectors = gram_eigh(other, 5)
        torch.testing.assert_close(same_values, values, rtol=1e-12, atol=0)
        torch.testing.assert_close((same_vectors * vectors).sum(0).abs(), torch.ones(5, dtype=torch.float64))
    assert torch.equal(x, before)


def test_float32_is_computed_in_float64():
    x = randn(50, 30).float()
    values, _ = gram_eigh(x, 4)
    expected = torch.linalg.svdvals(x.double())[:4].square()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)


def test_two_runs_give_the_same_bits():
    first, second = gram_eigh(HARD["rank two"], 20), gram_eigh(HARD["rank two"], 20)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_threads_do_not_disturb_each_other():
    matrices = [randn(120, 80, seed=seed) for seed in range(8)]
    alone = [gram_eigh(matrix, 10)[1] for matrix in matrices]
    together = [None] * len(matrices)

    def work(start):
        torch.set_num_threads(1)
        for index in range(start, len(matrices), 2):
            together[index] = gram_eigh(matrices[index], 10)[1]

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_entries_that_are_not_finite_are_refused(bad):
    x = randn(20, 10)
    x[3, 4] = bad
    with pytest.raises(ValueError, match="infinities"):
        gram_eigh(x, 3)


@pytest.mark.parametrize("k", [0, 11])
def test_asking_for_too_few_or_too_many_is_refused(k):
    with pytest.raises(ValueError, match=f"asked for {k} eigenvectors of a 10 x 10 matrix"):
        gram_eigh(randn(20, 10), k)


def test_scipys_blas_takes_as_many_threads_as_torch():
    threads_of_blas, set_threads_of_blas = _thread_setting()
    set_threads_of_blas(2)
    gram_eigh(randn(20, 10), 3)
    assert threads_of_blas() == torch.get_num_threads() == 1


ALONE = """
import sys
import numpy
import torch
from mergetool.kernels.assignment import assign
from mergetool.kernels.eigen import gram_eigh

values, _ = gram_eigh(torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64)), 2)
assert values.sqrt().round().tolist() == [8, 7], values
scores = numpy.random.default_rng(0).normal(size=(20, 20))
chosen = assign(scores)
assert not {"scipy.linalg", "scipy.optimize"} & sys.modules.keys()
import scipy.linalg
from scipy.optimize import linear_sum_assignment

assert linear_sum_assignment(-scores)[1].tolist() == chosen.tolist()
from scipy.linalg import cython_blas, cython_lapack

assert scipy.linalg.svdvals([[2.0, 0.0], [0.0, 1.0]]).tolist() == [2, 1]
assert {"dsytrd", "dstein"} <= set(cython_lapack.__pyx_capi__) and "dsyrk" in cython_blas.__pyx_capi__
"""


def test_routines_come_without_the_rest_of_scipy_which_can_be_imported_after_them():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

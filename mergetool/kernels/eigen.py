"""Leading eigenpairs of a Gram matrix x^T x, in float64.

The right singular vectors of x are the eigenvectors of its Gram matrix, which is small where x is tall, and a merge by
singular vectors wants the leading few only. `torch.linalg.eigh` finds them all. LAPACK does it in three steps that can
be cut short: reduce to a tridiagonal matrix T = Q^T G Q (`dsytrd`), find T's eigenvalues (`dsterf`) and its leading
eigenvectors by inverse iteration (`dstein`), turn back only those (`dormtr`). Leading 64 of 384: 7 ms, against 15 ms
for torch's eigh of the whole. Where more than half is wanted, the divide and conquer behind torch's eigh is faster.
LAPACK's own driver for a part of the spectrum (`dsyevr`) finds the eigenvalues by bisection and loses the gain.

torch offers none of the four, so on the CPU they are called in scipy's LAPACK, through the C pointers that scipy
publishes for Cython. ctypes lets go of the interpreter lock during a call (scipy.linalg's own wrappers keep it), so
worker threads run side by side. Tensors elsewhere take `torch.linalg.eigh`.

Reference: Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, chapters 4 (inverse iteration), 7, 8 (QL).
"""

import ctypes
from collections.abc import Callable
from functools import cache
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from mergetool.kernels.extensions import extension

_BLOCK = 64
"""Columns per panel that the workspaces leave room for; LAPACK uses 32 here."""


def gram_eigh(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of x^T x and their eigenvectors.

    x: (m, n), floating point. Returns values (k,), descending, and orthonormal vectors (n, k), float64, on x's device.
    Leading dimensions of x are those of a batch, and of the results.
    An eigenvalue is right to about 1e-15 of the largest, so singular values below 1e-8 of the largest are noise.
    Raises ValueError if k is not in 1..n, or an entry is infinite or not a number.
    """
    n, alone = x.shape[-1], x.is_cpu and x.dim() == 2
    if not 1 <= k <= n:
        raise ValueError(f"asked for {k} eigenvectors of a {n} x {n} matrix")
    x = x.to(torch.float64)
    gram = _upper_gram(x) if alone else x.mT @ x
    size = float(gram.diagonal(dim1=-2, dim2=-1).sum())  # the sum of the squares of all entries
    if not isfinite(size):
        raise ValueError("the matrix holds infinities or not-a-numbers")
    if alone and 2 * k <= n and size > 0 and (pairs := _leading_eigh(gram.clone(), k)):
        return pairs
    values, vectors = checked_eigh(gram)
    return values[..., -k:].flip(-1), vectors[..., -k:].flip(-1)


def checked_eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of the upper triangle; of a batch one by one where it cannot be trusted.

    Some versions of CUDA's library return eigenvectors of batches that are not orthonormal.
    """
    values, vectors = torch.linalg.eigh(symmetric, UPLO="U")
    if symmetric.dim() == 2 or _orthonormal(vectors):
        return values, vectors
    each = [torch.linalg.eigh(one, UPLO="U") for one in symmetric]
    return torch.stack([one for one, _ in each]), torch.stack([one for _, one in each])


def gram_of(x: Tensor) -> Tensor:
    """x^T x of a matrix (m, n), float64."""
    x = x.to(torch.float64)
    return mirrored_(_upper_gram(x)) if x.is_cpu else x.mT @ x


def add_gram_(total: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
    """Add factor x^T x of a matrix (m, n) to the upper triangle of `total` (n, n), float64."""
    x = x.to(torch.float64)
    return _add_upper_gram(total, x, factor) if x.is_cpu else total.addmm_(x.mT, x, alpha=factor)


def mirrored_(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle this is, in place."""
    return upper.triu_().add_(upper.triu(1).mT)


def _orthonormal(vectors: Tensor) -> bool:
    overlap = vectors.mT @ vectors
    overlap.diagonal(dim1=-2, dim2=-1).sub_(1)
    return float(overlap.abs().max()) < 1e-10


def _upper_gram(x: Tensor) -> Tensor:
    """x^T x, of which only the upper triangle is filled: half the work of a product."""
    return _add_upper_gram(x.new_zeros(x.shape[1], x.shape[1]), x, 1.0)


def _add_upper_gram(total: Tensor, x: Tensor, factor: float) -> Tensor:
    m, n = x.shape
    if x.mT.is_contiguous():  # stored by columns, as LAPACK has it
        _call("blas", "dsyrk", b"L", b"T", n, m, factor, x, m, 1.0, total, n)
    else:
        _call("blas", "dsyrk", b"L", b"N", n, m, factor, x.contiguous(), n, 1.0, total, n)
    return total


def _leading_eigh(gram: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k leading eigenpairs of the matrix whose upper triangle `gram` holds, or None where LAPACK gives up.

    Overwrites `gram`. LAPACK stores columns, torch rows: its lower triangle is the upper one here, and eigenvectors
    are the rows of the (k, n) tensor below.
    """
    n = gram.shape[0]
    diagonal, off_diagonal, reflectors, values, spent = gram.new_zeros(5, n).unbind(0)
    vectors, work = gram.new_empty(k, n), gram.new_empty(room := _BLOCK * n)
    integers, failed = torch.empty(n, dtype=torch.int32), torch.empty(k, dtype=torch.int32)
    # One block: T is not split where an off-diagonal entry is 0, which inverse iteration does not mind.
    block, end = torch.ones(n, dtype=torch.int32), torch.full((n,), n, dtype=torch.int32)
    _lapack("dsytrd", b"L", n, gram, n, diagonal, off_diagonal, reflectors, work, room)
    if _lapack("dsterf", n, values.copy_(diagonal), spent.copy_(off_diagonal)):
        return None
    leading, start = values[n - k :], (block, end, vectors, n, work, integers, failed)
    if _lapack("dstein", n, diagonal, off_diagonal, k, leading, *start):
        return None
    _lapack("dormtr", b"L", b"L", b"N", n, k, gram, n, reflectors, vectors, n, work, room)
    return leading.flip(0), vectors.flip(0).mT


def _lapack(name: str, *arguments: Any) -> int:
    """Call a LAPACK routine and return its last argument, `info`: 0 unless it failed."""
    info = ctypes.c_int(0)
    _call("lapack", name, *arguments, info)
    return info.value


def _call(library: str, name: str, *arguments: Any) -> None:
    """Fortran's way: everything goes by address. Tensors are arrays; their memory must be contiguous."""
    _follow_torch_threads()
    _routine(library, name)(*(_address(argument) for argument in arguments))


def _address(argument: Any) -> Any:
    match argument:
        case Tensor():
            return argument.data_ptr()
        case bytes():
            return ctypes.byref(ctypes.c_char(argument))
        case int():
            return ctypes.byref(ctypes.c_int(argument))
        case float():
            return ctypes.byref(ctypes.c_double(argument))
        case _:
            return ctypes.byref(argument)


@cache
def _routine(library: str, name: str) -> Callable[..., None]:
    capsule = extension(f"scipy.linalg.cython_{library}").__pyx_capi__[name]
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype, python.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = python.PyCapsule_GetName(capsule)
    assert b" int *" in signature, f"scipy's {name} takes other integers than expected: {signature.decode()}"
    types = [ctypes.c_void_p] * (signature.count(b",") + 1)
    return ctypes.CFUNCTYPE(None, *types)(python.PyCapsule_GetPointer(capsule, signature))


def _follow_torch_threads() -> None:
    """Let scipy's BLAS use as many threads as torch may.

    By itself it takes one a core, and idle ones spin: two workers on two cores then run 20 to 100 times slower.
    """
    threads = torch.get_num_threads()
    get, put = _thread_setting()
    if get() != threads:
        put(threads)


@cache
def _thread_setting() -> tuple[Callable[[], int], Callable[[int], Any]]:
    # Looking a symbol up in the extension module also searches the BLAS that it was linked with.
    library = ctypes.CDLL(extension("scipy.linalg.cython_blas").__file__)
    for prefix in ("scipy_openblas", "openblas"):
        if hasattr(library, f"{prefix}_set_num_threads"):
            return getattr(library, f"{prefix}_get_num_threads"), getattr(library, f"{prefix}_set_num_threads")
    return torch.get_num_threads, lambda _: None  # another BLAS, whose threads are its user's affair

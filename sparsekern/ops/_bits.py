"""Distances between rows of bits: ``bit_distances``, all of them, and ``bit_neighbors``, the nearest rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.ops._checks import check_same_device

METRICS = ("hamming", "jaccard")

MOST_BYTES = 2**26
"""Of a row: sums of the bits of two rows are int32 in the kernels."""


class BitNeighbors(NamedTuple):
    """The nearest rows of every row, the nearest first.

    Attributes
    ----------
    distances : Tensor [N, k], int32 or float32
        Rising.
    indices : Tensor [N, k], int32
        Where these rows are; of rows at one distance the one with the lower index comes first.
    """

    distances: Tensor
    indices: Tensor


def bit_distances(a: Tensor, b: Tensor | None = None, metric: str = "hamming") -> Tensor:
    """Distances of all rows of `a` from all rows of `b`, rows of bits as of :func:`~sparsekern.bits.pack_bits`.

    Meant for few rows: the result has an entry for each pair. :func:`bit_neighbors` keeps the nearest alone.

    Parameters
    ----------
    a : Tensor [N, bytes], uint8
        Rows of bits, eight in a byte.
    b : Tensor [M, bytes], uint8, or None
        None for the rows of `a`.
    metric : {"hamming", "jaccard"}
        The bits in which two rows differ, ``|a ⊕ b|``, or their share of the bits that are set in either,
        ``|a ⊕ b| / |a ∨ b| = 1 − |a ∧ b| / |a ∨ b|``, which is 0 where neither row has any.

    Returns
    -------
    Tensor [N, M]
        int32 for Hamming; for Jaccard float32, the quotient correctly rounded.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device or metric.

    Examples
    --------
    >>> import torch
    >>> from sparsekern.bits import pack_bits
    >>> codes = pack_bits(torch.tensor([[True, True, False], [True, False, True]]))
    >>> bit_distances(codes)
    tensor([[0, 2],
            [2, 0]], dtype=torch.int32)
    """
    b = a if b is None else b
    _check(a, b, metric)
    return _bit_distances(a, b, metric)


def bit_neighbors(a: Tensor, b: Tensor | None = None, k: int = 1, metric: str = "hamming") -> BitNeighbors:
    """The `k` rows of `b` nearest to each row of `a`, exactly; no ``N × M`` tensor exists.

    Parameters
    ----------
    a : Tensor [N, bytes], uint8
        Rows of bits, as of :func:`~sparsekern.bits.pack_bits`.
    b : Tensor [M, bytes], uint8, or None
        None for the rows of `a`; then no row is its own neighbour.
    k : int
        At most M, or N − 1 where `b` is None.
    metric : {"hamming", "jaccard"}
        As in :func:`bit_distances`.

    Returns
    -------
    BitNeighbors
        ``distances [N, k]`` and ``indices [N, k]`` int32, by rising distance, ties to the lower index.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device, metric or k.
    """
    others = a if b is None else b
    _check(a, others, metric)
    if others.shape[0] >= 2**31:
        raise ValueError(f"{'a' if b is None else 'b'} must have fewer than 2**31 rows, got {others.shape[0]}")
    most = others.shape[0] - (b is None)
    if not 1 <= k <= most:
        what = "rows of a but a row itself" if b is None else "rows of b"
        raise ValueError(f"k must be between 1 and {most} (the {what}), got {k}")
    return BitNeighbors(*_bit_neighbors(a, others, k, metric, b is not None))


def _check(a: Tensor, b: Tensor, metric: str) -> None:
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != torch.uint8 or tensor.dim() != 2:
            raise ValueError(
                f"{name} must be a 2-D uint8 tensor of packed bits (sparsekern.bits.pack_bits), "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b must have {a.shape[1]} bytes a row, as a has, got shape {tuple(b.shape)}")
    if a.shape[1] > MOST_BYTES:
        raise ValueError(f"a must have at most {MOST_BYTES} bytes a row, got shape {tuple(a.shape)}")
    check_same_device(a=a, b=b)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")


@torch.library.custom_op("sparsekern::bit_distances", mutates_args=())
def _bit_distances(a: Tensor, b: Tensor, metric: str) -> Tensor:
    backend = choose("bit_distances", a)
    with torch.autocast(a.device.type, enabled=False):
        return backend.bit_distances(a, b, metric)


@torch.library.custom_op("sparsekern::bit_neighbors", mutates_args=())
def _bit_neighbors(a: Tensor, b: Tensor, k: int, metric: str, itself: bool) -> tuple[Tensor, Tensor]:
    backend = choose("bit_neighbors", a)
    with torch.autocast(a.device.type, enabled=False):
        return backend.bit_neighbors(a, b, k, metric, itself)


def _distance_dtype(metric: str) -> torch.dtype:
    return torch.int32 if metric == "hamming" else torch.float32


@_bit_distances.register_fake
def _(a: Tensor, b: Tensor, metric: str) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=_distance_dtype(metric))


@_bit_neighbors.register_fake
def _(a: Tensor, b: Tensor, k: int, metric: str, itself: bool) -> tuple[Tensor, Tensor]:
    shape = a.shape[0], k
    return a.new_empty(shape, dtype=_distance_dtype(metric)), a.new_empty(shape, dtype=torch.int32)

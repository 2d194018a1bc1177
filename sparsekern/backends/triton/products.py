"""The sparse products: decoding, its two adjoints, and sums over the entries of a latent.

Entries are the slots of fixed-width codes (``k`` a token) or the entries of CSR codes. ``token`` is the row an entry
belongs to: ``entry // k``, or ``row_of[entry]`` for CSR.

Sums over latents go through :class:`ByLatent`, entries sorted by latent: no atomics on floating-point numbers, so the
order of every sum is fixed. Latents with more than :data:`SPLIT` entries are summed in pieces of that length by
programs of their own, and the pieces then in order: a latent that fires on every token leaves no serial tail.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.backends.triton._launch import launch
from sparsekern.codes import entry_rows

SPLIT = 128
"""Entries of a latent that one program sums."""

ENTRIES = 8  # rows that a program has in flight

MOST_ENTRIES = 2**31 - SPLIT
"""Entries that :class:`ByLatent` can sort: programs count 32 bits wide, up to SPLIT beyond the last entry."""


def _block(d: int, most: int) -> int:
    """Columns of a tile over rows of `d` numbers."""
    return min(most, max(16, triton.next_power_of_2(d)))


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with unit stride along its last axis; rows may be any distance apart."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


# Decoding


@triton.jit(do_not_specialize=["k"])
def _decode(
    values, indices, crow, weight, weight_stride, bias, out, k, d,
    CSR: tl.constexpr, HAS_BIAS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    if CSR:
        start = tl.load(crow + row)
        end = tl.load(crow + row + 1)
    else:
        start = row * k
        end = start + k
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    for first in range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        value = tl.load(values + entry, mask=entry < end, other=0.0).to(tl.float32)
        index = tl.load(indices + entry, mask=entry < end, other=0).to(tl.int64)
        # A zero-valued slot has nothing to add, so its row is not read.
        wanted = (value != 0)[:, None] & inside[None, :]
        rows = tl.load(weight + index[:, None] * weight_stride + column[None, :], mask=wanted, other=0.0)
        total += tl.sum(value[:, None] * rows.to(tl.float32), axis=0)
    tl.store(out + row * d + column, total.to(out.dtype.element_ty), mask=inside)


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`sparsekern.backends.reference.sparse_decode`."""
    rows, k = values.shape
    return _launch_decode(values.contiguous(), indices.contiguous(), None, weight, bias, rows, k)


def csr_decode(values: Tensor, crow: Tensor, col: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`sparsekern.backends.reference.csr_decode`."""
    rows = crow.shape[0] - 1
    return _launch_decode(values.contiguous(), col.contiguous(), crow.contiguous(), weight, bias, rows, 0)


def _launch_decode(
    values: Tensor, indices: Tensor, crow: Tensor | None, weight: Tensor, bias: Tensor | None, rows: int, k: int
) -> Tensor:
    weight, d = _rows(weight), weight.shape[1]
    out = values.new_empty(rows, d)
    block = _block(d, 512)
    launch(
        _decode,
        (rows, triton.cdiv(d, block)),
        values,
        indices,
        crow,
        weight,
        weight.stride(0),
        None if bias is None else bias.contiguous(),
        out,
        k,
        d,
        CSR=crow is not None,
        HAS_BIAS=bias is not None,
        ENTRIES=ENTRIES,
        BLOCK=block,
    )
    return out


# Dot products of a token's vector with the rows of its latents


@triton.jit(do_not_specialize=["k", "n_entries"])
def _gather_dot(
    vectors, vector_stride, indices, row_of, weight, weight_stride, out, k, n_entries, d,
    CSR: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if CSR:
        entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
        inside = entry < n_entries
        token = tl.load(row_of + entry, mask=inside, other=0).to(tl.int64)
    else:
        slot = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
        row = tl.program_id(0).to(tl.int64)
        entry = row * k + slot
        inside = slot < k
        token = row + tl.zeros([ENTRIES], tl.int64)
    index = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
    # Products are summed elementwise first and across the tile once, in the same order for every entry.
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        wanted = inside[:, None] & (column < d)[None, :]
        a = tl.load(weight + index[:, None] * weight_stride + column[None, :], mask=wanted, other=0.0)
        b = tl.load(vectors + token[:, None] * vector_stride + column[None, :], mask=wanted, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out + entry, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=inside)


def gather_dot(grad: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """See :func:`sparsekern.backends.reference.gather_dot`."""
    rows, k = indices.shape
    out = grad.new_empty(rows, k)
    _launch_gather_dot(grad, indices.contiguous(), None, weight, out, k, (rows, triton.cdiv(k, ENTRIES)))
    return out


def csr_gather_dot(grad: Tensor, crow: Tensor, col: Tensor, weight: Tensor) -> Tensor:
    """See :func:`sparsekern.backends.reference.csr_gather_dot`."""
    out = grad.new_empty(col.shape[0])
    grid = (triton.cdiv(col.shape[0], ENTRIES),)
    _launch_gather_dot(grad, col.contiguous(), entry_rows(crow, col).int(), weight, out, 1, grid)
    return out


def _launch_gather_dot(
    grad: Tensor, indices: Tensor, row_of: Tensor | None, weight: Tensor, out: Tensor, k: int, grid: tuple[int, ...]
) -> None:
    grad, weight, d = _rows(grad), _rows(weight), weight.shape[1]
    launch(
        _gather_dot,
        grid,
        grad,
        grad.stride(0),
        indices,
        row_of,
        weight,
        weight.stride(0),
        out,
        k,
        out.numel(),
        d,
        CSR=row_of is not None,
        ENTRIES=ENTRIES,
        BLOCK=_block(d, 256),
    )


# Entries sorted by latent


@triton.jit(do_not_specialize=["n_entries"])
def _count(indices, counts, n_entries, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < n_entries
    latent = tl.load(indices + entry, mask=inside, other=0)
    tl.atomic_add(counts + latent, 1, mask=inside)


@triton.jit(do_not_specialize=["n_entries"])
def _place(indices, cursor, placed, n_entries, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < n_entries
    latent = tl.load(indices + entry, mask=inside, other=0)
    position = tl.atomic_add(cursor + latent, 1, mask=inside)
    tl.store(placed + position, entry, mask=inside)


@triton.jit(do_not_specialize=["n_entries"])
def _order(indices, start, placed, order, n_entries, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """Each entry's rank within its latent, by counting: the atomics of `_place` leave the order to chance."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < n_entries
    entry = tl.load(placed + position, mask=inside, other=0)
    latent = tl.load(indices + entry, mask=inside, other=0)
    first = tl.load(start + latent, mask=inside, other=0)
    length = tl.load(start + latent + 1, mask=inside, other=0) - first
    rank = tl.zeros([BLOCK], tl.int32)
    for step in range(0, tl.max(length, axis=0), OTHERS):
        other = step + tl.arange(0, OTHERS)
        wanted = other[None, :] < length[:, None]
        found = tl.load(placed + first[:, None] + other[None, :], mask=wanted, other=2147483647)
        rank += tl.sum((found < entry[:, None]).to(tl.int32), axis=1)
    tl.store(order + first + rank, entry, mask=inside)


class ByLatent:
    """Entries sorted by latent, and by entry within a latent: histogram, scan, scatter, ranks.

    Attributes
    ----------
    start : Tensor [d_sae + 1] int32
        Where each latent's entries begin in `order`.
    order : Tensor [n_entries] int32
        The entries.
    row_of : Tensor [n_entries] int32 or None
        Token of every entry; None where it is ``entry // k``.
    piece_start : Tensor [d_sae] int32
        Number of each latent's first piece, where it has more than :data:`SPLIT` entries.
    piece_latent : Tensor [n_pieces] int32
        The latent of every piece, ``d_sae`` for pieces that are not used. Their number is an upper bound,
        so that nobody has to wait for the device.
    """

    def __init__(self, indices: Tensor, d_sae: int, k: int, row_of: Tensor | None = None) -> None:
        n, device = indices.numel(), indices.device
        if n > MOST_ENTRIES:
            raise ValueError(
                f"codes must have at most {MOST_ENTRIES} entries for a gradient of the weights, got {n}; "
                "split the batch into smaller ones and add their gradients"
            )
        indices = indices.contiguous()
        self.d_sae, self.k, self.row_of = d_sae, k, row_of
        self.start = torch.zeros(d_sae + 1, dtype=torch.int32, device=device)
        grid = (triton.cdiv(n, 512),)
        launch(_count, grid, indices, self.start[1:], n, BLOCK=512)
        self.start = self.start.cumsum(0, dtype=torch.int32)
        placed = torch.empty(n, dtype=torch.int32, device=device)
        self.order = torch.empty(n, dtype=torch.int32, device=device)
        launch(_place, grid, indices, self.start[:-1].clone(), placed, n, BLOCK=512)
        grid = (triton.cdiv(n, 64),)
        launch(_order, grid, indices, self.start, placed, self.order, n, BLOCK=64, OTHERS=32)
        counts = self.start.diff()
        pieces = torch.where(counts > SPLIT, (counts + SPLIT - 1) // SPLIT, 0)
        ends = pieces.cumsum(0, dtype=torch.int32)
        self.piece_start = ends - pieces
        numbers = torch.arange(2 * n // SPLIT, dtype=torch.int32, device=device)
        self.piece_latent = torch.searchsorted(ends, numbers, right=True, out_int32=True)

    def pieces(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Sums of the pieces of long latents, ``[n_pieces, d]`` float32; those of unused pieces are not written."""
        d = vectors.shape[1]
        out = torch.empty(self.piece_latent.shape[0], d, dtype=torch.float32, device=vectors.device)
        block = _block(d, 512)
        grid = (out.shape[0], triton.cdiv(d, block))
        pointers = (values, vectors, vectors.stride(0), self.start, self.order, self.row_of, self.piece_start)
        constants = {"CSR": self.row_of is not None, "SPLIT": SPLIT, "ENTRIES": ENTRIES, "BLOCK": block}
        launch(_sum_pieces, grid, *pointers, self.piece_latent, out, self.k, d, self.d_sae, **constants)
        return out


@triton.jit
def sum_entries(
    values, vectors, vector_stride, order, row_of, first, end, k, column, inside,
    CSR: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``Σ values[e] · vectors[token(e)]`` over ``order[first:end]``, ``[BLOCK]``."""
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(first, end, ENTRIES):
        position = step + tl.arange(0, ENTRIES)
        entry = tl.load(order + position, mask=position < end, other=0)
        value = tl.load(values + entry, mask=position < end, other=0.0).to(tl.float32)
        token = tl.load(row_of + entry, mask=position < end, other=0) if CSR else entry // k
        wanted = (value != 0)[:, None] & inside[None, :]
        rows = tl.load(vectors + token.to(tl.int64)[:, None] * vector_stride + column[None, :], mask=wanted, other=0.0)
        total += tl.sum(value[:, None] * rows.to(tl.float32), axis=0)
    return total


@triton.jit
def sum_latent(
    values, vectors, vector_stride, start, order, row_of, piece_start, pieces, latent, k, d, column, inside,
    CSR: tl.constexpr, SPLIT: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same over all entries of `latent`; those of a long one come as the sums of its pieces."""
    first = tl.load(start + latent)
    end = tl.load(start + latent + 1)
    if end - first <= SPLIT:
        total = sum_entries(
            values, vectors, vector_stride, order, row_of, first, end, k, column, inside, CSR, ENTRIES, BLOCK
        )  # fmt: skip
    else:
        total = tl.zeros([BLOCK], tl.float32)
        piece = tl.load(piece_start + latent).to(tl.int64)
        for step in range(0, tl.cdiv(end - first, SPLIT), ENTRIES):
            number = step + tl.arange(0, ENTRIES)
            wanted = (number < tl.cdiv(end - first, SPLIT))[:, None] & inside[None, :]
            rows = tl.load(pieces + (piece + number)[:, None] * d + column[None, :], mask=wanted, other=0.0)
            total += tl.sum(rows, axis=0)
    return total


@triton.jit(do_not_specialize=["k", "d_sae"])
def _sum_pieces(
    values, vectors, vector_stride, start, order, row_of, piece_start, piece_latent, out, k, d, d_sae,
    CSR: tl.constexpr, SPLIT: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    latent = tl.load(piece_latent + piece)
    if latent < d_sae:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < d
        first = tl.load(start + latent) + (piece - tl.load(piece_start + latent)) * SPLIT
        end = tl.minimum(first + SPLIT, tl.load(start + latent + 1))
        total = sum_entries(
            values, vectors, vector_stride, order, row_of, first, end, k, column, inside, CSR, ENTRIES, BLOCK
        )  # fmt: skip
        tl.store(out + piece.to(tl.int64) * d + column, total, mask=inside)


@triton.jit(do_not_specialize=["k"])
def _scatter_outer(
    values, vectors, vector_stride, start, order, row_of, piece_start, pieces, out, k, d,
    CSR: tl.constexpr, SPLIT: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = sum_latent(
        values, vectors, vector_stride, start, order, row_of, piece_start, pieces, latent, k, d, column, inside,
        CSR, SPLIT, ENTRIES, BLOCK,
    )  # fmt: skip
    tl.store(out + latent * d + column, total.to(out.dtype.element_ty), mask=inside)


def scatter_outer(values: Tensor, indices: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    """See :func:`sparsekern.backends.reference.scatter_outer`."""
    return _launch_scatter_outer(values, ByLatent(indices, d_sae, values.shape[1]), grad, d_sae)


def csr_scatter_outer(values: Tensor, crow: Tensor, col: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    """See :func:`sparsekern.backends.reference.csr_scatter_outer`."""
    return _launch_scatter_outer(values, ByLatent(col, d_sae, 1, entry_rows(crow, col).int()), grad, d_sae)


def _launch_scatter_outer(values: Tensor, sorted_entries: ByLatent, grad: Tensor, d_sae: int) -> Tensor:
    values, grad, d = values.contiguous(), _rows(grad), grad.shape[1]
    out = grad.new_empty(d_sae, d)
    block = _block(d, 512)
    by = sorted_entries
    launch(
        _scatter_outer,
        (d_sae, triton.cdiv(d, block)),
        values,
        grad,
        grad.stride(0),
        by.start,
        by.order,
        by.row_of,
        by.piece_start,
        by.pieces(values, grad),
        out,
        by.k,
        d,
        CSR=by.row_of is not None,
        SPLIT=SPLIT,
        ENTRIES=ENTRIES,
        BLOCK=block,
    )
    return out


# A few weights of many rows


@triton.jit(do_not_specialize=["n"])
def _weighted_row_sum(
    coefficients, weight, weight_stride, out, n, d, share, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(part * share, tl.minimum((part + 1) * share, n), ENTRIES):
        row = first + tl.arange(0, ENTRIES)
        value = tl.load(coefficients + row, mask=row < n, other=0.0).to(tl.float32)
        wanted = (value != 0)[:, None] & inside[None, :]
        rows = tl.load(weight + row.to(tl.int64)[:, None] * weight_stride + column[None, :], mask=wanted, other=0.0)
        total += tl.sum(value[:, None] * rows.to(tl.float32), axis=0)
    tl.store(out + part.to(tl.int64) * d + column, total, mask=inside)


def weighted_row_sum(coefficients: Tensor, weight: Tensor) -> Tensor:
    """See :func:`sparsekern.backends.reference.weighted_row_sum`."""
    weight, (n, d) = _rows(weight), weight.shape
    share = triton.cdiv(triton.cdiv(n, 512), ENTRIES) * ENTRIES  # a multiple, so that shares do not overlap
    parts = triton.cdiv(n, share)
    out = torch.empty(parts, d, dtype=torch.float32, device=weight.device)
    block = _block(d, 512)
    arguments: tuple[Any, ...] = (coefficients.contiguous(), weight, weight.stride(0), out, n, d, share)
    launch(_weighted_row_sum, (parts, triton.cdiv(d, block)), *arguments, ENTRIES=ENTRIES, BLOCK=block)
    return out.sum(0).to(weight.dtype)

"""Adam on weights of one row a latent, with gradients that stay factored (:mod:`sparsekern.factors`).

One program has one latent: it sums its gradient row from the entries of that latent, projects, clips, updates both
moments and the weight, restores the unit norm and rounds the row for the screen, with the row in registers throughout.
The gradient is never in memory; of the parameters each byte is read once and written once.

Whether clipping bites is decided on the device. An upper bound on the norm by the triangle inequality costs next to
nothing; where it is above the clipping norm, :func:`clip_factor` sums the norm in a pass of its own over the factors,
and otherwise the programs of that pass return at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.backends.screening import LIMITS, Quantized
from sparsekern.backends.triton._launch import launch
from sparsekern.backends.triton.encode import scale_of
from sparsekern.backends.triton.products import (
    ENTRIES,
    SPLIT,
    ByLatent,
    _rows,
    csr_scatter_outer,
    scatter_outer,
    sum_latent,
)
from sparsekern.codes import entry_rows
from sparsekern.factors import OuterProducts, identity


class _Part(NamedTuple):
    """Outer products as the kernels take them."""

    values: Tensor
    vectors: Tensor
    by: ByLatent
    pieces: Tensor


class SortedFactors:
    """Outer products sorted by latent, as the kernels take them: two sums of them, and more as a dense gradient."""

    def __init__(self, parts: Sequence[OuterProducts], d_sae: int) -> None:
        self._outer_products, self._d_sae = parts, d_sae
        self.parts: list[_Part] = []
        sorted_before: dict[tuple[object, ...], ByLatent] = {}
        for part in parts:
            key = identity(part.indices), part.indices.shape, None if part.crow is None else identity(part.crow)
            if key not in sorted_before:
                sorted_before[key] = _by_latent(part, d_sae)
            by, values, vectors = sorted_before[key], part.values.contiguous(), _rows(part.vectors)
            self.parts.append(_Part(values, vectors, by, by.pieces(values, vectors)))
        if len(self.parts) > 2:
            self.parts = [_as_compact(parts, d_sae)]

    def square_bound(self) -> Tensor:
        """An upper bound on the sum of squares of the gradient, by the triangle inequality: next to no work."""
        total = torch.zeros((), dtype=torch.float32, device=self._outer_products[0].values.device)
        lengths = total.new_zeros(self._d_sae)
        for values, indices, vectors, crow in self._outer_products:
            norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32)
            norms = norms.unsqueeze(1) if crow is None else norms[entry_rows(crow, indices)]
            # Atomics: the order of these sums is left to chance, which the last factor is far more than enough for.
            lengths.index_add_(0, indices.flatten(), (values.abs() * norms).flatten().float())
        return 1.001 * lengths.square().sum(dtype=torch.float64)


def _by_latent(part: OuterProducts, d_sae: int) -> ByLatent:
    """The entries of a part by latent; those in CSR form have their row beside them."""
    if part.crow is None:
        return ByLatent(part.indices, d_sae, part.values.shape[1])
    return ByLatent(part.indices, d_sae, 1, entry_rows(part.crow, part.indices).int())


def _as_compact(parts: Sequence[OuterProducts], d_sae: int) -> _Part:
    """Any number of parts as one, with a row for every latent."""
    dense = torch.stack([_as_dense(part, d_sae) for part in parts]).sum(0)
    by = ByLatent(torch.arange(d_sae, dtype=torch.int32, device=dense.device), d_sae, 1)
    ones = dense.new_ones(d_sae, 1)
    return _Part(ones, dense, by, by.pieces(ones, dense))


def _as_dense(part: OuterProducts, d_sae: int) -> Tensor:
    values, indices, vectors, crow = part
    if crow is None:
        return scatter_outer(values, indices, vectors, d_sae)
    return csr_scatter_outer(values, crow, indices, vectors, d_sae)


@triton.jit(do_not_specialize=["k", "other_k"])
def _row_adam(
    weight, first_moment, second_moment, squares, hyper, needed,
    values, vectors, vector_stride, start, order, row_of, piece_start, pieces, k,
    other_values, other_vectors, other_stride, other_start, other_order, other_row_of, other_piece_start, other_pieces,
    other_k,
    copy, copy_scale, copy_norm, copy_error, d, first_rate, second_rate, eps,
    CSR: tl.constexpr, TWO: tl.constexpr, OTHER_CSR: tl.constexpr, UNIT_ROWS: tl.constexpr, UPDATE: tl.constexpr,
    COPY: tl.constexpr, LIMIT: tl.constexpr, SPLIT: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    if tl.load(needed) != 0:
        column = tl.arange(0, BLOCK)
        inside = column < d
        place = latent * d + column
        gradient = sum_latent(
            values, vectors, vector_stride, start, order, row_of, piece_start, pieces, latent, k, d, column, inside,
            CSR, SPLIT, ENTRIES, BLOCK,
        )  # fmt: skip
        if TWO:
            gradient += sum_latent(
                other_values, other_vectors, other_stride, other_start, other_order, other_row_of, other_piece_start,
                other_pieces, latent, other_k, d, column, inside, OTHER_CSR, SPLIT, ENTRIES, BLOCK,
            )  # fmt: skip
        row = tl.load(weight + place, mask=inside, other=0.0)
        if UNIT_ROWS:
            gradient -= tl.sum(gradient * row, axis=0) * row
        tl.store(squares + latent, tl.sum(gradient * gradient, axis=0))
        if UPDATE:
            gradient *= tl.load(hyper + 2)
            m = tl.load(first_moment + place, mask=inside, other=0.0)
            v = tl.load(second_moment + place, mask=inside, other=0.0)
            m += first_rate * (gradient - m)
            v += second_rate * (gradient * gradient - v)
            tl.store(first_moment + place, m, mask=inside)
            tl.store(second_moment + place, v, mask=inside)
            row -= tl.load(hyper) * m / (tl.sqrt(v) / tl.load(hyper + 1) + eps)
            if UNIT_ROWS:
                row /= tl.maximum(tl.sqrt(tl.sum(row * row, axis=0)), 1.1754943508222875e-38)
            tl.store(weight + place, row, mask=inside)
            if COPY:
                factor = 1.0
                if LIMIT > 0:
                    factor = scale_of(tl.max(tl.abs(row), axis=0), LIMIT)
                    tl.store(copy_scale + latent, factor)
                rounded = (row / factor).to(copy.dtype.element_ty)
                tl.store(copy + place, rounded, mask=inside)
                off = row - rounded.to(tl.float32) * factor
                tl.store(copy_norm + latent, tl.sqrt(tl.sum(row * row, axis=0)))
                tl.store(copy_error + latent, tl.sqrt(tl.sum(off * off, axis=0)))


def _launch(
    factors: SortedFactors,
    weight: Tensor,
    unit_rows: bool,
    moments: tuple[Tensor, Tensor] | None,
    squares: Tensor,
    hyper: Tensor | None,
    needed: Tensor,
    copy: Quantized | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    one = factors.parts[0]
    two = factors.parts[1] if len(factors.parts) > 1 else None
    d = weight.shape[1]
    launch(
        _row_adam,
        (weight.shape[0],),
        weight,
        *(moments or (None, None)),
        squares,
        hyper,
        needed,
        *_pointers(one),
        *(_pointers(two) if two else (None, None, 0, None, None, None, None, None, 0)),
        *((None,) * 4 if copy is None else (copy.cast.rows, copy.cast.scale, copy.cast.norm, copy.cast.error)),
        d,
        *(1 - beta for beta in betas),  # here: in float32 1 - 0.999 would be off by 1e-5 of itself
        eps,
        CSR=one.by.row_of is not None,
        TWO=two is not None,
        OTHER_CSR=two is not None and two.by.row_of is not None,
        UNIT_ROWS=unit_rows,
        UPDATE=hyper is not None,
        COPY=copy is not None,
        LIMIT=0.0 if copy is None else LIMITS.get(copy.cast.rows.dtype, 0.0),
        SPLIT=SPLIT,
        ENTRIES=4 if d > 2048 else ENTRIES,
        BLOCK=max(16, triton.next_power_of_2(d)),
        num_warps=4 if d <= 1024 else 8 if d <= 4096 else 16,
    )


def _pointers(part: _Part) -> tuple[Tensor | int | None, ...]:
    by, strided = part.by, (part.values, part.vectors, part.vectors.stride(0))
    return *strided, by.start, by.order, by.row_of, by.piece_start, part.pieces, by.k


def clip_factor(factors: Sequence[tuple[SortedFactors, Tensor, bool]], rest: Tensor, clip_norm: float) -> Tensor:
    """See :func:`sparsekern.backends.cpu.clip_factor`; the factor ``[]`` stays on the device."""
    bound = rest + torch.stack([found.square_bound() for found, _, _ in factors]).sum()
    needed = bound > clip_norm**2
    total = rest
    for found, weight, unit_rows in factors:
        squares = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        _launch(found, weight, unit_rows, None, squares, None, needed, None, (0.0, 0.0), 0.0)
        total = total + squares.sum(dtype=torch.float64)
    factor = clip_norm / (total.sqrt() + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
    return torch.where(needed, factor.clamp(max=1.0), 1.0).float()


def row_adam(
    factors: SortedFactors,
    weight: Tensor,
    unit_rows: bool,
    state: dict[str, Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    clip: Tensor,
    copy: Quantized | None,
    finite: Tensor,
    rest_after: None = None,
) -> Tensor:
    """One step of Adam on `weight` in one pass over memory; `state` is that of ``torch.optim.Adam``.

    Where `finite` ``[]`` is false nothing changes. Rows do not rest here. Returns the sum of squares of the gradient
    before clipping.
    """
    squares = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    state["step"] += finite
    step = state["step"].double()
    scale, root = lr / (1 - betas[0] ** step), (1 - betas[1] ** step).sqrt()
    hyper = torch.stack([scale, root, clip.double()]).float()
    moments = state["exp_avg"], state["exp_avg_sq"]
    _launch(factors, weight, unit_rows, moments, squares, hyper, finite, copy, betas, eps)
    torch.autograd.graph.increment_version(weight)
    if copy is not None:
        copy.mark_current(weight)
    return squares.sum(dtype=torch.float64)

"""Adam on weights of one row a latent, with gradients that stay factored (:mod:`sparsekern.factors`).

One program has one latent: it sums its gradient row from the entries of that latent, projects, clips, updates both
moments and the weight, restores the unit norm and rounds the row for the screen, with the row in registers throughout.
The gradient is never in memory; of the parameters each byte is read once and written once. What is around the kernel is
in :mod:`sparsekern.backends.factored_adam`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.backends.factored_adam import FactoredGradient, Part, Step, clip_factor, row_adam
from sparsekern.backends.screening import LIMITS
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
from sparsekern.factors import OuterProducts

__all__ = ["SortedFactors", "clip_factor", "row_adam"]


class SortedFactors(FactoredGradient):
    """Outer products sorted by latent, as the kernels take them: two sums of them, and more as a dense gradient."""

    most_parts = 2

    def sort(self, indices: Tensor, k: int, row_of: Tensor | None) -> ByLatent:
        """See the base class."""
        return ByLatent(indices, self._d_sae, k, row_of)

    def part(self, values: Tensor, vectors: Tensor, by: ByLatent) -> Part:
        """See the base class."""
        values, vectors = values.contiguous(), _rows(vectors)
        return Part(values, vectors, by, by.pieces(values, vectors))

    def dense(self) -> Tensor:
        """See the base class."""
        return torch.stack([_as_dense(part, self._d_sae) for part in self._outer_products]).sum(0)

    def square_bound(self) -> Tensor:
        """See the base class."""
        total = torch.zeros((), dtype=torch.float32, device=self._outer_products[0].values.device)
        lengths = total.new_zeros(self._d_sae)
        for values, indices, vectors, crow in self._outer_products:
            norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32)
            norms = norms.unsqueeze(1) if crow is None else norms[entry_rows(crow, indices)]
            # Atomics: the order of these sums is left to chance, which the last factor is far more than enough for.
            lengths.index_add_(0, indices.flatten(), (values.abs() * norms).flatten().float())
        return 1.001 * lengths.square().sum(dtype=torch.float64)

    def run(self, weight: Tensor, unit_rows: bool, needed: Tensor, step: Step | None) -> Tensor:
        """See the base class."""
        squares = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        one = self.parts[0]
        two = self.parts[1] if len(self.parts) > 1 else None
        moments, hyper, rates, eps, copy = step or ((None, None), None, (0.0, 0.0), 0.0, None)
        d = weight.shape[1]
        launch(
            _row_adam,
            (weight.shape[0],),
            weight,
            *moments,
            squares,
            hyper,
            needed,
            *_pointers(one),
            *(_pointers(two) if two else (None, None, 0, None, None, None, None, None, 0)),
            *((None,) * 4 if copy is None else (copy.cast.rows, copy.cast.scale, copy.cast.norm, copy.cast.error)),
            d,
            *rates,
            eps,
            CSR=one.by.row_of is not None,
            TWO=two is not None,
            OTHER_CSR=two is not None and two.by.row_of is not None,
            UNIT_ROWS=unit_rows,
            UPDATE=step is not None,
            COPY=copy is not None,
            LIMIT=0.0 if copy is None else LIMITS.get(copy.cast.rows.dtype, 0.0),
            SPLIT=SPLIT,
            ENTRIES=4 if d > 2048 else ENTRIES,
            BLOCK=max(16, triton.next_power_of_2(d)),
            num_warps=4 if d <= 1024 else 8 if d <= 4096 else 16,
        )
        return squares.sum(dtype=torch.float64)


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


def _pointers(part: Part) -> tuple[Tensor | int | None, ...]:
    by, strided = part.by, (part.values, part.vectors, part.vectors.stride(0))
    return *strided, by.start, by.order, by.row_of, by.piece_start, part.pieces, by.k

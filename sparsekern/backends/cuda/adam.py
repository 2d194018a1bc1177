"""Adam on weights of one row a latent with gradients that stay factored: csrc/cuda/by_latent.cu and row_adam.cu.

A block has a latent. Where the vectors of the gradient do not fit into the second-level cache, blocks go through a
slice of the columns of all latents before the next; row_adam.cu counts the bytes that this saves and costs. What is
around the kernels is in :mod:`sparsekern.backends.factored_adam`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.backends.cuda import _library
from sparsekern.backends.factored_adam import FactoredGradient, Part, Step, clip_factor, row_adam
from sparsekern.backends.screening import LIMITS

__all__ = ["ByLatent", "SortedFactors", "clip_factor", "row_adam"]

SPLIT = 128
"""Entries of a latent that one block sums."""

MOST_ENTRIES = 2**31 - SPLIT
"""Entries that :class:`ByLatent` can sort: kernels count 32 bits wide, up to SPLIT beyond the last entry."""

SLICE = 128
"""Slices are a multiple of so many columns: 512 bytes of a vector."""

_ELEMENT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
"""In the order of ElementType in csrc/cuda/device.h."""

WORKSPACE_BYTES = 256 * 2**20
"""Bound on the rows of a gradient that exist at one time."""


class ByLatent:
    """Entries sorted by latent, and by entry within a latent.

    Attributes
    ----------
    start : Tensor [d_sae + 1] int32
        Where each latent's entries begin in `order`.
    order : Tensor [n_entries] int32
        The entries.
    row_of : Tensor [n_entries] int32 or None
        Row of every entry; None where it is ``entry // k``.
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
        library = _library.module_for(indices)
        self.d_sae, self.k, self.row_of = d_sae, k, row_of
        self.start, self.order, self.piece_start, self.piece_latent = (
            torch.empty(size, dtype=torch.int32, device=device)
            for size in (d_sae + 1, n, d_sae, library.most_pieces(n, SPLIT))
        )
        workspace = torch.empty(library.sort_workspace(n, d_sae), dtype=torch.uint8, device=device)
        out = [t.data_ptr() for t in (self.start, self.order, self.piece_start, self.piece_latent)]
        stream = _library.stream_of(indices)
        library.sort_by_latent(indices.data_ptr(), n, d_sae, SPLIT, out, workspace.data_ptr(), stream)


class SortedFactors(FactoredGradient):
    """Outer products sorted by latent, as the kernels take them: four sums of them, and more as a dense gradient."""

    most_parts = 4

    def sort(self, indices: Tensor, k: int, row_of: Tensor | None) -> ByLatent:
        """See the base class."""
        return ByLatent(indices, self._d_sae, k, row_of)

    def part(self, values: Tensor, vectors: Tensor, by: ByLatent) -> Part:
        """See the base class."""
        values, vectors = values.float().contiguous(), vectors.float()
        if vectors.stride(-1) != 1:
            vectors = vectors.contiguous()
        d, count = vectors.shape[1], by.piece_latent.shape[0]
        part = Part(values, vectors, by, vectors.new_empty(count, d))
        library, stream = _library.module_for(vectors), _library.stream_of(vectors)
        shape = by.d_sae, d, SPLIT, slice_width([part], 0)
        library.sum_pieces(_addresses(part), by.piece_latent.data_ptr(), count, *shape, part.pieces.data_ptr(), stream)
        return part

    def dense(self) -> Tensor:
        """See the base class."""
        some = [self.parts[first : first + self.most_parts] for first in range(0, len(self.parts), self.most_parts)]
        total = torch.zeros((), device=self.parts[0].vectors.device)
        for parts in some:
            vectors = parts[0].vectors
            rows = vectors.new_empty(self._d_sae, vectors.shape[1])
            library, stream = _library.module_for(vectors), _library.stream_of(vectors)
            library.gradient_rows(self._gradient(parts, slice_width(parts, 0)), rows.data_ptr(), stream)
            total = total + rows
        return total

    def square_bound(self) -> Tensor:
        """See the base class."""
        norms = [torch.linalg.vector_norm(part.vectors, dim=1) for part in self.parts]
        bounds = norms[0].new_empty(self._d_sae)
        library, stream = _library.module_for(bounds), _library.stream_of(bounds)
        library.bound_rows(self._gradient(self.parts), [norm.data_ptr() for norm in norms], bounds.data_ptr(), stream)
        return 1.001 * bounds.square().sum(dtype=torch.float64)

    def run(self, weight: Tensor, unit_rows: bool, needed: Tensor, step: Step | None) -> Tensor:
        """See the base class."""
        n, d = weight.shape
        lot = min(n, max(1, WORKSPACE_BYTES // (4 * d)))  # of latents, whose gradient is made before it is used
        if unit_rows:
            cost = 8 * n * d + (math.ceil(n / lot) - 1) * _bytes(self.parts)
        else:
            cost = 0 if step is None or step.copy is None else 4 * n * d
        width = slice_width(self.parts, cost)
        slices = 1 if unit_rows else math.ceil(d / width)
        squares = torch.zeros(slices, n, dtype=torch.float32, device=weight.device)
        room = torch.empty(lot if unit_rows and width < d else 0, d, dtype=torch.float32, device=weight.device)
        weight_of = weight.data_ptr(), unit_rows, needed.data_ptr(), squares.data_ptr()
        gradient, workspace = self._gradient(self.parts, width, weight_of), (room.data_ptr(), room.shape[0])
        library, stream = _library.module_for(weight), _library.stream_of(weight)
        if step is None:
            library.gradient_squares(gradient, workspace, stream)
        else:
            addresses = [tensor.data_ptr() for tensor in (weight, *step.moments, step.hyper)]
            library.row_adam(gradient, addresses, step.rates, step.eps, _copy(step), workspace, stream)
        return squares.sum(dtype=torch.float64)

    def _gradient(
        self, parts: Sequence[Part], width: int | None = None, weight: tuple[int, bool, int, int] = (0, False, 0, 0)
    ) -> tuple[object, ...]:
        """As the kernels take it: of `weight` the address, whether it has unit rows, and what else goes by rows."""
        d = parts[0].vectors.shape[1]
        return [_addresses(part) for part in parts], SPLIT, self._d_sae, d, width or d, *weight


def _addresses(part: Part) -> tuple[int, ...]:
    by = part.by
    return (
        part.values.data_ptr(),
        part.vectors.data_ptr(),
        part.vectors.stride(0),
        by.start.data_ptr(),
        by.order.data_ptr(),
        0 if by.row_of is None else by.row_of.data_ptr(),
        by.piece_start.data_ptr(),
        part.pieces.data_ptr(),
        by.k,
    )


def _copy(step: Step) -> tuple[int | float, ...] | None:
    """The copy to refresh as the kernels take it."""
    if step.copy is None:
        return None
    cast = step.copy.cast
    kind, limit = _ELEMENT_TYPES.index(cast.rows.dtype), LIMITS.get(cast.rows.dtype, 0.0)
    scale = 0 if cast.scale is None else cast.scale.data_ptr()
    return kind, cast.rows.data_ptr(), limit, scale, cast.norm.data_ptr(), cast.error.data_ptr()


def slice_width(parts: Sequence[Part], cost: int) -> int:
    """Columns that are gone through together, so that those of the vectors take a third of the second-level cache.

    All, unless the bytes of vectors that would then come from beyond the cache are more than the `cost` of slices. The
    cache is taken to serve as large a share of the reads as it can hold of the vectors.
    """
    d, vectors, cache = parts[0].vectors.shape[1], _bytes(parts), cache_bytes(parts[0].vectors.device)
    gathered = 4 * d * sum(part.values.numel() for part in parts)
    if vectors <= cache or gathered * (vectors - cache) <= vectors * (vectors + cost):
        return d
    return min(d, max(SLICE, d * cache // (3 * vectors) // SLICE * SLICE))


def _bytes(parts: Sequence[Part]) -> int:
    """Of all vectors, which slices read once."""
    return 4 * sum(part.vectors.numel() for part in parts)


def cache_bytes(device: torch.device) -> int:
    """Size of the second-level cache; in the emulator, that of an H100."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 * 2**20

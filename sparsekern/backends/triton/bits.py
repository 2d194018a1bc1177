"""Rows of bits and pairs of latents: whole numbers alone.

Distances come from the bits that two rows have in common, which are a product of int8 matrices: bits are unpacked in
registers, tile by tile, for the tensor cores. The nearest rows are found in panels of distances by the library's
selection over 64-bit keys, of the distance above and the index below.

Pairs are counted for some latents at a time, in an array with a row for each of these and a column for every latent:
each entry of one of these latents adds one for every later entry of its token. Whole numbers have one sum in any
order, so atomic additions keep the answer the same from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.backends import reference
from sparsekern.backends.triton._launch import launch
from sparsekern.codes import entry_rows

TILE = 64
"""Rows of a and of b whose distances one program finds."""

PANEL = (1024, 16384)
"""Rows of a and of b whose distances exist at one time while the nearest are found: 64 MiB, and twice that of keys."""

COUNT_BYTES = 256 * 2**20
"""Bound on the counts of pairs that exist at one time, where one latent's fit into it."""


@triton.jit(do_not_specialize=["n", "m", "across"])
def _bit_distances(
    a, b, out, n, m, words, across,
    JACCARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The distances of a tile of pairs; words are int32."""
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    bit = tl.arange(0, BITS)
    a_row = a + row.to(tl.int64)[:, None] * words + (bit // 32)[None, :]
    b_row = b + column.to(tl.int64)[None, :] * words + (bit // 32)[:, None]
    both = tl.zeros([ROWS, COLUMNS], tl.int32)
    ones_a, ones_b = tl.zeros([ROWS], tl.int32), tl.zeros([COLUMNS], tl.int32)
    for step in range(0, words, BITS // 32):
        inside = step + bit // 32 < words
        x = tl.load(a_row + step, mask=(row < n)[:, None] & inside[None, :], other=0) >> (bit % 32)[None, :] & 1
        y = tl.load(b_row + step, mask=(column < m)[None, :] & inside[:, None], other=0) >> (bit % 32)[:, None] & 1
        ones_a += tl.sum(x, axis=1)
        ones_b += tl.sum(y, axis=0)
        both = tl.dot(x.to(tl.int8), y.to(tl.int8), both)
    ones = ones_a[:, None] + ones_b[None, :]
    differ = ones - 2 * both
    place = row.to(tl.int64)[:, None] * m + column[None, :]
    kept = (row < n)[:, None] & (column < m)[None, :]
    if JACCARD:
        either = tl.maximum(ones - both, 1)
        tl.store(out + place, tl.div_rn(differ.to(tl.float32), either.to(tl.float32)), mask=kept)
    else:
        tl.store(out + place, differ, mask=kept)


def bit_distances(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """See :func:`sparsekern.backends.reference.bit_distances`."""
    n, m = a.shape[0], b.shape[0]
    out = a.new_empty(n, m, dtype=torch.int32 if metric == "hamming" else torch.float32)
    across = triton.cdiv(m, TILE)
    a, b = _whole_words(a), _whole_words(b)
    tile = {"ROWS": TILE, "COLUMNS": TILE, "BITS": 64}
    launch(
        _bit_distances,
        (triton.cdiv(n, TILE) * across,),
        *(a, b, out, n, m, a.shape[1], across),
        num_warps=8,
        JACCARD=metric == "jaccard",
        **tile,
    )
    return out


def _whole_words(rows: Tensor) -> Tensor:
    """Rows of bytes as rows of int32."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)).contiguous().view(torch.int32)


def bit_neighbors(a: Tensor, b: Tensor, k: int, metric: str, itself: bool) -> tuple[Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.bit_neighbors`."""
    return reference.nearest(a, b, k, metric, itself, bit_distances, *PANEL)


@triton.jit(do_not_specialize=["count", "first", "longest"])
def _count_pairs(entry, stop, col, counts, count, first, longest, d_sae, ENTRIES: tl.constexpr):
    """Add the pairs that some entries have with those after them, up to where their tokens end."""
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    here = place < count
    mine = tl.load(entry + place, mask=here, other=0)
    end = tl.load(stop + place, mask=here, other=0)
    latent = tl.load(col + mine, mask=here, other=0) - first
    out = counts + latent.to(tl.int64) * d_sae
    for step in range(1, longest):
        other = mine + step
        live = here & (other < end)
        met = tl.load(col + other, mask=live, other=0)
        tl.atomic_add(out + met, 1, mask=live)


def count_pairs(entry: Tensor, stop: Tensor, col: Tensor, counts: Tensor, first: int, longest: int) -> None:
    """Add to `counts` ``[latents, d_sae]`` the pairs of the given entries, of the latents from `first` on."""
    size, n = entry.shape[0], counts.shape[1]
    launch(
        _count_pairs,
        (triton.cdiv(size, 128),),
        *(entry, stop, col, counts, size, first, longest, n),
        ENTRIES=128,
    )


def cooccurrence(crow: Tensor, col: Tensor, d_sae: int, at_least: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.cooccurrence`."""
    col = col.contiguous()
    latents = max(1, min(d_sae, COUNT_BYTES // (4 * d_sae)))
    tiles = range(0, d_sae, latents)
    by_latent = col.sort(stable=True)
    stop = crow[1:][entry_rows(crow, col)][by_latent.indices]
    edges = torch.tensor([*tiles, d_sae], dtype=col.dtype, device=col.device)
    starts = torch.searchsorted(by_latent.values, edges).tolist()
    longest = int(crow.diff().max()) if crow.shape[0] > 1 else 0
    counts = torch.empty(latents, d_sae, dtype=torch.int32, device=col.device)
    found = []
    for tile, first in enumerate(tiles):
        part = slice(starts[tile], starts[tile + 1])
        counts.zero_()
        count_pairs(by_latent.indices[part], stop[part], col, counts, first, longest)
        i, j = (counts >= at_least).nonzero(as_tuple=True)
        found.append((i + first, j.int(), counts[i, j]))
    rows, others, numbers = (torch.cat(parts) for parts in zip(*found, strict=True))
    out = torch.zeros(d_sae + 1, dtype=torch.int64, device=col.device)
    torch.cumsum(torch.bincount(rows, minlength=d_sae), 0, out=out[1:])
    return out, others, numbers

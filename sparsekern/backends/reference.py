"""Plain PyTorch, any device: the specification of every op and the fallback where no kernel serves.

Nothing here holds a ``B × N``, a ``B × k × d`` or an ``nnz × d`` tensor. Largest temporaries: one block of
pre-activations of :data:`WORKSPACE_BYTES`, and one ``B × d`` tensor. The functions on CSR codes also keep a few numbers
an entry, and a few blocks of :data:`PRODUCT_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sparsekern.bits import unpack_bits
from sparsekern.codes import entry_rows

WORKSPACE_BYTES = 64 * 2**20
"""Bound on the pre-activations of an encoder that exist at one time, with what is kept of each."""

NARROWEST_PANEL = 4096
"""Latents in a panel, at least: rows are split into blocks before panels become narrower."""

PRODUCT_BYTES = 8 * 2**20
"""Bound on one block of products of a CSR function: near the cache, three times as fast as with 64 MiB."""


def unavailable(op: str, device: torch.device, dtype: torch.dtype, screen: str) -> str | None:
    """Why this backend cannot serve such a call; None when it can."""
    if screen not in ("auto", "none"):
        return f"has no {screen} screening; use screen='auto' or 'none'"
    return None


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that sums and comparisons are made in: half-precision input is only stored in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(
    x: Tensor, weight: Tensor, bias: Tensor | None, narrowest: int, extra_bytes: int = 0
) -> Iterator[tuple[slice, Iterator[tuple[int, Tensor]]]]:
    """Blocks of rows, each with its panels: the first latent, and ``x @ weight.T + bias`` over block and panel.

    The caller needs `extra_bytes` of workspace for each pre-activation, beside the pre-activation itself.
    """
    rows, n_latents, work = x.shape[0], weight.shape[0], _work_dtype(x.dtype)
    cells = WORKSPACE_BYTES // (work.itemsize + extra_bytes)
    # Narrow panels spend their time in merging, so rows are split first, and latents where that is not enough.
    row_block = max(1, min(rows, cells // min(n_latents, narrowest)))
    panel = min(n_latents, max(1, cells // row_block))

    def panels(block: Tensor) -> Iterator[tuple[int, Tensor]]:
        for left in range(0, n_latents, panel):
            part = slice(left, left + panel)
            pre = block @ weight[part].to(work).T
            if bias is not None:
                pre += bias[part].to(work)
            yield left, pre

    for top in range(0, rows, row_block):
        block = slice(top, min(top + row_block, rows))
        yield block, panels(x[block].to(work))


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, screen: str, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """Top k of ``x @ weight.T + bias`` in each row, then ReLU; with `absolute` the k of largest size, and no ReLU.

    Returns
    -------
    values [B, k], indices [B, k] int32; falling values or sizes, ties by rising index.
    """
    values, indices = _topk(x, weight, bias, k, absolute)
    return (values if absolute else values.relu_()).to(x.dtype), indices


def _topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`topk_encode` before the ReLU, in the dtype of comparisons.

    Latents are walked in panels with a running top k, so that only one panel of pre-activations exists at a time.
    """
    values = x.new_empty(x.shape[0], k, dtype=_work_dtype(x.dtype))
    indices = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)
    for block, panels in _blocks(x, weight, bias, max(NARROWEST_PANEL, 4 * k)):
        best: tuple[Tensor, Tensor] | None = None
        for left, pre in panels:
            _, here = _stable_topk(pre.abs() if absolute else pre, min(k, pre.shape[1]))
            found = (pre.gather(1, here), here + left)
            if best is not None:
                # Older panels hold lower indices and stand first, so a stable sort keeps ties in index order.
                merged = torch.cat([best[0], found[0]], 1)
                keep = (merged.abs() if absolute else merged).sort(dim=1, descending=True, stable=True).indices[:, :k]
                found = (merged.gather(1, keep), torch.cat([best[1], found[1]], 1).gather(1, keep))
            best = found
        assert best is not None
        values[block], indices[block] = best
    return values, indices


def _stable_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``torch.topk`` with ties to the lower index, which torch leaves undefined."""
    values, indices = pre.topk(min(k + 1, pre.shape[1]), dim=1)
    if values.shape[1] > k:
        # Two equal values astride the cut: torch may have kept the wrong one. Rare; such rows are sorted in full.
        tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
        values, indices = values[:, :k], indices[:, :k]
        if tied.numel():
            full = pre[tied].sort(dim=1, descending=True, stable=True)
            values[tied], indices[tied] = full.values[:, :k], full.indices[:, :k]
    return _in_order(values, indices)


def _in_order(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by falling value, ties by rising index."""
    by_index = indices.argsort(dim=1)
    order = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return order.values, indices.gather(1, by_index).gather(1, order.indices)


# Routing. A slot is one of a token's experts: slot b · n_active + j is the j-th of token b.


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, n_active: int, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The `n_active` experts with the largest ``x @ weight.T``, or with the largest gates plus `bias`.

    Gates are the softmax over all experts, or the sigmoid, in the dtype of comparisons.

    Returns
    -------
    logits [B, E], gates [B, n_active], experts [B, n_active] int32, order [B · n_active] int32, offsets [E + 1] int32.
    """
    work = _work_dtype(x.dtype)
    logits = x.to(work) @ weight.to(work).T
    gates = logits.softmax(1) if gate == "softmax" else logits.sigmoid()
    scores = logits if bias is None else gates + bias.to(work)  # gates saturate, logits do not
    _, experts = _stable_topk(scores, n_active)
    return logits, gates.gather(1, experts), experts.int(), *group_slots(experts, weight.shape[0])


def group_slots(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Slots by rising expert, in an expert by rising slot, and where each expert's begin.

    Returns
    -------
    order [B · n_active] int32, offsets [n_experts + 1] int32.
    """
    sorted_experts, order = experts.flatten().long().sort(stable=True)
    starts = torch.arange(n_experts + 1, device=experts.device)
    return order.int(), torch.searchsorted(sorted_experts, starts).int()


def routed_topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    order: Tensor,
    offsets: Tensor,
    k: int,
    per_expert: bool,
    screen: str,
) -> tuple[Tensor, Tensor]:
    """Top k of ``x @ weight.T + bias`` over the latents of each row's experts, or of each expert of it; then ReLU.

    Looks at the offsets, so it waits for the device.

    Returns
    -------
    values [B, k], indices [B, k] int32, in order as from :func:`topk_encode`; or [B, n_active · k] with `per_expert`,
    expert by expert.
    """
    n_active, latents = experts.shape[1], weight.shape[0] // (offsets.shape[0] - 1)
    width = min(k, latents)
    values = x.new_empty(experts.numel(), width, dtype=_work_dtype(x.dtype))
    indices = torch.empty(experts.numel(), width, dtype=torch.int32, device=x.device)
    starts = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(starts)):
        if start == end:
            continue
        slots = order[start:end].long()
        mine = slice(expert * latents, (expert + 1) * latents)
        found = _topk(x[slots // n_active], weight[mine], None if bias is None else bias[mine], width)
        values[slots], indices[slots] = found[0], found[1] + mine.start
    values, indices = values.view(x.shape[0], -1), indices.view(x.shape[0], -1)
    if not per_expert:
        values, indices = _in_order(values, indices)
        values, indices = values[:, :k], indices[:, :k]
    return values.relu().to(x.dtype), indices.contiguous()


# Codes of any number of latents a token. An entry is found by its position, row × N + latent, until all are known.

_POSITION_BYTES = 16
"""Workspace for each pre-activation that passes: its position in the panel, and that in the batch."""


def batch_topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: int, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest of all of ``x @ weight.T + bias``, then ReLU; ties to the lower position.

    Panels are walked with a running set of the best, so that only one panel of pre-activations exists at a time.

    Returns
    -------
    crow [B + 1] int64, col [count] int32, values [count].
    """
    n_latents = weight.shape[0]
    values = x.new_empty(0, dtype=_work_dtype(x.dtype))
    positions = torch.empty(0, dtype=torch.int64, device=x.device)
    for block, panels in _blocks(x, weight, bias, NARROWEST_PANEL, _POSITION_BYTES):
        for left, pre in panels:
            flat = pre.flatten()
            cut = values.min() if values.numel() == count else -torch.inf
            found = (~(flat < cut)).nonzero().squeeze(1)  # not >=: NaN is the largest number, as in torch.topk
            found = found[_largest(flat[found], count)]
            merged = torch.cat([positions, _positions(found, block.start, left, pre.shape[1], n_latents)])
            positions, order = merged.sort()
            values = torch.cat([values, flat[found]])[order]
            keep = _largest(values, count)
            positions, values = positions[keep], values[keep]
    return *_rows_and_latents(positions, x.shape[0], n_latents), values.relu_().to(x.dtype)


def threshold_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of ``x @ weight.T + bias`` above `threshold`, 0-dim or ``[N]``, in the dtype of comparisons.

    Returns
    -------
    crow [B + 1] int64, col [nnz] int32, values [nnz].
    """
    n_latents = weight.shape[0]
    all_positions, all_values = [], []
    for block, panels in _blocks(x, weight, bias, NARROWEST_PANEL, _POSITION_BYTES):
        positions, values = [], []
        for left, pre in panels:
            width = pre.shape[1]
            found = (pre > threshold.expand(n_latents)[left : left + width]).flatten().nonzero().squeeze(1)
            positions.append(_positions(found, block.start, left, width, n_latents))
            values.append(pre.flatten()[found].to(x.dtype))
        in_order = torch.cat(positions).sort()
        all_positions.append(in_order.values)
        all_values.append(torch.cat(values)[in_order.indices])
    return *_rows_and_latents(torch.cat(all_positions), x.shape[0], n_latents), torch.cat(all_values)


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest of a vector are, rising; ties to the lower index. All, where there are no more."""
    if values.numel() <= count:
        return torch.arange(values.numel(), device=values.device)
    top = values.topk(count)
    cut = top.values[-1]
    above = top.indices[top.values != cut]
    tied = (values == cut).nonzero().squeeze(1)  # torch.topk may have taken any of these
    return torch.cat([above, tied[: count - above.numel()]]).sort().values


def _positions(found: Tensor, top: int, left: int, width: int, n_latents: int) -> Tensor:
    """Positions in the batch from those in a panel of `width` latents that begins at row `top` and latent `left`."""
    return (top + found // width) * n_latents + left + found % width


def _rows_and_latents(positions: Tensor, rows: int, n_latents: int) -> tuple[Tensor, Tensor]:
    """``crow`` and ``col`` of entries at rising positions."""
    starts = torch.arange(rows + 1, device=positions.device) * n_latents
    return torch.searchsorted(positions, starts), (positions % n_latents).int()


# Sparse products


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``out[b] = bias + Σ_j values[b, j] · weight[indices[b, j]]``, ``[B, d]``."""
    work = _work_dtype(values.dtype)
    out = torch.zeros(values.shape[0], weight.shape[1], dtype=work, device=values.device)
    if bias is not None:
        out += bias
    for j in range(values.shape[1]):
        out.addcmul_(values[:, j : j + 1].to(work), weight[indices[:, j]].to(work))
    return out.to(values.dtype)


def gather_dot(grad: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``out[b, j] = ⟨weight[indices[b, j]], grad[b]⟩``, ``[B, k]``."""
    work = _work_dtype(grad.dtype)
    wide, out = grad.to(work), grad.new_empty(indices.shape)
    for j in range(indices.shape[1]):
        out[:, j] = (weight[indices[:, j]].to(work) * wide).sum(1)
    return out


def scatter_outer(values: Tensor, indices: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    """``out[i] = Σ values[b, j] · grad[b]`` over all slots with ``indices[b, j] == i``, ``[d_sae, d]``."""
    work = _work_dtype(grad.dtype)
    wide = grad.to(work)
    out = torch.zeros(d_sae, grad.shape[1], dtype=work, device=grad.device)
    for j in range(values.shape[1]):
        _add_rows(out, indices[:, j], values[:, j : j + 1].to(work) * wide)
    return out.to(grad.dtype)


def _add_rows(out: Tensor, rows: Tensor, update: Tensor) -> None:
    """``out[rows] += update`` with repeats, in one order of summation."""
    if out.is_cuda:
        # Sorts, so its sums have one order; index_add_ uses atomics there, and index_put_ does on the CPU.
        out.index_put_((rows.long(),), update, accumulate=True)
    else:
        out.index_add_(0, rows, update)


def csr_decode(values: Tensor, crow: Tensor, col: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``out[b] = bias + Σ values[e] · weight[col[e]]`` over the entries e of row b, ``[B, d]``."""
    work = _work_dtype(values.dtype)
    out = torch.zeros(crow.shape[0] - 1, weight.shape[1], dtype=work, device=values.device)
    if bias is not None:
        out += bias
    rows = entry_rows(crow, col)
    for part in _entry_blocks(out, col):
        _add_rows(out, rows[part], values[part, None].to(work) * weight[col[part]].to(work))
    return out.to(values.dtype)


def csr_gather_dot(grad: Tensor, crow: Tensor, col: Tensor, weight: Tensor) -> Tensor:
    """``out[e] = ⟨weight[col[e]], grad[row of e]⟩``, ``[nnz]``."""
    wide, out = grad.to(_work_dtype(grad.dtype)), grad.new_empty(col.shape)
    rows = entry_rows(crow, col)
    for part in _entry_blocks(wide, col):
        out[part] = (weight[col[part]].to(wide.dtype) * wide[rows[part]]).sum(1)
    return out


def csr_scatter_outer(values: Tensor, crow: Tensor, col: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    """``out[i] = Σ values[e] · grad[row of e]`` over all entries with ``col[e] == i``, ``[d_sae, d]``."""
    work = _work_dtype(grad.dtype)
    wide = grad.to(work)
    out = torch.zeros(d_sae, grad.shape[1], dtype=work, device=grad.device)
    rows = entry_rows(crow, col)
    for part in _entry_blocks(out, col):
        _add_rows(out, col[part], values[part, None].to(work) * wide[rows[part]])
    return out.to(grad.dtype)


def _entry_blocks(like: Tensor, col: Tensor) -> Iterator[slice]:
    """Slices of the entries that are few enough for one row of `like` to each."""
    size = max(1, PRODUCT_BYTES // max(1, like.shape[1] * like.itemsize))
    return (slice(first, first + size) for first in range(0, col.shape[0], size))


def weighted_row_sum(coefficients: Tensor, weight: Tensor) -> Tensor:
    """``coefficients @ weight``, ``[d]``."""
    return coefficients @ weight


# Bits and pairs: whole numbers alone

BIT_ROWS, BIT_BYTES = 1024, 1024
"""Of a block of bits as float32: 32 MiB."""


def bit_distances(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Bits that differ between every two rows, int32, or for "jaccard" their share of the bits set in either, float32.

    Returns
    -------
    [N, M]
    """
    out = a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32 if metric == "hamming" else torch.float32)
    for top in range(0, a.shape[0], BIT_ROWS):
        for left in range(0, b.shape[0], BIT_ROWS):
            rows, columns = slice(top, top + BIT_ROWS), slice(left, left + BIT_ROWS)
            out[rows, columns] = _bit_block(a[rows], b[columns], metric)
    return out


def _bit_block(a: Tensor, b: Tensor, metric: str) -> Tensor:
    both = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    ones = torch.zeros_like(both)  # of both rows together
    for first in range(0, a.shape[1], BIT_BYTES):
        mine, theirs = (_unpacked(rows[:, first : first + BIT_BYTES]) for rows in (a, b))
        both += (mine @ theirs.T).int()  # whole numbers below 2^24
        ones += mine.sum(1).int()[:, None] + theirs.sum(1).int()
    differ = ones - 2 * both
    if metric == "hamming":
        return differ
    return torch.where(ones > 0, differ.float() / (ones - both).float(), 0.0)


def _unpacked(rows: Tensor) -> Tensor:
    return unpack_bits(rows.contiguous(), 8 * rows.shape[1]).float()


def bit_neighbors(a: Tensor, b: Tensor, k: int, metric: str, itself: bool) -> tuple[Tensor, Tensor]:
    """The k nearest rows of b of each row of a; without `itself` row i of b is none of row i's.

    Returns
    -------
    distances [N, k], indices [N, k] int32; rising distances, ties by rising index.
    """
    return nearest(a, b, k, metric, itself, bit_distances, BIT_ROWS, BIT_ROWS)


def nearest(
    a: Tensor, b: Tensor, k: int, metric: str, itself: bool, distances: Callable[..., Tensor], height: int, width: int
) -> tuple[Tensor, Tensor]:
    """:func:`bit_neighbors` by ``distances(a, b, metric)`` of panels of so many rows of a and of b."""
    keys = torch.empty(a.shape[0], k, dtype=torch.int64, device=a.device)
    for top in range(0, a.shape[0], height):
        rows = a[top : top + height]
        panels = ((left, distances(rows, b[left : left + width], metric)) for left in range(0, b.shape[0], width))
        keys[top : top + height] = _nearest_keys(panels, k, None if itself else top)
    found = (keys >> 32).int()
    return found if metric == "hamming" else found.view(torch.float32), (keys & 0x7FFFFFFF).int()


def _nearest_keys(panels: Iterable[tuple[int, Tensor]], k: int, top: int | None) -> Tensor:
    """Keys of the nearest: a distance above, whose bits have its order as it is not negative, an index below.

    Panels are their first index and distances, ``[rows, columns]``; `top` is the index of the first row, where no row
    is its own neighbour.
    """
    best = None
    for left, distances in panels:
        index = torch.arange(left, left + distances.shape[1], device=distances.device)
        keys = (distances.contiguous().view(torch.int32).long() << 32) | index
        if top is not None:
            own = torch.arange(top, top + keys.shape[0], device=keys.device)
            keys = keys.masked_fill(index == own[:, None], torch.iinfo(torch.int64).max)
        best = keys if best is None else torch.cat([best, keys], 1)
        best = best.topk(min(k, best.shape[1]), dim=1, largest=False).values
    assert best is not None  # there is a column
    return best


def cooccurrence(crow: Tensor, col: Tensor, d_sae: int, at_least: int) -> tuple[Tensor, Tensor, Tensor]:
    """How many rows hold both latents of a pair i < j, where these are `at_least` so many. Latents rise in a row.

    Returns
    -------
    crow [d_sae + 1] int64, col [pairs] int32, counts [pairs] int32.
    """
    entries = torch.arange(col.shape[0], device=col.device)
    later = crow[1:][entry_rows(crow, col)] - entries - 1  # the pairs that an entry begins
    pairs = torch.cat([later.new_zeros(1), later.cumsum(0)])
    keys, counts = (torch.empty(0, dtype=torch.int64, device=col.device) for _ in range(2))
    most, first = WORKSPACE_BYTES // 8, 0
    while first < col.shape[0]:
        last = max(first + 1, int(torch.searchsorted(pairs, pairs[first] + most, right=True)) - 1)
        one = entries[first:last].repeat_interleave(later[first:last])
        other = one + 1 + torch.arange(one.shape[0], device=col.device) - (pairs[one] - pairs[first])
        met = col[one].long() * d_sae + col[other]
        keys, place = torch.cat([keys, met]).unique(return_inverse=True)
        weights = torch.cat([counts, torch.ones_like(met)])
        counts = torch.zeros_like(keys).index_add_(0, place, weights)
        first = last
    kept = counts >= at_least
    return *_rows_and_latents(keys[kept], d_sae, d_sae), counts[kept].int()

"""Plain PyTorch, any device: the specification of every op and the fallback where no kernel serves.

Nothing here holds a ``B × N`` or a ``B × k × d`` tensor. Largest temporaries: one block of pre-activations of
:data:`WORKSPACE_BYTES`, and one ``B × d`` tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 * 2**20
"""Bound on the pre-activations that exist at one time in :func:`topk_encode`."""


def unavailable(op: str, device: str, dtype: torch.dtype, screen: str) -> str | None:
    """Why this backend cannot serve such a call; None when it can."""
    if screen not in ("auto", "none"):
        return f"has no {screen} screening; use screen='auto' or 'none'"
    return None


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that sums and comparisons are made in: half-precision input is only stored in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk_encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, screen: str) -> tuple[Tensor, Tensor]:
    """Top k of ``x @ weight.T + bias`` in each row, then ReLU.

    Latents are walked in panels with a running top k, so that only one panel of pre-activations exists at a time.

    Returns
    -------
    values [B, k], indices [B, k] int32; falling values, ties by rising index.
    """
    rows, n_latents, work = x.shape[0], weight.shape[0], _work_dtype(x.dtype)
    cells = WORKSPACE_BYTES // work.itemsize
    # Narrow panels spend their time in merging, so rows are split first, and latents where that is not enough.
    row_block = max(1, min(rows, cells // min(n_latents, max(4096, 4 * k))))
    panel = min(n_latents, max(1, cells // row_block))
    values = x.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.int32, device=x.device)
    for top in range(0, rows, row_block):
        block = x[top : top + row_block].to(work)
        best: tuple[Tensor, Tensor] | None = None
        for left in range(0, n_latents, panel):
            part = slice(left, left + panel)
            pre = block @ weight[part].to(work).T
            if bias is not None:
                pre += bias[part].to(work)
            found = _stable_topk(pre, min(k, pre.shape[1]))
            found = (found[0], found[1] + left)
            if best is not None:
                # Older panels hold lower indices and stand first, so a stable sort keeps ties in index order.
                merged = torch.cat([best[0], found[0]], 1)
                order = merged.sort(dim=1, descending=True, stable=True)
                keep = order.indices[:, :k]
                found = (order.values[:, :k], torch.cat([best[1], found[1]], 1).gather(1, keep))
            best = found
        assert best is not None
        values[top : top + row_block] = best[0]
        indices[top : top + row_block] = best[1]
    return values.relu_(), indices


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
    by_index = indices.argsort(dim=1)
    order = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return order.values, indices.gather(1, by_index).gather(1, order.indices)


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
        update = values[:, j : j + 1].to(work) * wide
        if out.is_cuda:
            # Sorts, so its sums have one order; index_add_ uses atomics there, and index_put_ does on the CPU.
            out.index_put_((indices[:, j].long(),), update, accumulate=True)
        else:
            out.index_add_(0, indices[:, j], update)
    return out.to(grad.dtype)

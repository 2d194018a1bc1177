"""Routers, and encoding with the latents of each token's experts alone.

A *slot* is one of a token's experts: slot ``b · n_active + j`` is token b's j-th.

=======  ==============================================================================================================
gate     Logits in full float32, since they decide; softmax or sigmoid; the best experts of a token; and how many slots
         of a block of tokens went to each expert: one kernel.
group    Slots by rising expert, and in an expert by rising slot: a counting sort. The counts of blocks are summed over
         blocks, expert by expert, and every slot then finds its place by its rank among its block's.
encode   Screened slot by slot, in tiles of one expert's slots (the routed mode of :mod:`.encode`); then each token's
         keys, of all its experts together, go through the same selection, rescoring and repair as any token's.
=======  ==============================================================================================================

Nothing waits for the device. How many tiles an expert has is known there alone, so as many programs start as there can
be tiles, and those without one have nothing to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.backends import reference, screening
from sparsekern.backends.screening import Slots
from sparsekern.backends.triton import encode, plans
from sparsekern.backends.triton._launch import launch

GATE_TILES = {16: (32, 32, 4), 32: (32, 32, 4), 64: (32, 32, 8), 128: (32, 32, 4), 256: (32, 16, 8), 512: (16, 16, 8)}
"""Tokens, depth and warps of a program, by the number of experts it holds logits of: what compiles without spills."""

MOST_ACTIVE = 32
"""Experts of a token that it chooses one after the other."""

MOST_COUNTED = 1024
"""Experts up to which slots are sorted by counting: a block of slots has a count for each."""

SLOTS = 64  # of a block


# Gating


@triton.jit(do_not_specialize=["n_rows", "n_experts", "n_active", "n_blocks"])
def _gate(
    x, x_stride, weight, weight_stride, bias, logits, gates, experts, counts, n_rows, d, n_experts, n_active, n_blocks,
    SOFTMAX: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Logits, experts and gates of ROWS tokens, and how many of their slots each expert has."""
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    depth = tl.arange(0, DEPTH)
    x_row = x + row.to(tl.int64)[:, None] * x_stride + depth[None, :]
    weight_row = weight + expert.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    inside, real = row < n_rows, expert < n_experts
    logit = tl.zeros([ROWS, EXPERTS], tl.float32)
    for step in range(0, d, DEPTH):
        a = tl.load(x_row + step, mask=inside[:, None] & (depth < d - step)[None, :], other=0.0).to(tl.float32)
        b = tl.load(weight_row + step, mask=real[None, :] & (depth < d - step)[:, None], other=0.0).to(tl.float32)
        logit = tl.dot(a, b, logit, input_precision="ieee")
    out = row.to(tl.int64)[:, None] * n_experts + expert[None, :]
    tl.store(logits + out, logit, mask=inside[:, None] & real[None, :])
    if SOFTMAX:
        shifted = tl.where(real[None, :], logit, float("-inf"))
        power = tl.exp(shifted - tl.max(shifted, axis=1)[:, None])
        gate = power / tl.sum(power, axis=1)[:, None]
    else:
        gate = 1.0 / (1.0 + tl.exp(-logit))
    score = logit  # gates saturate, logits do not
    if HAS_BIAS:
        score = gate + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    score = tl.where(score == score, score, float("-inf"))  # a token with NaN gets some experts, and no wild address
    free = real[None, :] & inside[:, None]
    count = tl.zeros([EXPERTS], tl.int32)
    for turn in range(0, n_active):
        best = tl.max(tl.where(free, score, float("-inf")), axis=1)
        chosen = tl.min(tl.where(free & (score == best[:, None]), expert[None, :], EXPERTS), axis=1)
        taken = expert[None, :] == chosen[:, None]
        slot = row.to(tl.int64) * n_active + turn
        tl.store(experts + slot, chosen, mask=inside)
        tl.store(gates + slot, tl.sum(tl.where(taken, gate, 0.0), axis=1), mask=inside)
        count += tl.sum(taken.to(tl.int32), axis=0)
        free = free & (taken == 0)
    tl.store(counts + expert.to(tl.int64) * n_blocks + block, count, mask=real)


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, n_active: int, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.route`."""
    (n, d), n_experts = x.shape, weight.shape[0]
    if n_experts > max(GATE_TILES) or n_active > MOST_ACTIVE:
        return _route_by_library(x, weight, bias, n_active, gate)
    x = x if x.stride(1) == 1 or d == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 or d == 1 else weight.contiguous()
    logits = torch.empty(n, n_experts, dtype=torch.float32, device=x.device)
    gates = torch.empty(n, n_active, dtype=torch.float32, device=x.device)
    experts = torch.empty(n, n_active, dtype=torch.int32, device=x.device)
    width = max(16, triton.next_power_of_2(n_experts))
    rows, depth, warps = GATE_TILES[width]
    blocks = triton.cdiv(n, rows)
    counts = torch.empty(n_experts, blocks, dtype=torch.int32, device=x.device)
    launch(
        _gate,
        (blocks,),
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        None if bias is None else bias.contiguous(),
        logits,
        gates,
        experts,
        counts,
        n,
        d,
        n_experts,
        n_active,
        blocks,
        SOFTMAX=gate == "softmax",
        HAS_BIAS=bias is not None,
        ROWS=rows,
        EXPERTS=width,
        DEPTH=depth,
        num_warps=warps,
    )
    return logits, gates, experts, *_place_slots(experts, counts, rows * n_active)


def _route_by_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, n_active: int, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For experts too many for registers. As the reference does it, but for its way to send ties to the lower expert,
    which looks at values and so waits for the device.
    """
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    flags.fp32_precision = "ieee"
    try:
        logits = x.float() @ weight.float().T
    finally:
        flags.fp32_precision = before
    gates = logits.softmax(1) if gate == "softmax" else logits.sigmoid()
    scores = logits if bias is None else gates + bias.float()
    experts = scores.sort(dim=1, descending=True, stable=True).indices[:, :n_active]
    narrow = experts.int()
    return logits, gates.gather(1, experts), narrow, *group_slots(narrow, weight.shape[0])


# Slots by expert


@triton.jit(do_not_specialize=["n_slots", "n_experts", "n_blocks"])
def _count_slots(experts, counts, n_slots, n_experts, n_blocks, SLOTS: tl.constexpr, EXPERTS: tl.constexpr):
    """How many of SLOTS slots each expert has."""
    block = tl.program_id(0)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    mine = tl.load(experts + slot, mask=slot < n_slots, other=-1)
    for first in range(0, n_experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        found = tl.sum((mine[:, None] == expert[None, :]).to(tl.int32), axis=0)
        tl.store(counts + expert.to(tl.int64) * n_blocks + block, found, mask=expert < n_experts)


@triton.jit(do_not_specialize=["n_slots", "n_blocks", "height"])
def _order_slots(experts, place, order, n_slots, n_blocks, height, SLOTS: tl.constexpr, OTHERS: tl.constexpr):
    """The slots of one block to their places: the block's first for an expert, and the rank among its slots there."""
    block = tl.program_id(0)
    first = block * height
    end = tl.minimum(first + height, n_slots)
    slot = first + tl.arange(0, SLOTS)
    mine = tl.load(experts + slot, mask=slot < end, other=0)
    rank = tl.zeros([SLOTS], tl.int32)
    for start in range(first, end, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = tl.load(experts + other, mask=other < end, other=-1)
        rank += tl.sum(((theirs[None, :] == mine[:, None]) & (other[None, :] < slot[:, None])).to(tl.int32), axis=1)
    base = tl.load(place + mine.to(tl.int64) * n_blocks + block, mask=slot < end, other=0)
    tl.store(order + base + rank, slot, mask=slot < end)


def group_slots(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.group_slots`."""
    if n_experts > MOST_COUNTED:  # the library's stable sort: it has no counts of blocks, and does not wait either
        return reference.group_slots(experts, n_experts)
    experts = experts.contiguous()
    blocks = triton.cdiv(experts.numel(), SLOTS)
    counts = torch.empty(n_experts, blocks, dtype=torch.int32, device=experts.device)
    arguments = (experts, counts, experts.numel(), n_experts, blocks)
    launch(_count_slots, (blocks,), *arguments, SLOTS=SLOTS, EXPERTS=64)
    return _place_slots(experts, counts, SLOTS)


def _place_slots(experts: Tensor, counts: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """Order and offsets from the `counts` ``[n_experts, blocks]`` of every `height` slots."""
    n_experts, blocks = counts.shape
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view(n_experts, blocks)
    order = torch.empty(experts.numel(), dtype=torch.int32, device=experts.device)
    arguments = (experts, ends - counts, order, experts.numel(), blocks, height)
    width = triton.next_power_of_2(height)
    launch(_order_slots, (blocks,), *arguments, SLOTS=width, OTHERS=max(4, min(32, 4096 // width)))
    return order, torch.nn.functional.pad(ends[:, -1], (1, 0))


# Encoding


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
    """See :func:`sparsekern.backends.reference.routed_topk_encode`."""
    (rows, n_active), (n, d), n_experts = experts.shape, weight.shape, offsets.shape[0] - 1
    copy = encode.current_copy(weight)
    plan = plans.routed_plan(
        rows,
        n_active,
        n_experts,
        d,
        n // n_experts,
        k,
        x.dtype,
        screen,
        encode.capability(x),
        has_copy=copy is not None and copy.cast.rows.dtype == plans.SCREEN_DTYPE,
        per_expert=per_expert,
    )
    if plan is None:
        return reference.routed_topk_encode(x, weight, bias, experts, order, offsets, k, per_expert, "none")
    x, experts = x.contiguous(), experts.contiguous()
    weight = weight if weight.stride(1) == 1 or d == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    screened = encode.screen_operands(x, weight, bias, plan, copy)
    selections = n_active if per_expert else 1  # of a token
    values = x.new_empty(rows, selections * k)
    indices = torch.empty(rows, selections * k, dtype=torch.int32, device=x.device)
    screening.last.clear()
    for part in encode.chunks(rows, selections * (4 * plan.n_buckets * plan.keep + 8 * plan.room)):
        mine = experts[part]
        grouped = (order, offsets) if len(mine) == rows else group_slots(mine, n_experts)
        slots = Slots(mine.view(len(mine) * selections, -1), *grouped, n_active, n // n_experts)
        keys = encode.screen_keys(screened, part, bias, plan, slots)
        found = values[part].view(-1, k), indices[part].view(-1, k)
        encode.finish(keys, x[part], weight, bias, k, screened, part, plan, *found, slots)
    return values, indices

"""Exact top-k encoding: screen, select, rescore, take.

=========  ============================================================================================================
screen     A low-precision product proposes latents. Latent i lies in bucket ``i mod n_buckets``; of every bucket the
           ``keep`` largest scores of a token survive, as keys: the float32 score with the latent's number inside the
           bucket in its lowest bits. Either a matmul whose epilogue keeps the keys (*fused*), or a library matmul over
           one panel of latents after the other, each read once (*chunked*).
select     The k-th largest key, less twice the largest possible error of a score (*slack*), is the threshold that a
           candidate has to reach. A bucket whose last key reaches it may hide more, so all of its latents become
           candidates.
rescore    Candidates get their float32 pre-activations from the stored weights.
repair     A token with more candidates than there is room for has all latents rescored.
take       The k largest, ties to the lower latent, then ReLU.
=========  ============================================================================================================

With *absolute* the k scores of largest size are wanted: keys and comparisons are those of sizes, which are no farther
from the exact ones than scores are, and what is rescored keeps its sign.

*Routed* kernels serve tokens whose latents are those of a few experts. The screen then works through slots (a token's
place at one of its experts) in the order of experts, and writes the keys of a token's slots side by side; from there on
its experts' latents are one row of buckets. See :mod:`.routing`.

The certificate is the slack, a worst case by Cauchy–Schwarz from measured norms:
``|W·x − Ŵ·x̂| ≤ ‖W − Ŵ‖‖x‖ + ‖Ŵ‖‖x − x̂‖`` and the rounding of the sums. No latent that is not a candidate can be
among the k largest, so the answer does not depend on the precision of the screen. Only fp8 uses a bound that is
statistical; see :mod:`sparsekern.backends.screening`, where what is no kernel is, for other engines too.

Nothing waits for the device: the number of candidates, and which tokens need repair, stay there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.backends import reference, screening
from sparsekern.backends.screening import (
    LIMITS,
    Cast,
    Quantized,
    Screened,
    Slots,
    as_it_is,
    capability,
    chunks,
    copy_dtype,
    current_copy,
    last_encode,  # noqa: F401 - of this backend too
    panel_scores,
    register,
    with_slack,
)
from sparsekern.backends.triton import plans
from sparsekern.backends.triton._launch import launch
from sparsekern.backends.triton.plans import SCREEN_DTYPE, EncodePlan, encode_plan

# Beyond every score, and finite: the bits of an infinity with a number in them would be a NaN.
LOWEST = tl.constexpr(-3.0e38)
HIGHEST = tl.constexpr(3.0e38)
NOTHING = tl.constexpr(-(2**63))  # below every score packed with its latent
NO_LATENT = tl.constexpr(2**31 - 1)

# Rows in the precision of the screen


@triton.jit
def scale_of(largest, LIMIT: tl.constexpr):
    """What a row is divided by so that its largest entry becomes LIMIT."""
    return tl.maximum(largest / LIMIT, 1e-30)


@triton.jit
def _cast_rows(
    rows, row_stride, out, scale, norm, error, d, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows rounded to the dtype of `out`, with their norms and the norms of what rounding changed."""
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if LIMIT > 0:
        largest = tl.zeros([BLOCK], tl.float32)
        for first in range(0, d, BLOCK):
            column = first + tl.arange(0, BLOCK)
            value = tl.load(rows + row * row_stride + column, mask=column < d, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(value))
        factor = scale_of(tl.max(largest, axis=0), LIMIT)
        tl.store(scale + row, factor)
    squares = tl.zeros([BLOCK], tl.float32)
    errors = tl.zeros([BLOCK], tl.float32)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(rows + row * row_stride + column, mask=column < d, other=0.0).to(tl.float32)
        rounded = (value / factor).to(out.dtype.element_ty)
        tl.store(out + row * d + column, rounded, mask=column < d)
        squares += value * value
        difference = value - rounded.to(tl.float32) * factor
        errors += difference * difference
    tl.store(norm + row, tl.sqrt(tl.sum(squares, axis=0)))
    tl.store(error + row, tl.sqrt(tl.sum(errors, axis=0)))


def cast_rows(rows: Tensor, dtype: torch.dtype) -> Cast:
    """`rows` ``[n, d]`` rounded to `dtype`; float16 and fp8 with a scale for each row."""
    n, d = rows.shape
    limit = LIMITS.get(dtype, 0.0)
    out = torch.empty(n, d, dtype=dtype, device=rows.device)
    scale, norm, error = (torch.empty(n, dtype=torch.float32, device=rows.device) for _ in range(3))
    block = min(1024, triton.next_power_of_2(d))
    launch(_cast_rows, (n,), rows, rows.stride(0), out, scale, norm, error, d, LIMIT=limit, BLOCK=block)
    return Cast(out, scale if limit else None, norm, error)


def quantized(weight: Tensor, screen: str = "auto") -> Quantized:
    """A copy of `weight` for the caller to own, which :func:`topk_encode` uses with `screen` while it is current."""
    return register(Quantized(weight, cast_rows(weight.detach(), copy_dtype(screen))))


# Screening


@triton.jit
def _insert(first, second, third, new, KEEP: tl.constexpr):
    """The three largest of four, elementwise, where the first three are sorted."""
    if KEEP == 1:
        return tl.maximum(first, new), second, third
    rest = tl.minimum(first, new)
    if KEEP == 2:
        return tl.maximum(first, new), tl.maximum(second, rest), third
    return tl.maximum(first, new), tl.maximum(second, rest), tl.maximum(third, tl.minimum(second, rest))


@triton.jit
def _to_key(score, member, MEMBER_BITS: tl.constexpr):
    """The score with the number of its latent inside the bucket in the lowest bits."""
    bits = score.to(tl.int32, bitcast=True)
    return ((bits & (-(1 << MEMBER_BITS))) | member).to(tl.float32, bitcast=True)


@triton.jit
def _store_keys(keys, first, second, third, row, bucket, wanted, n_buckets, KEEP: tl.constexpr):
    out = keys + row.to(tl.int64)[:, None] * (n_buckets * KEEP) + bucket[None, :]
    tl.store(out, first, mask=wanted)
    if KEEP > 1:
        tl.store(out + n_buckets, second, mask=wanted)
    if KEEP > 2:
        tl.store(out + 2 * n_buckets, third, mask=wanted)


@triton.jit(do_not_specialize=["n_rows", "n", "n_buckets", "n_members", "n_active", "n_experts"])
def _screen(
    x, x_scale, weight, weight_stride, weight_scale, bias, keys, n_rows, n, d, n_buckets, n_members,
    order, offsets, first_tile, tile_expert, n_active, n_experts,
    KEEP: tl.constexpr, MEMBER_BITS: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    ABSOLUTE: tl.constexpr, PRECISION: tl.constexpr, ROUTED: tl.constexpr, ROWS: tl.constexpr, BUCKETS: tl.constexpr,
    MEMBERS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Matmul with the keys of :func:`_to_key` in its epilogue.

    A program has ROWS tokens and all members of BUCKETS neighbouring buckets, MEMBERS of them at a time. With BUCKETS a
    multiple of 8 the tensor cores leave all members of a bucket in one thread, so that the epilogue needs no exchange.

    Routed, a row is a slot, a block of rows is a tile of slots of one expert, and `n` its number of latents.
    """
    # Programs that run at one time share rows of both operands: GROUP blocks of tokens by all buckets, in turn.
    blocks = tl.cdiv(n_rows, ROWS)
    if ROUTED:
        blocks += n_experts  # of each expert one tile may be only partly full
    across = tl.cdiv(n_buckets, BUCKETS)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(blocks - group * GROUP, GROUP)
    if ROUTED:
        height = tl.maximum(height, 1)  # it is; said for the analysis of intervals (bench/offsets.py)
    within = tl.program_id(0) % (GROUP * across)
    block = group * GROUP + within % height
    bucket = (within // height) * BUCKETS
    if ROUTED:
        expert = tl.load(tile_expert + block)
        exists = expert < n_experts  # else there is nothing to do: no members, and no rows to store
        tile = block - tl.load(first_tile + expert, mask=exists, other=0)
        place = tl.load(offsets + expert) + tile * ROWS + tl.arange(0, ROWS)
        inside = place < tl.load(offsets + expert + 1, mask=exists, other=0)
        row = tl.load(order + place, mask=inside, other=0)
        vector = row // n_active
        before = tl.where(exists, expert, 0) * n
        n_members = tl.where(exists, n_members, 0)
    else:
        row = block * ROWS + tl.arange(0, ROWS)
        inside = row < n_rows
        vector = row

    depth = tl.arange(0, DEPTH)
    x_row = x + tl.where(inside, vector, 0).to(tl.int64)[:, None] * d + depth[None, :]
    place = tl.arange(0, BUCKETS * MEMBERS)
    column_bucket = bucket + place % BUCKETS
    first = tl.full([ROWS, BUCKETS], LOWEST, tl.float32)
    second = tl.full([ROWS, BUCKETS], LOWEST, tl.float32)
    third = tl.full([ROWS, BUCKETS], LOWEST, tl.float32)
    for start in range(0, n_members, MEMBERS):
        member = start + place // BUCKETS
        latent = member * n_buckets + column_bucket
        real = (latent < n) & (column_bucket < n_buckets)
        latent = tl.where(real, latent, 0)
        if ROUTED:
            latent += before
        weight_row = weight + latent.to(tl.int64)[None, :] * weight_stride + depth[:, None]
        score = tl.zeros([ROWS, BUCKETS * MEMBERS], tl.float32)
        for step in range(0, d, DEPTH):
            a = tl.load(x_row + step, mask=(depth < d - step)[None, :], other=0.0)
            b = tl.load(weight_row + step, mask=(depth < d - step)[:, None], other=0.0)
            score = tl.dot(a, b, score, input_precision=PRECISION)
        if SCALED:
            by_row = tl.load(x_scale + vector, mask=inside, other=0.0)
            score *= by_row[:, None] * tl.load(weight_scale + latent)[None, :]
        if HAS_BIAS:
            score += tl.maximum(tl.load(bias + latent).to(tl.float32), LOWEST)[None, :]
        if ABSOLUTE:
            score = tl.abs(score)
        key = tl.where(real[None, :], _to_key(score, member[None, :], MEMBER_BITS), LOWEST)
        if MEMBERS == 1:
            first, second, third = _insert(first, second, third, key, KEEP)
        else:
            cube = tl.reshape(key, [ROWS, MEMBERS, BUCKETS])
            for turn in tl.static_range(KEEP):
                top = tl.max(cube, axis=1)
                if turn + 1 < KEEP:
                    cube = tl.where(cube == tl.expand_dims(top, 1), LOWEST, cube)
                first, second, third = _insert(first, second, third, top, KEEP)
    mine = bucket + tl.arange(0, BUCKETS)
    wanted = inside[:, None] & (mine < n_buckets)[None, :]
    _store_keys(keys, first, second, third, row, mine, wanted, n_buckets, KEEP)


@triton.jit(do_not_specialize=["n_rows", "n", "n_buckets", "first_member", "n_members"])
def _bucket_panel(
    panel, panel_stride, x_scale, weight_scale, bias, keys, n_rows, n, n_buckets, first_member, n_members,
    KEEP: tl.constexpr, MEMBER_BITS: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    ABSOLUTE: tl.constexpr, FRESH: tl.constexpr, ROWS: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Merge a panel of scores ``[n_rows, n_members · n_buckets]`` into the keys."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bucket = tl.program_id(1) * BUCKETS + tl.arange(0, BUCKETS)
    wanted = (row < n_rows)[:, None] & (bucket < n_buckets)[None, :]
    old = keys + row.to(tl.int64)[:, None] * (n_buckets * KEEP) + bucket[None, :]
    first = tl.full([ROWS, BUCKETS], LOWEST, tl.float32)
    second = tl.full([ROWS, BUCKETS], LOWEST, tl.float32)
    third = tl.full([ROWS, BUCKETS], LOWEST, tl.float32)
    if not FRESH:
        first = tl.load(old, mask=wanted, other=LOWEST)
        if KEEP > 1:
            second = tl.load(old + n_buckets, mask=wanted, other=LOWEST)
        if KEEP > 2:
            third = tl.load(old + 2 * n_buckets, mask=wanted, other=LOWEST)
    source = panel + row.to(tl.int64)[:, None] * panel_stride + bucket[None, :]
    if SCALED:
        by_row = tl.load(x_scale + row, mask=row < n_rows, other=0.0)
    for member in range(0, n_members):
        latent = (first_member + member) * n_buckets + bucket
        real = wanted & (latent < n)[None, :]
        score = tl.load(source + member * n_buckets, mask=real, other=0.0).to(tl.float32)
        score = tl.minimum(tl.maximum(score, LOWEST), HIGHEST) + 0.0  # float16 overflows; and -0, as 0, ties with 0
        if SCALED:
            score *= by_row[:, None] * tl.load(weight_scale + latent, mask=latent < n, other=0.0)[None, :]
        if HAS_BIAS:
            score += tl.maximum(tl.load(bias + latent, mask=latent < n, other=0.0).to(tl.float32), LOWEST)[None, :]
        if ABSOLUTE:
            score = tl.abs(score)
        key = tl.where(real, _to_key(score, first_member + member, MEMBER_BITS), LOWEST)
        first, second, third = _insert(first, second, third, key, KEEP)
    _store_keys(keys, first, second, third, row, bucket, wanted, n_buckets, KEEP)


# Selection


@triton.jit
def _sortable(value):
    """The bits of a float32 as an unsigned number in the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | (-2147483648))).to(tl.uint32, bitcast=True)


@triton.jit
def _from_sortable(number):
    bits = number.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | (-2147483648))).to(tl.float32, bitcast=True)


@triton.jit
def _real_latent(latent, before, n, ROUTED: tl.constexpr):
    """-1 where a bucket has no such member; else the number among all latents, of which `before` are others'."""
    if ROUTED:
        return tl.where(latent < n, before + latent, -1)
    return tl.where(latent < n, latent, -1)


@triton.jit(do_not_specialize=["k", "n", "n_buckets", "n_members", "room", "n_owners"])
def _select(
    keys, slack, candidates, scores, count, experts, k, n, n_buckets, n_members, room, n_owners, relative,
    KEEP: tl.constexpr, MEMBER_BITS: tl.constexpr, HIDES: tl.constexpr, ROUTED: tl.constexpr, SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Candidates of one token, and how many they are (more than `room`: too many to be kept).

    Routed, the buckets of a token's `n_owners` experts, of `n` latents each, stand one after the other.
    """
    row = tl.program_id(0).to(tl.int64)
    bucket = tl.arange(0, BLOCK)
    inside = bucket < n_buckets
    source = keys + row * (n_buckets * KEEP) + bucket
    before = 0
    if ROUTED:
        n_buckets //= n_owners
        owner = bucket // n_buckets
        bucket = bucket % n_buckets
        source += owner * (n_buckets * (KEEP - 1))
        before = tl.load(experts + row * n_owners + owner, mask=inside, other=0) * n
    low: tl.constexpr = (1 << MEMBER_BITS) - 1
    first = tl.load(source, mask=inside, other=LOWEST)
    a = _sortable(first)
    if KEEP > 1:
        second = tl.load(source + n_buckets, mask=inside, other=LOWEST)
        b = _sortable(second)
    if KEEP > 2:
        third = tl.load(source + 2 * n_buckets, mask=inside, other=LOWEST)
        c = _sortable(third)
    # The k-th largest key, bit by bit from the highest. Its lowest bits stay zero: the least score it can stand for.
    kth = tl.zeros([], tl.uint32)
    one = kth + 1
    for step in range(0, 32 - MEMBER_BITS):
        trial = kth | (one << (31 - step))
        reached = (a >= trial).to(tl.int32)
        if KEEP > 1:
            reached += (b >= trial).to(tl.int32)
        if KEEP > 2:
            reached += (c >= trial).to(tl.int32)
        kth = tl.where(tl.sum(reached, axis=0) >= k, trial, kth)
    least = tl.maximum(_from_sortable(kth), LOWEST)
    needed = tl.maximum(least - relative * tl.abs(least) - 2.0 * tl.load(slack + row // SHARE), LOWEST)
    threshold = _sortable(needed) & (4294967295 - low)

    # A bucket whose last key is a candidate may hide more candidates: all its members become some.
    last = a
    if KEEP == 2:
        last = b
    if KEEP == 3:
        last = c
    hiding = inside & (last >= threshold) & HIDES
    total = tl.zeros([], tl.int32)
    for turn in tl.static_range(KEEP):
        key, number = first, a
        if turn == 1:
            key, number = second, b
        if turn == 2:
            key, number = third, c
        taken = inside & (number >= threshold) & (key > LOWEST) & (hiding == 0)
        place = total + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        member = key.to(tl.int32, bitcast=True) & low
        out = row * room + place
        latent = member * n_buckets + bucket
        # A NaN among the scores has arbitrary bits, which must not become an address.
        tl.store(candidates + out, _real_latent(latent, before, n, ROUTED), mask=taken & (place < room))
        tl.store(scores + out, key, mask=taken & (place < room))
        total += tl.sum(taken.to(tl.int32), axis=0)
    n_hiding = tl.sum(hiding.to(tl.int32), axis=0)
    if n_hiding > 0:
        place = total + (tl.cumsum(hiding.to(tl.int32), axis=0) - 1) * n_members
        if n_hiding * n_members <= room:
            for opened in range(0, n_members):
                hidden = opened * n_buckets + bucket
                fits = hiding & (place + opened < room)
                found = _real_latent(hidden, before, n, ROUTED)
                tl.store(candidates + row * room + place + opened, found, mask=fits)
                tl.store(scores + row * room + place + opened, float("nan"), mask=fits)
    total += n_hiding * n_members
    if ROUTED:  # Latents switched off by a bias of -inf are no candidates. Where they are needed, all are looked at.
        total = tl.where(total < k, NO_LATENT, total)
    tl.store(count + row, total)


@triton.jit(do_not_specialize=["room"])
def _rescore(
    x, x_stride, weight, weight_stride, bias, candidates, scores, count, slack, d, room,
    HAS_BIAS: tl.constexpr, CHECK: tl.constexpr, ABSOLUTE: tl.constexpr, FEW: tl.constexpr, SHARE: tl.constexpr,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Exact pre-activations of the candidates of one row; SHARE rows after one another are of one token.

    Of FEW candidates one program goes through all, of more each program has its own.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(count + row)
    if FEW:
        end = tl.minimum(tl.where(n <= room, n, 0), room)  # at most; said for the analysis of intervals
        for first in range(0, end, CANDIDATES):
            _rescore_some(
                x, x_stride, weight, weight_stride, bias, candidates, scores, count, slack, d, room, row, first, n,
                HAS_BIAS, CHECK, ABSOLUTE, SHARE, CANDIDATES, BLOCK,
            )  # fmt: skip
    else:
        first = tl.program_id(1) * CANDIDATES
        if (n <= room) & (first < n):
            _rescore_some(
                x, x_stride, weight, weight_stride, bias, candidates, scores, count, slack, d, room, row, first, n,
                HAS_BIAS, CHECK, ABSOLUTE, SHARE, CANDIDATES, BLOCK,
            )  # fmt: skip


@triton.jit
def _rescore_some(
    x, x_stride, weight, weight_stride, bias, candidates, scores, count, slack, d, room, row, first, n,
    HAS_BIAS: tl.constexpr, CHECK: tl.constexpr, ABSOLUTE: tl.constexpr, SHARE: tl.constexpr,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = first + tl.arange(0, CANDIDATES)
    latent = tl.load(candidates + row * room + place, mask=place < n, other=-1)
    token = row // SHARE
    score = dot_rows(x, x_stride, weight, weight_stride, bias, token, latent, d, HAS_BIAS, CANDIDATES, BLOCK)
    score = tl.where(latent >= 0, score, float("-inf"))
    if CHECK:
        # The slack of fp8 is an estimate. Errors far beyond what it was estimated from discredit it.
        screened = tl.load(scores + row * room + place, mask=place < n, other=float("nan"))
        compared = tl.abs(score) if ABSOLUTE else score
        wrong = (tl.abs(compared - screened) > 0.5 * tl.load(slack + row)) & (place < n)
        if tl.sum(wrong.to(tl.int32), axis=0) > 0:
            tl.store(count + row, NO_LATENT)
    tl.store(scores + row * room + place, score, mask=place < n)


@triton.jit
def dot_rows(
    x, x_stride, weight, weight_stride, bias, row, latent, d,
    HAS_BIAS: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 pre-activations of one token, the same bits for equal rows of the weight wherever they stand."""
    index = tl.maximum(latent, 0).to(tl.int64)
    total = tl.zeros([CANDIDATES, BLOCK], tl.float32)
    for step in range(0, d, BLOCK):
        column = step + tl.arange(0, BLOCK)
        wanted = (latent >= 0)[:, None] & (column < d)[None, :]
        a = tl.load(weight + index[:, None] * weight_stride + column[None, :], mask=wanted, other=0.0)
        b = tl.load(x + row * x_stride + column, mask=column < d, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)[None, :]
    score = tl.sum(total, axis=1)
    if HAS_BIAS:
        score += tl.load(bias + index, mask=latent >= 0, other=0.0).to(tl.float32)
    return score


@triton.jit(do_not_specialize=["n_rows", "n", "room", "share", "n_owners"])
def _repair(
    x, x_stride, weight, weight_stride, bias, candidates, scores, count, repaired, experts,
    n_rows, n, d, room, share, n_owners,
    HAS_BIAS: tl.constexpr, ABSOLUTE: tl.constexpr, ROUTED: tl.constexpr, SHARE: tl.constexpr, TOP: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The TOP best of a share of all latents, for the tokens with too many candidates; mostly there are none.

    Routed, of a share of the `n` latents that a row's experts have together.
    """
    part = tl.program_id(1)
    for start in range(tl.program_id(0) * TOKENS, n_rows, tl.num_programs(0) * TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        over = tl.load(count + tokens, mask=tokens < n_rows, other=0) > room
        waiting = tl.sum(over.to(tl.int32), axis=0)
        done = -1
        while waiting > 0:
            done = tl.min(tl.where(over & (tokens > done), tokens, NO_LATENT), axis=0)
            row = done.to(tl.int64)
            best = tl.full([TOP], NOTHING, tl.int64)
            for latent in range(part * share, tl.minimum((part + 1) * share, n), TOP):
                index = latent + tl.arange(0, TOP)
                index = tl.where((index < (part + 1) * share) & (index < n), index, -1)
                if ROUTED:
                    latents = n // n_owners
                    expert = tl.load(experts + row * n_owners + index // latents, mask=index >= 0, other=0)
                    index = tl.where(index >= 0, expert * latents + index % latents, -1)
                token = row // SHARE
                score = dot_rows(x, x_stride, weight, weight_stride, bias, token, index, d, HAS_BIAS, TOP, BLOCK)
                new = tl.where(index >= 0, _pack(score, index, ABSOLUTE), NOTHING)
                if tl.max(new, axis=0) > tl.min(best, axis=0):
                    # Falling beside rising: the larger of each pair are the larger half of both.
                    best = tl.sort(tl.maximum(best, tl.sort(new)), descending=True)
            real = best != NOTHING
            place = row * room + part * TOP + tl.arange(0, TOP)
            score, found = _unpack(best, ABSOLUTE)
            tl.store(candidates + place, tl.where(real, found, -1))
            tl.store(scores + place, tl.where(real, score, float("-inf")))
            if part == 0:
                tl.store(repaired + row, 1)
            waiting -= 1


@triton.jit
def _pack(score, latent, ABSOLUTE: tl.constexpr):
    """Score above, latent below: one comparison orders by score and sends ties to the lower latent.

    With ABSOLUTE by the size of the score, whose sign is the lowest bit: no latent is there twice, so it never decides.
    """
    high = (_sortable(tl.abs(score) if ABSOLUTE else score).to(tl.int64) - 2147483648) << 32
    low = (latent ^ NO_LATENT).to(tl.int64)
    if ABSOLUTE:
        low = (low << 1) | (score < 0).to(tl.int64)
    return high | low


@triton.jit
def _unpack(packed, ABSOLUTE: tl.constexpr):
    """Score and latent of :func:`_pack`."""
    latent = (((packed >> 1) if ABSOLUTE else packed) & NO_LATENT).to(tl.int32) ^ NO_LATENT
    score = _from_sortable(((packed >> 32) + 2147483648).to(tl.uint32))
    if ABSOLUTE:
        score = tl.where((packed & 1) != 0, -score, score)
    return score, latent


@triton.jit(do_not_specialize=["k", "room"])
def _take(
    candidates, scores, count, repaired, values, indices, k, room, filled,
    ABSOLUTE: tl.constexpr, TOP: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The k best candidates of one token, in order; out of no more than TOP without a search for them."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, ROOM)
    n = tl.where(tl.load(repaired + row) != 0, filled, tl.load(count + row))
    latent = tl.load(candidates + row * room + place, mask=place < n, other=-1)
    score = tl.load(scores + row * room + place, mask=place < n, other=float("-inf"))
    packed = tl.where(latent >= 0, _pack(score, latent, ABSOLUTE), NOTHING)
    if TOP < ROOM:
        # The k-th largest, bit by bit; numbers are distinct, so k of them reach it.
        zero = tl.zeros([], tl.int64)
        kth = tl.where(tl.sum((packed >= zero).to(tl.int32), axis=0) >= k, zero, zero + NOTHING)
        for bit in range(0, 63):
            trial = kth + ((zero + 1) << (62 - bit))
            kth = tl.where(tl.sum((packed >= trial).to(tl.int32), axis=0) >= k, trial, kth)
        taken = (packed >= kth) & (latent >= 0)
        slot = tl.cumsum(taken.to(tl.int32), axis=0) - 1
        taken = taken & (slot < k)
        tl.store(candidates + row * room + slot, latent, mask=taken)
        tl.store(scores + row * room + slot, score, mask=taken)
        tl.debug_barrier()
        found = tl.sum(taken.to(tl.int32), axis=0)
        best = tl.arange(0, TOP)
        latent = tl.load(candidates + row * room + best, mask=best < found, other=0)
        score = tl.load(scores + row * room + best, mask=best < found, other=float("-inf"))
        packed = tl.where(best < found, _pack(score, latent, ABSOLUTE), NOTHING)
    packed = tl.sort(packed, descending=True)
    mine = tl.arange(0, TOP)
    real = packed != NOTHING
    score, latent = _unpack(packed, ABSOLUTE)
    score = tl.where(real, score, 0.0)
    if not ABSOLUTE:
        score = tl.maximum(score, 0.0)
    out = row * k + mine
    tl.store(values + out, score.to(values.dtype.element_ty), mask=mine < k)
    tl.store(indices + out, tl.where(real, latent, 0), mask=mine < k)


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, screen: str, path: str = "auto", absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.topk_encode`; `path` as for :func:`encode_plan`."""
    rows, (n, d) = x.shape[0], weight.shape
    copy = current_copy(weight)
    has_copy = copy is not None and copy.cast.rows.dtype == SCREEN_DTYPE
    plan = encode_plan(rows, d, n, k, x.dtype, screen, capability(x), has_copy=has_copy, path=path)
    if plan is None:
        return reference.topk_encode(x, weight, bias, k, "none", absolute)
    plan, x = plan._replace(absolute=absolute), x.contiguous()
    weight = weight if weight.stride(1) == 1 or d == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    screened = screen_operands(x, weight, bias, plan, copy)
    values, indices = x.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int32, device=x.device)
    screening.last.clear()
    for part in chunks(rows, 4 * plan.n_buckets * plan.keep + 8 * plan.room):
        keys = screen_keys(screened, part, bias, plan)
        finish(keys, x[part], weight, bias, k, screened, part, plan, values[part], indices[part])
    return values, indices


def screen_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: EncodePlan, copy: Quantized | None
) -> Screened:
    """Both operands in the precision of the screen, with the bound on its errors."""
    if plan.operand == x.dtype:
        return with_slack(as_it_is(x), as_it_is(weight), bias, plan)
    x_cast = cast_rows(x, plan.operand)
    if copy is not None and plan.operand == copy.cast.rows.dtype:
        return with_slack(x_cast, copy.cast, bias, plan, copy.unchanged(weight))
    return with_slack(x_cast, cast_rows(weight, plan.operand), bias, plan)


def screen_keys(
    screened: Screened, part: slice, bias: Tensor | None, plan: EncodePlan, slots: Slots | None = None
) -> Tensor:
    """Keys ``[rows, keep, n_buckets]`` of some tokens; of their `slots`, ``[slots, keep, n_buckets / n_owners]``."""
    x, w = screened.x.rows[part], screened.weight.rows
    rows, (n, d), n_buckets = x.shape[0], w.shape, plan.n_buckets
    if slots is not None:
        rows, n, n_buckets = slots.order.shape[0], slots.latents, n_buckets // slots.n_owners
    keys = torch.empty(rows, plan.keep, n_buckets, dtype=torch.float32, device=x.device)
    shared: dict[str, Any] = {"KEEP": plan.keep, "MEMBER_BITS": plan.member_bits, "HAS_BIAS": bias is not None}
    if plan.tile is not None:
        tile = plan.tile
        x_scale, weight_scale = screened.scales(part)
        blocks = triton.cdiv(rows, tile.rows)
        routed: tuple[Any, ...] = (None,) * 6
        if slots is not None:
            blocks += slots.n_experts
            routed = (slots.order, slots.offsets, *slots.tiles(tile.rows), slots.n_active, slots.n_experts)
        launch(
            _screen,
            (blocks * triton.cdiv(n_buckets, tile.buckets),),
            x,
            x_scale,
            w,
            w.stride(0),
            weight_scale,
            bias,
            keys,
            rows,
            n,
            d,
            n_buckets,
            plan.n_members,
            *routed,
            **shared,
            SCALED=weight_scale is not None,
            ABSOLUTE=plan.absolute,
            PRECISION=plan.precision,
            ROUTED=slots is not None,
            ROWS=tile.rows,
            BUCKETS=tile.buckets,
            MEMBERS=tile.members,
            DEPTH=tile.depth,
            GROUP=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return keys
    members = max(1, min(plan.n_members, screening.PANEL_BYTES // (rows * plan.n_buckets * x.element_size())))
    for first in range(0, plan.n_members, members):
        latents = w[first * plan.n_buckets : (first + members) * plan.n_buckets]
        panel = panel_scores(x, latents)
        merge_panel(keys, panel, screened, part, bias, plan, first, min(members, plan.n_members - first))
    return keys


def lowest_scores(keys: Tensor, plan: EncodePlan) -> Tensor:
    """The least score that each key can stand for."""
    bits = keys.view(torch.int32)
    low = (1 << plan.member_bits) - 1
    return torch.where(bits >= 0, bits & ~low, bits | low).view(torch.float32)


def merge_panel(
    keys: Tensor,
    panel: Tensor,
    screened: Screened,
    part: slice,
    bias: Tensor | None,
    plan: EncodePlan,
    first: int,
    members: int,
) -> None:
    """Merge the scores of `members` members of all buckets, from member `first` on, into the keys."""
    rows, buckets = 4, min(256, triton.next_power_of_2(plan.n_buckets))
    grid = (triton.cdiv(keys.shape[0], rows), triton.cdiv(plan.n_buckets, buckets))
    x_scale, weight_scale = screened.scales(part)
    launch(
        _bucket_panel,
        grid,
        panel,
        panel.stride(0),
        x_scale,
        weight_scale,
        bias,
        keys,
        keys.shape[0],
        screened.weight.rows.shape[0],
        plan.n_buckets,
        first,
        members,
        KEEP=plan.keep,
        MEMBER_BITS=plan.member_bits,
        HAS_BIAS=bias is not None,
        SCALED=x_scale is not None,
        ABSOLUTE=plan.absolute,
        FRESH=first == 0,
        ROWS=rows,
        BUCKETS=buckets,
    )


def finish(
    keys: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    screened: Screened,
    part: slice,
    plan: EncodePlan,
    values: Tensor,
    indices: Tensor,
    slots: Slots | None = None,
) -> None:
    """From keys to codes: select, rescore, repair, take. With `slots`, several rows of codes may be of one token."""
    rows, (n, d) = values.shape[0], weight.shape
    owned, experts, owners, share = n, None, None, 1
    if slots is not None:
        owned, experts, owners, share = slots.latents, slots.experts, slots.n_owners, slots.n_active // slots.n_owners
        n = owned * owners
    room, slack = plan.room, screened.slack[part]
    candidates = torch.empty(rows, room, dtype=torch.int32, device=x.device)
    scores = torch.empty(rows, room, dtype=torch.float32, device=x.device)
    count = torch.empty(rows, dtype=torch.int32, device=x.device)
    repaired = torch.zeros(rows, dtype=torch.int32, device=x.device)
    block = triton.next_power_of_2(plan.n_buckets)
    # Rows of a latent or a few, as of every group of a token, are many and have next to nothing to do each.
    few = slots is not None and room <= plans.FEW_ROOM
    launch(
        _select,
        (rows,),
        keys,
        slack,
        candidates,
        scores,
        count,
        experts,
        k,
        owned,
        plan.n_buckets,
        plan.n_members,
        room,
        owners,
        screened.relative,
        KEEP=plan.keep,
        MEMBER_BITS=plan.member_bits,
        HIDES=plan.n_members > plan.keep,
        ROUTED=slots is not None,
        SHARE=share,
        BLOCK=block,
        num_warps=max(1, min(4, block // 256)) if few else 4 if block <= 2048 else 8,
    )
    row_of_weight = (x, x.stride(0), weight, weight.stride(0), bias)
    some = 4 if few else 16
    launch(
        _rescore,
        (rows, 1 if few else triton.cdiv(room, some)),
        *row_of_weight,
        candidates,
        scores,
        count,
        slack,
        d,
        room,
        HAS_BIAS=bias is not None,
        CHECK=plan.statistical,
        ABSOLUTE=plan.absolute,
        FEW=few,
        SHARE=share,
        CANDIDATES=some,
        BLOCK=min(256, max(16, triton.next_power_of_2(d))),
        num_warps=1 if few else 4,
    )
    top = max(16, triton.next_power_of_2(k))
    parts = room // top
    launch(
        _repair,
        (64, parts),
        *row_of_weight,
        candidates,
        scores,
        count,
        repaired,
        experts,
        rows,
        n,
        d,
        room,
        triton.cdiv(n, parts),
        owners,
        HAS_BIAS=bias is not None,
        ABSOLUTE=plan.absolute,
        ROUTED=slots is not None,
        SHARE=share,
        TOP=top,
        TOKENS=128,
        BLOCK=max(16, min(64, 4096 // top)),
        num_warps=8,
    )
    launch(
        _take,
        (rows,),
        candidates,
        scores,
        count,
        repaired,
        values,
        indices,
        k,
        room,
        parts * top,
        ABSOLUTE=plan.absolute,
        TOP=room if few else top,
        ROOM=room,
        num_warps=1 if room <= 512 else 4,
    )
    screening.last.append((count, repaired))

"""Exact top-k encoding by the CUDA C++ kernels: screen, select, rescore, repair, take.

The algorithm, its keys and its certificate are those of the Triton backend (:mod:`sparsekern.backends.triton.encode`).
What differs is who screens:

==========  ===========================================================================================================
*fused*     csrc/cuda/screen.h, on sm_90a: operands of 16 or 8 bits, in whole tiles of 8 buckets and 16 members. The
            copy that is made of float32 weights gets rows of zeros up to them; weights that are screened as they are
            have to fill them.
*chunked*   A library matmul over one panel of latents after the other, elsewhere.
==========  ===========================================================================================================

Routed calls that the fused screen does not serve go to whom the backend has for what it lacks. csrc/cuda/candidates.h
has what comes after the screen, and counts the bytes by which rescoring goes token by token or latent by latent.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsekern.backends import reference, screening
from sparsekern.backends.cuda import _library
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
    last_encode,
    panel_scores,
    register,
    with_slack,
)
from sparsekern.backends.triton import plans
from sparsekern.backends.triton.plans import SCREEN_DTYPE, EncodePlan

__all__ = ["encode_plan", "last_encode", "quantized", "routed_plan", "routed_topk_encode", "serves", "topk_encode"]

MOST_ROW_BYTES = 2**17
"""The longest row of activations or weights: one is held in a block's shared memory."""

SPARE_ROWS = 1024
"""Results of parts of rows to be repaired that there is room for, at least: few such rows are split into many parts."""

OFTEN = 4
"""How often a latent is a candidate, on average, from where on candidates are rescored latent by latent."""

FAR_BEYOND_CACHE = 2**28
"""Bytes of a weight that is: rows that are met again are seldom still there."""

CLUSTER = 2
"""Blocks of the fused screen that share what they read of the weight. Not measured yet."""

SLOTS_OF_A_TILE = 128
"""Of the fused screen, where calls are routed."""

_SCREENS = ("auto", "none", "bf16", "fp16", "tf32", "fp8")


def serves(op: str, device: torch.device, dtype: torch.dtype, screen: str) -> str | None:
    """Why this module cannot serve `op` on `device` with `screen`; None when it can. The dtypes are the backend's."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else plans.assumed_capability
    if (major, minor) < (8, 0):
        return f"needs compute capability 8.0, this device has {major}.{minor}"
    if screen not in _SCREENS or (screen == "fp8" and op != "topk_encode"):
        return f"has no {screen} screening for {op}; use screen='auto', 'fp16' or 'none'"
    if screen == "fp8" and (major, minor) != (9, 0):
        return f"fp8 screening needs compute capability 9.0, this device has {major}.{minor}"
    return None


# Plans


def encode_plan(
    rows: int,
    d: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    screen: str,
    capability: tuple[int, int],
    *,
    has_copy: bool,
    path: str = "auto",
) -> EncodePlan | None:
    """As :func:`.plans.encode_plan`; the fused screen where it serves such a call, unless `path` is ``"chunked"``."""
    call = (rows, d, n, k, dtype)
    if path != "chunked":
        plan = plans.encode_plan(*call, screen, capability, has_copy=has_copy, path="fused")
        tiles = plans.whole_tiles(n, k)
        if plan is not None and tiles is not None and _has_tiles(plan.operand, d, capability):
            n_buckets, n_members, keep, room = tiles
            if plan.operand != dtype or n == n_buckets * n_members:
                return plan._replace(n_buckets=n_buckets, n_members=n_members, keep=keep, room=room)
    screen = "fp16" if screen == "fp8" else screen  # fp8 has no library matmul
    return plans.encode_plan(*call, screen, capability, has_copy=has_copy, path="chunked")


def routed_plan(
    tokens: int,
    n_active: int,
    n_experts: int,
    d: int,
    latents: int,
    k: int,
    dtype: torch.dtype,
    screen: str,
    capability: tuple[int, int],
    *,
    has_copy: bool,
    per_expert: bool,
) -> EncodePlan | None:
    """As :func:`.plans.routed_plan`; None where the fused screen does not serve such a call. It has no tf32."""
    if dtype == torch.float32 and screen != "bf16":
        screen = "fp16"
    call = (tokens, n_active, n_experts, d, latents, k, dtype, screen, capability)
    plan = plans.routed_plan(*call, has_copy=has_copy, per_expert=per_expert)
    tiles = plans.routed_tiles(latents, 1 if per_expert else n_active, k)
    if plan is None or tiles is None or not _has_tiles(plan.operand, d, capability):
        return None
    across, n_members, keep, room = tiles
    owners = 1 if per_expert else n_active
    return plan._replace(n_buckets=owners * across, n_members=n_members, keep=keep, room=room)


def _has_tiles(operand: torch.dtype, d: int, capability: tuple[int, int]) -> bool:
    """Whether the fused screen can load rows of such operands."""
    return capability == (9, 0) and operand != torch.float32 and d * operand.itemsize % 16 == 0


# Rows in the precision of the screen


def cast_rows(rows: Tensor, dtype: torch.dtype, zeros: int = 0) -> Cast:
    """`rows` ``[n, d]`` rounded to `dtype`, with `zeros` rows of zeros after them; float16 and fp8 with scales."""
    n, d = rows.shape
    limit = LIMITS.get(dtype, 0.0)
    out = torch.empty(n + zeros, d, dtype=dtype, device=rows.device)
    scale, norm, error = (torch.empty(n + zeros, dtype=torch.float32, device=rows.device) for _ in range(3))
    kernels, stream = _kernels(rows)
    arguments = (*(t.data_ptr() for t in (out, scale, norm, error)), limit, n + zeros, stream)
    kernels.cast_rows(_name(rows), _rows(rows), n, d, _name(out), *arguments)
    return Cast(out[:n], scale[:n] if limit else None, norm[:n], error[:n])


def quantized(weight: Tensor, screen: str = "auto") -> Quantized:
    """A copy of `weight` for the caller to own, which :func:`topk_encode` uses with `screen` while it is current."""
    tiles = plans.whole_tiles(weight.shape[0], 1)  # the longest buckets that any k has
    zeros = 0 if tiles is None else 8 * tiles[1]
    return register(Quantized(weight, cast_rows(weight.detach(), copy_dtype(screen), zeros), zeros))


def screen_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: EncodePlan, copy: Quantized | None
) -> Screened:
    """Both operands in the precision of the screen, with the bound on its errors."""
    if plan.operand == x.dtype:
        return with_slack(as_it_is(x), as_it_is(weight), bias, plan)
    x_cast = cast_rows(x, plan.operand)
    zeros = plan.n_buckets * plan.n_members - len(weight) if plan.tile is not None else 0
    if copy is not None and plan.operand == copy.cast.rows.dtype and copy.zeros >= zeros:
        return with_slack(x_cast, copy.cast, bias, plan, copy.unchanged(weight))
    return with_slack(x_cast, cast_rows(weight, plan.operand, max(0, zeros)), bias, plan)


# Encoding


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, screen: str, path: str = "auto", absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.topk_encode`; `path` as for :func:`encode_plan`."""
    rows, (n, d) = x.shape[0], weight.shape
    x, weight = _even(x.contiguous()), weight if weight.stride(1) == 1 or d == 1 else weight.contiguous()
    copy = current_copy(weight)
    has_copy = copy is not None and copy.cast.rows.dtype == SCREEN_DTYPE
    if x.dtype != torch.float32 and not _is_even(weight):
        path = "chunked"
    plan = encode_plan(rows, d, n, k, x.dtype, screen, capability(x), has_copy=has_copy, path=path)
    if plan is None or d * x.element_size() > MOST_ROW_BYTES:
        return reference.topk_encode(x, weight, bias, k, "none", absolute)
    plan, bias = plan._replace(absolute=absolute), None if bias is None else bias.contiguous()
    screened = screen_operands(x, weight, bias, plan, copy)
    values, indices = x.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int32, device=x.device)
    screening.last.clear()
    for part in chunks(rows, _row_bytes(plan, k)):
        keys = screen_keys(screened, part, bias, plan)
        finish(keys, x[part], weight, bias, k, screened, part, plan, values[part], indices[part])
    return values, indices


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
    latents = n // n_experts
    copy = current_copy(weight)
    plan = routed_plan(
        rows,
        n_active,
        n_experts,
        d,
        latents,
        k,
        x.dtype,
        screen,
        capability(x),
        has_copy=copy is not None and copy.cast.rows.dtype == SCREEN_DTYPE,
        per_expert=per_expert,
    )
    x, weight = _even(x.contiguous()), weight if weight.stride(1) == 1 or d == 1 else weight.contiguous()
    as_stored = x.dtype != torch.float32
    if plan is None or d * x.element_size() > MOST_ROW_BYTES or (as_stored and not _is_even(weight)):
        other = _stand_in(x)
        return other.routed_topk_encode(x, weight, bias, experts, order, offsets, k, per_expert, "none")
    experts, bias = experts.contiguous(), None if bias is None else bias.contiguous()
    screened = screen_operands(x, weight, bias, plan, copy)
    selections = n_active if per_expert else 1  # of a token
    values = x.new_empty(rows, selections * k)
    indices = torch.empty(rows, selections * k, dtype=torch.int32, device=x.device)
    screening.last.clear()
    gathered = n_active * d * plan.operand.itemsize  # a token's row, once for each of its slots
    for part in chunks(rows, selections * _row_bytes(plan, k) + gathered):
        mine = experts[part]
        if len(mine) < rows:
            order, offsets = _stand_in(x).group_slots(mine, n_experts)
        slots = Slots(mine.view(len(mine) * selections, -1), order, offsets, n_active, latents)
        keys = screen_keys(screened, part, bias, plan, slots)
        found = values[part].view(-1, k), indices[part].view(-1, k)
        finish(keys, x[part], weight, bias, k, screened, part, plan, *found, slots)
    return values, indices


def _stand_in(x: Tensor) -> Any:
    """The backend that has the kernels which this one lacks."""
    if not x.is_cuda:
        return reference
    from sparsekern.backends import triton

    return triton


def _row_bytes(plan: EncodePlan, k: int) -> int:
    """Workspace of a row: keys, candidates with their scores and in order of latents, and what repair leaves of it."""
    return 4 * plan.n_buckets * plan.keep + 20 * plan.room + 8 * k


def _is_even(rows: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes."""
    return rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.element_size() % 16 == 0


def _even(x: Tensor) -> Tensor:
    """Contiguous rows, the first of them at a multiple of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


# Keys


def screen_keys(
    screened: Screened, part: slice, bias: Tensor | None, plan: EncodePlan, slots: Slots | None = None
) -> Tensor:
    """Keys ``[rows, keep, n_buckets]`` of some tokens; of their `slots`, ``[slots, keep, n_buckets / n_owners]``."""
    x, w = screened.x.rows[part], screened.weight.rows
    rows = x.shape[0] if slots is None else slots.order.shape[0]
    n_buckets = plan.n_buckets if slots is None else plan.n_buckets // slots.n_owners
    keys = torch.empty(rows, plan.keep, n_buckets, dtype=torch.float32, device=x.device)
    if plan.tile is not None:
        fused_keys(keys, screened, part, bias, plan, slots)
        return keys
    members = max(1, min(plan.n_members, screening.PANEL_BYTES // (rows * n_buckets * x.element_size())))
    for first in range(0, plan.n_members, members):
        panel = panel_scores(x, w[first * n_buckets : (first + members) * n_buckets])
        merge_panel(keys, panel, screened, part, bias, plan, first, min(members, plan.n_members - first))
    return keys


def fused_keys(
    keys: Tensor, screened: Screened, part: slice, bias: Tensor | None, plan: EncodePlan, slots: Slots | None
) -> None:
    """Write all keys, by one matmul that leaves no scores."""
    kernels, stream = _kernels(keys)
    x, w = screened.x.rows[part], screened.weight.rows
    x_scale, weight_scale = screened.scales(part)
    n_buckets, n_real, routed = keys.shape[2], len(w), None
    if slots is not None:
        gathered = x.new_empty(len(slots.order), x.shape[1])
        row_bytes, from_bytes = (rows.stride(0) * rows.element_size() for rows in (gathered, x))
        order = slots.order.data_ptr()
        kernels.gather_rows(
            x.data_ptr(), from_bytes, order, slots.n_active, gathered.data_ptr(), len(gathered), row_bytes, stream
        )
        tables = slots.tiles(SLOTS_OF_A_TILE)
        routed = (order, slots.offsets.data_ptr(), *map(_address, tables), slots.n_active, slots.n_experts)
        x, n_real = gathered, slots.latents
    kernels.screen(
        _name(x),
        *_rows(x),
        _address(x_scale),
        *_rows(w),
        _address(weight_scale),
        _address(bias),
        _name(x if bias is None else bias),
        keys.data_ptr(),
        rows=len(x),
        d=x.shape[1],
        n_real=n_real,
        n_buckets=n_buckets,
        n_members=plan.n_members,
        keep=plan.keep,
        absolute=plan.absolute,
        cluster=CLUSTER if slots is None else 1,
        stream=stream,
        slots=routed,
    )


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
    kernels, stream = _kernels(panel)
    x_scale, weight_scale = screened.scales(part)
    kernels.bucket_panel(
        _name(panel),
        _rows(panel),
        _address(x_scale),
        _address(weight_scale),
        _address(bias),
        _name(panel if bias is None else bias),
        len(keys),
        len(screened.weight.rows),
        first,
        members,
        plan.absolute,
        _keys(keys, plan),
        stream,
    )


# From keys to codes


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
    kernels, stream = _kernels(x)
    owners, share = (0, 1, n), 1
    if slots is not None:
        owners, share = (slots.experts.data_ptr(), slots.n_owners, slots.latents), slots.n_active // slots.n_owners
    slack = screened.slack[part]
    check = slack.data_ptr() if plan.statistical else 0
    latents = torch.empty(rows, plan.room, dtype=torch.int32, device=x.device)
    scores = torch.empty(rows, plan.room, dtype=torch.float32, device=x.device)
    count, repaired = (torch.empty(rows, dtype=torch.int32, device=x.device) for _ in range(2))
    waiting = torch.zeros(1 + rows, dtype=torch.int32, device=x.device)
    candidates = (rows, plan.room, share, *(t.data_ptr() for t in (latents, scores, count, repaired, waiting)))
    operands = (_name(x), _rows(x), _rows(weight), _address(bias), d, plan.absolute)

    kernels.select_candidates(_keys(keys, plan), slack.data_ptr(), screened.relative, k, owners, candidates, stream)
    if by_latent(rows, k, weight):
        starts = torch.zeros(n + 1, dtype=torch.int32, device=x.device)
        kernels.count_by_latent(candidates, starts.data_ptr(), stream)
        starts = starts.cumsum(0, dtype=torch.int32)
        pairs = torch.empty(rows, plan.room, 2, dtype=torch.int32, device=x.device)
        sums = torch.empty_like(scores)
        sorted_ = (starts.data_ptr(), n, pairs.data_ptr(), sums.data_ptr())
        kernels.rescore_by_latent(operands, candidates, check, *sorted_, stream)
    else:
        kernels.rescore(operands, candidates, check, stream)
    spare = torch.empty(max(rows, SPARE_ROWS), k, dtype=torch.int64, device=x.device)
    kernels.repair(operands, owners, candidates, k, spare.data_ptr(), len(spare), stream)
    out = (values.data_ptr(), indices.data_ptr(), stream)
    kernels.take_best(_name(values), candidates, k, plan.absolute, spare.data_ptr(), len(spare), *out)
    screening.last.append((count, repaired))


def by_latent(rows: int, k: int, weight: Tensor) -> bool:
    """Whether to rescore latent by latent: csrc/cuda/candidates.h counts what that spares.

    About one and a half times `k` latents a row are candidates.
    """
    return 1.5 * k * rows >= OFTEN * len(weight) and weight.numel() * weight.element_size() >= FAR_BEYOND_CACHE


# Arguments of the kernels


def _kernels(tensor: Tensor) -> tuple[ModuleType, int]:
    return _library.module_for(tensor), _library.stream_of(tensor)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.stride(0)


def _keys(keys: Tensor, plan: EncodePlan) -> tuple[int, int, int, int, int]:
    return keys.data_ptr(), plan.n_buckets, plan.n_members, plan.keep, plan.member_bits

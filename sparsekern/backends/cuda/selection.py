"""The k largest of each row, exactly, in one pass over memory (csrc/cuda/row_topk.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekern.backends.cuda import _library

MOST_K = 1024
MOST_KEYS = 2**30

_ELEMENT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def row_topk(keys: Tensor, k: int, *, passes: Tensor | None = None, plan: Any = None) -> tuple[Tensor, Tensor]:
    """The k largest keys of each row and where they are.

    As ``torch.topk(keys, k, dim=1)`` with an order for ties, and deterministic. NaN counts as the largest number and
    comes back as a NaN, not always with the same bits; -0 equals 0, and comes back as 0.

    Parameters
    ----------
    keys
        ``[rows, n]`` float32, bfloat16 or float16, with n up to 2³⁰. Rows that are contiguous in themselves are read in
        place, at any distance from each other.
    k
        From 1 to n, and at most 1024.
    passes
        ``[rows]`` int32, contiguous: receives how often each row was read. 1 except where the sample of a row misled.
    plan
        The ``RowTopkPlan`` to follow instead of the module's ``row_topk_plan(rows, n, k, bytes of a key)``. Every plan
        gives the same answer.

    Returns
    -------
    values, indices
        ``[rows, k]`` in the dtype of `keys`, falling, and ``[rows, k]`` int32; equal keys by rising index.

    Raises
    ------
    ValueError
        If shapes, dtypes, k or the plan are not such.
    """
    if keys.ndim != 2 or keys.dtype not in _ELEMENT:
        raise ValueError(
            f"keys must be [rows, n] float32, bfloat16 or float16, got {list(keys.shape)} {keys.dtype}",
        )
    rows, n = keys.shape
    if not 1 <= k <= min(n, MOST_K):
        raise ValueError(f"k must be from 1 to the {n} keys of a row, and at most {MOST_K}, got {k}")
    if n > MOST_KEYS:
        raise ValueError(f"keys must have at most 2**30 columns, got {n}")
    if passes is not None and (passes.shape != (rows,) or passes.dtype != torch.int32 or not passes.is_contiguous()):
        raise ValueError(f"passes must be [{rows}] int32 and contiguous, got {list(passes.shape)} {passes.dtype}")
    if keys.stride(1) != 1 and n > 1:
        keys = keys.contiguous()

    values = keys.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.int32, device=keys.device)
    module = _library.module_for(keys)
    if plan is None:
        plan = module.row_topk_plan(rows, n, k, keys.element_size())
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=keys.device)
    module.row_topk(
        keys.data_ptr(),
        _ELEMENT[keys.dtype],
        rows,
        n,
        keys.stride(0),
        k,
        values.data_ptr(),
        indices.data_ptr(),
        0 if passes is None else passes.data_ptr(),
        workspace.data_ptr(),
        plan,
        _library.stream_of(keys),
    )
    return values, indices

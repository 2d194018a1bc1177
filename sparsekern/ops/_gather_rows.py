"""``gather_rows``: rows of a weight, with a gradient that costs in proportion to those rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops._sparse_decode import weight_gradient


@torch.library.custom_op("sparsekern::gather_rows", mutates_args=())
def gather_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """``weight[rows]`` for distinct `rows` ``[n]`` int64 of ``weight [d_sae, d]``."""
    return weight.index_select(0, rows)


@gather_rows.register_fake
def _(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.new_empty(rows.shape[0], weight.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    weight, rows = ctx.saved_tensors
    # The rows' gradient is a sum of outer products with one slot a row, of value 1.
    return weight_gradient(weight, grad.new_ones(grad.shape[0], 1), rows.int().unsqueeze(1), grad), None


gather_rows.register_autograd(_backward, setup_context=_setup_context)

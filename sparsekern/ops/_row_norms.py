"""``row_norms``: the norms of a weight's rows, with a gradient that can be kept as factors."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops._sparse_decode import weight_gradient


@torch.library.custom_op("sparsekern::row_norms", mutates_args=())
def row_norms(weight: Tensor, parts: int = 1) -> Tensor:
    """Norms of each of the `parts` neighbouring parts of every row of `weight` ``[n, d]``: ``[n, parts]``.

    In float32 at least. Not differentiable at a row of zeros, which gets the gradient 0. Of one part the factors of the
    gradient are the weight itself; of several a tensor of its size is made.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.reshape(weight.shape[0], parts, -1), dim=2, dtype=work)


@row_norms.register_fake
def _(weight: Tensor, parts: int = 1) -> Tensor:
    return weight.new_empty(weight.shape[0], parts, dtype=torch.promote_types(weight.dtype, torch.float32))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    weight, norms = ctx.saved_tensors
    values = (grad / norms.clamp_min(torch.finfo(norms.dtype).tiny)).to(weight.dtype)
    vectors = weight
    if norms.shape[1] > 1:
        vectors = (values.unsqueeze(2) * weight.view(*norms.shape, -1)).view(weight.shape)
        values = values.new_ones(weight.shape[0], 1)
    # A sum of outer products with one slot a row: that row of the weight itself.
    rows = torch.arange(weight.shape[0], dtype=torch.int32, device=weight.device).unsqueeze(1)
    return weight_gradient(weight, values, rows, vectors), None


row_norms.register_autograd(_backward, setup_context=_setup_context)

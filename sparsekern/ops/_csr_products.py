"""The sparse products of :mod:`sparsekern.ops._sparse_decode` for CSR codes.

``T(v, W, g) = Σ_e v[e] · ⟨W[col[e]], g[row(e)]⟩`` over the entries e: ``csr_decode = ∂T/∂g``, ``csr_gather_dot =
∂T/∂v``, ``csr_scatter_outer = ∂T/∂W``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.factors import OuterProducts, keep
from sparsekern.ops._checks import check_csr


@torch.library.custom_op("sparsekern::csr_decode", mutates_args=())
def csr_decode(values: Tensor, crow: Tensor, col: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``out[b] = bias + Σ values[e] · weight[col[e]]`` over the entries e of row b, ``[B, d]``."""
    if col.device.type == "cpu":
        check_csr(crow, col, weight.shape[0])
    backend = choose("csr_decode", weight)
    with torch.autocast(weight.device.type, enabled=False):
        return backend.csr_decode(values, crow, col, weight, bias)


@torch.library.custom_op("sparsekern::csr_gather_dot", mutates_args=())
def csr_gather_dot(grad: Tensor, crow: Tensor, col: Tensor, weight: Tensor) -> Tensor:
    """``out[e] = ⟨weight[col[e]], grad[row of e]⟩``, ``[nnz]``."""
    if col.device.type == "cpu":
        check_csr(crow, col, weight.shape[0])
    backend = choose("csr_gather_dot", weight)
    with torch.autocast(weight.device.type, enabled=False):
        return backend.csr_gather_dot(grad, crow, col, weight)


@torch.library.custom_op("sparsekern::csr_scatter_outer", mutates_args=())
def csr_scatter_outer(values: Tensor, crow: Tensor, col: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    """``out[i] = Σ values[e] · grad[row of e]`` over all entries with ``col[e] == i``, ``[d_sae, d]``."""
    if col.device.type == "cpu":
        check_csr(crow, col, d_sae)
    backend = choose("csr_scatter_outer", grad)
    with torch.autocast(grad.device.type, enabled=False):
        return backend.csr_scatter_outer(values, crow, col, grad, d_sae)


@csr_decode.register_fake
def _(values: Tensor, crow: Tensor, col: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return values.new_empty(crow.shape[0] - 1, weight.shape[1])


@csr_gather_dot.register_fake
def _(grad: Tensor, crow: Tensor, col: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty(col.shape)


@csr_scatter_outer.register_fake
def _(values: Tensor, crow: Tensor, col: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    return grad.new_empty(d_sae, grad.shape[1])


def csr_weight_gradient(weight: Tensor, values: Tensor, crow: Tensor, col: Tensor, vectors: Tensor) -> Tensor | None:
    """Gradient of a weight from its factors; None where they were kept as such (:mod:`sparsekern.factors`)."""
    if keep(weight, OuterProducts(values, col, vectors, crow)):
        return None
    return csr_scatter_outer(values, crow, col, vectors, weight.shape[0])


def _save_decode(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4])
    ctx.has_bias = inputs[4] is not None


def _decode_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    values, crow, col, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        csr_gather_dot(grad, crow, col, weight) if needs[0] else None,
        None,
        None,
        csr_weight_gradient(weight, values, crow, col, grad) if needs[3] else None,
        grad.sum(0) if ctx.has_bias and needs[4] else None,
    )


def _save_four(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4])


def _gather_backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    grad, crow, col, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        csr_decode(grad_out, crow, col, weight, None) if needs[0] else None,
        None,
        None,
        csr_weight_gradient(weight, grad_out, crow, col, grad) if needs[3] else None,
    )


def _scatter_backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    values, crow, col, grad = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        csr_gather_dot(grad, crow, col, grad_out) if needs[0] else None,
        None,
        None,
        csr_decode(values, crow, col, grad_out, None) if needs[3] else None,
        None,
    )


csr_decode.register_autograd(_decode_backward, setup_context=_save_decode)
csr_gather_dot.register_autograd(_gather_backward, setup_context=_save_four)
csr_scatter_outer.register_autograd(_scatter_backward, setup_context=_save_four)

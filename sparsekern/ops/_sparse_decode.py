"""``sparse_decode`` and its two adjoints.

With ``T(v, W, g) = Σ_{b,j} v[b,j] · ⟨W[i[b,j]], g[b]⟩`` the three ops are the partial derivatives of one trilinear
form: ``sparse_decode = ∂T/∂g``, ``gather_dot = ∂T/∂v``, ``scatter_outer = ∂T/∂W``. So each one's gradients are the
other two, to any order, and a backend that serves these three serves every backward pass of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import CSRCodes, SparseCodes
from sparsekern.factors import OuterProducts, keep
from sparsekern.ops._checks import (
    check_floating,
    check_indices,
    check_matrix,
    check_same_device,
    check_vector,
)
from sparsekern.ops._csr_products import csr_decode, csr_scatter_outer


def sparse_decode(codes: SparseCodes | CSRCodes, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Reconstruction from sparse codes: ``Σ_j values_j · W_dec[indices_j] + b_dec`` over a token's codes.

    Differentiable in the values, `W_dec` and `b_dec`. Sums are made in float32 (float64 for float64 input), whatever
    the dtype of storage.

    Parameters
    ----------
    codes : SparseCodes or CSRCodes
        Values ``[..., k]`` and indices ``[..., k]`` int32 in ``[0, d_sae)``, or ``crow [B + 1]`` int64, ``col [nnz]``
        int32 and ``values [nnz]``. Indices and row starts are checked at once on the CPU.
    W_dec : Tensor [d_sae, d_out]
        Decoder, one row a latent.
    b_dec : Tensor [d_out] or None
        Decoder bias.

    Returns
    -------
    Tensor [..., d_out], or [B, d_out] for CSR codes
        In the promoted dtype of the values and `W_dec`.

    Raises
    ------
    ValueError
        On a wrong shape, dtype or device, and on indices or row starts out of range.
    """
    values = codes.values
    check_floating(values=values, W_dec=W_dec, b_dec=b_dec)
    check_matrix("W_dec", W_dec)
    if W_dec.shape[0] != codes.d_sae:
        raise ValueError(f"W_dec must have {codes.d_sae} rows (d_sae of codes), got shape {tuple(W_dec.shape)}")
    check_vector("b_dec", b_dec, ("d_out of W_dec", W_dec.shape[1]))
    dtype = torch.promote_types(values.dtype, W_dec.dtype)
    weight, bias = W_dec.to(dtype), None if b_dec is None else b_dec.to(dtype)
    if isinstance(codes, CSRCodes):
        for name, tensor, of in (("crow", codes.crow, torch.int64), ("col", codes.col, torch.int32)):
            if tensor.dim() != 1 or tensor.dtype != of:
                raise ValueError(f"codes.{name} must be 1-D {of}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
        if values.shape != codes.col.shape:
            raise ValueError(
                "codes.values and codes.col must both be [nnz], "
                f"got shapes {tuple(values.shape)} and {tuple(codes.col.shape)}"
            )
        check_same_device(crow=codes.crow, col=codes.col, values=values, W_dec=W_dec, b_dec=b_dec)
        return csr_decode(values.to(dtype), codes.crow, codes.col, weight, bias)
    indices = codes.indices
    if values.shape != indices.shape or values.dim() == 0:
        raise ValueError(
            "codes.values and codes.indices must both be [..., k], "
            f"got shapes {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if indices.dtype != torch.int32:
        raise ValueError(f"codes.indices must be int32, got {indices.dtype}; use codes.indices.int()")
    check_same_device(values=values, indices=indices, W_dec=W_dec, b_dec=b_dec)
    k = values.shape[-1]
    out = _sparse_decode(values.reshape(-1, k).to(dtype), indices.reshape(-1, k), weight, bias)
    return out.reshape(*values.shape[:-1], W_dec.shape[1])


@torch.library.custom_op("sparsekern::sparse_decode", mutates_args=())
def _sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if indices.device.type == "cpu":
        check_indices(indices, weight.shape[0])
    backend = choose("sparse_decode", weight)
    with torch.autocast(weight.device.type, enabled=False):
        return backend.sparse_decode(values, indices, weight, bias)


@torch.library.custom_op("sparsekern::gather_dot", mutates_args=())
def _gather_dot(grad: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    if indices.device.type == "cpu":
        check_indices(indices, weight.shape[0])
    backend = choose("gather_dot", weight)
    with torch.autocast(weight.device.type, enabled=False):
        return backend.gather_dot(grad, indices, weight)


@torch.library.custom_op("sparsekern::scatter_outer", mutates_args=())
def _scatter_outer(values: Tensor, indices: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    if indices.device.type == "cpu":
        check_indices(indices, d_sae)
    backend = choose("scatter_outer", grad)
    with torch.autocast(grad.device.type, enabled=False):
        return backend.scatter_outer(values, indices, grad, d_sae)


@_sparse_decode.register_fake
def _(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return values.new_empty(values.shape[0], weight.shape[1])


@_gather_dot.register_fake
def _(grad: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty(indices.shape)


@_scatter_outer.register_fake
def _(values: Tensor, indices: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    return grad.new_empty(d_sae, grad.shape[1])


def weight_gradient(weight: Tensor, values: Tensor, indices: Tensor, vectors: Tensor) -> Tensor | None:
    """Gradient of a weight from its factors; None where they were kept as such (:mod:`sparsekern.factors`)."""
    if keep(weight, OuterProducts(values, indices, vectors)):
        return None
    return _scatter_outer(values, indices, vectors, weight.shape[0])


def sum_of_outer_products(product: OuterProducts, d_sae: int) -> Tensor:
    """What the factors stand for, ``[d_sae, d]``."""
    values, indices, vectors, crow = product
    if crow is None:
        return _scatter_outer(values, indices, vectors, d_sae)
    return csr_scatter_outer(values, crow, indices, vectors, d_sae)


# Autograd. Each setup saves the inputs; each backward computes only what is asked for.


def _save_decode(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, indices, weight, bias = inputs
    ctx.save_for_backward(values, indices, weight)
    ctx.has_bias = bias is not None


def _decode_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    values, indices, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _gather_dot(grad, indices, weight) if needs[0] else None,
        None,
        weight_gradient(weight, values, indices, grad) if needs[2] else None,
        grad.sum(0) if ctx.has_bias and needs[3] else None,
    )


def _save_gather(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gather_backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    grad, indices, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _sparse_decode(grad_out, indices, weight, None) if needs[0] else None,
        None,
        weight_gradient(weight, grad_out, indices, grad) if needs[2] else None,
    )


def _save_scatter(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3])


def _scatter_backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    values, indices, grad = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _gather_dot(grad, indices, grad_out) if needs[0] else None,
        None,
        _sparse_decode(values, indices, grad_out, None) if needs[2] else None,
        None,
    )


_sparse_decode.register_autograd(_decode_backward, setup_context=_save_decode)
_gather_dot.register_autograd(_gather_backward, setup_context=_save_gather)
_scatter_outer.register_autograd(_scatter_backward, setup_context=_save_scatter)

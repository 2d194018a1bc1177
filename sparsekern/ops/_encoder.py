"""What the encoder ops share: the checks of their arguments, the centring of `x`, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.ops._checks import (
    SCREENS,
    check_finite,
    check_floating,
    check_matrix,
    check_same_device,
    check_vector,
)
from sparsekern.ops._csr_products import csr_decode, csr_scatter_outer, csr_weight_gradient


def encoder_arguments(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None, screen: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``x [B, d_in]``, `W_enc`, `b_enc` and `center`, checked and in one dtype."""
    check_floating(x=x, W_enc=W_enc, b_enc=b_enc, center=center)
    check_matrix("W_enc", W_enc)
    if x.dim() == 0 or x.shape[-1] != W_enc.shape[1]:
        raise ValueError(f"x must have {W_enc.shape[1]} columns (d_in of W_enc), got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
    check_vector("b_enc", b_enc, ("d_sae of W_enc", W_enc.shape[0]))
    check_vector("center", center, ("d_in of W_enc", W_enc.shape[1]))
    check_same_device(x=x, W_enc=W_enc, b_enc=b_enc, center=center)
    if screen not in SCREENS:
        raise ValueError(f"screen must be one of {', '.join(SCREENS)}, got {screen!r}")
    dtype = torch.promote_types(x.dtype, W_enc.dtype)
    bias = None if b_enc is None else b_enc.to(dtype)
    middle = None if center is None else center.to(dtype)
    return x.reshape(-1, x.shape[-1]).to(dtype), W_enc.to(dtype), bias, middle


def centred(x: Tensor, center: Tensor | None) -> Tensor:
    """``x − center``, which must be finite: checked at once on the CPU."""
    result = x if center is None else x - center
    if x.device.type == "cpu":
        check_finite("x" if center is None else "x - center", result)
    return result


def encoder_gradients(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    center: Tensor | None,
    decode: Callable[[], Tensor],
    scatter: Callable[[Tensor], Tensor],
    weight_gradient: Callable[[Tensor], Tensor | None],
    tiny: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of an encoder's inputs `x`, `weight`, `bias` and `center`, from those of the codes, ``dz``.

    ``dx[b] = Σ_j dz_j W[i_j]``, ``dW[i] = Σ dz (x − c)``, ``db[i] = Σ dz``, ``dc = −Σ_b dx[b]``.

    Parameters
    ----------
    ctx
        ``has_bias`` says whether there is a bias.
    x, weight, center
        As they were saved. The caller unpacks them: gradient checkpointing allows it only once.
    decode
        Makes ``dx``.
    scatter
        From vectors ``[B, d]`` to ``Σ dz · vectors[b]`` over the codes with latent i, ``[d_sae, d]``.
    weight_gradient
        The same, or None where the sum is kept as its factors.
    tiny
        Whether the codes are so few that decoding them costs less than a pass over ``[d_sae]``.
    """
    needs_x, needs_weight, needs_bias, needs_center = ctx.needs_input_grad[:4]
    needs_bias = ctx.has_bias and needs_bias
    dx = dw = db = dc = None
    # The gradient of the centre needs no dx of its own: Σ_b dx[b] = db @ W.
    through_bias = needs_center and not needs_x and not tiny
    if needs_x or (needs_center and not through_bias):
        dx = decode()
    if needs_weight:
        dw = weight_gradient(x if center is None else x - center)
    if needs_bias or through_bias:
        db = scatter(x.new_ones(x.shape[0], 1)).squeeze(1)
    if needs_center:
        with torch.autocast(x.device.type, enabled=False):
            dc = -_weighted_row_sum(db, weight) if dx is None else -dx.sum(0)
    return dx if needs_x else None, dw, db if needs_bias else None, dc


def csr_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    """Saves what :func:`csr_backward` needs."""
    x, weight, bias, center, _, _ = inputs
    values, crow, col = output
    ctx.mark_non_differentiable(crow, col)
    ctx.save_for_backward(x, weight, center, values, crow, col)
    ctx.has_bias = bias is not None


def csr_backward(ctx, grad_values: Tensor, _crow, _col):  # type: ignore[no-untyped-def]
    """The backward pass of an encoder ``(x, weight, bias, center, …, screen) -> (values, crow, col)``."""
    x, weight, center, values, crow, col = ctx.saved_tensors
    dz = torch.where(values != 0, grad_values, 0)
    gradients = encoder_gradients(
        ctx,
        x,
        weight,
        center,
        decode=lambda: csr_decode(dz, crow, col, weight, None),
        scatter=lambda vectors: csr_scatter_outer(dz, crow, col, vectors, weight.shape[0]),
        weight_gradient=lambda vectors: csr_weight_gradient(weight, dz, crow, col, vectors),
    )
    return *gradients, None, None


@torch.library.custom_op("sparsekern::weighted_row_sum", mutates_args=())
def _weighted_row_sum(coefficients: Tensor, weight: Tensor) -> Tensor:
    """``coefficients @ weight``; backends read only the rows whose coefficient is not zero."""
    backend = choose("weighted_row_sum", weight)
    return backend.weighted_row_sum(coefficients, weight)


@_weighted_row_sum.register_fake
def _(coefficients: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[1])


def _setup_weighted(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _weighted_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    coefficients, weight = ctx.saved_tensors
    return weight @ grad, torch.outer(coefficients, grad)


_weighted_row_sum.register_autograd(_weighted_backward, setup_context=_setup_weighted)

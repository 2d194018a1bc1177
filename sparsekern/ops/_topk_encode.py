"""``topk_encode``: the k largest pre-activations of every token, without the ``B × N`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import SparseCodes
from sparsekern.ops._checks import (
    SCREENS,
    check_finite,
    check_floating,
    check_k,
    check_matrix,
    check_same_device,
    check_vector,
)
from sparsekern.ops._sparse_decode import _scatter_outer, _sparse_decode, weight_gradient


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, screen: str = "auto", center: Tensor | None = None
) -> SparseCodes:
    """The top k of ``ReLU((x − center) @ W_enc.T + b_enc)`` in every row, exactly.

    Pre-activations are compared in float32 (float64 for float64 input), whatever the dtype of storage; autocast does
    not lower that. Ties go to the lower index. The ReLU comes after the selection: a row with fewer than k positive
    pre-activations has zero-valued slots, and those carry no gradient. Differentiable in `x`, `W_enc`, `b_enc` and
    `center`.

    Parameters
    ----------
    x : Tensor [..., d_in]
        Activations. Must be finite: checked at once on the CPU.
    W_enc : Tensor [d_sae, d_in]
        Encoder, one row a latent.
    b_enc : Tensor [d_sae] or None
        Encoder bias.
    k : int
        Latents to keep, ``1 ≤ k ≤ d_sae``.
    screen : {"auto", "none", "bf16", "fp8", "int8"}
        Precision of the pass that proposes candidates, where the backend has one. It changes the speed, never the
        answer; a backend without the named pass raises.
    center : Tensor [d_in] or None
        Subtracted from `x` first, such as ``b_dec``. Its gradient is cheaper this way than through ``x - center``.

    Returns
    -------
    SparseCodes
        Values ``[..., k]`` in the promoted dtype of `x` and `W_enc`, falling; indices ``[..., k]`` int32.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device, k or screen, an empty batch, and non-finite values of `x`.

    References
    ----------
    Gao et al., *Scaling and evaluating sparse autoencoders* (arXiv 2406.04093), section 2.3.
    """
    check_floating(x=x, W_enc=W_enc, b_enc=b_enc, center=center)
    check_matrix("W_enc", W_enc)
    if x.dim() == 0 or x.shape[-1] != W_enc.shape[1]:
        raise ValueError(f"x must have {W_enc.shape[1]} columns (d_in of W_enc), got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
    check_vector("b_enc", b_enc, ("d_sae of W_enc", W_enc.shape[0]))
    check_vector("center", center, ("d_in of W_enc", W_enc.shape[1]))
    check_same_device(x=x, W_enc=W_enc, b_enc=b_enc, center=center)
    check_k(k, W_enc.shape[0])
    if screen not in SCREENS:
        raise ValueError(f"screen must be one of {', '.join(SCREENS)}, got {screen!r}")
    dtype = torch.promote_types(x.dtype, W_enc.dtype)
    bias = None if b_enc is None else b_enc.to(dtype)
    middle = None if center is None else center.to(dtype)
    values, indices = _topk_encode(x.reshape(-1, x.shape[-1]).to(dtype), W_enc.to(dtype), bias, middle, k, screen)
    shape = (*x.shape[:-1], k)
    return SparseCodes(values.reshape(shape), indices.reshape(shape), W_enc.shape[0])


@torch.library.custom_op("sparsekern::topk_encode", mutates_args=())
def _topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, k: int, screen: str
) -> tuple[Tensor, Tensor]:
    centred = x if center is None else x - center
    if x.device.type == "cpu":
        check_finite("x" if center is None else "x - center", centred)
    backend = choose("topk_encode", x, screen)
    with torch.autocast(x.device.type, enabled=False):
        return backend.topk_encode(centred, weight, bias, k, screen)


@_topk_encode.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, k: int, screen: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, center, _, _ = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, weight, center, values, indices)
    ctx.has_bias = bias is not None


def _backward(ctx, grad_values: Tensor, _):  # type: ignore[no-untyped-def]
    """``dz = grad · [z > 0]``; ``dx = Σ_j dz_j W[i_j]``, ``dW[i] = Σ dz (x − c)``, ``db[i] = Σ dz``, ``dc = −Σ dx``."""
    x, weight, center, values, indices = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_center, _, _ = ctx.needs_input_grad
    dz = torch.where(values > 0, grad_values, 0)
    dx = dw = db = dc = None
    # The gradient of the centre needs no dx of its own: Σ_b dx[b] = db @ W, unless the batch is tiny.
    through_bias = needs_center and not needs_x and dz.numel() > weight.shape[0] // 4
    if needs_x or (needs_center and not through_bias):
        dx = _sparse_decode(dz, indices, weight, None)
    if needs_weight:
        dw = weight_gradient(weight, dz, indices, x if center is None else x - center)
    if (ctx.has_bias and needs_bias) or through_bias:
        ones = dz.new_ones(dz.shape[0], 1)
        db = _scatter_outer(dz, indices, ones, weight.shape[0]).squeeze(1)
    if needs_center:
        with torch.autocast(x.device.type, enabled=False):
            dc = -_weighted_row_sum(db, weight) if dx is None else -dx.sum(0)
    return dx if needs_x else None, dw, db if ctx.has_bias and needs_bias else None, dc, None, None


@torch.library.custom_op("sparsekern::weighted_row_sum", mutates_args=())
def _weighted_row_sum(coefficients: Tensor, weight: Tensor) -> Tensor:
    """``coefficients @ weight``, reading only the rows whose coefficient is not zero."""
    found = coefficients.nonzero().squeeze(1)
    if not found.numel():
        return weight.new_zeros(weight.shape[1])
    # Sixteen partial sums, for the threads to share and the order of summation not to depend on how many they are.
    parts = 16
    rows = torch.nn.functional.pad(found, (0, -found.numel() % parts))
    values = coefficients[rows]
    values[found.numel() :] = 0
    backend = choose("sparse_decode", weight)
    return backend.sparse_decode(values.view(parts, -1), rows.int().view(parts, -1), weight, None).sum(0)


@_weighted_row_sum.register_fake
def _(coefficients: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[1])


def _setup_weighted(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _weighted_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    coefficients, weight = ctx.saved_tensors
    return weight @ grad, torch.outer(coefficients, grad)


_weighted_row_sum.register_autograd(_weighted_backward, setup_context=_setup_weighted)
_topk_encode.register_autograd(_backward, setup_context=_setup_context)

"""``topk_encode``: the k largest pre-activations of every token, without the ``B × N`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import SparseCodes
from sparsekern.ops._checks import check_k
from sparsekern.ops._encoder import centred, encoder_arguments, encoder_gradients
from sparsekern.ops._sparse_decode import _scatter_outer, _sparse_decode, weight_gradient


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    screen: str = "auto",
    center: Tensor | None = None,
    *,
    absolute: bool = False,
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
    screen : {"auto", "none", "bf16", "fp16", "tf32", "fp8", "int8"}
        Precision of the pass that proposes candidates, where the backend has one. It changes the speed, never the
        answer; a backend without the named pass raises.
    center : Tensor [d_in] or None
        Subtracted from `x` first, such as ``b_dec``. Its gradient is cheaper this way than through ``x - center``.
    absolute : bool
        Keep the k pre-activations of largest size instead, with their signs and without ReLU (AbsTopK).

    Returns
    -------
    SparseCodes
        Values ``[..., k]`` in the promoted dtype of `x` and `W_enc`, falling (with `absolute` in size); indices
        ``[..., k]`` int32.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device, k or screen, an empty batch, and non-finite values of `x`.

    References
    ----------
    Gao et al., *Scaling and evaluating sparse autoencoders* (arXiv 2406.04093), section 2.3; Zhu et al., *AbsTopK:
    rethinking sparse autoencoders for bidirectional features* (arXiv 2510.00404), for `absolute`.
    """
    rows, weight, bias, middle = encoder_arguments(x, W_enc, b_enc, center, screen)
    check_k(k, W_enc.shape[0])
    values, indices = _topk_encode(rows, weight, bias, middle, k, screen, absolute)
    shape = (*x.shape[:-1], k)
    return SparseCodes(values.reshape(shape), indices.reshape(shape), W_enc.shape[0])


@torch.library.custom_op("sparsekern::topk_encode", mutates_args=())
def _topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, k: int, screen: str, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    x = centred(x, center)
    backend = choose("topk_encode", x, screen)
    with torch.autocast(x.device.type, enabled=False):
        return backend.topk_encode(x, weight, bias, k, screen, absolute=absolute)


@_topk_encode.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, k: int, screen: str, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


def topk_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    """Saves what :func:`topk_backward` needs."""
    x, weight, bias, center = inputs[:4]
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, weight, center, values, indices)
    ctx.has_bias = bias is not None
    ctx.others = len(inputs) - 4


def topk_backward(ctx, grad_values: Tensor, _):  # type: ignore[no-untyped-def]
    """The backward pass of an encoder ``(x, weight, bias, center, …) -> (values, indices)``.

    ``dz = grad · [z ≠ 0]``, from which :func:`encoder_gradients` has the rest.
    """
    x, weight, center, values, indices = ctx.saved_tensors
    dz = torch.where(values != 0, grad_values, 0)
    gradients = encoder_gradients(
        ctx,
        x,
        weight,
        center,
        decode=lambda: _sparse_decode(dz, indices, weight, None),
        scatter=lambda vectors: _scatter_outer(dz, indices, vectors, weight.shape[0]),
        weight_gradient=lambda vectors: weight_gradient(weight, dz, indices, vectors),
        tiny=dz.numel() <= weight.shape[0] // 4,
    )
    return *gradients, *[None] * ctx.others


_topk_encode.register_autograd(topk_backward, setup_context=topk_setup_context)

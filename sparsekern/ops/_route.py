"""``route``: which experts serve which tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import SparseCodes
from sparsekern.ops._checks import (
    check_floating,
    check_indices,
    check_matrix,
    check_same_device,
    check_vector,
)
from sparsekern.ops._encoder import centred
from sparsekern.routing import Routing

GATES = ("softmax", "sigmoid")


def route(
    x: Tensor,
    W_router: Tensor,
    n_active: int = 1,
    *,
    gate: str = "softmax",
    selection_bias: Tensor | None = None,
    center: Tensor | None = None,
) -> Routing:
    """Choose `n_active` experts for every token, and sort the tokens by expert. No token is dropped.

    ``logits = (x − center) @ W_router.T``; the experts are those with the largest logits, ties to the lower expert; the
    gates are the softmax of the logits over all experts, or their sigmoid. Logits and gates are in float32 (float64 for
    float64 input), whatever the dtype of storage; autocast does not lower that. Differentiable in `x`, `W_router` and
    `center`, through the gates and the logits.

    Parameters
    ----------
    x : Tensor [..., d_in]
        Activations. Must be finite: checked at once on the CPU.
    W_router : Tensor [n_experts, d_in]
        Router, one row an expert.
    n_active : int
        Experts a token, ``1 ≤ n_active ≤ n_experts``.
    gate : {"softmax", "sigmoid"}
        Over all experts, or of each logit alone.
    selection_bias : Tensor [n_experts] or None
        Added to the gates for the choice alone, which is then by the largest sums: the knob of balancing without an
        auxiliary loss. It gets no gradient.
    center : Tensor [d_in] or None
        Subtracted from `x` first.

    Returns
    -------
    Routing

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device, number or gate, an empty batch, and non-finite values of `x`.

    References
    ----------
    Mudide et al., *Efficient dictionary learning with switch sparse autoencoders* (arXiv 2410.08201), section 3; Wang
    et al., *Auxiliary-loss-free load balancing strategy for mixture-of-experts* (arXiv 2408.15664) for the bias.
    """
    check_floating(x=x, W_router=W_router, selection_bias=selection_bias, center=center)
    check_matrix("W_router", W_router)
    n_experts = W_router.shape[0]
    if x.dim() == 0 or x.shape[-1] != W_router.shape[1]:
        raise ValueError(f"x must have {W_router.shape[1]} columns (d_in of W_router), got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
    if not 1 <= n_active <= n_experts:
        raise ValueError(f"n_active must be between 1 and n_experts={n_experts}, got {n_active}")
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    check_vector("selection_bias", selection_bias, ("n_experts, the rows of W_router", n_experts))
    check_vector("center", center, ("d_in of W_router", W_router.shape[1]))
    check_same_device(x=x, W_router=W_router, selection_bias=selection_bias, center=center)
    dtype = torch.promote_types(x.dtype, W_router.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    middle = None if center is None else center.to(dtype)
    bias = None if selection_bias is None else selection_bias.detach()
    logits, gates, experts, order, offsets = _route(rows, W_router.to(dtype), middle, bias, n_active, gate)
    return Routing(experts, gates, order, offsets, logits)


def routing_of(codes: SparseCodes) -> Routing:
    """Every kept latent of a token as one of its experts, gated by its value: how a hierarchy goes one level down."""
    experts, gates = codes.indices.reshape(-1, codes.k), codes.values.reshape(-1, codes.k)
    order, offsets = group_slots(experts, codes.d_sae)
    return Routing(experts, gates, order, offsets, None)


@torch.library.custom_op("sparsekern::route", mutates_args=())
def _route(
    x: Tensor, weight: Tensor, center: Tensor | None, bias: Tensor | None, n_active: int, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = centred(x, center)
    backend = choose("route", x)
    with torch.autocast(x.device.type, enabled=False):
        return backend.route(x, weight, bias, n_active, gate)


@_route.register_fake
def _(
    x: Tensor, weight: Tensor, center: Tensor | None, bias: Tensor | None, n_active: int, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, n_experts = x.shape[0], weight.shape[0]
    experts = x.new_empty(rows, n_active, dtype=torch.int32)
    order, offsets = experts.new_empty(rows * n_active), experts.new_empty(n_experts + 1)
    return x.new_empty(rows, n_experts, dtype=work), x.new_empty(rows, n_active, dtype=work), experts, order, offsets


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, center, _, _, gate = inputs
    logits, _, experts, order, offsets = output
    ctx.mark_non_differentiable(experts, order, offsets)
    ctx.save_for_backward(x, weight, center, logits, experts)
    ctx.gate = gate


def _backward(ctx, grad_logits: Tensor, grad_gates: Tensor, _experts, _order, _offsets):  # type: ignore[no-untyped-def]
    """``dlogits`` gathers both ways; then those of a linear map."""
    x, weight, center, logits, experts = ctx.saved_tensors
    needs_x, needs_weight, needs_center = ctx.needs_input_grad[:3]
    with torch.autocast(x.device.type, enabled=False):
        spread = torch.zeros_like(logits).scatter(1, experts.long(), grad_gates)
        if ctx.gate == "softmax":
            gates = logits.softmax(1)
            slope = gates * (spread - (spread * gates).sum(1, keepdim=True))
        else:
            gates = logits.sigmoid()
            slope = gates * (1 - gates) * spread
        dlogits = grad_logits + slope
        dx = dw = dc = None
        if needs_x:
            dx = (dlogits @ weight.to(dlogits.dtype)).to(x.dtype)
        if needs_weight:
            vectors = x if center is None else x - center
            dw = (dlogits.T @ vectors.to(dlogits.dtype)).to(weight.dtype)
        if needs_center:
            dc = -(dlogits.sum(0) @ weight.to(dlogits.dtype)).to(x.dtype)
    return dx, dw, dc, None, None, None


_route.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("sparsekern::group_slots", mutates_args=())
def group_slots(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """``order`` and ``offsets`` of a :class:`~sparsekern.Routing` from its `experts` ``[B, n_active]`` int32."""
    if experts.device.type == "cpu":
        check_indices(experts, n_experts, "experts")
    return choose("group_slots", experts).group_slots(experts, n_experts)


@group_slots.register_fake
def _(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    return experts.new_empty(experts.numel()), experts.new_empty(n_experts + 1)

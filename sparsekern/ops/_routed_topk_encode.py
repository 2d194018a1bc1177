"""``routed_topk_encode``: the k largest pre-activations of every token among the latents of its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import SparseCodes
from sparsekern.ops._checks import check_indices, check_same_device
from sparsekern.ops._encoder import centred, encoder_arguments
from sparsekern.ops._topk_encode import topk_backward, topk_setup_context
from sparsekern.routing import Routing


def routed_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    route: Routing,
    k: int,
    screen: str = "auto",
    center: Tensor | None = None,
    *,
    per_expert: bool = False,
) -> SparseCodes:
    """:func:`~sparsekern.topk_encode` over the latents of each token's experts; those of others are not computed.

    Exactly the top k of ``ReLU((x − center) @ W_enc.T + b_enc)`` with all other latents left out. Gates take no part:
    multiply the values by ``route.gates_of(codes)``. Differentiable in `x`, `W_enc`, `b_enc` and `center`.

    Parameters
    ----------
    x : Tensor [..., d_in]
        Activations, those that `route` was made for. Must be finite: checked at once on the CPU.
    W_enc : Tensor [d_sae, d_in]
        Encoder, one row a latent; every expert owns ``d_sae / n_experts`` neighbouring ones.
    b_enc : Tensor [d_sae] or None
        Encoder bias.
    route : Routing
        From :func:`~sparsekern.route`.
    k : int
        Latents to keep of each token, at most as many as its experts have together.
    screen : str
        See :func:`~sparsekern.topk_encode`; it changes the speed, never the answer.
    center : Tensor [d_in] or None
        Subtracted from `x` first.
    per_expert : bool
        Keep k latents of each expert of a token instead.

    Returns
    -------
    SparseCodes
        Values ``[..., k]`` in the promoted dtype of `x` and `W_enc`, falling; indices ``[..., k]`` int32 in
        ``[0, d_sae)``. With `per_expert` both are ``[..., n_active · k]``, in the order of the experts and falling in
        each.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device, k or screen, on a routing of other tokens or another number of latents, an
        empty batch, and non-finite values of `x`.

    References
    ----------
    Mudide et al., *Efficient dictionary learning with switch sparse autoencoders* (arXiv 2410.08201), section 3, for
    one expert; Xu et al., *Beyond redundancy* (arXiv 2511.05745) for one selection over several.
    """
    rows, weight, bias, middle = encoder_arguments(x, W_enc, b_enc, center, screen)
    d_sae, n_experts, n_active = weight.shape[0], route.n_experts, route.n_active
    if route.experts.shape[0] != rows.shape[0]:
        raise ValueError(f"route must be of the {rows.shape[0]} tokens of x, got one of {route.experts.shape[0]}")
    if d_sae % n_experts:
        raise ValueError(f"W_enc must have a multiple of n_experts={n_experts} rows, got {d_sae}")
    check_same_device(x=x, experts=route.experts, order=route.order, offsets=route.offsets)
    most, of = (
        (d_sae // n_experts, "each expert") if per_expert else (n_active * d_sae // n_experts, "a token's experts")
    )
    if not 1 <= k <= most:
        raise ValueError(f"k must be between 1 and the {most} latents of {of}, got {k}")
    values, indices = _routed_topk_encode(
        rows, weight, bias, middle, route.experts, route.order, route.offsets, k, per_expert, screen
    )
    shape = (*x.shape[:-1], values.shape[1])
    return SparseCodes(values.reshape(shape), indices.reshape(shape), d_sae)


@torch.library.custom_op("sparsekern::routed_topk_encode", mutates_args=())
def _routed_topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    experts: Tensor,
    order: Tensor,
    offsets: Tensor,
    k: int,
    per_expert: bool,
    screen: str,
) -> tuple[Tensor, Tensor]:
    x = centred(x, center)
    if experts.device.type == "cpu":
        _check_slots(experts, order, offsets)
    backend = choose("routed_topk_encode", x, screen)
    with torch.autocast(x.device.type, enabled=False):
        return backend.routed_topk_encode(x, weight, bias, experts, order, offsets, k, per_expert, screen)


def _check_slots(experts: Tensor, order: Tensor, offsets: Tensor) -> None:
    """Kernels read memory at these numbers; looks at values, so it waits for the device."""
    check_indices(experts, offsets.shape[0] - 1, "route.experts")
    check_indices(order, experts.numel(), "route.order")
    if (
        order.shape[0] != experts.numel()
        or offsets[0] != 0
        or offsets[-1] != order.shape[0]
        or (offsets.diff() < 0).any()
    ):
        raise ValueError("route.offsets must rise from 0 to the number of slots; make routings with sparsekern.route")


@_routed_topk_encode.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    experts: Tensor,
    order: Tensor,
    offsets: Tensor,
    k: int,
    per_expert: bool,
    screen: str,
) -> tuple[Tensor, Tensor]:
    width = k * experts.shape[1] if per_expert else k
    return x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], width, dtype=torch.int32)


_routed_topk_encode.register_autograd(topk_backward, setup_context=topk_setup_context)

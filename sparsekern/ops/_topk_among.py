"""``topk_among``: the k largest pre-activations of every token among some latents, for compiled code."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import SparseCodes
from sparsekern.ops._checks import check_k, check_vector
from sparsekern.ops._encoder import centred, encoder_arguments
from sparsekern.ops._topk_encode import topk_backward, topk_setup_context


def topk_among(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    among: Tensor,
    k: int,
    screen: str = "auto",
    center: Tensor | None = None,
    *,
    absolute: bool = False,
) -> SparseCodes:
    """:func:`~sparsekern.topk_encode` of the latents in the mask `among` ``[d_sae]`` alone.

    It costs in proportion to these latents, and yet its shapes do not depend on how many there are, so that
    ``torch.compile`` can take it. With fewer than k of them the last slots hold the value 0 and name latent 0. Waits
    for the device.
    """
    rows, weight, bias, middle = encoder_arguments(x, W_enc, b_enc, center, screen)
    check_vector("among", among, ("d_sae of W_enc", W_enc.shape[0]))
    check_k(k, W_enc.shape[0])
    values, indices = _topk_among(rows, weight, bias, middle, among, k, screen, absolute)
    shape = (*x.shape[:-1], k)
    return SparseCodes(values.reshape(shape), indices.reshape(shape), W_enc.shape[0])


@torch.library.custom_op("sparsekern::topk_among", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _topk_among(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    among: Tensor,
    k: int,
    screen: str,
    absolute: bool,
) -> tuple[Tensor, Tensor]:
    rows = among.nonzero().squeeze(1)
    values, indices = x.new_zeros(x.shape[0], k), torch.zeros(x.shape[0], k, dtype=torch.int32, device=x.device)
    count = min(k, rows.numel())
    if count:
        x = centred(x, center)
        some = None if bias is None else bias.index_select(0, rows)
        backend = choose("topk_encode", x, screen)
        with torch.autocast(x.device.type, enabled=False):
            found = backend.topk_encode(x, weight.index_select(0, rows), some, count, screen, absolute=absolute)
        values[:, :count] = found[0]
        indices[:, :count] = rows[found[1].long()]
    return values, indices


@_topk_among.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    among: Tensor,
    k: int,
    screen: str,
    absolute: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


_topk_among.register_autograd(topk_backward, setup_context=topk_setup_context)

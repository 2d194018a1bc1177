"""``batch_topk_encode``: the k·B largest pre-activations of a whole batch, without the ``B × N`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import CSRCodes
from sparsekern.ops._encoder import centred, csr_backward, csr_setup_context, encoder_arguments


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: float, screen: str = "auto", center: Tensor | None = None
) -> CSRCodes:
    """The ``k·B`` largest of ``ReLU((x − center) @ W_enc.T + b_enc)`` over the whole batch of B tokens, exactly.

    A token keeps as many latents as it deserves, k on average. Pre-activations are compared in float32 (float64 for
    float64 input), whatever the dtype of storage; autocast does not lower that. Ties go to the lower row, then to the
    lower latent. The ReLU comes after the selection: a batch with fewer than ``k·B`` positive pre-activations has
    zero-valued entries, and those carry no gradient. So there are always ``int(k·B)`` entries, and shapes do not depend
    on the data. Differentiable in `x`, `W_enc`, `b_enc` and `center`.

    Parameters
    ----------
    x : Tensor [..., d_in]
        Activations of B tokens. Must be finite: checked at once on the CPU.
    W_enc : Tensor [d_sae, d_in]
        Encoder, one row a latent.
    b_enc : Tensor [d_sae] or None
        Encoder bias.
    k : float
        Latents to keep a token, on average, not necessarily a whole number; above 0 and at most `d_sae`. The batch
        keeps ``int(k·B)``, as in SAELens, and that must be at least 1.
    screen : {"auto", "none", "bf16", "fp16", "tf32", "fp8", "int8"}
        Precision of the pass that proposes candidates, where the backend has one. It changes the speed, never the
        answer; a backend without the named pass raises.
    center : Tensor [d_in] or None
        Subtracted from `x` first, such as ``b_dec``. Its gradient is cheaper this way than through ``x - center``.

    Returns
    -------
    CSRCodes
        ``crow [B + 1]``, ``col [int(k·B)]`` and ``values [int(k·B)]`` in the promoted dtype of `x` and `W_enc`.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device, k or screen, an empty batch, and non-finite values of `x`.

    References
    ----------
    Bussmann et al., *BatchTopK Sparse Autoencoders* (arXiv 2412.06410).
    """
    rows, weight, bias, middle = encoder_arguments(x, W_enc, b_enc, center, screen)
    if not 0 < k <= W_enc.shape[0]:
        raise ValueError(f"k must be above 0 and at most d_sae={W_enc.shape[0]}, got {k}")
    count = int(k * rows.shape[0])
    if count == 0:
        raise ValueError(f"k must be at least 1 / {rows.shape[0]} to keep anything of {rows.shape[0]} tokens, got {k}")
    values, crow, col = _batch_topk_encode(rows, weight, bias, middle, count, screen)
    return CSRCodes(crow, col, values, W_enc.shape[0])


@torch.library.custom_op("sparsekern::batch_topk_encode", mutates_args=())
def _batch_topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, count: int, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    x = centred(x, center)
    backend = choose("batch_topk_encode", x, screen)
    with torch.autocast(x.device.type, enabled=False):
        crow, col, values = backend.batch_topk_encode(x, weight, bias, count, screen)
    return values, crow, col


@_batch_topk_encode.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, count: int, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(count),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        x.new_empty(count, dtype=torch.int32),
    )


_batch_topk_encode.register_autograd(csr_backward, setup_context=csr_setup_context)

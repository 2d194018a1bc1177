"""``batch_topk_encode``: the k·B largest pre-activations of a whole batch, without the ``B × N`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import CSRCodes
from sparsekern.ops._checks import check_k
from sparsekern.ops._encoder import centred, csr_backward, csr_setup_context, encoder_arguments


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, screen: str = "auto", center: Tensor | None = None
) -> CSRCodes:
    """The ``k·B`` largest of ``ReLU((x − center) @ W_enc.T + b_enc)`` over the whole batch of B tokens, exactly.

    A token keeps as many latents as it deserves, k on average. Pre-activations are compared in float32 (float64 for
    float64 input), whatever the dtype of storage; autocast does not lower that. Ties go to the lower row, then to the
    lower latent. The ReLU comes after the selection: a batch with fewer than ``k·B`` positive pre-activations has
    zero-valued entries, and those carry no gradient. So there are always ``k·B`` entries, and shapes do not depend on
    the data. Differentiable in `x`, `W_enc`, `b_enc` and `center`.

    Parameters
    ----------
    x : Tensor [..., d_in]
        Activations of B tokens. Must be finite: checked at once on the CPU.
    W_enc : Tensor [d_sae, d_in]
        Encoder, one row a latent.
    b_enc : Tensor [d_sae] or None
        Encoder bias.
    k : int
        Latents to keep a token, on average; ``1 ≤ k ≤ d_sae``.
    screen : {"auto", "none", "bf16", "fp16", "tf32", "fp8", "int8"}
        Precision of the pass that proposes candidates, where the backend has one. It changes the speed, never the
        answer; a backend without the named pass raises.
    center : Tensor [d_in] or None
        Subtracted from `x` first, such as ``b_dec``. Its gradient is cheaper this way than through ``x - center``.

    Returns
    -------
    CSRCodes
        ``crow [B + 1]``, ``col [k·B]`` and ``values [k·B]`` in the promoted dtype of `x` and `W_enc`.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device, k or screen, an empty batch, and non-finite values of `x`.

    References
    ----------
    Bussmann et al., *BatchTopK Sparse Autoencoders* (arXiv 2412.06410).
    """
    rows, weight, bias, middle = encoder_arguments(x, W_enc, b_enc, center, screen)
    check_k(k, W_enc.shape[0])
    values, crow, col = _batch_topk_encode(rows, weight, bias, middle, k, screen)
    return CSRCodes(crow, col, values, W_enc.shape[0])


@torch.library.custom_op("sparsekern::batch_topk_encode", mutates_args=())
def _batch_topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, k: int, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    x = centred(x, center)
    backend = choose("batch_topk_encode", x, screen)
    with torch.autocast(x.device.type, enabled=False):
        crow, col, values = backend.batch_topk_encode(x, weight, bias, k, screen)
    return values, crow, col


@_batch_topk_encode.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, k: int, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        x.new_empty(rows * k),
        x.new_empty(rows + 1, dtype=torch.int64),
        x.new_empty(rows * k, dtype=torch.int32),
    )


_batch_topk_encode.register_autograd(csr_backward, setup_context=csr_setup_context)

"""``threshold_encode``: all pre-activations above a threshold, without the ``B × N`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import CSRCodes
from sparsekern.ops._checks import check_floating, check_same_device
from sparsekern.ops._encoder import centred, csr_backward, csr_setup_context, encoder_arguments


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: float | Tensor,
    screen: str = "auto",
    center: Tensor | None = None,
) -> CSRCodes:
    """All of ``(x − center) @ W_enc.T + b_enc`` above `threshold`, exactly: JumpReLU, or ReLU with threshold 0.

    A negative threshold lets negative pre-activations in, as what a straight-through estimator has to look at.

    Pre-activations are compared with the threshold in float32 (float64 for float64 input), whatever the dtype of
    storage; autocast does not lower that. How many there are depends on the data, so a GPU is waited for.
    Differentiable in `x`, `W_enc`, `b_enc` and `center`. The threshold gets no gradient: the function jumps there, and
    what to train it by is for the caller to choose.

    Parameters
    ----------
    x : Tensor [..., d_in]
        Activations of B tokens. Must be finite: checked at once on the CPU.
    W_enc : Tensor [d_sae, d_in]
        Encoder, one row a latent.
    b_enc : Tensor [d_sae] or None
        Encoder bias.
    threshold : float, or Tensor [] or [d_sae]
        For all latents or for each. No NaN: values of tensors are checked at once on the CPU.
    screen : {"auto", "none", "bf16", "fp16", "tf32", "fp8", "int8"}
        Precision of the pass that proposes candidates, where the backend has one. It changes the speed, never the
        answer; a backend without the named pass raises.
    center : Tensor [d_in] or None
        Subtracted from `x` first, such as ``b_dec``. Its gradient is cheaper this way than through ``x - center``.

    Returns
    -------
    CSRCodes
        ``crow [B + 1]``, ``col [nnz]`` and ``values [nnz]`` in the promoted dtype of `x` and `W_enc`.

    Raises
    ------
    ValueError
        On a wrong shape, dtype, device, threshold or screen, an empty batch, and non-finite values of `x`.

    References
    ----------
    Rajamanoharan et al., *Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders*
    (arXiv 2407.14435), equation 5.
    """
    rows, weight, bias, middle = encoder_arguments(x, W_enc, b_enc, center, screen)
    work = torch.promote_types(rows.dtype, torch.float32)  # that of the comparison
    if isinstance(threshold, Tensor):
        check_floating(threshold=threshold)
        check_same_device(x=x, threshold=threshold)
        if threshold.shape not in ((), (W_enc.shape[0],)):
            raise ValueError(
                f"threshold must be a number or have shape () or ({W_enc.shape[0]},) (d_sae of W_enc), "
                f"got {tuple(threshold.shape)}"
            )
        cut = threshold.to(work)
    else:
        if threshold != threshold:
            raise ValueError("threshold must be a number, got nan")
        cut = torch.full((), threshold, dtype=work, device=x.device)
    values, crow, col = _threshold_encode(rows, weight, bias, middle, cut, screen)
    return CSRCodes(crow, col, values, W_enc.shape[0])


@torch.library.custom_op("sparsekern::threshold_encode", mutates_args=())
def _threshold_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, threshold: Tensor, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    x = centred(x, center)
    if x.device.type == "cpu" and threshold.isnan().any():
        raise ValueError("threshold must hold numbers, got nan")
    backend = choose("threshold_encode", x, screen)
    with torch.autocast(x.device.type, enabled=False):
        crow, col, values = backend.threshold_encode(x, weight, bias, threshold, screen)
    return values, crow, col


@_threshold_encode.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, threshold: Tensor, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(nnz),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        x.new_empty(nnz, dtype=torch.int32),
    )


_threshold_encode.register_autograd(csr_backward, setup_context=csr_setup_context)

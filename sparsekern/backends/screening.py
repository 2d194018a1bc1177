"""What the screened encoders of the Triton and the CUDA backend share, kernels apart.

Rows in the precision of the screen, and the copy of a weight that an optimizer keeps in it; how far the screen's scores
can be from the exact ones; slots of routed encoders; chunks of rows; what the last call did.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.backends.triton import plans
from sparsekern.backends.triton.plans import EncodePlan

WORKSPACE_BYTES = 256 * 2**20
"""Bound on the keys, candidates and scores that exist at one time."""

PANEL_BYTES = 32 * 2**20
"""Bound on a panel of scores of the chunked path: it should stay in the cache until it has been read."""


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Even slices of `rows` rows that need at most :data:`WORKSPACE_BYTES`."""
    step = -(-rows // -(-rows * row_bytes // WORKSPACE_BYTES))
    for top in range(0, rows, step):
        yield slice(top, min(top + step, rows))


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the device of `tensor`."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else plans.assumed_capability


# Rows in the precision of the screen


LIMITS = {torch.float16: 1.0, torch.float8_e4m3fn: 448.0}
"""The largest entry of a scaled row: that of fp8's range; for float16, one at which no score comes near its range."""


class Cast(NamedTuple):
    """Rows in the precision of the screen.

    Attributes
    ----------
    rows : Tensor [n, d]
    scale : Tensor [n] or None
        What each row is to be multiplied by; not for bfloat16, which has the range of float32.
    norm, error : Tensor [n]
        Norm of each row before rounding, and of what rounding changed.
    """

    rows: Tensor
    scale: Tensor | None
    norm: Tensor
    error: Tensor


def as_it_is(rows: Tensor) -> Cast:
    """Rows that are in the precision of the screen."""
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return Cast(rows, None, norm, torch.zeros_like(norm))


class Quantized:
    """The copy of an encoder's weight that the screen reads, kept current by the optimizer.

    It is valid as long as nobody but its keeper changes the weight. Changes by torch are seen by the tensor's version.
    Those through ``weight.data``, which has none, are seen on the device by the first column, without anybody waiting:
    the slack is then infinite, and every token is repaired.

    `zeros` rows of zeros follow on those of the copy in memory.
    """

    def __init__(self, weight: Tensor, cast: Cast, zeros: int = 0) -> None:
        self.cast, self.zeros = cast, zeros
        self.address = weight.data_ptr()
        self._column = torch.empty_like(weight.detach()[:, 0])
        self.mark_current(weight)

    def mark_current(self, weight: Tensor) -> None:
        """Say that the copy is that of `weight` as it now is."""
        self._version = weight._version
        self._column.copy_(weight.detach()[:, 0])  # in place, so that a CUDA graph finds it

    def is_current(self, weight: Tensor) -> bool:
        """Whether the copy is still that of `weight`, as far as can be told without waiting."""
        return (
            weight.data_ptr() == self.address
            and weight.shape == self.cast.rows.shape
            and weight._version == self._version
        )

    def unchanged(self, weight: Tensor) -> Tensor:
        """Whether the first column is as it was: bool on the device."""
        return (weight[:, 0] == self._column).all()


_quantized: weakref.WeakValueDictionary[int, Quantized] = weakref.WeakValueDictionary()
"""By address of the weight. The optimizer that refreshes a copy owns it."""


def register(copy: Quantized) -> Quantized:
    """Have the encoders use `copy`, which the caller owns, while it is current."""
    _quantized[copy.address] = copy
    return copy


def copy_dtype(screen: str) -> torch.dtype:
    """Of the copy that an optimizer keeps for a screen."""
    return {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}.get(screen, plans.SCREEN_DTYPE)


def current_copy(weight: Tensor) -> Quantized | None:
    """The copy of this weight that somebody keeps current."""
    copy = _quantized.get(weight.data_ptr())
    return copy if copy is not None and copy.is_current(weight) else None


# How far scores of the screen can be from the exact ones


class Screened(NamedTuple):
    """Operands of the screen, and how far its scores can be from the exact ones: ``slack + relative / 4 · |score|``."""

    x: Cast
    weight: Cast
    slack: Tensor
    relative: float

    def scales(self, part: slice) -> tuple[Tensor | None, Tensor | None]:
        """Of some tokens and of all latents; None where rows are not scaled."""
        return None if self.x.scale is None else self.x.scale[part], self.weight.scale


def with_slack(
    x: Cast, weight: Cast, bias: Tensor | None, plan: EncodePlan, unchanged: Tensor | None = None
) -> Screened:
    """Both operands with the bound on the errors of their screen; where they are not `unchanged` there is none."""
    slack = _slack(x, weight, bias, plan)
    if unchanged is not None:
        slack = torch.where(unchanged, slack, math.inf)
    return Screened(x, weight, slack, 4 * plan.panel_rounding)


def _slack(x: Cast, weight: Cast, bias: Tensor | None, plan: EncodePlan) -> Tensor:
    """How far a score of the screen can be from the exact one, ``[B]``.

    The largest norms over all latents stand for each latent's own. For fp8 the product of norms, forty times the usual
    error, would make everything a candidate. It is divided by √d there and multiplied by 8: eight standard deviations
    if the roundings of different dimensions have independent signs. And an error found in rescoring that is above half
    of that has the token repaired.
    """
    d = x.rows.shape[1]
    weight_norm, weight_error = weight.norm.amax(), weight.error.amax()
    x_error = x.error
    if plan.precision == "tf32":  # the tensor cores drop what does not fit into 10 bits
        weight_error, x_error = weight_error + weight_norm * 2.0**-10, x_error + x.norm * 2.0**-10
    rounding = weight_error * (x.norm + x_error) + weight_norm * x_error
    if plan.statistical:
        rounding = rounding * (8 / math.sqrt(d))
    # Tensor cores drop up to 2^-23 of a partial sum with each term. Rescoring sums in trees, with a rounding a level.
    rounding = rounding + weight_norm * x.norm * (d * 2.0**-23 + 2.0**-18)
    if bias is not None:
        largest = torch.where(bias.isfinite(), bias, 0).abs().amax().float()
        rounding = rounding + largest * 2.0**-21
    return 1.01 * rounding


def panel_scores(x: Tensor, latents: Tensor) -> Tensor:
    """``x @ latents.T`` with its sums in float32: the slack counts on that, and torch's defaults allow less."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction
    flags.allow_fp16_reduced_precision_reduction = flags.allow_bf16_reduced_precision_reduction = False
    try:
        return x @ latents.T
    finally:
        flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction = before


# Slots


class Slots(NamedTuple):
    """What restricts every row to the latents of some experts. Slot ``b · n_active + j`` is token b's j-th expert.

    Attributes
    ----------
    experts : Tensor [rows, n_owners], int32
        The experts of each row of codes: those of a token, or one slot's.
    order, offsets : Tensor [slots], [n_experts + 1], int32
        Slots by rising expert, and where each expert's begin.
    n_active : int
        Slots of a token.
    latents : int
        Latents of an expert.
    """

    experts: Tensor
    order: Tensor
    offsets: Tensor
    n_active: int
    latents: int

    @property
    def n_owners(self) -> int:
        """Experts of a row."""
        return self.experts.shape[1]

    @property
    def n_experts(self) -> int:
        """Experts in all."""
        return self.offsets.shape[0] - 1

    def tiles(self, height: int) -> tuple[Tensor, Tensor]:
        """Number of each expert's first tile of `height` slots; and of every tile the expert, `n_experts` for none.

        How many there are is known to the device alone; a bound is ``⌈slots / height⌉ + n_experts``.
        """
        counts = (self.offsets.diff() + (height - 1)) // height
        ends = counts.cumsum(0, dtype=torch.int32)
        bound = -(-self.order.shape[0] // height) + self.n_experts
        numbers = torch.arange(bound, dtype=torch.int32, device=ends.device)
        return ends - counts, torch.searchsorted(ends, numbers, right=True, out_int32=True)


# What the last call did


class EncodeStats(NamedTuple):
    """What one call of ``topk_encode`` did. The tensors are on the device: reading them waits for it.

    Attributes
    ----------
    rows : int
        Rows encoded.
    rescored : Tensor []
        Latents, over all rows, whose scores were computed again in float32, the repaired rows apart.
    repaired : Tensor []
        Rows that were computed in full, for want of a certificate.
    """

    rows: int
    rescored: Tensor
    repaired: Tensor


last: list[tuple[Tensor, Tensor]] = []
"""How many candidates each row had, and whether (not 0) it was repaired, of the chunks of the last call."""


def last_encode() -> EncodeStats | None:
    """What the last screened call in this process did."""
    if not last:
        return None
    kept = [torch.where(flags != 0, 0, count).sum() for count, flags in last]
    repaired = [(flags != 0).sum() for _, flags in last]
    rows = sum(count.shape[0] for count, _ in last)
    return EncodeStats(rows, torch.stack(kept).sum(), torch.stack(repaired).sum())

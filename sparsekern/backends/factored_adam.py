"""Adam on weights of one row a latent with gradients that stay factored, as far as all GPU kernels do it alike.

A backend's kernels sort entries by latent and make, use up, and forget one row of the gradient at a time. What is
around them is here: which sums of outer products they are given, whether clipping bites, and the state of Adam.

Whether clipping bites is decided on the device. An upper bound on the norm by the triangle inequality costs next to
nothing; where it is above the clipping norm, :func:`clip_factor` has the norm summed in a pass of its own over the
factors, and otherwise the programs of that pass return at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparsekern.codes import entry_rows
from sparsekern.factors import OuterProducts, identity


def fits(weight: Tensor) -> bool:
    """Whether the kernels can take such a weight: float32, contiguous, and a row fits into a block's registers."""
    return weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape[1] <= 16384


class Part(NamedTuple):
    """Outer products as the kernels take them.

    Attributes
    ----------
    values : Tensor [n_entries]
    vectors : Tensor [rows, d]
        With unit stride along the last axis.
    by : object
        The entries by latent, of the backend's class.
    pieces : Tensor [n_pieces, d] float32
        Sums of the pieces of long latents.
    """

    values: Tensor
    vectors: Tensor
    by: Any
    pieces: Tensor


class Step(NamedTuple):
    """A step of Adam.

    Attributes
    ----------
    moments : tuple of Tensor [d_sae, d]
        First and second.
    hyper : Tensor [3] float32
        ``lr / (1 - beta1^t)``, ``sqrt(1 - beta2^t)`` and the clipping factor, on the device.
    rates : tuple of float
        1 less each beta.
    eps : float
    copy : object or None
        The copy of the weight that the screen reads, to refresh.
    """

    moments: tuple[Tensor, Tensor]
    hyper: Tensor
    rates: tuple[float, float]
    eps: float
    copy: Any


class FactoredGradient(ABC):
    """A gradient ``[d_sae, d]`` as sums of outer products, sorted by latent.

    The kernels take a few sums; where there are more, a dense gradient is made of them, which is a sum of outer
    products too, with one entry a latent.
    """

    most_parts: ClassVar[int]
    """Sums that the kernels take."""

    def __init__(self, parts: Sequence[OuterProducts], d_sae: int) -> None:
        self._outer_products, self._d_sae = parts, d_sae
        self.parts: list[Part] = []
        sorted_before: dict[tuple[object, ...], Any] = {}
        for part in parts:
            key = identity(part.indices), part.indices.shape, None if part.crow is None else identity(part.crow)
            if key not in sorted_before:
                k = part.values.shape[1] if part.crow is None else 1
                row_of = None if part.crow is None else entry_rows(part.crow, part.indices).int()
                sorted_before[key] = self.sort(part.indices, k, row_of)
            self.parts.append(self.part(part.values, part.vectors, sorted_before[key]))
        if len(self.parts) > self.most_parts:
            dense = self.dense()
            by = self.sort(torch.arange(d_sae, dtype=torch.int32, device=dense.device), 1, None)
            self.parts = [self.part(dense.new_ones(d_sae, 1), dense, by)]

    @abstractmethod
    def sort(self, indices: Tensor, k: int, row_of: Tensor | None) -> Any:
        """Entries by latent: `k` of them in each row, or one for each number of `row_of`."""

    @abstractmethod
    def part(self, values: Tensor, vectors: Tensor, by: Any) -> Part:
        """Outer products of these entries, with the sums of their pieces."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradient, ``[d_sae, d]``."""

    @abstractmethod
    def square_bound(self) -> Tensor:
        """An upper bound on the sum of squares of the gradient, by the triangle inequality: next to no work."""

    @abstractmethod
    def run(self, weight: Tensor, unit_rows: bool, needed: Tensor, step: Step | None) -> Tensor:
        """One pass over the rows; the sum of squares ``[]`` float64 of the gradient, unclipped.

        For `unit_rows` the gradient is without its components along `weight`. With a `step` weight, moments and copy
        are updated. Where `needed` ``[]`` is false nothing is done, and the sum is zero.
        """


def clip_factor(factors: Sequence[tuple[FactoredGradient, Tensor, bool]], rest: Tensor, clip_norm: float) -> Tensor:
    """See :func:`sparsekern.backends.cpu.clip_factor`; the factor ``[]`` stays on the device."""
    bound = rest + torch.stack([found.square_bound() for found, _, _ in factors]).sum()
    needed = bound > clip_norm**2
    total = rest
    for found, weight, unit_rows in factors:
        total = total + found.run(weight, unit_rows, needed, None)
    factor = clip_norm / (total.sqrt() + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
    return torch.where(needed, factor.clamp(max=1.0), 1.0).float()


def row_adam(
    factors: FactoredGradient,
    weight: Tensor,
    unit_rows: bool,
    state: dict[str, Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    clip: Tensor,
    copy: Any,
    finite: Tensor,
    rest_after: None = None,
) -> Tensor:
    """One step of Adam on `weight` in one pass over memory; `state` is that of ``torch.optim.Adam``.

    Where `finite` ``[]`` is false nothing changes. Rows do not rest here. Returns the sum of squares of the gradient
    before clipping.
    """
    state["step"] += finite
    count = state["step"].double()
    scale, root = lr / (1 - betas[0] ** count), (1 - betas[1] ** count).sqrt()
    hyper = torch.stack([scale, root, clip.double()]).float()
    rates = 1 - betas[0], 1 - betas[1]  # here: in float32 1 - 0.999 would be off by 1e-5 of itself
    moments = state["exp_avg"], state["exp_avg_sq"]
    squares = factors.run(weight, unit_rows, finite, Step(moments, hyper, rates, eps, copy))
    torch.autograd.graph.increment_version(weight)
    if copy is not None:
        copy.mark_current(weight)
    return squares

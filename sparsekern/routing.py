"""Which experts serve which tokens: what a router returns and a routed encoder takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sparsekern.codes import SparseCodes


class Routing(NamedTuple):
    """The experts of every token, and the same sorted by expert.

    Expert `i` owns the latents ``i · d_sae / n_experts`` up to the next expert's first. Slot ``b · n_active + j`` is
    the j-th expert of token b. Tokens are counted over the flattened leading dimensions of the router's input.

    Attributes
    ----------
    experts : Tensor [B, n_active], int32
        Each token's experts, best first, without repeats.
    gates : Tensor [B, n_active]
        Their gates, in float32 at least. Differentiable.
    order : Tensor [B · n_active], int32
        Slots by rising expert, and inside an expert by rising slot.
    offsets : Tensor [n_experts + 1], int32
        Where each expert's slots begin in `order`.
    logits : Tensor [B, n_experts] or None
        What the gates were made of, in float32 at least. Differentiable: losses that balance experts use them. None
        where no router chose the experts.
    """

    experts: Tensor
    gates: Tensor
    order: Tensor
    offsets: Tensor
    logits: Tensor | None

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return self.offsets.shape[0] - 1

    @property
    def n_active(self) -> int:
        """Experts a token."""
        return self.experts.shape[1]

    def loads(self) -> Tensor:
        """Tokens of each expert: ``[n_experts]`` int64."""
        return self.offsets.diff().long()

    def gates_of(self, codes: SparseCodes) -> Tensor:
        """The gate of the expert of each code, ``[..., k]`` as the codes are. Differentiable.

        A code whose expert does not serve its token, which no routed encoder makes, gets 0.
        """
        latents = codes.d_sae // self.n_experts
        owner = (codes.indices.reshape(-1, codes.k) // latents).unsqueeze(2)
        serves = owner == self.experts.unsqueeze(1)  # [B, k, n_active]
        return (serves * self.gates.unsqueeze(1)).sum(2).reshape(codes.values.shape)

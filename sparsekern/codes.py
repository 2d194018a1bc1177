"""Sparse codes: what an encoder returns and a decoder takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SparseCodes(NamedTuple):
    """The k kept latents of every token.

    Rows are ordered by falling pre-activation, ties by rising latent index. A slot whose pre-activation was not
    positive holds the value 0 and carries no gradient.

    Attributes
    ----------
    values : Tensor [..., k]
        Latent activations, never negative.
    indices : Tensor [..., k], int32
        Latent indices in ``[0, d_sae)``, without repeats inside a row.
    d_sae : int
        Number of latents in the dictionary.
    """

    values: Tensor
    indices: Tensor
    d_sae: int

    @property
    def k(self) -> int:
        """Slots a token."""
        return self.values.shape[-1]

    def to_dense(self) -> Tensor:
        """The codes as a dense ``[..., d_sae]`` tensor. It is as large as it sounds: meant for small checks."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter_add(-1, self.indices.long(), self.values)

    def l0(self) -> Tensor:
        """Active latents of each token, ``[...]`` int64."""
        return (self.values > 0).sum(-1)

    def firing_counts(self) -> Tensor:
        """On how many tokens each latent is active: ``[d_sae]`` int64."""
        counts = torch.zeros(self.d_sae, dtype=torch.int64, device=self.values.device)
        return counts.scatter_add_(0, self.indices.flatten().long(), (self.values > 0).flatten().long())

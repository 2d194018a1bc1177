"""Which latents are active together: pairs and their counts, and the same codes where that was made random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparsekern as sk

try:
    import numpy as np
    from scipy.sparse import csr_array
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

_DENSE = 0.25  # of the tokens; above it they are drawn one latent at a time
_NEAR = 16  # latents of neighbouring densities that take each other's place


@dataclass(frozen=True)
class Active:
    """Where latents are active: an entry for each, by rising token and latent.

    Attributes
    ----------
    token, latent : Tensor [nnz] int64
    tokens, latents : int
        How many there are.
    """

    token: Tensor
    latent: Tensor
    tokens: int
    latents: int

    @staticmethod
    def of(codes: sk.SparseCodes | sk.CSRCodes, chunks: Tensor | None = None) -> Active:
        """Entries that are not 0 of `codes`, on the CPU; with `chunks` ``[B]`` a latent is active in a chunk or not.

        Raises
        ------
        ValueError
            For codes that are not finite, no token, and chunks that are not whole numbers of that many tokens.
        """
        csr = codes.to_csr() if isinstance(codes, sk.SparseCodes) else codes
        if not csr.values.isfinite().all():
            raise ValueError("codes must be finite: remove the tokens with NaN or infinity")
        if csr.tokens == 0:
            raise ValueError("codes must have a token, got none")
        on = csr.values.detach() != 0
        token, tokens = csr.rows()[on].cpu(), csr.tokens
        if chunks is not None:
            if chunks.shape != (tokens,) or chunks.is_floating_point() or chunks.dtype == torch.bool:
                raise ValueError(
                    f"chunks must be whole numbers, one for each of the {tokens} tokens of codes, "
                    f"got {chunks.dtype} of shape {tuple(chunks.shape)}"
                )
            names, chunk = chunks.cpu().unique(return_inverse=True)
            token, tokens = chunk[token], len(names)
        return Active._at(token, csr.col[on].cpu().long(), tokens, csr.d_sae)

    @staticmethod
    def _at(token: Tensor, latent: Tensor, tokens: int, latents: int) -> Active:
        key = (token * latents + latent).unique()
        return Active(key // latents, key % latents, tokens, latents)

    def counts(self) -> Tensor:
        """Tokens of each latent, ``[latents]`` int64."""
        return torch.bincount(self.latent, minlength=self.latents)

    def matrix(self, latents: Tensor) -> Any:
        """A scipy CSR array of ones, tokens × the named latents."""
        place = torch.full((self.latents,), -1)
        place[latents] = torch.arange(len(latents))
        column = place[self.latent]
        kept = column >= 0
        where = (self.token[kept].numpy(), column[kept].numpy())
        return csr_array((np.ones(len(where[0])), where), shape=(self.tokens, len(latents)))

    def pairs(self, at_least: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs i < j of latents with at least so many tokens in common, and how many these are: int64."""
        crow = torch.cat(
            [torch.zeros(1, dtype=torch.int64), torch.bincount(self.token, minlength=self.tokens).cumsum(0)]
        )
        codes = sk.CSRCodes(crow, self.latent.int(), torch.ones(len(self.latent)), self.latents)
        found = sk.cooccurrence(codes, at_least)
        return found.rows(), found.col.long(), found.counts.long()

    def shuffled(self, generator: torch.Generator) -> Active:
        """As many tokens of each latent, drawn at random."""
        counts = self.counts()
        dense = counts > _DENSE * self.tokens
        parts = [
            latent * self.tokens + torch.randperm(self.tokens, generator=generator)[: int(counts[latent])]
            for latent in dense.nonzero().squeeze(1).tolist()
        ]
        missing = counts.masked_fill(dense, 0)
        drawn = torch.empty(0, dtype=torch.int64)
        while int(missing.sum()):  # what was drawn twice is drawn again
            latent = torch.arange(self.latents).repeat_interleave(missing)
            token = torch.randint(self.tokens, (len(latent),), generator=generator)
            drawn = torch.cat([drawn, latent * self.tokens + token]).unique()
            missing = counts.masked_fill(dense, 0) - torch.bincount(drawn // self.tokens, minlength=self.latents)
        key = torch.cat([drawn, *parts])
        return Active._at(key % self.tokens, key // self.tokens, self.tokens, self.latents)

    def exchanged(self, generator: torch.Generator) -> Active:
        """Each token's latents replaced by others of nearly the same density: it keeps how many of which density.

        The latents of 16 neighbouring ranks are turned among themselves, on every token by a number of its own.
        """
        order = self.counts().argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(self.latents)
        group, member = rank[self.latent] // _NEAR, rank[self.latent] % _NEAR
        size = torch.full((-(-self.latents // _NEAR),), _NEAR)
        size[-1] = self.latents - _NEAR * (len(size) - 1)
        _, which = (self.token * len(size) + group).unique(return_inverse=True)
        turn = torch.randint(2**31, (len(which),), generator=generator)[which]
        latent = order[group * _NEAR + (member + turn) % size[group]]
        return Active._at(self.token, latent, self.tokens, self.latents)

"""Sparse codes: what an encoder returns and a decoder takes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor


class SparseCodes(NamedTuple):
    """The k kept latents of every token.

    Rows are ordered by falling pre-activation, ties by rising latent index. A slot whose pre-activation was not
    positive holds the value 0 and carries no gradient. Of :func:`~sparsekern.topk_encode` with ``absolute``, values
    have signs and rows are ordered by size.

    Attributes
    ----------
    values : Tensor [..., k]
        Latent activations.
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

    @property
    def tokens(self) -> int:
        """How many tokens these are the codes of."""
        return self.values.numel() // self.k

    def to_dense(self) -> Tensor:
        """The codes as a dense ``[..., d_sae]`` tensor. It is as large as it sounds: meant for small checks."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter_add(-1, self.indices.long(), self.values)

    def to_csr(self) -> CSRCodes:
        """The same codes in CSR form: by rising latent, all slots of a token. Differentiable."""
        indices, order = self.indices.reshape(self.tokens, self.k).sort(dim=1)
        values = self.values.reshape(self.tokens, self.k).gather(1, order)
        crow = self.k * torch.arange(self.tokens + 1, device=order.device)
        return CSRCodes(crow, indices.flatten(), values.flatten(), self.d_sae)

    def l0(self) -> Tensor:
        """Active latents of each token, ``[...]`` int64."""
        return (self.values != 0).sum(-1)

    def firing_counts(self) -> Tensor:
        """On how many tokens each latent is active: ``[d_sae]`` int64."""
        return _counts(self.indices, self.values != 0, self.d_sae)

    def values_of(self, latents: Sequence[int]) -> Tensor:
        """Values of the named latents on each token, 0 where they are not among its codes: ``[..., len(latents)]``."""
        place = _places(latents, self.d_sae, self.indices)[self.indices.long()]
        found = self.values.new_zeros(*self.values.shape[:-1], len(latents) + 1)  # the last takes all other latents
        return found.scatter_add(-1, place, self.values)[..., :-1]

    def with_values(self, latents: Sequence[int], values: Tensor | float) -> SparseCodes:
        """Codes in which the named latents have the given values, a number or anything that fits ``[..., n]``.

        The number 0 changes the values of slots and no more. Otherwise every token gets n slots at its end, not in
        order, and a slot that named one of these latents before holds 0.
        """
        place = _places(latents, self.d_sae, self.indices)
        kept = torch.where(place[self.indices.long()] == len(latents), self.values, 0)
        if not isinstance(values, Tensor) and values == 0:
            return self._replace(values=kept)
        shape = (*kept.shape[:-1], len(latents))
        added = torch.as_tensor(values, dtype=kept.dtype, device=kept.device).expand(shape)
        named = torch.as_tensor(latents, dtype=torch.int32, device=kept.device).expand(shape)
        return SparseCodes(torch.cat([kept, added], -1), torch.cat([self.indices, named], -1), self.d_sae)


class CSRCodes(NamedTuple):
    """Codes with any number of latents a token, in compressed sparse row form.

    Tokens are counted over the flattened leading dimensions of the encoder's input. The entries of token b are
    ``crow[b]:crow[b + 1]``, by rising latent index. An entry whose pre-activation was not positive holds the value 0
    and carries no gradient.

    Attributes
    ----------
    crow : Tensor [B + 1], int64
        Where the entries of each token begin; ``crow[0] = 0`` and ``crow[B] = nnz``.
    col : Tensor [nnz], int32
        Latent indices in ``[0, d_sae)``, without repeats inside a row.
    values : Tensor [nnz]
        Latent activations.
    d_sae : int
        Number of latents in the dictionary.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    d_sae: int

    @property
    def tokens(self) -> int:
        """How many tokens these are the codes of."""
        return self.crow.shape[0] - 1

    def to_dense(self) -> Tensor:
        """The codes as a dense ``[B, d_sae]`` tensor. It is as large as it sounds: meant for small checks."""
        dense = self.values.new_zeros(self.tokens, self.d_sae)
        return dense.index_put((self.rows(), self.col.long()), self.values, accumulate=True)

    def l0(self) -> Tensor:
        """Active latents of each token, ``[B]`` int64."""
        return _counts(self.rows(), self.values != 0, self.tokens)

    def firing_counts(self) -> Tensor:
        """On how many tokens each latent is active: ``[d_sae]`` int64."""
        return _counts(self.col, self.values != 0, self.d_sae)

    def rows(self) -> Tensor:
        """The token of each entry, ``[nnz]`` int64."""
        return entry_rows(self.crow, self.col)

    def values_of(self, latents: Sequence[int]) -> Tensor:
        """Values of the named latents on each token, 0 where they are not among its codes: ``[B, len(latents)]``."""
        place = _places(latents, self.d_sae, self.col)[self.col.long()]
        found = self.values.new_zeros(self.tokens, len(latents) + 1)  # the last takes all other latents
        return found.index_put((self.rows(), place), self.values, accumulate=True)[:, :-1]

    def with_values(self, latents: Sequence[int], values: Tensor | float) -> CSRCodes:
        """Codes in which the named latents have the given values, a number or anything that fits ``[B, n]``.

        The number 0 changes the values of entries and no more. Otherwise every token gets n entries, in their order.
        """
        others = _places(latents, self.d_sae, self.col)[self.col.long()] == len(latents)
        if not isinstance(values, Tensor) and values == 0:
            return self._replace(values=torch.where(others, self.values, 0))
        tokens, n = self.tokens, len(latents)
        added = torch.as_tensor(values, dtype=self.values.dtype, device=self.col.device).expand(tokens, n)
        named = torch.as_tensor(latents, dtype=torch.int32, device=self.col.device).repeat(tokens)
        new_rows = torch.arange(tokens, device=self.col.device).repeat_interleave(n)
        rows = torch.cat([self.rows()[others], new_rows])
        col = torch.cat([self.col[others], named])
        order = (rows * self.d_sae + col).argsort()
        crow = torch.cat([self.crow.new_zeros(1), torch.bincount(rows, minlength=tokens).cumsum(0)])
        return CSRCodes(crow, col[order], torch.cat([self.values[others], added.flatten()])[order], self.d_sae)


class Cooccurrence(NamedTuple):
    """On how many tokens two latents are both active, for the pairs i < j where these are enough.

    The pairs of latent i are ``crow[i]:crow[i + 1]``, by rising j: the upper triangle of a symmetric matrix in
    compressed sparse row form, whose diagonal is `active`.

    Attributes
    ----------
    crow : Tensor [d_sae + 1], int64
        Where the pairs of each latent begin; ``crow[0] = 0``.
    col : Tensor [pairs], int32
        The other latent, j.
    counts : Tensor [pairs], int32
        Tokens on which both are active.
    active : Tensor [d_sae], int64
        Tokens on which each latent is active.
    """

    crow: Tensor
    col: Tensor
    counts: Tensor
    active: Tensor

    @property
    def d_sae(self) -> int:
        """Number of latents in the dictionary."""
        return self.active.shape[0]

    def rows(self) -> Tensor:
        """The first latent of each pair, i: ``[pairs]`` int64."""
        return entry_rows(self.crow, self.col)


def entry_rows(crow: Tensor, col: Tensor) -> Tensor:
    """The row of each entry of a CSR form, ``[nnz]`` int64, rising."""
    rows = torch.arange(crow.shape[0] - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff(), output_size=col.shape[0])  # told its size, it need not ask the device


def check_latents(latents: Sequence[int], d_sae: int) -> None:
    """Whole numbers in ``[0, d_sae)``, none twice."""
    for latent in latents:
        if not isinstance(latent, Integral) or not 0 <= latent < d_sae:
            raise ValueError(f"latents must be whole numbers in [0, {d_sae}), got {latent!r}")
    if len(set(latents)) < len(latents):
        raise ValueError(f"latents must not repeat, got {list(latents)}")


def _places(latents: Sequence[int], d_sae: int, like: Tensor) -> Tensor:
    """For every latent its place in `latents`, or their number where it is none of them: ``[d_sae]`` int64."""
    check_latents(latents, d_sae)
    places = torch.full((d_sae,), len(latents), dtype=torch.int64, device=like.device)
    places[torch.tensor(latents, dtype=torch.int64, device=like.device)] = torch.arange(
        len(latents), device=like.device
    )
    return places


def _counts(where: Tensor, active: Tensor, size: int) -> Tensor:
    """How many active entries there are at each of `size` places."""
    counts = torch.zeros(size, dtype=torch.int64, device=active.device)
    return counts.scatter_add_(0, where.flatten().long(), active.flatten().long())

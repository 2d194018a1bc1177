"""Antipodal pairs: for each latent the one that opposes it most, exactly and in wide dictionaries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import sparsekern as sk

BATCH_BYTES = 96 * 2**20  # of a batch of rows: enough of them for the int8 copy of the block to cost little
_BLOCK_BYTES = 192 * 2**20  # of the latents that a batch of rows is compared with at a time
_CHUNK_BYTES = 32 * 2**20  # of temporaries
_KEPT = (8, 64)  # candidates of a row in a block, and those of a row that needs more
_ROUNDING = 2e-6  # of a score in float32


@dataclass(frozen=True, eq=False)
class AntipodalPairs:
    """What :func:`antipodal_pairs` returns; W latents.

    Attributes
    ----------
    j : Tensor [W] int64
        The partner: the latent with which a latent has its score. −1 where no latent has two negative cosines with it.
    cos_dec, cos_enc : Tensor [W] float32
        Cosines of the decoder's and the encoder's rows with the partner's, both negative; NaN without a partner.
    score : Tensor [W] float32
        Product of the two, 0 … 1; 0 without a partner.
    is_pair : Tensor [W] bool
        Whether the score is at least `tau`.
    measured : Tensor [W] bool
        Latents that were compared: those asked for, less those with a row of zeros, which has no direction.
    tau : float
    repaired : int
        Latents that the first pass had no certificate for. They cost time and nothing else.
    """

    j: Tensor
    cos_dec: Tensor
    cos_enc: Tensor
    score: Tensor
    is_pair: Tensor
    measured: Tensor
    tau: float
    repaired: int

    @property
    def pairs(self) -> Tensor:
        """The pairs ``[n_pairs, 2]`` int64, the lower latent first, by rising latent: of each with its partner."""
        latents = self.is_pair.nonzero().squeeze(1)
        return torch.stack([latents, self.j[latents]], 1).sort(dim=1).values.unique(dim=0)

    @property
    def n_pairs(self) -> int:
        """Number of different pairs; latents that share a partner have a pair each."""
        return len(self.pairs)

    def strongest(self, n: int) -> Tensor:
        """The `n` pairs of the highest scores, highest first, whatever `tau`: ``[n, 2]`` int64, the lower latent first.

        Only of latents that are each other's partner, so that no latent is in two; fewer where there are not so many.
        """
        latents = torch.arange(len(self.j), device=self.j.device)
        mutual = ((self.j > latents) & (self.j[self.j.clamp(min=0)] == latents)).nonzero().squeeze(1)
        order = self.score[mutual].argsort(descending=True, stable=True)[:n]
        return torch.stack([mutual[order], self.j[mutual[order]]], 1)

    @property
    def share(self) -> float:
        """Share of the measured latents that are in a pair; NaN where none was measured."""
        return float(self.is_pair[self.measured].double().mean())


@torch.no_grad()
def antipodal_pairs(
    D: Tensor, E: Tensor | None = None, tau: float = 0.8, *, alive: Tensor | None = None
) -> AntipodalPairs:
    """For each latent the one that opposes it most, in decoder and encoder: exact, without a W × W tensor.

    The score of latent i is ``max_j cos(E_i, E_j) · cos(D_i, D_j)`` over the j with which *both* cosines are negative.
    Without that, duplicates would score as high as opposites.

    The product of two numbers is at most the square of their mean. So the latents with the most negative *mean* cosine
    are candidates, which is one exact top k of ``−U Uᵀ``, with ``U`` both unit rows side by side, by
    :func:`sparsekern.topk_encode`. A row whose best product is no less than the square of its last candidate's mean is
    certain; others are searched again with more candidates, and then in full. Scores are those of float32, and partners
    of equal score within its rounding (2e-6) are interchangeable.

    Besides the weights it takes 0.7 GiB for W = 131,072 rows of 768 numbers each, and hardly more for more.

    Parameters
    ----------
    D : Tensor [W, d_out]
        Decoder, one row a latent. Norms do not matter. In float32, whatever its dtype, once the rows have unit norm.
    E : Tensor [W, d_in] or None
        Encoder. Without it, it is taken to be `D`, as of tied weights: scores are then squares of negative cosines.
    tau : float
        Least score of a pair, above 0 and at most 1.
    alive : Tensor [W] bool or None
        Latents to compare; by default all. Dead ones keep the directions that they started with.

    Returns
    -------
    AntipodalPairs
        On the device of `D`.

    Raises
    ------
    ValueError
        On wrong shapes, dtypes or devices, NaN or infinity, and a `tau` out of range.

    References
    ----------
    Sun et al., *Dense SAE latents are features, not bugs* (arXiv 2506.15679), for the score.
    """
    check_tau(tau)
    latents = Latents(D, E, alive)
    rows = latents.known.nonzero().squeeze(1)
    found = opposites(latents, rows)
    W, device = len(latents), latents.device
    j = torch.full((W,), -1, device=device)
    score = torch.zeros(W, device=device)
    cos_dec, cos_enc = (torch.full((W,), torch.nan, device=device) for _ in range(2))
    j[rows], score[rows], cos_dec[rows], cos_enc[rows] = found.j, found.score, found.cos_dec, found.cos_enc
    return AntipodalPairs(j, cos_dec, cos_enc, score, score >= tau, latents.known, tau, found.repaired)


class Latents:
    """Unit rows of decoder and encoder side by side, over the root of two, made as they are needed.

    The product of two such rows is the mean of the cosines of decoder and encoder. Rows of latents that are left out
    are zero, so that they oppose nothing.
    """

    def __init__(self, decoder: Tensor, encoder: Tensor | None, alive: Tensor | None = None) -> None:
        _check_weight("D", decoder)
        # Of tied weights the score is a square, and half of the work is enough.
        self.tied = encoder is None or encoder is decoder
        self.weights = [decoder.detach()]
        if encoder is not None and not self.tied:
            _check_weight("E", encoder)
            if len(encoder) != len(decoder):
                raise ValueError(f"E must have a row for each of the {len(decoder)} rows of D, got {len(encoder)}")
            if encoder.device != decoder.device:
                raise ValueError(f"E must be on the device of D, {decoder.device}, got {encoder.device}")
            self.weights.append(encoder.detach())
        self.device = decoder.device
        norms = [_norms(name, weight) for name, weight in zip("DE", self.weights, strict=False)]
        self.known = torch.stack([norm > 0 for norm in norms]).all(0)
        if alive is not None:
            if alive.shape != (len(decoder),) or alive.dtype != torch.bool:
                got = f"{tuple(alive.shape)} {alive.dtype}"
                raise ValueError(f"alive must be [{len(decoder)}] bool, one for each row of D, got {got}")
            self.known &= alive.to(self.device)
        self.scales = [
            _scale(weight, norm).masked_fill_(~self.known, 0) / len(norms) ** 0.5
            for weight, norm in zip(self.weights, norms, strict=True)
        ]
        self.split = decoder.shape[1]
        self.width = sum(weight.shape[1] for weight in self.weights)

    def __len__(self) -> int:
        return len(self.known)

    def rows(self, which: Tensor) -> Tensor:
        """The rows `which` ``[n]`` int64: ``[n, width]`` float32."""
        rows = torch.empty(len(which), self.width, device=self.device)
        for part in parts(len(which), _CHUNK_BYTES // (4 * self.width)):
            some, left = which[part], 0
            for weight, scale in zip(self.weights, self.scales, strict=True):
                into = rows[part, left : left + weight.shape[1]]
                torch.mul(weight[some], scale[some, None], out=into)
                left += weight.shape[1]
        return rows

    def opposition(self, reversed_rows: Tensor, others: Tensor) -> Tensor:
        """Of pairs of rows ``[n, width]``, the first times −1: cosines of decoder and encoder times −1, ``[n, 2]``."""
        product = (reversed_rows * others).mul_(len(self.weights))
        if self.tied:
            return product.sum(1, keepdim=True).expand(-1, 2)
        return torch.stack([product[:, : self.split].sum(1), product[:, self.split :].sum(1)], 1)


@dataclass(frozen=True, eq=False)
class Found:
    """Opposites of n rows: the best so far, and what an unseen one could have at most."""

    j: Tensor
    score: Tensor
    opposition: Tensor  # [n, 2]: of decoder and encoder
    bound: Tensor
    repaired: int = 0

    @classmethod
    def none(cls, n: int, device: torch.device) -> Found:
        """Nothing found yet."""
        zeros = torch.zeros(n, device=device)
        nowhere = torch.full((n,), -1, device=device)
        return cls(nowhere, zeros, torch.full((n, 2), torch.nan, device=device), zeros.clone())

    @property
    def cos_dec(self) -> Tensor:
        """Cosines of the decoder's rows ``[n]``."""
        return -self.opposition[:, 0]

    @property
    def cos_enc(self) -> Tensor:
        """Cosines of the encoder's rows ``[n]``."""
        return -self.opposition[:, 1]

    def uncertain(self) -> Tensor:
        """Rows, by number, that could have a better opposite."""
        return (self.bound > self.score + _ROUNDING).nonzero().squeeze(1)

    def replace_(self, rows: Tensor, better: Found) -> None:
        """Put what a further search found in the place of these rows."""
        self.j[rows], self.score[rows], self.bound[rows] = better.j, better.score, better.bound
        self.opposition[rows] = better.opposition


def opposites(latents: Latents, rows: Tensor) -> Found:
    """The best opposites of some latents among all: certain ones."""
    found = _among_nearest(latents, rows, 1 if latents.tied else _KEPT[0])
    uncertain = found.uncertain()
    repaired = len(uncertain)
    if repaired:
        found.replace_(uncertain, _among_nearest(latents, rows[uncertain], _KEPT[1]))
        uncertain = found.uncertain()
    if len(uncertain):
        found.replace_(uncertain, _among_all(latents, rows[uncertain]))
    return Found(found.j, found.score, found.opposition, found.bound, repaired)


def _among_nearest(latents: Latents, rows: Tensor, kept: int) -> Found:
    """The best opposites of some latents among the `kept` in each block whose mean cosines are most negative."""
    found = Found.none(len(rows), latents.device)
    for columns in parts(len(latents), _BLOCK_BYTES // (4 * latents.width)):
        block = latents.rows(torch.arange(columns.start, columns.stop, device=latents.device))
        k = min(kept, len(block))
        for part in parts(len(rows), BATCH_BYTES // (4 * latents.width)):
            batch = latents.rows(rows[part]).neg_()
            mean, there, _ = sk.topk_encode(batch, block, None, k)
            if k < len(block):
                found.bound[part] = torch.maximum(found.bound[part], mean[:, -1].square())
            row, slot = (mean.square() > found.score[part, None]).nonzero(as_tuple=True)
            opposition = torch.zeros(*mean.shape, 2, device=latents.device)
            for some in parts(len(row), _CHUNK_BYTES // (4 * latents.width)):
                at = row[some], slot[some]
                opposition[at] = latents.opposition(batch[at[0]], block[there[at].long()])
            _improve(found, part, opposition, there + columns.start)
    return found


def _among_all(latents: Latents, rows: Tensor) -> Found:
    """The best opposites of some latents, from all their cosines."""
    found = Found.none(len(rows), latents.device)
    for columns in parts(len(latents), _BLOCK_BYTES // (4 * latents.width)):
        block = latents.rows(torch.arange(columns.start, columns.stop, device=latents.device))
        for part in parts(len(rows), _CHUNK_BYTES // (8 * len(block))):
            batch = latents.rows(rows[part]).neg_()
            score = (batch[:, : latents.split] @ block[:, : latents.split].T).clamp_(min=0)
            score *= (batch[:, latents.split :] @ block[:, latents.split :].T).clamp_(min=0)
            there = score.argmax(1)
            opposition = latents.opposition(batch, block[there])
            _improve(found, part, opposition[:, None], there[:, None] + columns.start)
    return found


def _improve(found: Found, part: slice, opposition: Tensor, there: Tensor) -> None:
    """Take the best of some candidates ``[n, k]`` for the rows `part`, where it is better than what these have."""
    scores = opposition.clamp(min=0).prod(2)
    score, slot = scores.max(1)
    better = score > found.score[part]
    slot = slot[:, None]
    found.score[part] = torch.where(better, score, found.score[part])
    found.j[part] = torch.where(better, there.gather(1, slot).squeeze(1).long(), found.j[part])
    new = opposition.gather(1, slot[..., None].expand(-1, -1, 2)).squeeze(1)
    found.opposition[part] = torch.where(better[:, None], new, found.opposition[part])


def parts(n: int, size: int) -> Iterator[slice]:
    """Slices that cut `n` things into parts of `size`, or of 1 where that is less."""
    size = max(1, size)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _norms(name: str, weight: Tensor) -> Tensor:
    """Norms of the rows ``[W]`` in float64, which has room for their squares; ValueError unless they are finite."""
    some = _CHUNK_BYTES // (8 * weight.shape[1])
    norms = torch.cat([weight[part].double().norm(dim=1) for part in parts(len(weight), some)])
    if not norms.isfinite().all():
        first = int((~norms.isfinite()).nonzero()[0])
        raise ValueError(f"{name} holds NaN or infinity, first in row {first}; repair such rows or leave them out")
    return norms


def _scale(weight: Tensor, norm: Tensor) -> Tensor:
    """What gives the rows unit norm, in float32 where neither it nor the rows lose anything by that."""
    usual = bool(((norm == 0) | ((norm > 1e-30) & (norm < 1e30))).all())
    return norm.reciprocal().to(torch.float32 if usual and weight.dtype != torch.float64 else torch.float64)


def _check_weight(name: str, weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name} must be a matrix of floating-point numbers, one row a latent, got {got}")


def check_tau(tau: float) -> None:
    """ValueError unless it can be the score of a pair."""
    if not 0 < tau <= 1:
        raise ValueError(f"tau must be above 0 and at most 1, got {tau}")

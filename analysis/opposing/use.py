"""What the two latents of a pair do on tokens: whether they fire together, and whether they code one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.opposing.report import check_n_null
from sparsekern.analysis.results import Result, Results, samples

_TOKENS = 8192  # whose products are summed at a time, in float64
_NEAR = 16  # latents of the nearest density, of which one takes a partner's place


@dataclass(frozen=True, eq=False)
class PairUse(Results):
    """What :func:`pair_use` returns; n pairs.

    Attributes
    ----------
    results : dict of str to Result
        ``together`` and ``explained``, over all pairs.
    pairs : Tensor [n, 2] int64
    active : Tensor [n, 2] int64
        Tokens on which each of the two is active.
    both : Tensor [n] int64
        Tokens on which both are.
    expected : Tensor [n] float64
        What `both` would be on average if they were independent.
    explained, alone : Tensor [n] float64
        Share of the variance along the pair's axis that the two explain, and the better of them alone.
    """

    results: dict[str, Result]
    pairs: Tensor
    active: Tensor
    both: Tensor
    expected: Tensor
    explained: Tensor
    alone: Tensor


@torch.no_grad()
def pair_use(
    x: Tensor,
    codes: sk.SparseCodes | sk.CSRCodes,
    decoder: Tensor,
    pairs: Tensor,
    *,
    n_null: int = 100,
    seed: int = 0,
) -> PairUse:
    """Whether the two latents of each pair exclude each other, and are the two signs of one projection.

    ``together``
        Tokens on which both are active over those expected of independent latents, summed over the pairs: 0 where the
        two exclude each other, 1 where they know nothing of each other.
    ``explained``
        Mean over the pairs of the squared correlation of ``z_i − z_j`` with the projection of `x` on the pair's axis,
        ``D_i − D_j`` of unit rows; z in units of what a latent writes. Half of a normal projection explains 0.73 of it,
        both halves all of it: the control says what the better side alone explains.

    Nulls: the *tokens* of the second latent *permuted* (of ``together``), and *another partner*: one of the 16 active
    latents whose densities are nearest to the second one's, with the axis that it makes. The second knows that any two
    latents compete for a token's k places, and that each explains something of an axis that it is part of.

    Takes B · 18 n numbers, twice.

    Parameters
    ----------
    x : Tensor [B, d]
        Tokens, as the decoder writes them.
    codes : SparseCodes or CSRCodes
        Of these tokens; values may have both signs, and any but 0 counts as active.
    decoder : Tensor [W, d]
        One row a latent.
    pairs : Tensor [n, 2] of ints
        Such as :meth:`AntipodalPairs.strongest`.
    n_null : int
        Samples of each null.
    seed : int
        Determines them.

    Raises
    ------
    ValueError
        On shapes that do not fit, no pair, pairs of a latent with itself, and without a third active latent.
    """
    counts = _check(x, codes, decoder, pairs)
    check_n_null(n_null)
    pairs = pairs.long().cpu()
    B = len(x)
    active = (counts > 0).nonzero().squeeze(1)
    if len(active) < 3:
        raise ValueError("codes must have at least 3 active latents: the null gives a latent another partner")
    pools = [_nearest(counts, active, *pair) for pair in pairs.tolist()]
    latents = torch.cat([pairs.flatten(), *pools]).unique()
    place = torch.full((len(counts),), -1)
    place[latents] = torch.arange(len(latents))
    rows = decoder[latents.to(decoder.device)].float().cpu()
    z = codes.values_of(latents.tolist()).float().cpu().T.contiguous()
    fires = z != 0
    along = normalize(rows, dim=1) @ x.detach().float().cpu().T
    # Everything about two latents follows from three tables of products; all pairs are columns of places in them.
    met = _products(fires, fires)
    moments = _Moments.of(along, rows.norm(dim=1, keepdim=True) * z)
    places = place[pairs].T
    both = met[places[0], places[1]]
    expected = counts[pairs].double().prod(1) / B
    explained = moments.explained(places, places)
    alone = torch.maximum(*(moments.explained(places, places[side : side + 1]) for side in (0, 1)))
    generator = torch.Generator().manual_seed(seed)
    permuted, other_together, other_explained = [], [], []
    for _ in range(n_null):
        mixed = [fires[j][torch.randperm(B, generator=generator)] for j in places[1].tolist()]
        permuted.append(
            _over(sum(float((fires[i] & some).sum()) for i, some in zip(places[0], mixed, strict=True)), expected)
        )
        drawn = torch.stack([pool[torch.randint(len(pool), (1,), generator=generator)] for pool in pools]).squeeze(1)
        others = torch.stack([places[0], place[drawn]])
        apart = counts[pairs[:, 0]].double() * counts[drawn] / B
        other_together.append(_over(float(met[others[0], others[1]].sum()), apart))
        other_explained.append(float(moments.explained(others, others).mean()))
    together = Result(
        "tokens on which both latents of a pair are active, over those of independent latents",
        _over(float(both.sum()), expected),
        {"tokens permuted": samples(permuted), "another partner": samples(other_together)},
        tail="less",
    )
    line = Result(
        "share of the variance along a pair's axis that its two latents explain",
        float(explained.mean()),
        {"another partner": samples(other_explained)},
        {"the better side alone": samples([float(alone.mean())])},
    )
    results = {"together": together, "explained": line}
    return PairUse(results, pairs, counts[pairs], both.long(), expected, explained, alone)


@torch.no_grad()
def two_sided(codes: sk.SparseCodes | sk.CSRCodes, latents: Tensor, *, n_null: int = 1000, seed: int = 0) -> Result:
    """Whether some latents of signed codes use both signs: mean of the smaller of a latent's two shares.

    0 where each has one sign only, 0.5 where both are as frequent. Null: as many random active latents.

    Parameters
    ----------
    codes : SparseCodes or CSRCodes
        Such as those of :class:`sparsekern.AbsTopK`.
    latents : Tensor [n] of ints
        Active ones; silent ones are left out.
    n_null : int
        Samples of the null.
    seed : int
        Determines it.
    """
    check_n_null(n_null)
    positive, negative = (_times(codes, sign).cpu().double() for sign in (1, -1))
    counts = positive + negative
    share = torch.minimum(positive, negative) / counts
    active = (counts > 0).nonzero().squeeze(1)
    latents = latents.long().cpu()
    latents = latents[counts[latents] > 0]
    generator = torch.Generator().manual_seed(seed)
    drawn = [active[torch.randperm(len(active), generator=generator)[: len(latents)]] for _ in range(n_null)]
    return Result(
        "share of a latent's tokens on which it has its rarer sign",
        float(share[latents].mean()),
        {"as many random latents": samples(float(share[some].mean()) for some in drawn)},
    )


def _times(codes: sk.SparseCodes | sk.CSRCodes, sign: int) -> Tensor:
    """On how many tokens each latent has a value of this sign: ``[W]``."""
    return codes._replace(values=(sign * codes.values).clamp(min=0)).firing_counts()


def _nearest(counts: Tensor, active: Tensor, i: int, j: int) -> Tensor:
    """The active latents whose counts are nearest to that of j, apart from i and j."""
    others = active[(active != i) & (active != j)]
    return others[(counts[others] - counts[j]).abs().argsort(stable=True)[:_NEAR]]


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Sums over the tokens of products of rows ``[m, B]``: ``[m, m]`` float64."""
    parts = zip(first.split(_TOKENS, 1), second.split(_TOKENS, 1), strict=True)
    return sum((a.double() @ b.double().T for a, b in parts), torch.zeros(len(first), len(second)).double())


@dataclass(frozen=True, eq=False)
class _Moments:
    """Second moments about the mean, of projections on m latents' rows and of what these latents write: ``[m, m]``."""

    along: Tensor
    written: Tensor
    mixed: Tensor

    @classmethod
    def of(cls, along: Tensor, written: Tensor) -> _Moments:
        along, written = (rows - rows.mean(1, keepdim=True) for rows in (along, written))
        return cls(_products(along, along), _products(written, written), _products(along, written))

    def explained(self, axis: Tensor, code: Tensor) -> Tensor:
        """Squared correlation of the axes between latents ``[2, n]`` with what the code writes, ``[n]`` float64.

        The code is a difference of two latents ``[2, n]``, or one latent ``[1, n]``. 0 where one of both does not vary.
        """
        apart = _spread(self.along, axis) * _spread(self.written, code)
        towards = self.mixed[axis[0], code] - self.mixed[axis[1], code]
        product = towards[0] - towards[1] if len(code) == 2 else towards[0]
        return torch.where(apart > 0, product.square() / apart, 0)


def _spread(moments: Tensor, latents: Tensor) -> Tensor:
    """Second moment of the difference of two rows ``[2, n]``, or of one row ``[1, n]``; 0 within rounding."""
    if len(latents) == 1:
        return moments[latents[0], latents[0]]
    i, j = latents
    both = moments[i, i] + moments[j, j]
    apart = both - 2 * moments[i, j]
    return torch.where(apart > 1e-9 * both, apart, 0)


def _over(met: float, expected: Tensor) -> float:
    return met / float(expected.sum()) if expected.sum() > 0 else float("nan")


def _check(x: Tensor, codes: sk.SparseCodes | sk.CSRCodes, decoder: Tensor, pairs: Tensor) -> Tensor:
    """Counts of the latents ``[W]``, or a ValueError."""
    if x.dim() != 2 or len(x) != codes.tokens:
        raise ValueError(f"x must be [{codes.tokens}, d], the tokens of the codes, got {tuple(x.shape)}")
    if decoder.shape != (codes.d_sae, x.shape[1]):
        expected = (codes.d_sae, x.shape[1])
        raise ValueError(f"decoder must be {list(expected)}, latents × width of x, got {tuple(decoder.shape)}")
    if pairs.dim() != 2 or pairs.shape[1] != 2 or len(pairs) == 0 or pairs.is_floating_point():
        raise ValueError(f"pairs must be [n, 2] latents, with a pair at least, got {tuple(pairs.shape)} {pairs.dtype}")
    if (pairs[:, 0] == pairs[:, 1]).any() or pairs.min() < 0 or pairs.max() >= codes.d_sae:
        raise ValueError(f"pairs must hold two different latents each, of 0 … {codes.d_sae - 1}")
    return codes.firing_counts().cpu()

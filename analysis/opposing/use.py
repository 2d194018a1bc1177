"""What the two latents of a pair do on tokens: whether they fire together, and whether they code one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.opposing.report import check_n_null
from sparsekern.analysis.results import Result, samples

_NEAR = 16  # latents of the nearest density, of which one takes a partner's place


@dataclass(frozen=True, eq=False)
class PairUse:
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
    n, B = len(pairs), len(x)
    active = (counts > 0).nonzero().squeeze(1)
    if len(active) < 3:
        raise ValueError("codes must have at least 3 active latents: the null gives a latent another partner")
    pools = [_nearest(counts, active, *pair) for pair in pairs.tolist()]
    latents = torch.cat([pairs.flatten(), *pools]).unique()
    place = torch.full((len(counts),), -1)
    place[latents] = torch.arange(len(latents))
    rows = decoder[latents.to(decoder.device)].float().cpu()
    z = codes.values_of(latents.tolist()).float().cpu() * rows.norm(dim=1)
    along = x.detach().float().cpu() @ normalize(rows, dim=1).T

    def both_active(i: int, j: int) -> int:
        return int(((z[:, place[i]] != 0) & (z[:, place[j]] != 0)).sum())

    def explained_by(i: int, j: int) -> float:
        first, second = place[i], place[j]
        return _explained(along[:, first] - along[:, second], z[:, first] - z[:, second])

    def alone(i: int, j: int) -> float:
        axis = along[:, place[i]] - along[:, place[j]]
        return max(_explained(axis, z[:, place[latent]]) for latent in (i, j))

    expected = counts[pairs].double().prod(1) / B
    both = torch.tensor([both_active(i, j) for i, j in pairs.tolist()])
    explained = samples(explained_by(i, j) for i, j in pairs.tolist())
    singly = samples(alone(i, j) for i, j in pairs.tolist())
    generator = torch.Generator().manual_seed(seed)
    permuted, other_together, other_explained = [], [], []
    for _ in range(n_null):
        met = 0
        for i, j in pairs.tolist():
            order = torch.randperm(B, generator=generator)
            met += int(((z[:, place[i]] != 0) & (z[order, place[j]] != 0)).sum())
        permuted.append(met / float(expected.sum()) if expected.sum() > 0 else float("nan"))
        drawn = [int(pool[torch.randint(len(pool), (1,), generator=generator)]) for pool in pools]
        others = torch.stack([pairs[:, 0], torch.tensor(drawn)], 1)
        apart = float(counts[others].double().prod(1).sum()) / B
        other_together.append(sum(both_active(i, j) for i, j in others.tolist()) / apart if apart > 0 else float("nan"))
        other_explained.append(sum(explained_by(i, j) for i, j in others.tolist()) / n)
    together = Result(
        "tokens on which both latents of a pair are active, over those of independent latents",
        float(both.sum() / expected.sum()) if expected.sum() > 0 else float("nan"),
        {"tokens permuted": samples(permuted), "another partner": samples(other_together)},
        tail="less",
    )
    line = Result(
        "share of the variance along a pair's axis that its two latents explain",
        float(explained.mean()),
        {"another partner": samples(other_explained)},
        {"the better side alone": samples([float(singly.mean())])},
    )
    results = {"together": together, "explained": line}
    return PairUse(results, pairs, counts[pairs], both, expected, explained, singly)


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


def _explained(axis: Tensor, code: Tensor) -> float:
    """Squared correlation; 0 where one of the two does not vary."""
    axis, code = (numbers.double() - numbers.double().mean() for numbers in (axis, code))
    apart = float(axis.square().sum() * code.square().sum())
    return float((axis * code).sum()) ** 2 / apart if apart > 0 else 0.0


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

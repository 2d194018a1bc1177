"""Are the latents of an SAE sums of others?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.completeness.shared import (
    BATCH,
    Codes,
    check_between,
    check_count,
    checked_rows,
    decoder_rows,
    directions_like,
    latents_of,
    nearest_row,
    on_cpu,
    random_directions,
    random_rotation,
    tokens_of,
)
from sparsekern.analysis.results import Result, Results, null_generator, samples

_NULL_ROWS = 4096  # random rows decomposed a sample, at most
_SWEEPS = 1000  # of coordinate descent, at most; a few dozen are enough but for parts that are nearly parallel
_NO_REST = 1e-6  # a squared length of what a fit leaves, of rows of norm 1, that is rounding

COMPOSITIONS = ("silent", "shared", "composite", "atomic")
"""What :attr:`Atomicity.kind` counts through."""


# Meta-SAEs


@dataclass(frozen=True, eq=False)
class MetaSAE(Results):
    """What :func:`meta_sae` returns.

    Attributes
    ----------
    sae : SAE
        In evaluation mode; it reads decoder rows of unit norm.
    results : dict of str to Result
        ``explained``, and with `truth` ``recovered``.
    codes : SparseCodes or CSRCodes
        Meta-latents of each row of `D`.
    atom_cosines : Tensor [n_atoms] or None
        Largest cosine of each true atom with a decoder row of the meta-SAE.
    """

    sae: sk.SAE
    results: dict[str, Result]
    codes: Codes
    atom_cosines: Tensor | None


def meta_sae(
    D: Tensor,
    d_meta: int,
    k: int,
    *,
    decoder_bias: bool = False,
    truth: Tensor | None = None,
    found_at: float = 0.9,
    steps: int = 2000,
    lr: float | None = None,
    batch_size: int = 256,
    n_null: int = 3,
    seed: int = 0,
) -> MetaSAE:
    """Train an SAE on the decoder rows of another: are they sums of fewer directions?

    Without a decoder bias. Where the coefficients of the k parts of every row have the same sum, as for equal sums of
    orthogonal atoms, the same vector can be added to all parts and taken off the bias: the fit is as good and no part
    is an atom.

    ``explained``
        Share of the variance of the rows that is explained (one less the FVU). Nulls: the same training on as many
        random directions, isotropic and with the second moment of the rows.
    ``recovered``
        Share of the atoms in `truth` that have a cosine above `found_at` with a decoder row of the meta-SAE. Null:
        random directions, as many as meta-latents.

    Parameters
    ----------
    D : Tensor [n, d]
        Decoder rows, of any norm but 0: leave out latents that are dead.
    d_meta : int
        Number of meta-latents.
    k : int
        Of which each row has so many.
    decoder_bias : bool
        Whether ``b_dec`` is fitted, and not held at zero.
    truth : Tensor [n_atoms, d] or None
        What the rows are sums of, where that is known.
    found_at : float
        Cosine above which an atom counts as found.
    steps, lr, batch_size
        Of the training, by default at the trainer's learning rate.
    n_null : int
        Trainings for each null of ``explained``; those of ``recovered`` cost nothing, and are 100.
    seed : int
        Determines everything.

    Raises
    ------
    ValueError
        For rows or atoms that are none, and numbers out of range.

    References
    ----------
    Leask et al. (arXiv 2502.04878), section 5: on an SAE of 49,152 latents 55.47% of the decoder's variance.
    """
    unit = checked_rows("D", D)
    check_count(steps=steps, batch_size=batch_size, n_null=n_null)
    check_between("found_at", found_at)
    atoms = None if truth is None else checked_rows("truth", truth, unit.shape[1])

    def trained(rows: Tensor, seed: int) -> tuple[sk.SAE, float]:
        generator = null_generator(seed)
        sae = sk.SAE(rows.shape[1], d_meta, sk.TopK(k), dead_after=10 * len(rows), generator=generator)
        sae.b_dec.requires_grad_(decoder_bias)
        center = "mean" if decoder_bias else "zeros"
        trainer = sk.Trainer(sae, lr=lr, steps=steps, b_dec_init=center)
        for _ in range(steps):
            trainer.step(rows[torch.randint(len(rows), (batch_size,), generator=generator)])
        sae.eval()
        return sae, 1 - sk.evaluate(sae, rows.split(BATCH)).fvu

    sae, explained = trained(unit, seed)
    generator = null_generator(seed)
    isotropic = [random_directions(len(unit), unit.shape[1], generator) for _ in range(n_null)]
    matched = list(directions_like(unit, len(unit), n_null, generator))
    results = {
        "explained": Result(
            "share of the variance of decoder rows explained",
            explained,
            {
                "random directions": samples(trained(rows, seed)[1] for rows in isotropic),
                "random directions with the rows' second moment": samples(trained(rows, seed)[1] for rows in matched),
            },
        )
    }
    cosines = None
    if atoms is not None:
        cosines = nearest_row(atoms, decoder_rows(sae))[0]
        random = (nearest_row(atoms, random_directions(d_meta, unit.shape[1], generator))[0] for _ in range(100))
        results["recovered"] = Result(
            f"share of the atoms with a meta-latent at a cosine above {found_at:g}",
            float((cosines > found_at).double().mean()),
            {"random directions": samples(float((drawn > found_at).double().mean()) for drawn in random)},
        )
    with torch.no_grad():
        codes = sae.encode(unit)
    return MetaSAE(sae, results, codes, cosines)


# Atomic or composite


@dataclass(frozen=True, eq=False)
class Atomicity(Results):
    """What :func:`atomicity` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``composite``, ``shared``, ``r2``.
    kind : Tensor [d_large] int64
        Place in :data:`COMPOSITIONS`.
    parts : Tensor [d_large, k] int64
        Latents of the small SAE that the row is a sum of, most important first; −1 where it has fewer.
    coefficients : Tensor [d_large, k]
        What they are multiplied with, between rows of unit norm.
    r2 : Tensor [d_large]
        Share of the squared length of the row that the best k rows of the small decoder explain.
    coactivation : Tensor [d_large] float64
        The least, over its parts, of P(part active | latent active); NaN without parts or where the latent is silent.
    least_r2 : float
        The same for random rows, 99th percentile.
    """

    results: dict[str, Result]
    kind: Tensor
    parts: Tensor
    coefficients: Tensor
    r2: Tensor
    coactivation: Tensor
    least_r2: float

    def latents(self, kind: str) -> Tensor:
        """The latents of this kind, ``[n]`` int64."""
        if kind not in COMPOSITIONS:
            raise ValueError(f"kind must be one of {', '.join(COMPOSITIONS)}, got {kind!r}")
        return (self.kind == COMPOSITIONS.index(kind)).nonzero().squeeze(1)


class _Fit(NamedTuple):
    """Non-negative sums of rows: ``parts`` (−1 for none) and ``coefficients`` ``[n, k]``, ``r2`` with all k ``[n]``."""

    parts: Tensor
    coefficients: Tensor
    r2: Tensor


@torch.no_grad()
def atomicity(
    D_large: Tensor,
    D_small: Tensor,
    codes_large: Codes,
    codes_small: Codes,
    k: int = 4,
    coactive: float = 0.8,
    shared_at: float = 0.8,
    n_null: int = 20,
    seed: int = 0,
) -> Atomicity:
    """Which latents of a large SAE are sums of latents of a small one?

    Each row is fitted by a non-negative sum of at most k rows of the small decoder, by orthogonal matching pursuit: the
    row nearest to what is left comes next, and all coefficients are fitted anew. The parts end with the last one that
    explains more of what was left than the best row does of 99% of random rows. Then a latent is

    *composite*
        with at least two parts, an R² (of all k rows) above the 99th percentile of random rows, and
        P(part active | latent active) above `coactive` for each part: they must also be there when it is;
    *shared*
        if it is not, and one row of the small decoder is at a cosine of at least `shared_at`;
    *atomic*
        otherwise: nothing in the small dictionary makes it up;
    *silent*
        if it is active on none of the tokens.

    ``composite``, ``shared``
        Shares of the active latents. Nulls: random rows (at most one in a hundred passes by its R²), and, of the
        first, the tokens of the small SAE's codes permuted.
    ``r2``
        Mean R² over the active latents. Nulls: random rows; the large decoder turned by a random rotation.

    Random rows have the second moment of the large decoder, so that two dictionaries in the same subspace are not
    called related for that.

    Parameters
    ----------
    D_large, D_small : Tensor [d_large, d], [d_small, d]
        Decoder rows, of any norm but 0.
    codes_large, codes_small : SparseCodes or CSRCodes
        Of the same tokens.
    k : int
        Parts, at most.
    coactive : float
        Share of a latent's tokens on which each of its parts must be active.
    shared_at : float
        Cosine at which two latents count as one; a sum of two equal parts has 0.71 with each.
    n_null : int
        Samples of each null.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        For rows that are none, codes of other dictionaries or of different tokens, all latents silent, and numbers out
        of range.

    References
    ----------
    Leask et al. (arXiv 2502.04878), section 5, for the question. The fit, its nulls and the condition on the codes are
    this project's.
    """
    large = checked_rows("D_large", D_large)
    small = checked_rows("D_small", D_small, large.shape[1])
    for name, codes, rows in (("codes_large", codes_large, large), ("codes_small", codes_small, small)):
        if codes.d_sae != len(rows):
            raise ValueError(f"{name} must be codes of {len(rows)} latents, got {codes.d_sae}")
    if codes_large.tokens != codes_small.tokens:
        raise ValueError(
            f"codes_large and codes_small must be of the same tokens, got {codes_large.tokens} and {codes_small.tokens}"
        )
    codes_large, codes_small = on_cpu(codes_large), on_cpu(codes_small)
    check_count(k=k, n_null=n_null)
    if k > len(small):
        raise ValueError(f"k must be at most the {len(small)} rows of D_small, got {k}")
    check_between("coactive", coactive)
    check_between("shared_at", shared_at)
    fires = codes_large.firing_counts()
    active = fires > 0
    if not active.any():
        raise ValueError("codes_large must have an active latent: all are silent on these tokens")
    generator = null_generator(seed)
    n_rows = min(_NULL_ROWS, len(large))
    random = list(directions_like(large, n_rows, n_null, generator))
    # Which of the large SAE's latents a random row stands for, with the tokens on which it is active.
    stands_for = [
        active.nonzero().squeeze(1)[torch.randint(int(active.sum()), (n_rows,), generator=generator)] for _ in random
    ]
    first = torch.cat([nearest_row(rows, small)[0] for rows in random]).square()
    least_share = float(first.double().quantile(0.99))
    fit = _pursuit(large, small, k, least_share)
    of_random = [_pursuit(rows, small, k, least_share) for rows in random]
    least_r2 = float(torch.cat([found.r2 for found in of_random]).double().quantile(0.99))
    pairs = _Pairs(codes_large, codes_small)
    everyone = torch.arange(len(large))
    coactivation = pairs.coactivation(fit.parts, everyone)
    cosines = nearest_row(large, small)[0]

    def is_composite(found: _Fit, together: Tensor) -> Tensor:
        return ((found.parts >= 0).sum(1) >= 2) & (found.r2 > least_r2) & (together > coactive)

    def is_shared(composite: Tensor, cosines: Tensor) -> Tensor:
        return ~composite & (cosines >= shared_at)

    def share(of: Tensor) -> float:
        return float(of.double().mean())

    composite = is_composite(fit, coactivation)
    shared = is_shared(composite, cosines)
    drawn = [
        is_composite(found, pairs.coactivation(found.parts, latents))
        for found, latents in zip(of_random, stands_for, strict=True)
    ]
    permuted = [
        is_composite(fit, pairs.permuted(generator).coactivation(fit.parts, everyone))[active] for _ in range(n_null)
    ]
    rotated = [large @ random_rotation(large.shape[1], generator) for _ in range(n_null)]
    results = {
        "composite": Result(
            "share of latents that are sums of others",
            share(composite[active]),
            {
                "random rows": samples(share(of) for of in drawn),
                "tokens of the small SAE's codes permuted": samples(share(of) for of in permuted),
            },
        ),
        "shared": Result(
            "share of latents that the small SAE has",
            share(shared[active]),
            {
                "random rows": samples(
                    share(is_shared(of, nearest_row(rows, small)[0])) for of, rows in zip(drawn, random, strict=True)
                )
            },
        ),
        "r2": Result(
            "mean R² of sums of rows of the small decoder",
            share(fit.r2[active]),
            {
                "random rows": samples(share(found.r2) for found in of_random),
                "large decoder rotated": samples(
                    share(_pursuit(rows[:n_rows], small, k, least_share).r2) for rows in rotated
                ),
            },
        ),
    }
    kind = torch.full_like(fires, COMPOSITIONS.index("atomic"))
    kind[shared], kind[composite], kind[~active] = 1, 2, 0
    return Atomicity(results, kind, fit.parts, fit.coefficients, fit.r2, coactivation, least_r2)


def _pursuit(rows: Tensor, dictionary: Tensor, k: int, least_share: float) -> _Fit:
    """Non-negative orthogonal matching pursuit of unit rows ``[n, d]``; see :func:`atomicity`."""
    parts = torch.full((len(rows), k), -1)
    coefficients = torch.zeros(len(rows), k)
    rest = rows.clone()
    kept_parts, kept_coefficients = parts.clone(), coefficients.clone()
    going = torch.arange(len(rows))
    for step in range(k):
        found = sk.topk_encode(rest[going], dictionary, None, 1)  # of n × d_small products none is kept
        cosine, row = found.values.squeeze(1), found.indices.squeeze(1).long()
        left = rest[going].square().sum(1)
        new = (left > _NO_REST) & (cosine > 0) & (parts[going] != row[:, None]).all(1)
        going, row = going[new], row[new]
        if not len(going):
            break
        parts[going, step] = row
        chosen = dictionary[parts[going, : step + 1]]
        fitted = _non_negative(chosen, rows[going])
        coefficients[going, : step + 1] = fitted
        rest[going] = rows[going] - (fitted[:, :, None] * chosen).sum(1)
        # The first of many parts can explain little of the row and yet the last all that was left.
        counts = going[(cosine.square() > least_share * left)[new]]
        kept_parts[counts], kept_coefficients[counts] = parts[counts], coefficients[counts]
    r2 = 1 - rest.square().sum(1)
    order = kept_coefficients.argsort(dim=1, descending=True, stable=True)
    named = kept_parts.masked_fill(kept_coefficients <= 0, -1)  # a part that a later one has made needless is none
    return _Fit(named.gather(1, order), kept_coefficients.gather(1, order), r2)


def _non_negative(chosen: Tensor, rows: Tensor) -> Tensor:
    """Least squares of each row ``[n, d]`` on its own few ``chosen`` ``[n, s, d]``, with no negative coefficient."""
    gram = (chosen @ chosen.mT).double()
    products = (chosen @ rows[:, :, None]).squeeze(2).double()
    fitted = torch.zeros_like(products)
    for _ in range(_SWEEPS):
        before = fitted.clone()
        for i in range(fitted.shape[1]):
            others = (gram[:, i] * fitted).sum(1) - gram[:, i, i] * fitted[:, i]
            fitted[:, i] = ((products[:, i] - others) / gram[:, i, i]).clamp(min=0)
        if (fitted - before).abs().max() < 1e-9:
            break
    return fitted.float()


class _Pairs:
    """Which latents of two SAEs are active on the same tokens: asked for a few pairs, without any table of all."""

    def __init__(self, large: Codes, small: Codes) -> None:
        self.n_small, self.tokens = small.d_sae, small.tokens
        on = large.values.flatten() > 0
        self.token, self.latent = tokens_of(large)[on], latents_of(large)[on]
        self.counts = torch.bincount(self.latent, minlength=large.d_sae)
        order = self.latent.argsort(stable=True)
        self.token = self.token[order]  # those of a latent side by side
        self.first = self.counts.cumsum(0) - self.counts
        on = small.values.flatten() > 0
        self.small_token, self.small_latent = tokens_of(small)[on], latents_of(small)[on]
        self._keys = (self.small_token * self.n_small + self.small_latent).sort().values

    def permuted(self, generator: torch.Generator) -> _Pairs:
        """The same with the small SAE's tokens in another order."""
        other = _Pairs.__new__(_Pairs)
        other.__dict__.update(self.__dict__)
        moved = torch.randperm(self.tokens, generator=generator)[self.small_token]
        other._keys = (moved * self.n_small + self.small_latent).sort().values
        return other

    def coactivation(self, parts: Tensor, latents: Tensor) -> Tensor:
        """The least of P(part active | latent active) over the parts of each row, ``[n]`` float64."""
        least = torch.full((len(parts),), math.inf, dtype=torch.float64)
        for column in parts.T:
            asked = ((column >= 0) & (self.counts[latents] > 0)).nonzero().squeeze(1)
            if not len(asked):
                continue
            of = latents[asked]
            counts = self.counts[of]
            starts = (self.first[of] - (counts.cumsum(0) - counts)).repeat_interleave(counts)
            token = self.token[starts + torch.arange(int(counts.sum()))]
            keys = token * self.n_small + column[asked].repeat_interleave(counts)
            place = torch.searchsorted(self._keys, keys).clamp(max=max(len(self._keys) - 1, 0))
            hit = self._keys[place] == keys if len(self._keys) else torch.zeros(len(keys), dtype=torch.bool)
            row = torch.arange(len(asked)).repeat_interleave(counts)
            hits = torch.zeros(len(asked), dtype=torch.float64).index_add_(0, row, hit.double())
            least[asked] = torch.minimum(least[asked], hits / counts)
        return least.masked_fill(least.isinf(), math.nan)

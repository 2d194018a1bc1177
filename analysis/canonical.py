"""Which latents two SAEs have in common.

:func:`match` pairs latents by their weights, :func:`match_by_activation` by what they respond to; :func:`mmcs` needs no
pairs. ``sparsekern.analysis.similarity`` compares the spaces that paired rows or activations span, and
``sparsekern.analysis.warm_start`` starts other SAEs from the latents in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.assignment import assign
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples

try:
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import csr_array
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

METHODS = ("hungarian", "sparse", "mnn")
Codes = sk.SparseCodes | sk.CSRCodes

_CANDIDATES = 16  # of each latent, for a sparse matching
_ROWS = 4096  # latents whose candidates are looked for at a time
_HUNGARIAN_ROWS = 16384  # a side: a table of 2 GiB, as the assignment is computed in float64
_PRODUCTS = 2**24  # products of two codes that are held at a time


# Pairs by weights


@dataclass(frozen=True, eq=False)
class Matching(Results):
    """What :func:`match` returns. W1 and W2 are the numbers of latents of the two SAEs.

    Attributes
    ----------
    partner : Tensor [W1] int64
        The latent of the second SAE that each of the first is paired with, by decoder rows; −1 for none.
    partner_enc : Tensor [W1] int64 or None
        The same by encoder rows alone, where those were given.
    cos_dec, cos_enc : Tensor [W1]
        Cosines of the decoder rows of a latent and its `partner`, and of their encoder rows; NaN where there is none.
    shared : Tensor [W1] bool
        Same partner by decoder and encoder, and both cosines at least the threshold; by decoder alone without encoders.
    alive1, alive2 : Tensor [W1], [W2] bool
        Latents that took part.
    results : dict of str to Result
        ``shared``: share of the first SAE's alive latents; ``cosine``, and with encoders ``encoder_cosine``: mean over
        the pairs of a full matching, where a latent without a partner counts as 0; ``matched`` for methods that can
        leave latents without one: share of such a matching's pairs that were made.
    null_cosines : dict of str to Tensor
        Decoder cosines of all pairs in one sample of each null.
    """

    partner: Tensor
    partner_enc: Tensor | None
    cos_dec: Tensor
    cos_enc: Tensor
    shared: Tensor
    alive1: Tensor
    alive2: Tensor
    results: dict[str, Result]
    null_cosines: dict[str, Tensor]

    def pairs(self, shared_only: bool = True) -> tuple[Tensor, Tensor]:
        """Indices of paired latents in the first and in the second SAE, such as pair the rows of two decoders."""
        first = (self.shared if shared_only else self.partner >= 0).nonzero().squeeze(1)
        return first, self.partner[first]

    def plot(self, axes: Any = None) -> Any:
        """Histogram of the decoder cosines of all pairs, beside one sample of each null; returns the axes."""
        return _plot_cosines({"matched latents": self.cos_dec[self.partner >= 0], **self.null_cosines}, axes)


class _Side(NamedTuple):
    """The alive latents of an SAE."""

    latents: Tensor  # [n] int64
    decoder: Tensor  # [n, d], unit rows
    encoder: Tensor | None


class _Pairing(NamedTuple):
    """Pairs among alive latents, counted from 0 on both sides; as the attributes of Matching."""

    partner: Tensor
    partner_enc: Tensor | None
    cos_dec: Tensor
    cos_enc: Tensor
    shared: Tensor


@torch.no_grad()
def match(
    D1: Tensor,
    D2: Tensor,
    E1: Tensor | None = None,
    E2: Tensor | None = None,
    method: str = "hungarian",
    *,
    alive1: Tensor | None = None,
    alive2: Tensor | None = None,
    threshold: float = 0.7,
    n_null: int = 10,
    seed: int = 0,
) -> Matching:
    """Pair the latents of two SAEs by the cosines of their decoder rows, and say which both have.

    With encoders, latents are paired by decoder rows and, independently, by encoder rows; *shared* are those for which
    both find the same partner, at two cosines of at least `threshold`. Dead latents have rows that nothing trained, and
    would count as found by one seed only: leave them out with `alive1` and `alive2`.

    Nulls, each matched in the same way: a *random dictionary* of as many rows as the second SAE has alive, the same for
    encoder and decoder where they have one width; and the second SAE with its *coordinates permuted*, which keeps all
    angles among its own latents.

    Parameters
    ----------
    D1, D2 : Tensor [W1, d], [W2, d]
        Decoder rows, of any norm but 0.
    E1, E2 : Tensor [W1, d_in], [W2, d_in], or None
        Encoder rows, of both SAEs or of none.
    method : {"hungarian", "sparse", "mnn"}
        "hungarian": every latent of the smaller SAE gets a partner, such that the summed cosines are largest. A dense
        table of cosines, for at most 16,384 alive latents a side. "sparse": the same among the 16 nearest rows of each
        latent of the first SAE that are at a positive cosine; a latent that others took all of has no partner. No dense
        table: the candidates come from :func:`sparsekern.topk_encode`. "mnn": mutual nearest neighbours.
    alive1, alive2 : Tensor [W1], [W2] bool, or None
        Latents that take part; all by default.
    threshold : float
        Least cosine of shared latents.
    n_null : int
        Samples of each null; each costs as much as the matching, about a minute of CPU time for "sparse" with 131,072
        latents of 384 dimensions a side.
    seed : int
        Determines the nulls.

    Returns
    -------
    Matching

    Raises
    ------
    ValueError
        For rows of different widths, of norm 0 or not finite among the alive ones; for no alive latent; for encoders of
        one SAE only; and for more latents than "hungarian" can do.

    References
    ----------
    Paulo and Belrose, *Sparse autoencoders trained on the same data learn different features* (arXiv 2501.16615).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be in −1 … 1, got {threshold}")
    _check_n_null(n_null)
    if (E1 is None) != (E2 is None):
        raise ValueError("E1 and E2 must both be given, or neither")
    first, second = _side("1", D1, E1, alive1), _side("2", D2, E2, alive2)
    for name, one, two in (("D", first.decoder, second.decoder), ("E", first.encoder, second.encoder)):
        if one is not None and two is not None and one.shape[1] != two.shape[1]:
            raise ValueError(f"{name}1 and {name}2 must have rows of one width, got {one.shape[1]} and {two.shape[1]}")
    n1, n2 = len(first.latents), len(second.latents)
    if method == "hungarian" and max(n1, n2) > _HUNGARIAN_ROWS:
        raise ValueError(
            f"method='hungarian' makes a dense table of {n1} × {n2} cosines and is for at most {_HUNGARIAN_ROWS} alive "
            "latents a side: use method='sparse'"
        )
    found = _pair(first, second, method, threshold)
    generator = null_generator(seed)
    numbers: dict[str, list[dict[str, float]]] = {"random dictionary": [], "coordinates permuted": []}
    null_cosines: dict[str, Tensor] = {}
    for _ in range(n_null):
        made = {
            "random dictionary": _random_side(second, generator),
            "coordinates permuted": _turned(second, generator),
        }
        for null, side in made.items():
            pairing = _pair(first, side, method, threshold)
            numbers[null].append(_numbers(pairing, n2))
            null_cosines.setdefault(null, pairing.cos_dec[pairing.partner >= 0])
    names = {"shared": f"share of latents that are shared (cosines ≥ {threshold:g})", "cosine": "mean cosine of pairs"}
    if first.encoder is not None:
        names["encoder_cosine"] = "mean cosine of the encoder rows of pairs"
    if method != "hungarian":
        names["matched"] = "share of possible pairs that were made"
    values = _numbers(found, n2)
    results = {
        key: Result(name, values[key], {null: samples(row[key] for row in rows) for null, rows in numbers.items()})
        for key, name in names.items()
    }

    def spread(of_alive: Tensor, fill: float | bool) -> Tensor:
        return torch.full((len(D1),), fill, dtype=of_alive.dtype).index_copy_(0, first.latents, of_alive)

    def named(partner: Tensor | None) -> Tensor | None:
        return None if partner is None else spread(torch.where(partner < 0, -1, second.latents[partner]), -1)

    partner = named(found.partner)
    assert partner is not None
    return Matching(
        partner=partner,
        partner_enc=named(found.partner_enc),
        cos_dec=spread(found.cos_dec, torch.nan),
        cos_enc=spread(found.cos_enc, torch.nan),
        shared=spread(found.shared, False),
        alive1=spread(torch.ones(n1, dtype=torch.bool), False),
        alive2=torch.zeros(len(D2), dtype=torch.bool).index_fill_(0, second.latents, True),
        results=results,
        null_cosines=null_cosines,
    )


@dataclass(frozen=True, eq=False)
class MaxCosines(Results):
    """What :func:`mmcs` returns.

    Attributes
    ----------
    best1, best2 : Tensor [W1], [W2]
        Largest cosine of each decoder row with those of the other SAE; NaN for latents that take no part.
    results : dict of str to Result
        ``of_first`` and ``of_second``: the means.
    null_cosines : dict of str to Tensor
        One sample of each null for `best1`.
    """

    best1: Tensor
    best2: Tensor
    results: dict[str, Result]
    null_cosines: dict[str, Tensor]

    def plot(self, axes: Any = None) -> Any:
        """Histogram of the first SAE's largest cosines, beside one sample of each null; returns the axes."""
        best = self.best1[~self.best1.isnan()]
        return _plot_cosines({"latents of the first SAE": best, **self.null_cosines}, axes)


@torch.no_grad()
def mmcs(
    D1: Tensor,
    D2: Tensor,
    *,
    alive1: Tensor | None = None,
    alive2: Tensor | None = None,
    n_null: int = 10,
    seed: int = 0,
) -> MaxCosines:
    """Mean over the rows of one decoder of the largest cosine with a row of the other, both ways.

    Exact, by fused tiles. Many latents may have the same nearest one, so this is at least what a matching finds. The
    nulls, those of :func:`match`, are simulated: ``√(2 ln W / d)`` for the largest cosine of random rows is too high.

    Parameters
    ----------
    D1, D2 : Tensor [W1, d], [W2, d]
        Decoder rows, of any norm but 0.
    alive1, alive2 : Tensor [W1], [W2] bool, or None
        Latents that take part; all by default.
    n_null : int
        Samples of each null.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        As :func:`match`.

    References
    ----------
    Sharkey et al., *Taking features out of superposition with sparse autoencoders* (2022).
    """
    _check_n_null(n_null)
    first, second = _side("1", D1, None, alive1), _side("2", D2, None, alive2)
    if first.decoder.shape[1] != second.decoder.shape[1]:
        widths = f"{first.decoder.shape[1]} and {second.decoder.shape[1]}"
        raise ValueError(f"D1 and D2 must have rows of one width, got {widths}")
    best1, best2 = _largest(first.decoder, second.decoder), _largest(second.decoder, first.decoder)
    generator = null_generator(seed)
    means: dict[str, tuple[list[float], list[float]]] = {
        "random dictionary": ([], []),
        "coordinates permuted": ([], []),
    }
    null_cosines: dict[str, Tensor] = {}
    for _ in range(n_null):
        made = {
            "random dictionary": _random_side(second, generator),
            "coordinates permuted": _turned(second, generator),
        }
        for null, side in made.items():
            ahead, back = _largest(first.decoder, side.decoder), _largest(side.decoder, first.decoder)
            means[null][0].append(float(ahead.double().mean()))
            means[null][1].append(float(back.double().mean()))
            null_cosines.setdefault(null, ahead)
    name = "mean largest cosine of the {} SAE's rows with the other's"
    results = {
        f"of_{side}": Result(
            name.format(side), float(best.double().mean()), {null: samples(both[way]) for null, both in means.items()}
        )
        for way, (side, best) in enumerate((("first", best1), ("second", best2)))
    }
    empty = [torch.full((len(D),), torch.nan) for D in (D1, D2)]
    return MaxCosines(
        empty[0].index_copy_(0, first.latents, best1),
        empty[1].index_copy_(0, second.latents, best2),
        results,
        null_cosines,
    )


def _side(number: str, D: Tensor, E: Tensor | None, alive: Tensor | None) -> _Side:
    """The alive latents with unit rows, once all has been looked at."""
    if D.dim() != 2 or 0 in D.shape:
        raise ValueError(f"D{number} must be [latents, d], neither of them 0, got shape {tuple(D.shape)}")
    if E is not None and (E.dim() != 2 or len(E) != len(D)):
        raise ValueError(f"E{number} must be [{len(D)}, d_in], a row for each of D{number}, got {tuple(E.shape)}")
    if alive is None:
        alive = torch.ones(len(D), dtype=torch.bool)
    if alive.shape != (len(D),) or alive.dtype != torch.bool:
        raise ValueError(f"alive{number} must be [{len(D)}] bool, got {tuple(alive.shape)} {alive.dtype}")
    latents = alive.cpu().nonzero().squeeze(1)
    if not len(latents):
        raise ValueError(f"alive{number} must have at least one alive latent, got none")
    units = []
    for name, rows in (("D", D), ("E", E)):
        if rows is None:
            continue
        kept = rows.detach()[latents.to(rows.device)].float()
        norms = kept.norm(dim=1)
        if not (norms.isfinite() & (norms > 0)).all():
            raise ValueError(f"{name}{number} must have finite rows of a norm above 0 where alive{number} is true")
        units.append(normalize(kept, dim=1))
    return _Side(latents, units[0], units[1] if len(units) > 1 else None)


def _random_side(like: _Side, generator: torch.Generator) -> _Side:
    """As many random directions, in the encoder too; the same ones where it has the decoder's width."""
    decoder = _random_rows(like.decoder, generator)
    if like.encoder is None or like.encoder.shape[1] == decoder.shape[1]:
        return _Side(like.latents, decoder, None if like.encoder is None else decoder)
    return _Side(like.latents, decoder, _random_rows(like.encoder, generator))


def _random_rows(like: Tensor, generator: torch.Generator) -> Tensor:
    return normalize(torch.randn(like.shape, generator=generator), dim=1).to(like.device)


def _turned(side: _Side, generator: torch.Generator) -> _Side:
    """The same rows with their coordinates in another order, the same for encoder and decoder of one width."""
    d = side.decoder.shape[1]
    order = torch.randperm(d, generator=generator)
    if side.encoder is None:
        return side._replace(decoder=side.decoder[:, order])
    other = order if side.encoder.shape[1] == d else torch.randperm(side.encoder.shape[1], generator=generator)
    return side._replace(decoder=side.decoder[:, order], encoder=side.encoder[:, other])


def _pair(first: _Side, second: _Side, method: str, threshold: float) -> _Pairing:
    partner = _partners(first.decoder, second.decoder, method)
    cos_dec = _cosines_of(first.decoder, second.decoder, partner)
    shared = cos_dec >= threshold  # false where NaN
    if first.encoder is None or second.encoder is None:
        return _Pairing(partner, None, cos_dec, torch.full_like(cos_dec, torch.nan), shared)
    partner_enc = _partners(first.encoder, second.encoder, method)
    cos_enc = _cosines_of(first.encoder, second.encoder, partner)
    return _Pairing(partner, partner_enc, cos_dec, cos_enc, shared & (partner == partner_enc) & (cos_enc >= threshold))


def _cosines_of(unit1: Tensor, unit2: Tensor, partner: Tensor) -> Tensor:
    cosines = torch.full((len(unit1),), torch.nan)
    for rows in (partner >= 0).nonzero().squeeze(1).split(_ROWS):
        own, other = unit1[rows.to(unit1.device)], unit2[partner[rows].to(unit2.device)]
        cosines[rows] = (own * other.to(own.device)).sum(1).clamp(-1, 1).cpu()
    return cosines


def _numbers(pairing: _Pairing, n2: int) -> dict[str, float]:
    """What the results of a matching are."""
    possible = min(len(pairing.partner), n2)
    return {
        "shared": float(pairing.shared.double().mean()),
        "cosine": float(pairing.cos_dec.double().nansum()) / possible,
        "encoder_cosine": float(pairing.cos_enc.double().nansum()) / possible,
        "matched": int((pairing.partner >= 0).sum()) / possible,
    }


def _partners(unit1: Tensor, unit2: Tensor, method: str) -> Tensor:
    """For each of the unit rows ``[n1, d]`` its partner among ``[n2, d]``, −1 for none: ``[n1]`` int64."""
    if method == "hungarian":
        cost = (unit1 @ unit2.T).neg_().cpu().double().numpy()  # as it is computed: no further copy is made
        rows, columns = linear_sum_assignment(cost)
        return torch.full((len(unit1),), -1).index_copy_(0, torch.from_numpy(rows), torch.from_numpy(columns))
    if method == "sparse":
        return _sparse_partners(*_nearest(unit1, unit2, min(_CANDIDATES, len(unit2))), len(unit2))
    (cosine, ahead), (_, back) = (
        [found.squeeze(1) for found in _nearest(*pair, 1)] for pair in ((unit1, unit2), (unit2, unit1))
    )
    mutual = (back[ahead] == torch.arange(len(ahead))) & (cosine > 0)
    return torch.where(mutual, ahead, -1)


def _nearest(unit1: Tensor, unit2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest positive cosines of each row with the others, and whose they are: ``[n1, k]`` both, on the CPU.

    A place without one holds the value 0.
    """
    found = [sk.topk_encode(rows, unit2, None, k) for rows in unit1.split(_ROWS)]
    return torch.cat([codes.values.cpu() for codes in found]), torch.cat(
        [codes.indices.cpu().long() for codes in found]
    )


def _largest(unit1: Tensor, unit2: Tensor) -> Tensor:
    """The largest cosine of each row with the others, ``[n1]``, on the CPU."""
    ones = unit2.new_ones(len(unit2))  # a cosine plus 1 is never cut off by the ReLU
    found = [sk.topk_encode(rows, unit2, ones, 1).values.squeeze(1).cpu() - 1 for rows in unit1.split(_ROWS)]
    return torch.cat(found).clamp(-1, 1)


def _sparse_partners(cosines: Tensor, candidates: Tensor, n2: int) -> Tensor:
    """The one-to-one choice among the candidates ``[n1, k]`` of each row with the largest sum; −1 for none."""
    kept = cosines > 0
    rows = torch.arange(len(cosines))[:, None].expand_as(candidates)[kept]
    table = csr_array((cosines[kept].double(), (rows, candidates[kept])), shape=(len(cosines), n2))
    return torch.from_numpy(assign(table))


def _check_n_null(n_null: int) -> None:
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")


def _plot_cosines(groups: Mapping[str, Tensor], axes: Any) -> Any:
    """Outlined histograms of cosines, the first group filled."""
    axes = new_axes() if axes is None else axes
    every = torch.cat(list(groups.values()))
    bins = np.linspace(min(0.0, float(every.min())), 1, 61) if len(every) else 60
    greys = dict(zip(list(groups)[1:], ("0.6", "0.25"), strict=False))
    for name, cosines in groups.items():
        look = {"histtype": "step", "color": greys[name]} if name in greys else {"color": "C0", "alpha": 0.7}
        axes.hist(cosines.numpy(), bins=bins, label=name, **look)
    axes.set(xlabel="cosine of decoder rows", ylabel="latents")
    axes.legend(frameon=False)
    return axes


# Pairs by activations


@dataclass(frozen=True, eq=False)
class ActivationMatching(Results):
    """What :func:`match_by_activation` returns.

    Attributes
    ----------
    partner : Tensor [W1] int64
        The latent of the second SAE that each of the first is paired with; −1 for none.
    best : Tensor [W1]
        Largest correlation of each with a latent of the second SAE that is ever active together with it, whether that
        became its partner or not; 0 where there is none or all are negative, NaN for latents that take no part.
    alive1, alive2 : Tensor [W1], [W2] bool
        Latents that took part.
    results : dict of str to Result
        ``matched``: share of the first SAE's alive latents with a partner; ``correlation``: mean of `best`.
    """

    partner: Tensor
    best: Tensor
    alive1: Tensor
    alive2: Tensor
    results: dict[str, Result]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Indices of paired latents in the first and in the second SAE."""
        first = (self.partner >= 0).nonzero().squeeze(1)
        return first, self.partner[first]


def match_by_activation(
    codes1: Codes,
    codes2: Codes,
    *,
    threshold: float = 0.1,
    min_active: int = 10,
    n_null: int = 10,
    seed: int = 0,
) -> ActivationMatching:
    """Pair the latents of two SAEs, of any two models, by the correlation of their activations on the same tokens.

    Each latent of the first SAE chooses the one of the second with which it correlates most; of several that chose the
    same one, that with the largest correlation keeps it; and pairs above `threshold` stay. Null: the tokens of the
    second SAE's codes shuffled. Only latents that are active on a common token are compared, with sparse products in
    blocks: time and memory follow the sum over tokens of the products of their two L0.

    Parameters
    ----------
    codes1, codes2 : SparseCodes or CSRCodes
        Codes of the same tokens, in the same order.
    threshold : float
        What correlations must exceed.
    min_active : int
        Latents that are active on fewer tokens take no part: on one common token two latents correlate fully.
    n_null : int
        Samples of the null; each costs as much as the matching.
    seed : int
        Determines the null.

    Raises
    ------
    ValueError
        For codes of different numbers of tokens, or not finite; where no latent takes part; for numbers out of range.

    References
    ----------
    Lan et al., *Sparse autoencoders reveal universal feature spaces across large language models* (arXiv 2410.06981),
    whose further rules about tokens are for the caller to apply.
    """
    if codes1.tokens != codes2.tokens:
        raise ValueError(
            f"codes1 and codes2 must be of the same tokens, got {codes1.tokens} and {codes2.tokens} of them"
        )
    if not -1 <= threshold < 1:
        raise ValueError(f"threshold must be at least −1 and below 1, got {threshold}")
    if min_active < 1:
        raise ValueError(f"min_active must be at least 1, got {min_active}")
    _check_n_null(n_null)
    first, second = _columns("1", codes1, min_active), _columns("2", codes2, min_active)
    partner, best = _correlated(first, second, threshold)
    rng = np.random.default_rng(seed)
    shuffled = []
    for _ in range(n_null):
        other = second._replace(codes=second.codes[rng.permutation(codes2.tokens)])
        shuffled.append(_correlated(first, other, threshold))
    nulls = [
        {"tokens shuffled": samples(float(number) for number in numbers)}
        for numbers in (((found >= 0).mean() for found, _ in shuffled), (top.mean() for _, top in shuffled))
    ]
    name = f"share of latents with a partner (correlation > {threshold:g})"
    results = {
        "matched": Result(name, float((partner >= 0).mean()), nulls[0]),
        "correlation": Result("mean largest correlation of a latent", float(best.mean()), nulls[1]),
    }
    latents = torch.from_numpy(first.latents)
    chosen = torch.from_numpy(np.where(partner < 0, -1, second.latents[partner]))
    return ActivationMatching(
        partner=torch.full((codes1.d_sae,), -1).index_copy_(0, latents, chosen),
        best=torch.full((codes1.d_sae,), torch.nan).index_copy_(0, latents, torch.from_numpy(best).float()),
        alive1=torch.zeros(codes1.d_sae, dtype=torch.bool).index_fill_(0, latents, True),
        alive2=torch.zeros(codes2.d_sae, dtype=torch.bool).index_fill_(0, torch.from_numpy(second.latents), True),
        results=results,
    )


class _Columns(NamedTuple):
    """Codes of the latents that take part."""

    latents: np.ndarray  # [n] int64
    codes: csr_array  # [tokens, n] float64
    mean: np.ndarray  # [n]
    std: np.ndarray  # [n]


def _columns(number: str, codes: Codes, min_active: int) -> _Columns:
    csr = codes.to_csr() if isinstance(codes, sk.SparseCodes) else codes
    parts = [part.detach().cpu() for part in (csr.values.double(), csr.col.long(), csr.crow)]
    if not parts[0].isfinite().all():
        raise ValueError(f"codes{number} must be finite")
    table = csr_array(tuple(part.numpy() for part in parts), shape=(csr.tokens, csr.d_sae))
    table.eliminate_zeros()
    mean = np.asarray(table.mean(0)).ravel()
    variance = np.asarray(table.power(2).mean(0)).ravel() - mean**2
    active = np.bincount(table.indices, minlength=csr.d_sae)
    varies = variance > 1e-12 * mean**2  # not so where a latent is always active, and equally
    latents = np.flatnonzero((active >= min_active) & varies)
    if not len(latents):
        raise ValueError(
            f"codes{number} must have a latent that is active on at least min_active={min_active} tokens, got none"
        )
    return _Columns(latents, table[:, latents], mean[latents], np.sqrt(variance[latents]))


def _correlated(first: _Columns, second: _Columns, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """For each latent of the first its partner, −1 for none, and its largest correlation, at least 0."""
    tokens = first.codes.shape[0]
    n1 = len(first.latents)
    by_latent = first.codes.T.tocsr()
    # Products that the rows up to each cost: blocks of rows hold about so many at a time.
    cost = np.concatenate([[0], np.diff(second.codes.indptr)[by_latent.indices].cumsum()])[by_latent.indptr]
    choice, best = np.full(n1, -1), np.full(n1, -np.inf)
    low = 0
    while low < n1:
        high = max(low + 1, int(np.searchsorted(cost, cost[low] + _PRODUCTS, side="right")) - 1)
        common = by_latent[low:high] @ second.codes
        row = np.repeat(np.arange(high - low), np.diff(common.indptr))
        covariance = common.data / tokens - first.mean[low + row] * second.mean[common.indices]
        r = covariance / (first.std[low + row] * second.std[common.indices])
        has = np.flatnonzero(np.diff(common.indptr))
        if len(has):
            most = np.maximum.reduceat(r, common.indptr[has])
            top = np.flatnonzero(r == np.repeat(most, np.diff(common.indptr)[has]))
            _, at = np.unique(row[top], return_index=True)
            choice[low + has], best[low + has] = common.indices[top[at]], most
        low = high
    order = np.argsort(-best, kind="stable")
    order = order[best[order] > threshold]
    _, at = np.unique(choice[order], return_index=True)
    partner = np.full(n1, -1)
    partner[order[at]] = choice[order[at]]
    return partner, np.clip(best, 0, 1)

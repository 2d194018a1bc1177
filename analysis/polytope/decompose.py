"""What polytope codes are made of: directions in the space of units, by PCA, ICA, NMF or a sparse autoencoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.polytope.blocks import Units
from sparsekern.analysis.polytope.codes import PolytopeCodes
from sparsekern.analysis.results import Result, Results, samples

try:
    from sklearn.decomposition import FastICA, IncrementalPCA, MiniBatchNMF
    from sklearn.exceptions import ConvergenceWarning
except ImportError as error:
    raise ImportError("this analysis needs scikit-learn: pip install 'sparsekern[analysis]'") from error

_NMF_BATCH, _NMF_UPDATES = 512, 100  # samples of an update of the components, and updates at least
_ICA_ROWS = 65536  # samples that ICA is fitted to
_SAE_BATCH = 512
_STARTS_FROM = 1024  # samples among which the SAE's first rows are chosen

Scores = Tensor | sk.SparseCodes
# From rows of codes to their scores, with the components and the offset that they belong to.
_Fit = tuple[Tensor, Tensor, Callable[[Tensor], Any]]


@dataclass(frozen=True, eq=False)
class Decomposition(Results):
    """What :func:`decompose_codes` returns: codes ≈ scores · components + offset.

    Attributes
    ----------
    results : dict of str to Result
        ``explained``: share of the codes' variance about their mean that is reconstructed.
    method : str
    components : Tensor [rank, n]
        Of unit norm, or 0 where fewer were found; by falling sum of the squared scores.
    scores : Tensor [N, rank] or SparseCodes
        What to multiply them with; the SAE's codes where that is the method.
    offset : Tensor [n]
        What to add.
    layers : tuple of (str, int)
        Of the codes: what the n units are.
    """

    results: dict[str, Result]
    method: str
    components: Tensor
    scores: Scores
    offset: Tensor
    layers: tuple[tuple[str, int], ...]

    @property
    def explained(self) -> float:
        """Share of the variance that is reconstructed."""
        return self.results["explained"].value

    def layer_shares(self) -> Tensor:
        """Share of each component's squared entries that lies in each layer: ``[rank, layers]``; NaN for zeros."""
        parts = self.components.square().split([count for _, count in self.layers], 1)
        energy = torch.stack([part.sum(1) for part in parts], 1)
        return energy / energy.sum(1, keepdim=True)


def decompose_codes(
    codes: PolytopeCodes,
    method: str = "nmf",
    rank: int = 8,
    *,
    control: Mapping[str, PolytopeCodes] | None = None,
    k: int = 4,
    decoder_bias: bool = False,
    starts: int = 3,
    steps: int = 300,
    lr: float = 1e-2,
    n_null: int = 5,
    seed: int = 0,
) -> Decomposition:
    """Decompose codes into `rank` patterns of units that come and go together.

    The codes stay packed: blocks of them become floats, one at a time, and are gone through several times.

    Parameters
    ----------
    codes : PolytopeCodes
        N samples of n units; ``codes.layer(name)`` for one layer.
    method : {"pca", "ica", "nmf", "sae"}
        Principal components; FastICA of the scores on them; non-negative matrix factorisation; a TopK SAE of `rank`
        latents and `k` active, trained on the codes as vectors.
    rank : int
        Number of components, at most n and N; of the SAE any number.
    control : mapping of str to PolytopeCodes or None
        Other codes, such as those of a net with random weights, that are decomposed in the same way.
    k, starts, steps, lr : int, int, int, float
        Of the SAE: of so many starts from samples the fit with the lowest error is kept.
    decoder_bias : bool
        Whether the SAE has one. A constant with any fixed number of parts can be moved from the parts to the bias at no
        cost, which the parts are then no longer patterns of; without one the rates are part of what is explained.
    n_null : int
        Samples of the null, each a decomposition: every unit permuted over the samples, which keeps the rates and
        unties the units.
    seed : int
        Determines fits and nulls.

    Raises
    ------
    ValueError
        For an unknown method, codes that do not vary or are not finite, and numbers out of range.

    References
    ----------
    Black et al., *Interpreting neural networks through the polytope lens* (arXiv 2211.12312); Lee and Seung (1999) for
    NMF; Horn (1965) for the null.
    """
    fits: dict[str, Callable[[Units], _Fit]] = {
        "pca": lambda units: _pca(units, rank),
        "ica": lambda units: _ica(units, rank),
        "nmf": lambda units: _nmf(units, rank),
        "sae": lambda units: _sae(units, rank, k, decoder_bias, starts, steps, lr),
    }
    if method not in fits:
        raise ValueError(f"method must be one of {', '.join(fits)}, got {method!r}")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    if method == "sae" and not (1 <= k <= rank and starts >= 1 and steps >= 1 and lr > 0):
        raise ValueError(
            f"k must be in 1 … rank={rank}, starts and steps at least 1 and lr above 0, "
            f"got k={k}, starts={starts}, steps={steps}, lr={lr}"
        )
    given = {"codes": codes, **(control or {})}
    for name, some in given.items():
        most = min(len(some), some.n_units)
        if rank < 1 or (method != "sae" and rank > most):
            raise ValueError(f"rank must be in 1 … {most} for {method} of {name}, got {rank}")

    def decomposed(some: PolytopeCodes, mixed: bool, at: int) -> tuple[float, _Fit]:
        units = Units(some, at, mixed, least=1 if method == "sae" else 8 * rank)
        moments = _Moments.of(units)
        fit = fits[method](units)
        return _explained(units, fit, moments), fit

    explained, fit = decomposed(codes, False, seed)
    drawn = [decomposed(codes, True, 1_000_003 * (seed + 1) + i)[0] for i in range(n_null)]
    others = {name: samples([decomposed(some, False, seed)[0]]) for name, some in (control or {}).items()}
    name = f"share of the codes' variance in {rank} components ({method})"
    results = {"explained": Result(name, explained, {"units permuted": samples(drawn)}, others)}
    components, offset, score = fit
    scores = _in_order(codes, score)
    length = components.norm(dim=1)
    components = normalize(components, dim=1)
    if isinstance(scores, sk.SparseCodes):
        scores = scores._replace(values=scores.values * length[scores.indices.long()])
        energy = torch.zeros(rank).index_add_(0, scores.indices.flatten().long(), scores.values.square().flatten())
        order = energy.argsort(descending=True, stable=True)
        scores = scores._replace(indices=order.argsort().int()[scores.indices.long()])
    else:
        scores = scores * length
        order = scores.square().sum(0).argsort(descending=True, stable=True)
        scores = scores[:, order]
    return Decomposition(results, method, components[order], scores, offset, codes.layers)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Mean of each unit ``[n]``, and the summed squares about it."""

    mean: Tensor
    variance: float

    @classmethod
    def of(cls, units: Units) -> _Moments:
        total = torch.zeros(units.codes.n_units, dtype=torch.float64)
        squares = 0.0
        for rows in units.blocks():
            if not rows.isfinite().all():
                raise ValueError("codes must be finite: they hold NaN or infinity")
            total += rows.sum(0, dtype=torch.float64)
            squares += float(rows.square().sum(dtype=torch.float64))
        mean = total / max(1, len(units.codes))
        variance = squares - len(units.codes) * float(mean.square().sum())
        if not variance > 1e-9 * squares:
            raise ValueError("codes must have at least two different rows")
        return cls(mean, variance)


def _explained(units: Units, fit: _Fit, moments: _Moments) -> float:
    components, offset, score = fit
    error = 0.0
    for rows in units.blocks():
        scores = score(rows)
        if isinstance(scores, sk.SparseCodes):
            near = sk.sparse_decode(scores, components, offset)
        else:
            near = scores @ components + offset
        error += float((rows - near).square().sum(dtype=torch.float64))
    return 1 - error / moments.variance


def _in_order(codes: PolytopeCodes, score: Callable[[Tensor], Any]) -> Scores:
    """Scores of all samples, as they stand in the codes."""
    units = Units(codes, 0)
    parts = [score(codes.unpack(slice(start, stop)).float()) for start, stop in units.bounds]
    if not isinstance(parts[0], sk.SparseCodes):
        return torch.cat(parts)
    values, indices = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "indices"))
    return sk.SparseCodes(values, indices, parts[0].d_sae)


# The methods


def _pca(units: Units, rank: int) -> _Fit:
    n, width = len(units.codes), units.codes.n_units
    kept = min(2 * rank, n, width)  # more than are wanted, because what a batch drops is lost
    fitted = IncrementalPCA(kept)
    for rows in units.batches(max(4 * kept, 256)):
        fitted.partial_fit(rows.numpy())  # which checks its input, and so takes a copy: it writes into it
    components = torch.from_numpy(fitted.components_[:rank].copy()).float()
    offset = torch.from_numpy(fitted.mean_).float()
    components = components * _skew_sign((next(units.blocks()) - offset) @ components.T)[:, None]
    return components, offset, lambda rows: (rows - offset) @ components.T


def _ica(units: Units, rank: int) -> _Fit:
    directions, offset, score = _pca(units, rank)
    found: list[Tensor] = []
    for rows in units.blocks():
        found.append(score(rows))
        if sum(map(len, found)) >= _ICA_ROWS:
            break
    whole = torch.cat(found)[:_ICA_ROWS].double().numpy()
    fitted = FastICA(rank, whiten="unit-variance", whiten_solver="svd", max_iter=500, random_state=units.seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a null, which has nothing to converge to
        sources = torch.from_numpy(fitted.fit_transform(whole))
    sign = _skew_sign(sources).float()
    unmixing = torch.from_numpy(fitted.components_).float() * sign[:, None]
    mixing = torch.from_numpy(fitted.mixing_).float() * sign
    # The scores on the components are taken about the mean of all samples, not of those that ICA saw.
    return mixing.T @ directions, offset, lambda rows: score(rows) @ unmixing.T


def _nmf(units: Units, rank: int) -> _Fit:
    fitted = MiniBatchNMF(rank, init="nndsvda", random_state=units.seed % 2**32)
    passes = max(2, -(-_NMF_UPDATES * _NMF_BATCH // len(units.codes)))
    for _ in range(passes):
        for rows in units.batches(max(_NMF_BATCH, rank)):
            fitted.partial_fit(rows.numpy())
    components = torch.from_numpy(fitted.components_.copy()).float()
    return (
        components,
        torch.zeros(units.codes.n_units),
        lambda rows: torch.from_numpy(fitted.transform(rows.numpy())).float(),
    )


def _sae(units: Units, rank: int, k: int, bias: bool, starts: int, steps: int, lr: float) -> _Fit:
    generator = torch.Generator().manual_seed(units.seed)
    first = next(units.blocks())[:_ICA_ROWS]
    size = float(first.square().sum(1).mean().sqrt()) or 1.0
    fits = []
    for _ in range(starts):
        sae = _started(first, rank, k, bias, generator)
        trainer = sk.Trainer(sae, lr=lr, steps=steps, b_dec_init="mean" if bias else "zeros")
        for rows, _ in zip(units.endless(_SAE_BATCH), range(steps), strict=False):
            trainer.step(rows / size)
        sae.eval()
        fits.append((sk.evaluate(sae, (first / size).split(4096)).fvu, sae))
    best = min(fits, key=lambda fit: fit[0])[1]

    def score(rows: Tensor) -> sk.SparseCodes:
        with torch.no_grad():
            parts = [best.encode(part / size) for part in rows.split(4096)]
        values, indices = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "indices"))
        return sk.SparseCodes(values, indices, rank)

    return best.W_dec.detach() * size, best.b_dec.detach() * size, score


@torch.no_grad()
def _started(rows: Tensor, rank: int, k: int, bias: bool, generator: torch.Generator) -> sk.SAE:
    """A TopK SAE whose latents start at samples, each far from those before it."""
    n = rows.shape[1]
    sae = sk.SAE(n, rank, sk.TopK(k), dead_after=20 * _SAE_BATCH, aux_k=min(rank, 4 * k), generator=generator)
    sae.b_dec.requires_grad_(bias)
    some = rows[torch.randperm(len(rows), generator=generator)[: max(_STARTS_FROM, rank)]]
    unit = normalize(some[some.any(1)], dim=1)
    start = unit[:1]
    nearest = unit @ start.T
    while len(start) < min(rank, len(unit)):
        start = torch.cat([start, unit[nearest.argmin()][None]])
        nearest = torch.maximum(nearest, unit @ start[-1:].T)
    for weight in sae.latent_weights():
        weight[: len(start)] = start
    return sae


def _skew_sign(scores: Tensor) -> Tensor:
    """Signs that make scores skewed upwards, so that a component points to where it is active."""
    return torch.where((scores - scores.mean(0)).pow(3).sum(0) < 0, -1.0, 1.0)

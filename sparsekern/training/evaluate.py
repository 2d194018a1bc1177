"""Held-out measures of an SAE, and the linear baseline to read them against."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.hooks import evaluating
from sparsekern.modules import SAE

_BLOCK = 8192  # rows that are held in float64, or compared, at a time

Batch = Tensor | tuple[Tensor, Tensor]

DUPLICATE = 0.9
"""Cosine of two decoder rows above which their latents count as duplicates."""

HISTOGRAM_DECADES = range(-7, 1)
"""Edges of the density histogram, as powers of ten."""


@dataclass(frozen=True)
class Evaluation:
    """Measures over `tokens` held-out tokens.

    Attributes
    ----------
    fvu : float
        Fraction of variance unexplained, ``Σ ‖y − x̂‖² / Σ ‖y − ȳ‖²``.
    explained_variance : float
        One less the variance of the error over that of the data: unlike ``1 − fvu`` it forgives a constant offset.
    cosine : float
        Mean cosine of a token and its reconstruction.
    l0 : float
        Mean active latents a token.
    silent_fraction : float
        Share of latents that fire on none of these tokens. It falls as tokens are added: compare at equal `tokens`.
    density : Tensor [d_sae]
        Share of tokens on which each latent fires.
    max_cosine : float
        Largest cosine of a latent's decoder row and that of another, both active on some of these tokens: the mean over
        such latents, or over a sample of them. NaN where fewer than two are active.
    duplicate_fraction : float
        Share of these latents for which it is above 0.9.
    max_cosine_null, duplicate_fraction_null : float
        What is expected of the same for as many random directions.
    """

    tokens: int
    fvu: float
    explained_variance: float
    cosine: float
    l0: float
    silent_fraction: float
    density: Tensor
    max_cosine: float
    duplicate_fraction: float
    max_cosine_null: float
    duplicate_fraction_null: float

    def density_histogram(self) -> dict[str, int]:
        """Latents by decade of density; ``silent`` counts those that never fire."""
        exponent = self.density[self.density > 0].log10().floor()
        bins = {f"1e{d}..1e{d + 1}": int((exponent == d).sum()) for d in HISTOGRAM_DECADES if d < 0}
        bins["1e-1..1e0"] += int((exponent == 0).sum())  # a density of exactly 1
        return {"silent": int((self.density == 0).sum()), **bins}

    def to_dict(self) -> dict[str, Any]:
        """All measures as plain numbers, with the density as a histogram."""
        measures = {name: value for name, value in vars(self).items() if name != "density"}
        return {**measures, "density_histogram": self.density_histogram()}


@torch.no_grad()
def evaluate(sae: SAE, batches: Iterable[Batch], compared: int = 2048) -> Evaluation:
    """Measure `sae` in evaluation mode over `batches`, in one pass with float64 sums.

    Parameters
    ----------
    sae : SAE
        The module.
    batches : iterable of Tensor [..., d_in], or of pairs of it and a target [..., d_out]
        Activations, and what is to be reconstructed where that is something else.
    compared : int
        Latents whose decoder rows are compared with those of all others that fire, at most: a random sample, the same
        in every call. It costs ``2 · compared · d_sae · d_out`` FLOP, like a dense encoder for so many tokens, and
        a tile of ``compared × 8192`` cosines.

    Raises
    ------
    ValueError
        If there are fewer than two tokens.
    """
    device = sae.device
    sums: Tensor | None = None  # of data and error, then of their squares: for each dimension
    cosine, l0_sum = 0.0, 0
    counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    tokens = 0
    with evaluating(sae):
        for batch in batches:
            x, target = batch if isinstance(batch, tuple | list) else (batch, batch)
            x = x.to(device)
            codes = sae.encode(x)
            l0 = codes.l0()
            # In float64; all that belongs to a token in a row.
            recon = sae.reconstruct(codes, x).double().reshape(l0.numel(), -1)
            y = target.to(device).double().reshape(l0.numel(), -1)
            if y.shape != recon.shape:
                raise ValueError(f"targets must have {recon.shape[1]} columns (d_out of the SAE), got {y.shape[1]}")
            error = y - recon
            cosine += torch.nn.functional.cosine_similarity(y, recon, dim=1).sum().item()
            l0_sum += int(l0.sum())
            batch_sums = torch.stack([y.sum(0), error.sum(0), y.square().sum(0), error.square().sum(0)])
            sums = batch_sums if sums is None else sums + batch_sums
            counts += codes.firing_counts()
            tokens += l0.numel()
    if tokens < 2 or sums is None:
        raise ValueError(f"evaluation needs at least two tokens, got {tokens}")
    by_source = sums.view(4, sae.n_sources, -1)  # the sources of a crosscoder count alike
    mean_squares = (by_source[:2] / tokens).square().sum(2)
    norms, errors = by_source[2:].sum(2) / tokens
    variance = norms - mean_squares[0]
    variance = torch.where(variance > 0, variance, torch.nan)
    rows, alive = sae.W_dec.flatten(1), counts.nonzero().squeeze(1)
    cosines = max_cosines(rows, alive, compared).double()
    null_mean, null_share = random_max_cosine(len(alive), rows.shape[1])
    return Evaluation(
        tokens=tokens,
        fvu=(errors / variance).mean().item(),
        explained_variance=1 - ((errors - mean_squares[1]) / variance).mean().item(),
        cosine=cosine / tokens,
        l0=l0_sum / tokens,
        silent_fraction=(counts == 0).double().mean().item(),
        density=(counts.double() / tokens).cpu(),
        max_cosine=cosines.mean().item(),
        duplicate_fraction=(cosines > DUPLICATE).double().mean().item(),
        max_cosine_null=null_mean,
        duplicate_fraction_null=null_share,
    )


@torch.no_grad()
def max_cosines(rows: Tensor, alive: Tensor, compared: int) -> Tensor:
    """For at most `compared` of the rows ``[n, d]`` named by `alive` the largest cosine with another of these: ``[m]``.

    Which ones is random, but the same in every call. Empty for fewer than two. Rows of zeros have cosines of 0.
    """
    if compared < 1:
        raise ValueError(f"compared must be at least 1, got {compared}")
    n = len(alive)
    if n < 2:
        return rows.new_empty(0)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:compared].sort().values.to(rows.device)
    queries = torch.nn.functional.normalize(rows[alive[chosen]].float(), dim=1)
    best = queries.new_full((len(chosen),), -torch.inf)
    for start in range(0, n, _BLOCK):
        others = torch.nn.functional.normalize(rows[alive[start : start + _BLOCK]].float(), dim=1)
        cosines = queries @ others.T
        own = ((chosen >= start) & (chosen < start + _BLOCK)).nonzero().squeeze(1)
        cosines[own, chosen[own] - start] = -torch.inf
        best = torch.maximum(best, cosines.amax(1))
    return best


def random_max_cosine(n: int, d: int, above: float = DUPLICATE) -> tuple[float, float]:
    """Of `n` random directions in `d` dimensions: the mean of a row's largest cosine, the chance that it is `above`.

    Nothing is drawn. The angle of two directions has a density in proportion to ``sin(θ)^(d − 2)``, and the n − 1
    cosines of one row are independent: ``P(max > c) = 1 − (1 − P(θ < arccos c))^(n − 1)``. Sums over a fine grid of
    angles; NaN for fewer than two rows or dimensions.
    """
    if n < 2 or d < 2:
        return math.nan, math.nan
    angles = torch.linspace(0, math.pi, 100_001, dtype=torch.float64)
    density = angles.sin().clamp_min(0).pow(d - 2)
    below = torch.nn.functional.pad(torch.cumulative_trapezoid(density), (1, 0))
    below = below / below[-1]  # P(θ < angle), exact also where it is tiny, which decides for large n
    share = -torch.expm1((n - 1) * torch.log1p(-below))  # P(max > cos angle)
    # E[max] = −1 + ∫ P(max > c) dc over c in −1 … 1, with dc = sin θ dθ.
    mean = -1 + torch.trapezoid(share * angles.sin(), angles).item()
    return mean, share[torch.searchsorted(angles, math.acos(above))].item()


@torch.no_grad()
def pca_fvu(train: Tensor, held_out: Tensor, components: int) -> float:
    """Held-out FVU of the projection on the leading principal components of `train` ``[n, d]``.

    The best that a *dense* linear code of that many numbers can do: the bar that a sparse code of `components` active
    latents has to clear.
    """
    mean, own_mean = train.mean(0, dtype=torch.float64), held_out.mean(0, dtype=torch.float64)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=train.device)
    for block in train.split(_BLOCK):
        centred = block.double() - mean
        covariance += centred.T @ centred
    axes = torch.linalg.eigh(covariance).eigenvectors[:, -components:]
    left = variance = 0.0
    for block in held_out.split(_BLOCK):
        centred = block.double() - mean
        left += (centred.square().sum() - (centred @ axes).square().sum()).item()
        variance += (block.double() - own_mean).square().sum().item()
    return left / variance

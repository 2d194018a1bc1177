"""Held-out measures of an SAE, and the linear baseline to read them against."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.modules import SAE

_BLOCK = 8192  # rows that are held in float64 at a time

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
    """

    tokens: int
    fvu: float
    explained_variance: float
    cosine: float
    l0: float
    silent_fraction: float
    density: Tensor

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
def evaluate(sae: SAE, batches: Iterable[Tensor]) -> Evaluation:
    """Measure `sae` over `batches` of activations ``[B, d_in]``, in one pass with float64 sums.

    Raises
    ------
    ValueError
        If there are fewer than two tokens.
    """
    device = sae.device
    total = {"error": 0.0, "norm": 0.0, "cosine": 0.0, "l0": 0}
    sums = torch.zeros(2, sae.d_in, dtype=torch.float64, device=device)  # of the data, of the error
    counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    tokens = 0
    for batch in batches:
        x = batch.to(device).reshape(-1, sae.d_in)
        codes = sae.encode(x)
        recon = sae.decode(codes)
        y, error = x.double(), x.double() - recon.double()
        total["error"] += error.square().sum().item()
        total["norm"] += y.square().sum().item()
        total["cosine"] += torch.nn.functional.cosine_similarity(y, recon.double(), dim=1).sum().item()
        total["l0"] += int(codes.l0().sum())
        sums += torch.stack([y.sum(0), error.sum(0)])
        counts += codes.firing_counts()
        tokens += x.shape[0]
    if tokens < 2:
        raise ValueError(f"evaluation needs at least two tokens, got {tokens}")
    variance = total["norm"] - (sums[0].square().sum() / tokens).item()
    error_variance = total["error"] - (sums[1].square().sum() / tokens).item()
    return Evaluation(
        tokens=tokens,
        fvu=total["error"] / variance if variance > 0 else math.nan,
        explained_variance=1 - error_variance / variance if variance > 0 else math.nan,
        cosine=total["cosine"] / tokens,
        l0=total["l0"] / tokens,
        silent_fraction=(counts == 0).double().mean().item(),
        density=(counts.double() / tokens).cpu(),
    )


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

"""Made activations that are hard in the ways that real ones are: sparse causes, rare causes, a mean, outliers."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 4096  # tokens made at a time


def zipf_activations(
    tokens: int,
    d: int,
    *,
    features: int = 16384,
    active: int = 16,
    exponent: float = 1.0,
    mean_norm: float = 2.0,
    noise: float = 0.3,
    outliers: int = 2,
    outlier_scale: float = 20.0,
    seed: int = 0,
) -> Tensor:
    """Tokens that are sparse nonnegative combinations of unit directions whose frequencies follow Zipf's law.

    ``x = mean + Σ a_j f_j + noise``, the strengths ``a_j`` exponential with mean 1. A few coordinates are then scaled
    and shifted, as a residual stream has coordinates of huge variance and mean.

    Parameters
    ----------
    tokens, d : int
        Shape of the result.
    features : int
        Directions in all.
    active : int
        Draws of a feature for each token, with replacement.
    exponent : float
        The r-th most frequent feature is drawn in proportion to ``r ** -exponent``.
    mean_norm : float
        Norm of the mean that all tokens share.
    noise : float
        Norm, about, of the isotropic noise.
    outliers : int
        Coordinates that are scaled and shifted, at most ``d``.
    outlier_scale : float
        By how much.
    seed : int
        Determines everything; the first tokens are the same however many are asked for.

    Returns
    -------
    Tensor [tokens, d] float32
    """
    for name, number in {"tokens": tokens, "d": d, "features": features, "active": active}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 <= outliers <= d:
        raise ValueError(f"outliers must be in 0 … d={d}, got {outliers}")
    world = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d, generator=world), dim=1)
    mean = mean_norm * torch.nn.functional.normalize(torch.randn(d, generator=world), dim=0)
    outlier = torch.randperm(d, generator=world)[:outliers]
    x = torch.empty(tokens, d)
    for part in x.split(_CHUNK):
        chosen = zipf_draws(_CHUNK * active, features, exponent, world).view(_CHUNK, active)
        strength = torch.empty(_CHUNK, active).exponential_(generator=world)
        made = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strength, mode="sum")
        made += mean + noise / d**0.5 * torch.randn(_CHUNK, d, generator=world)
        made[:, outlier] = outlier_scale * (made[:, outlier] + mean[outlier].sign())
        part.copy_(made[: len(part)])
    return x


def zipf_draws(draws: int, features: int, exponent: float, generator: torch.Generator | None) -> Tensor:
    """``[draws]`` int64 numbers below `features`, r with a probability in proportion to ``(r + 1) ** -exponent``."""
    weight = torch.arange(1, features + 1, dtype=torch.float64) ** -exponent
    edges = weight.cumsum(0) / weight.sum()
    return torch.searchsorted(edges, torch.rand(draws, dtype=torch.float64, generator=generator), right=True).clamp_(
        max=features - 1
    )

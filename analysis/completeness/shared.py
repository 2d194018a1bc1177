"""What the analyses of completeness have in common: rows, codes, random directions, checks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk

try:
    from scipy.stats import rankdata
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

Codes = sk.SparseCodes | sk.CSRCodes

BATCH = 8192  # tokens encoded at a time


def decoder_rows(sae: sk.SAE) -> Tensor:
    """Decoder in float32 on the CPU, ``[d_sae, d]``."""
    return sae.W_dec.detach().float().cpu()


def on_cpu(codes: Codes) -> Codes:
    """Codes in float32 on the CPU."""
    codes = codes._replace(values=codes.values.detach().float().cpu())
    if isinstance(codes, sk.CSRCodes):
        return codes._replace(crow=codes.crow.cpu(), col=codes.col.cpu())
    return codes._replace(indices=codes.indices.cpu())


def latents_of(codes: Codes) -> Tensor:
    """Latent of each code, flat int64."""
    return (codes.col if isinstance(codes, sk.CSRCodes) else codes.indices).flatten().long()


def tokens_of(codes: Codes) -> Tensor:
    """Token of each code, flat int64."""
    if isinstance(codes, sk.CSRCodes):
        return codes.rows()
    return torch.arange(codes.tokens).repeat_interleave(codes.k)


def nearest_row(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each row with one of `others`, 0 where none is positive, and which one it is."""
    found = sk.topk_encode(normalize(rows, dim=1), normalize(others, dim=1), None, 1)
    return found.values.squeeze(1), found.indices.squeeze(1).long()


def auc(positive: Tensor, score: Tensor) -> float:
    """Area under the ROC curve; NaN where there is one class only."""
    if bool(positive.all()) or not bool(positive.any()):
        return math.nan
    above, n = torch.from_numpy(rankdata(score.double().numpy()))[positive].sum(), int(positive.sum())
    return float((above - n * (n + 1) / 2) / (n * (len(positive) - n)))


def random_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Random directions of unit norm, ``[n, d]``."""
    return normalize(torch.randn(n, d, generator=generator), dim=1)


def directions_like(rows: Tensor, n: int, count: int, generator: torch.Generator) -> Iterable[Tensor]:
    """`count` draws of n random directions ``[n, d]`` with the second moment of the unit rows."""
    unit = normalize(rows, dim=1).cpu().double()
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
    root = ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()
    return (normalize(torch.randn(n, rows.shape[1], generator=generator) @ root, dim=1) for _ in range(count))


def random_rotation(d: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(d, d, generator=generator))[0]


def checked_rows(name: str, rows: Tensor, d: int | None = None) -> Tensor:
    """Unit rows on the CPU, in float32."""
    if rows.dim() != 2 or not rows.numel() or (d is not None and rows.shape[1] != d):
        width = "d" if d is None else d
        raise ValueError(f"{name} must be rows [n, {width}], got shape {tuple(rows.shape)}")
    rows = rows.detach().cpu().float()
    norms = rows.norm(dim=1)
    if not (norms.isfinite() & (norms > 0)).all():
        raise ValueError(f"{name} must be finite rows of a norm above 0: leave out latents that are dead")
    return normalize(rows, dim=1)


def check_between(name: str, number: float) -> None:
    """Raise unless the number is above 0 and below 1."""
    if not 0 < number < 1:
        raise ValueError(f"{name} must be above 0 and below 1, got {number}")


def check_count(least: int = 1, **numbers: int) -> None:
    """Raise unless every number is at least `least`."""
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")

"""Draws that nulls are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def permuted(rows: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """`rows` ``[n, d]`` permuted along `dim`, at every place of the other dimension by a permutation of its own."""
    return rows.gather(dim, torch.rand(rows.shape, generator=generator).argsort(dim).to(rows.device))


def second_moment_root(unit: Tensor) -> Tensor:
    """``R`` ``[d, d]`` with ``RᵀR`` the second moment of the rows ``[n, d]``: ``normal @ R`` has it too."""
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
    return values.clamp(min=0).sqrt()[:, None] * vectors.T

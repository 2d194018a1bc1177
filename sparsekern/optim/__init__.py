"""Optimizers, by the name that a configuration uses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """The optimizer called `name`. ``adam`` is ``torch.optim.Adam`` with its fused kernels."""
    if name != "adam":
        raise ValueError(f"optimizer must be adam, got {name!r}")
    return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps, fused=True)

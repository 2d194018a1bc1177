"""Starting values."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """``[rows, columns]`` float32 directions, uniform on the sphere."""
    return torch.nn.functional.normalize(torch.randn(rows, columns, generator=generator), dim=1)


def geometric_median(x: Tensor, tolerance: float = 1e-5, max_iterations: int = 100) -> Tensor:
    """The point with the least summed distance to the rows of `x` ``[n, d]``, by Weiszfeld's iteration.

    Unlike the mean it is not dragged along by a few rows of huge norm, which residual streams have.

    Returns
    -------
    Tensor [d]
        Found once a step moves it by less than `tolerance` of its norm.
    """
    median = x.mean(0)
    for _ in range(max_iterations):
        weight = 1 / (x - median).norm(dim=1).clamp_min(torch.finfo(x.dtype).eps)
        moved = (weight / weight.sum()) @ x
        step = (moved - median).norm()
        median = moved
        if step <= tolerance * median.norm():
            break
    return median

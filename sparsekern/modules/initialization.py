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


def spherical_kmeans(x: Tensor, start: Tensor, iterations: int = 25) -> Tensor:
    """Unit directions of clusters of the rows of `x` ``[n, d]``, by Lloyd's iteration on cosines.

    Parameters
    ----------
    x : Tensor [n, d]
        What is clustered, by direction alone.
    start : Tensor [clusters, d]
        Directions to start from. A cluster that has lost all rows takes one of those that fit their clusters worst.
    iterations : int
        Of Lloyd's.

    Returns
    -------
    Tensor [clusters, d]

    References
    ----------
    Dhillon and Modha, *Concept decompositions for large sparse text data using clustering*, Machine Learning 42 (2001).
    """
    rows = torch.nn.functional.normalize(x, dim=1)
    centers = torch.nn.functional.normalize(start, dim=1)
    count = centers.shape[0]
    for _ in range(iterations):
        best = (rows @ centers.T).max(1)
        # Empty clusters take the worst fitted rows, one each, in order: nothing waits to see how many there are.
        sizes = torch.bincount(best.indices, minlength=count)
        empty = sizes == 0
        sums = torch.zeros_like(centers).index_add_(0, best.indices, rows)
        worst = best.values.argsort()[: min(count, rows.shape[0])]
        take = (empty.cumsum(0) - 1).clamp(0, worst.shape[0] - 1)
        centers = torch.nn.functional.normalize(torch.where(empty[:, None], rows[worst[take]], sums), dim=1)
    return centers

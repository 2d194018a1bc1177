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


def spherical_kmeans(x: Tensor, clusters: int, iterations: int = 25, restarts: int = 4) -> Tensor:
    """Unit directions of clusters of the rows of `x` ``[n, d]``, by Lloyd's iteration on cosines.

    It starts from rows drawn far from each other (k-means++), a few times, and keeps the best. The draws have a seed of
    their own: the same rows give the same clusters.

    Parameters
    ----------
    x : Tensor [n, d]
        What is clustered, by direction alone.
    clusters : int
        How many. Those beyond the number of rows repeat rows.
    iterations : int
        Of Lloyd's. A cluster that has lost all rows takes one of those that fit theirs worst.
    restarts : int
        Starts.

    Returns
    -------
    Tensor [clusters, d]

    References
    ----------
    Dhillon and Modha, *Concept decompositions for large sparse text data using clustering*, Machine Learning 42 (2001);
    Arthur and Vassilvitskii, *k-means++* (2007).
    """
    rows = torch.nn.functional.normalize(x, dim=1)
    generator = torch.Generator().manual_seed(0)
    found, best = rows[:0], -torch.inf
    for _ in range(restarts):
        centers = _far_rows(rows, clusters, generator)
        for _ in range(iterations):
            fit = (rows @ centers.T).max(1)
            empty = torch.bincount(fit.indices, minlength=clusters) == 0
            worst = fit.values.argsort()[: min(clusters, len(rows))]
            instead = rows[worst[(empty.cumsum(0) - 1).clamp(0, len(worst) - 1)]]
            sums = torch.zeros_like(centers).index_add_(0, fit.indices, rows)
            centers = torch.nn.functional.normalize(torch.where(empty[:, None], instead, sums), dim=1)
        total = float((rows @ centers.T).amax(1).sum())
        if total > best:
            found, best = centers, total
    return found


def _far_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the unit `rows`, each drawn with odds that fall with its cosine to the nearest before it."""
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    distance = 1 - rows @ rows[chosen[0]]
    for _ in range(count - 1):
        odds = distance.clamp_min(0).cpu().double().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * odds[-1]
        chosen.append(min(int(torch.searchsorted(odds, draw, right=True)), len(rows) - 1))
        distance = torch.minimum(distance, 1 - rows @ rows[chosen[-1]])
    return rows[torch.tensor(chosen, device=rows.device)]

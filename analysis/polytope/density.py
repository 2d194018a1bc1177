"""Where the boundaries are: between classes or within them, near the data or away from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.nulls import permuted
from sparsekern.analysis.polytope.segments import boundaries_on_segments
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples

_STRATA = 10  # groups of segments of about the same length


@dataclass(frozen=True, eq=False)
class BoundaryDensity(Results):
    """What :func:`boundary_density` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``data``, mean boundaries per unit length on segments between random samples; ``local``, on short segments
        about samples; with labels also ``between_over_within``, that between samples of different classes over that
        between samples of one.
    density : Tensor [m] float64
        Boundaries per unit length of the segments of ``between_over_within``; NaN between equal samples.
    length : Tensor [m] float64
        Their lengths.
    between : Tensor [m] bool
        Whether their ends are of different classes.
    """

    results: dict[str, Result]
    density: Tensor
    length: Tensor
    between: Tensor

    def plot(self, axes: Any = None) -> Any:
        """Density and length of each segment, within and between classes."""
        axes = new_axes() if axes is None else axes
        for kind, label, color in ((False, "within a class", "C0"), (True, "between classes", "C1")):
            some = self.between == kind
            axes.plot(self.length[some].tolist(), self.density[some].tolist(), "o", ms=4, color=color, label=label)
        axes.set(xlabel="length of the segment", ylabel="boundaries per unit length")
        axes.legend(frameon=False)
        return axes


@torch.no_grad()
def boundary_density(
    net: nn.Module,
    x: Tensor,
    labels: Tensor | None = None,
    layers: Sequence[str] | None = None,
    *,
    segments: int = 200,
    radius: float = 0.1,
    n_null: int = 20,
    n_permute: int = 999,
    seed: int = 0,
    at: str | None = None,
    base: Tensor | Mapping[str, Any] | None = None,
    batch_size: int = 256,
) -> BoundaryDensity:
    """Boundaries per unit length: between and within classes, and on data beside noise of the same shape.

    No sample is an end of two segments of one measure, so that segments are exchangeable. Each sample of a null of
    ``data`` and ``local`` has as many segments as the value, solved anew.

    Parameters
    ----------
    net : nn.Module
        Piecewise linear, as :func:`boundaries_on_segments` takes it.
    x : Tensor [N, …]
        Samples.
    labels : Tensor [N] of integers, or None
        Their classes.
    layers, at, base, batch_size
        As :func:`boundaries_on_segments` takes them.
    segments : int
        Of each measure, or as many as there are samples for; of ``between_over_within`` half are of each kind.
    radius : float
        Length of the segments of ``local``, as a part of the mean length between random samples.
    n_null : int
        Samples of the nulls of ``data`` and ``local``: Gaussian points with mean and covariance of `x`, and points with
        every coordinate of `x` permuted over the samples. The directions of ``local`` stay those of the data.
    n_permute : int
        Samples of the nulls of ``between_over_within``: kinds of segments permuted, among all, and among those of about
        the same length (tenths).
    seed : int
        Determines segments and nulls.

    Raises
    ------
    ValueError
        For fewer than four samples, wrong shapes, numbers out of range, labels without two samples of one class and
        two classes, and nets that are not piecewise linear.

    References
    ----------
    Black et al., *Interpreting neural networks through the polytope lens* (arXiv 2211.12312).
    """
    if x.dim() < 2 or len(x) < 4:
        raise ValueError(f"x must be [N, …] with 4 samples at least, got {tuple(x.shape)}")
    if labels is not None and (labels.shape != (len(x),) or labels.is_floating_point()):
        raise ValueError(f"labels must be integers [{len(x)}], got {labels.dtype} {tuple(labels.shape)}")
    if segments < 2 or radius <= 0 or n_null < 0 or n_permute < 0:
        raise ValueError(
            "segments must be at least 2, radius above 0, n_null and n_permute not negative, "
            f"got {segments}, {radius}, {n_null} and {n_permute}"
        )

    def solve(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        found = boundaries_on_segments(net, a, b, layers, at=at, base=base, batch_size=batch_size)
        return samples(one.density for one in found), samples(one.length for one in found)

    generator = torch.Generator().manual_seed(seed)
    x = x.double()
    results = {}
    density, length = torch.empty(2, 0, dtype=torch.float64)
    between = torch.empty(0, dtype=torch.bool)
    if labels is not None:
        first, second, between = _pairs(labels.cpu(), segments, generator)
        density, length = solve(x[first], x[second])
        ratio = _ratio(density, between)
        shuffled = null_generator(seed)
        strata = length.argsort().argsort() * _STRATA // len(length)
        every = torch.zeros_like(strata)
        nulls = {
            "kinds permuted": samples(_ratio(density, _permuted(between, every, shuffled)) for _ in range(n_permute)),
            "kinds permuted at a length": samples(
                _ratio(density, _permuted(between, strata, shuffled)) for _ in range(n_permute)
            ),
        }
        title = "boundaries per unit length, between classes over within"
        results["between_over_within"] = Result(title, ratio, nulls)
    order = torch.randperm(len(x), generator=generator)
    half = min(segments, len(x) // 2)
    ends = order[:half], order[half : 2 * half]
    step = x[ends[1]] - x[ends[0]]
    norms = step.flatten(1).norm(dim=1)
    if not (norms > 0).any():
        raise ValueError("x must have samples that differ")
    typical = norms.mean()
    apart = norms > 0
    reach = step[apart] * (radius * typical / norms[apart] / 2).view(-1, *(1,) * (x.dim() - 1))

    def measured(points: Tensor) -> tuple[float, float]:
        centre = points[ends[0]][apart]
        across = solve(points[ends[0]], points[ends[1]])[0].nanmean().item()
        return across, solve(centre - reach, centre + reach)[0].nanmean().item()

    value = measured(x)
    noise = null_generator(seed + 1)
    makers = {"Gaussian of the same covariance": _gaussian, "coordinates permuted": _scrambled}
    drawn = {name: [measured(make(x, noise)) for _ in range(n_null)] for name, make in makers.items()}
    titles = {
        "data": "boundaries per unit length between samples",
        "local": "boundaries per unit length about samples",
    }
    for index, (key, title) in enumerate(titles.items()):
        beside = {name: samples(one[index] for one in values) for name, values in drawn.items()}
        results[key] = Result(title, value[index], beside)
    return BoundaryDensity(results, density, length, between)


def _pairs(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Disjoint pairs of samples, half of them of one class each: first, second, and whether the classes differ."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # classes together, at random within
    place = torch.arange(len(order))
    _, counts = labels[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    even = (place - starts) % 2 == 0
    has_next = torch.cat([labels[order][1:] == labels[order][:-1], torch.zeros(1, dtype=torch.bool)])
    heads = place[even & has_next]
    heads = heads[torch.randperm(len(heads), generator=generator)]
    # A quarter of the samples as pairs of one class leaves half of the rest for pairs of two.
    heads = heads[: max(1, min(count // 2, len(order) // 4))]
    used = torch.zeros(len(order), dtype=torch.bool)
    used[heads] = True
    used[heads + 1] = True
    rest = order[~used]
    rest = rest[torch.randperm(len(rest), generator=generator)]
    one, two = rest[: len(rest) // 2], rest[len(rest) // 2 : 2 * (len(rest) // 2)]
    apart = (labels[one] != labels[two]).nonzero().squeeze(1)[: len(heads)]
    if len(heads) == 0 or len(apart) == 0:
        raise ValueError("labels must have two samples of one class, and two classes, beside each other")
    within = order[heads], order[heads + 1]
    kinds = torch.cat([torch.zeros(len(heads), dtype=torch.bool), torch.ones(len(apart), dtype=torch.bool)])
    return torch.cat([within[0], one[apart]]), torch.cat([within[1], two[apart]]), kinds


def _ratio(density: Tensor, between: Tensor) -> float:
    return (density[between].nanmean() / density[~between].nanmean()).item()


def _permuted(kinds: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """`kinds` permuted within each group."""
    target = groups.argsort(stable=True)
    order = torch.randperm(len(kinds), generator=generator)
    source = order[groups[order].argsort(stable=True)]
    new = torch.empty_like(kinds)
    new[target] = kinds[source]
    return new


def _gaussian(x: Tensor, generator: torch.Generator) -> Tensor:
    """As many Gaussian points with the mean and covariance of `x`, by mixing its rows: no covariance matrix."""
    flat = x.flatten(1).cpu()
    mean = flat.mean(0)
    mixing = torch.randn(len(x), len(x), generator=generator, dtype=torch.float64) / (len(x) - 1) ** 0.5
    return (mean + mixing @ (flat - mean)).view(x.shape).to(x.device)


def _scrambled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every coordinate permuted over the samples, each by itself."""
    return permuted(x.flatten(1).cpu(), 0, generator).view(x.shape).to(x.device)

"""Which features are found, and how many are there?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekern.analysis.completeness.shared import Codes, auc, check_count, latents_of, on_cpu, tokens_of
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples

try:
    from scipy.optimize import brentq
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

_RIDGE = 1e-4  # keeps the slope finite where frequency separates the features perfectly
_NEWTON = 100  # steps at most; about ten are enough where it does not


# Against frequency


@torch.no_grad()
def best_f1(codes: Codes, classes: Tensor) -> tuple[Tensor, Tensor]:
    """How well each class of tokens is told by a single latent: the largest F1 of "is active" for "is of the class".

    Parameters
    ----------
    codes : SparseCodes or CSRCodes
        Of B tokens.
    classes : Tensor [B] int64
        Class of each token, counted from 0; −1 for none, which every class counts as a token that is not of it.

    Returns
    -------
    tuple of Tensor [n_classes] float64 and int64
        The F1, and the latent; 0 and −1 for classes on whose tokens nothing is active.

    Raises
    ------
    ValueError
        For classes of another number of tokens, or none at all.
    """
    if classes.shape != (codes.tokens,) or classes.is_floating_point() or not bool((classes >= 0).any()):
        raise ValueError(
            f"classes must be [{codes.tokens}] whole numbers, some of them at least 0, got {tuple(classes.shape)} "
            f"{classes.dtype}"
        )
    codes, classes = on_cpu(codes), classes.detach().cpu().long()
    on = codes.values.flatten() > 0
    token, latent = tokens_of(codes)[on], latents_of(codes)[on]
    of_latent = torch.bincount(latent, minlength=codes.d_sae)
    of_class = torch.bincount(classes[classes >= 0])
    pairs, both = (classes[token] * codes.d_sae + latent)[classes[token] >= 0].unique(return_counts=True)
    pair_class, pair_latent = pairs // codes.d_sae, pairs % codes.d_sae
    f1 = 2 * both.double() / (of_class[pair_class] + of_latent[pair_latent])
    best = torch.zeros(len(of_class), dtype=torch.float64).scatter_reduce_(0, pair_class, f1, "amax")
    which = torch.full((len(of_class),), -1)
    top = (f1 == best[pair_class]).nonzero().squeeze(1).flip(0)  # of equals the first latent is written last
    which[pair_class[top]] = pair_latent[top]
    return best, which


@dataclass(frozen=True, eq=False)
class RecoveryCurve(Results):
    """What :func:`feature_recovery_curve` returns: ``P(found) = σ(intercept + slope · log10 frequency)``.

    Attributes
    ----------
    results : dict of str to Result
        ``slope``, ``auc``.
    intercept, slope : float
        Of the logistic fit; NaN where all features are found, or none.
    half : float
        Frequency at which half of the features are found; NaN where the slope is not positive.
    half_interval : tuple of float
        95% of the bootstrap. An end is infinite or 0 where more than 2.5% of the samples had no such frequency.
    found : Tensor [n] bool
    frequency : Tensor [n] float64
    resampled : Tensor [m, 2] float64
        Intercepts and slopes of the bootstrap, those that are defined.
    permuted : Tensor [m, 2] float64
        The same under the null.
    """

    results: dict[str, Result]
    intercept: float
    slope: float
    half: float
    half_interval: tuple[float, float]
    found: Tensor
    frequency: Tensor
    resampled: Tensor
    permuted: Tensor

    def predict(self, frequency: Tensor) -> Tensor:
        """P(found) at some frequencies."""
        return torch.sigmoid(self.intercept + self.slope * frequency.double().log10())

    def plot(self, axes: Any = None, bins: int = 8) -> Any:
        """Shares found in bins of as many features, the fit with its 95% band, and fits of permuted frequencies."""
        axes = new_axes() if axes is None else axes
        log = self.frequency.log10()
        grid = torch.linspace(float(log.min()), float(log.max()), 200, dtype=torch.float64)
        for intercept, slope in self.permuted[:20].tolist():
            axes.plot(10**grid, torch.sigmoid(intercept + slope * grid), color="0.8", lw=0.8, zorder=0)
        if len(self.resampled):
            curves = torch.sigmoid(self.resampled[:, :1] + self.resampled[:, 1:] * grid)
            low, high = curves.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
            axes.fill_between(10**grid, low, high, color="C0", alpha=0.2, lw=0)
        axes.plot(10**grid, self.predict(10**grid), color="C0", label="logistic fit")
        for part in log.argsort().tensor_split(min(bins, len(log))):
            axes.plot(10 ** log[part].mean(), self.found[part].double().mean(), "o", color="0.2", ms=5)
        if self.half == self.half and log.min() <= math.log10(self.half) <= log.max():
            axes.axvline(self.half, color="C0", ls="--", lw=1, label=f"half found at {self.half:.2g}")
        axes.set_xscale("log")
        axes.set(xlabel="share of tokens that have the feature", ylabel="share of features found", ylim=(-0.03, 1.03))
        axes.legend(frameon=False)
        return axes


def feature_recovery_curve(
    found: Tensor,
    frequency: Tensor,
    found_at: float = 0.9,
    n_bootstrap: int = 200,
    n_null: int = 100,
    seed: int = 0,
) -> RecoveryCurve:
    """How likely a feature is found, by how frequent it is: a logistic fit on the logarithm of the frequency.

    ``slope``
        In logits a decade. Null: frequencies permuted.
    ``auc``
        Chance that a feature that is found is more frequent than one that is not. Null: the same.

    Parameters
    ----------
    found : Tensor [n]
        Whether each feature is found, or a score of it such as its largest cosine with a decoder row.
    frequency : Tensor [n]
        Share of the tokens that have it, above 0.
    found_at : float
        Score above which a feature counts as found.
    n_bootstrap, n_null : int
        Samples of features with replacement; permutations.
    seed : int
        Determines both.

    Raises
    ------
    ValueError
        For fewer than two features, scores or frequencies that are not finite, frequencies that are not positive, and
        frequencies that are all the same.
    """
    if found.dim() != 1 or len(found) < 2 or found.shape != frequency.shape:
        raise ValueError(
            "found and frequency must be vectors with a number for each of at least two features, "
            f"got shapes {tuple(found.shape)} and {tuple(frequency.shape)}"
        )
    found, frequency = found.detach().cpu(), frequency.detach().cpu().double()
    if not (frequency.isfinite() & (frequency > 0)).all():
        raise ValueError("frequency must be finite and above 0: leave out features that never occur")
    if found.is_floating_point() and not found.isfinite().all():
        raise ValueError("found must be finite: a feature without a score is not found")
    check_count(n_bootstrap=n_bootstrap, n_null=n_null)
    found = found > found_at if found.is_floating_point() else found.bool()
    log = frequency.log10()
    if log.min() == log.max():
        raise ValueError(f"frequency must differ between features, got {float(frequency[0]):g} for all")
    generator = null_generator(seed)
    intercept, slope = _logistic(found[None], log[None])[0].tolist()
    drawn = torch.randint(len(found), (n_bootstrap, len(found)), generator=generator)
    resampled = _logistic(found[drawn], log[drawn])
    orders = torch.stack([torch.randperm(len(found), generator=generator) for _ in range(n_null)])
    permuted = _logistic(found.expand(n_null, -1), log[orders])
    results = {
        "slope": Result(
            "slope of the recovery curve, logits a decade", slope, {"frequencies permuted": permuted[:, 1]}
        ),
        "auc": Result(
            "chance that a feature that is found is more frequent than one that is not",
            auc(found, log),
            {"frequencies permuted": samples(auc(found, log[order]) for order in orders)},
        ),
    }
    return RecoveryCurve(
        results=results,
        intercept=intercept,
        slope=slope,
        half=_half(intercept, slope),
        half_interval=_half_interval(resampled) if slope == slope else (math.nan, math.nan),
        found=found,
        frequency=frequency,
        resampled=resampled[resampled[:, 1].isfinite()],
        permuted=permuted,
    )


def _logistic(found: Tensor, log: Tensor) -> Tensor:
    """Intercept and slope of each row of both ``[m, n]``: ``[m, 2]``; NaN for one class, or one frequency."""
    center, scale = log.mean(), log.std()
    x, y = (log - center) / scale, found.double()
    fitted = torch.zeros(len(x), 2, dtype=torch.float64)
    ridge = torch.diag(torch.tensor([0.0, _RIDGE], dtype=torch.float64))
    for _ in range(_NEWTON):
        p = torch.sigmoid(fitted[:, :1] + fitted[:, 1:] * x)
        gradient = torch.stack([(y - p).sum(1), ((y - p) * x).sum(1)], 1) - fitted @ ridge
        weight = p * (1 - p)
        moments = [(weight * power).sum(1) for power in (torch.ones_like(x), x, x * x)]
        curvature = torch.stack([moments[0], moments[1], moments[1], moments[2]], 1).view(-1, 2, 2) + ridge
        step = torch.linalg.lstsq(curvature, gradient[:, :, None]).solution.squeeze(2)
        step = step / (step.norm(dim=1, keepdim=True) / 2).clamp(min=1)  # else it leaps where the curve is flat
        fitted += step
        if step.abs().max() < 1e-8:
            break
    slope = fitted[:, 1] / scale
    undefined = (found.all(1) | ~found.any(1) | (log == log[:, :1]).all(1))[:, None]
    return torch.stack([fitted[:, 0] - slope * center, slope], 1).masked_fill(undefined, math.nan)


def _half(intercept: float, slope: float) -> float:
    """Frequency at which the curve is one half."""
    if not slope > 0:
        return math.nan
    exponent = -intercept / slope
    return 10.0**exponent if abs(exponent) < 300 else math.inf if exponent > 0 else 0.0


def _half_interval(resampled: Tensor) -> tuple[float, float]:
    """95% of the bootstrap's frequencies at one half."""
    halves = torch.tensor([_half(*row) for row in resampled.tolist()], dtype=torch.float64).sort().values
    # A sample without one could be on either side, so it counts at both ends.
    low, high = halves.nan_to_num(nan=0.0).sort().values, halves.nan_to_num(nan=math.inf).sort().values
    at = (len(halves) - 1) * 0.025
    return float(low[math.floor(at)]), float(high[math.ceil(len(halves) - 1 - at)])


# In all


def matched_features(alive: Sequence[Tensor], pairs: Mapping[tuple[int, int], tuple[Tensor, Tensor]]) -> Tensor:
    """Which seeds have found which features, where latents of two seeds that are paired stand for the same one.

    A feature is a connected component: a latent, those that it is paired with, those that these are paired with. What
    two pairs of seeds say of a third is not looked at, so that one feature can be several latents of a seed.

    Parameters
    ----------
    alive : sequence of Tensor [W] bool
        For each seed the latents that take part.
    pairs : mapping of (int, int) to two Tensors [n] int64
        For each two seeds their paired latents, such as ``canonical.Matching.pairs`` gives.

    Returns
    -------
    Tensor [n_seeds, n_features] bool
        For :func:`estimate_total_features`.

    Raises
    ------
    ValueError
        For a seed that is not there, and paired latents of which one takes no part.
    """
    sizes = [len(one) for one in alive]
    starts = [sum(sizes[:seed]) for seed in range(len(sizes))]
    everyone = torch.cat([one.cpu() for one in alive])
    edges = [torch.zeros(2, 0, dtype=torch.int64)]
    for (a, b), (first, second) in pairs.items():
        if not (0 <= a < len(sizes) and 0 <= b < len(sizes)):
            raise ValueError(f"pairs must be of seeds in 0 … {len(sizes) - 1}, got {a}, {b}")
        joined = torch.stack([first.cpu() + starts[a], second.cpu() + starts[b]])
        if not bool(everyone[joined].all()):
            raise ValueError(f"pairs of seeds {a} and {b} must be of latents that are alive")
        edges.append(joined)
    i, j = torch.cat(edges, 1).numpy()
    graph = coo_array((np.ones(len(i), dtype=bool), (i, j)), shape=(len(everyone), len(everyone)))
    feature = torch.from_numpy(connected_components(graph, directed=False)[1]).long()[everyone]
    feature = feature.unique(return_inverse=True)[1]
    seed = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[everyone]
    table = torch.zeros(len(sizes), int(feature.max()) + 1 if len(feature) else 0, dtype=torch.bool)
    table[seed, feature] = True
    return table


@dataclass(frozen=True, eq=False)
class TotalFeatures(Results):
    """What :func:`estimate_total_features` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``chao``, ``lincoln_petersen``, ``jackknife``, ``spread``.
    observed : int
        Features that at least one seed has found.
    found_by : Tensor [n_seeds + 1] int64
        How many of them were found by 0, 1, 2 … seeds; the first is 0.
    equal_rates : float
        Features there would be if each were as easy to find as any other; infinite where no two seeds share one.
    interval : dict of str to tuple of float
        95% of the bootstrap for each estimator.
    error : dict of str to float
        Standard deviation of the bootstrap.
    """

    results: dict[str, Result]
    observed: int
    found_by: Tensor
    equal_rates: float
    interval: dict[str, tuple[float, float]]
    error: dict[str, float]


def estimate_total_features(
    found_by_seed: Tensor, n_bootstrap: int = 200, n_null: int = 200, seed: int = 0
) -> TotalFeatures:
    """How many features there are to be found, from how often several seeds find the same: capture and recapture.

    With Q_i features found by exactly i of m seeds, S in all:

    ``chao``
        ``S + (m − 1) / m · Q_1 (Q_1 − 1) / (2 (Q_2 + 1))``, Chao's estimator for incidence (Chao 2): a lower bound in
        expectation, whatever the rates at which features are found.
    ``lincoln_petersen``
        ``(n_a + 1)(n_b + 1) / (n_ab + 1) − 1`` (Chapman), mean over the pairs of seeds: for equal rates.
    ``jackknife``
        ``S + Q_1 (m − 1) / m``, of first order: never more than S + Q_1.
    ``spread``
        Variance over the features seen of the number of seeds that found them. Above its null where some features are
        easier to find than others: then all three numbers are too small.

    The null of all four has as many features as equal rates would need, each found by a seed with the same chance,
    independently; every seed finds as many as it did, on average.

    Parameters
    ----------
    found_by_seed : Tensor [n_seeds, n_features] bool
        Which seeds found which features, once the features of all seeds are matched. Columns that no seed found are
        taken to be unknown, so that a truth may be given whole.
    n_bootstrap, n_null : int
        Samples for the error, which draws the estimated number of features, the unseen ones among them, from what
        was observed; samples of the null.
    seed : int
        Determines both.

    Raises
    ------
    ValueError
        For fewer than two seeds, a seed that found nothing, and what is not a table of truth values.

    References
    ----------
    Chao, *Estimating the population size for capture-recapture data with unequal catchability*, Biometrics 43 (1987);
    Chapman (1951); Burnham & Overton, *Biometrika* 65 (1978), for the jackknife.
    """
    if found_by_seed.dim() != 2 or len(found_by_seed) < 2:
        raise ValueError(
            f"found_by_seed must be [seeds, features] of two seeds at least, got {tuple(found_by_seed.shape)}"
        )
    if found_by_seed.dtype != torch.bool:
        raise ValueError(f"found_by_seed must hold truth values, got {found_by_seed.dtype}; compare scores first")
    check_count(n_null=n_null)
    check_count(least=2, n_bootstrap=n_bootstrap)  # which have a standard deviation
    table = found_by_seed.detach().cpu()
    table = table[:, table.any(0)]
    sizes = table.sum(1)
    if not sizes.all():
        raise ValueError("found_by_seed must have a feature for every seed: leave out seeds that found none")
    generator = null_generator(seed)
    m, observed = table.shape
    equal = _equal_rates(sizes, observed)
    rates = sizes / equal
    drawn = [_captured(equal, rates, generator) for _ in range(n_null)] if math.isfinite(equal) else []
    results, interval, error = {}, {}, {}
    for key, (name, estimate) in _ESTIMATORS.items():
        value = estimate(table)
        tail = "greater" if key == "spread" else "two-sided"
        null = {"equal and independent rates": samples(estimate(other) for other in drawn)}
        results[key] = Result(name, value, null, tail=tail)
        if key == "spread":
            continue
        total = max(observed, round(value))
        redrawn = []
        for seen in _binomial(
            total, torch.full((n_bootstrap,), observed / total, dtype=torch.float64), generator
        ).tolist():
            columns = torch.randint(observed, (seen,), generator=generator)  # the others stay unseen
            redrawn.append(estimate(table[:, columns]))
        numbers = samples(redrawn)
        low, high = numbers.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        interval[key], error[key] = (low, high), float(numbers.std())
    found_by = torch.bincount(table.sum(0), minlength=m + 1)
    return TotalFeatures(results, observed, found_by, equal, interval, error)


def _captured(number: float, rates: Tensor, generator: torch.Generator) -> Tensor:
    """A table of so many features, each found by a seed at its rate; without columns that none has found."""
    # Fewer features than are needed cannot be drawn, so a broken number is rounded at random.
    number = int(number + float(torch.rand((), generator=generator)))
    rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
    # Estimates can be millions of features of which few are found, so only these are drawn.
    found = [rng.choice(number, int(count), replace=False) for count in _binomial(number, rates, generator)]
    columns, which = np.unique(np.concatenate(found), return_inverse=True)
    seeds = np.repeat(np.arange(len(found)), [len(one) for one in found])
    table = torch.zeros(len(found), len(columns), dtype=torch.bool)
    table[torch.from_numpy(seeds), torch.from_numpy(which)] = True
    return table


def _binomial(count: int, rates: Tensor, generator: torch.Generator) -> Tensor:
    """How many of `count` are drawn at each rate, int64."""
    return torch.binomial(torch.full_like(rates, count, dtype=torch.float64), rates.double(), generator).long()


def _found_by(table: Tensor) -> Tensor:
    """How many features were found by 0, 1, 2 … seeds, the first taken to be 0: ``[n_seeds + 1]`` int64."""
    counts = torch.bincount(table.sum(0), minlength=len(table) + 1)
    counts[0] = 0
    return counts


def _chao(table: Tensor) -> float:
    counts = _found_by(table)
    once, twice = int(counts[1]), int(counts[2])
    return int(counts.sum()) + (len(table) - 1) / len(table) * once * (once - 1) / (2 * (twice + 1))


def _lincoln_petersen(table: Tensor) -> float:
    both = (table.double() @ table.double().T).tolist()
    pairs = combinations(range(len(table)), 2)
    found = [(both[a][a] + 1) * (both[b][b] + 1) / (both[a][b] + 1) - 1 for a, b in pairs]
    return sum(found) / len(found)


def _jackknife(table: Tensor) -> float:
    counts = _found_by(table)
    return int(counts.sum()) + int(counts[1]) * (len(table) - 1) / len(table)


def _spread(table: Tensor) -> float:
    counts = table.sum(0)
    seen = counts[counts > 0].double()
    return float(seen.var(correction=0)) if len(seen) else math.nan


_ESTIMATORS: dict[str, tuple[str, Callable[[Tensor], float]]] = {
    "chao": ("features in all, at least (Chao)", _chao),
    "lincoln_petersen": ("features in all, at equal rates (Lincoln–Petersen)", _lincoln_petersen),
    "jackknife": ("features in all (jackknife)", _jackknife),
    "spread": ("variance of how many seeds find a feature", _spread),
}


def _equal_rates(sizes: Tensor, observed: int) -> float:
    """The most likely number of features if every seed finds each with the same chance, independently.

    That solves ``1 − S / N = Π (1 − n_s / N)`` (Darroch 1958).
    """
    numbers = sizes.double().tolist()
    if sum(numbers) == observed:
        return math.inf  # no feature was found twice
    if max(numbers) == observed:
        return float(observed)  # one seed has all that any has

    def excess(log: float) -> float:
        total = observed * math.exp(log)
        return math.log1p(-observed / total) - sum(math.log1p(-number / total) for number in numbers)

    high = 1.0
    while excess(high) < 0:
        high *= 2
    return observed * math.exp(brentq(excess, 1e-12, high))

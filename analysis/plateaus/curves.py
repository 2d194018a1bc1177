"""Curves of a model's response over the size of a perturbation, what is read from them, and how they compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.analysis.plateaus.perturbations import BASELINES, BASES, DIRECTIONS, OF_SAE, Perturbations
from sparsekern.analysis.plateaus.rerun import Batch, Rerun
from sparsekern.analysis.results import Result, Results, new_panels, null_generator
from sparsekern.hooks import evaluating

Pair = tuple[str | None, str | None]
"""A kind of base and a direction; None for the first kind, and for the mean over all directions."""

_ANY = ("first base", "all directions")
_DRAWS = 1000  # of a bootstrap, and of labels that are swapped
_COVERED = 0.9  # by intervals


def response_metrics(
    alphas: Tensor, values: Tensor, *, share: float = 0.05, level: float | None = None, power: int = 1
) -> dict[str, Tensor]:
    """What is read from curves of a response; between points of the grid they are taken as straight.

    ``width``
        α at which the curve first reaches `share` of its largest value.
    ``onset``
        α at which it first reaches `level`, the last one where it never does.
    ``slope``
        Largest slope between neighbouring points.
    ``steepness``
        The same in units of the mean slope, ``top / alphas[-1]``.
    ``sensitivity``
        ``m · y / α^m`` at the first point after 0, m the `power`: the slope at 0, or the second derivative there.
    ``area``
        Mean of the curve over its largest value: ½ for a line, ⅓ for a square, 1 − s for a step at the share s.

    A curve of zeros has no width, steepness and area.

    Parameters
    ----------
    alphas : Tensor [A]
        Rising, from 0 on.
    values : Tensor [..., A]
        Responses, 0 at 0. A curve with NaN has NaN for everything.
    share : float
        Above 0 and below 1.
    level : float or None
        By default `share` of the mean over the curves of their largest values.
    power : int
        1 for a distance, 2 for a divergence, which has no slope at 0.

    Returns
    -------
    dict of str to Tensor [...] float64

    Raises
    ------
    ValueError
        For grids that do not rise from 0, values of another shape, and numbers out of range.
    """
    alphas, values = alphas.double(), values.double()
    if alphas.dim() != 1 or len(alphas) < 2 or alphas[0] != 0 or not bool((alphas.diff() > 0).all()):
        raise ValueError(f"alphas must rise from 0 on, with a number above it at least, got {alphas.tolist()}")
    if values.shape[-1:] != alphas.shape:
        raise ValueError(f"values must be [..., {len(alphas)}], a number for each alpha, got {tuple(values.shape)}")
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    defined = values.isfinite().all(-1)
    values = torch.where(defined[..., None], values, torch.nan)
    top = values.amax(-1)
    if level is None:
        level = share * float(top.nanmean())
    elif not level > 0:
        raise ValueError(f"level must be above 0, got {level}")
    rises = top > 0
    slopes = values.diff(dim=-1) / alphas.diff()
    slope = slopes.amax(-1)
    area = torch.trapezoid(values, alphas, dim=-1) / (top * alphas[-1])
    found = {
        "width": torch.where(rises, _crossing(alphas, values, share * top), torch.nan),
        "onset": _crossing(alphas, values, torch.full_like(top, level)),
        "slope": slope,
        "steepness": torch.where(rises, slope * alphas[-1] / top, torch.nan),
        "sensitivity": power * values[..., 1] / alphas[1] ** power,
        "area": torch.where(rises, area, torch.nan),
    }
    return {name: torch.where(defined, numbers, torch.nan) for name, numbers in found.items()}


def _crossing(alphas: Tensor, values: Tensor, level: Tensor) -> Tensor:
    """The first α where a curve reaches its level; the last one if it does not."""
    reached = values >= level[..., None]
    after = torch.where(reached.any(-1), reached.int().argmax(-1), len(alphas) - 1).clamp(min=1)
    high, low = (values.gather(-1, place[..., None]).squeeze(-1) for place in (after, after - 1))
    part = torch.where(high > low, (level - low) / (high - low), 1).clamp(0, 1)
    return alphas[after - 1] + part * (alphas[after] - alphas[after - 1])


@dataclass(frozen=True, eq=False)
class Difference:
    """Mean difference of two metrics over tokens, and how sure it is.

    Attributes
    ----------
    result : Result
        Null: the two labels swapped within tokens, at random.
    low, high : float
        90% bootstrap interval over tokens.
    """

    result: Result
    low: float
    high: float

    @property
    def value(self) -> float:
        """The mean difference."""
        return self.result.value


class _Measured(NamedTuple):
    bases: tuple[str, ...]
    directions: tuple[str, ...]
    metrics: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Plateaus(Results):
    """What :func:`plateaus` returns; K kinds of bases, D directions, n tokens, A sizes.

    Attributes
    ----------
    results : dict of str to Result
        ``"real_difference − isotropic"`` and so on for each direction and each baseline, difference in *onset* at the
        first kind of base; ``"real − random"`` and so on for the first kind of base and each other one, difference in
        *width*, mean over the directions.
    differences : dict of str to Difference
        The same with their intervals.
    measure : str
    bases, directions : tuple of str
    alphas : Tensor [A] float64
        From 0 on, in units of `length`.
    length : float
        Root mean square distance of the activations from their mean.
    level : float
        Response at which a direction counts as noticed, the same for all.
    values : Tensor [K, D, n, A] float64
        Responses; NaN where a token has no such direction.
    metrics : dict of str to Tensor [K, D, n] float64
        As in :func:`response_metrics`.
    sites : Tensor [n, 3] int64
        Batch, row and position of each token.
    seed : int
    """

    results: dict[str, Result]
    bases: tuple[str, ...]
    directions: tuple[str, ...]
    metrics: dict[str, Tensor]
    differences: dict[str, Difference]
    measure: str
    alphas: Tensor
    length: float
    level: float
    values: Tensor
    sites: Tensor
    seed: int

    def metric(self, name: str, base: str | None = None, direction: str | None = None) -> Tensor:
        """A metric at each token ``[n]``, of the first kind of base by default, mean over directions by default."""
        numbers = _metric(self, name, (base, direction))
        return numbers.nanmean(0) if direction is None else numbers

    def difference(self, metric: str, one: Pair, other: Pair) -> Difference:
        """How a metric differs between two pairs of base and direction at the same tokens.

        None stands for the first kind of base, and for the mean over the directions that both have.
        """
        return _difference(self, metric, one, other, self.seed)

    @property
    def curves(self) -> Any:
        """All curves as a tidy pandas.DataFrame: base, direction, token, alpha, value."""
        pd = _pandas()
        index = pd.MultiIndex.from_product(
            [self.bases, self.directions, range(len(self.sites)), self.alphas.tolist()],
            names=["base", "direction", "token", "alpha"],
        )
        return pd.DataFrame({"value": self.values.flatten().numpy()}, index=index).reset_index()

    def summary(self) -> Any:
        """Mean and 90% bootstrap interval over tokens of every metric, as a pandas.DataFrame."""
        rows = []
        for name in self.metrics:
            for base in self.bases:
                for direction in self.directions:
                    numbers = self.metric(name, base, direction)
                    numbers = numbers[numbers.isfinite()]
                    low, high = interval(bootstrap_means(numbers[:, None], self.seed)).flatten().tolist()
                    mean = float(numbers.mean())
                    rows.append((base, direction, name, mean, low, high, len(numbers)))
        return _pandas().DataFrame(rows, columns=["base", "direction", "metric", "mean", "low", "high", "tokens"])

    def plot(self) -> Any:
        """Mean curves with 90% bootstrap bands over tokens, a panel a kind of base; returns the matplotlib figure."""
        figure, panels = new_panels(len(self.bases))
        for axes, base, curves in zip(panels, self.bases, self.values, strict=True):
            for number, (direction, found) in enumerate(zip(self.directions, curves, strict=True)):
                kept = found[found.isfinite().all(1)]
                if not len(kept):
                    continue
                low, high = interval(bootstrap_means(kept, self.seed))
                axes.plot(self.alphas, kept.mean(0), color=f"C{number}", label=direction)
                axes.fill_between(self.alphas, low, high, color=f"C{number}", alpha=0.15, lw=0)
            axes.set(title=f"{base} bases", xlabel="α, in lengths of the activations", ylim=(0, None))
        panels[0].set_ylabel("KL, nats" if self.measure == "kl" else "distance in the last layer")
        panels[0].legend(frameon=False, fontsize=7)
        return figure


@torch.no_grad()
def plateaus(
    model: nn.Module,
    hook: str,
    batches: Iterable[Batch],
    sae: sk.SAE | None = None,
    directions: Sequence[str] | None = None,
    bases: Sequence[str] = ("real", "random"),
    alphas: Sequence[float] | Tensor | None = None,
    n: int = 64,
    seed: int = 0,
    *,
    measure: str = "kl",
    last: str | None = None,
    later: bool = False,
    skip: int = 1,
    share: float = 0.05,
    batch_tokens: int = 8192,
) -> Plateaus:
    """How a model's output responds to an activation that moves: is there a plateau, which directions leave it first?

    At each of n tokens and for each kind of base x the module's output becomes ``x + α · length · v̂``, and the response
    is measured against that to x itself. All kinds share the tokens, so that they are compared pairwise.

    Parameters
    ----------
    model : Module
        Any torch module; called as ``model(batch)`` or ``model(**batch)``. In evaluation mode meanwhile.
    hook : str
        Module whose output ``[contexts, positions, d]`` is moved.
    batches : iterable of Tensor, or of mapping of str to Tensor
        As :func:`sparsekern.data.token_batches` gives them. All their activations are held.
    sae : SAE or None
        Of these activations, for the kinds that need latents.
    directions : sequence of str or None
        Of :data:`DIRECTIONS`; by default all that can be had.
    bases : sequence of str
        Of :data:`BASES`; the first is the one at which directions are compared.
    alphas : sequence of float or None
        Sizes above 0, rising, in units of `length`; by default 16 squares up to 2, as much happens early.
    n : int
        Tokens, of as many contexts as there are.
    seed : int
        Determines tokens, bases, directions, intervals and nulls.
    measure, last, later, skip, batch_tokens
        As for :class:`Rerun`.
    share : float
        Of the largest response, for *width* and *onset*. The level of *onset* is this share of the mean largest
        response at the first kind of base.

    Returns
    -------
    Plateaus

    Raises
    ------
    ValueError
        For unknown kinds, kinds without the SAE that they need, sizes that do not rise, modules that do not fit, and
        what else :class:`Rerun` and :class:`Perturbations` refuse.

    References
    ----------
    Heimersheim, *Activation plateaus and sensitive directions in GPT-2* (2024); Lee & Heimersheim (arXiv 2410.12555);
    Giglemiani et al. (arXiv 2409.15019); Janiak et al. (arXiv 2409.17113).
    """
    if directions is None:
        directions = [name for name in DIRECTIONS if sae is not None or name not in OF_SAE]
    _check_kinds("directions", directions, DIRECTIONS, sae)
    _check_kinds("bases", bases, BASES, sae)
    grid = 2 * torch.linspace(1 / 16, 1, 16).square() if alphas is None else torch.as_tensor(alphas)
    grid = torch.cat([torch.zeros(1).double(), grid.double().flatten()])
    if len(grid) < 2 or not bool((grid.diff() > 0).all()) or not bool(grid.isfinite().all()):
        raise ValueError(f"alphas must rise, from above 0 on, got {grid[1:].tolist()}")
    generator = torch.Generator().manual_seed(seed)
    with evaluating(*[part for part in (model, sae) if part is not None]):
        rerun = Rerun(
            model, hook, batches, measure=measure, last=last, later=later, skip=skip, batch_tokens=batch_tokens
        )
        tokens = rerun.tokens()
        chosen = tokens.choose(n, generator)
        made = Perturbations(tokens.x, sae)
        values = torch.full((len(bases), n, len(directions), len(grid)), torch.nan, dtype=torch.float64)
        for row, kind in enumerate(bases):
            base = made.base(kind, chosen, generator)
            moves = torch.stack([made.direction(name, base, chosen, generator) for name in directions])
            for token, site in enumerate(tokens.sites[chosen].tolist()):
                has = moves[:, token].isfinite().all(1)
                steps = made.length * grid[1:, None].float() * moves[has, token][:, None]
                found = rerun.responses(site, base[token], (base[token] + steps).flatten(0, 1))
                values[row, token, has, 1:] = found.view(len(steps), -1)
                values[row, token, has, 0] = 0
    values = values.transpose(1, 2)
    level = share * float(values[0].amax(-1).nanmean())
    if not level > 0:
        raise ValueError(f"hook {hook!r} must matter: the {measure} is {level / share} wherever its output is moved")
    metrics = response_metrics(grid, values, share=share, level=level, power=2 if measure == "kl" else 1)
    measured = _Measured(tuple(bases), tuple(directions), metrics)
    differences = {
        f"{name} − {baseline}": _difference(measured, "onset", (bases[0], name), (bases[0], baseline), seed)
        for name in directions
        for baseline in BASELINES
        if baseline in directions and name not in BASELINES
    }
    for kind in bases[1:]:
        differences[f"{bases[0]} − {kind}"] = _difference(measured, "width", (bases[0], None), (kind, None), seed)
    results = {name: difference.result for name, difference in differences.items()}
    return Plateaus(
        results, *measured, differences, measure, grid, made.length, level, values, tokens.sites[chosen], seed
    )


def _metric(of: _Measured | Plateaus, name: str, pair: Pair) -> Tensor:
    """A metric at the first kind of base where none is named, of one direction ``[n]`` or of all ``[D, n]``."""
    if name not in of.metrics:
        raise ValueError(f"metric must be one of {', '.join(of.metrics)}, got {name!r}")
    base, direction = pair
    of_base = of.metrics[name][0 if base is None else _place("base", base, of.bases)]
    return of_base if direction is None else of_base[_place("direction", direction, of.directions)]


def _difference(of: _Measured | Plateaus, metric: str, one: Pair, other: Pair, seed: int) -> Difference:
    names = [" ".join(part or kind for part, kind in zip(pair, _ANY, strict=True)) for pair in (one, other)]
    apart = _metric(of, metric, one) - _metric(of, metric, other)
    if apart.dim() == 2:  # over the directions that both have
        apart = apart.nanmean(0)
    return paired(f"{metric}: {names[0]} − {names[1]}", apart, seed)


def paired(name: str, apart: Tensor, seed: int) -> Difference:
    """Mean of differences at the same tokens ``[n]``, NaN where there is none, with its interval and its null."""
    apart = apart[apart.isfinite()]
    generator = null_generator(seed)
    signs = torch.randint(2, (_DRAWS, len(apart)), generator=generator) * 2 - 1
    null = {"labels swapped within tokens": (signs * apart).mean(1) if len(apart) else apart}
    value = float(apart.mean()) if len(apart) else float("nan")
    low, high = interval(bootstrap_means(apart[:, None], seed)).flatten().tolist()
    return Difference(Result(name, value, null, tail="two-sided"), low, high)


def bootstrap_means(numbers: Tensor, seed: int) -> Tensor:
    """Means over rows ``[n, m]`` that are drawn with replacement, ``[1000, m]`` float64; NaN without rows."""
    if not len(numbers):
        return torch.full((_DRAWS, numbers.shape[1]), torch.nan, dtype=torch.float64)
    draws = torch.randint(len(numbers), (_DRAWS, len(numbers)), generator=null_generator(seed))
    weights = torch.zeros(_DRAWS, len(numbers), dtype=torch.float64)
    weights.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    return weights @ numbers.double() / len(numbers)


def interval(draws: Tensor) -> Tensor:
    """What 90% of the draws ``[1000, m]`` lie between, ``[2, m]``."""
    tail = (1 - _COVERED) / 2
    return torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype), dim=0)


def _check_kinds(argument: str, given: Sequence[str], known: dict[str, str], sae: sk.SAE | None) -> None:
    if isinstance(given, str) or not len(given) or len(set(given)) < len(given) or not set(given) <= set(known):
        raise ValueError(f"{argument} must be different names among {', '.join(known)}, got {given!r}")
    lacking = [name for name in given if name in OF_SAE]
    if lacking and sae is None:
        raise ValueError(f"{argument} {', '.join(lacking)} need an sae")


def _place(argument: str, name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, got {name!r}")
    return names.index(name)


def _pandas() -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("tables need pandas: pip install 'sparsekern[analysis]'") from error
    return pd

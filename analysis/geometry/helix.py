"""Numbers, weekdays and months: whether their points lie on a helix or a circle, and on which.

:func:`helix_fit` predicts points of numbers that it has not seen from periods, :func:`fourier_power` asks which
frequencies points in their order have, and :func:`word_points` takes the points from a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.geometry.circles import closure
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples
from sparsekern.hooks import evaluating, recorded

PERIODS = (2.0, 5.0, 10.0, 100.0)
_TINY = 1e-9
_NEAR = 5  # turns

# Fits


@dataclass(frozen=True, eq=False)
class HelixFit(Results):
    """What :func:`helix_fit` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``helix``, R² on numbers that were left out of the fit; ``gain``, that less the R² of a polynomial of as many
        columns.
    fitted : float
        R² of the helix on the numbers that it was fitted to, which rises with every column.
    columns : int
        Columns of the helix that are not zero everywhere, the constant included.
    """

    results: dict[str, Result]
    fitted: float
    columns: int


def helix_columns(numbers: Tensor, periods: Sequence[float] = PERIODS, linear: bool = True) -> Tensor:
    """The columns 1, a, and cos 2πa/T and sin 2πa/T for each period T.

    Columns that vanish are left out: on whole numbers sin πa of the period 2 is 0 everywhere.

    Parameters
    ----------
    numbers : Tensor [n]
        Finite.
    periods : sequence of float
        Above 0.
    linear : bool
        Whether to have the column a, scaled to a standard deviation of 1.

    Returns
    -------
    Tensor [n, m] float64

    Raises
    ------
    ValueError
        For numbers that are no finite vector, and periods that are not above 0.
    """
    a = _checked_numbers(numbers)
    if not all(math.isfinite(period) and period > 0 for period in periods):
        raise ValueError(f"periods must be above 0, got {list(periods)}")
    columns = [torch.ones_like(a)]
    if linear:
        columns.append(_standard(a))
    for period in periods:
        angle = 2 * math.pi * a / period
        columns += [angle.cos(), angle.sin()]
    rows = torch.stack(columns, 1)
    return rows[:, rows.abs().amax(0) > _TINY * max(1.0, float(a.abs().max()))]


def helix_fit(
    points: Tensor,
    numbers: Tensor,
    periods: Sequence[float] = PERIODS,
    *,
    linear: bool = True,
    n_components: int = 100,
    n_folds: int = 10,
    n_null: int = 50,
    seed: int = 0,
) -> HelixFit:
    """How well points are predicted by helix(a) = C · [1, a, cos 2πa/T, sin 2πa/T, …], on numbers that were left out.

    Ordinary least squares into the leading principal components of the numbers that are fitted. R² is that of the whole
    points, about the mean of the fitted ones. All points of a number are left out together.

    Parameters
    ----------
    points : Tensor [n, d]
        Vectors of the numbers.
    numbers : Tensor [n]
        May repeat, as with several contexts.
    periods : sequence of float
        Of the helix, above 0.
    linear : bool
        Whether it has the line; without it these are circles, which come back.
    n_components : int
        Principal components, of those that there are.
    n_folds : int
        Parts of the different numbers, of which each is left out once; at most as many as there are.
    n_null : int
        Samples of each null: numbers permuted over points; as many other periods, drawn log-uniformly from 2 to the
        range of the numbers.
    seed : int
        Determines folds and nulls.

    Returns
    -------
    HelixFit
        With controls of the same folds: a line, a polynomial of degree 9 and one of as many columns as the helix, the
        same periods without the line ("circles", where there is one), and the points themselves projected on as many
        principal components less one, which is the most that so many directions hold.

    Raises
    ------
    ValueError
        For shapes that do not fit, numbers of fewer than four kinds, points that are not finite or do not vary, and
        numbers out of range.

    References
    ----------
    Kantamneni & Tegmark, *Language models use trigonometry to do addition* (arXiv 2502.00873), section 4, whose R²
    is of the fitted points.
    """
    a = _checked_numbers(numbers)
    y = _checked_points(points, len(a))
    for name, number, least in (("n_components", n_components, 1), ("n_folds", n_folds, 2), ("n_null", n_null, 0)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    kinds, of_point = a.unique(return_inverse=True)
    if len(kinds) < 4:
        raise ValueError(f"numbers must be of at least four kinds, got {len(kinds)}")
    generator = null_generator(seed)
    folds = torch.randperm(len(kinds), generator=generator).chunk(min(n_folds, len(kinds)))
    parts = [_Fold(y, torch.isin(of_point, fold), n_components) for fold in folds]
    helix = helix_columns(a, periods, linear)
    width = helix.shape[1]

    def r2(columns: Tensor) -> float:
        errors, totals = zip(*(fold.error(columns) for fold in parts), strict=True)
        return 1 - sum(errors) / sum(totals)

    def held(r: int) -> float:
        errors, totals = zip(*(fold.left(r) for fold in parts), strict=True)
        return 1 - sum(errors) / sum(totals)

    value = r2(helix)
    same_width = r2(_polynomial(a, width - 1))
    others = [_other_periods(a, len(periods), generator) for _ in range(n_null)]
    # Numbers are permuted by kind: the points of a number stay together.
    orders = [torch.randperm(len(kinds), generator=generator) for _ in range(n_null)]
    permuted = [kinds[order][of_point] for order in orders]
    wrong = samples(r2(helix_columns(a, drawn, linear)) for drawn in others)
    shuffled = [r2(helix_columns(numbers_, periods, linear)) for numbers_ in permuted]
    shuffled_gain = samples(
        one - r2(_polynomial(numbers_, width - 1)) for one, numbers_ in zip(shuffled, permuted, strict=True)
    )
    controls = {
        "line": r2(_polynomial(a, 1)),
        "polynomial of degree 9": r2(_polynomial(a, 9)),
        f"polynomial of degree {width - 1}": same_width,
        **({"circles, without the line": r2(helix_columns(a, periods, linear=False))} if linear else {}),
        f"projection on {width - 1} principal components": held(width - 1),
    }
    kind = "helix" if linear else "circles"
    nulls = {"numbers permuted": samples(shuffled), "other periods": wrong}
    gains = {"numbers permuted": shuffled_gain, "other periods": wrong - same_width}
    results = {
        "helix": Result(
            f"R² of the {kind}, numbers left out", value, nulls, {name: samples([r]) for name, r in controls.items()}
        ),
        "gain": Result(f"R² of the {kind} less that of a polynomial of as many columns", value - same_width, gains),
    }
    fit = torch.linalg.lstsq(helix, y - y.mean(0), driver="gelsd").solution
    left = (y - y.mean(0) - helix @ fit).square().sum()
    return HelixFit(results, float(1 - left / (y - y.mean(0)).square().sum()), width)


# Frequencies


@dataclass(frozen=True, eq=False)
class FourierPower(Results):
    """What :func:`fourier_power` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``lowest``, share of the power at the lowest frequency, which a circle has and an open curve as well;
        ``closure``, of :func:`closure`, which tells them apart; ``periods``, if there are any, share at their
        frequencies.
    power : Tensor [⌊n / 2⌋] float64
        Share of the power at 1, 2, … turns over all points.
    """

    results: dict[str, Result]
    power: Tensor

    def plot(self, axes: Any = None) -> Any:
        """The share of the power at each frequency; dashed: what each would have if all had the same."""
        axes = new_axes() if axes is None else axes
        turns = range(1, len(self.power) + 1)
        axes.vlines(turns, 0, self.power.tolist(), color="C0")
        axes.axhline(1 / len(self.power), color="0.45", ls="--", lw=1)
        axes.set(xlabel="turns over all points", ylabel="share of the power")
        return axes


def fourier_power(
    points: Tensor, periods: Sequence[float] = (), *, detrend: bool = False, n_null: int = 200, seed: int = 0
) -> FourierPower:
    """The frequencies that points in their order have, beside the same points in random order.

    Parameters
    ----------
    points : Tensor [n, d]
        In their order, evenly spaced, at least four: those of Monday to Sunday, or of 0 to 99.
    periods : sequence of float
        Each must divide n; the power at n / T turns is added up.
    detrend : bool
        Take out the best line first. An open curve has power at all low frequencies, since its ends do not meet.
    n_null : int
        Samples of each null: the order permuted; for the periods also, for each of them, a frequency within five turns
        of its own that belongs to none, which knows that power falls off.
    seed : int
        Determines the nulls.

    Returns
    -------
    FourierPower

    Raises
    ------
    ValueError
        For fewer than four points, such that are not finite or do not vary, and periods that do not divide their
        number.
    """
    y = _checked_points(points, None)
    n = len(y)
    if n < 4:
        raise ValueError(f"points must be at least four, got {n}")
    turns = [n / period if period > 0 else 0.0 for period in periods]
    if not all(1 <= turn <= n / 2 and abs(turn - round(turn)) < 1e-9 for turn in turns):
        raise ValueError(f"periods must divide the {n} points and be 2 at least, got {list(periods)}")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    generator = null_generator(seed)
    power = _power(y, detrend)
    drawn = [_power(y[torch.randperm(n, generator=generator)], detrend) for _ in range(n_null)]
    permuted = "order permuted"
    results = {
        "lowest": Result(
            "share of the power at the lowest frequency", float(power[0]), {permuted: samples(p[0] for p in drawn)}
        ),
        "closure": closure(y, n_null=n_null, seed=seed),
    }
    if periods:
        named = torch.tensor(sorted({round(turn) - 1 for turn in turns}))
        nulls = {permuted: samples(p[named].sum() for p in drawn)}
        near = [_nearby(int(place), named, len(power)) for place in named]
        if all(len(places) for places in near):
            picks = (
                [int(places[torch.randint(len(places), (1,), generator=generator)]) for places in near]
                for _ in range(n_null)
            )
            nulls["frequencies nearby"] = samples(power[pick].sum() for pick in picks)
        results["periods"] = Result("share of the power at the periods", float(power[named].sum()), nulls)
    return FourierPower(results, power)


# Points of words


@torch.no_grad()
def word_points(
    tokenizer: Any,
    model: nn.Module,
    words: Sequence[str],
    module: str | None = None,
    templates: Sequence[str] = ("{}",),
    *,
    last: bool = False,
) -> Tensor:
    """A model's vectors of words in contexts.

    Parameters
    ----------
    tokenizer
        A fast one of transformers, which knows where tokens begin and end.
    model : Module
        Called as ``model(**tokens)``.
    words : sequence of str
        None of them empty.
    module : str or None
        Whose output; by default the input embeddings, which are the same in every context.
    templates : sequence of str
        Contexts with ``{}`` in the place of the word, once each.
    last : bool
        Take the last of the tokens that a word is made of, the only one that has seen them all in a causal model;
        otherwise their mean.

    Returns
    -------
    Tensor [n_words, n_templates, d]

    Raises
    ------
    ValueError
        For no words, templates without a place, tokenizers without offsets, an unknown module, one that gives no
        ``[batch, positions, d]``, and words that no token overlaps.
    """
    if not words or not all(words):
        raise ValueError("words must be at least one, none of them empty")
    if not templates or not all(template.count("{}") == 1 for template in templates):
        raise ValueError(f"templates must have {{}} in them once, got {list(templates)}")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer must be a fast one, which knows where tokens begin and end")
    name = _embedding_name(model) if module is None else module
    device = next(model.parameters()).device
    found = []
    with evaluating(model), recorded(model, name) as seen:
        for word in words:
            for template in templates:
                start = template.index("{}")
                encoded = tokenizer(template.replace("{}", word), return_offsets_mapping=True, return_tensors="pt")
                offsets = encoded.pop("offset_mapping")[0]
                here = (offsets[:, 0] < start + len(word)) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
                if not here.any():
                    raise ValueError(f"words must be seen by the tokenizer: no token of {template!r} overlaps {word!r}")
                seen.clear()
                model(**encoded.to(device))
                output = seen[-1][1] if seen else torch.empty(0)
                if output.dim() != 3 or output.shape[1] != len(here):
                    raise ValueError(f"module {name!r} must give [batch, positions, d], got {tuple(output.shape)}")
                vectors = output[0][here.to(device)].float().cpu()
                found.append(vectors[-1] if last else vectors.mean(0))
    return torch.stack(found).view(len(words), len(templates), -1)


# Parts


class _Fold:
    """Points to fit and points left out."""

    def __init__(self, y: Tensor, test: Tensor, n_components: int) -> None:
        self.test = test
        self.mean = y[~test].mean(0)
        _, values, vectors = torch.linalg.svd(y[~test] - self.mean, full_matrices=False)
        kept = min(n_components, int((values > _TINY * values[0]).sum()) if values[0] > 0 else 0)
        self.axes = vectors[:kept]
        self.fitted = (y[~test] - self.mean) @ self.axes.T
        out = y[test] - self.mean
        self.total = float(out.square().sum())
        self.inside = out @ self.axes.T
        self.outside = self.total - float(self.inside.square().sum())

    def error(self, columns: Tensor) -> tuple[float, float]:
        """Squared error on the points left out of a regression on columns ``[n, m]``, and that of the mean."""
        # The solution of least norm: with more columns than numbers, or periods that say the same.
        solution = torch.linalg.lstsq(columns[~self.test], self.fitted, driver="gelsd").solution
        error = self.inside - columns[self.test] @ solution
        return float(error.square().sum()) + self.outside, self.total

    def left(self, r: int) -> tuple[float, float]:
        """The same where the points left out are projected on r components."""
        return self.total - float(self.inside[:, :r].square().sum()), self.total


def _polynomial(a: Tensor, degree: int) -> Tensor:
    """Chebyshev polynomials of a, which are powers in better condition, up to a degree."""
    low, high = a.min(), a.max()
    x = 2 * (a - low) / (high - low) - 1
    columns = [torch.ones_like(x), x]
    while len(columns) <= degree:
        columns.append(2 * x * columns[-1] - columns[-2])
    return torch.stack(columns[: degree + 1], 1)


def _other_periods(a: Tensor, count: int, generator: torch.Generator) -> list[float]:
    span = max(float(a.max() - a.min()), 2.0 + _TINY)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    return (2 * (span / 2) ** drawn).tolist()


def _power(y: Tensor, detrend: bool) -> Tensor:
    """Shares of the power at 1, 2, … turns; NaN where nothing varies."""
    if detrend:
        line = _polynomial(torch.arange(len(y), dtype=y.dtype), 1)
        y = y - line @ torch.linalg.lstsq(line, y).solution
    power = torch.fft.rfft(y, dim=0).abs().square().sum(1)[1:]
    if len(y) % 2 == 0:
        power[-1] /= 2  # all others stand for a frequency and its negative
    return power / power.sum()


def _nearby(place: int, named: Tensor, count: int) -> Tensor:
    """Places within :data:`_NEAR` of one that are not named."""
    places = torch.arange(max(0, place - _NEAR), min(count, place + _NEAR + 1))
    return places[~torch.isin(places, named)]


def _standard(a: Tensor) -> Tensor:
    centred = a - a.mean()
    size = centred.square().mean().sqrt()
    return centred / size if size > 0 else centred


def _embedding_name(model: nn.Module) -> str:
    find: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    table = None if find is None else find()
    for name, part in model.named_modules():
        if part is table and table is not None:
            return name
    raise ValueError(f"module must be named: {type(model).__name__} does not say which one its input embeddings are")


# Checks


def _checked_numbers(numbers: Tensor) -> Tensor:
    if numbers.dim() != 1 or not len(numbers) or not numbers.isfinite().all():
        raise ValueError(f"numbers must be a finite vector, got shape {tuple(numbers.shape)}")
    return numbers.detach().cpu().double()


def _checked_points(points: Tensor, n: int | None) -> Tensor:
    if points.dim() != 2 or not points.numel() or (n is not None and len(points) != n):
        raise ValueError(f"points must be [{'n' if n is None else n}, d], got shape {tuple(points.shape)}")
    if not points.isfinite().all():
        raise ValueError("points must be finite: remove those with NaN or infinity")
    y = points.detach().cpu().double()
    if not (y - y[0]).any():
        raise ValueError("points must vary: they are all the same")
    return y

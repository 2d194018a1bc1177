"""Data that has a direction used both ways, and data that has no direction at all: which of them make pairs?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.opposing.pairs import antipodal_pairs
from sparsekern.analysis.opposing.report import AntipodalReport, antipodal_report, check_n_null
from sparsekern.analysis.results import Result, Results, frame, new_axes, samples
from sparsekern.modules import Activation

_MEASURED = 8192  # fresh tokens of an experiment


class DenseDirection:
    """Sparse features and one direction that every token has some of, of either sign.

    ``x = Σ_f a_f F_f + z u`` with ``z`` standard normal. A latent that is never negative writes half of u, so it takes
    two that oppose each other.

    Parameters
    ----------
    d : int
        Width of the activations.
    sparse : int
        Sparse features: random directions, with strengths uniform in 0.5 … 1.5 where they are active.
    active : float
        How many of them a token has, on average; each is active independently of the others.
    generator : torch.Generator or None
        For the directions.

    Attributes
    ----------
    features : Tensor [sparse + 1, d]
        True directions, of unit norm; the last is u.
    """

    def __init__(
        self, d: int = 32, sparse: int = 48, active: float = 3, generator: torch.Generator | None = None
    ) -> None:
        if d < 1 or sparse < 1:
            raise ValueError(f"d and sparse must be at least 1, got {d} and {sparse}")
        if not 0 <= active <= sparse:
            raise ValueError(f"active must be in 0 … sparse={sparse}, got {active}")
        self.d, self.active = d, active
        self.features = normalize(torch.randn(sparse + 1, d, generator=generator), dim=1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: ``(activations [n, sparse + 1], x [n, d])``; the last activation has both signs."""
        sparse = len(self.features) - 1
        on = torch.rand(n, sparse, generator=generator) < self.active / sparse
        strength = 0.5 + torch.rand(n, sparse, generator=generator)
        activations = torch.cat([on * strength, torch.randn(n, 1, generator=generator)], 1)
        return activations, activations @ self.features


@dataclass(frozen=True, eq=False)
class DenseDirectionRun(Results):
    """What :func:`dense_direction` returns, measured on 8,192 fresh tokens.

    Attributes
    ----------
    results : dict of str to Result
        Those of the report, ``dense_score``, ``sparse_score`` and ``along``.
    sae : SAE
        In evaluation mode.
    toy : DenseDirection
        What made the data.
    report : AntipodalReport
        Of the active latents.
    cosines : Tensor [d_sae]
        Of the decoder's rows with u.
    fvu, l0 : float
    """

    results: dict[str, Result]
    sae: sk.SAE
    toy: DenseDirection
    report: AntipodalReport
    cosines: Tensor
    fvu: float
    l0: float

    @property
    def dense(self) -> Tensor:
        """The dense latents, densest first."""
        assert self.report.dense is not None
        return self.report.dense.latents


def dense_direction(
    seed: int = 0,
    *,
    activation: Activation | None = None,
    d_sae: int = 64,
    steps: int = 400,
    lr: float = 1e-2,
    batch_size: int = 512,
    n_null: int = 100,
) -> DenseDirectionRun:
    """Train an SAE on :class:`DenseDirection`: does it take an antipodal pair for the dense direction, and only there?

    Beside :func:`antipodal_report`, over the active latents:

    ``dense_score``, ``sparse_score``
        The largest score among the dense latents and among the others.
    ``along``
        The largest cosine, by size, of a dense latent's decoder row with u.

    Null of all three: random dictionaries of as many rows, the first of which stand for the dense ones.

    Parameters
    ----------
    seed : int
        Determines directions, weights, tokens and nulls.
    activation : Activation or None
        By default ``TopK(5)``. With ``AbsTopK(5)``, whose latents have both signs, one latent does.
    d_sae : int
        Latents.
    steps, lr, batch_size
        Of the training.
    n_null : int
        Samples of each null.

    References
    ----------
    Sun et al., *Dense SAE latents are features, not bugs* (arXiv 2506.15679); Zhu et al., *AbsTopK* (arXiv 2510.00404).
    """
    generator = torch.Generator().manual_seed(seed)
    toy = DenseDirection(generator=generator)
    sae = sk.SAE(toy.d, d_sae, activation or sk.TopK(5), generator=generator)
    _train(sae, lambda n: toy.sample(n, generator)[1], steps, lr, batch_size)
    x = toy.sample(_MEASURED, generator)[1]
    with torch.no_grad():
        codes = sae.encode(x)
    report = antipodal_report(sae, activity=codes, n_null=n_null, seed=seed)
    assert report.dense is not None
    cosines = normalize(sae.W_dec.detach(), dim=1) @ toy.features[-1]
    dense = torch.zeros(d_sae, dtype=torch.bool)
    dense[report.dense.latents] = True
    measured = report.pairs.measured

    def three(score: Tensor, along: Tensor, is_dense: Tensor) -> tuple[float, float, float]:
        return _largest(score[is_dense]), _largest(score[~is_dense]), _largest(along[is_dense].abs())

    random = []
    first = torch.arange(int(measured.sum())) < len(report.dense.latents)
    for _ in range(n_null):
        rows = torch.randn(len(first), toy.d, generator=generator)
        random.append(three(antipodal_pairs(rows).score, normalize(rows, dim=1) @ toy.features[-1], first))
    found = three(report.pairs.score[measured], cosines[measured], dense[measured])
    names = {
        "dense_score": "largest score of a dense latent",
        "sparse_score": "largest score of another latent",
        "along": "cosine of a dense latent's decoder row with the dense direction, without its sign",
    }
    results = dict(report.results)
    for index, (key, name) in enumerate(names.items()):
        null = {"random dictionary": samples(numbers[index] for numbers in random)}
        results[key] = Result(name, found[index], null)
    measures = sk.evaluate(sae, [x])
    return DenseDirectionRun(results, sae, toy, report, cosines, measures.fvu, measures.l0)


@dataclass(frozen=True, eq=False)
class CloudPoint:
    """One training of :func:`gaussian_cloud`.

    Attributes
    ----------
    name : str
        Activation and its coefficient or k.
    result : Result
        Share of the active latents whose least decoder cosine is below the bound, beside random dictionaries of as many
        rows.
    min_cosines : Tensor [alive]
        Least decoder cosine of each active latent with another one.
    fvu, l0 : float
    """

    name: str
    result: Result
    min_cosines: Tensor
    fvu: float
    l0: float

    @property
    def alive(self) -> int:
        """Active latents."""
        return len(self.min_cosines)


@dataclass(frozen=True, eq=False)
class GaussianCloud:
    """What :func:`gaussian_cloud` returns: a point for each coefficient, in their order, and one for each k."""

    points: list[CloudPoint]

    @property
    def results(self) -> dict[str, Result]:
        """The result of each point, by its name."""
        return {point.name: point.result for point in self.points}

    def to_frame(self) -> Any:
        """All points as one pandas.DataFrame, a row a null."""
        table = frame(self.results.values())
        for key in ("name", "alive", "fvu", "l0"):
            table[key] = [getattr(point, key) for point in self.points for _ in point.result.nulls]
        return table

    def plot(self, axes: Any = None) -> Any:
        """Shares of all points over their L0, with the range of random dictionaries; returns the axes."""
        axes = new_axes() if axes is None else axes
        for point in self.points:
            null = point.result.nulls["random dictionary"]
            axes.plot([point.l0] * 2, [float(null.min()), float(null.max())], color="0.6", lw=4, solid_capstyle="butt")
            axes.plot(point.l0, point.result.value, "o", color="C0")
            axes.annotate(point.name, (point.l0, point.result.value), xytext=(4, 4), textcoords="offset points")
        axes.set(xlabel="L0", ylabel="share of latents with an opposite", ylim=(-0.03, 1.1))
        return axes


def gaussian_cloud(
    seed: int = 0,
    *,
    d: int = 8,
    d_sae: int | None = None,
    p: float = 1.0,
    coefficients: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
    ks: Sequence[int] = (),
    below: float = -0.9,
    steps: int = 800,
    lr: float = 1e-2,
    batch_size: int = 512,
    n_null: int = 100,
) -> GaussianCloud:
    """Train SAEs on a cloud without any direction, x ~ N(0, I): does sparsity alone make opposites?

    A linear code of the cloud needs two opposite latents of each of d orthogonal lines. Whether an overcomplete
    dictionary falls back to that depends on what is charged for codes, so one coefficient tells nothing.

    Parameters
    ----------
    seed : int
        Determines weights, tokens and nulls, the same for all points.
    d : int
        Dimensions of the cloud.
    d_sae : int or None
        Latents; by default ``4 * d``.
    p : float
        Power of the penalty of :class:`sparsekern.ReLU`, which is of codes in units of the cloud's length √d and stands
        beside an FVU. A coefficient λ of ``Σ z^p`` beside a squared error is ``λ · d^(p/2 − 1)`` here.
    coefficients : sequence of float
        Of the penalty: a training for each.
    ks : sequence of int
        A training with ``TopK(k)`` for each.
    below : float
        Cosine below which two latents count as opposite.
    steps, lr, batch_size
        Of each training.
    n_null : int
        Random dictionaries for each point.

    Raises
    ------
    ValueError
        Without a coefficient or k, and for sizes or a bound out of range.
    """
    if d < 2:
        raise ValueError(f"d must be at least 2, got {d}")
    if not -1 < below < 0:
        raise ValueError(f"below must be above −1 and below 0, got {below}")
    if not len(coefficients) and not len(ks):
        raise ValueError("coefficients or ks must have at least one number, to train with")
    check_n_null(n_null)
    width = 4 * d if d_sae is None else d_sae
    kinds: dict[str, Activation] = {
        f"L{p:g}, {coefficient:g}": sk.ReLU(coefficient, p=p, start_l0=min(d, width)) for coefficient in coefficients
    }
    kinds |= {f"TopK, {k}": sk.TopK(k) for k in ks}
    train = {"steps": steps, "lr": lr, "batch_size": batch_size}
    points = [
        _cloud_point(name, activation, seed, (d, width), below, n_null, **train) for name, activation in kinds.items()
    ]
    return GaussianCloud(points)


def _cloud_point(
    name: str, activation: Activation, seed: int, shape: tuple[int, int], below: float, n_null: int, **train: Any
) -> CloudPoint:
    generator = torch.Generator().manual_seed(seed)
    sae = sk.SAE(*shape, activation, generator=generator)
    _train(sae, lambda n: torch.randn(n, sae.d_in, generator=generator), **train)
    x = torch.randn(_MEASURED, sae.d_in, generator=generator)
    with torch.no_grad():
        alive = sae.encode(x).firing_counts() > 0
    least = _least_cosines(sae.W_dec.detach()[alive])
    random = [_least_cosines(torch.randn(len(least), sae.d_in, generator=generator)) for _ in range(n_null)]
    result = Result(
        f"share of active latents with another at a cosine below {below:g}",
        float((least < below).double().mean()),
        {"random dictionary": samples(float((cosines < below).double().mean()) for cosines in random)},
    )
    measures = sk.evaluate(sae, [x])
    return CloudPoint(name, result, least, measures.fvu, measures.l0)


def _least_cosines(rows: Tensor) -> Tensor:
    """Least cosine of each row with another one, 0 where none is negative."""
    return antipodal_pairs(rows).cos_dec.nan_to_num(0) if len(rows) else torch.empty(0)


def _largest(numbers: Tensor) -> float:
    return float(numbers.max()) if len(numbers) else float("nan")


def _train(sae: sk.SAE, draw: Callable[[int], Tensor], steps: int, lr: float, batch_size: int) -> None:
    trainer = sk.Trainer(sae, lr=lr, steps=steps)
    for _ in range(steps):
        trainer.step(draw(batch_size))
    sae.eval()

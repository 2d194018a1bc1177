"""How alike two sets of paired vectors are, whatever their coordinates: decoder rows of matched latents, activations.

The rows of `X` and `Y` are pairs: matched latents (``D1[i], D2[j]`` with ``i, j = matching.pairs()``) or activations of
two models on the same tokens. Every function computes in float64 on the CPU, and shuffles the rows of `Y` for its null:
what two sets of these shapes share by chance. :func:`procrustes_transfer` asks more: whether one SAE serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.results import Result, Results, null_generator, samples

try:
    from scipy.spatial.distance import pdist, squareform
    from scipy.stats import rankdata
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

METRICS = ("correlation", "cosine", "euclidean")
_NULL = "rows shuffled"
_EVALUATED = 8192  # tokens encoded at a time


# Spaces


def svcca(X: Tensor, Y: Tensor, *, variance: float = 0.99, n_null: int = 100, seed: int = 0) -> Result:
    """Mean canonical correlation of the leading principal components of two sets of vectors: 0 … 1.

    Unchanged by rotations, translations and isotropic scaling of either set. With few rows a component chance finds
    correlation everywhere: n rows span at most n − 1 directions, so that sets of as many components have 1.

    Parameters
    ----------
    X, Y : Tensor [n, d1], [n, d2]
        Paired rows.
    variance : float
        Share of each set's variance that its components hold.
    n_null : int
        Shuffles of the rows of `Y`.
    seed : int
        Determines the null.

    Returns
    -------
    Result
        NaN where a set has no variance.

    Raises
    ------
    ValueError
        For rows that are not paired, not finite, or fewer than two.

    References
    ----------
    Raghu et al., *SVCCA* (arXiv 1706.05806).
    """
    X, Y = _paired(X, Y, n_null, least=2)
    if not 0 < variance <= 1:
        raise ValueError(f"variance must be above 0 and at most 1, got {variance}")
    one, two = (_components(rows, variance) for rows in (X, Y))

    def correlation(order: Tensor | None = None) -> float:
        if 0 in (one.shape[1], two.shape[1]):
            return float("nan")
        product = one.T @ (two if order is None else two[order])
        return float(torch.linalg.svdvals(product).clamp(max=1).mean())

    return _with_null("mean canonical correlation (SVCCA)", correlation, len(X), n_null, seed)


def rsa(
    X: Tensor, Y: Tensor, *, metric: str = "correlation", max_rows: int = 1000, n_null: int = 100, seed: int = 0
) -> Result:
    """Rank correlation of the distances among the rows of `X` with those among the rows of `Y`: −1 … 1.

    Parameters
    ----------
    X, Y : Tensor [n, d1], [n, d2]
        Paired rows.
    metric : {"correlation", "cosine", "euclidean"}
        Distance of two rows. Only cosine and Euclidean distances are unchanged by rotations.
    max_rows : int
        Of more rows, so many are drawn: there are n² distances.
    n_null : int
        Shuffles of the rows of `Y`.
    seed : int
        Determines the null, and which rows are drawn.

    Returns
    -------
    Result
        NaN where all distances of a set are equal.

    Raises
    ------
    ValueError
        For rows that are not paired, not finite, or fewer than three, and rows without the distance that was asked for:
        zeros have no cosine, constants no correlation.

    References
    ----------
    Kriegeskorte et al., *Representational similarity analysis* (2008).
    """
    X, Y = _paired(X, Y, n_null, least=3)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if max_rows < 3:
        raise ValueError(f"max_rows must be at least 3, got {max_rows}")
    drawn = torch.randperm(len(X), generator=null_generator(seed))[:max_rows].sort().values
    first, second = (_ranks(name, rows[drawn], metric) for name, rows in (("X", X), ("Y", Y)))
    above = np.triu_indices(len(drawn), 1)
    square = squareform(second)
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))

    def correlation(order: Tensor | None = None) -> float:
        if scale == 0:
            return float("nan")
        other = second if order is None else square[order.numpy()[above[0]], order.numpy()[above[1]]]
        return float(first @ other) / scale

    return _with_null("rank correlation of distances (RSA)", correlation, len(drawn), n_null, seed)


def cka(
    X: Tensor, Y: Tensor, *, debiased: bool = True, batch_size: int | None = None, n_null: int = 100, seed: int = 0
) -> Result:
    """Linear centred kernel alignment: the squared covariances of two sets of vectors, normalised.

    1 where the sets are equal up to rotation, translation and isotropic scaling. The plain estimate rises towards 1
    with the dimensions a row, whatever the data; the debiased one is 0 on average for independent sets, and below 0 at
    times. A few outliers, or one direction of large variance, can decide it alone (Davari et al., arXiv 2210.16156).

    Parameters
    ----------
    X, Y : Tensor [n, d1], [n, d2]
        Paired rows.
    debiased : bool
        Whether the Hilbert–Schmidt independence criteria are the unbiased estimates, HSIC₁, which need four rows.
    batch_size : int or None
        Average HSIC₁ over batches of so many rows, drawn at random, and leave out the rest: for more rows than can be
        handled at a time. Needs `debiased`.
    n_null : int
        Shuffles of the rows of `Y`.
    seed : int
        Determines the null and the batches.

    Returns
    -------
    Result
        NaN where a set has no variance.

    Raises
    ------
    ValueError
        For rows that are not paired, not finite, or too few, and for batches without `debiased`.

    References
    ----------
    Kornblith et al., *Similarity of neural network representations revisited* (arXiv 1905.00414); Song et al., *Feature
    selection via dependence maximization*, JMLR 13 (2012), for HSIC₁; Nguyen et al., *Do wide and deep networks learn
    the same things?* (arXiv 2010.15327), for batches.
    """
    X, Y = _paired(X, Y, n_null, least=4 if debiased else 2)
    batches = [torch.arange(len(X))]
    if batch_size is not None:
        if not debiased:
            raise ValueError("batch_size must be None without debiased: means of biased estimates stay biased")
        if not 4 <= batch_size <= len(X):
            raise ValueError(f"batch_size must be in 4 … {len(X)}, the number of rows, got {batch_size}")
        drawn = torch.randperm(len(X), generator=null_generator(seed))
        batches = list(drawn[: len(X) // batch_size * batch_size].split(batch_size))
    measure = _hsic_1 if debiased else _hsic_0
    X, Y = _centred(X), _centred(Y)  # HSIC₁ is the same without, but for rounding

    def alike(one: Tensor, two: Tensor) -> float:
        return sum(measure(one[rows], two[rows]) for rows in batches) / len(batches)

    own = alike(X, X)
    scale = _root(own) * _root(alike(Y, Y))

    def alignment(order: Tensor | None = None) -> float:
        if order is None:
            return alike(X, Y) / scale
        other = Y[order]
        # Batches hold other rows then, so that their norm is another one.
        return alike(X, other) / (scale if batch_size is None else _root(own) * _root(alike(other, other)))

    name = "debiased linear CKA" if debiased else "linear CKA"
    return _with_null(name, alignment, len(X), n_null, seed)


# One SAE for two models


@dataclass(frozen=True, eq=False)
class Transfer(Results):
    """What :func:`procrustes_transfer` returns.

    Attributes
    ----------
    results : dict of str to Result
        Explained variance of the SAE on the other model's held-out activations: ``raw``, as they are; ``centred``,
        moved to the mean of its own; ``rotated``, moved and turned.
    rotation : Tensor [d, d]
        Orthogonal: ``(x_other − mean_other) @ rotation + mean`` is what the SAE reads.
    mean, mean_other : Tensor [d]
    """

    results: dict[str, Result]
    rotation: Tensor
    mean: Tensor
    mean_other: Tensor


@torch.no_grad()
def procrustes_transfer(
    sae: sk.SAE, x: Tensor, x_other: Tensor, *, fit_share: float = 0.5, n_null: int = 10, seed: int = 0
) -> Transfer:
    """Whether an SAE of one model reconstructs another model's activations, once they are turned into its coordinates.

    The rotation is the orthogonal matrix that brings `x_other` nearest to `x` on some of the tokens (orthogonal
    Procrustes); explained variances are of the others. Nulls: a *random rotation*, and one fitted to *tokens permuted*,
    which knows the spread of both clouds but not which point is which. Control: the SAE on its *own activations*, the
    bound. For the way back, call it with the other model's SAE and the activations exchanged.

    Parameters
    ----------
    sae : SAE
        Of the first model; it reconstructs what it reads.
    x, x_other : Tensor [n, d]
        Activations of the first and of the other model on the same tokens, of one width.
    fit_share : float
        Share of the tokens that the rotation is fitted on, drawn at random; above 0 and below 1.
    n_null : int
        Samples of each null.
    seed : int
        Determines the split and the nulls.

    Raises
    ------
    ValueError
        For activations that are not paired, not finite, not of the SAE's width, or too few for two parts of two.

    References
    ----------
    Schönemann, *A generalized solution of the orthogonal Procrustes problem* (1966); arXiv 2605.24577, for SAEs.
    """
    if sae.d_in != sae.d_out or sae.W_dec.dim() != 2:
        raise ValueError(f"sae must reconstruct what it reads, got one that reads {sae.d_in} and writes {sae.d_out}")
    if not 0 < fit_share < 1:
        raise ValueError(f"fit_share must be above 0 and below 1, got {fit_share}")
    x, x_other = _paired(x, x_other, n_null, least=4, names=("x", "x_other"))
    if x.shape[1] != sae.d_in or x_other.shape[1] != sae.d_in:
        raise ValueError(f"x and x_other must be [n, {sae.d_in}], got {tuple(x.shape)} and {tuple(x_other.shape)}")
    generator = null_generator(seed)
    order = torch.randperm(len(x), generator=generator)
    n = min(max(2, round(fit_share * len(x))), len(x) - 2)
    fit, held_out = order[:n], order[n:]
    mean, mean_other = x[fit].mean(0), x_other[fit].mean(0)
    own, other = x[fit] - mean, x_other[fit] - mean_other

    def explained(rows: Tensor) -> float:
        return sk.evaluate(sae, rows.to(sae.W_enc.dtype).split(_EVALUATED), compared=1).explained_variance

    def turned_by(rotation: Tensor) -> float:
        return explained((x_other[held_out] - mean_other) @ rotation + mean)

    rotation = _procrustes(other, own)
    random = samples(turned_by(_rotation(sae.d_in, generator)) for _ in range(n_null))
    permuted = samples(
        turned_by(_procrustes(other[torch.randperm(n, generator=generator)], own)) for _ in range(n_null)
    )
    bound = {"own activations": samples([explained(x[held_out])])}
    name = "explained variance of the other model's activations{}"
    results = {
        "raw": Result(name.format(", as they are"), explained(x_other[held_out]), {"random rotation": random}, bound),
        "centred": Result(
            name.format(", moved"), turned_by(torch.eye(sae.d_in).double()), {"random rotation": random}, bound
        ),
        "rotated": Result(
            name.format(", moved and turned"),
            turned_by(rotation),
            {"random rotation": random, "tokens permuted": permuted},
            bound,
        ),
    }
    return Transfer(results, rotation, mean, mean_other)


# Parts


def _paired(
    X: Tensor, Y: Tensor, n_null: int, least: int, names: tuple[str, str] = ("X", "Y")
) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU, once they have been looked at."""
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    for name, rows in zip(names, (X, Y), strict=True):
        if rows.dim() != 2 or rows.shape[1] == 0:
            raise ValueError(f"{name} must be [n, d], got shape {tuple(rows.shape)}")
        if not rows.isfinite().all():
            raise ValueError(f"{name} must be finite: remove the pairs with NaN or infinity")
    if len(X) != len(Y) or len(X) < least:
        named = " and ".join(names)
        raise ValueError(f"{named} must have equally many rows, at least {least}, got {len(X)} and {len(Y)}")
    return X.detach().cpu().double(), Y.detach().cpu().double()


def _with_null(name: str, measure: Any, n: int, n_null: int, seed: int) -> Result:
    """`measure()` beside `measure(order)` for random orders of the n rows of Y."""
    generator = null_generator(seed)
    shuffled = samples(measure(torch.randperm(n, generator=generator)) for _ in range(n_null))
    return Result(name, measure(), {_NULL: shuffled})


def _centred(rows: Tensor) -> Tensor:
    """Rows less their mean; zeros where that leaves rounding only."""
    centred = rows - rows.mean(0)
    rounding = len(rows) * torch.finfo(rows.dtype).eps * rows.abs().max()
    return centred if centred.abs().max() > rounding else torch.zeros_like(rows)


def _components(rows: Tensor, variance: float) -> Tensor:
    """Orthonormal scores ``[n, q]`` of the fewest principal components that hold this share of the variance."""
    left, values, _ = torch.linalg.svd(_centred(rows), full_matrices=False)
    power = values.square()
    rank = int((values > values[0] * max(rows.shape) * torch.finfo(values.dtype).eps).sum())  # the rest is rounding
    short = (power.cumsum(0) < variance * (1 - 1e-12) * power.sum()).sum()
    return left[:, : min(rank, int(short) + 1)]


def _ranks(name: str, rows: Tensor, metric: str) -> np.ndarray:
    """Ranks of the distances of all pairs, less their mean, in scipy's condensed form."""
    distances = pdist(rows.numpy(), metric)
    if not np.isfinite(distances).all():
        raise ValueError(f"{name} must have rows with a {metric} distance: constant rows have none")
    # Equal distances must be ties, not the order of their rounding errors.
    ranks = rankdata(np.round(distances / max(distances.max(), np.finfo(float).tiny), 12))
    return ranks - ranks.mean()


def _hsic_0(X: Tensor, Y: Tensor) -> float:
    """``tr(K H L H)`` of linear kernels of centred rows: ‖XᵀY‖²."""
    return _product_of_kernels(X, Y)


def _hsic_1(X: Tensor, Y: Tensor) -> float:
    """The unbiased estimate (Song et al., equation 5), of linear kernels without their n × n matrices."""
    n = len(X)
    diagonals = X.square().sum(1), Y.square().sum(1)
    one, two = (rows @ rows.sum(0) - diagonal for rows, diagonal in zip((X, Y), diagonals, strict=True))  # K̃1 and L̃1
    trace = _product_of_kernels(X, Y) - float(diagonals[0] @ diagonals[1])
    return (trace + float(one.sum() * two.sum()) / ((n - 1) * (n - 2)) - 2 / (n - 2) * float(one @ two)) / (n * (n - 3))


def _product_of_kernels(X: Tensor, Y: Tensor) -> float:
    """``tr(X Xᵀ Y Yᵀ)``, by whichever of two ways takes the smaller matrices."""
    if X.shape[1] * Y.shape[1] <= len(X) ** 2:
        return float((X.T @ Y).square().sum())
    return float(((X @ X.T) * (Y @ Y.T)).sum())


def _root(number: float) -> float:
    """Square root; NaN for what is not above 0."""
    return number**0.5 if number > 0 else float("nan")


def _procrustes(source: Tensor, target: Tensor) -> Tensor:
    """The orthogonal matrix Q with the least ‖source Q − target‖."""
    left, _, right = torch.linalg.svd(source.T @ target)
    return left @ right


def _rotation(d: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniformly distributed."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()

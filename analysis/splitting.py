"""Structure in feature splitting: which latents split into which, and whether they split along the same directions.

Where a small SAE has a latent for topology and one for algebra, a larger one may have topology in mathematics, topology
in physics, algebra in mathematics, … Here the children of a latent are found by cosine (:func:`split_map`), what makes
a child of a parent is their difference (:func:`split_offsets`), and :func:`parallelogram` asks whether it is the same
under every parent. :func:`factor_directions` and :func:`project_out` look for what the differences share, and
:func:`why_not_found` asks why the SAE has no latent for it. ``docs/analyses/splitting.md`` says what the nulls are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.nulls import permuted, second_moment_root
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, plain, samples

try:
    from scipy.linalg import eigh
    from sklearn.covariance import ledoit_wolf
    from sklearn.decomposition import NMF, PCA, FastICA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import silhouette_score
except ImportError as error:
    raise ImportError("this analysis needs scipy and scikit-learn: pip install 'sparsekern[analysis]'") from error

_TILE = 8192  # rows encoded at a time
_FEW = 8  # parents of a child that are looked for at first
_BINS = 9  # of the histogram of children: 0 … 7, and 8 or more
_SAE_BATCH = 4096
_TINY = 1e-6  # an offset shorter than this part of its child is rounding

# Parents and children


@dataclass(frozen=True, eq=False)
class SplitMap(Results):
    """What :func:`split_map` returns: a bipartite graph of the latents of a small and a large SAE.

    Attributes
    ----------
    results : dict of str to Result
        ``split``, share of the small SAE's latents with two children at least; ``placed``, share of the large one's
        with a parent; ``best_cosine``, mean over those of the large one of the largest cosine with any of the small
        one.
    cos : float
        Cosine above which there is an edge.
    parent, child : Tensor [n_edges] int64
        Ends of the edges: by rising parent, then falling cosine.
    cosine : Tensor [n_edges]
    n_children : Tensor [n_small] int64
    best : Tensor [n_large]
        Largest cosine of each latent of the large SAE with one of the small SAE; 0 where none is positive.
    histogram : Tensor [9] float64
        Latents of the small SAE with 0, 1, …, 7 and at least 8 children.
    null_histograms : dict of str to Tensor [9] float64
        Means of the same under each null.
    """

    results: dict[str, Result]
    cos: float
    parent: Tensor
    child: Tensor
    cosine: Tensor
    n_children: Tensor
    best: Tensor
    histogram: Tensor
    null_histograms: dict[str, Tensor]

    @property
    def split_share(self) -> float:
        """Share of the small SAE's latents that have two children at least."""
        return self.results["split"].value

    def children(self, parent: int) -> Tensor:
        """Children of a latent of the small SAE, nearest first."""
        return self.child[self.parent == parent]

    def parents(self, child: int) -> Tensor:
        """Parents of a latent of the large SAE, nearest first."""
        edges = (self.child == child).nonzero().squeeze(1)
        return self.parent[edges[self.cosine[edges].argsort(descending=True, stable=True)]]

    def children_lists(self) -> list[Tensor]:
        """Children of every latent of the small SAE, nearest first."""
        return list(self.child.split(self.n_children.tolist()))

    def to_dict(self) -> dict[str, Any]:
        """Results, edges and histograms as plain JSON values."""
        return plain(
            {
                "results": [record for result in self.results.values() for record in result.to_records()],
                "cos": self.cos,
                "edges": [self.parent.tolist(), self.child.tolist(), self.cosine.tolist()],
                "histogram": self.histogram.tolist(),
                "null_histograms": {name: counts.tolist() for name, counts in self.null_histograms.items()},
            }
        )

    def plot(self, axes: Any = None) -> Any:
        """How many latents have how many children, beside the nulls."""
        axes = new_axes() if axes is None else axes
        axes.bar(range(_BINS), self.histogram.tolist(), color="C0", label="measured")
        for marker, (name, counts) in zip("ox^", self.null_histograms.items(), strict=False):
            axes.plot(range(_BINS), counts.tolist(), marker, color="0.45", label=name)
        axes.set_xticks(range(_BINS), [*map(str, range(_BINS - 1)), f"≥ {_BINS - 1}"])
        axes.set(xlabel=f"children at a cosine above {self.cos:g}", ylabel="latents of the small SAE")
        axes.legend(frameon=False)
        return axes


@torch.no_grad()
def split_map(D_small: Tensor, D_large: Tensor, cos: float = 0.5, *, n_null: int = 20, seed: int = 0) -> SplitMap:
    """Which latents of a large SAE are children of which of a small one: decoder cosines above `cos`.

    Exact, by fused matrix products with selection: no matrix of cosines exists. Each sample of a null costs as much as
    the map itself, ``n_small · n_large · d`` multiplications. Give the rows of alive latents only: a dead one has a
    direction too.

    Parameters
    ----------
    D_small, D_large : Tensor [n_small, d], [n_large, d]
        Decoder rows of any norm. Rows of zeros have no edges and count nowhere.
    cos : float
        Cosine above which a latent of the large SAE is a child; above 0 and below 1.
    n_null : int
        Samples of each null: the coordinates of every row of `D_large` permuted, and random directions with the second
        moment of its rows.
    seed : int
        Determines the nulls.

    Returns
    -------
    SplitMap

    Raises
    ------
    ValueError
        For rows that are not finite, of different width or all zero, and for numbers out of range.

    References
    ----------
    Bricken et al., *Towards monosemanticity* (2023), for splitting; Leask et al., *Sparse autoencoders do not find
    canonical units of analysis* (arXiv 2502.04878), for cosines between widths.
    """
    small, large = _unit("D_small", D_small), _unit("D_large", D_large)
    if small.shape[1] != large.shape[1]:
        raise ValueError(f"D_small and D_large must have rows of one width, got {small.shape[1]} and {large.shape[1]}")
    if not 0 < cos < 1:
        raise ValueError(f"cos must be above 0 and below 1, got {cos}")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    used = small.any(1).cpu(), large.any(1).cpu()
    if not used[0].any() or not used[1].any():
        raise ValueError("D_small and D_large must each have a row that is not zero")
    parent, child, cosine, best = _edges(large.split(_TILE), small, cos)
    order = (-cosine).argsort(stable=True)
    order = order[parent[order].argsort(stable=True)]
    parent, child, cosine = parent[order], child[order], cosine[order]
    generator = null_generator(seed)
    root = second_moment_root(large)
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "coordinates permuted": lambda rows: permuted(rows, 1, generator),
        "random dictionary": lambda rows: normalize(
            torch.randn(rows.shape, generator=generator).to(root) @ root, dim=1
        ),
    }
    nulls: dict[str, list[list[float]]] = {}
    histograms = {}
    for name, make in makers.items():
        counts = torch.zeros(_BINS, dtype=torch.float64)
        nulls[name] = []
        for _ in range(n_null):
            drawn = (make(rows) * rows.any(1, keepdim=True) for rows in large.split(_TILE))
            found = _edges(drawn, small, cos)
            nulls[name].append(_shares(found[0], found[1], found[3], used))
            counts += _histogram(found[0], used[0]) / n_null
        histograms[name] = counts
    values = _shares(parent, child, best, used)
    names = {
        "split": "share of the small SAE's latents with two children at least",
        "placed": "share of the large SAE's latents with a parent",
        "best_cosine": "largest cosine of the large SAE's latents with one of the small",
    }
    results = {
        key: Result(name, values[index], {null: samples(s[index] for s in drawn) for null, drawn in nulls.items()})
        for index, (key, name) in enumerate(names.items())
    }
    n_children = torch.bincount(parent, minlength=len(small))
    histogram = _histogram(parent, used[0])
    return SplitMap(results, cos, parent, child, cosine, n_children, best, histogram, histograms)


def split_offsets(parents: Tensor, children: Tensor) -> Tensor:
    """What makes each child of its parent: ``o = child − ⟨child, p⟩ p``, p the parent at unit norm.

    Parameters
    ----------
    parents : Tensor [..., d]
        Decoder rows of parents, of any norm but 0.
    children : Tensor [..., T, d]
        The children of each; rows of NaN stand for children that a parent lacks.

    Returns
    -------
    Tensor [..., T, d]
        Orthogonal to the parents; exactly 0 for a child along its parent, NaN for one that is not there.

    Raises
    ------
    ValueError
        For shapes that do not fit, parents of no norm, and infinite rows.
    """
    if children.dim() < 2 or parents.shape != (*children.shape[:-2], children.shape[-1]):
        raise ValueError(
            "parents must be [..., d] and children [..., T, d] with the same leading sizes, "
            f"got {tuple(parents.shape)} and {tuple(children.shape)}"
        )
    norms = parents.norm(dim=-1)
    if not (norms.isfinite() & (norms > 0)).all():
        raise ValueError("parents must be finite rows of a norm above 0")
    if children.isinf().any():
        raise ValueError("children must not be infinite; NaN stands for a child that is not there")
    unit = normalize(parents.double(), dim=-1).unsqueeze(-2)
    rows = children.double()
    offsets = rows - (rows * unit).sum(-1, keepdim=True) * unit
    along = offsets.norm(dim=-1, keepdim=True) <= _TINY * rows.norm(dim=-1, keepdim=True)
    return offsets.masked_fill(along, 0).to(children.dtype)


# The same direction under every parent?


@dataclass(frozen=True, eq=False)
class Parallelogram(Results):
    """What :func:`parallelogram` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``same``, mean cosine of the offsets of one topic under two parents; ``different``, of two topics under two
        parents; ``gap``, the first less the second; ``retrieval``, how often an offset's nearest one under another
        parent is that of its topic.
    by_topic : Tensor [T]
        The first for each topic; NaN where fewer than two parents have it.
    offsets : Tensor [P, T, d]
        As they were measured: after `prepare`.
    """

    results: dict[str, Result]
    by_topic: Tensor
    offsets: Tensor

    def plot(self, axes: Any = None) -> Any:
        """A dot for each topic: the mean cosine of its offsets across parents, beside the mean of different topics."""
        axes = new_axes() if axes is None else axes
        order = self.by_topic.nan_to_num(-2).argsort(descending=True)
        axes.plot(range(len(order)), self.by_topic[order].tolist(), "o", color="C0", label="same topic")
        axes.axhline(self.results["different"].value, color="0.45", ls="--", lw=1, label="different topics, mean")
        axes.set_xticks(range(len(order)), order.tolist(), fontsize=8 if len(order) <= 40 else 4)
        axes.set(xlabel="topic", ylabel="cosine of offsets across parents")
        axes.legend(frameon=False)
        return axes


@torch.no_grad()
def parallelogram(
    offsets: Tensor,
    null: str | Sequence[str] = ("permute", "rotate"),
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    n_null: int = 200,
    seed: int = 0,
) -> Parallelogram:
    """Whether a topic moves every parent in the same direction: are parents and children corners of parallelograms?

    Parameters
    ----------
    offsets : Tensor [P, T, d]
        Of :func:`split_offsets`: P parents, T topics. Rows of NaN or zero stand for topics that a parent lacks.
    null : str or sequence of str
        ``"permute"``: the topics of each parent permuted. ``"rotate"``: the offsets of each parent turned together at
        random, which keeps all angles among them.
    prepare : callable or None
        What to do to offsets ``[P, T, d]`` before they are measured, such as :func:`project_out` with topics for
        labels. It is done again to every sample of the nulls: a projection that was fitted to the topics makes any
        topics agree.
    n_null : int
        Samples of each null.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        For a wrong shape or name, infinite rows, and where no topic has two parents or no two parents have different
        topics.

    References
    ----------
    Li et al., *The geometry of concepts: sparse autoencoder feature structure* (arXiv 2410.19750), section 3.
    """
    if offsets.dim() != 3:
        raise ValueError(f"offsets must be [parents, topics, d], got shape {tuple(offsets.shape)}")
    if offsets.isinf().any():
        raise ValueError("offsets must not be infinite; NaN stands for a topic that a parent lacks")
    kinds = {"permute": ("topics permuted within parents", _permuted), "rotate": ("parents rotated", _rotated)}
    wanted = [null] if isinstance(null, str) else list(null)
    for name in wanted:
        if name not in kinds:
            raise ValueError(f"null must be among {', '.join(kinds)}, got {name!r}")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    has = offsets.nan_to_num(0).any(2)
    if int(has.sum(0).max() if has.numel() else 0) < 2 or not _across(has):
        raise ValueError("offsets must have a topic under two parents, and two topics under different parents")
    measured = (offsets if prepare is None else prepare(offsets)).double()
    values, by_topic = _agreement(measured)
    generator = null_generator(seed)
    drawn: dict[str, list[dict[str, float]]] = {}
    for name in wanted:
        title, make = kinds[name]
        made = (make(offsets.double(), generator).to(offsets.dtype) for _ in range(n_null))
        drawn[title] = [_agreement((rows if prepare is None else prepare(rows)).double())[0] for rows in made]
    titles = {
        "same": "cosine of a topic's offsets under two parents",
        "different": "cosine of two topics' offsets under two parents",
        "gap": "cosine of offsets of the same topic less that of different ones",
        "retrieval": "share of offsets whose nearest one under another parent is that of their topic",
    }
    results = {
        key: Result(
            title,
            values[key],
            {name: samples(found[key] for found in group) for name, group in drawn.items()},
            tail="two-sided" if key == "different" else "greater",
        )
        for key, title in titles.items()
    }
    return Parallelogram(results, by_topic, measured.to(offsets.dtype))


# Directions that rows share


@dataclass(frozen=True, eq=False)
class Factors(Results):
    """What :func:`factor_directions` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``explained``: share of the rows' variance about their mean that r directions reconstruct.
    directions : Tensor [r, d]
        Of unit norm, or 0 where fewer were found; by falling share of the squared scores.
    scores : Tensor [n, r]
        What to multiply them with.
    offset : Tensor [d]
        What to add.
    """

    results: dict[str, Result]
    directions: Tensor
    scores: Tensor
    offset: Tensor

    @property
    def explained(self) -> float:
        """Share of the variance that they reconstruct."""
        return self.results["explained"].value


def factor_directions(
    D: Tensor,
    method: str = "pca",
    r: int = 8,
    *,
    k: int = 1,
    starts: int = 4,
    steps: int = 200,
    lr: float = 1e-2,
    n_null: int = 20,
    seed: int = 0,
) -> Factors:
    """Decompose rows, such as offsets or decoder rows, into `r` directions.

    Parameters
    ----------
    D : Tensor [n, d]
        Rows, at least two of them different.
    method : {"pca", "ica", "nmf", "sae"}
        Principal components; FastICA; non-negative matrix factorisation, of ``[ReLU(D), ReLU(−D)]`` unless `D` has no
        negative number; a TopK SAE of `r` latents and `k` active, without a decoder bias, because rows of a fixed
        number of parts can be moved by a common vector at no cost. PCA and ICA take the mean off first.
    r : int
        Number of directions, at most n and d for PCA and ICA.
    k, starts, steps, lr : int, int, int, float
        Of the SAE; of so many starts the fit with the lowest error is kept.
    n_null : int
        Samples of each null, each a decomposition: random directions of the rows' norms, and every column permuted
        (Horn's parallel analysis), which keeps what a coordinate is like and unties it from the others.
    seed : int
        Determines fits and nulls.

    Raises
    ------
    ValueError
        For rows that are not finite or all equal, an unknown method, and sizes out of range.

    References
    ----------
    Horn, *A rationale and test for the number of factors* (1965); Lee and Seung (1999) for NMF; Leask et al. (arXiv
    2502.04878) for SAEs of decoder rows.
    """
    fits: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
        "pca": lambda some: _pca(some, r),
        "ica": lambda some: _ica(some, r, seed),
        "nmf": lambda some: _nmf(some, r, seed),
        "sae": lambda some: _sae(some, r, k, starts, steps, lr, seed),
    }
    if method not in fits:
        raise ValueError(f"method must be one of {', '.join(fits)}, got {method!r}")
    fit = fits[method]
    rows = _finite_rows("D", D).cpu()
    if not _variance(rows):
        raise ValueError("D must have at least two different rows")
    most = min(rows.shape) if method in ("pca", "ica") else len(rows)
    if not 1 <= r <= most:
        raise ValueError(f"r must be in 1 … {most} for {method} of rows {tuple(rows.shape)}, got {r}")
    if not 1 <= k <= r:
        raise ValueError(f"k must be in 1 … r={r}, got {k}")
    if n_null < 0 or starts < 1:
        raise ValueError(f"n_null must not be negative and starts at least 1, got {n_null} and {starts}")
    directions, scores, offset = fit(rows)
    generator = null_generator(seed)
    random = (_random_like(rows, generator) for _ in range(n_null))
    mixed = (permuted(rows, 0, generator) for _ in range(n_null))
    explained = Result(
        f"share of variance in {r} directions ({method})",
        _explained(rows, directions, scores, offset),
        {
            "random rows of these norms": samples(_explained(some, *fit(some)) for some in random),
            "columns permuted": samples(_explained(some, *fit(some)) for some in mixed),
        },
    )
    scale = directions.norm(dim=1)
    scores, directions = scores * scale, normalize(directions, dim=1)
    order = scores.square().sum(0).argsort(descending=True, stable=True)
    return Factors({"explained": explained}, directions[order], scores[:, order], offset)


@dataclass(frozen=True, eq=False)
class Projection(Results):
    """What :func:`project_out` returns.

    Attributes
    ----------
    results : dict of str to Result
        With distractors ``removed``, the share of the rows' squared norms that was taken away; with labels
        ``silhouette``, that of the labels afterwards.
    rows : Tensor [n, d] or [n, components]
        What is left: the rows less their projections; or their coordinates, less the mean, along the directions.
    directions : Tensor [m, d]
        Orthonormal ones that were removed; or the discriminant ones that were kept, of unit variance within labels.
    """

    results: dict[str, Result]
    rows: Tensor
    directions: Tensor


def project_out(
    D: Tensor,
    distractors: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    components: int | None = None,
    n_null: int = 100,
    seed: int = 0,
) -> Projection:
    """Remove from rows what is beside the point: directions that are known, or what varies within labels.

    With `labels` it is linear discriminant analysis, with the within-label covariance shrunk after Ledoit and Wolf:
    with more dimensions than rows the empirical one would separate any labels whatever. The shrunk one still separates
    them better than it should, so that the null fits it again to permuted labels.

    Parameters
    ----------
    D : Tensor [n, d]
        Rows, such as offsets.
    distractors : Tensor [m, d] or [d] or None
        Directions to remove, of any norms; what they span is removed.
    labels : Tensor [n] of ints or None
        What should be told apart, such as topics; one of the two must be given.
    components : int or None
        Discriminant directions to keep; by default as many as there are, the number of labels less one at most.
    n_null : int
        Samples of the null: as many random orthonormal directions; labels permuted and fitted again.
    seed : int
        Determines the null.

    Raises
    ------
    ValueError
        Unless one of distractors and labels is given; for wrong shapes, rows that are not finite, distractors that are
        all zero, fewer than two labels, and labels that all have one row.

    References
    ----------
    Li et al., *The geometry of concepts* (arXiv 2410.19750), section 3.1; Ledoit and Wolf (2004).
    """
    rows = _finite_rows("D", D).cpu()
    if (distractors is None) == (labels is None):
        raise ValueError("give either distractors or labels")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    generator = torch.Generator().manual_seed(seed)
    if distractors is not None:
        given = _finite_rows("distractors", torch.atleast_2d(distractors)).to(rows)
        if given.shape[1] != rows.shape[1]:
            raise ValueError(f"distractors must have {rows.shape[1]} columns as D has, got {given.shape[1]}")
        basis = _basis(given)
        energy = rows.square().sum()
        random = (_frame(rows.shape[1], len(basis), generator).to(rows) for _ in range(n_null))
        removed = Result(
            f"share of the rows' energy along {len(basis)} distracting directions",
            float((rows @ basis.T).square().sum() / energy) if energy > 0 else float("nan"),
            {"random directions": samples(float((rows @ frame.T).square().sum() / energy) for frame in random)},
        )
        return Projection({"removed": removed}, (rows - rows @ basis.T @ basis).to(D.dtype), basis.to(D.dtype))
    assert labels is not None
    wanted = torch.as_tensor(labels)
    if wanted.shape != (len(rows),) or wanted.is_floating_point():
        raise ValueError(f"labels must be {len(rows)} whole numbers, got shape {tuple(wanted.shape)} {wanted.dtype}")
    n_labels = len(wanted.unique())
    if not 2 <= n_labels < len(rows):
        raise ValueError(f"labels must be two at least, and fewer than the {len(rows)} rows, got {n_labels}")
    most = min(n_labels - 1, rows.shape[1])
    if components is not None and not 1 <= components <= most:
        raise ValueError(f"components must be in 1 … {most}, got {components}")
    if not _variance(rows):
        raise ValueError("D must have at least two different rows")
    left, directions = _discriminants(rows, wanted, components)
    permuted = (wanted[torch.randperm(len(rows), generator=generator)] for _ in range(n_null))
    silhouette = Result(
        "silhouette of labels after discriminant analysis",
        _silhouette(left, wanted),
        {
            "labels permuted, fitted again": samples(
                _silhouette(_discriminants(rows, p, components)[0], p) for p in permuted
            )
        },
        {"without it": samples([_silhouette(rows, wanted)])},
    )
    return Projection({"silhouette": silhouette}, left.to(D.dtype), directions.to(D.dtype))


# Why an SAE has no latent for a direction


@dataclass(frozen=True, eq=False)
class WhyNotFound(Results):
    """What :func:`why_not_found` returns. Everything on held-out tokens, after training on.

    Attributes
    ----------
    results : dict of str to Result
        ``loss``, ``fvu`` and ``l0``: what the added latent changes. Null: random directions added instead. ``kept``:
        cosine of the latent's decoder row with the direction. Null: the same for them.
    verdict : str
        ``"optimisation"``: with the direction the loss is lower than without and than with any random one, so training
        had missed it. ``"width"``: it is lower than without, but so it is with random ones: any latent more would do.
        ``"sparsity"``: it is not lower, so an SAE of this loss is better off without.
    density : float
        Share of the tokens on which the added latent is active.
    sae : SAE
        The one with the direction, trained on.
    """

    results: dict[str, Result]
    verdict: str
    density: float
    sae: sk.SAE


def why_not_found(
    sae: sk.SAE,
    x: Tensor,
    direction: Tensor,
    *,
    steps: int = 300,
    batch_size: int = 256,
    lr: float = 1e-3,
    margin: float = 0.02,
    held_out: float = 0.25,
    n_null: int = 8,
    seed: int = 0,
) -> WhyNotFound:
    """Train an SAE on with a latent for `direction` added, and ask whether its loss likes that.

    The loss is the SAE's own: for ReLU with a penalty an error and a price, for TopK an error at a given L0. With an
    activation whose L0 is neither fixed nor charged for, look at ``l0`` too.

    Parameters
    ----------
    sae : SAE
        The trained one; it is left alone. A plain :class:`sparsekern.SAE`.
    x : Tensor [n, d_in]
        Tokens, of which the last share `held_out` is measured and the others are trained on.
    direction : Tensor [d_in]
        Of any norm but 0. The latent starts with it in both weights, at the median norms of the others, and with the
        bias, of several that make it active on some tokens, at which the loss is lowest.
    steps, batch_size, lr
        Of the training, with the same batches for all.
    margin : float
        Part of the loss without the latent that counts as a difference.
    held_out : float
        Share of the tokens.
    n_null : int
        Random directions, each a training: combinations of tokens with normal weights.
    seed : int
        Determines batches and random directions.

    Raises
    ------
    ValueError
        For another kind of SAE; `x` that is not finite, of a wrong shape or too few tokens; a direction of no norm;
        numbers out of range.
    """
    if type(sae) is not sk.SAE:
        raise ValueError(f"sae must be a plain sparsekern.SAE, got {type(sae).__name__}")
    tokens = _finite_rows("x", x).cpu()
    if tokens.shape[1] != sae.d_in:
        raise ValueError(f"x must be [n, {sae.d_in}], got shape {tuple(x.shape)}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be above 0 and below 1, got {held_out}")
    for name, number, lowest in (("steps", steps, 1), ("batch_size", batch_size, 2), ("n_null", n_null, 1)):
        if number < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {number}")
    if not margin >= 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    if direction.shape != (sae.d_in,) or not direction.isfinite().all() or not direction.any():
        raise ValueError(f"direction must be {sae.d_in} finite numbers, not all 0, got shape {tuple(direction.shape)}")
    n_train = len(tokens) - round(held_out * len(tokens))
    if min(n_train, len(tokens) - n_train) < 2:
        raise ValueError(f"x must leave two tokens to train on and two to measure, got {len(tokens)}")
    train, test = tokens[:n_train].to(sae.W_dec), tokens[n_train:].to(sae.W_dec)
    generator = torch.Generator().manual_seed(seed)
    centred = tokens[:n_train] - tokens[:n_train].mean(0)
    random = torch.randn(n_null, n_train, generator=generator, dtype=tokens.dtype) @ centred
    batches = torch.randint(n_train, (steps, batch_size), generator=generator)

    def arm(added: Tensor | None) -> tuple[sk.SAE, dict[str, float]]:
        other = _widened(sae, added, train[:_TILE])
        trainer = sk.Trainer(other, lr=lr, steps=steps, fit_start=False)
        for batch in batches:
            trainer.step(train[batch])
        other.eval()
        with torch.no_grad():
            out = other.loss(test)
        found = {"loss": float(out.total), "fvu": float(out.fvu), "l0": float(out.codes.l0().double().mean())}
        if added is not None:
            row, target = other.W_dec[-1].detach().cpu().double(), added.detach().cpu().double()
            found["kept"] = float(torch.cosine_similarity(row, target, dim=0))
        return other, found

    _, without = arm(None)
    with_it, found = arm(direction)
    drawn = [arm(row)[1] for row in random]

    def result(key: str, name: str, tail: str) -> Result:
        rest = without.get(key, 0.0)
        return Result(name, found[key] - rest, {"random directions": samples(d[key] - rest for d in drawn)}, tail=tail)

    results = {
        "loss": result("loss", "loss with the direction added less that without", "less"),
        "fvu": result("fvu", "FVU with the direction added less that without", "less"),
        "l0": result("l0", "L0 with the direction added less that without", "less"),
        "kept": result("kept", "cosine of the added latent with where it started", "greater"),
    }
    least = margin * without["loss"]
    change, others = results["loss"].value, results["loss"].null
    verdict = "sparsity"
    if change < -least:
        verdict = "optimisation" if change < float(others.min()) - least else "width"
    with torch.no_grad():
        density = float(with_it.encode(test).firing_counts()[-1]) / len(test)
    return WhyNotFound(results, verdict, density, with_it)


# Parts of split_map


def _finite_rows(name: str, rows: Tensor) -> Tensor:
    """`rows` ``[n, d]`` in float32 at least."""
    if rows.dim() != 2 or not rows.numel():
        raise ValueError(f"{name} must be rows [n, d], at least one, got shape {tuple(rows.shape)}")
    if not rows.isfinite().all():
        raise ValueError(f"{name} must be finite: remove or repair the rows with NaN or infinity")
    return rows.detach().to(torch.promote_types(rows.dtype, torch.float32))


def _unit(name: str, rows: Tensor) -> Tensor:
    return normalize(_finite_rows(name, rows).float(), dim=1)


def _edges(tiles: Iterable[Tensor], small: Tensor, cos: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Edges (parent, child, cosine), and the largest cosine of every row of `tiles`: exact.

    A row whose least kept cosine is still above `cos` may have more parents: it is looked at again, with more places.
    """
    parents, children, cosines, best = [], [], [], []
    start = 0
    for rows in tiles:
        pending, k = torch.arange(len(rows), device=rows.device), min(_FEW, len(small))
        while len(pending):
            codes = sk.topk_encode(rows[pending], small, None, k)
            if len(pending) == len(rows) and k <= _FEW:
                best.append(codes.values[:, 0])
            done = (codes.values[:, -1] <= cos) | (k == len(small))
            row, slot = ((codes.values > cos) & done[:, None]).nonzero(as_tuple=True)
            parents.append(codes.indices[row, slot].long())
            children.append(start + pending[row])
            cosines.append(codes.values[row, slot])
            pending, k = pending[~done], min(4 * k, len(small))
        start += len(rows)
    parent, child, cosine, largest = (torch.cat(parts).cpu() for parts in (parents, children, cosines, best))
    return parent, child, cosine, largest


def _shares(parent: Tensor, child: Tensor, best: Tensor, used: tuple[Tensor, Tensor]) -> list[float]:
    """Shares of split parents and of placed children, and the mean of the largest cosines."""
    counts = torch.bincount(parent, minlength=len(used[0]))[used[0]]
    placed = torch.bincount(child, minlength=len(used[1]))[used[1]] > 0
    return [float((counts > 1).double().mean()), float(placed.double().mean()), float(best[used[1]].double().mean())]


def _histogram(parent: Tensor, used: Tensor) -> Tensor:
    counts = torch.bincount(parent, minlength=len(used))[used]
    return torch.bincount(counts.clamp(max=_BINS - 1), minlength=_BINS).double()


# Parts of parallelogram


def _across(has: Tensor) -> bool:
    """Whether two parents have two different topics, of which topics ``[P, T]`` each has."""
    counts = has.sum(1)
    same = has.sum(0) * (has.sum(0) - 1)
    return int(counts.sum() ** 2 - (counts**2).sum() - same.sum()) > 0


def _agreement(offsets: Tensor) -> tuple[dict[str, float], Tensor]:
    """The four numbers of offsets ``[P, T, d]``, and the first by topic; no P · T × P · T matrix is made."""
    has = offsets.nan_to_num(0).any(2)
    unit = normalize(offsets.nan_to_num(0), dim=2)
    n_parents, n_topics, _ = unit.shape
    # Sums over pairs are squared sums less what a row makes with itself, all of them of unit norm.
    of_topic, of_parent = has.sum(0), has.sum(1)
    pairs = of_topic * (of_topic - 1)
    same_sums = unit.sum(0).square().sum(1) - of_topic
    across = unit.sum((0, 1)).square().sum() - unit.sum(1).square().sum()
    n_across = of_parent.sum() ** 2 - (of_parent**2).sum()
    same = float(same_sums.sum() / pairs.sum())
    different = float((across - same_sums.sum()) / (n_across - pairs.sum()))
    hits = asked = 0
    topics = torch.arange(n_topics, device=unit.device)
    for parent in range(n_parents):
        nearest = (unit @ unit[parent].T).masked_fill(~has[parent], -torch.inf).argmax(2)  # [P, T]
        counts = has & has[parent]
        counts[parent] = False
        hits += int(((nearest == topics) & counts).sum())
        asked += int(counts.sum())
    by_topic = torch.where(pairs > 0, same_sums / pairs, torch.nan)
    return {"same": same, "different": different, "gap": same - different, "retrieval": hits / asked}, by_topic.cpu()


def _permuted(offsets: Tensor, generator: torch.Generator) -> Tensor:
    """Topics permuted under each parent, among those that it has."""
    out = offsets.clone()
    for row, new in zip(offsets, out, strict=True):
        has = row.nan_to_num(0).any(1).nonzero().squeeze(1)
        new[has] = row[has[torch.randperm(len(has), generator=generator).to(has.device)]]
    return out


def _rotated(offsets: Tensor, generator: torch.Generator) -> Tensor:
    """The offsets of each parent in a random frame in the place of the one that they span."""
    out = offsets.clone()
    for row, new in zip(offsets, out, strict=True):
        has = row.nan_to_num(0).any(1)
        frame, coordinates = torch.linalg.qr(row[has].T)  # [d, m], [m, topics]
        new[has] = coordinates.T @ _frame(len(frame), frame.shape[1], generator).to(row)
    return out


def _frame(d: int, m: int, generator: torch.Generator) -> Tensor:
    """`m` random orthonormal rows of `d` dimensions, float64."""
    return torch.linalg.qr(torch.randn(d, m, generator=generator, dtype=torch.float64))[0].T


# Parts of factor_directions


def _variance(rows: Tensor) -> float:
    return float((rows.double() - rows.double().mean(0)).square().sum())


def _explained(rows: Tensor, directions: Tensor, scores: Tensor, offset: Tensor) -> float:
    error = rows.double() - scores.double() @ directions.double() - offset.double()
    return 1 - float(error.square().sum()) / _variance(rows)


def _random_like(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Random rows of these norms, without negative numbers where there are none."""
    draw = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    draw = draw if (rows < 0).any() else draw.abs()
    return normalize(draw, dim=1) * rows.norm(dim=1, keepdim=True)


def _pca(rows: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    fitted = PCA(r, svd_solver="full").fit(rows.numpy())
    return _signed(fitted.components_, fitted.transform(rows.numpy()), fitted.mean_, rows)


def _ica(rows: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    fitted = FastICA(r, whiten="unit-variance", whiten_solver="svd", max_iter=500, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a null, which has nothing to converge to
        scores = fitted.fit_transform(rows.double().numpy())
    return _signed(fitted.mixing_.T, scores, fitted.mean_, rows)


def _nmf(rows: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    signed = bool((rows < 0).any())
    parts = torch.cat([rows.relu(), (-rows).relu()], 1) if signed else rows
    fitted = NMF(r, init="nndsvda", max_iter=500, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = fitted.fit_transform(parts.numpy())
    d = rows.shape[1]
    directions = fitted.components_[:, :d] - fitted.components_[:, d:] if signed else fitted.components_
    return torch.from_numpy(directions).to(rows), torch.from_numpy(scores).to(rows), rows.new_zeros(d)


def _sae(rows: Tensor, r: int, k: int, starts: int, steps: int, lr: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = rows.square().sum(1).mean().sqrt()
    x = (rows / size).float()
    fits = [_trained(x, r, k, steps, lr, generator) for _ in range(starts)]
    sae = min(fits, key=lambda fit: fit[0])[1]
    with torch.no_grad():
        scores = torch.cat([sae.encode(part).to_dense() for part in x.split(_TILE)])
    return sae.W_dec.detach().to(rows), scores.to(rows) * size, rows.new_zeros(rows.shape[1])


def _trained(x: Tensor, r: int, k: int, steps: int, lr: float, generator: torch.Generator) -> tuple[float, sk.SAE]:
    """FVU, and a TopK SAE without decoder bias that starts at rows of `x`, each far from those before it."""
    sae = sk.SAE(x.shape[1], r, sk.TopK(k), dead_after=20 * len(x), aux_k=min(r, 4 * k), generator=generator)
    sae.b_dec.requires_grad_(False)
    unit = normalize(x[x.any(1)], dim=1)
    start = unit[torch.randint(len(unit), (1,), generator=generator)]
    while len(start) < min(r, len(unit)):
        start = torch.cat([start, unit[(unit @ start.T).amax(1).argmin()][None]])
    with torch.no_grad():
        for weight in sae.latent_weights():
            weight[: len(start)] = start
    trainer = sk.Trainer(sae, lr=lr, steps=steps, b_dec_init="zeros")
    for _ in range(steps):
        few = len(x) <= _SAE_BATCH
        trainer.step(x if few else x[torch.randint(len(x), (_SAE_BATCH,), generator=generator)])
    sae.eval()
    return sk.evaluate(sae, x.split(_TILE)).fvu, sae


def _signed(
    directions: np.ndarray, scores: np.ndarray, offset: np.ndarray, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As tensors, with the signs that make scores skewed upwards: a direction points to where it is active."""
    sign = np.where((scores**3).sum(0) < 0, -1, 1)
    found, values = torch.from_numpy(directions * sign[:, None]), torch.from_numpy(scores * sign)
    return found.to(rows), values.to(rows), torch.from_numpy(np.asarray(offset)).to(rows)


# Parts of project_out


def _basis(rows: Tensor) -> Tensor:
    """Orthonormal rows with the span of `rows`."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    if values[0] == 0:
        raise ValueError("distractors must have a row that is not zero")
    return vectors[values > _TINY * values[0]]


def _discriminants(rows: Tensor, labels: Tensor, components: int | None) -> tuple[Tensor, Tensor]:
    """Centred coordinates ``[n, m]`` along discriminant directions ``[m, d]``, the most discriminating first."""
    centred = rows - rows.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    span = vectors[values > _TINY * values[0]]
    inside = centred @ span.T
    _, of_row, count = labels.unique(return_inverse=True, return_counts=True)
    sums = inside.new_zeros(len(count), inside.shape[1]).index_add_(0, of_row, inside)
    means = sums / count[:, None]
    shrunk, _ = ledoit_wolf((inside - means[of_row]).numpy(), assume_centered=True)
    ridge = 1e-6 * float(inside.square().mean())  # rows that do not differ within labels leave nothing to whiten with
    between = (means.T * count) @ means / len(rows)
    _, found = eigh(between.numpy(), shrunk + ridge * np.eye(len(shrunk)))
    kept = min(len(count) - 1 if components is None else components, len(span))
    directions = torch.from_numpy(found[:, ::-1][:, :kept].T.copy()).to(rows) @ span
    return centred @ directions.T, directions


def _silhouette(rows: Tensor, labels: Tensor) -> float:
    return float(silhouette_score(rows.numpy(), labels.numpy()))


# Parts of why_not_found


@torch.no_grad()
def _widened(sae: sk.SAE, added: Tensor | None, x: Tensor) -> sk.SAE:
    """A copy of `sae` in evaluation mode, with a latent for `added` at the end."""
    wider = sk.SAE.from_config(sae.config() | {"d_sae": sae.d_sae + (added is not None)}, dtype=sae.W_dec.dtype)
    state, shapes = sae.state_dict(), {name: tensor.shape for name, tensor in wider.state_dict().items()}
    for name, tensor in state.items():
        if added is None or shapes[name] == tensor.shape:
            continue
        row = tensor.median()  # of a bias, a threshold or a counter
        if tensor.dim() == 2:
            row = normalize(added.to(tensor), dim=0) * tensor.norm(dim=1).median()
        state[name] = torch.cat([tensor, row[None]])
    wider.load_state_dict(state)
    wider = wider.to(sae.device).eval()
    if added is not None:
        _fit_bias_(wider, x)
    return wider


def _fit_bias_(sae: sk.SAE, x: Tensor) -> None:
    """Put the bias of the last latent where the loss is lowest, of those where it is active on some tokens."""
    pre = (x - sae.b_dec if sae.pre_bias else x) @ sae.W_enc[-1]
    threshold = sae.activation.threshold[-1] if isinstance(sae.activation, sk.JumpReLU) else 0.0
    shares = 1 - 0.5 ** torch.arange(1, 8, dtype=pre.dtype, device=pre.device)
    candidates = [sae.b_enc[-1].clone(), *(threshold - pre.quantile(shares))]
    found = []
    for bias in candidates:
        sae.b_enc[-1] = bias
        out = sae.loss(x)
        if out.codes.firing_counts()[-1] > 0:
            found.append((float(out.total), bias))
    sae.b_enc[-1] = min(found, key=lambda pair: pair[0])[1] if found else candidates[0]

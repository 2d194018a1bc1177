"""One space or many: whether latents form lobes by what is active together, and whether the decoder knows of them.

``docs/analyses/geometry.md`` says what the nulls are.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.geometry.counts import Active
from sparsekern.analysis.nulls import second_moment_root
from sparsekern.analysis.results import Result, Results, new_panels, null_generator, samples

try:
    import numpy as np
    from scipy.sparse import coo_array, diags_array
    from scipy.sparse.linalg import LinearOperator, eigsh
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import adjusted_mutual_info_score, balanced_accuracy_score
    from sklearn.model_selection import train_test_split
    from threadpoolctl import threadpool_limits  # of scikit-learn's own dependencies
except ImportError as error:
    raise ImportError("this analysis needs scipy and scikit-learn: pip install 'sparsekern[analysis]'") from error

_STARTS = 4  # of k-means
_FEW = 10  # latents of a lobe, for it to be told from the decoder
_MADE_UP = 1e-9  # squared length of what is left of a unit row, below which nothing is
_ROUNDING = 1e-12  # added to squared lengths, for rows that are there twice

# Lobes


@dataclass(frozen=True, eq=False)
class OneSpaceOrMany(Results):
    """What :func:`one_space_or_many` returns; n latents of `latents`.

    Attributes
    ----------
    results : dict of str to Result
        ``within``, mean φ of two latents of one lobe less that of any two; ``ami``, agreement of the lobes with
        clusters of the decoder's rows; ``accuracy``, balanced accuracy of telling the lobe from the row.
    latents : Tensor [n] int64
        Those that were measured: active on at least `at_least` tokens and not on all.
    lobe : Tensor [n] int64
        By falling size.
    cluster : Tensor [n] int64
        Of the decoder's rows, by angle.
    embedding : Tensor [n, n_lobes] float64
        The leading eigenvectors, from which the lobes are made.
    phi : Tensor [n_lobes, n_lobes] float64
        Mean φ of two latents of the one and the other lobe, a latent with itself left out.
    """

    results: dict[str, Result]
    latents: Tensor
    lobe: Tensor
    cluster: Tensor
    embedding: Tensor
    phi: Tensor

    def plot(self) -> Any:
        """Mean φ between lobes, and the latents along two eigenvectors; returns the matplotlib figure."""
        figure, (left, right) = new_panels(2)
        size = float(self.phi.nan_to_num(0).abs().max()) or 1.0
        image = left.imshow(self.phi.numpy(), cmap="RdBu_r", vmin=-size, vmax=size)
        figure.colorbar(image, ax=left, shrink=0.8)
        labels = range(len(self.phi))
        left.set(xlabel="lobe", ylabel="lobe", title="mean φ", xticks=labels, yticks=labels)
        columns = (1, 2) if self.embedding.shape[1] > 2 else (0, 1)
        x, y = (self.embedding[:, column].tolist() for column in columns)
        right.scatter(x, y, s=3, c=self.lobe.tolist(), cmap="tab10")
        right.set(xlabel=f"eigenvector {columns[0] + 1}", ylabel=f"eigenvector {columns[1] + 1}", xticks=[], yticks=[])
        return figure


@torch.no_grad()
@threadpool_limits.wrap(limits=1)  # problems this small take 15 times the processor time on two threads, which spin
def one_space_or_many(
    codes: sk.SparseCodes | sk.CSRCodes,
    decoder: Tensor,
    chunks: Tensor | None = None,
    n_lobes: int = 3,
    *,
    at_least: int = 10,
    max_latents: int = 8192,
    n_null: int = 20,
    seed: int = 0,
) -> OneSpaceOrMany:
    """Whether latents fall into lobes that are active in the same places, and whether their directions do.

    φ of two latents is the correlation of where they are active, ``(n11 n00 − n10 n01) / √(n1· n0· n·1 n·0)``, over
    tokens or over chunks of them. Lobes are the spectral clusters of ``φ + 1``: k-means of the leading eigenvectors of
    its normalised form. As ``φ_ij = N v_i n_ij v_j − u_i u_j`` with ``v = 1 / √(n (N − n))`` and
    ``u = √(n / (N − n))``, a product with it costs two sparse products: no table of latents by latents is made, at any
    width, and no pair is left out.

    ``within`` asks whether there are lobes at all, ``ami`` and ``accuracy`` whether the decoder's rows know of them:
    the first by clusters of their angles (k-means of unit rows), the second by a logistic regression with balanced
    classes on four fifths of the latents, measured on the rest.

    Nulls. *Tokens shuffled*: each latent active in as many chunks, drawn at random, and lobes found again. Of the last
    two also *latents permuted*: the lobes given to other latents; and *random decoder*: normal rows with the second
    moment of the rows.

    Parameters
    ----------
    codes : SparseCodes or CSRCodes
        Values of any sign; any but 0 is active.
    decoder : Tensor [d_sae, d]
        One row a latent, of any norm.
    chunks : Tensor [B] of ints or None
        The chunk of each token: a latent is active in a chunk or not. Without it every token stands alone. The source
        has chunks of 256 tokens.
    n_lobes : int
        Lobes, and clusters of the decoder.
    at_least : int
        Chunks in which a latent must be active.
    max_latents : int
        Of more latents so many are drawn for the decoder's clusters and the regression.
    n_null : int
        Samples of each null.
    seed : int
        Determines what is drawn, and the nulls.

    Raises
    ------
    ValueError
        For shapes that do not fit, rows or codes that are not finite, and too few latents to make lobes of.

    References
    ----------
    Li et al., *The geometry of concepts: sparse autoencoder feature structure* (arXiv 2410.19750), section 4.
    """
    if n_lobes < 2:
        raise ValueError(f"n_lobes must be at least 2, got {n_lobes}")
    if at_least < 1:
        raise ValueError(f"at_least must be at least 1, got {at_least}")
    if max_latents < 2 * n_lobes:
        raise ValueError(f"max_latents must be at least {2 * n_lobes}, two a lobe, got {max_latents}")
    _check_n_null(n_null)
    rows = _finite("decoder", decoder)
    if len(rows) != codes.d_sae:
        raise ValueError(f"decoder must have a row for each of the {codes.d_sae} latents of codes, got {len(rows)}")
    active = Active.of(codes, chunks)
    counts = active.counts()
    latents = ((counts >= at_least) & (counts < active.tokens) & rows.any(1)).nonzero().squeeze(1)
    if len(latents) < 2 * n_lobes:
        raise ValueError(
            f"codes must have {2 * n_lobes} latents that are active in {at_least} chunks or more and not in all, "
            f"with a row that is not zero, got {len(latents)}"
        )
    generator = null_generator(seed)
    rows = normalize(rows[latents], dim=1)
    drawn = torch.randperm(len(latents), generator=generator)[:max_latents].sort().values
    rows = rows[drawn]
    found = _lobes(active, latents, n_lobes, seed)
    cluster = _kmeans(rows, n_lobes, seed)

    def told(lobe: Tensor, cluster: Tensor, rows: Tensor) -> dict[str, float]:
        return {"ami": _ami(lobe[drawn], cluster), "accuracy": _accuracy(rows, lobe[drawn], seed)}

    values = {"within": found.within} | told(found.lobe, cluster, rows)
    nulls: dict[str, list[dict[str, float]]] = {"tokens shuffled": [], "latents permuted": [], "random decoder": []}
    root = second_moment_root(rows)
    for _ in range(n_null):
        other = _lobes(active.shuffled(generator), latents, n_lobes, seed)
        nulls["tokens shuffled"].append({"within": other.within} | told(other.lobe, cluster, rows))
        order = torch.randperm(len(latents), generator=generator)
        nulls["latents permuted"].append(told(found.lobe[order], cluster, rows))
        random = normalize(torch.randn(rows.shape, generator=generator, dtype=rows.dtype) @ root, dim=1)
        nulls["random decoder"].append(told(found.lobe, _kmeans(random, n_lobes, seed), random))
    names = {
        "within": "mean φ inside lobes less the mean φ of all",
        "ami": "agreement of lobes with clusters of the decoder (AMI)",
        "accuracy": "balanced accuracy of telling a latent's lobe from its decoder row",
    }
    results = {
        key: Result(name, values[key], {n: samples(s[key] for s in made if key in s) for n, made in nulls.items()})
        for key, name in names.items()
    }
    results["within"] = Result(
        names["within"], found.within, {"tokens shuffled": results["within"].nulls["tokens shuffled"]}
    )
    everywhere = torch.full((len(latents),), -1)
    everywhere[drawn] = cluster
    return OneSpaceOrMany(results, latents, found.lobe, everywhere, found.embedding, found.phi)


@dataclass(frozen=True)
class _Found:
    lobe: Tensor
    embedding: Tensor
    phi: Tensor
    within: float


class _Phi:
    """φ of all pairs as an operator: two sparse products and a direction."""

    def __init__(self, active: Active, latents: Tensor) -> None:
        X = active.matrix(latents)
        n, N = np.asarray(X.sum(0)).ravel(), active.tokens
        with np.errstate(divide="ignore"):
            v = np.where((n > 0) & (n < N), 1 / np.sqrt(n * (N - n)), 0)
        self._scaled = (X @ diags_array(v * math.sqrt(N))).tocsr()
        self._transposed = self._scaled.T.tocsr()
        self._u = n * v

    def __matmul__(self, other: Any) -> Any:
        return self._transposed @ (self._scaled @ other) - np.multiply.outer(self._u, self._u @ other)


def _lobes(active: Active, latents: Tensor, n_lobes: int, seed: int) -> _Found:
    phi, n = _Phi(active, latents), len(latents)
    # Rows of φ + 1 that sum to nothing do not occur: φ of two latents is above −1 but for complements.
    scale = 1 / np.sqrt(np.maximum(n + phi @ np.ones(n), 1e-9))
    affinity = LinearOperator((n, n), matvec=lambda y: scale * ((scale @ y) + phi @ (scale * y)), dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(n)
    _, vectors = eigsh(affinity, k=n_lobes, which="LA", v0=start, tol=1e-6)
    embedding = torch.from_numpy(vectors[:, ::-1].copy())
    lobe = _kmeans(normalize(embedding, dim=1), n_lobes, seed)
    member = np.eye(n_lobes)[lobe.numpy()]
    size = member.sum(0)
    pairs = np.multiply.outer(size, size) - np.diag(size)
    sums = member.T @ (phi @ member) - np.diag(size)  # φ of a latent with itself is 1
    with np.errstate(divide="ignore", invalid="ignore"):
        means = torch.from_numpy(sums / pairs)
    within = float(np.trace(sums) / np.trace(pairs) - sums.sum() / pairs.sum()) if np.trace(pairs) else math.nan
    return _Found(lobe, embedding, means, within)


def _kmeans(rows: Tensor, k: int, seed: int) -> Tensor:
    """Clusters by falling size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer different rows than clusters
        found = torch.from_numpy(KMeans(k, n_init=_STARTS, random_state=seed).fit_predict(rows.numpy())).long()
    order = torch.bincount(found, minlength=k).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(k)
    return rank[found]


def _ami(one: Tensor, two: Tensor) -> float:
    return float(adjusted_mutual_info_score(one.numpy(), two.numpy()))


def _accuracy(rows: Tensor, lobe: Tensor, seed: int) -> float:
    """Balanced over the lobes with enough latents to be in both parts; NaN where there is one at most."""
    kept = torch.bincount(lobe)[lobe] >= _FEW
    rows, lobe = rows[kept], lobe[kept]
    if len(lobe.unique()) < 2:
        return math.nan
    x, x_test, y, y_test = train_test_split(
        rows.numpy(), lobe.numpy(), test_size=0.2, random_state=seed, stratify=lobe.numpy()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Rows of unit norm are small numbers to a penalty of 1.
        fitted = LogisticRegression(C=10.0, class_weight="balanced", max_iter=200).fit(x, y)
    return float(balanced_accuracy_score(y_test, fitted.predict(x_test)))


class PlantedLobes:
    """Latents in blocks of which one is favoured in each chunk, with decoder rows that know of it or do not.

    A latent is active in a chunk with probability `share`, and with `lift` times that where the chunk is of its block.

    Parameters
    ----------
    lift : float
        1 plants nothing.
    blocks, size : int
        Blocks, and latents of each.
    share : float
    d : int
        Width of the decoder's rows.
    spread : float or None
        A row is its block's direction plus normal noise of this length; without it all rows are random.
    generator : torch.Generator or None
        For the rows.

    Attributes
    ----------
    block : Tensor [blocks * size] int64
    decoder : Tensor [blocks * size, d]
        Rows of unit norm.
    """

    def __init__(
        self,
        lift: float,
        blocks: int = 6,
        size: int = 40,
        share: float = 0.02,
        *,
        d: int = 32,
        spread: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if lift < 0 or share <= 0 or share * max(lift, 1) > 1:
            raise ValueError(f"lift and share must give probabilities, got {lift} and {share}")
        if blocks < 1 or size < 1:
            raise ValueError(f"blocks and size must be at least 1, got {blocks} and {size}")
        self.lift, self.share, self.blocks = lift, share, blocks
        self.block = torch.arange(blocks).repeat_interleave(size)
        noise = normalize(torch.randn(len(self.block), d, generator=generator), dim=1)
        if spread is not None:
            centres = normalize(torch.randn(blocks, d, generator=generator), dim=1)
            noise = centres[self.block] + spread * noise
        self.decoder = normalize(noise, dim=1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> sk.CSRCodes:
        """Codes of `n` chunks; every value is 1."""
        favoured = torch.randint(self.blocks, (n, 1), generator=generator) == self.block
        chance = torch.where(favoured, self.share * self.lift, self.share)
        on = torch.rand(chance.shape, generator=generator) < chance
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), on.sum(1).cumsum(0)])
        col = on.nonzero()[:, 1].int()
        return sk.CSRCodes(crow, col, torch.ones(len(col)), len(self.block))


# Subspaces


@dataclass(frozen=True, eq=False)
class SubspaceClusters(Results):
    """What :func:`subspace_clusters` returns; n rows of `rows`.

    Attributes
    ----------
    results : dict of str to Result
        ``ranks``, of :func:`union_of_subspaces` with these clusters; ``own``, share of a row's coefficients that stand
        at rows of its own cluster.
    rows : Tensor [n] int64
        Which rows were clustered.
    cluster : Tensor [n] int64
        By falling size.
    coefficients : scipy sparse array [n, n]
        What each row is made of.
    """

    results: dict[str, Result]
    rows: Tensor
    cluster: Tensor
    coefficients: Any


@torch.no_grad()
def union_of_subspaces(
    rows: Tensor, clusters: Tensor, *, energy: float = 0.9, n_null: int = 100, seed: int = 0
) -> Result:
    """Whether clusters of rows lie in subspaces of their own: the sum of their ranks over the rank of all rows.

    A rank is the fewest leading directions with a share `energy` of the squared length of the rows. Clusters in
    independent subspaces have ranks that add up to that of all, a value of about 1; clusters that each need the whole
    space have one of about their number, unless they have too few rows to need it. Null: the clusters permuted.

    Parameters
    ----------
    rows : Tensor [n, d]
        Of any norm; longer ones count more.
    clusters : Tensor [n] of ints
        Of two clusters at least.
    energy : float
        Above 0 and below 1.
    n_null : int
        Samples of the null.
    seed : int
        Determines it.

    Returns
    -------
    Result
        Small values speak for subspaces.

    Raises
    ------
    ValueError
        For rows that are not finite or all zero, clusters that do not fit, and numbers out of range.
    """
    rows = _finite("rows", rows).double()
    if clusters.shape != (len(rows),) or clusters.is_floating_point() or len(clusters.unique()) < 2:
        raise ValueError(f"clusters must be whole numbers, one for each of the {len(rows)} rows, of two at least")
    if not 0 < energy < 1:
        raise ValueError(f"energy must be above 0 and below 1, got {energy}")
    _check_n_null(n_null)
    if not rows.any():
        raise ValueError("rows must have one that is not zero")
    clusters = clusters.cpu()
    generator = null_generator(seed)
    permuted = (clusters[torch.randperm(len(rows), generator=generator)] for _ in range(n_null))
    null = samples(_ranks(rows, labels, energy) for labels in permuted)
    name = "sum of the ranks of the clusters over the rank of all rows"
    return Result(name, _ranks(rows, clusters, energy), {"clusters permuted": null}, tail="less")


@torch.no_grad()
def subspace_clusters(
    rows: Tensor,
    n_clusters: int,
    *,
    sparsity: int = 5,
    energy: float = 0.9,
    max_rows: int = 2000,
    n_null: int = 20,
    seed: int = 0,
) -> SubspaceClusters:
    """Clusters of rows that make each other up: sparse subspace clustering with orthogonal matching pursuit.

    Every unit row is written as a combination of at most `sparsity` others, found greedily; the sizes of the
    coefficients, made symmetric, are an affinity, and its spectral clusters are the answer. Rows of a union of
    independent subspaces choose rows of their own subspace. Unlike lobes this looks at directions alone.

    Null of ``ranks``: the clusters permuted, and *random rows* with the second moment of these, clustered as well: the
    second is the one that counts, for clusters of anything are flatter than random parts of it. ``own`` has the second
    only.

    Parameters
    ----------
    rows : Tensor [n, d]
        Of any norm but 0.
    n_clusters : int
        Clusters, at least 2.
    sparsity : int
        Rows that a row is made of; at most the rank of its subspace.
    energy : float
        Of :func:`union_of_subspaces`.
    max_rows : int
        Of more rows so many are drawn: all their cosines are needed.
    n_null : int
        Samples of each null.
    seed : int
        Determines what is drawn, and the nulls.

    Raises
    ------
    ValueError
        For rows that are not finite or too few, and numbers out of range.

    References
    ----------
    Elhamifar and Vidal, *Sparse subspace clustering* (arXiv 1203.1005); You, Robinson and Vidal, *Scalable sparse
    subspace clustering by orthogonal matching pursuit* (arXiv 1507.01238).
    """
    rows = _finite("rows", rows).double()
    if n_clusters < 2 or sparsity < 1 or not 0 < energy < 1:
        raise ValueError(
            "n_clusters must be at least 2, sparsity at least 1 and energy above 0 and below 1, "
            f"got {n_clusters}, {sparsity} and {energy}"
        )
    _check_n_null(n_null)
    used = rows.any(1).nonzero().squeeze(1)
    generator = null_generator(seed)
    used = used[torch.randperm(len(used), generator=generator)[:max_rows].sort().values]
    if len(used) < max(2 * n_clusters, sparsity + 2):
        least = max(2 * n_clusters, sparsity + 2)
        raise ValueError(f"rows must have {least} that are not zero, and max_rows be as many, got {len(used)}")
    unit = normalize(rows[used], dim=1)
    cluster, coefficients = _self_expressed(unit, n_clusters, sparsity, seed)
    ranks = union_of_subspaces(unit, cluster, energy=energy, n_null=n_null, seed=seed)
    root = second_moment_root(unit)
    whole = _rank(unit, energy)  # random rows of a sample's second moment have a lower one, and a larger ratio by that
    drawn: list[tuple[float, float]] = []
    for _ in range(n_null):
        random = normalize(torch.randn(unit.shape, generator=generator, dtype=unit.dtype) @ root, dim=1)
        labels, made_of = _self_expressed(random, n_clusters, sparsity, seed)
        drawn.append((_ranks(random, labels, energy, whole), _own(made_of, labels)))
    results = {
        "ranks": Result(
            ranks.name, ranks.value, {**ranks.nulls, "random rows": samples(pair[0] for pair in drawn)}, tail="less"
        ),
        "own": Result(
            "share of a row's coefficients at rows of its own cluster",
            _own(coefficients, cluster),
            {"random rows": samples(pair[1] for pair in drawn)},
        ),
    }
    return SubspaceClusters(results, used, cluster, coefficients)


def _self_expressed(unit: Tensor, k: int, sparsity: int, seed: int) -> tuple[Tensor, Any]:
    used, values = _matching_pursuit(unit @ unit.T, sparsity)
    row, slot = (values != 0).nonzero(as_tuple=True)
    entries = (values[row, slot].numpy(), (row.numpy(), used[row, slot].numpy()))
    coefficients = coo_array(entries, shape=(len(unit), len(unit))).tocsr()
    affinity = (abs(coefficients) + abs(coefficients).T).tocsr()
    scale = diags_array(1 / np.sqrt(np.maximum(np.asarray(affinity.sum(0)).ravel(), 1e-12)))
    start = np.random.default_rng(seed).standard_normal(len(unit))
    _, vectors = eigsh(scale @ affinity @ scale, k=k, which="LA", v0=start)
    return _kmeans(normalize(torch.from_numpy(vectors.copy()), dim=1), k, seed), coefficients


def _matching_pursuit(gram: Tensor, sparsity: int) -> tuple[Tensor, Tensor]:
    """For each row the others that make it up, greedily, and their coefficients: ``[n, sparsity]`` each, unused ones 0.

    All rows at a time, which scikit-learn's does not offer for rows that must not choose themselves.
    """
    n = len(gram)
    used = torch.zeros(n, sparsity, dtype=torch.int64)
    values = gram.new_zeros(n, sparsity)
    pending = torch.arange(n)  # rows that are not made up yet
    for step in range(sparsity):
        left = gram[pending].clone()
        for slot in range(step):
            left -= values[pending, slot, None] * gram[used[pending, slot]]
        left[torch.arange(len(pending)), pending] = 0
        used[pending, step] = left.abs().argmax(1)
        chosen = used[pending, : step + 1]
        target = gram[pending[:, None], chosen]
        among = gram[chosen[:, :, None], chosen[:, None, :]] + _ROUNDING * torch.eye(step + 1, dtype=gram.dtype)
        fitted = torch.linalg.solve(among, target)
        values[pending, : step + 1] = fitted
        pending = pending[1 - (fitted * target).sum(1) > _MADE_UP]
    return used, values


def _own(coefficients: Any, cluster: Tensor) -> float:
    made = coefficients.tocoo()
    labels, size = cluster.numpy(), np.abs(made.data)
    return float(size[labels[made.row] == labels[made.col]].sum() / size.sum())


def _ranks(rows: Tensor, clusters: Tensor, energy: float, whole: int | None = None) -> float:
    """Sum of the clusters' ranks over `whole`, by default the rank of all rows."""
    each = sum(_rank(rows[clusters == label], energy) for label in clusters.unique())
    return each / (whole or _rank(rows, energy))


def _rank(rows: Tensor, energy: float) -> int:
    """Fewest leading directions with this share of the squared length."""
    values = torch.linalg.svdvals(rows).square().cumsum(0)
    return int((values < energy * values[-1]).sum()) + 1 if values[-1] > 0 else 0


# Capacity


@dataclass(frozen=True, eq=False)
class Capacity(Results):
    """What :func:`capacity` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``recall`` and ``fvu`` of two spaces of d / 2, beside features assigned to them at random, and one space of d as
        a control.
    recall, fvu : dict of str to Tensor [n_seeds] float64
        For each arrangement: ``one``, ``two`` and ``two, at random``.
    """

    results: dict[str, Result]
    recall: dict[str, Tensor]
    fvu: dict[str, Tensor]


@torch.no_grad()
def capacity(
    d: int = 32,
    n_features: int = 256,
    k: int = 3,
    *,
    exclusive: float = 1.0,
    tokens: int = 2048,
    seeds: int = 5,
    trained: int = 0,
    seed: int = 0,
) -> Capacity:
    """Whether features of two groups are better kept in one space of d dimensions or in two of d / 2.

    A token has `k` features with strengths uniform in 0.5 … 1.5, all of one group with probability `exclusive` and of
    any group otherwise. Their directions are random in all of R^d (*one*), or each group's in a half of its own
    (*two*). ``recall`` is the share of a token's features among the k largest positive products with the directions,
    which the read-out knows. With `trained` steps also ``fvu``, what the toy model ``ReLU(W Wᵀ a + b)`` leaves of the
    strengths a after training, in which a feature's row of W has the dimensions of its space only.

    Null: *features assigned at random*, a half of them to each space without regard to their group. It asks whether
    matching the groups is worth anything; the control, *one space*, whether two spaces are.

    Parameters
    ----------
    d : int
        Dimensions, an even number.
    n_features : int
        Features, an even number: a half in each group.
    k : int
        Features of a token; at most those of a group.
    exclusive : float
        Share of tokens with features of one group only.
    tokens : int
        Fresh tokens for each seed.
    seeds : int
        Draws of everything. Values are their means; nulls and controls have a sample each.
    trained : int
        Steps of training of the toy model; 0 leaves it out.
    seed : int
        The first of the seeds.

    Raises
    ------
    ValueError
        For odd or small sizes and numbers out of range.

    References
    ----------
    Elhage et al., *Toy models of superposition* (arXiv 2209.10652), for the trained one.
    """
    if d < 2 or d % 2 or n_features < 2 or n_features % 2:
        raise ValueError(f"d and n_features must be even and at least 2, got {d} and {n_features}")
    if not 1 <= k <= n_features // 2:
        raise ValueError(f"k must be in 1 … {n_features // 2}, the features of a group, got {k}")
    if not 0 <= exclusive <= 1:
        raise ValueError(f"exclusive must be in 0 … 1, got {exclusive}")
    if tokens < 1 or seeds < 1 or trained < 0:
        raise ValueError(
            f"tokens and seeds must be at least 1 and trained not negative, got {tokens}, {seeds}, {trained}"
        )
    names = ("one", "two", "two, at random")
    recall: dict[str, list[float]] = {name: [] for name in names}
    fvu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(seed, seed + seeds):
        generator = torch.Generator().manual_seed(number)
        group = torch.arange(n_features) % 2
        masks = {
            "one": torch.ones(n_features, d),
            "two": _halves(group, d),
            "two, at random": _halves(group[torch.randperm(n_features, generator=generator)], d),
        }
        active, strength = _groups(tokens, n_features, k, exclusive, generator)
        for name, mask in masks.items():
            rows = normalize(torch.randn(n_features, d, generator=generator) * mask, dim=1)
            x = (strength[:, :, None] * rows[active]).sum(1)
            found = sk.topk_encode(x, rows, None, k)
            hit = (found.indices[:, :, None] == active[:, None]) & (found.values > 0)[:, :, None]
            recall[name].append(float(hit.sum() / active.numel()))
            if trained:
                fvu[name].append(_toy_model(mask, k, exclusive, trained, generator))
    results = {}
    for key, title, column, tail in (
        ("recall", "share of a token's features found in two spaces of half the dimensions", recall, "greater"),
        ("fvu", "FVU of the features' strengths in two spaces of half the dimensions", fvu, "less"),
    ):
        if column["one"]:
            results[key] = Result(
                title,
                sum(column["two"]) / seeds,
                {"features assigned at random": samples(column["two, at random"])},
                {"one space": samples(column["one"])},
                tail=tail,
            )
    return Capacity(
        results,
        {name: samples(numbers) for name, numbers in recall.items()},
        {name: samples(numbers) for name, numbers in fvu.items() if numbers},
    )


def _halves(group: Tensor, d: int) -> Tensor:
    """Ones where a feature's half of the dimensions is: ``[n_features, d]``."""
    return (group[:, None] == (torch.arange(d) >= d // 2)).float()


def _groups(
    tokens: int, n_features: int, k: int, exclusive: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features of each token ``[tokens, k]``, of the groups even and odd, and their strengths."""
    priority = torch.rand(tokens, n_features, generator=generator)
    group = torch.randint(2, (tokens, 1), generator=generator)
    single = torch.rand(tokens, 1, generator=generator) < exclusive
    other = torch.arange(n_features) % 2 != group
    active = (priority - (single & other).float()).topk(k, dim=1).indices
    return active, 0.5 + torch.rand(tokens, k, generator=generator)


def _toy_model(mask: Tensor, k: int, exclusive: float, steps: int, generator: torch.Generator) -> float:
    """FVU of ReLU(W Wᵀ a + b) on fresh tokens, after training W, of which only what `mask` has is used."""
    n_features, d = mask.shape

    def batch(n: int) -> Tensor:
        active, strength = _groups(n, n_features, k, exclusive, generator)
        return torch.zeros(n, n_features).scatter_(1, active, strength)

    def error(a: Tensor) -> Tensor:
        W = weight * mask
        return (torch.relu(a @ W @ W.T + bias) - a).square().sum()

    with torch.enable_grad():
        weight = (torch.randn(n_features, d, generator=generator) / math.sqrt(d)).requires_grad_()
        bias = torch.zeros(n_features, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            (error(batch(512)) / 512).backward()
            optimizer.step()
            schedule.step()
    a = batch(4096)
    return float(error(a) / (a - a.mean(0)).square().sum())


# Small parts


def _check_n_null(n_null: int) -> None:
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")


def _finite(name: str, rows: Tensor) -> Tensor:
    if rows.dim() != 2 or not rows.numel() or not rows.isfinite().all():
        raise ValueError(f"{name} must be finite rows [n, d], at least one, got shape {tuple(rows.shape)}")
    return rows.detach().float().cpu()

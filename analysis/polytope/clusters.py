"""Groups of samples by the bits that their codes have in common, and whether codes tell classes apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.nulls import permuted
from sparsekern.analysis.polytope.codes import PolytopeCodes
from sparsekern.analysis.results import Result, Results, null_generator, samples
from sparsekern.bits import pack_bits, unpack_bits

try:
    from sklearn.cluster import HDBSCAN, AgglomerativeClustering
    from sklearn.metrics import adjusted_mutual_info_score, pairwise_distances, silhouette_score
except ImportError as error:
    raise ImportError("this analysis needs scikit-learn: pip install 'sparsekern[analysis]'") from error

METHODS = ("hdbscan", "agglomerative")
METRICS = ("hamming", "jaccard")
NOISE = -1

_ENTRIES = 2**22  # unpacked bits that are permuted at a time
_MOST = 20_000  # samples of which all distances are taken


@dataclass(frozen=True, eq=False)
class Clusters(Results):
    """What :func:`cluster_codes` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``clustered``: share of the samples in a cluster. ``silhouette``: of these samples by these clusters; NaN with
        fewer than two. With labels ``purity``, the monosemanticity of the clusters: share of the clustered samples that
        have the most frequent label of their cluster; and ``ami`` with the labels, all samples without a cluster taken
        for one.
    clusters : Tensor [N] int64
        From 0; −1 for samples without a cluster.
    purities : Tensor [n_clusters] float64
        Of each cluster; empty without labels.
    """

    results: dict[str, Result]
    clusters: Tensor
    purities: Tensor

    @property
    def sizes(self) -> Tensor:
        """Samples of each cluster: ``[n_clusters]`` int64."""
        return torch.bincount(self.clusters[self.clusters != NOISE])


def cluster_codes(
    codes: PolytopeCodes,
    labels: Tensor | None = None,
    method: str = "hdbscan",
    metric: str = "hamming",
    *,
    n_clusters: int | None = None,
    min_cluster_size: int = 10,
    linkage: str = "average",
    most: int = 5000,
    n_null: int = 100,
    n_refit: int = 3,
    seed: int = 0,
) -> Clusters:
    """Cluster samples by distances of their codes.

    All distances of `most` random samples are taken, which takes most² numbers. Where there are more samples, each of
    the others has the cluster of the nearest of these.

    Parameters
    ----------
    codes : PolytopeCodes
        Of kind "sign" or "gate".
    labels : Tensor [N] of ints or None
        Classes of the samples.
    method : {"hdbscan", "agglomerative"}
        HDBSCAN finds the number of clusters and leaves samples out; the other joins the nearest clusters.
    metric : {"hamming", "jaccard"}
        Share of the units that differ; one less the units that are on in both over those that are on in either.
    n_clusters : int or None
        Of the agglomerative method: how many; by default as many as labels.
    min_cluster_size : int
        Of HDBSCAN.
    linkage : {"average", "complete", "single"}
        Of the agglomerative method.
    most : int
        Samples that are clustered.
    n_null : int
        Samples of the nulls of purity and AMI: labels permuted.
    n_refit : int
        Samples of the null of the others, each a clustering: every unit permuted over the samples.
    seed : int
        Determines samples and nulls.

    Raises
    ------
    ValueError
        For codes of kind "soft", labels that do not fit, unknown names, no number of clusters, and numbers out of
        range.

    References
    ----------
    Black et al., *Interpreting neural networks through the polytope lens* (arXiv 2211.12312); Campello et al. (2013)
    for HDBSCAN.
    """
    _check_bits(codes)
    for name, value, known in (("method", method, METHODS), ("metric", metric, METRICS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if labels is not None:
        labels = _check_labels(labels, len(codes))
    if method == "agglomerative" and n_clusters is None:
        if labels is None:
            raise ValueError("n_clusters must be given for the agglomerative method without labels")
        n_clusters = len(labels.unique())
    if not 2 <= most <= _MOST or len(codes) < 2:
        raise ValueError(f"most must be in 2 … {_MOST} and codes at least 2, got {most} and {len(codes)}")
    if min_cluster_size < 2 or min(n_null, n_refit) < 0:
        raise ValueError(
            "min_cluster_size must be at least 2, n_null and n_refit not negative, "
            f"got {min_cluster_size}, {n_null} and {n_refit}"
        )
    generator = null_generator(seed)
    near = torch.randperm(len(codes), generator=generator)[:most].sort().values
    data = codes.data[near].contiguous()
    if n_clusters is not None and not 1 <= n_clusters <= len(data):
        raise ValueError(f"n_clusters must be in 1 … {len(data)}, got {n_clusters}")

    def grouped(rows: Tensor) -> tuple[np.ndarray, tuple[float, float]]:
        distances = _bit_distances(rows, codes.n_units, metric)
        if method == "hdbscan":
            least = min(min_cluster_size, len(rows))
            found = HDBSCAN(min_cluster_size=least, metric="precomputed", copy=True).fit_predict(distances)
        else:
            found = AgglomerativeClustering(n_clusters, metric="precomputed", linkage=linkage).fit_predict(distances)
        kept = found != NOISE
        return found, (float(kept.mean()), _silhouette(distances[kept][:, kept], found[kept]))

    found, values = grouped(data)
    drawn = [grouped(_mixed(data, codes.n_units, generator))[1] for _ in range(n_refit)]
    clusters = torch.from_numpy(found).long()
    if len(codes) > len(data):
        nearest = sk.bit_neighbors(codes.data, data, 1, metric).indices[:, 0].long()
        nearest[near] = torch.arange(len(data))  # of two equal samples each has its own cluster
        clusters = clusters[nearest]
    names = {"clustered": "share of samples in a cluster", "silhouette": "silhouette of the clusters"}
    results = {
        key: Result(name, values[i], {"units permuted, clustered again": samples(some[i] for some in drawn)})
        for i, (key, name) in enumerate(names.items())
    }
    purities = torch.empty(0, dtype=torch.float64)
    if labels is not None:
        permuted = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(n_null)]
        purity, purities = _purity(clusters, labels)
        results["purity"] = Result(
            "share of clustered samples with the label of their cluster",
            purity,
            {"labels permuted": samples(_purity(clusters, some)[0] for some in permuted)},
        )
        results["ami"] = Result(
            "AMI of clusters and labels",
            _ami(labels, clusters),
            {"labels permuted": samples(_ami(some, clusters) for some in permuted)},
        )
    return Clusters(results, clusters, purities)


@dataclass(frozen=True, eq=False)
class DistanceComparison(Results):
    """What :func:`compare_distances` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``"measure, distance"`` for every pair of them: ``knn``, the share of samples that have the label of most of
        their nearest neighbours; ``silhouette`` of the labels; ``ami`` of the labels with as many clusters by average
        linkage.
    distances : tuple of str
    """

    results: dict[str, Result]
    distances: tuple[str, ...]

    def table(self) -> dict[str, dict[str, float]]:
        """Values by distance and measure."""
        measures = ("knn", "silhouette", "ami")
        return {name: {key: self.results[f"{key}, {name}"].value for key in measures} for name in self.distances}


def compare_distances(
    codes: PolytopeCodes,
    x: Mapping[str, Tensor],
    labels: Tensor,
    *,
    neighbors: int = 5,
    n_null: int = 20,
    seed: int = 0,
) -> DistanceComparison:
    """Whether labels are told apart by distances of codes, and by those of activations.

    Distances: Hamming and Jaccard of codes; L2 and cosine of everything in `x`, whose values are the controls of those
    of the codes. Null: labels permuted. Takes N² numbers.

    Parameters
    ----------
    codes : PolytopeCodes
        Of kind "sign" or "gate", at most 20,000 samples.
    x : mapping of str to Tensor [N, d]
        What they are compared with, such as the net's input and its activations.
    labels : Tensor [N] of ints
        At least two classes.
    neighbors : int
        Of a sample, itself not among them. Of labels that are as frequent, the smallest counts.
    n_null : int
        Samples of the null.
    seed : int
        Determines it.

    Raises
    ------
    ValueError
        For codes of kind "soft", shapes that do not fit, one class only, numbers that are not finite or out of range.
    """
    _check_bits(codes)
    n = len(codes)
    labels = _check_labels(labels, n)
    classes, labels = labels.unique(return_inverse=True)
    if not 2 <= len(classes) < n <= _MOST:
        raise ValueError(
            f"labels must be two classes at least, of more samples, {_MOST} at most, got {len(classes)}, {n}"
        )
    if not 1 <= neighbors < n or n_null < 0:
        raise ValueError(f"neighbors must be in 1 … {n - 1} and n_null not negative, got {neighbors} and {n_null}")
    for name, rows in x.items():
        if len(rows) != n or rows.dim() != 2 or not rows.isfinite().all():
            raise ValueError(f"x[{name!r}] must be [{n}, d] and finite, got {tuple(rows.shape)}")
    generator = null_generator(seed)
    permuted = [labels[torch.randperm(n, generator=generator)] for _ in range(n_null)]
    found: dict[str, tuple[list[float], list[list[float]]]] = {}

    def measure(name: str, distances: np.ndarray) -> None:
        apart = torch.from_numpy(distances.copy()).fill_diagonal_(torch.inf)
        nearest = apart.sort(dim=1, stable=True).indices[:, :neighbors]
        joined = AgglomerativeClustering(len(classes), metric="precomputed", linkage="average").fit_predict(distances)
        clusters = torch.from_numpy(joined)

        def values(some: Tensor) -> list[float]:
            voted = torch.nn.functional.one_hot(some[nearest], len(classes)).sum(1).argmax(1)
            return [float((voted == some).double().mean()), _silhouette(distances, some.numpy()), _ami(some, clusters)]

        found[name] = values(labels), [values(some) for some in permuted]

    for metric in METRICS:
        measure(f"{metric} of codes", _bit_distances(codes.data.contiguous(), codes.n_units, metric))
    for name, rows in x.items():
        for metric in ("l2", "cosine"):
            given = rows.detach().cpu().double().numpy()
            distances = pairwise_distances(given, metric={"l2": "euclidean"}.get(metric, metric))
            np.fill_diagonal(distances, 0)
            measure(f"{metric} of {name}", distances)
    titles = {
        "knn": f"accuracy of {neighbors} nearest neighbours",
        "silhouette": "silhouette of the labels",
        "ami": "AMI of the labels with as many clusters",
    }
    rivals = [name for name in found if not name.endswith(" of codes")]
    results = {
        f"{key}, {name}": Result(
            f"{title}, {name}",
            values[i],
            {"labels permuted": samples(some[i] for some in drawn)},
            {} if name in rivals else {other: samples([found[other][0][i]]) for other in rivals},
        )
        for i, (key, title) in enumerate(titles.items())
        for name, (values, drawn) in found.items()
    }
    return DistanceComparison(results, tuple(found))


def _bit_distances(data: Tensor, n_units: int, metric: str) -> np.ndarray:
    distances = sk.bit_distances(data, None, metric).double()
    return (distances / max(1, n_units) if metric == "hamming" else distances).numpy()


def _mixed(data: Tensor, n_units: int, generator: torch.Generator) -> Tensor:
    """Packed codes with every unit permuted over the samples."""
    step = max(1, _ENTRIES // (8 * len(data)))
    parts = []
    for start in range(0, data.shape[1], step):
        some = data[:, start : start + step]
        flags = unpack_bits(some, min(8 * some.shape[1], n_units - 8 * start))
        parts.append(pack_bits(permuted(flags, 0, generator)))
    return torch.cat(parts, 1)


def _silhouette(distances: np.ndarray, groups: np.ndarray) -> float:
    """NaN unless there are at least two groups, and fewer than samples."""
    if not 2 <= len(np.unique(groups)) < len(groups):
        return float("nan")
    return float(silhouette_score(distances, groups, metric="precomputed"))


def _purity(clusters: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Share of clustered samples with the most frequent label of their cluster; and that of each cluster."""
    kept = clusters != NOISE
    if not kept.any():
        return float("nan"), torch.empty(0, dtype=torch.float64)
    _, of_sample = labels.unique(return_inverse=True)
    table = torch.zeros(int(clusters.max()) + 1, int(of_sample.max()) + 1, dtype=torch.float64)
    table.index_put_((clusters[kept], of_sample[kept]), torch.ones(1, dtype=torch.float64), accumulate=True)
    most = table.amax(1)
    return float(most.sum() / kept.sum()), most / table.sum(1)


def _ami(labels: Tensor, clusters: Tensor) -> float:
    return float(adjusted_mutual_info_score(labels.numpy(), clusters.numpy()))


def _check_bits(codes: PolytopeCodes) -> None:
    if codes.kind == "soft":
        raise ValueError("codes must be of bits, kind 'sign' or 'gate', got kind 'soft'")


def _check_labels(labels: Tensor, n: int) -> Tensor:
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"labels must be {n} whole numbers, got {tuple(labels.shape)} {labels.dtype}")
    return labels.cpu().long()

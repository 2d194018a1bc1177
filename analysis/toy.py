"""Made data whose features are known: what an analysis must find when it is there to be found.

A generator has its true directions as ``features`` ``[n_features, d]`` and
``sample(n, generator) -> (activations [n, n_features], x [n, d])``, with ``x = activations @ features`` plus noise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_TURNS = 64


class SubspaceClusters:
    """Clusters of features in orthogonal subspaces; a token has features of one cluster only.

    The case that a mixture of experts is made for: an expert a cluster, and nothing is lost. The features of a cluster
    are orthonormal bases of its subspace, more of them than its dimension, each turned about the cluster's axis such
    that every feature has the same cosine ``dim ** -0.5`` with that axis. So the axes, as rows of a linear router,
    separate the clusters; with bases in any position half of all draws of 16 features in 8 dimensions would leave no
    linear router that does (Cover 1965).

    Parameters
    ----------
    d : int
        Width of the activations, at least ``clusters * dim``.
    clusters : int
        Number of clusters, all equally frequent.
    dim : int
        Dimensions of each subspace, at least 2.
    features : int
        Features of each cluster.
    active : int
        Features of a token, without repeats, with strengths uniform in 0.5 … 1.5.
    noise : float
        Standard deviation of each coordinate's noise.
    generator : torch.Generator or None
        For the directions.

    Attributes
    ----------
    features : Tensor [clusters * features, d]
        True directions, of unit norm.
    cluster_of : Tensor [clusters * features] int64
        Cluster of each feature.
    axes : Tensor [clusters, d]
        Axis of each cluster.

    References
    ----------
    Cover, *Geometrical and statistical properties of systems of linear inequalities* (1965), for the half.
    """

    def __init__(
        self,
        d: int = 32,
        clusters: int = 4,
        dim: int = 8,
        features: int = 16,
        active: int = 2,
        noise: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, number, least in (("clusters", clusters, 1), ("dim", dim, 2), ("features", features, 1)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if d < clusters * dim:
            raise ValueError(f"d must be at least clusters * dim = {clusters * dim}, to hold the subspaces, got {d}")
        if not 1 <= active <= features:
            raise ValueError(f"active must be in 1 … features={features}, got {active}")
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.d, self.clusters, self.active, self.noise = d, clusters, active, noise
        bases = _rotation(d, generator)[: clusters * dim].view(clusters, dim, d)
        self.axes = bases[:, 0]
        self.features = torch.cat([_around_axis(basis, features, generator) for basis in bases])
        self.cluster_of = torch.arange(clusters).repeat_interleave(features)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: ``(activations [n, clusters * features], x [n, d])``."""
        per_cluster = len(self.features) // self.clusters
        cluster = torch.randint(self.clusters, (n,), generator=generator)
        chosen = torch.rand(n, per_cluster, generator=generator).topk(self.active, dim=1).indices
        strength = 0.5 + torch.rand(n, self.active, generator=generator)
        columns = cluster[:, None] * per_cluster + chosen
        activations = torch.zeros(n, len(self.features)).scatter_(1, columns, strength)
        return activations, activations @ self.features + self.noise * torch.randn(n, self.d, generator=generator)

    def clusters_of(self, activations: Tensor) -> Tensor:
        """Cluster of each token ``[n]`` int64, from its true activations."""
        return self.cluster_of[activations.argmax(1)]


def _rotation(d: int, generator: torch.Generator | None) -> Tensor:
    """A random orthonormal basis of ``d`` dimensions, as rows."""
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0].T.float()


def _around_axis(basis: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` unit rows in the span of `basis` ``[dim, d]``, all with the cosine ``dim ** -0.5`` to its first row.

    Each `dim` of them are orthonormal: the standard basis, in coordinates where the axis is its diagonal, and then the
    same after random rotations that leave the axis where it is.
    """
    dim = len(basis)
    # The reflection that swaps the first coordinate with the diagonal: its rows are a basis around the first one.
    normal = torch.full((dim,), dim**-0.5) - one_hot(torch.tensor(0), dim)
    frame = torch.eye(dim) - 2 * torch.outer(normal, normal) / normal.square().sum()
    rows = frame @ basis
    while len(rows) < count:
        # Of some random turns the one that keeps the features apart: two at a cosine of .95 would be one to an SAE.
        turns = [torch.block_diag(torch.ones(1, 1), _rotation(dim - 1, generator)) for _ in range(_TURNS)]
        drawn = [frame @ turn @ basis for turn in turns]
        rows = torch.cat([rows, min(drawn, key=lambda new: float((new @ rows.T).abs().max()))])
    return rows[:count]

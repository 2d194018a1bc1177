"""Generators of made data whose features are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from sparsekern.data.synthetic import zipf_draws

_TURNS = 64


class Toy(Protocol):
    """What a generator has."""

    d: int
    features: Tensor

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: true activations and `x`."""


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


class ZipfFeatures:
    """More features than dimensions, few of them frequent and many rare: random directions with Zipf's frequencies.

    Parameters
    ----------
    features : int
        How many.
    d : int
        Width of the activations.
    active : int
        Draws of a feature for each token, with replacement, with strengths uniform in 0.5 … 1.5; repeats add up.
    exponent : float
        The r-th feature is drawn in proportion to ``r ** -exponent``.
    noise : float
        Standard deviation of each coordinate's noise.
    generator : torch.Generator or None
        For the directions.

    Attributes
    ----------
    features : Tensor [features, d]
        True directions, of unit norm, most frequent first.
    true_l0 : float
        Mean number of active features: 5.44 with the defaults.
    """

    def __init__(
        self,
        features: int = 256,
        d: int = 64,
        active: int = 6,
        exponent: float = 1.0,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, number in (("features", features), ("d", d), ("active", active)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not exponent >= 0 or not noise >= 0:
            raise ValueError(f"exponent and noise must not be negative, got {exponent} and {noise}")
        self.d, self.active, self.exponent, self.noise = d, active, exponent, noise
        self.features = normalize(torch.randn(features, d, generator=generator), dim=1)
        weight = torch.arange(1, features + 1, dtype=torch.float64) ** -exponent
        self.true_l0 = float((1 - (1 - weight / weight.sum()) ** active).sum())

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: ``(activations [n, features], x [n, d])``."""
        chosen = zipf_draws(n * self.active, len(self.features), self.exponent, generator).view(n, self.active)
        strength = 0.5 + torch.rand(n, self.active, generator=generator)
        activations = torch.zeros(n, len(self.features)).scatter_add_(1, chosen, strength)
        return activations, activations @ self.features + self.noise * torch.randn(n, self.d, generator=generator)


def _check_magnitudes(mean: float, std: float) -> None:
    if not mean > 0 or not std >= 0:
        raise ValueError(f"magnitude_mean must be above 0 and magnitude_std not negative, got {mean} and {std}")


@dataclass(frozen=True)
class Node:
    """A node of a tree of features: it can be active only where its parent is.

    Parameters
    ----------
    active_prob : float
        Probability of being active where the parent is. Among mutually exclusive siblings, a weight.
    children : sequence of Node
        Those that need this one.
    mutually_exclusive_children : bool
        Whether exactly one of the children is active where this node is. One that is not read out stands for none.
    is_read_out : bool
        Whether the node is a feature. Others only gate their children.
    magnitude_mean, magnitude_std : float
        Of the activation where the node is active: normal, with negative draws set to 0.
    """

    active_prob: float
    children: Sequence[Node] = ()
    mutually_exclusive_children: bool = False
    is_read_out: bool = True
    magnitude_mean: float = 1.0
    magnitude_std: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.active_prob <= 1:
            raise ValueError(f"active_prob must be in 0 … 1, got {self.active_prob}")
        _check_magnitudes(self.magnitude_mean, self.magnitude_std)
        weights = [child.active_prob for child in self.children]
        if self.mutually_exclusive_children and (len(weights) < 2 or sum(weights) == 0):
            raise ValueError(f"mutually exclusive children must be two at least, not all of weight 0, got {weights}")

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> Node:
        """A tree from nested mappings with these parameters as keys, as in Nabeshima's ``tree.json``."""
        unknown = sorted(spec.keys() - {field.name for field in fields(cls)})
        if unknown or "active_prob" not in spec:
            raise ValueError(f"a node must have an active_prob and no unknown keys, got {sorted(spec)}")
        return cls(**{**spec, "children": tuple(cls.from_dict(child) for child in spec.get("children", ()))})

    def child_probs(self) -> list[float]:
        """Probability of each child where this node is active."""
        weights = [child.active_prob for child in self.children]
        return [weight / sum(weights) for weight in weights] if self.mutually_exclusive_children else weights


PARENT_AND_CHILD = Node(1.0, [Node(0.25, [Node(0.2)])], is_read_out=False)
"""The smallest tree: a parent on a quarter of the tokens, and its child on a fifth of those."""

TWENTY_FEATURES = Node(
    1.0,
    [
        *[Node(0.15, [*[Node(0.2)] * 3, Node(0.4, is_read_out=False)], mutually_exclusive_children=True)] * 3,
        *[Node(0.05)] * 8,
    ],
    is_read_out=False,
)
"""Nabeshima's tree: three parents, each with three children of which at most one is active, and eight single ones."""


class TreeFeatures:
    """Features of which some need others: orthonormal directions, active as a tree says.

    Where a child is active so is its parent, and an SAE can save a latent on such tokens if that of the child writes
    both: absorption.

    Parameters
    ----------
    tree : Node
        Its read-out nodes are the features, parents before their children.
    d : int or None
        Width of the activations, at least the number of features, and that by default.
    generator : torch.Generator or None
        For the directions.

    Attributes
    ----------
    features : Tensor [n_features, d]
        True directions, orthonormal.
    parent_of : Tensor [n_features] int64
        The nearest feature above each; −1 for none.
    density : Tensor [n_features] float64
        Probability that each is active.
    true_l0 : float
        Mean number of active features: 1.12 for :data:`TWENTY_FEATURES`.
    length : float
        Root mean square length of `x` about its mean.

    References
    ----------
    Nabeshima, *Matryoshka sparse autoencoders* (2024), and its code (noanabeshima/matryoshka-saes); Chanin et al.,
    *Feature hedging* (arXiv 2505.11756), for the magnitudes.
    """

    def __init__(
        self, tree: Node = TWENTY_FEATURES, d: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        found = list(_walk(tree, tree.active_prob, -1, 0))
        if not found:
            raise ValueError("tree must have at least one node that is read out")
        self.tree, self.d = tree, len(found) if d is None else d
        self.features = _orthonormal(self.d, len(found), generator)
        self.parent_of = torch.tensor([parent for _, _, parent in found])
        self.density = torch.tensor([density for _, density, _ in found], dtype=torch.float64)
        self.true_l0 = float(self.density.sum())
        mean = torch.tensor([node.magnitude_mean for node, _, _ in found], dtype=torch.float64)
        std = torch.tensor([node.magnitude_std for node, _, _ in found], dtype=torch.float64)
        self.length = float((self.density * (mean**2 + std**2) - (self.density * mean) ** 2).sum().sqrt())
        self._magnitudes = mean.float(), std.float()

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: ``(activations [n, n_features], x [n, d])``."""
        active: list[Tensor] = []
        _fill(self.tree, torch.rand(n, generator=generator) < self.tree.active_prob, active, generator)
        activations = _with_magnitudes(torch.stack(active, 1), *self._magnitudes, generator)
        return activations, activations @ self.features


class CopulaFeatures:
    """Features that are active together more or less often than by chance: a Gaussian copula.

    Feature i is active where the i-th of some correlated standard normal numbers is above ``Φ⁻¹(1 − p_i)``.

    Parameters
    ----------
    p : Tensor [n_features]
        Probability that each is active, above 0 and below 1.
    correlation : Tensor [n_features, n_features]
        Of the normal numbers: symmetric, 1 on the diagonal. Activity correlates less. Where no normal numbers can have
        it, because it has negative eigenvalues, these are set to 0 and the diagonal back to 1.
    d : int
        Width of the activations, at least the number of features.
    magnitude_mean, magnitude_std : float
        Of the activation where a feature is active: normal, with negative draws set to 0.
    generator : torch.Generator or None
        For the directions.

    Attributes
    ----------
    features : Tensor [n_features, d]
        True directions, orthonormal.
    correlation : Tensor [n_features, n_features] float64
        The one in use.
    density : Tensor [n_features] float64
        Probability that each is active.
    true_l0 : float
        Mean number of active features.

    References
    ----------
    Chanin and Garriga-Alonso, *Sparse but wrong* (arXiv 2508.16560), and its code (chanind/sparse-but-wrong-paper).
    """

    def __init__(
        self,
        p: Tensor,
        correlation: Tensor,
        d: int = 20,
        magnitude_mean: float = 1.0,
        magnitude_std: float = 0.15,
        generator: torch.Generator | None = None,
    ) -> None:
        p, correlation = p.double(), correlation.double()
        if p.dim() != 1 or not len(p) or not ((p > 0) & (p < 1)).all():
            raise ValueError(f"p must be a vector of numbers above 0 and below 1, got {p.tolist()}")
        if correlation.shape != (len(p), len(p)):
            raise ValueError(f"correlation must have shape {(len(p), len(p))}, got {tuple(correlation.shape)}")
        is_correlation = (correlation == correlation.T).all() and (correlation.abs() <= 1).all()
        if not is_correlation or not (correlation.diagonal() == 1).all():
            raise ValueError("correlation must be symmetric, of numbers in −1 … 1, with 1 on the diagonal")
        _check_magnitudes(magnitude_mean, magnitude_std)
        self.d, self.density, self.true_l0 = d, p, float(p.sum())
        self.features = _orthonormal(d, len(p), generator)
        values, vectors = torch.linalg.eigh(correlation)
        root = vectors * values.clamp(min=0).sqrt()
        self._root = normalize(root, dim=1)  # rows of unit norm: variances of 1
        self.correlation = self._root @ self._root.T
        self._least = torch.special.ndtri(1 - p)
        self._magnitudes = torch.tensor(magnitude_mean), torch.tensor(magnitude_std)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: ``(activations [n, n_features], x [n, d])``."""
        normal = torch.randn(n, len(self.density), generator=generator, dtype=torch.float64) @ self._root.T
        activations = _with_magnitudes(normal > self._least, *self._magnitudes, generator)
        return activations, activations @ self.features


class ContextTopics:
    """A token has one of J contexts and one of I topics, each drawn evenly: ``x = C_j + T_i``.

    A latent may stand for a topic, for a context, or for a topic in a context, such as topology in mathematics.

    Parameters
    ----------
    topics, contexts : int
        I and J.
    d : int or None
        Width of the activations, at least ``topics + contexts``, and that by default.
    magnitude : float
        Of both activations.
    generator : torch.Generator or None
        For the directions.

    Attributes
    ----------
    features : Tensor [topics + contexts, d]
        True directions, orthonormal: topics first.
    true_l0 : int
        Active features of a token: 2.
    length : float
        Root mean square length of `x` about its mean.
    """

    true_l0 = 2

    def __init__(
        self,
        topics: int = 4,
        contexts: int = 2,
        d: int | None = None,
        magnitude: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, number in (("topics", topics), ("contexts", contexts)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        _check_magnitudes(magnitude, 0)
        self.topics, self.contexts, self.magnitude = topics, contexts, magnitude
        self.d = topics + contexts if d is None else d
        self.features = _orthonormal(self.d, topics + contexts, generator)
        self.length = magnitude * (2 - 1 / topics - 1 / contexts) ** 0.5

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: ``(activations [n, topics + contexts], x [n, d])``."""
        topic = torch.randint(self.topics, (n,), generator=generator)
        context = torch.randint(self.contexts, (n,), generator=generator)
        activations = torch.zeros(n, self.topics + self.contexts)
        activations.scatter_(1, torch.stack([topic, self.topics + context], 1), self.magnitude)
        return activations, activations @ self.features

    def dictionary(
        self, noise: float = 0.0, distractor: float = 0.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder rows of two SAEs in which every context splits into its topics.

        Parameters
        ----------
        noise : float
            Length, about, of a random vector that is added to each child.
        distractor : float
            Standard deviation of the component, drawn for each child, along one direction that all share.
        generator : torch.Generator or None
            For both.

        Returns
        -------
        tuple of Tensor
            Parents ``[contexts, d]``; children ``[contexts, topics, d]``, not of unit norm; the distractor ``[d]``.
        """
        if noise < 0 or distractor < 0:
            raise ValueError(f"noise and distractor must not be negative, got {noise} and {distractor}")
        if self.d <= self.topics + self.contexts:
            raise ValueError(f"d must be above topics + contexts = {self.topics + self.contexts}, got {self.d}")
        topics, parents = self.features[: self.topics], self.features[self.topics :]
        draw = torch.randn(self.d, generator=generator)
        direction = normalize(draw - draw @ self.features.T @ self.features, dim=0)
        shape = (self.contexts, self.topics)
        children = parents[:, None] + topics + noise / self.d**0.5 * torch.randn(*shape, self.d, generator=generator)
        children = children + distractor * torch.randn(*shape, 1, generator=generator) * direction
        return parents, children, direction


class ManifoldFeatures:
    """Tokens spread evenly over a manifold, or over a few of its points.

    Parameters
    ----------
    kind : {"circle", "torus", "sphere"}
        In 2, 4 or 3 dimensions; every token has length 1 before noise. The torus is that of two circles.
    points : int or None
        So many points instead of all: on a circle evenly spaced, else drawn at random. Features that are related, yet
        finitely many.
    d : int or None
        Width of the activations, by default the dimensions of the manifold's space.
    noise : float
        Standard deviation of each coordinate's noise.
    generator : torch.Generator or None
        For directions and points.

    Attributes
    ----------
    features : Tensor [n_features, d]
        The points, of which each token has one at the activation 1; without points orthonormal axes, and activations
        are coordinates, of either sign.
    axes : Tensor [2, 4 or 3, d]
        The orthonormal axes.
    length : float
        Root mean square length of `x` about the manifold's centre, which is that of all its tokens.

    References
    ----------
    Michaud, Gorton and McGrath, *Understanding sparse autoencoder scaling in the presence of feature manifolds* (arXiv
    2509.02565), for the question.
    """

    def __init__(
        self,
        kind: str = "circle",
        points: int | None = None,
        d: int | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if kind not in _DIMENSIONS:
            raise ValueError(f"kind must be one of {', '.join(_DIMENSIONS)}, got {kind!r}")
        if points is not None and points < 1:
            raise ValueError(f"points must be at least 1, got {points}")
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        dimensions = _DIMENSIONS[kind]
        self.kind, self.points, self.noise = kind, points, noise
        self.d = dimensions if d is None else d
        self.length = (1 + self.d * noise**2) ** 0.5
        self.axes = _orthonormal(self.d, dimensions, generator)
        if points is None:
            self.features = self.axes
        elif kind == "circle":
            self.features = _on_circle(torch.arange(points) / points) @ self.axes
        else:
            self.features = self._drawn(points, generator) @ self.axes

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: ``(activations [n, n_features], x [n, d])``."""
        if self.points is None:
            activations = self._drawn(n, generator)
        else:
            activations = one_hot(torch.randint(self.points, (n,), generator=generator), self.points).float()
        return activations, activations @ self.features + self.noise * torch.randn(n, self.d, generator=generator)

    def _drawn(self, n: int, generator: torch.Generator | None) -> Tensor:
        """`n` places of the manifold, in coordinates of its axes."""
        if self.kind == "sphere":
            return normalize(torch.randn(n, 3, generator=generator), dim=1)
        circles = _DIMENSIONS[self.kind] // 2
        return _on_circle(torch.rand(n, circles, generator=generator)).flatten(1) / circles**0.5


_DIMENSIONS = {"circle": 2, "torus": 4, "sphere": 3}


def _on_circle(turns: Tensor) -> Tensor:
    """Points of the unit circle, ``[..., 2]``."""
    angle = 2 * torch.pi * turns
    return torch.stack([angle.cos(), angle.sin()], -1)


def _with_magnitudes(active: Tensor, mean: Tensor, std: Tensor, generator: torch.Generator | None) -> Tensor:
    """Activations ``[n, n_features]`` of what is `active`."""
    return active * (mean + std * torch.randn(active.shape, generator=generator)).clamp(min=0)


def _walk(node: Node, density: float, parent: int, index: int) -> Iterator[tuple[Node, float, int]]:
    """The read-out nodes in order, with their densities and the index of the feature above; `index` is the next."""
    if node.is_read_out:
        yield node, density, parent
        parent, index = index, index + 1
    for child, prob in zip(node.children, node.child_probs(), strict=True):
        for found in _walk(child, density * prob, parent, index):
            yield found
            index += 1


def _fill(node: Node, active: Tensor, columns: list[Tensor], generator: torch.Generator | None) -> None:
    """Append what is active of each read-out node, in the order of :func:`_walk`."""
    if node.is_read_out:
        columns.append(active)
    if node.mutually_exclusive_children:
        weights = torch.tensor(node.child_probs())
        chosen = torch.multinomial(weights, len(active), replacement=True, generator=generator)
    for index, child in enumerate(node.children):
        if node.mutually_exclusive_children:
            on = chosen == index
        else:
            on = torch.rand(len(active), generator=generator) < child.active_prob
        _fill(child, active & on, columns, generator)


def _orthonormal(d: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` random orthonormal rows of `d` dimensions."""
    if d < count:
        raise ValueError(f"d must be at least the number of features, {count}, for orthonormal ones, got {d}")
    return _rotation(d, generator)[:count]


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

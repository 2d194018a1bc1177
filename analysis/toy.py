"""Made data whose features are known: what an analysis must find when it is there to be found.

A generator has its true directions as ``features`` ``[n_features, d]`` and
``sample(n, generator) -> (activations [n, n_features], x [n, d])``, with ``x = activations @ features`` plus noise.
:func:`ground_truth_scores` says which of them an SAE has found; the experiments at the end train SAEs on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

import sparsekern as sk
from sparsekern.analysis.results import Result, null_generator, samples
from sparsekern.data.synthetic import zipf_draws
from sparsekern.modules import Activation

try:
    from scipy.optimize import linear_sum_assignment
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

_TURNS = 64
_MEASURED = 8192  # fresh tokens of an experiment
_PENALTY = 0.03  # of Chanin's toys, in ‖x − x̂‖² + penalty · ‖z‖₁


class Toy(Protocol):
    """What a generator has."""

    d: int
    features: Tensor

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: true activations and `x`."""


# Generators


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


# What an SAE has found


@dataclass(frozen=True, eq=False)
class GroundTruthScores:
    """What :func:`ground_truth_scores` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``decoder_match`` and ``encoder_match``, and what the experiment adds.
    latent_of : Tensor [n_features] int64
        The latent of each feature; −1 where there are fewer latents than features.
    decoder, encoder : Tensor [n_features, n_features]
        Cosines of the decoder's and the encoder's row of the latent of a feature (the row of the table) with all
        features (its columns); NaN where it has none.
    """

    results: dict[str, Result]
    latent_of: Tensor
    decoder: Tensor
    encoder: Tensor


@torch.no_grad()
def ground_truth_scores(sae: sk.SAE, features: Tensor, n_null: int = 100, seed: int = 0) -> GroundTruthScores:
    """Match latents with the true features, and tell how well.

    One latent a feature, such that the sum of the cosines of their decoder and encoder rows with the features is
    largest. Both count, because absorption turns the decoder's row of the child towards the parent, and the encoder's
    row of the parent away from the child: by either alone the two could change places.

    Parameters
    ----------
    sae : SAE
        One that reconstructs what it reads.
    features : Tensor [n_features, d_in]
        True directions, of any norm but 0.
    n_null : int
        Random dictionaries: directions as many as latents, the same for encoder and decoder, matched in the same way.
    seed : int
        Determines the null.

    Raises
    ------
    ValueError
        For an SAE without one row of `d_in` numbers a latent in both weights, and for features that are none.
    """
    shape = (sae.d_sae, sae.d_in)
    if not sae.W_enc.shape == sae.W_dec.shape == shape:
        raise ValueError(f"sae must have weights of shape {shape}, got {sae.W_enc.shape} and {sae.W_dec.shape}")
    if features.dim() != 2 or not len(features) or features.shape[1] != sae.d_in:
        raise ValueError(f"features must have shape [n_features, {sae.d_in}], got {tuple(features.shape)}")
    norms = features.norm(dim=1)
    if not (norms.isfinite() & (norms > 0)).all():
        raise ValueError("features must be finite rows of a norm above 0")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    unit = normalize(features.float(), dim=1)
    latent_of, decoder, encoder = _match(sae.W_dec, sae.W_enc, unit)
    random = [_match(rows, rows, unit)[1] for rows in _random_dictionaries(sae, n_null, seed)]
    null = {"random dictionary": samples(_mean_of(cosines.diagonal()) for cosines in random)}
    results = {
        "decoder_match": Result("cosine of decoder rows with their features", _mean_of(decoder.diagonal()), null),
        "encoder_match": Result("cosine of encoder rows with their features", _mean_of(encoder.diagonal()), null),
    }
    return GroundTruthScores(results, latent_of, decoder, encoder)


@dataclass(frozen=True, eq=False)
class AbsorptionScores(GroundTruthScores):
    """What :func:`absorption_scores` returns.

    Attributes
    ----------
    pairs : Tensor [n_pairs, 2] int64
        Parent and child.
    silent : Tensor [n_pairs, 2]
        On what share of the tokens the parent's latent is silent: where parent and child are active; where the parent
        is, with no child. NaN where there are no such tokens, or no such latent.
    """

    pairs: Tensor
    silent: Tensor


@torch.no_grad()
def absorption_scores(
    sae: sk.SAE,
    toy: TreeFeatures,
    activations: Tensor,
    x: Tensor,
    n_null: int = 100,
    seed: int = 0,
) -> AbsorptionScores:
    """Whether latents of children have absorbed their parents.

    Beside :func:`ground_truth_scores`, means over all pairs of a parent and its child:

    ``holes``
        How much more often the parent's latent is silent where the child is active than where no child is. Null: the
        tokens that have the child drawn anew among both kinds.
    ``parent_encoder``
        Cosine of the encoder's row of the parent's latent with the child's direction: negative where it is told not to
        fire on the child. Null: random dictionaries.
    ``child_decoder``
        Cosine of the decoder's row of the child's latent with the parent's direction: positive where it writes both.
        Null: random dictionaries.

    Parameters
    ----------
    sae : SAE
        In evaluation mode, as it is to be judged.
    toy : TreeFeatures
        With at least one child.
    activations, x : Tensor [B, n_features], [B, d]
        What ``toy.sample`` gave.
    n_null : int
        Samples of each null.
    seed : int
        Determines the nulls.

    References
    ----------
    Chanin et al., *A is for absorption* (arXiv 2409.14507); Chanin, *Toy models of feature absorption in SAEs* (2024).
    """
    child = (toy.parent_of >= 0).nonzero().squeeze(1)
    if not len(child):
        raise ValueError("toy must have a feature whose parent is a feature")
    truth = ground_truth_scores(sae, toy.features, n_null, seed)
    pairs = torch.stack([toy.parent_of[child], child], 1)
    fires = torch.cat([sae.encode(part).to_dense() > 0 for part in x.split(_MEASURED)])
    active = activations > 0
    generator = torch.Generator().manual_seed(seed)
    silent = torch.full((len(pairs), 2), torch.nan)
    permuted = torch.full((n_null, len(pairs)), torch.nan)
    for row, (parent, child_of_it) in enumerate(pairs.tolist()):
        latent = truth.latent_of[parent]
        has_child = active[:, child_of_it]
        alone = active[:, parent] & ~active[:, toy.parent_of == parent].any(1)
        if latent < 0 or not has_child.any() or not alone.any():
            continue
        off = (~fires[has_child | alone, latent]).float()
        labels = has_child[has_child | alone]
        silent[row, 0], silent[row, 1] = off[labels].mean(), off[~labels].mean()
        for sample in range(n_null):
            drawn = labels[torch.randperm(len(labels), generator=generator)]
            permuted[sample, row] = off[drawn].mean() - off[~drawn].mean()
    random = [_match(rows, rows, toy.features)[1] for rows in _random_dictionaries(sae, n_null, seed)]
    parent, child = pairs.unbind(1)
    results = {
        **truth.results,
        "holes": Result(
            "silence of parents' latents where the child is active, less that where none is",
            _mean_of(silent[:, 0] - silent[:, 1]),
            {"child's tokens drawn anew": samples(_mean_of(sample) for sample in permuted)},
        ),
        "parent_encoder": Result(
            "cosine of the parent's encoder row with the child",
            _mean_of(truth.encoder[parent, child]),
            {"random dictionary": samples(_mean_of(cosines[parent, child]) for cosines in random)},
            tail="less",
        ),
        "child_decoder": Result(
            "cosine of the child's decoder row with the parent",
            _mean_of(truth.decoder[child, parent]),
            {"random dictionary": samples(_mean_of(cosines[child, parent]) for cosines in random)},
        ),
    }
    return AbsorptionScores(results, truth.latent_of, truth.decoder, truth.encoder, pairs, silent)


def _match(decoder: Tensor, encoder: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The latent of each feature, and both tables of cosines, in the order of the features."""
    decoder, encoder = (normalize(rows.detach().cpu().float(), dim=1) @ unit.T for rows in (decoder, encoder))
    latents, matched = linear_sum_assignment((decoder + encoder).numpy(), maximize=True)
    latent_of = torch.full((len(unit),), -1)
    latent_of[torch.from_numpy(matched)] = torch.from_numpy(latents)
    unmatched = (latent_of < 0)[:, None]
    decoder, encoder = (cosines[latent_of].masked_fill(unmatched, torch.nan) for cosines in (decoder, encoder))
    return latent_of, decoder, encoder


def _random_dictionaries(sae: sk.SAE, count: int, seed: int) -> Iterator[Tensor]:
    """Weights ``[d_sae, d_in]`` of random directions."""
    generator = null_generator(seed)
    return (torch.randn(sae.d_sae, sae.d_in, generator=generator) for _ in range(count))


def _mean_of(numbers: Tensor) -> float:
    """Mean of those that are defined."""
    return float(numbers.nanmean())


# Experiments

Scores = TypeVar("Scores", bound=GroundTruthScores)


@dataclass(frozen=True, eq=False)
class PlantedRun(Generic[Scores]):
    """A training on made data, measured on 8,192 fresh tokens.

    Attributes
    ----------
    sae : SAE
        In evaluation mode.
    toy : Toy
        What made the data.
    scores : GroundTruthScores
        What was found.
    fvu, l0 : float
    """

    sae: sk.SAE
    toy: Toy
    scores: Scores
    fvu: float
    l0: float


def absorption(
    seed: int = 0,
    *,
    tree: Node = PARENT_AND_CHILD,
    d: int = 50,
    activation: Activation | None = None,
    matryoshka: bool = False,
    start: str = "features",
    steps: int = 1000,
    lr: float = 1e-2,
    batch_size: int = 256,
    n_null: int = 100,
    **options: Any,
) -> PlantedRun[AbsorptionScores]:
    """Train an SAE with a latent for each feature of a tree: does the child's latent absorb the parent?

    Parameters
    ----------
    seed : int
        Determines directions, weights, tokens and nulls.
    tree, d
        Those of :class:`TreeFeatures`.
    activation : Activation or None
        By default ReLU with the L1 penalty of the published toys: 0.03 beside a squared error.
    matryoshka : bool
        Whether the SAE is a :class:`sparsekern.MatryoshkaSAE`.
    start : {"features", "random"}
        Where the weights start. At the true features what becomes of them is the loss's doing: it is no matter of which
        minimum training falls into.
    steps, lr, batch_size
        Of the training.
    n_null : int
        Samples of each null.
    **options
        Those of the SAE: ``tied``, ``prefixes`` …

    References
    ----------
    Chanin et al., *Feature hedging* (arXiv 2505.11756); Nabeshima, *Matryoshka sparse autoencoders* (2024).
    """
    generator = torch.Generator().manual_seed(seed)
    toy = TreeFeatures(tree, d, generator)
    if activation is None:
        # This loss is the published one over the variance, its activations in units of the length.
        activation = sk.ReLU(_PENALTY / toy.length, start_l0=1)
    kind = sk.MatryoshkaSAE if matryoshka else sk.SAE
    sae = kind(toy.d, len(toy.features), activation, generator=generator, **options)
    _train(sae, toy, start, steps, lr, batch_size, generator)
    activations, x = toy.sample(_MEASURED, generator)
    scores = absorption_scores(sae, toy, activations, x, n_null, seed)
    found = sk.evaluate(sae, [x])
    return PlantedRun(sae, toy, scores, found.fvu, found.l0)


def wrong_l0(
    seed: int = 0,
    *,
    k: float = 1.8,
    correlation: float = 0.4,
    start: str = "features",
    steps: int = 400,
    lr: float = 1e-2,
    batch_size: int = 256,
    n_null: int = 100,
) -> PlantedRun[GroundTruthScores]:
    """Train a BatchTopK SAE on five features, two of them active on average: what does it learn at another k?

    The four features after the first, f0, are independent of each other; each is active together with f0 more or less
    often than by chance. With fewer latents a token than there are features it pays to write some of f0 with each.
    Beside :func:`ground_truth_scores`, ``f0_in_others``: the mean cosine of the other features' decoder rows with f0.
    Nulls: another of the four in the place of f0 (four samples), and random dictionaries.

    Parameters
    ----------
    seed : int
        Determines directions, weights, tokens and nulls.
    k : float
        Latents a token, on average; 2 is the true number.
    correlation : float
        Of the normal numbers behind f0 with those behind the others, −0.5 … 0.5.
    start : {"features", "random"}
        Where the weights start.
    steps, lr, batch_size
        Of the training.
    n_null : int
        Random dictionaries.

    References
    ----------
    Chanin and Garriga-Alonso, *Sparse but wrong* (arXiv 2508.16560), and its code: small_toy_model_experiments.
    """
    if not abs(correlation) <= 0.5:
        raise ValueError(f"correlation must be in −0.5 … 0.5, which all four can have with f0, got {correlation}")
    generator = torch.Generator().manual_seed(seed)
    between = torch.eye(5)
    between[0, 1:] = between[1:, 0] = correlation
    toy = CopulaFeatures(torch.full((5,), 0.4), between, generator=generator)
    sae = sk.SAE(toy.d, len(toy.features), sk.BatchTopK(k), generator=generator)
    _train(sae, toy, start, steps, lr, batch_size, generator)
    scores = ground_truth_scores(sae, toy.features, n_null, seed)
    random = [_match(rows, rows, toy.features)[1] for rows in _random_dictionaries(sae, n_null, seed)]
    scores.results["f0_in_others"] = Result(
        "cosine of the others' decoder rows with f0",
        _mean_in_others(scores.decoder, 0),
        {
            "another in the place of f0": samples(_mean_in_others(scores.decoder, other) for other in range(1, 5)),
            "random dictionary": samples(_mean_in_others(cosines, 0) for cosines in random),
        },
        tail="greater" if correlation >= 0 else "less",
    )
    found = sk.evaluate(sae, [toy.sample(_MEASURED, generator)[1]])
    return PlantedRun(sae, toy, scores, found.fvu, found.l0)


def _mean_in_others(cosines: Tensor, feature: int) -> float:
    """Mean over the rows of the others of the four, and of no f0, of their cosines with `feature`."""
    rows = [row for row in range(1, len(cosines)) if row != feature]
    return _mean_of(cosines[rows, feature])


def _train(
    sae: sk.SAE, toy: Toy, start: str, steps: int, lr: float, batch_size: int, generator: torch.Generator
) -> None:
    if start not in ("features", "random"):
        raise ValueError(f"start must be features or random, got {start!r}")
    if start == "features":
        with torch.no_grad():
            for weight in sae.latent_weights():
                weight.copy_(toy.features)
    trainer = sk.Trainer(sae, lr=lr, steps=steps, fit_start=start == "random")
    for _ in range(steps):
        trainer.step(toy.sample(batch_size, generator)[1])
    sae.eval()

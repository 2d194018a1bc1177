"""Experiments: SAEs trained on made data, and what became of the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

import sparsekern as sk
from sparsekern.analysis.results import Result, samples
from sparsekern.analysis.toy.generators import PARENT_AND_CHILD, CopulaFeatures, Node, Toy, TreeFeatures
from sparsekern.analysis.toy.scores import (
    AbsorptionScores,
    GroundTruthScores,
    absorption_scores,
    ground_truth_scores,
    hedging_rate,
    match,
    mean_of,
    random_dictionaries,
)
from sparsekern.modules import Activation

_MEASURED = 8192  # fresh tokens of an experiment
_PENALTY = 0.03  # of Chanin's toys, in ‖x − x̂‖² + penalty · ‖z‖₁

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
    random = [match(rows, rows, toy.features)[1] for rows in random_dictionaries(sae, n_null, seed)]
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


@dataclass(frozen=True, eq=False)
class HedgingRun(PlantedRun[GroundTruthScores]):
    """What :func:`hedging` returns; `sae` has one latent.

    Attributes
    ----------
    decoder, b_dec : Tensor [2]
        The latent's decoder row and ``b_dec``, along the first feature (the parent) and the second (the child).
    extended : SAE
        Trained on with a second latent.
    """

    decoder: torch.Tensor
    b_dec: torch.Tensor
    extended: sk.SAE


def hedging(
    seed: int = 0,
    *,
    hierarchical: bool = True,
    parent: float = 0.25,
    child: float = 0.2,
    d: int = 10,
    l1: float = _PENALTY,
    steps: int = 300,
    lr: float = 1e-2,
    batch_size: int = 256,
    n_null: int = 100,
) -> HedgingRun:
    """Train one latent on two features: does it take up the second where that needs the first?

    A latent that fires on the parent lowers the error by writing the child too, as often as that comes with it. Where
    the features are independent it gains nothing, and ``b_dec`` takes up the mean of the child, which is equally
    frequent in both cases. Then the SAE is trained on twice, as it is and with a second latent, for
    :func:`hedging_rate`.

    Beside :func:`ground_truth_scores`: ``child_in_latent``, cosine of the decoder's row with the child's direction;
    null: that of the row that fits the latent's code by least squares with the child on other tokens; control: of a
    code that is the parent's activation. ``child_in_bias``, product of ``b_dec`` with the child's direction; null:
    random directions; control: the child's mean. ``hedging_rate``.

    Parameters
    ----------
    seed : int
        Determines directions, tokens and nulls.
    hierarchical : bool
        Whether the child needs the parent.
    parent, child : float
        P(parent) and P(child | parent); the independent child has the probability of both.
    d : int
        Width of the activations.
    l1 : float
        λ beside a squared error.
    steps, lr, batch_size
        Of each training. The first latent starts at the parent's direction, the second at the child's.
    n_null : int
        Samples of each null.

    References
    ----------
    Chanin et al., *Feature hedging* (arXiv 2505.11756), section 3.
    """
    generator = torch.Generator().manual_seed(seed)
    both = [Node(parent, [Node(child)])] if hierarchical else [Node(parent), Node(parent * child)]
    toy = TreeFeatures(Node(1.0, both, is_read_out=False), d, generator)
    activation = sk.ReLU(l1 / toy.length, start_l0=1)
    sae = sk.SAE(d, 1, activation, generator=generator)
    with torch.no_grad():
        for weight in sae.latent_weights():
            weight.copy_(toy.features[:1])
    _train(sae, toy, None, steps, lr, batch_size, generator)
    control, extended = sk.SAE(d, 1, activation), sk.SAE(d, 2, activation, generator=generator)
    control.load_state_dict(sae.state_dict())
    with torch.no_grad():
        for old, new in zip(sae.parameters(), extended.parameters(), strict=True):
            new[: len(old)] = old
        for weight in extended.latent_weights():
            weight[1] = toy.features[1]
    for other in (control, extended):
        _train(other, toy, None, steps, lr, batch_size, generator)
    decoder, b_dec = sae.W_dec.detach()[0] @ toy.features.T, sae.b_dec.detach() @ toy.features.T
    scores = ground_truth_scores(sae, toy.features, n_null, seed)
    activations, x = toy.sample(_MEASURED, generator)
    code = sae.encode(x).to_dense().detach()[:, 0]
    code = code - code.mean()
    on_parent = code @ activations[:, 0]
    orders = (torch.randperm(_MEASURED, generator=generator) for _ in range(n_null))
    slopes = [code @ activations[order, 1] / on_parent for order in orders]
    expected = child / (1 + child**2) ** 0.5 if hierarchical else 0.0
    random = torch.nn.functional.normalize(torch.randn(n_null, d, generator=generator), dim=1)
    scores.results.update(
        {
            "child_in_latent": Result(
                "cosine of the latent's decoder row with the child",
                float(torch.nn.functional.normalize(sae.W_dec.detach()[0], dim=0) @ toy.features[1]),
                {"child's tokens permuted": samples(float(slope / (1 + slope**2) ** 0.5) for slope in slopes)},
                {"P(child | parent) alone": samples([expected])},
            ),
            "child_in_bias": Result(
                "b_dec along the child",
                float(b_dec[1]),
                {"random directions": (random @ sae.b_dec.detach()).double()},
                {"the child's mean": toy.density[1:]},
            ),
            "hedging_rate": hedging_rate(control, extended, n_null, seed),
        }
    )
    found = sk.evaluate(sae, [x])
    return HedgingRun(sae, toy, scores, found.fvu, found.l0, decoder, b_dec, extended)


def _mean_in_others(cosines: torch.Tensor, feature: int) -> float:
    """Mean over the rows of the others of the four, and of no f0, of their cosines with `feature`."""
    rows = [row for row in range(1, len(cosines)) if row != feature]
    return mean_of(cosines[rows, feature])


def _train(
    sae: sk.SAE, toy: Toy, start: str | None, steps: int, lr: float, batch_size: int, generator: torch.Generator
) -> None:
    if start not in ("features", "random", None):  # None: the weights are set
        raise ValueError(f"start must be features or random, got {start!r}")
    if start == "features":
        with torch.no_grad():
            for weight in sae.latent_weights():
                weight.copy_(toy.features)
    trainer = sk.Trainer(sae, lr=lr, steps=steps, fit_start=start == "random")
    for _ in range(steps):
        trainer.step(toy.sample(batch_size, generator)[1])
    sae.eval()

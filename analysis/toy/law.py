"""When splitting pays: a law for topics in contexts, and what SAEs of that loss do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.results import Result, Results, new_axes, samples
from sparsekern.analysis.toy.generators import ContextTopics

_MEASURED = 2048
_PURE, _MIXED = 0.85, 0.5  # cosines of a pure latent with its feature, and of a composite with both
_KINDS = ("topic", "context", "composite")


@dataclass(frozen=True)
class Prediction:
    """What :func:`predicted_split` returns.

    Attributes
    ----------
    loss : float
        The least ``‖x − x̂‖² + λ ‖z‖₁`` a token, or ``‖x − x̂‖²`` with k latents a token.
    least, most : int
        Latents of a topic in a context, over the dictionaries that reach it.
    """

    loss: float
    least: int
    most: int


def predicted_split(
    topics: int, contexts: int, width: int, l1: float | None = None, k: int | None = None, magnitude: float = 1.0
) -> Prediction:
    """The best dictionary of topics, contexts and topics in contexts for ``x = C_j + T_i``: the splitting law.

    A latent along a component of length m costs ``m² − max(0, m − λ / 2)²`` where it is needed: its price and the error
    of the code that it shrinks. So a pair by two latents of length a costs twice what they cost, by one of its own that
    of ``√2 a``: for small λ 2 a λ against √2 a λ, and splitting saves 0.586 a λ a token. It takes one latent a pair. A
    latent of length m is worth having for λ < 2 m only. With k latents a token and no price, a pair costs 0 as soon as
    its own latent or, for k ≥ 2, both of its parts are there. All numbers of each kind are tried; no other dictionaries
    are.

    Parameters
    ----------
    topics, contexts : int
        I and J.
    width : int
        Latents.
    l1 : float or None
        λ, beside a squared error; decoder rows of unit norm.
    k : int or None
        Latents a token, without a penalty. One of the two must be given.
    magnitude : float
        a, of both parts.

    References
    ----------
    A derivation of this project.
    """
    if (l1 is None) == (k is None):
        raise ValueError("give either l1 or k")
    if width < 1 or (k is not None and k < 1) or (l1 is not None and not l1 >= 0):
        raise ValueError(f"width and k must be at least 1 and l1 not negative, got {width}, {k} and {l1}")

    def cost(length: float, count: int, missing: float) -> float:
        """Of `count` latents along components of that length, and of what is not written."""
        if l1 is None:
            assert k is not None
            return missing + max(0, count - k) * length**2
        return missing + count * (length**2 - max(0.0, length - l1 / 2) ** 2)

    a = magnitude
    split, whole = cost(2**0.5 * a, 1, 0), 2 * a**2
    by_parts = (whole, min(cost(a, 1, a**2), whole), min(cost(a, 2, 0), cost(a, 1, a**2), whole))
    found = []
    for pure_topics, pure_contexts in product(range(min(topics, width) + 1), range(contexts + 1)):
        left = width - pure_topics - pure_contexts
        if left < 0:
            continue
        both = pure_topics * pure_contexts
        one = pure_topics * (contexts - pure_contexts) + pure_contexts * (topics - pure_topics)
        counts = (topics * contexts - both - one, one, both)
        costs = sorted((c for c, n in zip(by_parts, counts, strict=True) for _ in range(n)), reverse=True)
        for composites in range(min(left, len(costs)) + 1):
            total = composites * split + sum(costs[composites:])
            found.append((total / len(costs), composites))
    least = min(loss for loss, _ in found)
    best = [composites for loss, composites in found if loss <= least + 1e-9]
    return Prediction(least, min(best), max(best))


@dataclass(frozen=True, eq=False)
class SplittingLaw(Results):
    """What :func:`splitting_law` returns: a row for each penalty, a column for each width.

    Attributes
    ----------
    results : dict of str to Result
        ``loss``: relative excess of the loss over the predicted one, a mean over the cells; ``composites``: distance of
        the number of composite latents from the predicted ones, a mean over the cells.
    penalties : list of str
    widths : list of int
    counts : Tensor [n_penalties, n_widths, 3] int64
        Alive latents of one topic, of one context, and of both.
    loss, predicted_loss : Tensor [n_penalties, n_widths]
        ``‖x − x̂‖² + λ ‖z‖₁`` a token.
    predicted : Tensor [n_penalties, n_widths, 2] int64
        Least and largest number of composites among the best dictionaries.
    """

    results: dict[str, Result]
    penalties: list[str]
    widths: list[int]
    counts: Tensor
    loss: Tensor
    predicted_loss: Tensor
    predicted: Tensor

    def to_records(self) -> list[dict[str, Any]]:
        """One plain dict for each cell."""
        return [
            {
                "penalty": penalty,
                "width": width,
                **dict(zip(_KINDS, self.counts[row, column].tolist(), strict=True)),
                "predicted": tuple(self.predicted[row, column].tolist()),
                "loss": float(self.loss[row, column]),
                "predicted_loss": float(self.predicted_loss[row, column]),
            }
            for row, penalty in enumerate(self.penalties)
            for column, width in enumerate(self.widths)
        ]

    def plot(self, axes: Any = None) -> Any:
        """Composite latents by width: measured as dots, the law as lines, or as bands where it leaves a choice."""
        axes = new_axes() if axes is None else axes
        at = torch.arange(len(self.widths))
        for row, penalty in enumerate(self.penalties):
            beside = (at + 0.1 * (row - (len(self.penalties) - 1) / 2)).tolist()  # dots would hide each other
            least, most = self.predicted[row].T.tolist()
            axes.fill_between(at.tolist(), least, most, color=f"C{row}", alpha=0.12, lw=0)
            axes.plot(at.tolist(), most, color=f"C{row}", lw=1)
            axes.plot(beside, self.counts[row, :, 2].tolist(), "o", color=f"C{row}", label=penalty)
        axes.set_xticks(at.tolist(), self.widths)
        axes.set(xlabel="latents", ylabel="those that stand for a pair")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return axes


def splitting_law(
    seed: int = 0,
    *,
    topics: int = 4,
    contexts: int = 2,
    magnitude: float = 1.0,
    widths: Sequence[int] = (6, 8, 10, 16),
    l1: Sequence[float] = (0.02, 0.1, 0.8),
    k: Sequence[int] = (1, 2),
    start: str = "dictionaries",
    n_starts: int = 3,
    bias: bool = False,
    steps: int = 300,
    lr: float = 1e-2,
    batch_size: int = 64,
    n_null: int = 100,
) -> SplittingLaw:
    """Train SAEs on topics in contexts over widths and penalties, and hold what they learn against the splitting law.

    A latent is pure where its decoder row has a cosine above 0.85 with a topic or a context, and composite where it has
    cosines above 0.5 with one of each. Of several trainings a cell the one of the lowest loss counts.

    Parameters
    ----------
    seed : int
        Determines directions, weights, tokens and nulls.
    topics, contexts, magnitude
        Those of :class:`ContextTopics`.
    widths : sequence of int
        Numbers of latents.
    l1 : sequence of float
        λ of ``‖x − x̂‖² + λ ‖z‖₁``, a ReLU SAE each.
    k : sequence of int
        Latents a token, a TopK SAE each.
    start : {"dictionaries", "random"}
        Two trainings, from topics and contexts first and from composites first, or `n_starts` from random rows. The
        first tells which dictionary the loss prefers, the second which of them training finds.
    n_starts : int
        See `start`.
    bias : bool
        Whether ``b_dec`` is trained. The law has none, and with one a context can be left out.
    steps, lr, batch_size
        Of each training.
    n_null : int
        Samples of each null: what was measured permuted among the cells.
    """
    if start not in ("dictionaries", "random"):
        raise ValueError(f"start must be dictionaries or random, got {start!r}")
    if not widths or not (l1 or k):
        raise ValueError("widths must not be empty, nor l1 and k both")
    generator = torch.Generator().manual_seed(seed)
    toy = ContextTopics(topics, contexts, magnitude=magnitude, generator=generator)
    penalties: list[dict[str, Any]] = [{"l1": value} for value in l1] + [{"k": value} for value in k]
    starts = ["pure", "composite"] if start == "dictionaries" else ["random"] * n_starts
    shape = (len(penalties), len(widths))
    counts, loss = torch.zeros(*shape, 3, dtype=torch.int64), torch.zeros(shape)
    predicted, predicted_loss = torch.zeros(*shape, 2, dtype=torch.int64), torch.zeros(shape)
    for row, penalty in enumerate(penalties):
        for column, width in enumerate(widths):
            trained = [_cell(toy, width, penalty, kind, bias, steps, lr, batch_size, generator) for kind in starts]
            loss[row, column], counts[row, column] = min(trained, key=lambda cell: cell[0])
            law = predicted_split(topics, contexts, width, **penalty, magnitude=magnitude)
            predicted_loss[row, column] = law.loss
            predicted[row, column] = torch.tensor([law.least, law.most])
    scale = 2 * magnitude**2

    def off(composites: Tensor) -> float:
        return float(
            ((predicted[..., 0] - composites).clamp(min=0) + (composites - predicted[..., 1]).clamp(min=0))
            .double()
            .mean()
        )

    def permuted(cells: Tensor) -> Tensor:
        return cells.flatten()[torch.randperm(cells.numel(), generator=generator)].view(shape)

    results = {
        "loss": Result(
            "distance of the loss from the law's, in squared lengths of a token",
            float((loss - predicted_loss).abs().mean() / scale),
            {
                "cells permuted": samples(
                    float((permuted(loss) - predicted_loss).abs().mean() / scale) for _ in range(n_null)
                )
            },
            tail="less",
        ),
        "composites": Result(
            "distance of the number of composite latents from the law's",
            off(counts[..., 2]),
            {"cells permuted": samples(off(permuted(counts[..., 2])) for _ in range(n_null))},
            tail="less",
        ),
    }
    names = [*(f"λ = {value:g}" for value in l1), *(f"TopK {value}" for value in k)]
    return SplittingLaw(results, names, list(widths), counts, loss, predicted_loss, predicted)


def _cell(
    toy: ContextTopics,
    width: int,
    penalty: dict[str, Any],
    start: str,
    bias: bool,
    steps: int,
    lr: float,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[float, Tensor]:
    """Loss in the units of the law, and numbers of pure and composite latents, of one training."""
    activation = (
        sk.TopK(penalty["k"]) if "k" in penalty else sk.ReLU(penalty["l1"] / toy.length, start_l0=max(2, width // 2))
    )
    # Dead latents of a TopK come back after ten batches, which a run this short would else not see.
    sae = sk.SAE(toy.d, width, activation, dead_after=10 * batch_size, aux_k=2, generator=generator)
    sae.b_dec.requires_grad_(bias)
    if start != "random":
        _plant_(sae, toy, start == "composite")
    trainer = sk.Trainer(sae, lr=lr, steps=steps, fit_start=start == "random", b_dec_init="mean" if bias else "zeros")
    for _ in range(steps):
        trainer.step(toy.sample(batch_size, generator)[1])
    sae.eval()
    with torch.no_grad():
        out = sae.loss(toy.sample(_MEASURED, generator)[1])
        alive = out.codes.firing_counts() > 0
        cosines = normalize(sae.W_dec, dim=1) @ toy.features.T
    of_topic, of_context = cosines[:, : toy.topics].amax(1), cosines[:, toy.topics :].amax(1)
    kinds = [of_topic > _PURE, of_context > _PURE, (of_topic > _MIXED) & (of_context > _MIXED)]
    return float(out.total) * toy.length**2, torch.stack([(kind & alive).sum() for kind in kinds])


@torch.no_grad()
def _plant_(sae: sk.SAE, toy: ContextTopics, composites_first: bool) -> None:
    """Start at topics and contexts, then their composites, or the other way round; what is left stays random."""
    topics, contexts = toy.features[: toy.topics], toy.features[toy.topics :]
    pairs = (contexts[:, None] + topics).flatten(0, 1) / 2**0.5
    # A composite must not fire for half of it: its encoder row is twice as long, with a bias that takes half off again.
    bias = torch.full((len(pairs),), -(2**0.5) * toy.magnitude)
    pure, mixed = (toy.features, toy.features, torch.zeros(len(toy.features))), (pairs, 2 * pairs, bias)
    order = (mixed, pure) if composites_first else (pure, mixed)
    decoder, encoder, biases = (torch.cat(parts)[: sae.d_sae] for parts in zip(*order, strict=True))
    sae.W_dec[: len(decoder)], sae.W_enc[: len(encoder)] = decoder, encoder
    sae.b_enc[: len(biases)] = biases

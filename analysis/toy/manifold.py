"""A manifold, or many related features: what the loss of wider and wider SAEs tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.results import Result, Results, new_axes, samples
from sparsekern.analysis.toy.generators import ManifoldFeatures

try:
    from sklearn.cluster import KMeans
except ImportError as error:
    raise ImportError("this analysis needs scikit-learn: pip install 'sparsekern[analysis]'") from error

_TOKENS = 4096  # for the start, and to measure
_KNEE = 0.1


@dataclass(frozen=True, eq=False)
class ManifoldOrFinite(Results):
    """What :func:`manifold_or_finite` returns; rows of the tensors are the points, then the whole manifold.

    Attributes
    ----------
    results : dict of str to Result
        ``left``: at as many latents as points, what is left of the excess that the narrowest SAE has over the least
        possible loss.
    widths : list of int
    loss : Tensor [2, n_widths]
        ``‖x − x̂‖² + λ ‖z‖₁`` a token of length 1.
    floor : float
        The least possible: a latent for every token, ``λ − λ² / 4``.
    alive : Tensor [2, n_widths] int64
    l0 : Tensor [2, n_widths]
    """

    results: dict[str, Result]
    widths: list[int]
    loss: Tensor
    floor: float
    alive: Tensor
    l0: Tensor

    def knees(self) -> tuple[int | None, int | None]:
        """For points and manifold the first width with less than a tenth of the first one's excess loss, if any."""
        excess = self.loss - self.floor
        below = excess < _KNEE * excess[:, :1]
        first, second = (
            next((w for w, low in zip(self.widths, row, strict=True) if low), None) for row in below.tolist()
        )
        return first, second

    def plot(self, axes: Any = None) -> Any:
        """Loss by width."""
        axes = new_axes() if axes is None else axes
        for row, name in enumerate(("points", "whole manifold")):
            axes.plot(self.widths, self.loss[row].tolist(), "o-", color=f"C{row}", label=name)
        axes.axhline(self.floor, color="0.45", ls="--", lw=1, label="least possible")
        axes.set_xticks(self.widths, self.widths)
        axes.set(xlabel="latents", ylabel="loss")
        axes.legend(frameon=False)
        return axes


def manifold_or_finite(
    seed: int = 0,
    *,
    kind: str = "circle",
    points: int = 12,
    widths: Sequence[int] = (4, 8, 12, 16, 24),
    l1: float = 0.1,
    steps: int = 150,
    lr: float = 3e-3,
    batch_size: int = 128,
    n_null: int = 4,
) -> ManifoldOrFinite:
    """Train ReLU SAEs of many widths on points of a manifold and on all of it: does the loss have a knee?

    With a latent a point nothing is left to gain; a manifold can always be tiled more finely.

    Parameters
    ----------
    seed : int
        Determines directions, weights and tokens.
    kind, points
        Those of :class:`ManifoldFeatures`.
    widths : sequence of int
        Rising, with `points` among them after the first.
    l1 : float
        λ.
    steps, lr, batch_size
        Of each training. It starts at the means of as many clusters of tokens, each latent with a bias at which it is
        silent beyond its second neighbour. Latents beyond the number of points start anywhere on the manifold.
    n_null : int
        At least 1: whole manifolds in the place of the points, trained at the first width and at `points`.

    References
    ----------
    Michaud, Gorton and McGrath, *Understanding sparse autoencoder scaling in the presence of feature manifolds* (arXiv
    2509.02565).
    """
    if list(widths) != sorted(set(widths)) or points not in widths[1:] or widths[0] < 1:
        raise ValueError(f"widths must rise from 1 at least, with points={points} after the first, got {list(widths)}")
    if not 0 < l1 < 2:
        raise ValueError(f"l1 must be above 0 and below 2, above which nothing is worth writing, got {l1}")
    if n_null < 1:
        raise ValueError(f"n_null must be at least 1, got {n_null}")
    generator = torch.Generator().manual_seed(seed)
    floor = l1 - l1**2 / 4

    def trained(toy: ManifoldFeatures, some: Sequence[int]) -> list[tuple[float, int, float]]:
        return [_trained(toy, kind, width, l1, steps, lr, batch_size, seed, generator) for width in some]

    finite = trained(ManifoldFeatures(kind, points, generator=generator), widths)
    whole = trained(ManifoldFeatures(kind, generator=generator), widths)
    ends = (widths[0], points)
    others = [trained(ManifoldFeatures(kind, generator=generator), ends) for _ in range(n_null - 1)]
    at = list(widths).index(points)

    def left(first: float, then: float) -> float:
        return (then - floor) / (first - floor)

    null = [left(whole[0][0], whole[at][0]), *(left(first[0], then[0]) for first, then in others)]
    result = Result(
        f"share of the excess loss left at {points} latents",
        left(finite[0][0], finite[at][0]),
        {f"uniform on the {kind}": samples(null)},
        tail="less",
    )
    loss, alive, l0 = (torch.tensor([[cell[part] for cell in row] for row in (finite, whole)]) for part in range(3))
    return ManifoldOrFinite({"left": result}, list(widths), loss, floor, alive, l0)


def _trained(
    toy: ManifoldFeatures,
    kind: str,
    width: int,
    l1: float,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    generator: torch.Generator,
) -> tuple[float, int, float]:
    """Loss, alive latents and L0 of one training."""
    tokens = toy.sample(_TOKENS, generator)[1]
    clusters = width if toy.points is None else min(width, toy.points)
    means = KMeans(clusters, n_init=4, random_state=seed).fit(tokens.numpy()).cluster_centers_
    rows = normalize(torch.from_numpy(means).float(), dim=1)
    if clusters < width:
        anywhere = ManifoldFeatures(kind, generator=generator)
        places = anywhere.sample(width - clusters, generator)[0]
        rows = torch.cat([rows, places @ toy.axes])
    cosine = (rows @ rows.T).topk(min(3, width), dim=1).values[:, -1:].clamp(min=-0.9, max=0.99)
    sae = sk.SAE(toy.d, width, sk.ReLU(l1 / toy.length), generator=generator)
    sae.b_dec.requires_grad_(False)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows / (1 - cosine))
        sae.b_enc.copy_((-cosine / (1 - cosine)).squeeze(1))
    trainer = sk.Trainer(sae, lr=lr, steps=steps, fit_start=False)
    for _ in range(steps):
        trainer.step(toy.sample(batch_size, generator)[1])
    sae.eval()
    x = toy.sample(_TOKENS, generator)[1]
    with torch.no_grad():
        codes = sae.encode(x)
        assert isinstance(codes, sk.CSRCodes)
        error = (sae.decode(codes) - x).square().sum(1).mean()
        price = l1 * (codes.values * sae.latent_norms()[codes.col.long()]).sum() / len(x)
    return float(error + price), int((codes.firing_counts() > 0).sum()), float(codes.l0().double().mean())

"""Does a larger SAE have latents whose information a smaller one lacks?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.completeness.shared import (
    BATCH,
    Codes,
    auc,
    check_between,
    check_count,
    decoder_rows,
    directions_like,
    latents_of,
    nearest_row,
    on_cpu,
    random_directions,
    tokens_of,
)
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples
from sparsekern.codes import check_latents
from sparsekern.hooks import evaluating

try:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

_SWAP_BATCH = 256  # tokens whose families are decoded at a time: each family of a token is a row of d_in numbers

KINDS = ("silent", "novel", "reconstruction")
"""What :attr:`Stitching.kind` counts through."""


@dataclass(frozen=True, eq=False)
class Stitching(Results):
    """What :func:`stitch` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``auc``, ``threshold``, ``novel``, ``together``, ``max_cos``.
    delta : Tensor [d_large] float64
        How much the small SAE's mean squared error rises when the latent is added; NaN where it is silent.
    max_cos : Tensor [d_large]
        Largest cosine of its decoder row with one of the small SAE's; 0 where none is positive.
    nearest : Tensor [d_large] int64
        That latent of the small SAE.
    kind : Tensor [d_large] int64
        Place in :data:`KINDS`: *novel* lowers the error, *reconstruction* does not, *silent* is active on no token.
    mse : float
        The small SAE's mean squared error a token.
    threshold : float
        The cosine given.
    """

    results: dict[str, Result]
    delta: Tensor
    max_cos: Tensor
    nearest: Tensor
    kind: Tensor
    mse: float
    threshold: float

    def latents(self, kind: str) -> Tensor:
        """The latents of this kind, ``[n]`` int64."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        return (self.kind == KINDS.index(kind)).nonzero().squeeze(1)

    def plot(self, axes: Any = None) -> Any:
        """A dot for each active latent: its largest cosine, and what it does to the error, in % of it."""
        axes = new_axes() if axes is None else axes
        for kind, color in (("novel", "C0"), ("reconstruction", "C1")):
            chosen = self.latents(kind)
            percent = 100 * self.delta[chosen] / self.mse
            axes.plot(self.max_cos[chosen], percent, "o", ms=4, mew=0, alpha=0.6, color=color, label=kind)
        drawn = (100 * self.delta / self.mse)[self.kind > 0].abs()
        if len(drawn) and drawn.max() > 0:
            # Linear up to the median, because most latents are rare and change the error a little.
            axes.set_yscale("symlog", linthresh=float(drawn[drawn > 0].median()))
        axes.axhline(0, color="0.3", lw=1)
        axes.axvline(self.threshold, color="0.3", ls="--", lw=1, label="threshold")
        axes.set(xlabel="largest cosine with a latent of the small SAE", ylabel="change of the error when added, %")
        axes.legend(frameon=False)
        return axes


@torch.no_grad()
def stitch(
    small: sk.SAE, large: sk.SAE, x: Tensor, threshold: float = 0.7, n_null: int = 20, seed: int = 0
) -> Stitching:
    """Add each latent of a large SAE to a small one, by itself: which lower its error?

    With the residual ``r = x − x̂`` of the small SAE and the codes z of the large one, adding latent j changes the mean
    squared error by ``mean(−2 z_j r·d_j + z_j² ‖d_j‖²)``: exact, in one pass over the codes, all latents at once.

    ``auc``
        Chance that a novel latent has a smaller largest cosine than a reconstruction latent. Null: cosines permuted.
    ``threshold``
        Mean over both kinds of the share that a cosine below or above `threshold` tells rightly. Null: the same.
    ``novel``
        Share of the active latents that lower the error. Nulls: random directions with the same codes; residuals of
        other tokens.
    ``together``
        Share of the error that goes when all novel latents are added at once; what two of them share is added twice,
        so it can be negative. Null: as many active latents drawn at random.
    ``max_cos``
        Mean of the largest cosine. Null: random directions with the second moment of the large decoder.

    Parameters
    ----------
    small, large : SAE
        Trained on the same activations, which they reconstruct: no transcoders or crosscoders.
    x : Tensor [..., d_in]
        Activations.
    threshold : float
        Cosine that is to tell the kinds apart.
    n_null : int
        Samples of each null; each costs a pass over the codes.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        For SAEs of other shapes or that do not read the same, for `x` of a wrong shape or not finite, and if all
        latents of the large SAE are silent on it.

    References
    ----------
    Leask et al., *Sparse autoencoders do not find canonical units of analysis* (arXiv 2502.04878), section 4.
    """
    x = _checked_pair(small, large, x)
    check_between("threshold", threshold)
    check_count(n_null=n_null)
    generator = null_generator(seed)
    codes, residual = _passed(small, large, x)
    decoder = decoder_rows(large)
    counts = sum((part.firing_counts() for part in codes), torch.zeros(large.d_sae, dtype=torch.int64))
    active = counts > 0
    if not active.any():
        raise ValueError("x leaves every latent of the large SAE silent: give activations that it was trained on")
    delta = _deltas(codes, residual, decoder)
    mse = float(residual.double().square().sum() / len(x))
    max_cos, nearest = nearest_row(decoder, decoder_rows(small))
    novel = active & (delta < 0)

    def share(of: Tensor) -> float:
        return float((of[active] < 0).double().mean())

    def saved(chosen: Tensor) -> float:
        after = sum(
            float((part - sk.sparse_decode(_only(kept, chosen), decoder)).double().square().sum())
            for kept, part in zip(codes, residual.split(BATCH), strict=True)
        )
        return 1 - after / len(x) / mse if mse > 0 else math.nan

    def other_latents() -> Tensor:
        among = active.nonzero().squeeze(1)
        drawn = among[torch.randperm(len(among), generator=generator)[: int(novel.sum())]]
        return torch.zeros_like(active).index_fill_(0, drawn, True)

    lowers, cosines = novel[active], max_cos[active]
    shuffled = [cosines[torch.randperm(len(cosines), generator=generator)] for _ in range(n_null)]
    norms = decoder.norm(dim=1, keepdim=True)
    random = [random_directions(len(decoder), large.d_in, generator) * norms for _ in range(n_null)]
    order = [torch.randperm(len(x), generator=generator) for _ in range(n_null)]
    results = {
        "auc": Result(
            "chance that a novel latent has a smaller largest cosine than a reconstruction latent",
            auc(lowers, -cosines),
            {"largest cosines permuted": samples(auc(lowers, -other) for other in shuffled)},
        ),
        "threshold": Result(
            f"kinds told rightly by a largest cosine of {threshold:g}",
            _balanced(lowers, cosines < threshold),
            {"largest cosines permuted": samples(_balanced(lowers, other < threshold) for other in shuffled)},
        ),
        "novel": Result(
            "share of the active latents that lower the error",
            share(delta),
            {
                "random directions, the same codes": samples(
                    share(_deltas(codes, residual, directions)) for directions in random
                ),
                "residuals of other tokens": samples(
                    share(_deltas(codes, residual[tokens], decoder)) for tokens in order
                ),
            },
        ),
        "together": Result(
            "share of the error that all novel latents at once remove",
            saved(novel),
            {"as many active latents at random": samples(saved(other_latents()) for _ in range(n_null))},
        ),
        "max_cos": Result(
            "mean largest cosine with a latent of the small SAE",
            float(cosines.double().mean()),
            {
                "random directions with the large decoder's second moment": samples(
                    float(nearest_row(drawn, decoder_rows(small))[0].double().mean())
                    for drawn in directions_like(decoder[active], len(cosines), n_null, generator)
                )
            },
        ),
    }
    kind = torch.where(active, torch.where(novel, KINDS.index("novel"), KINDS.index("reconstruction")), 0)
    delta = delta.masked_fill(~active, math.nan)
    return Stitching(results, delta, max_cos, nearest, kind, mse, threshold)


@dataclass(frozen=True, eq=False)
class Swapping(Results):
    """What :func:`swap` returns. ``F`` is the number of families.

    Attributes
    ----------
    results : dict of str to Result
        ``swap``, ``undone``.
    family_of_large, family_of_small : Tensor [d_large], [d_small] int64
        Family of each latent; −1 for those that are like none of the other SAE.
    insert, remove, swap : Tensor [F] float64
        How much the small SAE's mean squared error rises when the family's latents of the large SAE are added, when its
        latents of the small one are left out, and when both is done.
    mse : float
        The small SAE's mean squared error a token.
    """

    results: dict[str, Result]
    family_of_large: Tensor
    family_of_small: Tensor
    insert: Tensor
    remove: Tensor
    swap: Tensor
    mse: float


@torch.no_grad()
def swap(
    small: sk.SAE,
    large: sk.SAE,
    x: Tensor,
    threshold: float = 0.7,
    neighbours: int = 16,
    n_null: int = 20,
    seed: int = 0,
) -> Swapping:
    """Put latents of a large SAE in the place of those of a small one that are like them, a family at a time.

    A family is a connected component of the graph that joins latents of the two SAEs at a decoder cosine above
    `threshold`. A reconstruction latent raises the error when it is added because the small SAE has it already; taken
    with its family in exchange it should not.

    ``swap``
        Mean change of the error by swapping a family, in units of the error.
    ``undone``
        Share of the families for which swapping leaves less error than adding alone.

    Null of both: the latents of the small SAE that are left out, as many for each family, drawn among all active ones.

    Parameters
    ----------
    small, large, x
        As for :func:`stitch`.
    threshold : float
        Cosine above which latents belong together.
    neighbours : int
        So many nearest latents of the other SAE are looked at for each latent. Families can come out in pieces only
        where two latents are each other's neighbour beyond that many.
    n_null : int
        Samples of the null; each costs as much as the number itself.
    seed : int
        Determines the null.

    Raises
    ------
    ValueError
        As for :func:`stitch`, and where no two latents of the SAEs have a cosine above `threshold`.

    References
    ----------
    Leask et al. (arXiv 2502.04878), section 4.
    """
    x = _checked_pair(small, large, x)
    check_between("threshold", threshold)
    check_count(n_null=n_null, neighbours=neighbours)
    generator = null_generator(seed)
    of_large, of_small = _families(decoder_rows(large), decoder_rows(small), threshold, neighbours)
    n_families = int(of_large.max()) + 1
    if not n_families:
        raise ValueError(f"threshold must leave some pair of latents with a larger cosine, got {threshold}")
    x_parts = x.split(_SWAP_BATCH)
    with evaluating(small), evaluating(large):
        of_tokens = [(on_cpu(small.encode(part)), on_cpu(large.encode(part.to(large.device)))) for part in x_parts]
        residual = [(part - small(part)).float().cpu() for part in x_parts]
    rows = torch.cat([decoder_rows(large), decoder_rows(small)])

    def changes(of_small: Tensor) -> Tensor:
        """Sums over tokens for each family, ``[3, F]``: insert, remove, swap."""
        family = torch.cat([of_large, of_small])
        return sum(
            (
                _family_changes(*codes, part, rows, family, n_families)
                for codes, part in zip(of_tokens, residual, strict=True)
            ),
            torch.zeros(3, n_families, dtype=torch.float64),
        ) / len(x)

    active = sum((codes.firing_counts() for codes, _ in of_tokens), torch.zeros(small.d_sae, dtype=torch.int64)) > 0
    mse = sum(float(part.double().square().sum()) for part in residual) / len(x)
    found = changes(of_small)

    def drawn_anew() -> Tensor:
        among = (active | (of_small >= 0)).nonzero().squeeze(1)
        other = of_small.clone()
        other[among] = of_small[among[torch.randperm(len(among), generator=generator)]]
        return changes(other)

    null = [drawn_anew() for _ in range(n_null)]
    results = {
        "swap": Result(
            "change of the error by swapping a family, in units of it",
            _ratio(float(found[2].mean()), mse),
            {"other latents left out": samples(_ratio(float(other[2].mean()), mse) for other in null)},
            tail="less",
        ),
        "undone": Result(
            "share of families that do less harm swapped than added",
            float((found[2] < found[0]).double().mean()),
            {"other latents left out": samples(float((other[2] < other[0]).double().mean()) for other in null)},
        ),
    }
    return Swapping(results, of_large, of_small, found[0], found[1], found[2], mse)


@torch.no_grad()
def stitched_mse(
    small: sk.SAE, large: sk.SAE, x: Tensor, insert: Sequence[int] = (), remove: Sequence[int] = ()
) -> float:
    """Mean squared error a token of a small SAE with some latents of a large one added, and some of its own left out.

    Parameters
    ----------
    small, large, x
        As for :func:`stitch`.
    insert, remove : sequence of int
        Latents of the large SAE, and of the small one.
    """
    x = _checked_pair(small, large, x)
    error = 0.0
    with evaluating(small), evaluating(large):
        for part in x.split(BATCH):
            rest = (part - small(part)).float().cpu()
            for sae, latents, sign in ((large, list(insert), -1), (small, list(remove), 1)):
                check_latents(latents, sae.d_sae)
                chosen = torch.zeros(sae.d_sae, dtype=torch.bool).index_fill_(0, torch.tensor(latents).long(), True)
                codes = on_cpu(sae.encode(part.to(sae.device)))
                rest = rest + sign * sk.sparse_decode(_only(codes, chosen), decoder_rows(sae))
            error += float(rest.double().square().sum())
    return error / len(x)


# Parts


def _checked_pair(small: sk.SAE, large: sk.SAE, x: Tensor) -> Tensor:
    """`x` flat, once everything has been looked at."""
    for name, sae in (("small", small), ("large", large)):
        if not isinstance(sae, sk.SAE) or sae.reads != "output" or sae.n_sources > 1:
            raise ValueError(f"{name} must be an SAE of one source that reconstructs what it reads, got {sae!r}")
    if small.d_in != large.d_in:
        raise ValueError(f"small and large must read the same activations, got d_in of {small.d_in} and {large.d_in}")
    if x.dim() < 2 or x.shape[-1] != small.d_in or not x.numel():
        raise ValueError(f"x must be [tokens, {small.d_in}], got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x must be finite: remove or repair the rows with NaN or infinity")
    return x.reshape(-1, small.d_in).to(small.device)


def _passed(small: sk.SAE, large: sk.SAE, x: Tensor) -> tuple[list[Codes], Tensor]:
    """Codes of the large SAE for each batch of tokens, and residuals ``[B, d]`` of the small one."""
    codes, residual = [], []
    with evaluating(small), evaluating(large):
        for part in x.split(BATCH):
            found = large.encode(part.to(large.device))
            codes.append(on_cpu(found))
            residual.append((part - small(part)).float().cpu())
    return codes, torch.cat(residual)


def _deltas(codes: list[Codes], residual: Tensor, decoder: Tensor) -> Tensor:
    """Change of the mean squared error by each latent alone, ``[d_large]`` float64."""
    squares = decoder.double().square().sum(1)
    change = torch.zeros(len(decoder), dtype=torch.float64)
    for part, rest in zip(codes, residual.split(BATCH), strict=True):
        latents, values = latents_of(part), part.values.double().flatten()
        products = _products(part, decoder, rest).double().flatten()
        change.index_add_(0, latents, values.square() * squares[latents] - 2 * values * products)
    return change / len(residual)


def _products(codes: Codes, rows: Tensor, vectors: Tensor) -> Tensor:
    """Product of the row of each code with its token's vector, in the shape of the values."""
    # What a decoder is multiplied with is its derivative by that: the engine's kernel, on its public surface.
    with torch.enable_grad():
        values = codes.values.detach().clone().requires_grad_()
        decoded = sk.sparse_decode(codes._replace(values=values), rows)
        return torch.autograd.grad(decoded, values, vectors)[0]


def _only(codes: Codes, chosen: Tensor) -> Codes:
    """Codes in which the latents that are not `chosen` ``[d_sae]`` hold 0."""
    kept = chosen[latents_of(codes)].view(codes.values.shape)
    return codes._replace(values=torch.where(kept, codes.values, 0))


def _families(large: Tensor, small: Tensor, threshold: float, neighbours: int) -> tuple[Tensor, Tensor]:
    """Connected components of the latents with a cosine above `threshold`: their numbers, −1 for those alone."""
    unit_large, unit_small = normalize(large, dim=1), normalize(small, dim=1)
    edges = []
    for rows, others, swapped in ((unit_large, unit_small, False), (unit_small, unit_large, True)):
        found = sk.topk_encode(rows, others, None, min(neighbours, len(others)))
        row, slot = (found.values > threshold).nonzero().unbind(1)
        pair = row, found.indices[row, slot].long()
        edges.append(torch.stack(pair[::-1] if swapped else pair))
    i, j = torch.cat(edges, 1)
    total = len(large) + len(small)
    graph = coo_array((np.ones(len(i), dtype=bool), (i.numpy(), j.numpy() + len(large))), shape=(total, total))
    component = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    joined = torch.zeros(total, dtype=torch.bool)
    joined[i] = joined[j + len(large)] = True
    families = torch.full((total,), -1)
    families[joined] = component[joined].unique(return_inverse=True)[1]
    return families[: len(large)], families[len(large) :]


def _family_changes(
    small: Codes, large: Codes, residual: Tensor, rows: Tensor, family: Tensor, n_families: int
) -> Tensor:
    """Sums over tokens of the changes of the squared error for each family, ``[3, F]``: insert, remove, swap."""
    n_large = large.d_sae
    token = torch.cat([tokens_of(large), tokens_of(small)])
    column = torch.cat([latents_of(large), n_large + latents_of(small)])
    value = torch.cat([large.values.flatten(), -small.values.flatten()])
    in_one = (family[column] >= 0) & (value != 0)
    token, column, value = token[in_one], column[in_one], value[in_one]
    # What a family adds on a token is a row of its own: codes whose rows are pairs of token and family.
    pair = token * n_families + family[column]
    order = (pair * len(family) + column).argsort()
    pairs, counts = pair[order].unique_consecutive(return_counts=True)
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    column, value = column[order].int(), value[order]
    rest, of_pair = residual[pairs // n_families], pairs % n_families
    is_large = column < n_large
    changes = torch.zeros(3, n_families, dtype=torch.float64)
    for change, kept in zip(changes, (is_large, ~is_large, torch.ones_like(is_large)), strict=True):
        added = sk.sparse_decode(sk.CSRCodes(crow, column, value * kept, len(family)), rows)
        change.index_add_(0, of_pair, (added * (added - 2 * rest)).sum(1, dtype=torch.float64))
    return changes


def _balanced(positive: Tensor, called: Tensor) -> float:
    """Mean of the shares of both classes that are called rightly; NaN where there is one class only."""
    return float((called[positive].double().mean() + (~called[~positive]).double().mean()) / 2)


def _ratio(number: float, of: float) -> float:
    return number / of if of > 0 else math.nan

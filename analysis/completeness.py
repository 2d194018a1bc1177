"""Whether a dictionary is complete and its latents atomic.

*Complete*: does a larger SAE have latents whose information a smaller one lacks (:func:`stitch`, :func:`swap`), which
features are found at all (:func:`feature_recovery_curve`), and how many are there (:func:`estimate_total_features`)?
*Atomic*: are latents sums of others (:func:`meta_sae`, :func:`atomicity`)? Every number comes as a
:class:`~sparsekern.analysis.results.Result`; ``docs/analyses.md`` has what each cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.results import Result, frame, new_axes, null_generator, samples
from sparsekern.codes import check_latents
from sparsekern.hooks import evaluating

try:
    from scipy.optimize import brentq
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.stats import rankdata
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

Codes = sk.SparseCodes | sk.CSRCodes

_BATCH = 8192  # tokens encoded at a time
_SWAP_BATCH = 256  # tokens whose families are decoded at a time: each family of a token is a row of d_in numbers
_NULL_ROWS = 4096  # random rows decomposed a sample, at most
_SWEEPS = 1000  # of coordinate descent, at most; a few dozen are enough but for parts that are nearly parallel
_NO_REST = 1e-6  # a squared length of what a fit leaves, of rows of norm 1, that is rounding
_RIDGE = 1e-4  # keeps the slope finite where frequency separates the features perfectly
_NEWTON = 100  # steps at most; about ten are enough where it does not

KINDS = ("silent", "novel", "reconstruction")
"""What :attr:`Stitching.kind` counts through."""

COMPOSITIONS = ("silent", "shared", "composite", "atomic")
"""What :attr:`Atomicity.kind` counts through."""


# Stitching


@dataclass(frozen=True, eq=False)
class Stitching:
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

    def to_frame(self) -> Any:
        """All results as one pandas.DataFrame."""
        return frame(self.results.values())

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
    _check_between("threshold", threshold)
    _check_count(n_null=n_null)
    generator = null_generator(seed)
    codes, residual = _passed(small, large, x)
    decoder = _rows(large)
    counts = sum((part.firing_counts() for part in codes), torch.zeros(large.d_sae, dtype=torch.int64))
    active = counts > 0
    if not active.any():
        raise ValueError("x leaves every latent of the large SAE silent: give activations that it was trained on")
    delta = _deltas(codes, residual, decoder)
    mse = float(residual.double().square().sum() / len(x))
    max_cos, nearest = _nearest(decoder, _rows(small))
    novel = active & (delta < 0)

    def share(of: Tensor) -> float:
        return float((of[active] < 0).double().mean())

    def saved(chosen: Tensor) -> float:
        after = sum(
            float((part - sk.sparse_decode(_only(kept, chosen), decoder)).double().square().sum())
            for kept, part in zip(codes, residual.split(_BATCH), strict=True)
        )
        return 1 - after / len(x) / mse if mse > 0 else math.nan

    def other_latents() -> Tensor:
        among = active.nonzero().squeeze(1)
        drawn = among[torch.randperm(len(among), generator=generator)[: int(novel.sum())]]
        return torch.zeros_like(active).index_fill_(0, drawn, True)

    lowers, cosines = novel[active], max_cos[active]
    shuffled = [cosines[torch.randperm(len(cosines), generator=generator)] for _ in range(n_null)]
    norms = decoder.norm(dim=1, keepdim=True)
    random = [_directions(len(decoder), large.d_in, generator) * norms for _ in range(n_null)]
    order = [torch.randperm(len(x), generator=generator) for _ in range(n_null)]
    results = {
        "auc": Result(
            "chance that a novel latent has a smaller largest cosine than a reconstruction latent",
            _auc(lowers, -cosines),
            {"largest cosines permuted": samples(_auc(lowers, -other) for other in shuffled)},
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
                    float(_nearest(drawn, _rows(small))[0].double().mean())
                    for drawn in _like(decoder[active], len(cosines), n_null, generator)
                )
            },
        ),
    }
    kind = torch.where(active, torch.where(novel, KINDS.index("novel"), KINDS.index("reconstruction")), 0)
    delta = delta.masked_fill(~active, math.nan)
    return Stitching(results, delta, max_cos, nearest, kind, mse, threshold)


@dataclass(frozen=True, eq=False)
class Swapping:
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

    def to_frame(self) -> Any:
        """All results as one pandas.DataFrame."""
        return frame(self.results.values())


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
    _check_between("threshold", threshold)
    _check_count(n_null=n_null, neighbours=neighbours)
    generator = null_generator(seed)
    of_large, of_small = _families(_rows(large), _rows(small), threshold, neighbours)
    n_families = int(of_large.max()) + 1
    if not n_families:
        raise ValueError(f"threshold must leave some pair of latents with a larger cosine, got {threshold}")
    x_parts = x.split(_SWAP_BATCH)
    with evaluating(small), evaluating(large):
        of_tokens = [(_on_cpu(small.encode(part)), _on_cpu(large.encode(part.to(large.device)))) for part in x_parts]
        residual = [(part - small(part)).float().cpu() for part in x_parts]
    rows = torch.cat([_rows(large), _rows(small)])

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
        for part in x.split(_BATCH):
            rest = (part - small(part)).float().cpu()
            for sae, latents, sign in ((large, list(insert), -1), (small, list(remove), 1)):
                check_latents(latents, sae.d_sae)
                chosen = torch.zeros(sae.d_sae, dtype=torch.bool).index_fill_(0, torch.tensor(latents).long(), True)
                codes = _on_cpu(sae.encode(part.to(sae.device)))
                rest = rest + sign * sk.sparse_decode(_only(codes, chosen), _rows(sae))
            error += float(rest.double().square().sum())
    return error / len(x)


# Parts of stitching


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
        for part in x.split(_BATCH):
            found = large.encode(part.to(large.device))
            codes.append(_on_cpu(found))
            residual.append((part - small(part)).float().cpu())
    return codes, torch.cat(residual)


def _rows(sae: sk.SAE) -> Tensor:
    return sae.W_dec.detach().float().cpu()


def _on_cpu(codes: Codes) -> Codes:
    """Codes in float32 on the CPU."""
    codes = codes._replace(values=codes.values.detach().float().cpu())
    if isinstance(codes, sk.CSRCodes):
        return codes._replace(crow=codes.crow.cpu(), col=codes.col.cpu())
    return codes._replace(indices=codes.indices.cpu())


def _deltas(codes: list[Codes], residual: Tensor, decoder: Tensor) -> Tensor:
    """Change of the mean squared error by each latent alone, ``[d_large]`` float64."""
    squares = decoder.double().square().sum(1)
    change = torch.zeros(len(decoder), dtype=torch.float64)
    for part, rest in zip(codes, residual.split(_BATCH), strict=True):
        latents, values = _latents_of(part), part.values.double().flatten()
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


def _latents_of(codes: Codes) -> Tensor:
    """Latent of each code, flat int64."""
    return (codes.col if isinstance(codes, sk.CSRCodes) else codes.indices).flatten().long()


def _tokens_of(codes: Codes) -> Tensor:
    """Token of each code, flat int64."""
    if isinstance(codes, sk.CSRCodes):
        return codes.rows()
    return torch.arange(codes.tokens).repeat_interleave(codes.k)


def _only(codes: Codes, chosen: Tensor) -> Codes:
    """Codes in which the latents that are not `chosen` ``[d_sae]`` hold 0."""
    kept = chosen[_latents_of(codes)].view(codes.values.shape)
    return codes._replace(values=torch.where(kept, codes.values, 0))


def _nearest(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each row with one of `others`, 0 where none is positive, and which one it is."""
    found = sk.topk_encode(normalize(rows, dim=1), normalize(others, dim=1), None, 1)
    return found.values.squeeze(1), found.indices.squeeze(1).long()


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
    token = torch.cat([_tokens_of(large), _tokens_of(small)])
    column = torch.cat([_latents_of(large), n_large + _latents_of(small)])
    value = torch.cat([large.values.flatten(), -small.values.flatten()])
    of = family[column]
    # What a family adds on a token is a row of its own: codes whose rows are pairs of token and family.
    pair = token * n_families + of
    order = (pair * len(family) + column).argsort()
    order = order[(of[order] >= 0) & (value[order] != 0)]
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


def _auc(positive: Tensor, score: Tensor) -> float:
    """Area under the ROC curve; NaN where there is one class only."""
    if bool(positive.all()) or not bool(positive.any()):
        return math.nan
    above, n = torch.from_numpy(rankdata(score.double().numpy()))[positive].sum(), int(positive.sum())
    return float((above - n * (n + 1) / 2) / (n * (len(positive) - n)))


def _balanced(positive: Tensor, called: Tensor) -> float:
    """Mean of the shares of both classes that are called rightly; NaN where there is one class only."""
    return float((called[positive].double().mean() + (~called[~positive]).double().mean()) / 2)


def _ratio(number: float, of: float) -> float:
    return number / of if of > 0 else math.nan


# Meta-SAEs


@dataclass(frozen=True, eq=False)
class MetaSAE:
    """What :func:`meta_sae` returns.

    Attributes
    ----------
    sae : SAE
        In evaluation mode; it reads decoder rows of unit norm.
    results : dict of str to Result
        ``explained``, and with `truth` ``recovered``.
    codes : SparseCodes or CSRCodes
        Meta-latents of each row of `D`.
    atom_cosines : Tensor [n_atoms] or None
        Largest cosine of each true atom with a decoder row of the meta-SAE.
    """

    sae: sk.SAE
    results: dict[str, Result]
    codes: Codes
    atom_cosines: Tensor | None

    def to_frame(self) -> Any:
        """All results as one pandas.DataFrame."""
        return frame(self.results.values())


def meta_sae(
    D: Tensor,
    d_meta: int,
    k: int,
    *,
    decoder_bias: bool = False,
    truth: Tensor | None = None,
    found_at: float = 0.9,
    steps: int = 2000,
    lr: float | None = None,
    batch_size: int = 256,
    n_null: int = 3,
    seed: int = 0,
) -> MetaSAE:
    """Train an SAE on the decoder rows of another: are they sums of fewer directions?

    Without a decoder bias. Where the coefficients of the k parts of every row have the same sum, as for equal sums of
    orthogonal atoms, the same vector can be added to all parts and taken off the bias: the fit is as good and no part
    is an atom.

    ``explained``
        Share of the variance of the rows that is explained (one less the FVU). Nulls: the same training on as many
        random directions, isotropic and with the second moment of the rows.
    ``recovered``
        Share of the atoms in `truth` that have a cosine above `found_at` with a decoder row of the meta-SAE. Null:
        random directions, as many as meta-latents.

    Parameters
    ----------
    D : Tensor [n, d]
        Decoder rows, of any norm but 0: leave out latents that are dead.
    d_meta : int
        Number of meta-latents.
    k : int
        Of which each row has so many.
    decoder_bias : bool
        Whether ``b_dec`` is fitted, and not held at zero.
    truth : Tensor [n_atoms, d] or None
        What the rows are sums of, where that is known.
    found_at : float
        Cosine above which an atom counts as found.
    steps, lr, batch_size
        Of the training, by default at the trainer's learning rate.
    n_null : int
        Trainings for each null of ``explained``; those of ``recovered`` cost nothing, and are 100.
    seed : int
        Determines everything.

    Raises
    ------
    ValueError
        For rows or atoms that are none, and numbers out of range.

    References
    ----------
    Leask et al. (arXiv 2502.04878), section 5: on an SAE of 49,152 latents 55.47% of the decoder's variance.
    """
    unit = _checked_rows("D", D)
    _check_count(steps=steps, batch_size=batch_size, n_null=n_null)
    _check_between("found_at", found_at)
    atoms = None if truth is None else _checked_rows("truth", truth, unit.shape[1])

    def trained(rows: Tensor, seed: int) -> tuple[sk.SAE, float]:
        generator = null_generator(seed)
        sae = sk.SAE(rows.shape[1], d_meta, sk.TopK(k), dead_after=10 * len(rows), generator=generator)
        sae.b_dec.requires_grad_(decoder_bias)
        center = "mean" if decoder_bias else "zeros"
        trainer = sk.Trainer(sae, lr=lr, steps=steps, b_dec_init=center)
        for _ in range(steps):
            trainer.step(rows[torch.randint(len(rows), (batch_size,), generator=generator)])
        sae.eval()
        return sae, 1 - sk.evaluate(sae, rows.split(_BATCH)).fvu

    sae, explained = trained(unit, seed)
    generator = null_generator(seed)
    isotropic = [_directions(len(unit), unit.shape[1], generator) for _ in range(n_null)]
    matched = list(_like(unit, len(unit), n_null, generator))
    results = {
        "explained": Result(
            "share of the variance of decoder rows explained",
            explained,
            {
                "random directions": samples(trained(rows, seed)[1] for rows in isotropic),
                "random directions with the rows' second moment": samples(trained(rows, seed)[1] for rows in matched),
            },
        )
    }
    cosines = None
    if atoms is not None:
        cosines = _nearest(atoms, _rows(sae))[0]
        random = (_nearest(atoms, _directions(d_meta, unit.shape[1], generator))[0] for _ in range(100))
        results["recovered"] = Result(
            f"share of the atoms with a meta-latent at a cosine above {found_at:g}",
            float((cosines > found_at).double().mean()),
            {"random directions": samples(float((drawn > found_at).double().mean()) for drawn in random)},
        )
    with torch.no_grad():
        codes = sae.encode(unit)
    return MetaSAE(sae, results, codes, cosines)


# Atomic or composite


@dataclass(frozen=True, eq=False)
class Atomicity:
    """What :func:`atomicity` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``composite``, ``shared``, ``r2``.
    kind : Tensor [d_large] int64
        Place in :data:`COMPOSITIONS`.
    parts : Tensor [d_large, k] int64
        Latents of the small SAE that the row is a sum of, most important first; −1 where it has fewer.
    coefficients : Tensor [d_large, k]
        What they are multiplied with, between rows of unit norm.
    r2 : Tensor [d_large]
        Share of the squared length of the row that the best k rows of the small decoder explain.
    coactivation : Tensor [d_large] float64
        The least, over its parts, of P(part active | latent active); NaN without parts or where the latent is silent.
    least_r2 : float
        The same for random rows, 99th percentile.
    """

    results: dict[str, Result]
    kind: Tensor
    parts: Tensor
    coefficients: Tensor
    r2: Tensor
    coactivation: Tensor
    least_r2: float

    def latents(self, kind: str) -> Tensor:
        """The latents of this kind, ``[n]`` int64."""
        if kind not in COMPOSITIONS:
            raise ValueError(f"kind must be one of {', '.join(COMPOSITIONS)}, got {kind!r}")
        return (self.kind == COMPOSITIONS.index(kind)).nonzero().squeeze(1)

    def to_frame(self) -> Any:
        """All results as one pandas.DataFrame."""
        return frame(self.results.values())


class _Fit(NamedTuple):
    """Non-negative sums of rows: ``parts`` (−1 for none) and ``coefficients`` ``[n, k]``, ``r2`` with all k ``[n]``."""

    parts: Tensor
    coefficients: Tensor
    r2: Tensor


@torch.no_grad()
def atomicity(
    D_large: Tensor,
    D_small: Tensor,
    codes_large: Codes,
    codes_small: Codes,
    k: int = 4,
    coactive: float = 0.8,
    shared_at: float = 0.8,
    n_null: int = 20,
    seed: int = 0,
) -> Atomicity:
    """Which latents of a large SAE are sums of latents of a small one?

    Each row is fitted by a non-negative sum of at most k rows of the small decoder, by orthogonal matching pursuit: the
    row nearest to what is left comes next, and all coefficients are fitted anew. The parts end with the last one that
    explains more of what was left than the best row does of 99% of random rows. Then a latent is

    *composite*
        with at least two parts, an R² (of all k rows) above the 99th percentile of random rows, and
        P(part active | latent active) above `coactive` for each part: they must also be there when it is;
    *shared*
        if it is not, and one row of the small decoder is at a cosine of at least `shared_at`;
    *atomic*
        otherwise: nothing in the small dictionary makes it up;
    *silent*
        if it is active on none of the tokens.

    ``composite``, ``shared``
        Shares of the active latents. Nulls: random rows (at most one in a hundred passes by its R²), and, of the
        first, the tokens of the small SAE's codes permuted.
    ``r2``
        Mean R² over the active latents. Nulls: random rows; the large decoder turned by a random rotation.

    Random rows have the second moment of the large decoder, so that two dictionaries in the same subspace are not
    called related for that.

    Parameters
    ----------
    D_large, D_small : Tensor [d_large, d], [d_small, d]
        Decoder rows, of any norm but 0.
    codes_large, codes_small : SparseCodes or CSRCodes
        Of the same tokens.
    k : int
        Parts, at most.
    coactive : float
        Share of a latent's tokens on which each of its parts must be active.
    shared_at : float
        Cosine at which two latents count as one; a sum of two equal parts has 0.71 with each.
    n_null : int
        Samples of each null.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        For rows that are none, codes of other dictionaries or of different tokens, all latents silent, and numbers out
        of range.

    References
    ----------
    Leask et al. (arXiv 2502.04878), section 5, for the question. The fit, its nulls and the condition on the codes are
    this project's.
    """
    large = _checked_rows("D_large", D_large)
    small = _checked_rows("D_small", D_small, large.shape[1])
    for name, codes, rows in (("codes_large", codes_large, large), ("codes_small", codes_small, small)):
        if codes.d_sae != len(rows):
            raise ValueError(f"{name} must be codes of {len(rows)} latents, got {codes.d_sae}")
    if codes_large.tokens != codes_small.tokens:
        raise ValueError(
            f"codes_large and codes_small must be of the same tokens, got {codes_large.tokens} and {codes_small.tokens}"
        )
    codes_large, codes_small = _on_cpu(codes_large), _on_cpu(codes_small)
    _check_count(k=k, n_null=n_null)
    if k > len(small):
        raise ValueError(f"k must be at most the {len(small)} rows of D_small, got {k}")
    _check_between("coactive", coactive)
    _check_between("shared_at", shared_at)
    fires = codes_large.firing_counts()
    active = fires > 0
    if not active.any():
        raise ValueError("codes_large must have an active latent: all are silent on these tokens")
    generator = null_generator(seed)
    n_rows = min(_NULL_ROWS, len(large))
    random = list(_like(large, n_rows, n_null, generator))
    # Which of the large SAE's latents a random row stands for, with the tokens on which it is active.
    stands_for = [
        active.nonzero().squeeze(1)[torch.randint(int(active.sum()), (n_rows,), generator=generator)] for _ in random
    ]
    first = torch.cat([_nearest(rows, small)[0] for rows in random]).square()
    least_share = float(first.double().quantile(0.99))
    fit = _pursuit(large, small, k, least_share)
    of_random = [_pursuit(rows, small, k, least_share) for rows in random]
    least_r2 = float(torch.cat([found.r2 for found in of_random]).double().quantile(0.99))
    pairs = _Pairs(codes_large, codes_small)
    everyone = torch.arange(len(large))
    coactivation = pairs.coactivation(fit.parts, everyone)
    cosines = _nearest(large, small)[0]

    def is_composite(found: _Fit, together: Tensor) -> Tensor:
        return ((found.parts >= 0).sum(1) >= 2) & (found.r2 > least_r2) & (together > coactive)

    def is_shared(composite: Tensor, cosines: Tensor) -> Tensor:
        return ~composite & (cosines >= shared_at)

    def share(of: Tensor) -> float:
        return float(of.double().mean())

    composite = is_composite(fit, coactivation)
    shared = is_shared(composite, cosines)
    drawn = [
        is_composite(found, pairs.coactivation(found.parts, latents))
        for found, latents in zip(of_random, stands_for, strict=True)
    ]
    permuted = [
        is_composite(fit, pairs.permuted(generator).coactivation(fit.parts, everyone))[active] for _ in range(n_null)
    ]
    rotated = [large @ _rotation(large.shape[1], generator) for _ in range(n_null)]
    results = {
        "composite": Result(
            "share of latents that are sums of others",
            share(composite[active]),
            {
                "random rows": samples(share(of) for of in drawn),
                "tokens of the small SAE's codes permuted": samples(share(of) for of in permuted),
            },
        ),
        "shared": Result(
            "share of latents that the small SAE has",
            share(shared[active]),
            {
                "random rows": samples(
                    share(is_shared(of, _nearest(rows, small)[0])) for of, rows in zip(drawn, random, strict=True)
                )
            },
        ),
        "r2": Result(
            "mean R² of sums of rows of the small decoder",
            share(fit.r2[active]),
            {
                "random rows": samples(share(found.r2) for found in of_random),
                "large decoder rotated": samples(
                    share(_pursuit(rows[:n_rows], small, k, least_share).r2) for rows in rotated
                ),
            },
        ),
    }
    kind = torch.full_like(fires, COMPOSITIONS.index("atomic"))
    kind[shared], kind[composite], kind[~active] = 1, 2, 0
    return Atomicity(results, kind, fit.parts, fit.coefficients, fit.r2, coactivation, least_r2)


def _pursuit(rows: Tensor, dictionary: Tensor, k: int, least_share: float) -> _Fit:
    """Non-negative orthogonal matching pursuit of unit rows ``[n, d]``; see :func:`atomicity`."""
    parts = torch.full((len(rows), k), -1)
    coefficients = torch.zeros(len(rows), k)
    rest = rows.clone()
    kept_parts, kept_coefficients = parts.clone(), coefficients.clone()
    going = torch.arange(len(rows))
    for step in range(k):
        found = sk.topk_encode(rest[going], dictionary, None, 1)  # of n × d_small products none is kept
        cosine, row = found.values.squeeze(1), found.indices.squeeze(1).long()
        left = rest[going].square().sum(1)
        new = (left > _NO_REST) & (cosine > 0) & (parts[going] != row[:, None]).all(1)
        going, row = going[new], row[new]
        if not len(going):
            break
        parts[going, step] = row
        chosen = dictionary[parts[going, : step + 1]]
        fitted = _non_negative(chosen, rows[going])
        coefficients[going, : step + 1] = fitted
        rest[going] = rows[going] - (fitted[:, :, None] * chosen).sum(1)
        # The first of many parts can explain little of the row and yet the last all that was left.
        counts = going[(cosine.square() > least_share * left)[new]]
        kept_parts[counts], kept_coefficients[counts] = parts[counts], coefficients[counts]
    r2 = 1 - rest.square().sum(1)
    order = kept_coefficients.argsort(dim=1, descending=True, stable=True)
    named = kept_parts.masked_fill(kept_coefficients <= 0, -1)  # a part that a later one has made needless is none
    return _Fit(named.gather(1, order), kept_coefficients.gather(1, order), r2)


def _non_negative(chosen: Tensor, rows: Tensor) -> Tensor:
    """Least squares of each row ``[n, d]`` on its own few ``chosen`` ``[n, s, d]``, with no negative coefficient."""
    gram = (chosen @ chosen.mT).double()
    products = (chosen @ rows[:, :, None]).squeeze(2).double()
    fitted = torch.zeros_like(products)
    for _ in range(_SWEEPS):
        before = fitted.clone()
        for i in range(fitted.shape[1]):
            others = (gram[:, i] * fitted).sum(1) - gram[:, i, i] * fitted[:, i]
            fitted[:, i] = ((products[:, i] - others) / gram[:, i, i]).clamp(min=0)
        if (fitted - before).abs().max() < 1e-9:
            break
    return fitted.float()


class _Pairs:
    """Which latents of two SAEs are active on the same tokens: asked for a few pairs, without any table of all."""

    def __init__(self, large: Codes, small: Codes) -> None:
        self.n_small, self.tokens = small.d_sae, small.tokens
        on = large.values.flatten() > 0
        self.token, self.latent = _tokens_of(large)[on], _latents_of(large)[on]
        self.counts = torch.bincount(self.latent, minlength=large.d_sae)
        order = self.latent.argsort(stable=True)
        self.token = self.token[order]  # those of a latent side by side
        self.first = self.counts.cumsum(0) - self.counts
        on = small.values.flatten() > 0
        self.small_token, self.small_latent = _tokens_of(small)[on], _latents_of(small)[on]
        self._keys = (self.small_token * self.n_small + self.small_latent).sort().values

    def permuted(self, generator: torch.Generator) -> _Pairs:
        """The same with the small SAE's tokens in another order."""
        other = _Pairs.__new__(_Pairs)
        other.__dict__.update(self.__dict__)
        moved = torch.randperm(self.tokens, generator=generator)[self.small_token]
        other._keys = (moved * self.n_small + self.small_latent).sort().values
        return other

    def coactivation(self, parts: Tensor, latents: Tensor) -> Tensor:
        """The least of P(part active | latent active) over the parts of each row, ``[n]`` float64."""
        least = torch.full((len(parts),), math.inf, dtype=torch.float64)
        for column in parts.T:
            asked = ((column >= 0) & (self.counts[latents] > 0)).nonzero().squeeze(1)
            if not len(asked):
                continue
            of = latents[asked]
            counts = self.counts[of]
            starts = (self.first[of] - (counts.cumsum(0) - counts)).repeat_interleave(counts)
            token = self.token[starts + torch.arange(int(counts.sum()))]
            keys = token * self.n_small + column[asked].repeat_interleave(counts)
            place = torch.searchsorted(self._keys, keys).clamp(max=max(len(self._keys) - 1, 0))
            hit = self._keys[place] == keys if len(self._keys) else torch.zeros(len(keys), dtype=torch.bool)
            row = torch.arange(len(asked)).repeat_interleave(counts)
            hits = torch.zeros(len(asked), dtype=torch.float64).index_add_(0, row, hit.double())
            least[asked] = torch.minimum(least[asked], hits / counts)
        return least.masked_fill(least.isinf(), math.nan)


# Which features are found, and how many there are


@dataclass(frozen=True, eq=False)
class RecoveryCurve:
    """What :func:`feature_recovery_curve` returns: ``P(found) = σ(intercept + slope · log10 frequency)``.

    Attributes
    ----------
    results : dict of str to Result
        ``slope``, ``auc``.
    intercept, slope : float
        Of the logistic fit; NaN where all features are found, or none.
    half : float
        Frequency at which half of the features are found; NaN where the slope is not positive.
    half_interval : tuple of float
        95% of the bootstrap. An end is infinite or 0 where more than 2.5% of the samples had no such frequency.
    found : Tensor [n] bool
    frequency : Tensor [n] float64
    resampled : Tensor [m, 2] float64
        Intercepts and slopes of the bootstrap, those that are defined.
    permuted : Tensor [m, 2] float64
        The same under the null.
    """

    results: dict[str, Result]
    intercept: float
    slope: float
    half: float
    half_interval: tuple[float, float]
    found: Tensor
    frequency: Tensor
    resampled: Tensor
    permuted: Tensor

    def predict(self, frequency: Tensor) -> Tensor:
        """P(found) at some frequencies."""
        return torch.sigmoid(self.intercept + self.slope * frequency.double().log10())

    def to_frame(self) -> Any:
        """All results as one pandas.DataFrame."""
        return frame(self.results.values())

    def plot(self, axes: Any = None, bins: int = 8) -> Any:
        """Shares found in bins of as many features, the fit with its 95% band, and fits of permuted frequencies."""
        axes = new_axes() if axes is None else axes
        log = self.frequency.log10()
        grid = torch.linspace(float(log.min()), float(log.max()), 200, dtype=torch.float64)
        for intercept, slope in self.permuted[:20].tolist():
            axes.plot(10**grid, torch.sigmoid(intercept + slope * grid), color="0.8", lw=0.8, zorder=0)
        if len(self.resampled):
            curves = torch.sigmoid(self.resampled[:, :1] + self.resampled[:, 1:] * grid)
            low, high = curves.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
            axes.fill_between(10**grid, low, high, color="C0", alpha=0.2, lw=0)
        axes.plot(10**grid, self.predict(10**grid), color="C0", label="logistic fit")
        for part in log.argsort().tensor_split(min(bins, len(log))):
            axes.plot(10 ** log[part].mean(), self.found[part].double().mean(), "o", color="0.2", ms=5)
        if self.half == self.half and log.min() <= math.log10(self.half) <= log.max():
            axes.axvline(self.half, color="C0", ls="--", lw=1, label=f"half found at {self.half:.2g}")
        axes.set_xscale("log")
        axes.set(xlabel="share of tokens that have the feature", ylabel="share of features found", ylim=(-0.03, 1.03))
        axes.legend(frameon=False)
        return axes


def feature_recovery_curve(
    found: Tensor,
    frequency: Tensor,
    found_at: float = 0.9,
    n_bootstrap: int = 200,
    n_null: int = 100,
    seed: int = 0,
) -> RecoveryCurve:
    """How likely a feature is found, by how frequent it is: a logistic fit on the logarithm of the frequency.

    ``slope``
        In logits a decade. Null: frequencies permuted.
    ``auc``
        Chance that a feature that is found is more frequent than one that is not. Null: the same.

    Parameters
    ----------
    found : Tensor [n]
        Whether each feature is found, or a score of it such as its largest cosine with a decoder row.
    frequency : Tensor [n]
        Share of the tokens that have it, above 0.
    found_at : float
        Score above which a feature counts as found.
    n_bootstrap, n_null : int
        Samples of features with replacement; permutations.
    seed : int
        Determines both.

    Raises
    ------
    ValueError
        For fewer than two features, scores or frequencies that are not finite, frequencies that are not positive, and
        frequencies that are all the same.
    """
    if found.dim() != 1 or len(found) < 2 or found.shape != frequency.shape:
        raise ValueError(
            "found and frequency must be vectors with a number for each of at least two features, "
            f"got shapes {tuple(found.shape)} and {tuple(frequency.shape)}"
        )
    found, frequency = found.detach().cpu(), frequency.detach().cpu().double()
    if not (frequency.isfinite() & (frequency > 0)).all():
        raise ValueError("frequency must be finite and above 0: leave out features that never occur")
    if found.is_floating_point() and not found.isfinite().all():
        raise ValueError("found must be finite: a feature without a score is not found")
    _check_count(n_bootstrap=n_bootstrap, n_null=n_null)
    found = found > found_at if found.is_floating_point() else found.bool()
    log = frequency.log10()
    if log.min() == log.max():
        raise ValueError(f"frequency must differ between features, got {float(frequency[0]):g} for all")
    generator = null_generator(seed)
    intercept, slope = _logistic(found[None], log[None])[0].tolist()
    drawn = torch.randint(len(found), (n_bootstrap, len(found)), generator=generator)
    resampled = _logistic(found[drawn], log[drawn])
    orders = torch.stack([torch.randperm(len(found), generator=generator) for _ in range(n_null)])
    permuted = _logistic(found.expand(n_null, -1), log[orders])
    results = {
        "slope": Result(
            "slope of the recovery curve, logits a decade", slope, {"frequencies permuted": permuted[:, 1]}
        ),
        "auc": Result(
            "chance that a feature that is found is more frequent than one that is not",
            _auc(found, log),
            {"frequencies permuted": samples(_auc(found, log[order]) for order in orders)},
        ),
    }
    return RecoveryCurve(
        results=results,
        intercept=intercept,
        slope=slope,
        half=_half(intercept, slope),
        half_interval=_half_interval(resampled) if slope == slope else (math.nan, math.nan),
        found=found,
        frequency=frequency,
        resampled=resampled[resampled[:, 1].isfinite()],
        permuted=permuted,
    )


def _logistic(found: Tensor, log: Tensor) -> Tensor:
    """Intercept and slope of each row of both ``[m, n]``: ``[m, 2]``; NaN for one class, or one frequency."""
    center, scale = log.mean(), log.std()
    x, y = (log - center) / scale, found.double()
    fitted = torch.zeros(len(x), 2, dtype=torch.float64)
    ridge = torch.diag(torch.tensor([0.0, _RIDGE], dtype=torch.float64))
    for _ in range(_NEWTON):
        p = torch.sigmoid(fitted[:, :1] + fitted[:, 1:] * x)
        gradient = torch.stack([(y - p).sum(1), ((y - p) * x).sum(1)], 1) - fitted @ ridge
        weight = p * (1 - p)
        moments = [(weight * power).sum(1) for power in (torch.ones_like(x), x, x * x)]
        curvature = torch.stack([moments[0], moments[1], moments[1], moments[2]], 1).view(-1, 2, 2) + ridge
        step = torch.linalg.lstsq(curvature, gradient[:, :, None]).solution.squeeze(2)
        step = step / (step.norm(dim=1, keepdim=True) / 2).clamp(min=1)  # else it leaps where the curve is flat
        fitted += step
        if step.abs().max() < 1e-8:
            break
    slope = fitted[:, 1] / scale
    undefined = (found.all(1) | ~found.any(1) | (log == log[:, :1]).all(1))[:, None]
    return torch.stack([fitted[:, 0] - slope * center, slope], 1).masked_fill(undefined, math.nan)


def _half(intercept: float, slope: float) -> float:
    """Frequency at which the curve is one half."""
    if not slope > 0:
        return math.nan
    exponent = -intercept / slope
    return 10.0**exponent if abs(exponent) < 300 else math.inf if exponent > 0 else 0.0


def _half_interval(resampled: Tensor) -> tuple[float, float]:
    """95% of the bootstrap's frequencies at one half."""
    halves = torch.tensor([_half(*row) for row in resampled.tolist()], dtype=torch.float64).sort().values
    # A sample without one could be on either side, so it counts at both ends.
    low, high = halves.nan_to_num(nan=0.0).sort().values, halves.nan_to_num(nan=math.inf).sort().values
    at = (len(halves) - 1) * 0.025
    return float(low[math.floor(at)]), float(high[math.ceil(len(halves) - 1 - at)])


@dataclass(frozen=True, eq=False)
class TotalFeatures:
    """What :func:`estimate_total_features` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``chao``, ``lincoln_petersen``, ``jackknife``, ``spread``.
    observed : int
        Features that at least one seed has found.
    found_by : Tensor [n_seeds + 1] int64
        How many of them were found by 0, 1, 2 … seeds; the first is 0.
    equal_rates : float
        Features there would be if each were as easy to find as any other; infinite where no two seeds share one.
    interval : dict of str to tuple of float
        95% of the bootstrap for each estimator.
    error : dict of str to float
        Standard deviation of the bootstrap.
    """

    results: dict[str, Result]
    observed: int
    found_by: Tensor
    equal_rates: float
    interval: dict[str, tuple[float, float]]
    error: dict[str, float]

    def to_frame(self) -> Any:
        """All results as one pandas.DataFrame."""
        return frame(self.results.values())


def estimate_total_features(
    found_by_seed: Tensor, n_bootstrap: int = 200, n_null: int = 200, seed: int = 0
) -> TotalFeatures:
    """How many features there are to be found, from how often several seeds find the same: capture and recapture.

    With Q_i features found by exactly i of m seeds, S in all:

    ``chao``
        ``S + (m − 1) / m · Q_1 (Q_1 − 1) / (2 (Q_2 + 1))``, Chao's estimator for incidence (Chao 2): a lower bound in
        expectation, whatever the rates at which features are found.
    ``lincoln_petersen``
        ``(n_a + 1)(n_b + 1) / (n_ab + 1) − 1`` (Chapman), mean over the pairs of seeds: for equal rates.
    ``jackknife``
        ``S + Q_1 (m − 1) / m``, of first order: never more than S + Q_1.
    ``spread``
        Variance over the features seen of the number of seeds that found them. Above its null where some features are
        easier to find than others: then all three numbers are too small.

    The null of all four has as many features as equal rates would need, each found by a seed with the same chance,
    independently; every seed finds as many as it did, on average.

    Parameters
    ----------
    found_by_seed : Tensor [n_seeds, n_features] bool
        Which seeds found which features, once the features of all seeds are matched. Columns that no seed found are
        taken to be unknown, so that a truth may be given whole.
    n_bootstrap, n_null : int
        Samples for the error, which draws the estimated number of features, the unseen ones among them, from what
        was observed; samples of the null.
    seed : int
        Determines both.

    Raises
    ------
    ValueError
        For fewer than two seeds, a seed that found nothing, and what is not a table of truth values.

    References
    ----------
    Chao, *Estimating the population size for capture-recapture data with unequal catchability*, Biometrics 43 (1987);
    Chapman (1951); Burnham & Overton, *Biometrika* 65 (1978), for the jackknife.
    """
    if found_by_seed.dim() != 2 or len(found_by_seed) < 2:
        raise ValueError(
            f"found_by_seed must be [seeds, features] of two seeds at least, got {tuple(found_by_seed.shape)}"
        )
    if found_by_seed.dtype != torch.bool:
        raise ValueError(f"found_by_seed must hold truth values, got {found_by_seed.dtype}; compare scores first")
    _check_count(n_null=n_null)
    _check_count(least=2, n_bootstrap=n_bootstrap)  # which have a standard deviation
    table = found_by_seed.detach().cpu()
    table = table[:, table.any(0)]
    sizes = table.sum(1)
    if not sizes.all():
        raise ValueError("found_by_seed must have a feature for every seed: leave out seeds that found none")
    generator = null_generator(seed)
    m, observed = table.shape
    equal = _equal_rates(sizes, observed)
    rates = sizes / equal
    drawn = []
    if math.isfinite(equal):
        for _ in range(n_null):
            # Fewer features than are needed cannot be drawn, so a broken number is rounded at random.
            number = int(equal + float(torch.rand((), generator=generator)))
            drawn.append(torch.rand(m, number, generator=generator) < rates[:, None])
    results, interval, error = {}, {}, {}
    for key, (name, estimate) in _ESTIMATORS.items():
        value = estimate(table)
        tail = "greater" if key == "spread" else "two-sided"
        null = {"equal and independent rates": samples(estimate(other) for other in drawn)}
        results[key] = Result(name, value, null, tail=tail)
        if key == "spread":
            continue
        total = max(observed, round(value))
        redrawn = []
        for _ in range(n_bootstrap):
            columns = torch.randint(total, (total,), generator=generator)
            redrawn.append(estimate(table[:, columns[columns < observed]]))  # the others stay unseen
        numbers = samples(redrawn)
        low, high = numbers.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        interval[key], error[key] = (low, high), float(numbers.std())
    found_by = torch.bincount(table.sum(0), minlength=m + 1)
    return TotalFeatures(results, observed, found_by, equal, interval, error)


def _found_by(table: Tensor) -> Tensor:
    """How many features were found by 0, 1, 2 … seeds, the first taken to be 0: ``[n_seeds + 1]`` int64."""
    counts = torch.bincount(table.sum(0), minlength=len(table) + 1)
    counts[0] = 0
    return counts


def _chao(table: Tensor) -> float:
    counts = _found_by(table)
    once, twice = int(counts[1]), int(counts[2])
    return int(counts.sum()) + (len(table) - 1) / len(table) * once * (once - 1) / (2 * (twice + 1))


def _lincoln_petersen(table: Tensor) -> float:
    both = (table.double() @ table.double().T).tolist()
    pairs = combinations(range(len(table)), 2)
    found = [(both[a][a] + 1) * (both[b][b] + 1) / (both[a][b] + 1) - 1 for a, b in pairs]
    return sum(found) / len(found)


def _jackknife(table: Tensor) -> float:
    counts = _found_by(table)
    return int(counts.sum()) + int(counts[1]) * (len(table) - 1) / len(table)


def _spread(table: Tensor) -> float:
    counts = table.sum(0)
    seen = counts[counts > 0].double()
    return float(seen.var(correction=0)) if len(seen) else math.nan


_ESTIMATORS: dict[str, tuple[str, Callable[[Tensor], float]]] = {
    "chao": ("features in all, at least (Chao)", _chao),
    "lincoln_petersen": ("features in all, at equal rates (Lincoln–Petersen)", _lincoln_petersen),
    "jackknife": ("features in all (jackknife)", _jackknife),
    "spread": ("variance of how many seeds find a feature", _spread),
}


def _equal_rates(sizes: Tensor, observed: int) -> float:
    """The most likely number of features if every seed finds each with the same chance, independently.

    That solves ``1 − S / N = Π (1 − n_s / N)`` (Darroch 1958).
    """
    numbers = sizes.double().tolist()
    if sum(numbers) == observed:
        return math.inf  # no feature was found twice
    if max(numbers) == observed:
        return float(observed)  # one seed has all that any has

    def excess(log: float) -> float:
        total = observed * math.exp(log)
        return math.log1p(-observed / total) - sum(math.log1p(-number / total) for number in numbers)

    high = 1.0
    while excess(high) < 0:
        high *= 2
    return observed * math.exp(brentq(excess, 1e-12, high))


# Shared


def _directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Random directions of unit norm, ``[n, d]``."""
    return normalize(torch.randn(n, d, generator=generator), dim=1)


def _like(rows: Tensor, n: int, count: int, generator: torch.Generator) -> Iterable[Tensor]:
    """`count` draws of n random directions ``[n, d]`` with the second moment of the unit rows."""
    unit = normalize(rows, dim=1).cpu().double()
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
    root = ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()
    return (normalize(torch.randn(n, rows.shape[1], generator=generator) @ root, dim=1) for _ in range(count))


def _rotation(d: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(d, d, generator=generator))[0]


def _checked_rows(name: str, rows: Tensor, d: int | None = None) -> Tensor:
    """Unit rows on the CPU, in float32."""
    if rows.dim() != 2 or not rows.numel() or (d is not None and rows.shape[1] != d):
        width = "d" if d is None else d
        raise ValueError(f"{name} must be rows [n, {width}], got shape {tuple(rows.shape)}")
    rows = rows.detach().cpu().float()
    norms = rows.norm(dim=1)
    if not (norms.isfinite() & (norms > 0)).all():
        raise ValueError(f"{name} must be finite rows of a norm above 0: leave out latents that are dead")
    return normalize(rows, dim=1)


def _check_between(name: str, number: float) -> None:
    if not 0 < number < 1:
        raise ValueError(f"{name} must be above 0 and below 1, got {number}")


def _check_count(least: int = 1, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")

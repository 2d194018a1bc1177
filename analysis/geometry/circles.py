"""Features of two dimensions: circles among the clusters of a dictionary.

A plane of points is irreducible where no rotation makes its coordinates independent (:func:`separability`) and no
projection has most of the points in one place (:func:`mixture_index`): then it is neither two features of one dimension
each nor a mixture of features that are never there together. :func:`cluster_search` ranks the clusters of a dictionary
by both, and :func:`closure` asks of labelled points whether a curve comes back to where it began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.nulls import permuted
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples

try:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.cluster import SpectralClustering
except ImportError as error:
    raise ImportError("this analysis needs scipy and scikit-learn: pip install 'sparsekern[analysis]'") from error

_ANGLES = 32  # of the separability, a quarter turn
_TURNS = 180  # of the mixture index, half a turn
_FEW_TURNS = 48  # of it in a search over many planes
_CHUNK = 2**22  # projections at a time
_TILE = 8192  # rows compared at a time
_SPECTRAL = 16384  # latents up to which all pairs of them are compared
_LEAST_POINTS = 100

# Points in a plane


def separability(points: Tensor, bins: int | None = None, n_angles: int = _ANGLES) -> float:
    """The least mutual information, in bits, that the two coordinates of points have under any rotation.

    From a histogram between the least and the largest coordinate, with the correction of Miller and Madow: without it
    any few points depend on each other. It can come out a little below 0.

    Parameters
    ----------
    points : Tensor [n, 2]
        At least two.
    bins : int or None
        A side; by default ``√(n / 8)``, at most 40.
    n_angles : int
        Evenly spaced over a quarter turn, after which the coordinates have changed places.

    Returns
    -------
    float
        NaN where all points are the same.

    Raises
    ------
    ValueError
        For points of another shape, not finite or fewer than two, and numbers out of range.

    References
    ----------
    Engels et al., *Not all language model features are linear* (arXiv 2405.14860), section 3, without the correction;
    Miller, *Note on the bias of information estimates* (1955).
    """
    p = _checked_points(points, 2)
    for name, number, least in (("bins", bins, 2), ("n_angles", n_angles, 1)):
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    side = max(2, min(40, int(math.sqrt(len(p) / 8)))) if bins is None else bins
    if not (p - p[0]).any():
        return math.nan
    lowest = math.inf
    for part in _angles(n_angles, math.pi / 2).split(max(1, _CHUNK // max(len(p), side * side))):
        a, b = (_binned(turned, side) for turned in _turned(p, part))
        n_here = len(part)
        cells = (torch.arange(n_here)[:, None] * side + a) * side + b
        counts = torch.bincount(cells.flatten(), minlength=n_here * side * side).view(n_here, side, side).double()
        information = _entropy(counts.sum(2)) + _entropy(counts.sum(1)) - _entropy(counts.flatten(1))
        lowest = min(lowest, float(information.min()))
    return lowest / math.log(2)


def mixture_index(points: Tensor, epsilon: float = 0.1, n_angles: int = _TURNS) -> float:
    """The largest share of points that lie near one line: max over v, c of P(|v·f + c| < ε · rms(v·f + c)).

    With the mean at 0 and the standard deviation of v·f at 1, a point u is near the line at t where
    ``(u − t)² < ε² (1 + t²)``: for t in an interval about u. So the maximum over c is the largest number of intervals
    that overlap, exactly; that over v is taken over angles, and again with eight times as many about the best.

    Parameters
    ----------
    points : Tensor [n, 2]
        At least two.
    epsilon : float
        Above 0 and below 1.
    n_angles : int
        Evenly spaced over half a turn.

    Returns
    -------
    float
        1 where the points lie on a line, NaN where all are the same.

    Raises
    ------
    ValueError
        For points of another shape, not finite or fewer than two, and numbers out of range.

    References
    ----------
    Engels et al. (arXiv 2405.14860), section 3, which climbs a smoothed version by gradient instead.
    """
    p = _checked_points(points, 2)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be above 0 and below 1, got {epsilon}")
    if n_angles < 1:
        raise ValueError(f"n_angles must be at least 1, got {n_angles}")
    p = p - p.mean(0)
    size = p.norm(dim=1).max()
    if not size > 0:
        return math.nan
    if torch.linalg.matrix_rank(p / size, tol=1e-9 * len(p) ** 0.5) < 2:
        return 1.0
    angles = _angles(n_angles, math.pi)
    coarse = _near_a_line(p, angles, epsilon)
    best = angles[coarse.argmax()]
    finer = best + torch.linspace(-1, 1, 17, dtype=p.dtype) * math.pi / n_angles
    return float(torch.cat([coarse, _near_a_line(p, finer, epsilon)]).max())


@dataclass(frozen=True, eq=False)
class Plane(Results):
    """What :func:`plane_scores` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``separability`` S in bits, ``mixture`` index M, and ``score`` (1 − M) · S.
    """

    results: dict[str, Result]

    @property
    def score(self) -> float:
        """(1 − M) · S."""
        return self.results["score"].value


def plane_scores(points: Tensor, bins: int | None = None, *, n_null: int = 20, seed: int = 0) -> Plane:
    """Separability and mixture index of points in a plane, beside points of independent coordinates.

    Parameters
    ----------
    points : Tensor [n, 2]
        At least two.
    bins : int or None
        As for :func:`separability`.
    n_null : int
        Samples of each null: the coordinates along the principal axes permuted against each other, and a Gaussian of
        the same covariance.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        As :func:`separability` does.
    """
    p = _checked_points(points, 2)
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    p = _principal(p - p.mean(0))
    generator = null_generator(seed)
    makers: dict[str, Callable[[], Tensor]] = {
        "coordinates permuted": lambda: _independent(p, generator),
        "Gaussian": lambda: torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.std(0, correction=0),
    }
    value = _measures(p, bins)
    drawn = {name: [_measures(make(), bins) for _ in range(n_null)] for name, make in makers.items()}
    titles = {
        "separability": ("least mutual information under rotation, bits", "greater"),
        "mixture": ("largest share of points near a line", "less"),
        "score": ("(1 − mixture index) · separability", "greater"),
    }
    return Plane(
        {
            key: Result(
                title, value[index], {name: samples(m[index] for m in rows) for name, rows in drawn.items()}, tail=tail
            )
            for index, (key, (title, tail)) in enumerate(titles.items())
        }
    )


def closure(points: Tensor, *, n_null: int = 200, seed: int = 0) -> Result:
    """Whether points in their order close: distance of the last from the first over the mean of adjacent ones.

    Near 1 for a circle, up to n − 1 for a line. An open curve loads the lowest harmonic as a circle does; this tells
    them apart. The null permutes the order: then all distances are alike, and the number is near 1 as well. So a small
    p says that the curve is open, and a large one alone says nothing: whether there is an order at all is for
    :func:`~sparsekern.analysis.geometry.fourier_power` to tell.

    Parameters
    ----------
    points : Tensor [n, d]
        In their order, at least four.
    n_null : int
        Permutations.
    seed : int
        Determines them.

    Returns
    -------
    Result
        NaN where adjacent points are all the same.

    Raises
    ------
    ValueError
        For fewer than four points, or such that are not finite.
    """
    p = _checked_points(points, None, least=4)
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    generator = null_generator(seed)
    drawn = (_closure(p[torch.randperm(len(p), generator=generator)]) for _ in range(n_null))
    title = "distance of last from first over that of adjacent points"
    return Result(title, _closure(p), {"order permuted": samples(drawn)})


# Clusters of a dictionary


@dataclass(frozen=True, eq=False)
class CircleSearch(Results):
    """What :func:`cluster_search` returns: n clusters that were measured, the best first.

    Attributes
    ----------
    results : dict of str to Result
        ``best``, the highest score (1 − M) · S of a cluster; ``mean``, the mean over clusters.
    clusters : list of Tensor [m] int64
        Their latents.
    scores, separability, mixture : Tensor [n] float64
        Of the best of a cluster's planes.
    planes : Tensor [n] int64
        Which that is: p for the principal components p and p + 1, counted from 0.
    p : Tensor [n] float64
        Share of the samples of the hardest null whose *best* cluster scores as high: corrected for having looked at n.
    cosine : Tensor [n] float64
        Mean cosine of the decoder rows of a cluster.
    tokens : Tensor [n] int64
        On which a latent of the cluster is active.
    """

    results: dict[str, Result]
    clusters: list[Tensor]
    scores: Tensor
    separability: Tensor
    mixture: Tensor
    planes: Tensor
    p: Tensor
    cosine: Tensor
    tokens: Tensor

    def plot(self, axes: Any = None) -> Any:
        """Separability against mixture index, a dot for each cluster."""
        axes = new_axes() if axes is None else axes
        axes.plot(self.mixture.tolist(), self.separability.tolist(), "o", color="C0", ms=4, mew=0, alpha=0.6)
        for rank in range(min(5, len(self.clusters))):
            axes.annotate(f"{rank + 1}", (float(self.mixture[rank]), float(self.separability[rank])), fontsize=8)
        axes.set(xlabel="mixture index", ylabel="separability, bits", xlim=(0, 1))
        return axes


@torch.no_grad()
def dictionary_clusters(
    decoder: Tensor,
    method: str = "neighbours",
    *,
    cos: float = 0.5,
    n_clusters: int = 1000,
    latents: Tensor | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Clusters of the rows of a dictionary.

    Parameters
    ----------
    decoder : Tensor [W, d]
        Rows of any norm; those of zeros are in no cluster.
    method : {"neighbours", "spectral"}
        ``"neighbours"``: what hangs together where each row is joined to its two nearest if their cosine is above
        `cos`; exact at any width, without a W × W tensor. ``"spectral"``: spectral clustering on
        1 − arccos(cosine) / π, with all pairs of rows in memory.
    cos : float
        Of the neighbours; above −1 and below 1.
    n_clusters : int
        Of the spectral clustering, at most half of the rows.
    latents : Tensor [m] int64 or None
        Rows to cluster, by default all: give those that are alive.
    seed : int
        Of the spectral clustering.

    Returns
    -------
    list of Tensor [m] int64
        Latents of each cluster, rising; clusters by falling size, those of one latent left out.

    Raises
    ------
    ValueError
        For rows that are not finite, unknown methods, numbers out of range, and more than 16,384 rows for the spectral
        clustering.

    References
    ----------
    Engels et al. (arXiv 2405.14860), section 4, which uses the graph for Mistral and the spectral clustering for GPT-2.
    """
    if decoder.dim() != 2 or not decoder.numel() or not decoder.isfinite().all():
        raise ValueError(f"decoder must be finite rows [W, d], got shape {tuple(decoder.shape)}")
    if method not in ("neighbours", "spectral"):
        raise ValueError(f"method must be neighbours or spectral, got {method!r}")
    if not -1 < cos < 1:
        raise ValueError(f"cos must be above −1 and below 1, got {cos}")
    asked = torch.arange(len(decoder)) if latents is None else _checked_latents(latents, len(decoder))
    asked = asked[decoder[asked.to(decoder.device)].any(1).cpu()]
    if len(asked) < 2:
        return []
    unit = normalize(decoder[asked.to(decoder.device)].detach().float(), dim=1)
    if method == "neighbours":
        labels = _joined(unit, cos)
    else:
        if len(unit) > _SPECTRAL:
            raise ValueError(
                f"spectral takes at most {_SPECTRAL} rows, got {len(unit)}: give latents, or use neighbours"
            )
        if not n_clusters >= 2:
            raise ValueError(f"n_clusters must be at least 2, got {n_clusters}")
        likeness = 1 - (unit @ unit.T).clamp(-1, 1).arccos() / math.pi
        kept = max(1, min(n_clusters, len(unit) // 2))
        # Not assign_labels="cluster_qr": it ignores signs, which puts opposite rows in one cluster.
        fitted = SpectralClustering(kept, affinity="precomputed", n_init=1, random_state=seed)
        labels = torch.from_numpy(fitted.fit_predict(likeness.cpu().double().numpy())).long()
    count = torch.bincount(labels)
    order = labels.argsort(stable=True)
    groups = [asked[part] for part in order.split(count.tolist()) if len(part) > 1]
    return sorted(groups, key=lambda group: -len(group))


@torch.no_grad()
def cluster_search(
    decoder: Tensor,
    codes: sk.SparseCodes | sk.CSRCodes,
    clusters: Sequence[Tensor] | None = None,
    *,
    n_planes: int = 4,
    largest: int = 500,
    max_points: int = 4000,
    least_points: int = _LEAST_POINTS,
    nulls: Sequence[str] = ("membership", "dictionary", "coordinates"),
    n_null: int = 5,
    seed: int = 0,
) -> CircleSearch:
    """The clusters of a dictionary by how much their reconstructions look like one feature of two dimensions.

    The points of a cluster are what its latents alone write on the tokens where one of them is active. They are
    projected on the planes of principal components 1 and 2, 2 and 3, …, and a cluster's score is (1 − M) · S of its
    best plane. A sample of a null costs as much as the search.

    Parameters
    ----------
    decoder : Tensor [W, d]
        Rows of any norm.
    codes : SparseCodes or CSRCodes
        Of the tokens; d_sae is W.
    clusters : sequence of Tensor of ints, or None
        By default the "neighbours" of :func:`dictionary_clusters` among the latents that are active.
    n_planes : int
        Planes that are tried.
    largest : int
        Latents of a cluster above which it is left out.
    max_points, least_points : int
        So many tokens of a cluster are drawn; with fewer it is left out, as fewer fill no histogram.
    nulls : sequence of {"membership", "dictionary", "coordinates"}
        ``"membership"``: clusters of these sizes, of random active latents. ``"dictionary"``: the same codes with
        random decoder rows of the same norms; what codes make by themselves. ``"coordinates"``: the coordinates in
        every plane permuted against each other.
    n_null : int
        Samples of each null.
    seed : int
        Determines nulls and drawn tokens.

    Returns
    -------
    CircleSearch

    Raises
    ------
    ValueError
        For widths that do not fit, unknown names, numbers out of range, and where no cluster has enough tokens.

    References
    ----------
    Engels et al. (arXiv 2405.14860), section 4, without nulls.
    """
    if decoder.dim() != 2 or len(decoder) != codes.d_sae or not decoder.isfinite().all():
        raise ValueError(f"decoder must be finite rows [{codes.d_sae}, d], got shape {tuple(decoder.shape)}")
    for name, number, least in (
        ("n_planes", n_planes, 1),
        ("largest", largest, 2),
        ("least_points", least_points, 2),
        ("max_points", max_points, least_points),
        ("n_null", n_null, 0),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    makers = {
        "membership": "random latents",
        "dictionary": "random dictionary",
        "coordinates": "coordinates permuted",
    }
    unknown = [name for name in nulls if name not in makers]
    if unknown:
        raise ValueError(f"nulls must be among {', '.join(makers)}, got {unknown[0]!r}")
    rows = decoder.detach().cpu().double()
    active = codes.firing_counts().cpu() > 0
    if clusters is None:
        found = dictionary_clusters(decoder, latents=active.nonzero().squeeze(1))
    else:
        found = [_checked_latents(cluster, len(decoder)) for cluster in clusters]
    table = _table(codes)
    generator = null_generator(seed)

    def search(groups: Iterable[Tensor], dictionary: Tensor, shuffled: bool = False) -> list[_Scored]:
        scored = []
        for group in groups:
            z = _drawn(table, group, max_points, generator)
            if len(z) >= least_points:
                scored.append(_scored(group, z, dictionary, n_planes, generator if shuffled else None))
        return scored

    measured = search((group for group in found if 2 <= len(group) <= largest), rows)
    measured = [one for one in measured if not math.isnan(one.score)]
    if not measured:
        raise ValueError(f"clusters must have one whose latents are active on {least_points} tokens and vary")
    measured.sort(key=lambda one: -one.score)
    groups = [one.latents for one in measured]
    drawn: dict[str, list[tuple[float, float]]] = {}
    pool = active.nonzero().squeeze(1)
    for name in nulls:
        drawn[makers[name]] = []
        for _ in range(n_null):
            if name == "membership":
                sizes = (len(group) for group in groups)
                again = search((pool[torch.randperm(len(pool), generator=generator)[:size]] for size in sizes), rows)
            elif name == "dictionary":
                random = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
                again = search(groups, normalize(random, dim=1) * rows.norm(dim=1, keepdim=True))
            else:
                again = search(groups, rows, shuffled=True)
            values = samples(one.score for one in again).nan_to_num(0)
            drawn[makers[name]].append((float(values.max()), float(values.mean())) if len(values) else (0.0, 0.0))
    scores = samples(one.score for one in measured)
    titles = {"best": "highest score of a cluster", "mean": "mean score of the clusters"}
    values = {"best": float(scores.max()), "mean": float(scores.mean())}
    results = {
        key: Result(title, values[key], {name: samples(pair[index] for pair in pairs) for name, pairs in drawn.items()})
        for index, (key, title) in enumerate(titles.items())
    }
    hardest = [_p(scores, maxima) for maxima in results["best"].nulls.values()]
    p = torch.stack(hardest).amax(0) if hardest else torch.full_like(scores, math.nan)
    return CircleSearch(
        results,
        groups,
        scores,
        samples(one.separability for one in measured),
        samples(one.mixture for one in measured),
        torch.tensor([one.plane for one in measured]),
        p,
        samples(_mean_cosine(rows[group]) for group in groups),
        torch.tensor([len(_tokens(table, group)) for group in groups]),
    )


# Parts of the measures


def _angles(n: int, span: float) -> Tensor:
    return torch.arange(n, dtype=torch.float64) * span / n


def _turned(p: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Both coordinates of points ``[n, 2]`` turned by each angle, ``[angles, n]`` each."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return cos * p[:, 0] + sin * p[:, 1], cos * p[:, 1] - sin * p[:, 0]


def _binned(values: Tensor, bins: int) -> Tensor:
    """The bin of each value, between the least and the largest of its row."""
    low, high = values.aminmax(dim=1, keepdim=True)
    width = (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return ((values - low) / width * bins).long().clamp(0, bins - 1)


def _entropy(counts: Tensor) -> Tensor:
    """Entropies of histograms ``[a, bins]`` in nats, with Miller's and Madow's correction."""
    n = counts.sum(1)
    plain = n.log() - torch.special.xlogy(counts, counts).sum(1) / n
    return plain + ((counts > 0).sum(1) - 1) / (2 * n)


def _near_a_line(p: Tensor, angles: Tensor, epsilon: float) -> Tensor:
    """For each angle the largest share of centred points near one line across it."""
    shares = []
    for part in angles.split(max(1, _CHUNK // len(p))):
        u = _turned(p, part)[0].sort(dim=1).values
        sd = u.square().mean(1, keepdim=True).sqrt()
        u = u / sd
        # Where (u − t)² < ε² (1 + t²); both ends rise with u, so that they are sorted.
        half = epsilon * (1 + u.square() - epsilon**2).sqrt()
        starts, ends = (u - half) / (1 - epsilon**2), (u + half) / (1 - epsilon**2)
        open_here = torch.arange(1, len(p) + 1) - torch.searchsorted(ends, starts, right=True)
        shares.append(open_here.amax(1).double() / len(p))
    return torch.cat(shares)


def _measures(p: Tensor, bins: int | None, n_angles: int = _TURNS) -> tuple[float, float, float]:
    """Separability, mixture index, and score."""
    s, m = separability(p, bins), mixture_index(p, n_angles=n_angles)
    return s, m, (1 - m) * s


def _principal(centred: Tensor) -> Tensor:
    """Coordinates of centred points along their principal axes."""
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
    return centred @ axes


def _independent(p: Tensor, generator: torch.Generator) -> Tensor:
    """Every column but the first permuted on its own."""
    return torch.cat([p[:, :1], permuted(p[:, 1:], 0, generator)], 1)


def _closure(p: Tensor) -> float:
    adjacent = (p[1:] - p[:-1]).norm(dim=1).mean()
    return float((p[-1] - p[0]).norm() / adjacent) if adjacent > 0 else math.nan


# Parts of the search


@dataclass(frozen=True, eq=False)
class _Scored:
    latents: Tensor
    plane: int
    separability: float
    mixture: float
    score: float


def _scored(group: Tensor, z: Tensor, decoder: Tensor, n_planes: int, generator: torch.Generator | None) -> _Scored:
    """The best plane of what the latents `group` write with codes `z` ``[n, m]``; permuted with a generator."""
    # Rows of a triangular factor have the decoder rows' inner products, in m coordinates instead of d.
    rows = torch.linalg.qr(decoder[group].T, mode="r").R.T
    points = z @ rows
    points = _principal(points - points.mean(0))[:, : n_planes + 1]
    if generator is not None:
        points = _independent(points, generator)
    best = _Scored(group, 0, math.nan, math.nan, math.nan)
    spread = points.square().sum(0)
    for plane in range(points.shape[1] - 1):
        if not spread[plane + 1] > 1e-12 * spread[0]:
            break
        s, m, score = _measures(points[:, plane : plane + 2], None, _FEW_TURNS)
        if math.isnan(best.score) or score > best.score:
            best = _Scored(group, plane, s, m, score)
    return best


def _joined(unit: Tensor, cos: float) -> Tensor:
    """Components of the graph that joins each row to its two nearest above a cosine."""
    n = len(unit)
    k = min(3, n)
    ends: list[Tensor] = []
    starts: list[Tensor] = []
    # The fused top k ends with a ReLU, so cosines are shifted to be positive.
    shift = torch.full((n,), 2.0, device=unit.device)
    for part in torch.arange(n, device=unit.device).split(_TILE):
        values, near, _ = sk.topk_encode(unit[part], unit, shift, k)
        other = near.long() != part[:, None]
        good = other & (other.cumsum(1) <= 2) & (values - 2 > cos)
        row, slot = good.nonzero(as_tuple=True)
        starts.append(part[row].cpu())
        ends.append(near[row, slot].long().cpu())
    row, column = torch.cat(starts), torch.cat(ends)
    graph = csr_array((torch.ones(len(row)).numpy(), (row.numpy(), column.numpy())), shape=(n, n))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


@dataclass(frozen=True, eq=False)
class _Table:
    """Codes by latent: tokens and values of each."""

    start: list[int]
    token: Tensor
    value: Tensor

    def of(self, latent: int) -> slice:
        return slice(self.start[latent], self.start[latent + 1])


def _table(codes: sk.SparseCodes | sk.CSRCodes) -> _Table:
    form = codes.to_csr() if isinstance(codes, sk.SparseCodes) else codes
    kept = (form.values != 0).nonzero().squeeze(1)
    latent, token = form.col[kept].long().cpu(), form.rows()[kept].cpu()
    order = latent.argsort(stable=True)
    count = torch.bincount(latent, minlength=codes.d_sae)
    return _Table([0, *count.cumsum(0).tolist()], token[order], form.values[kept].double().cpu()[order])


def _tokens(table: _Table, group: Tensor) -> Tensor:
    """Tokens on which one of some latents is active, rising."""
    return torch.cat([table.token[table.of(latent)] for latent in group.tolist()]).unique()


def _drawn(table: _Table, group: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Codes ``[n, m]`` of some latents on tokens where one of them is active, at most so many."""
    tokens = _tokens(table, group)
    if len(tokens) > most:
        tokens = tokens[torch.randperm(len(tokens), generator=generator)[:most].sort().values]
    z = torch.zeros(len(tokens), len(group), dtype=torch.float64)
    if not len(tokens):
        return z
    for column, latent in enumerate(group.tolist()):
        part = table.of(latent)
        place = torch.searchsorted(tokens, table.token[part]).clamp(max=len(tokens) - 1)
        here = tokens[place] == table.token[part]
        z[place[here], column] = table.value[part][here]
    return z


def _mean_cosine(rows: Tensor) -> float:
    """Mean cosine of different rows."""
    unit = normalize(rows, dim=1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (len(rows) * (len(rows) - 1)))


def _p(scores: Tensor, maxima: Tensor) -> Tensor:
    """Share of the maxima that are at least each score, the score counted among them."""
    if not len(maxima):
        return torch.full_like(scores, math.nan)
    return (1 + (maxima >= scores[:, None]).sum(1)).double() / (1 + len(maxima))


# Checks


def _checked_points(points: Tensor, d: int | None, least: int = 2) -> Tensor:
    if points.dim() != 2 or (d is not None and points.shape[1] != d) or len(points) < least or not points.shape[1]:
        raise ValueError(
            f"points must be [n, {'d' if d is None else d}], at least {least}, got shape {tuple(points.shape)}"
        )
    if not points.isfinite().all():
        raise ValueError("points must be finite: remove those with NaN or infinity")
    return points.detach().cpu().double()


def _checked_latents(latents: Tensor | Sequence[int], width: int) -> Tensor:
    named = torch.as_tensor(latents, dtype=torch.int64).cpu()
    if named.dim() != 1 or (len(named) and not 0 <= int(named.min()) <= int(named.max()) < width):
        raise ValueError(f"latents must be whole numbers in [0, {width}), got shape {tuple(named.shape)}")
    if len(named.unique()) < len(named):
        raise ValueError("latents must not repeat")
    return named

"""What the experts of a routed SAE have divided among themselves: tokens, directions, latents.

Every number comes as a :class:`~sparsekern.analysis.results.Result`, beside the same number for a router that learned
nothing, for labels or latents that were permuted, and for k-means. ``docs/analyses/routing.md`` has the formulas, and
what each cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsekern import SwitchSAE
from sparsekern.analysis.results import Result, Results, new_axes, plain, samples
from sparsekern.analysis.tokens import UNLABELLED
from sparsekern.progress import Progress

try:
    from scipy.cluster.hierarchy import cophenet, dendrogram, leaves_list, linkage
    from scipy.linalg import subspace_angles
    from scipy.spatial.distance import squareform
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score
except ImportError as error:
    raise ImportError("this analysis needs scipy and scikit-learn: pip install 'sparsekern[analysis]'") from error

_BATCH = 8192  # tokens encoded at a time
_TILE = 2048  # rows a side of a tile of cosines: 16 MiB
_DENSE_TILE = 65536  # candidates in a tile beyond which all its cosines are computed
_KMEANS_TOKENS = 32768  # k-means is fitted on so many tokens at most
_KMEANS_FITS = 5  # of a control, which has no p
_NULL_QUERIES = 1024  # random latents whose duplicates are looked for among all others
_NULL_EXPERTS = 8  # under a permutation experts are alike: so many stand for all


@dataclass(frozen=True, eq=False)
class RouterGeometry(Results):
    """What :func:`router_geometry` returns. ``E`` is the number of experts, NaN stands for experts without latents.

    Attributes
    ----------
    results : dict of str to Result
        ``router_cosine``, ``evenness``, ``silhouette``, ``overlap``, ``duplicates_within``, ``duplicates_across``,
        ``similarity``, ``tree``, and ``ami_<name>`` for each set of labels.
    experts : Tensor [B] int64
        First expert of each token.
    loads : Tensor [E] int64
        Tokens of each expert.
    alive : Tensor [d_sae] bool
        Latents that are active on at least one token; those of the measures that are about latents are over these.
    router_cosines : Tensor [E, E]
        Cosines of the router's rows, less their mean.
    ranks : Tensor [E] int64
        Leading directions that hold the share `energy` of an expert's alive decoder rows: its span.
    overlaps : Tensor [E, E]
        Mean squared cosine of the principal angles between two spans: 0 orthogonal, 1 one inside the other.
    similarities : Tensor [E, E]
        Cosine of the experts' second moments, ``tr(C_i C_j) / (‖C_i‖ ‖C_j‖)`` with ``C`` the sum of a decoder row's
        outer products: the mean squared cosine between their latents, normalised. No rank has to be chosen.
    tree : Tensor [m - 1, 4] float64
        Average linkage of ``1 - similarities`` as scipy writes it, over the m experts in `tree_experts`.
    tree_experts : Tensor [m] int64
        Experts with alive latents.
    spans : list of Tensor [rank, d_in]
        Orthonormal basis of each expert's span.
    """

    results: dict[str, Result]
    experts: Tensor
    loads: Tensor
    alive: Tensor
    router_cosines: Tensor
    ranks: Tensor
    overlaps: Tensor
    similarities: Tensor
    tree: Tensor
    tree_experts: Tensor
    spans: list[Tensor]

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.loads)

    def principal_angles(self, first: int, second: int) -> Tensor:
        """Angles between two experts' spans in degrees, falling: ``[min(rank_i, rank_j)]``."""
        if 0 in (len(self.spans[first]), len(self.spans[second])):
            return torch.empty(0)
        angles = subspace_angles(self.spans[first].T.double().numpy(), self.spans[second].T.double().numpy())
        return torch.from_numpy(np.degrees(angles))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tokens and the spans, as plain JSON values."""
        matrices = ("router_cosines", "overlaps", "similarities", "tree")
        return plain(
            {
                "results": [record for result in self.results.values() for record in result.to_records()],
                "tokens": len(self.experts),
                "loads": self.loads.tolist(),
                "alive": int(self.alive.sum()),
                "ranks": self.ranks.tolist(),
                **{name: getattr(self, name).tolist() for name in matrices},
                "tree_experts": self.tree_experts.tolist(),
            }
        )

    def plot_loads(self, axes: Any = None) -> Any:
        """Bars of the experts' shares of the tokens, largest first, with the even share as a line."""
        axes = new_axes() if axes is None else axes
        order = self.loads.argsort(descending=True, stable=True)
        share = 100 * self.loads[order] / self.loads.sum()
        axes.bar(range(self.n_experts), share.tolist(), color="C0")
        axes.axhline(100 / self.n_experts, color="0.3", ls="--", lw=1, label="even share")
        axes.set_xticks(range(self.n_experts), order.tolist(), fontsize=8 if self.n_experts <= 40 else 4)
        axes.set(xlabel="expert, by load", ylabel="% of the expert slots of all tokens")
        axes.legend(frameon=False)
        return axes

    def plot_similarities(self, axes: Any = None) -> Any:
        """Heat map of the similarities, experts in the order of the merge tree."""
        axes = new_axes(6, 5) if axes is None else axes
        order = self.tree_experts[leaves_list(self.tree.numpy())] if len(self.tree) else self.tree_experts
        shown = self.similarities[order][:, order].clone().fill_diagonal_(float("nan"))
        picture = axes.imshow(shown.numpy(), cmap="viridis", origin="lower")  # the tree starts at the bottom too
        axes.set_xticks(range(len(order)), order.tolist(), fontsize=8 if len(order) <= 40 else 4, rotation=90)
        axes.set_yticks(range(len(order)), order.tolist(), fontsize=8 if len(order) <= 40 else 4)
        axes.set(xlabel="expert", ylabel="expert")
        axes.figure.colorbar(picture, ax=axes, label="similarity of what two experts write")
        return axes

    def plot_tree(self, axes: Any = None, names: Sequence[str] | None = None) -> Any:
        """Dendrogram of the experts, and how far apart they would be with their latents permuted.

        `names` ``[E]`` label the leaves, by default the experts' numbers.
        """
        if len(self.tree) == 0:
            raise ValueError("there is no tree to plot: fewer than two experts have alive latents")
        axes = new_axes(7, 1.2 + 0.24 * len(self.tree_experts)) if axes is None else axes
        labels = [str(e) if names is None else names[e] for e in self.tree_experts.tolist()]
        dendrogram(
            self.tree.numpy(),
            orientation="right",
            labels=labels,
            ax=axes,
            color_threshold=0,
            above_threshold_color="C0",
            leaf_font_size=8,
        )
        (mixed,) = self.results["similarity"].nulls.values()
        axes.axvline(1 - float(mixed.mean()), color="0.45", ls="--", lw=1, label="mean with latents permuted")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
        axes.spines[["left"]].set_visible(False)
        axes.set(xlabel="distance at which experts merge (1 − similarity)")
        return axes


@torch.no_grad()
def router_geometry(
    sae: SwitchSAE,
    x: Tensor,
    labels: Tensor | Mapping[str, Tensor] | None = None,
    *,
    duplicate_cosine: float = 0.9,
    energy: float = 0.9,
    n_null: int = 20,
    n_costly: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> RouterGeometry:
    """Measure how the experts of `sae` share tokens and directions.

    Memory is bounded by copies of `x` and of the decoder, ``E · d_in²`` numbers, the spans, the codes of 8,192 tokens
    and a tile of cosines. Time goes to the duplicates, ``d_sae² · d_in / 4`` multiplications where they are rare.

    Parameters
    ----------
    sae : SwitchSAE
        A routed SAE of at least two experts.
    x : Tensor [B, d_in]
        Activations, best held-out ones, at least as many as experts.
    labels : Tensor [B] of ints, or mapping of names to such, or None
        What the experts may correspond to; tokens labelled −1 are left out.
    duplicate_cosine : float
        Decoder rows with a larger cosine are duplicates.
    energy : float
        Share of the squared norm of an expert's alive decoder rows that its span holds.
    n_null : int
        Random routers, permutations of the labels, and permutations of the latents for silhouette and duplicates.
    n_costly : int
        Samples of what costs as much as the number itself: random dictionaries, and permutations of the latents for
        spans and merge tree. At most `n_null`; k-means is fitted as often, at most five times.
    seed : int
        Determines all that is random.
    progress : bool
        Show progress.

    Returns
    -------
    RouterGeometry

    Raises
    ------
    ValueError
        For an SAE of one expert or one that `x` leaves silent; `x` of a wrong shape, not finite, or with fewer tokens
        than experts; labels of a wrong shape or dtype or of a single class; numbers out of range.

    References
    ----------
    Mudide et al., *Efficient dictionary learning with switch sparse autoencoders* (arXiv 2410.08201), section 5, for
    the duplicates and the expert's geometry.
    """
    label_sets = _checked(sae, x, labels, duplicate_cosine, energy, n_null, n_costly)
    generator = torch.Generator().manual_seed(seed)
    steps = Progress("router geometry", 6, unit="parts", shown=progress)
    with steps as bar:
        experts, loads, alive = _pass(sae, x)
        if not alive.any():
            raise ValueError("x leaves every latent silent: give activations that the SAE was trained on, or train it")
        bar.update(1, note="routers")
        x_cpu, center = x.detach().cpu().float(), sae.b_router.detach().cpu().float()
        rows = _centred_rows(sae.W_router)
        random = [_random_router(rows, generator) for _ in range(n_null)]
        drawn = [(x_cpu @ router.T - center @ router.T).topk(sae.n_active).indices for router in random]
        means = [kmeans(x_cpu, len(rows), seed + index) for index in range(min(n_costly, _KMEANS_FITS))]
        results = {
            "router_cosine": Result(
                "largest cosine between two router rows",
                _largest_cosine(rows),
                {"random router": samples(_largest_cosine(_centred_rows(router)) for router in random)},
                {"k-means router": samples(_largest_cosine(_centred_rows(mean)) for _, mean in means)},
            ),
            "evenness": Result(
                "evenness of the loads",
                evenness(loads),
                {"random router": samples(evenness(_count(chosen.flatten(), len(rows))) for chosen in drawn)},
                {"k-means router": samples(evenness(_count(chosen, len(rows))) for chosen, _ in means)},
                tail="two-sided",
            ),
        }
        bar.update(2, note="labels")
        for name, wanted in label_sets.items():
            shuffled = (wanted[torch.randperm(len(wanted), generator=generator)] for _ in range(n_null))
            results[f"ami_{name}"] = Result(
                f"agreement of experts with {name} (AMI)",
                agreement(experts, wanted),
                {
                    "labels permuted": samples(agreement(experts, labels) for labels in shuffled),
                    "random router": samples(agreement(chosen[:, 0], wanted) for chosen in drawn),
                },
                {"k-means router": samples(agreement(chosen, wanted) for chosen, _ in means)},
            )
        bar.update(3, note="silhouette and spans")
        decoder = normalize(sae.W_dec.detach().cpu().float()[alive], dim=1)
        owner = torch.arange(len(rows)).repeat_interleave(sae.latents_per_expert)[alive]
        permuted = torch.stack([owner[torch.randperm(len(owner), generator=generator)] for _ in range(n_null)])
        results["silhouette"] = Result(
            "silhouette of decoder rows by expert",
            silhouette(decoder, owner, len(rows)),
            {"latents permuted among experts": samples(silhouette(decoder, other, len(rows)) for other in permuted)},
        )
        spans = _spans(decoder, owner, range(len(rows)), energy)
        overlaps = _overlaps(spans)
        results["overlap"] = Result(
            "overlap of the experts' spans",
            _mean_pair(overlaps),
            {
                "latents permuted among experts": samples(
                    _mean_pair(_overlaps(_spans(decoder, other, _drawn(owner, generator), energy)))
                    for other in permuted[:n_costly]
                ),
                "random subspaces of these ranks": samples(
                    _mean_pair(_overlaps(_random_spans(spans, generator))) for _ in range(n_costly)
                ),
            },
            tail="two-sided",
        )
        bar.update(4, note="duplicates")
        results |= _duplicate_results(
            decoder, torch.cat([owner[None], permuted]), duplicate_cosine, n_costly, generator
        )
        bar.update(5, note="merge tree")
        similarities = _similarities(decoder, owner, len(rows))
        leaves = (_count(owner, len(rows)) > 0).nonzero().squeeze(1)
        distances = _distances(similarities, leaves)
        tree = torch.from_numpy(linkage(distances, "average")) if len(distances) else torch.empty(0, 4).double()
        mixed = [_distances(_similarities(decoder, other, len(rows)), leaves) for other in permuted[:n_costly]]
        results["similarity"] = Result(
            "similarity of what two experts write",
            1 - _mean(distances),
            {"latents permuted among experts": samples(1 - _mean(others) for others in mixed)},
            tail="two-sided",
        )
        results["tree"] = Result(
            "fit of the merge tree (cophenetic correlation)",
            _tree_fit(distances),
            {"latents permuted among experts": samples(_tree_fit(others) for others in mixed)},
        )
        bar.update(6)
    return RouterGeometry(
        results=results,
        experts=experts,
        loads=loads,
        alive=alive,
        router_cosines=_cosines(rows),
        ranks=torch.tensor([len(span) for span in spans]),
        overlaps=overlaps,
        similarities=similarities,
        tree=tree,
        tree_experts=leaves,
        spans=spans,
    )


# Measures


def agreement(experts: Tensor, labels: Tensor) -> float:
    """Adjusted mutual information of experts ``[B]`` and labels ``[B]`` over the labelled tokens: 0 chance, 1 equal.

    References
    ----------
    Vinh, Epps & Bailey, *Information theoretic measures for clusterings comparison*, JMLR 11 (2010).
    """
    known = labels != UNLABELLED
    return float(adjusted_mutual_info_score(labels[known].numpy(), experts[known].numpy()))


def evenness(loads: Tensor) -> float:
    """Entropy of the loads ``[E]`` over that of equal loads: 1 for equal ones, 0 where one expert takes all."""
    share = loads.double() / loads.sum()
    return float(torch.special.entr(share).sum() / math.log(len(loads)))


def silhouette(unit: Tensor, owner: Tensor, n_experts: int) -> float:
    """Mean silhouette of unit rows ``[n, d]`` grouped by `owner` ``[n]``, with cosine distance: −1 … 1.

    That of ``sklearn.metrics.silhouette_score``, without its n² distances: the mean cosine distance of a row to a group
    is one less its product with the group's mean row. NaN where fewer than two groups have rows.

    References
    ----------
    Rousseeuw, *Silhouettes* (1987).
    """
    count = _count(owner, n_experts)
    if (count > 0).sum() < 2:
        return float("nan")
    sums = torch.zeros(n_experts, unit.shape[1]).index_add_(0, owner, unit)
    product = unit @ sums.T
    others = (1 - product / count).masked_fill(count == 0, torch.inf).scatter(1, owner[:, None], torch.inf)
    nearest = others.min(1).values
    size = count[owner]
    own = 1 - (product.gather(1, owner[:, None]).squeeze(1) - 1) / (size - 1).clamp(min=1)  # less itself
    scores = (nearest - own) / torch.maximum(nearest, own).clamp(min=torch.finfo(own.dtype).tiny)
    return float(scores.masked_fill(size == 1, 0).double().mean())


def with_duplicate(
    unit: Tensor, owners: Tensor, cosine: float, queries: int | None = None, *, principal: bool = False
) -> Tensor:
    """Which unit rows have another row at more than `cosine`, inside their group and in another one.

    Exact, without an n × n matrix. By Cauchy–Schwarz a product is at most that of some leading coordinates plus the
    product of the norms of the rest, and that is the product of two short rows: one small matmul a tile names the
    candidates. The coordinates are the principal ones of the rows, which makes the rest short.

    Parameters
    ----------
    unit : Tensor [n, d]
        Rows of unit norm.
    owners : Tensor [m, n] int64
        Groups of the rows; m groupings at a time cost little more than one.
    cosine : float
        Above which rows are duplicates.
    queries : int or None
        Answer for the first so many rows only.
    principal : bool
        Whether the coordinates of the rows are principal ones already, largest first: saves turning them.

    Returns
    -------
    Tensor [m, 2, queries or n] bool
        Inside, across.
    """
    n, d = unit.shape
    asked = n if queries is None else min(queries, n)
    turned = unit if principal else unit @ torch.linalg.eigh(unit.T @ unit).eigenvectors.flip(1)
    leading = max(1, d // 4)
    short = torch.cat([turned[:, :leading], turned[:, leading:].norm(dim=1, keepdim=True)], dim=1)
    found = torch.zeros(len(owners), 2, asked, dtype=torch.bool)
    for top in range(0, asked, _TILE):
        rows = slice(top, min(top + _TILE, asked))
        for left in range(top if queries is None else 0, n, _TILE):
            columns = slice(left, min(left + _TILE, n))
            candidates = (short[rows] @ short[columns].T > cosine - 1e-5).nonzero()  # the slack is for rounding
            if len(candidates) > _DENSE_TILE:
                candidates = (unit[rows] @ unit[columns].T > cosine).nonzero()
            i, j = candidates[:, 0] + top, candidates[:, 1] + left
            i, j = i[i != j], j[i != j]
            if len(candidates) <= _DENSE_TILE:
                close = (unit[i] * unit[j]).sum(1) > cosine
                i, j = i[close], j[close]
            for answer, owner in zip(found, owners, strict=True):
                across = (owner[i] != owner[j]).long()
                answer[across, i] = True
                if queries is None:
                    answer[across, j] = True
    return found


def kmeans(x: Tensor, n_experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """K-means of tokens ``[B, d]``: the nearest mean of each ``[B]`` int64, and the means ``[E, d]``."""
    fitted = KMeans(n_experts, n_init=1, random_state=seed).fit(x[:_KMEANS_TOKENS].numpy())
    return torch.from_numpy(fitted.predict(x.numpy())).long(), torch.from_numpy(fitted.cluster_centers_).float()


# Parts of router_geometry


def _checked(
    sae: SwitchSAE,
    x: Tensor,
    labels: Tensor | Mapping[str, Tensor] | None,
    duplicate_cosine: float,
    energy: float,
    n_null: int,
    n_costly: int,
) -> dict[str, Tensor]:
    """The labels by name, once everything has been looked at."""
    if not isinstance(sae, SwitchSAE):
        raise ValueError(f"sae must be a SwitchSAE, which has a router, got {type(sae).__name__}")
    if sae.n_experts < 2:
        raise ValueError("sae has one expert, so there is no routing to measure: train it with n_experts of at least 2")
    if x.dim() != 2 or x.shape[1] != sae.d_in:
        raise ValueError(f"x must be [tokens, {sae.d_in}], got shape {tuple(x.shape)}")
    if len(x) < sae.n_experts:
        raise ValueError(f"x must hold at least as many tokens as experts, {sae.n_experts}, got {len(x)}")
    if not x.isfinite().all():
        raise ValueError("x must be finite: remove or repair the rows with NaN or infinity")
    if not 0 < duplicate_cosine < 1:
        raise ValueError(f"duplicate_cosine must be between 0 and 1, got {duplicate_cosine}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
    if not 1 <= n_costly <= n_null:
        raise ValueError(f"n_costly must be at least 1 and at most n_null={n_null}, got {n_costly}")
    if labels is None:
        return {}
    given = labels if isinstance(labels, Mapping) else {"labels": labels}
    named = {name: torch.as_tensor(wanted) for name, wanted in given.items()}
    for name, wanted in named.items():
        where = f"labels[{name!r}]"
        if wanted.shape != (len(x),):
            raise ValueError(
                f"{where} must hold one label for each of the {len(x)} tokens of x, got shape {tuple(wanted.shape)}"
            )
        if wanted.is_floating_point() or wanted.is_complex():
            raise ValueError(f"{where} must hold whole numbers, got {wanted.dtype}; number the classes first")
        if len(wanted[wanted != UNLABELLED].unique()) < 2:
            raise ValueError(f"{where} must have at least two classes among its labelled tokens; leave it out")
    return {name: wanted.detach().cpu().long() for name, wanted in named.items()}


def _pass(sae: SwitchSAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First experts ``[B]``, loads ``[E]`` and alive latents ``[d_sae]`` of the tokens."""
    device = sae.W_dec.device
    experts, loads = [], torch.zeros(sae.n_experts, dtype=torch.int64)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    for batch in x.split(_BATCH):
        batch = batch.to(device, sae.W_dec.dtype)
        route = sae.route(batch)
        experts.append(route.experts[:, 0].cpu().long())
        loads += route.loads().cpu()
        fired += sae.encode(batch).firing_counts().cpu()
    return torch.cat(experts), loads, fired > 0


def _centred_rows(router: Tensor) -> Tensor:
    """Rows of a router ``[E, d]`` less their mean: what all have in common sends no token elsewhere."""
    rows = router.detach().cpu().float()
    return rows - rows.mean(0)


def _random_router(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of these norms in random directions."""
    return normalize(torch.randn(rows.shape, generator=generator), dim=1) * rows.norm(dim=1, keepdim=True)


def _cosines(rows: Tensor) -> Tensor:
    unit = normalize(rows, dim=1)
    return unit @ unit.T


def _largest_cosine(rows: Tensor) -> float:
    return float(_cosines(rows).fill_diagonal_(-torch.inf).max())


def _count(owner: Tensor, n_experts: int) -> Tensor:
    return torch.bincount(owner, minlength=n_experts)


def _spans(unit: Tensor, owner: Tensor, experts: Iterable[int], energy: float) -> list[Tensor]:
    """For each of `experts` an orthonormal basis ``[rank, d]`` of the leading directions with that share of energy."""
    spans = []
    for expert in experts:
        rows = unit[owner == expert]
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        held = values.flip(0).clamp(min=0).cumsum(0)
        # The least rank that holds it; the factor keeps rounding from asking for one more.
        rank = int((held < energy * held[-1] * (1 - 1e-6)).sum()) + 1 if len(rows) else 0
        spans.append(vectors.flip(1)[:, :rank].T.contiguous())
    return spans


def _random_spans(spans: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random subspaces of the ranks of some of `spans`, at most eight."""
    some = [spans[index] for index in torch.randperm(len(spans), generator=generator)[:_NULL_EXPERTS].tolist()]
    draws = [torch.randn(span.shape[1], len(span), generator=generator) for span in some]
    return [torch.linalg.qr(draw)[0].T for draw in draws]


def _drawn(owner: Tensor, generator: torch.Generator) -> list[int]:
    """At most eight of the experts that have latents."""
    having = owner.unique()
    return having[torch.randperm(len(having), generator=generator)[:_NULL_EXPERTS]].tolist()


def _overlaps(spans: list[Tensor]) -> Tensor:
    """Mean squared cosine of the principal angles of each pair, ``[E, E]``; NaN for a span of rank 0."""
    overlaps = torch.full((len(spans), len(spans)), torch.nan)
    for i, j in combinations(range(len(spans)), 2):
        rank = min(len(spans[i]), len(spans[j]))
        if rank:
            overlaps[i, j] = overlaps[j, i] = (spans[i] @ spans[j].T).square().sum() / rank
    for i, span in enumerate(spans):
        overlaps[i, i] = 1 if len(span) else torch.nan
    return overlaps


def _mean_pair(matrix: Tensor) -> float:
    """Mean over the pairs of different experts that have a number; NaN without any."""
    i, j = torch.triu_indices(len(matrix), len(matrix), 1)
    return float(matrix[i, j].double().nanmean())


def _duplicate_results(
    unit: Tensor, owners: Tensor, cosine: float, n_random: int, generator: torch.Generator
) -> dict[str, Result]:
    """Shares of alive latents with a duplicate. The first of `owners` is the true one, the others are permutations."""
    shares = with_duplicate(unit, owners, cosine).double().mean(2)  # [1 + n_null, 2]
    random = torch.stack([_random_shares(unit, owners[0], cosine, generator) for _ in range(n_random)])
    found = {}
    for index, (key, where) in enumerate((("within", "in their expert"), ("across", "in another expert"))):
        found[f"duplicates_{key}"] = Result(
            f"share of latents with a duplicate {where}",
            float(shares[0, index]),
            {"latents permuted among experts": shares[1:, index], "random dictionary": random[:, index]},
        )
    return found


def _random_shares(unit: Tensor, owner: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """The same two shares for random latents with the second moment of the true ones, from a sample of queries."""
    spread = torch.linalg.eigvalsh(unit.T @ unit).flip(0).clamp(min=0).sqrt()
    draw = normalize(torch.randn(unit.shape, generator=generator) * spread, dim=1)
    order = torch.randperm(len(owner), generator=generator)  # else the queries are all of the first experts
    found = with_duplicate(draw, owner[order][None], cosine, _NULL_QUERIES, principal=True)
    return found[0].double().mean(1)


def _similarities(unit: Tensor, owner: Tensor, n_experts: int) -> Tensor:
    """Cosines of the experts' second moments, ``[E, E]``; NaN for an expert without latents."""
    moments = torch.stack([(rows := unit[owner == expert]).T @ rows for expert in range(n_experts)]).flatten(1)
    norms = moments.norm(dim=1)
    return (moments @ moments.T / norms / norms[:, None]).clamp(max=1).fill_diagonal_(1)


def _distances(similarities: Tensor, leaves: Tensor) -> np.ndarray:
    """Distances of the pairs of `leaves`, in scipy's condensed form."""
    distances = (1 - similarities[leaves][:, leaves].double()).clamp(min=0).fill_diagonal_(0)
    return squareform(distances.numpy(), checks=False)


def _mean(distances: np.ndarray) -> float:
    return float(distances.mean()) if len(distances) else float("nan")


def _tree_fit(distances: np.ndarray) -> float:
    """Cophenetic correlation of the average linkage; NaN for fewer than three experts, which any tree fits."""
    if len(distances) < 3 or np.ptp(distances) == 0:
        return float("nan")
    return float(cophenet(linkage(distances, "average"), distances)[0])

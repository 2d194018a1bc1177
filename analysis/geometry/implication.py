"""Latents that imply others: B is active only where A is. A graph of them, and whether the tokens' vectors agree.

``docs/analyses/geometry.md`` says what the nulls are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.geometry.counts import Active
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples

try:
    import networkx as nx
    from scipy.stats import binom
except ImportError as error:
    raise ImportError("this analysis needs scipy and networkx: pip install 'sparsekern[analysis]'") from error

_NEAR = 16  # latents of the nearest density, of which one takes a parent's place


@dataclass(frozen=True, eq=False)
class Reconstruction(Results):
    """What the vectors of tokens say of each edge; E edges, those of the graph in its order.

    Attributes
    ----------
    results : dict of str to Result
        ``hierarchical``, ``parent_gain`` and ``child_gain``.
    hierarchical : Tensor [E] bool
        Both gains are positive, and parent and child are among the decoder rows nearest to what is special about the
        child's tokens.
    parent_gain, child_gain : Tensor [E] float64
        Error that ablating the one adds where both are active, over the energy that the two have to explain there.
    """

    results: dict[str, Result]
    hierarchical: Tensor
    parent_gain: Tensor
    child_gain: Tensor


@dataclass(frozen=True, eq=False)
class ImplicationGraph(Results):
    """What :func:`implication_graph` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``implications``, how many pairs A ⊃ B; ``placed``, share of the tested latents that imply another;
        ``one_parent``, share of those with one parent after the reduction; ``depth``, edges of the longest chain;
        ``equivalent``, latents merged with one that is as good as the same. With an SAE those of `reconstruction` too.
    parent, child : Tensor [E] int64
        The edges: what is left after the transitive reduction, by rising parent, then child.
    share, reverse : Tensor [E] float64
        P(parent | child) and P(child | parent).
    n_implications : int
        Pairs before the reduction.
    active : Tensor [W] int64
        Tokens of each latent.
    merged : Tensor [W] int64
        The latent that stands for it in the graph: itself, or the most frequent of its equivalents; −1 where it was
        not tested.
    depth : Tensor [W] int64
        Edges of the longest chain above it; −1 where it is not in the graph.
    reconstruction : Reconstruction or None
    """

    results: dict[str, Result]
    parent: Tensor
    child: Tensor
    share: Tensor
    reverse: Tensor
    n_implications: int
    active: Tensor
    merged: Tensor
    depth: Tensor
    reconstruction: Reconstruction | None

    def graph(self) -> Any:
        """A networkx.DiGraph from parents to children, with what is known of latents and edges as attributes."""
        graph = nx.DiGraph()
        for latent in (self.depth >= 0).nonzero().squeeze(1).tolist():
            members = (self.merged == latent).nonzero().squeeze(1).tolist()
            graph.add_node(latent, active=int(self.active[latent]), depth=int(self.depth[latent]), members=members)
        for edge, (a, b) in enumerate(zip(self.parent.tolist(), self.child.tolist(), strict=True)):
            graph.add_edge(a, b, share=float(self.share[edge]), reverse=float(self.reverse[edge]))
            if self.reconstruction is not None:
                graph.edges[a, b]["hierarchical"] = bool(self.reconstruction.hierarchical[edge])
        return graph

    def families(self, least: int = 4) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Groups and parents for :func:`hierarchical_orthogonality` on the decoder.

        A group is a latent with all latents below it, where these are at least `least`; its parent the smallest group
        of one of its parents that has more.
        """
        graph = self.graph()
        below = {node: sorted({node} | nx.descendants(graph, node)) for node in graph}
        groups = {str(node): torch.tensor(rows) for node, rows in below.items() if len(rows) >= least}
        parents = {}
        for node in map(int, groups):
            larger = [parent for parent in graph.predecessors(node) if len(below[parent]) > len(below[node])]
            if larger:
                parents[str(node)] = str(min(larger, key=lambda parent: (len(below[parent]), parent)))
        return groups, parents

    def plot(self, axes: Any = None, *, trees: int = 4, labels: dict[int, str] | None = None) -> Any:
        """The largest connected parts in layers, parents above their children; returns the axes."""
        axes = new_axes(9, 4.5) if axes is None else axes
        graph = self.graph()
        largest = sorted(nx.weakly_connected_components(graph), key=lambda part: (-len(part), min(part)))[:trees]
        left = 0.0
        place: dict[int, tuple[float, int]] = {}
        for part in largest:
            placed = _layout(graph.subgraph(part))
            place |= {node: (x + left, -depth) for node, (x, depth) in placed.items()}
            left = max(x for x, _ in place.values()) + 2
        good = nx.get_edge_attributes(graph, "hierarchical")
        for a, b in graph.edges:
            if a in place:
                (x1, y1), (x2, y2) = place[a], place[b]
                axes.plot([x1, x2], [y1, y2], color="C0" if good.get((a, b), True) else "0.75", lw=0.8, zorder=1)
        if place:
            x, y = zip(*place.values(), strict=True)
            axes.scatter(x, y, s=[8 + 6 * math.log1p(int(self.active[node])) for node in place], color="C0", zorder=2)
        for node, label in (labels or {}).items():
            if node in place:
                axes.annotate(label, place[node], xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)
        axes.set(ylabel="depth", xticks=[], yticks=sorted({y for _, y in place.values()}))
        axes.set_yticks(axes.get_yticks(), [f"{-y:g}" for y in axes.get_yticks()])
        return axes


@torch.no_grad()
def implication_graph(
    codes: sk.SparseCodes | sk.CSRCodes,
    least: float = 0.95,
    reverse: float = 0.5,
    confidence: float = 0.95,
    *,
    at_least: int | None = None,
    sae: sk.SAE | None = None,
    x: Tensor | None = None,
    top: int = 5,
    n_null: int = 20,
    seed: int = 0,
) -> ImplicationGraph:
    """Which latents are active only where others are: A ⊃ B if P(A | B) ≥ `least` and P(B | A) ≤ `reverse`.

    Both must hold beyond doubt. The p of a pair is the larger of two exact binomial ones, of n_AB of B's tokens against
    `least` and of n_AB of A's tokens against `reverse`; the first is at most α where the lower Clopper–Pearson bound of
    P(A | B) at α is at least `least`. Pairs are kept by Benjamini and Hochberg at a false discovery rate of ``1 −
    confidence`` among all pairs of tested latents with n_A > n_B, whether or not they were ever active together. As A
    then has more than ``least / reverse`` times the tokens of B, there are no cycles.

    Before that, latents that each imply the other, tested in the same way, are merged, and the most frequent one stands
    for them. After it, an edge that longer chains make superfluous is left out (transitive reduction).

    With an SAE every edge is looked at on the tokens' vectors. ``parent_gain`` and ``child_gain``: the squared error
    that ablating the one adds on tokens where both are active, over the energy of what the two have to explain there,
    the error with both ablated. *Hierarchical* is an edge with both gains positive and both decoder rows among the
    `top` nearest, by cosine, to the mean of `x` on the child's tokens less its mean: what the child is about has to be
    written by both. A latent that is active nearly everywhere covers any rare one and fails this.

    Nulls: the *tokens* of every latent *shuffled*; and *latents exchanged*, on every token, with others of nearly the
    same density, which keeps how many latents a token has. Of what an SAE is needed for: *another parent*, one of the
    16 latents of the nearest density that is active with the child at all.

    Parameters
    ----------
    codes : SparseCodes or CSRCodes
        Values of any sign; any but 0 is active.
    least, reverse : float
        Between 0 and 1, `least` the larger.
    confidence : float
        1 less the false discovery rate.
    at_least : int or None
        Tokens that a latent must have to be tested; by default the fewest with which it could pass alone:
        ``log(1 − confidence) / log(least)``, 59.
    sae : SAE or None
        What `codes` are of, with `x`.
    x : Tensor [B, d_out] or None
        What `sae` reconstructs: for a transcoder its targets.
    top : int
        Decoder rows that count as nearest.
    n_null : int
        Samples of each null. Each costs as much as the graph.
    seed : int
        Determines them.

    Raises
    ------
    ValueError
        For numbers out of range, codes that are not finite, and an SAE or tokens that do not fit.

    References
    ----------
    Cao et al., *Tree SAE* (arXiv 2605.07922), for coverage and the condition on reconstruction, there with a trained
    probe for what the child is about; Benjamini and Hochberg (1995).
    """
    _check(least, reverse, confidence, at_least, top, n_null)
    if (sae is None) != (x is None):
        raise ValueError("sae and x must be given together, got one of them")
    active = Active.of(codes)
    rule = _Rule(least, reverse, 1 - confidence, at_least or math.ceil(math.log(1 - confidence) / math.log(least)))
    found = _implications(active, rule)
    generator = null_generator(seed)
    makers: dict[str, Callable[[], Active]] = {
        "tokens shuffled": lambda: active.shuffled(generator),
        "latents exchanged": lambda: active.exchanged(generator),
    }
    drawn = {name: [_implications(make(), rule).numbers() for _ in range(n_null)] for name, make in makers.items()}
    names = {
        "implications": "pairs of latents of which one implies the other",
        "placed": "share of the tested latents that imply another",
        "one_parent": "share of the latents with parents that have one",
        "depth": "edges of the longest chain of implications",
        "equivalent": "latents merged with an equivalent one",
    }
    values = found.numbers()
    results = {
        key: Result(name, values[key], {null: _known(s[key] for s in made) for null, made in drawn.items()})
        for key, name in names.items()
    }
    reconstruction = None
    if sae is not None and x is not None:
        reconstruction = _reconstruction(active, codes, found, sae, x, top, n_null, generator)
        results |= reconstruction.results
    counts = active.counts()
    return ImplicationGraph(
        results,
        found.parent,
        found.child,
        found.both.double() / counts[found.child],
        found.both.double() / counts[found.parent],
        found.n_implications,
        counts,
        found.merged,
        found.depth,
        reconstruction,
    )


# Pairs


@dataclass(frozen=True)
class _Rule:
    least: float
    reverse: float
    alpha: float
    tokens: int


@dataclass(frozen=True)
class _Found:
    """Edges after the reduction, with their tokens in common."""

    parent: Tensor
    child: Tensor
    both: Tensor
    n_implications: int
    merged: Tensor
    depth: Tensor

    def numbers(self) -> dict[str, float]:
        tested = self.merged[self.merged >= 0].unique()
        parents = torch.bincount(self.child, minlength=len(self.merged))[tested]
        placed = parents > 0
        own = torch.arange(len(self.merged))
        return {
            "implications": float(self.n_implications),
            "placed": float(placed.double().mean()),
            "one_parent": float((parents[placed] == 1).double().mean()),
            "depth": float(self.depth.clamp(min=0).max()),
            "equivalent": float(((self.merged >= 0) & (self.merged != own)).sum()),
        }


def _implications(active: Active, rule: _Rule) -> _Found:
    counts = active.counts()
    latents = (counts >= rule.tokens).nonzero().squeeze(1)
    merged = torch.full((active.latents,), -1)
    merged[latents] = latents
    i, j, both = active.pairs(math.ceil(rule.least * rule.tokens))
    swap = counts[i] < counts[j]
    parent, child = torch.where(swap, j, i), torch.where(swap, i, j)
    enough = (counts[child] >= rule.tokens) & (both >= rule.least * counts[child])
    parent, child, both = parent[enough], child[enough], both[enough]

    one, two = counts[parent], counts[child]
    n_tests = len(latents) * (len(latents) - 1) // 2
    implied = _above(both, two, rule.least)
    same = _kept(torch.maximum(implied, _above(both, one, rule.least)), n_tests, rule.alpha)
    graph = nx.Graph(zip(parent[same].tolist(), child[same].tolist(), strict=True))
    for part in nx.connected_components(graph):
        members = torch.tensor(sorted(part))
        merged[members] = members[counts[members].argmax()]

    less = torch.from_numpy(binom.cdf(both.numpy(), one.numpy(), rule.reverse))
    stand = (merged[parent] == parent) & (merged[child] == child)
    n_stand = int((merged == torch.arange(active.latents)).sum())
    p = torch.maximum(implied, less)[stand]
    kept = stand.nonzero().squeeze(1)[_kept(p, n_stand * (n_stand - 1) // 2, rule.alpha)]
    return _reduced(parent[kept], child[kept], both[kept], merged)


def _above(successes: Tensor, trials: Tensor, share: float) -> Tensor:
    """P(at least so many of so many | share): float64."""
    return torch.from_numpy(binom.sf((successes - 1).numpy(), trials.numpy(), share))


def _kept(p: Tensor, n_tests: int, rate: float) -> Tensor:
    """Which of the p-values Benjamini and Hochberg keep among `n_tests`; those that are not there are 1."""
    ordered, order = p.sort()
    below = (ordered <= rate * torch.arange(1, len(p) + 1) / max(1, n_tests)).nonzero()
    kept = torch.zeros(len(p), dtype=torch.bool)
    if len(below):
        kept[order[: int(below[-1]) + 1]] = True
    return kept


def _reduced(parent: Tensor, child: Tensor, both: Tensor, merged: Tensor) -> _Found:
    graph = nx.DiGraph()
    for a, b, n in zip(parent.tolist(), child.tolist(), both.tolist(), strict=True):
        graph.add_edge(a, b, both=n)
    depth = torch.full((len(merged),), -1)
    edges = sorted(nx.transitive_reduction(graph).edges)
    for layer, nodes in enumerate(nx.topological_generations(graph)):
        depth[torch.tensor(nodes)] = layer
    ends = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2)
    common = torch.tensor([graph.edges[edge]["both"] for edge in edges], dtype=torch.int64)
    return _Found(ends[:, 0], ends[:, 1], common, len(parent), merged, depth)


# Vectors


def _reconstruction(
    active: Active,
    codes: sk.SparseCodes | sk.CSRCodes,
    found: _Found,
    sae: sk.SAE,
    x: Tensor,
    top: int,
    n_null: int,
    generator: torch.Generator,
) -> Reconstruction:
    rows = sae.W_dec.detach().float().cpu()
    if active.latents != len(rows):
        raise ValueError(f"codes must be those of sae, of {len(rows)} latents, got {active.latents}")
    if x.shape != (active.tokens, rows.shape[1]) or not x.isfinite().all():
        raise ValueError(f"x must be finite, [{active.tokens}, {rows.shape[1]}], got shape {tuple(x.shape)}")
    x = x.detach().to(sae.W_dec)
    measure = _Edges(active, codes, (x - sae.decode(codes).reshape(x.shape)).float().cpu(), x.float().cpu(), rows, top)
    values = measure(found.parent, found.child)
    pools = _pools(active.counts(), found.parent, found.child)
    drawn: dict[str, list[float]] = {key: [] for key in ("hierarchical", "parent_gain", "child_gain")}
    for _ in range(n_null if len(pools) else 0):
        picks = [pool[torch.randint(len(pool), (1,), generator=generator)] for pool in pools]
        for key, column in zip(drawn, measure(torch.cat(picks), found.child), strict=True):
            drawn[key].append(_mean(column))
    names = {
        "hierarchical": "share of the edges whose parent and child both write what the child is about",
        "parent_gain": "error that ablating the parent adds, of what both explain where both are active",
        "child_gain": "error that ablating the child adds, of what both explain where both are active",
    }
    results = {
        key: Result(name, _mean(column), {"another parent": _known(drawn[key])})
        for (key, name), column in zip(names.items(), values, strict=True)
    }
    return Reconstruction(results, values[0] == 1, values[1], values[2])


class _Edges:
    """Measures edges: whether they are hierarchical, and both gains; NaN where the two are never active together."""

    def __init__(
        self, active: Active, codes: sk.SparseCodes | sk.CSRCodes, error: Tensor, x: Tensor, rows: Tensor, top: int
    ) -> None:
        csr = codes.to_csr() if isinstance(codes, sk.SparseCodes) else codes
        on = csr.values != 0
        latent, token, value = csr.col[on].cpu().long(), csr.rows()[on].cpu(), csr.values[on].detach().float().cpu()
        order = latent.argsort(stable=True)
        ends = active.counts().cumsum(0).tolist()
        self._span = list(zip([0, *ends[:-1]], ends, strict=True))
        self._token, self._value = token[order], value[order]
        self._error, self._x, self._rows, self._top = error, x, rows, min(top, len(rows))
        self._unit, self._mean_x = normalize(rows, dim=1), x.mean(0)
        self._nearest: dict[int, Tensor] = {}

    def __call__(self, parent: Tensor, child: Tensor) -> Tensor:
        pairs = zip(parent.tolist(), child.tolist(), strict=True)
        return torch.tensor([self._edge(a, b) for a, b in pairs], dtype=torch.float64).reshape(-1, 3).T

    def _edge(self, a: int, b: int) -> tuple[float, float, float]:
        (of_a, one), (of_b, two) = self._of(a), self._of(b)
        place = torch.searchsorted(of_a, of_b).clamp(max=max(0, len(of_a) - 1))
        shared = of_a[place] == of_b if len(of_a) else torch.zeros(len(of_b), dtype=torch.bool)
        if not shared.any():
            return math.nan, math.nan, math.nan
        token, one, two = of_b[shared], one[place[shared]], two[shared]
        # ‖e + z d‖² − ‖e‖² = 2 z e·d + z² ‖d‖², summed over the tokens.
        error, D = self._error[token], self._rows[[a, b]].double()
        z = torch.stack([one, two]).double()
        added = 2 * ((z @ error.double()) * D).sum(1) + (z * z).sum(1) * (D * D).sum(1)
        both = error.double().square().sum() + added.sum() + 2 * (z[0] @ z[1]) * (D[0] @ D[1])
        gains = added / both.clamp(min=torch.finfo(torch.float64).tiny)
        near = self._near(b)
        hierarchical = bool((gains > 0).all()) and a in near and b in near
        return float(hierarchical), float(gains[0]), float(gains[1])

    def _of(self, latent: int) -> tuple[Tensor, Tensor]:
        start, end = self._span[latent]
        return self._token[start:end], self._value[start:end]

    def _near(self, child: int) -> Tensor:
        if child not in self._nearest:
            about = self._x[self._of(child)[0]].mean(0) - self._mean_x
            self._nearest[child] = (self._unit @ about).topk(self._top).indices
        return self._nearest[child]


def _pools(counts: Tensor, parent: Tensor, child: Tensor) -> list[Tensor]:
    """For each edge the latents of the nearest density to the parent's, without the two of it."""
    pools = []
    for a, b in zip(parent.tolist(), child.tolist(), strict=True):
        distance = (counts - counts[a]).abs()
        distance[[a, b]] = counts.max() + 1
        distance[counts == 0] = counts.max() + 1
        nearest = distance.argsort(stable=True)[:_NEAR]
        pools.append(nearest[distance[nearest] <= counts.max()] if len(counts) > 2 else nearest[:0])
    return pools if all(len(pool) for pool in pools) else []


# Small parts


def _check(least: float, reverse: float, confidence: float, at_least: int | None, top: int, n_null: int) -> None:
    if not 0 < reverse < least < 1:
        raise ValueError(f"least and reverse must be between 0 and 1, least the larger, got {least} and {reverse}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1, got {confidence}")
    if at_least is not None and at_least < 1:
        raise ValueError(f"at_least must be at least 1, got {at_least}")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if len(values) else math.nan


def _known(numbers: Any) -> Tensor:
    """Samples that are defined: a null without edges has no share."""
    found = samples(numbers)
    return found[~found.isnan()]


def _layout(graph: Any) -> dict[int, tuple[float, int]]:
    """Horizontal place and depth of each node: leaves side by side, parents above the middle of their children."""
    depth = {node: layer for layer, nodes in enumerate(nx.topological_generations(graph)) for node in nodes}
    # Each node hangs under one parent, the deepest one; the other edges cross.
    under: dict[int, list[int]] = {node: [] for node in graph}
    roots: list[int] = []
    for node in sorted(graph):
        parents = sorted(graph.predecessors(node), key=lambda parent: (-depth[parent], parent))
        (under[parents[0]] if parents else roots).append(node)
    place: dict[int, float] = {}
    width = 0.0
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if not under[node]:
            place[node] = width
            width += 1
        elif done:
            place[node] = sum(place[below] for below in under[node]) / len(under[node])
        else:
            stack += [(node, True), *((below, False) for below in reversed(under[node]))]
    return {node: (place[node], depth[node]) for node in graph}

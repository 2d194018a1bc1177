"""Concepts inside concepts: is a child's vector less its parent's orthogonal to the parent's, and what is it worth?

``docs/analyses/geometry.md`` says what the nulls are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples

try:
    from sklearn.covariance import ledoit_wolf_shrinkage
except ImportError as error:
    raise ImportError("this analysis needs scikit-learn: pip install 'sparsekern[analysis]'") from error

_TINY = 1e-6  # a variance below this part of the largest is rounding
_LEAST = 4  # rows of a concept: two to fit it and two that are held out

WORDS = {
    "weekday": "monday tuesday wednesday thursday friday saturday sunday",
    "month": "january february march april may june july august september october november december",
    "season": "spring summer autumn winter",
    "unit of time": "second minute hour day week month year decade century",
    "number": "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty",
    "ordinal": "first second third fourth fifth sixth seventh eighth ninth tenth",
    "mammal": "dog cat horse cow pig sheep goat wolf fox bear lion tiger elephant mouse rabbit deer monkey whale",
    "bird": "eagle hawk owl crow duck goose swan chicken pigeon parrot robin falcon raven turkey",
    "fish": "salmon trout shark tuna cod bass carp eel",
    "insect": "bee ant fly butterfly moth beetle mosquito spider wasp cricket",
    "colour": "red green blue yellow black white orange purple brown pink grey violet crimson scarlet",
    "fruit": "apple orange banana lemon peach cherry grape mango berry plum pear melon",
    "vegetable": "potato tomato onion carrot bean corn pepper garlic spinach cabbage",
    "drink": "water wine beer coffee tea milk juice whiskey vodka",
    "profession": "doctor lawyer teacher nurse engineer farmer soldier actor singer writer painter judge baker",
    "relative": "mother father brother sister son daughter uncle aunt cousin grandmother grandfather wife husband",
    "country": "france germany italy spain china japan india russia canada brazil egypt mexico poland sweden",
    "city": "london paris berlin rome tokyo moscow madrid vienna chicago boston sydney cairo dublin prague",
    "metal": "gold silver iron copper tin lead steel zinc nickel platinum",
    "instrument": "piano guitar violin drum flute trumpet cello harp organ saxophone",
    "vehicle": "car bus truck train ship boat plane bicycle motorcycle helicopter taxi van",
    "garment": "shirt dress coat hat shoe jacket skirt glove boot scarf trousers",
    "part of the body": "head hand arm leg foot eye ear nose mouth finger knee shoulder neck heart",
}
"""Concepts and some of their words, separated by spaces."""

ABOVE: dict[str, list[str]] = {
    "time": ["weekday", "month", "season", "unit of time"],
    "quantity": ["number", "ordinal"],
    "animal": ["mammal", "bird", "fish", "insect"],
    "food": ["fruit", "vegetable", "drink"],
    "person": ["profession", "relative"],
    "place": ["country", "city"],
    "artefact": ["instrument", "vehicle", "garment"],
}
"""Wider concepts, each with all words of those below it."""


def word_groups(tokenizer: Any, least: int = _LEAST) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Groups and parents for :func:`hierarchical_orthogonality`: rows of the embedding of :data:`WORDS`.

    Words of more than one token are left out, and concepts of fewer than `least` words.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Called with a word and ``add_special_tokens=False``; its ``input_ids`` are rows.
    least : int
        Words of a concept.

    Returns
    -------
    groups : dict of str to Tensor [n] int64
    parents : dict of str to str
    """

    def row(word: str) -> list[int]:
        found = list(tokenizer(word, add_special_tokens=False)["input_ids"])
        return found if len(found) == 1 else []

    single = {name: sorted({token for word in words.split() for token in row(word)}) for name, words in WORDS.items()}
    groups = {name: torch.tensor(rows) for name, rows in single.items() if len(rows) >= least}
    parents: dict[str, str] = {}
    for name, below in ABOVE.items():
        children = [child for child in below if child in groups]
        if len(children) > 1:
            groups[name] = torch.cat([groups[child] for child in children]).unique()
            parents |= dict.fromkeys(children, name)
    return groups, parents


@dataclass(frozen=True, eq=False)
class HierarchicalOrthogonality(Results):
    """What :func:`hierarchical_orthogonality` returns; E pairs of child and parent, C concepts.

    Attributes
    ----------
    results : dict of str to Result
        ``orthogonal``, mean size of the cosines below; ``projection``, mean projection of words that were left out on
        their concept's vector, in units of its length; ``auc``, how well it tells them from all other words, and
        ``auc_within``, from other words of the parent.
    cosines : dict of str to float
        Of ``ℓ_p`` with ``ℓ_c − ℓ_p``, for each child.
    vectors : dict of str to Tensor [d]
        ``ℓ`` of each concept, in the whitened space.
    held_out : dict of str to tuple of float
        For each concept the projection of its own words, of all others, and its AUC.
    """

    results: dict[str, Result]
    cosines: dict[str, float]
    vectors: dict[str, Tensor]
    held_out: dict[str, tuple[float, float, float]]

    def plot(self, axes: Any = None) -> Any:
        """Projections of words that were left out, of the concept and of others, a row a concept; returns the axes."""
        axes = new_axes(7, 1 + 0.2 * len(self.held_out)) if axes is None else axes
        order = sorted(self.held_out, key=lambda name: self.held_out[name][0])
        for column, color, label in ((1, "0.45", "other words"), (0, "C0", "words of the concept, left out")):
            axes.plot([self.held_out[name][column] for name in order], range(len(order)), "o", color=color, label=label)
        axes.set_yticks(range(len(order)), order, fontsize=7)
        axes.set_xlabel("projection on the concept's vector, over its length")
        axes.legend(frameon=False)
        return axes


@torch.no_grad()
def hierarchical_orthogonality(
    gamma: Tensor,
    groups: Mapping[str, Tensor],
    parents: Mapping[str, str],
    *,
    folds: int = 2,
    n_null: int = 100,
    seed: int = 0,
) -> HierarchicalOrthogonality:
    """Whether the vectors of concepts inside concepts are orthogonal, and whether they hold for words not seen.

    The rows of `gamma` are whitened, ``g = Cov^(−1/2) (γ − γ̄)``. A concept's vector is ``ℓ = (μ · d) d``, with μ the
    mean of its words' rows and d the unit vector along ``Σ⁻¹ μ``, Σ their covariance after Ledoit and Wolf.
    ``orthogonal`` is the mean size of the cosine of ``ℓ_p`` with ``ℓ_c − ℓ_p``, over all children c.

    That says little: when a child's words are some of its parent's, all of which project on ``ℓ_p`` at about its
    length, ``ℓ_c · ℓ_p ≈ ‖ℓ_p‖²`` follows, whatever the words (Golechha et al. 2025). Hence the nulls: *random
    hierarchy*, every row of `gamma` in another's place, with the same sizes and the same words of parents in children;
    *words of the parent*, a child's words drawn from those; and *other words*, drawn from outside the parent: that one
    breaks the inclusion, is the kind that the claim was first compared with, and looks like evidence.

    Words that were left out ask more. In each of `folds` a vector is fitted to the rest, and ``projection`` is
    ``g · ℓ / ‖ℓ‖²`` of the left out, which should be 1, and 0 for other words. ``auc`` needs no scale.

    Parameters
    ----------
    gamma : Tensor [V, d]
        Rows of an unembedding, of an embedding, or of a decoder; more than d of them, or the whitening makes all rows
        orthogonal.
    groups : mapping of str to Tensor of ints
        Rows of each concept, at least 4.
    parents : mapping of str to str
        The parent of a concept, among `groups`, of whose rows the child's are some and not all.
    folds : int
        Parts of a concept that are left out in turn.
    n_null : int
        Samples of each null.
    seed : int
        Determines the folds and the nulls.

    Raises
    ------
    ValueError
        For rows that are not finite or all equal, and groups or parents that do not fit.

    References
    ----------
    Park et al., *The geometry of categorical and hierarchical concepts in large language models* (arXiv 2406.01506);
    Golechha et al., *Intricacies of feature geometry in large language models* (ICLR blog posts 2025).
    """
    members = _members(gamma, groups, parents, folds, n_null)
    white = _whitened(gamma)
    generator = null_generator(seed)
    parts = {
        name: torch.randperm(len(rows), generator=generator) % min(folds, len(rows)) for name, rows in members.items()
    }
    measure = _Measure(white, dict(parents), parts)
    found = measure(members)

    def elsewhere() -> dict[str, Tensor]:
        order = torch.randperm(len(white), generator=generator)
        return {name: order[rows] for name, rows in members.items()}

    def children(outside: bool) -> Callable[[], dict[str, Tensor]]:
        def make() -> dict[str, Tensor]:
            drawn = dict(members)
            for child, parent in parents.items():
                pool = members[parent]
                if outside:
                    inside = torch.zeros(len(white), dtype=torch.bool)
                    inside[pool] = True
                    pool = (~inside).nonzero().squeeze(1)
                drawn[child] = pool[torch.randperm(len(pool), generator=generator)[: len(members[child])]]
            return drawn

        return make

    makers = {"random hierarchy": elsewhere, "words of the parent": children(False), "other words": children(True)}
    drawn = {
        name: [measure(make(), left_out=name != "other words").numbers for _ in range(n_null)]
        for name, make in makers.items()
    }

    def result(key: str, title: str, nulls: list[str], tail: str = "greater") -> Result:
        return Result(title, found.numbers[key], {n: samples(s[key] for s in drawn[n]) for n in nulls}, tail=tail)

    results = {
        "orthogonal": result(
            "orthogonal", "size of the cosine of a parent's vector with what the child adds", list(makers), "less"
        ),
        "projection": result(
            "projection", "projection of words left out on their concept's vector", ["random hierarchy"]
        ),
        "auc": result("auc", "AUC of words left out among all others", ["random hierarchy"]),
        "auc_within": result(
            "auc_within",
            "AUC of a child's words left out among its parent's",
            ["random hierarchy", "words of the parent"],
        ),
    }
    return HierarchicalOrthogonality(results, found.cosines, found.vectors, found.held_out)


@dataclass(frozen=True)
class _Measured:
    numbers: dict[str, float]
    cosines: dict[str, float]
    vectors: dict[str, Tensor]
    held_out: dict[str, tuple[float, float, float]]


class _Measure:
    """Measures concepts, given as their rows, in the whitened space."""

    def __init__(self, white: Tensor, parents: dict[str, str], parts: dict[str, Tensor]) -> None:
        self._white, self._single = white, white.float()
        self._parents, self._parts = parents, parts

    def __call__(self, members: dict[str, Tensor], left_out: bool = True) -> _Measured:
        vectors = {name: _vector(self._white[rows]) for name, rows in members.items()}
        cosines = {
            child: float(torch.cosine_similarity(vectors[parent], vectors[child] - vectors[parent], dim=0))
            for child, parent in self._parents.items()
        }
        numbers = {"orthogonal": _average([abs(cosine) for cosine in cosines.values()])}
        held_out: dict[str, tuple[float, float, float]] = {}
        if left_out:
            held_out, within = self._left_out(members)
            own, _, auc = zip(*held_out.values(), strict=True)
            numbers |= {"projection": _average(own), "auc": _average(auc), "auc_within": _average(within)}
        return _Measured(numbers, cosines, vectors, held_out)

    def _left_out(self, members: dict[str, Tensor]) -> tuple[dict[str, tuple[float, float, float]], list[float]]:
        """For each concept, over its folds: projections of own words and others, AUC; and the AUCs within parents."""
        folds = [(name, part == fold) for name, part in self._parts.items() for fold in part.unique().tolist()]
        fitted = torch.stack([_vector(self._white[members[name][~out]]) for name, out in folds])
        units = fitted / fitted.square().sum(1, keepdim=True).clamp(min=torch.finfo(fitted.dtype).tiny)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in members}
        within = []
        for (name, out), projected in zip(folds, units.float() @ self._single.T, strict=True):
            rows = members[name]
            others = torch.ones(len(projected), dtype=torch.bool)
            others[rows] = False
            own, rest = projected[rows[out]], projected[others]
            found[name].append((float(own.mean()), float(rest.mean()), _auc(own, rest)))
            if name in self._parents:
                parent = members[self._parents[name]]
                within.append(_auc(own, projected[parent[others[parent]]]))
        means = {}
        for name, numbers in found.items():
            own_mean, rest_mean, auc = (_average(column) for column in zip(*numbers, strict=True))
            means[name] = own_mean, rest_mean, auc
        return means, within


def _members(
    gamma: Tensor, groups: Mapping[str, Tensor], parents: Mapping[str, str], folds: int, n_null: int
) -> dict[str, Tensor]:
    if gamma.dim() != 2 or len(gamma) < 2 or not gamma.isfinite().all():
        raise ValueError(f"gamma must be finite rows [V, d], two at least, got shape {tuple(gamma.shape)}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    if not groups or not parents:
        raise ValueError("groups and parents must each have an entry")
    members = {}
    for name, given in groups.items():
        rows = torch.as_tensor(given).cpu().long()
        if (
            len(rows) < _LEAST
            or len(rows.unique()) < len(rows)
            or not 0 <= int(rows.min()) <= int(rows.max()) < len(gamma)
        ):
            raise ValueError(
                f"groups must each be at least {_LEAST} different rows of gamma, 0 … {len(gamma) - 1}: {name!r} is not"
            )
        members[name] = rows
    for child, parent in parents.items():
        if child not in members or parent not in members:
            raise ValueError(f"parents must name groups, got {child!r} below {parent!r}")
        inside = torch.isin(members[child], members[parent])
        if not inside.all() or len(members[child]) == len(members[parent]):
            raise ValueError(f"a child's rows must be some of its parent's and not all: {child!r} below {parent!r}")
        if len(gamma) - len(members[parent]) < len(members[child]):
            raise ValueError(f"gamma must have as many rows outside of {parent!r} as {child!r} has")
    return members


def _whitened(gamma: Tensor) -> Tensor:
    """Centred rows with the identity for covariance, on the directions that they span: float64."""
    rows = gamma.detach().cpu().double()
    rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = values > _TINY * values[-1]
    if values[-1] <= 0 or not kept.any():
        raise ValueError("gamma must have rows that differ")
    return rows @ (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T


def _vector(rows: Tensor) -> Tensor:
    """ℓ of a concept with these rows ``[n, d]``: its length is the mean's projection on the discriminant direction."""
    mean = rows.mean(0)
    centred = rows - mean
    share = float(ledoit_wolf_shrinkage(centred.numpy(), assume_centered=True)) if len(rows) > 1 else 1.0
    ridge = share * float(centred.square().mean())
    if ridge == 0:  # rows that are all equal, or covariances that need no shrinking
        ridge = _TINY * float(rows.square().mean())
    # Σ = (1 − s) CᵀC / n + s m I, by its singular vectors: d × d is never inverted.
    _, values, basis = torch.linalg.svd(centred, full_matrices=False)
    inside = basis @ mean
    variance = (1 - share) * values.square() / len(rows)
    direction = mean / ridge - basis.T @ (inside * (variance / (ridge * (variance + ridge))))
    direction = direction / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny)
    return (mean @ direction) * direction


def _auc(own: Tensor, others: Tensor) -> float:
    """How often a number of `own` is above one of `others`, ties half; NaN without any. `own` is short: no ranks."""
    if not len(own) or not len(others):
        return math.nan
    above, equal = (own[:, None] > others).sum(), (own[:, None] == others).sum()
    return float((above + 0.5 * equal) / (len(own) * len(others)))


def _average(numbers: Any) -> float:
    known = [number for number in numbers if number == number]
    return sum(known) / len(known) if known else math.nan

"""What polytope codes have to do with the latents of an SAE: unit by unit, as subspaces, and by their examples.

``docs/analyses/polytope.md`` says what the nulls are; :mod:`sparsekern.analysis.polytope.pull` compares directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.polytope.blocks import block_rows, bounds, check_contexts, shuffled
from sparsekern.analysis.polytope.codes import PolytopeCodes
from sparsekern.analysis.results import Result, Results, null_generator, samples

try:
    from scipy.linalg import qr
    from scipy.sparse import csr_array
    from scipy.special import gammaln
    from scipy.stats import false_discovery_control
    from sklearn.decomposition import PCA, TruncatedSVD
except ImportError as error:
    raise ImportError("this analysis needs scipy and scikit-learn: pip install 'sparsekern[analysis]'") from error

_TABLE = 2**23  # entries of a table of latents × units
_CKA_ROWS, _CKA_BLOCKS = 512, 32  # samples whose pairs are compared, and how many times so many
_TERM = 1e-12  # of a tail, relative to its sum, that is not added any more

Latents = sk.SparseCodes | sk.CSRCodes


@dataclass(frozen=True, eq=False)
class CodeFeatureRelation(Results):
    """What :func:`code_feature_relation` returns; m latents.

    Attributes
    ----------
    results : dict of str to Result
        ``best_auc``: mean over the latents of the AUC of the unit that tells best whether a latent is active.
        ``discovered``: share of the pairs (latent, unit) that are discovered. ``found``: share of the latents with a
        discovered unit. ``cka`` and ``cca``: similarity of the two representations.
    latents : Tensor [m] int64
        Those that are measured.
    best_auc : Tensor [m] float64
        AUC of the best unit, or of its opposite where that is better: 0.5 … 1.
    best_unit : Tensor [m] int64
    best_sign : Tensor [m] int64
        −1 where the unit is off when the latent is active.
    n_units : Tensor [m] int64
        Units that are discovered for each latent.
    null_best : dict of str to Tensor [n_null, m] float64
        `best_auc` under each null.
    """

    results: dict[str, Result]
    latents: Tensor
    best_auc: Tensor
    best_unit: Tensor
    best_sign: Tensor
    n_units: Tensor
    null_best: dict[str, Tensor]


@torch.no_grad()
def code_feature_relation(
    codes: PolytopeCodes,
    sae_codes: Latents,
    *,
    latents: Tensor | None = None,
    contexts: Tensor | None = None,
    control: Mapping[str, PolytopeCodes] | None = None,
    least: int = 10,
    alpha: float = 0.05,
    components: int = 16,
    n_null: int = 5,
    seed: int = 0,
) -> CodeFeatureRelation:
    """Whether single units tell when a latent is active, and how similar codes and latents are as a whole.

    A bit that is on in a share TPR of the samples where the latent is active and in FPR of the others has an AUC of
    ½ + ½ (TPR − FPR). Its p is hypergeometric, two-sided, corrected by Benjamini and Hochberg over the units of each
    latent. That holds for independent samples only: tokens of one context are not, and what is discovered in the nulls
    says by how much it fails. :func:`similarity` explains CKA and CCA.

    Tables of at most 2²³ (latent, unit) pairs exist at a time; the codes are unpacked in blocks, once for each table.

    Parameters
    ----------
    codes : PolytopeCodes
        Of kind "sign" or "gate"; N samples.
    sae_codes : SparseCodes or CSRCodes
        Of the same samples. A latent is active where its value is above 0.
    latents : Tensor of ints or None
        Which latents; by default all.
    contexts : Tensor [N] of ints or None
        Context of each sample, in runs. Adds a null in which whole contexts change places.
    control : mapping of str to PolytopeCodes or None
        Other codes of the same samples: of a net with random weights, or signs of principal components of activations
        packed by ``sparsekern.bits.pack_bits``.
    least : int
        Latents that are active, or not active, on fewer samples than this are left out.
    alpha : float
        False discovery rate.
    components : int
        Principal components of each side for CCA.
    n_null : int
        Samples of each null: the latents' samples permuted.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        For codes of kind "soft", lengths that do not fit, no latent that is active often enough, units that do not
        vary, and numbers out of range.

    References
    ----------
    Benjamini and Hochberg (1995); Black et al. (arXiv 2211.12312) for the codes.
    """
    n = _check(codes, sae_codes, control, n_null)
    if not 0 < alpha < 1 or least < 1:
        raise ValueError(f"alpha must be above 0 and below 1 and least at least 1, got {alpha} and {least}")
    contexts = check_contexts(contexts, n)
    active = active_rows(sae_codes)
    counts = np.diff(active.tocsc().indptr)
    wanted = np.arange(sae_codes.d_sae) if latents is None else _latents(latents, sae_codes.d_sae)
    wanted = wanted[(counts[wanted] >= least) & (n - counts[wanted] >= least)]
    if len(wanted) == 0:
        raise ValueError(f"sae_codes must have a latent that is active on {least} to N − {least} of the {n} samples")
    active = active[:, wanted]
    found = _tables(codes, active, alpha)
    generator = null_generator(seed)
    drawn: dict[str, list[_Found]] = {}
    for name, runs in _nulls(contexts).items():
        orders = (shuffled(n, runs, generator) for _ in range(n_null))
        drawn[name] = [_tables(codes, active[order.numpy()], alpha) for order in orders]
    others = {name: _tables(some, active, alpha) for name, some in (control or {}).items()}
    names = {
        "best_auc": "AUC of the best unit for a latent",
        "discovered": f"share of pairs of latent and unit discovered at a rate of {alpha:g}",
        "found": "share of latents with a discovered unit",
    }
    results = {
        key: Result(
            name,
            found.share(key),
            {null: samples(some.share(key) for some in group) for null, group in drawn.items()},
            {other: samples([some.share(key)]) for other, some in others.items()},
        )
        for key, name in names.items()
    }
    results |= similarity(
        codes, sae_codes, contexts=contexts, control=control, components=components, n_null=n_null, seed=seed
    )
    sign = torch.from_numpy(np.sign(found.best)).long()
    return CodeFeatureRelation(
        results,
        torch.from_numpy(wanted),
        torch.from_numpy(0.5 + np.abs(found.best)),
        torch.from_numpy(found.unit),
        sign,
        torch.from_numpy(found.n_units),
        {
            null: torch.from_numpy(np.stack([0.5 + np.abs(some.best) for some in group]))
            for null, group in drawn.items()
            if group
        },
    )


@torch.no_grad()
def similarity(
    codes: PolytopeCodes,
    sae_codes: Latents,
    *,
    contexts: Tensor | None = None,
    control: Mapping[str, PolytopeCodes | Tensor] | None = None,
    components: int = 16,
    n_null: int = 20,
    seed: int = 0,
) -> dict[str, Result]:
    """CKA and CCA of codes and latents.

    ``cka``
        Linear, debiased: the unbiased HSIC (Song et al. 2012) summed over at most 32 random blocks of 512 samples
        (Nguyen et al. 2021), so that the N × N kernels do not exist. About 0 where the two are independent.
    ``cca``
        Mean canonical correlation of the first principal components of both, fitted on one half of the samples, or of
        the contexts, and measured on the other half.

    Parameters
    ----------
    codes, sae_codes, contexts, components, n_null, seed
        As of :func:`code_feature_relation`; codes of any kind.
    control : mapping of str to PolytopeCodes or Tensor [N, d], or None
        What else is compared with the latents in the codes' place, such as the activations that the SAE reads.

    Raises
    ------
    ValueError
        For lengths that do not fit and numbers out of range.

    References
    ----------
    Kornblith et al., *Similarity of neural network representations revisited* (arXiv 1905.00414); Nguyen et al. (arXiv
    2010.15327) for the blocks; Song et al., *Feature selection via dependence maximization* (2012).
    """
    n = _check(codes, sae_codes, control, n_null, soft=True)
    if components < 1:
        raise ValueError(f"components must be at least 1, got {components}")
    if n < 4 * (components + 2):
        raise ValueError(
            f"codes must have at least {4 * (components + 2)} samples for {components} components, got {n}"
        )
    contexts = check_contexts(contexts, n)
    # Samples in one random order of contexts, so that blocks and halves are of random contexts.
    order = shuffled(n, contexts, null_generator(seed))
    z = _matrix(sae_codes)[order.numpy()]
    runs = None if contexts is None else contexts[order]
    first = _Compared.of(codes, z, order, components)
    generator = null_generator(seed + 1)
    cka: dict[str, list[float]] = {}
    cca: dict[str, list[float]] = {}
    for name, kept in _nulls(runs).items():
        cka[name] = [
            first.cka([shuffled(b - a, _part(kept, a, b), generator) for a, b in first.blocks]) for _ in range(n_null)
        ]
        halves = [(0, n // 2), (n // 2, n)]
        cca[name] = [
            first.cca([shuffled(b - a, _part(kept, a, b), generator) for a, b in halves]) for _ in range(n_null)
        ]
    others = {name: _Compared.of(some, z, order, components) for name, some in (control or {}).items()}

    def result(name: str, value: float, nulls: dict[str, list[float]], rest: dict[str, float]) -> Result:
        return Result(
            name,
            value,
            {null: samples(numbers) for null, numbers in nulls.items()},
            {other: samples([number]) for other, number in rest.items()},
        )

    return {
        "cka": result(
            "debiased linear CKA of codes and latents",
            first.cka(),
            cka,
            {name: some.cka() for name, some in others.items()},
        ),
        "cca": result(
            f"held-out canonical correlation of {components} components of codes and latents",
            first.cca(),
            cca,
            {name: some.cca() for name, some in others.items()},
        ),
    }


@dataclass(frozen=True, eq=False)
class SharedExamples(Results):
    """What :func:`shared_examples` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``overlap``: mean over the components of the largest share of examples that one has in common with a latent.
    overlap : Tensor [m] float64
        Of each component.
    latent : Tensor [m] int64
        With which latent.
    """

    results: dict[str, Result]
    overlap: Tensor
    latent: Tensor


@torch.no_grad()
def shared_examples(
    scores: Tensor | Latents,
    sae_codes: Latents,
    top: int = 20,
    *,
    contexts: Tensor | None = None,
    n_null: int = 20,
    seed: int = 0,
) -> SharedExamples:
    """Whether the samples that a component of the codes is strongest on are those that some latent is strongest on.

    Parameters
    ----------
    scores : Tensor [N, m], SparseCodes or CSRCodes
        Such as those of :class:`~sparsekern.analysis.polytope.Decomposition`; of latents in the case of codes.
    sae_codes : SparseCodes or CSRCodes
        Of the same samples.
    top : int
        Examples of each. A latent that is active on fewer samples has fewer, and shares at most so many of `top`.
    contexts : Tensor [N] of ints or None
        Adds a null in which whole contexts change places.
    n_null : int
        Samples of each null: the samples of the scores permuted. The largest overlap with many latents is above 0 by
        chance, which the null has too.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        For lengths that do not fit, scores that are not finite, no active latent, and numbers out of range.
    """
    n = sae_codes.tokens
    if not isinstance(scores, Tensor):
        columns = _examples(_matrix(scores), top)
        length = scores.tokens
    else:
        if scores.dim() != 2 or scores.shape[1] == 0 or not scores.isfinite().all():
            raise ValueError(f"scores must be [{n}, m], at least one and finite, got {tuple(scores.shape)}")
        length = len(scores)
        columns = scores.topk(min(max(1, top), length), 0).indices.T.numpy() if length == n else np.zeros((1, 1))
    if length != n:
        raise ValueError(f"scores must have {n} rows, one for each sample of sae_codes, got {length}")
    if not 1 <= top <= n or n_null < 0:
        raise ValueError(f"top must be in 1 … {n} and n_null not negative, got {top} and {n_null}")
    contexts = check_contexts(contexts, n)
    columns = columns[(columns >= 0).any(1)]
    examples = _examples(_matrix(sae_codes), top)
    if len(columns) == 0 or not (examples >= 0).any():
        raise ValueError("scores and sae_codes must each have something that is active on a sample")
    overlap, latent = _overlap(columns, examples, n, top)
    generator = null_generator(seed)
    nulls = {}
    for name, runs in _nulls(contexts).items():
        orders = (shuffled(n, runs, generator).numpy() for _ in range(n_null))
        moved = (np.where(columns >= 0, order[columns], -1) for order in orders)
        nulls[name] = samples(_overlap(some, examples, n, top)[0].mean() for some in moved)
    result = Result(f"share of {top} examples that a component has in common with a latent", overlap.mean(), nulls)
    return SharedExamples({"overlap": result}, torch.from_numpy(overlap), torch.from_numpy(latent))


def active_rows(sae_codes: Latents) -> csr_array:
    """Where latents are active, as a matrix of ones ``[N, W]`` in float32; kept values of 0 and below are not in it."""
    matrix = _matrix(sae_codes)
    matrix.data = np.ones_like(matrix.data)
    return matrix


def _matrix(sae_codes: Latents) -> csr_array:
    """Values above 0 as a sparse float32 matrix ``[N, W]``."""
    csr = sae_codes if isinstance(sae_codes, sk.CSRCodes) else sae_codes.to_csr()
    values = csr.values.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError("sae_codes must be finite: they hold NaN or infinity")
    shape = (sae_codes.tokens, sae_codes.d_sae)
    matrix = csr_array((np.maximum(values, 0), csr.col.cpu().numpy(), csr.crow.cpu().numpy()), shape=shape)
    matrix.eliminate_zeros()
    return matrix


def _nulls(contexts: Tensor | None) -> dict[str, Tensor | None]:
    permuted: dict[str, Tensor | None] = {"samples permuted": None}
    return permuted if contexts is None else permuted | {"contexts permuted": contexts}


def _part(contexts: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if contexts is None else contexts[start:stop]


# Tables of units and latents


@dataclass(frozen=True, eq=False)
class _Found:
    """For m latents: the largest deviation of an AUC from ½ with its sign, its unit, and the number of discoveries."""

    best: np.ndarray
    unit: np.ndarray
    n_units: np.ndarray
    units: int

    def share(self, key: str) -> float:
        if key == "best_auc":
            return float(0.5 + np.abs(self.best).mean())
        return float((self.n_units > 0).mean() if key == "found" else self.n_units.mean() / self.units)


def _tables(codes: PolytopeCodes, active: csr_array, alpha: float) -> _Found:
    n, units = len(codes), codes.n_units
    parts = []
    on = _on(codes)
    if not ((on > 0) & (on < n)).any():
        raise ValueError("codes must have a unit that is on in some samples and off in others")
    for start, stop in bounds(active.shape[1], max(1, _TABLE // units)):
        some = active[:, start:stop]
        both = np.zeros((stop - start, units))
        for first, last in bounds(n, block_rows(units)):
            both += some[first:last].T @ codes.unpack(slice(first, last)).float().numpy()
        parts.append(_discoveries(both, np.diff(some.tocsc().indptr), on, n, alpha))
    best, unit, count = (np.concatenate(some) for some in zip(*parts, strict=True))
    return _Found(best, unit, count, units)


def _on(codes: PolytopeCodes) -> np.ndarray:
    """Samples in which each unit is on ``[n]``."""
    parts = bounds(len(codes), block_rows(codes.n_units))
    return sum((codes.unpack(slice(*part)).sum(0) for part in parts), torch.zeros(codes.n_units)).long().numpy()


def _discoveries(
    both: np.ndarray, active: np.ndarray, on: np.ndarray, n: int, alpha: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best deviation, its unit and the number of discoveries, of a table of latents × units."""
    active = active[:, None]
    deviation = 0.5 * (both / active - (on - both) / (n - active))
    unit = np.abs(deviation).argmax(1)
    best = np.take_along_axis(deviation, unit[:, None], 1)[:, 0]
    spread = np.sqrt(active * (n - active) / n * (on / n) * (1 - on / n))
    expected = active * on / n
    # Within a standard deviation of what is expected no p is small enough to be discovered: it need not be computed.
    far = np.abs(both - expected) > np.maximum(spread, 1e-9)
    p = np.ones_like(both)
    rows, columns = far.nonzero()
    p[rows, columns] = two_sided_p(both[rows, columns], active[rows, 0], on[columns], n)
    found = false_discovery_control(p, axis=1) <= alpha
    return best, unit, found.sum(1)


def two_sided_p(both: np.ndarray, active: np.ndarray, on: np.ndarray, n: int) -> np.ndarray:
    """Twice the smaller hypergeometric tail, at most 1: of counts that n samples have in common by chance.

    Exact to 1e-12 of itself, by summing terms away from the mode, for all entries at once.
    """
    above = both * n >= active * on  # the tail away from the expectation is the smaller one, or both are large
    # The lower tail is the upper one of the samples where the latent is not active.
    k = np.where(above, both, on - both)
    m = np.where(above, active, n - active).astype(np.float64)
    on = on.astype(np.float64)
    logs = _log_choose(m, k) + _log_choose(n - m, on - k) - _log_choose(np.full_like(m, n), on)
    total, term = np.ones_like(m), np.ones_like(m)
    going = np.arange(len(m))
    at = k.astype(np.float64)
    while len(going):
        x = at[going]
        term[going] *= (m[going] - x) * (on[going] - x) / ((x + 1) * (n - m[going] - on[going] + x + 1))
        total[going] += term[going]
        at[going] += 1
        going = going[term[going] > _TERM * total[going]]
    return np.minimum(1, 2 * np.exp(logs + np.log(total)))


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


# CKA and CCA


@dataclass(frozen=True, eq=False)
class _Compared:
    """Kernels of blocks of samples, and principal components of both halves, of codes and latents in one order."""

    blocks: list[tuple[int, int]]
    kernels: list[tuple[Tensor, Tensor]]
    scores: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, codes: PolytopeCodes | Tensor, z: csr_array, order: Tensor, components: int) -> _Compared:
        n = len(order)
        blocks = bounds(n, _CKA_ROWS)[:_CKA_BLOCKS]
        kernels = []
        for start, stop in blocks:
            rows, some = _floats(codes, order[start:stop]), z[start:stop]
            kernels.append((_hollow(rows @ rows.T), _hollow(torch.from_numpy((some @ some.T).toarray()))))
        half = n // 2
        return cls(blocks, kernels, (_components(codes, order, half, components), _reduced(z, half, components)))

    @cached_property
    def own(self) -> float:
        """The geometric mean of both HSICs with themselves, which no order changes."""
        first, second = (sum(_hsic(pair[side], pair[side]) for pair in self.kernels) for side in (0, 1))
        return (first * second) ** 0.5 if first > 0 and second > 0 else float("nan")

    def cka(self, orders: list[Tensor] | None = None) -> float:
        """Of the blocks, with the latents of each in another order if one is given."""
        between = 0.0
        for index, (first, second) in enumerate(self.kernels):
            order = slice(None) if orders is None else orders[index]
            between += _hsic(first, second[order][:, order])
        return between / self.own

    def cca(self, orders: list[Tensor] | None = None) -> float:
        """Of the second half, by directions of the first one."""
        first, second = self.scores
        half = len(first) // 2
        if orders is not None:
            second = np.concatenate([second[:half][orders[0].numpy()], second[half:][orders[1].numpy()]])
        return _held_out_cca(first, second, half)


def _floats(codes: PolytopeCodes | Tensor, rows: Tensor) -> Tensor:
    if isinstance(codes, Tensor):
        return codes[rows].detach().float().cpu()
    return codes.unpack(rows).float()


def _hollow(kernel: Tensor) -> Tensor:
    return kernel.double().fill_diagonal_(0)


def _hsic(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate, of kernels with a diagonal of 0; times a factor that only depends on their size."""
    n = len(first)
    a, b = first.sum(0), second.sum(0)
    both = (first * second).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b)
    return float(both)


def _components(codes: PolytopeCodes | Tensor, order: Tensor, half: int, components: int) -> np.ndarray:
    """Scores of all samples on principal components of the first half, or of as many of it as a block holds."""
    width = codes.shape[1] if isinstance(codes, Tensor) else codes.n_units
    size = block_rows(width, 4 * components)
    some = _floats(codes, order[: min(half, size)]).numpy()
    fitted = PCA(min(components, *some.shape), svd_solver="randomized", random_state=0).fit(some)
    return np.concatenate([fitted.transform(_floats(codes, order[a:b]).numpy()) for a, b in bounds(len(order), size)])


def _reduced(z: csr_array, half: int, components: int) -> np.ndarray:
    kept = min(components, z.shape[1], half)
    if kept == z.shape[1]:
        return z.toarray()
    return TruncatedSVD(kept, random_state=0).fit(z[:half]).transform(z)


def _held_out_cca(first: np.ndarray, second: np.ndarray, half: int) -> float:
    bases, spans = [], []
    for scores in (first, second):
        centred = scores - scores[:half].mean(0)
        basis, triangle, order = qr(centred[:half], mode="economic", pivoting=True)
        size = np.abs(np.diag(triangle))
        rank = int((size > 1e-6 * max(size[0], 1e-30)).sum()) if size[0] > 0 else 0
        if rank == 0:
            return float("nan")
        bases.append(basis[:, :rank])
        spans.append(np.linalg.solve(triangle[:rank, :rank].T, centred[half:][:, order[:rank]].T).T)
    u, _, v = np.linalg.svd(bases[0].T @ bases[1], full_matrices=False)
    seen = spans[0] @ u, spans[1] @ v.T
    found = [_correlation(a, b) for a, b in zip(seen[0].T, seen[1].T, strict=True)]
    return float(np.mean(found))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / spread) if spread > 0 else 0.0


# Examples


def _examples(matrix: csr_array, top: int) -> np.ndarray:
    """The samples on which each column is largest, ``[W, top]``, −1 where there are fewer."""
    entries = matrix.tocoo()
    order = np.lexsort((entries.row, -entries.data, entries.col))
    column, row = entries.col[order], entries.row[order]
    starts = np.searchsorted(column, np.arange(matrix.shape[1]))
    place = np.arange(len(column)) - starts[column]
    found = np.full((matrix.shape[1], top), -1, dtype=np.int64)
    kept = place < top
    found[column[kept], place[kept]] = row[kept]
    return found


def _overlap(columns: np.ndarray, examples: np.ndarray, n: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest share of examples that each of some columns has in common with a latent, and the latent."""
    overlap, latent = [], []
    marked = np.zeros(n + 1, dtype=bool)  # the last stands for no sample
    for rows in columns:
        marked[rows[rows >= 0]] = True
        counts = marked[examples].sum(1)
        marked[:] = False
        overlap.append(counts.max() / top)
        latent.append(counts.argmax())
    return np.array(overlap, dtype=np.float64), np.array(latent, dtype=np.int64)


def _latents(latents: Tensor, d_sae: int) -> np.ndarray:
    found = latents.cpu()
    if found.dim() != 1 or found.is_floating_point() or (len(found) and not 0 <= found.min() <= found.max() < d_sae):
        raise ValueError(f"latents must be whole numbers [m] in 0 … {d_sae - 1}")
    return found.long().numpy()


def _check(
    codes: PolytopeCodes,
    sae_codes: Latents,
    control: Mapping[str, PolytopeCodes | Tensor] | None,
    n_null: int,
    soft: bool = False,
) -> int:
    n = len(codes)
    if sae_codes.tokens != n:
        raise ValueError(f"sae_codes must have {n} rows, one for each sample of codes, got {sae_codes.tokens}")
    for name, some in {"codes": codes, **(control or {})}.items():
        if len(some) != n:
            raise ValueError(f"control {name!r} must have {n} samples, as codes have, got {len(some)}")
        if isinstance(some, PolytopeCodes) and some.kind == "soft" and not soft:
            raise ValueError(f"{name} must be of bits, kind 'sign' or 'gate', got kind 'soft'")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    return n

"""How many dimensions codes fill: the spectrum of their covariance, and what is lost with only q of them.

:func:`pca_spectrum` gives eigenvalues, effective dimensions and the leading principal components of sparse codes,
:func:`fvu_curve` and :func:`ce_curve` what an SAE reconstructs, and what a language model loses, when its codes are
projected on the first q. Their null has each latent's values permuted over tokens.

A decoder of W rows in d dimensions forgets a subspace of at least W − d dimensions of codes, whatever was learned: that
a few hundred of W directions are enough for the reconstruction says nothing by itself. So curves have the
reconstruction's own principal components beside them, of which d lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples
from sparsekern.training import loss_recovered

try:
    from scipy.linalg import eigh, eigvalsh
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import LinearOperator, eigsh
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

METHODS = ("auto", "dense", "lanczos")
_DENSE = 8192  # latents up to which "auto" makes their covariance
_BLOCK = 512  # of its rows that are made at a time
_TILE = 4096  # tokens encoded at a time
_SHUFFLED = "each latent's values permuted over tokens"
_FREE = "principal components of the reconstruction"


@dataclass(frozen=True, eq=False)
class Basis:
    """Principal components of codes.

    Attributes
    ----------
    mean : Tensor [W]
    components : Tensor [q, W]
        Orthonormal, of falling variance; 0 for latents that were never active.
    """

    mean: Tensor
    components: Tensor


@dataclass(frozen=True, eq=False)
class Spectrum(Results):
    """What :func:`pca_spectrum` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``participation``, the participation ratio (Σλ)² / Σλ²; ``entropy_rank``, exp(−Σ p ln p) with p = λ / Σλ;
        ``q99``, the fewest components that hold 99% of the variance. Few dimensions speak against the null.
    eigenvalues : Tensor [r] float64
        Falling; all of the active latents' with the dense method, the first q with Lanczos.
    variance : float
        Sum of all eigenvalues.
    basis : Basis
        The first q principal components.
    null_eigenvalues : Tensor [n_null, r] float64
    null_bases : list of Basis
        Of the first `n_bases` samples of the null.
    """

    results: dict[str, Result]
    eigenvalues: Tensor
    variance: float
    basis: Basis
    null_eigenvalues: Tensor
    null_bases: list[Basis]

    def plot(self, axes: Any = None) -> Any:
        """The share of the variance beyond the first q components, beside the null."""
        axes = new_axes() if axes is None else axes
        for index, values in enumerate(self.null_eigenvalues):
            label = _SHUFFLED if index == 0 else None
            axes.plot(*_rest(values, float(values.sum())), color="0.6", lw=1, label=label)
        axes.plot(*_rest(self.eigenvalues, self.variance), color="C0", label="measured")
        axes.set(xlabel="principal components q", ylabel="share of variance beyond them", xscale="log", yscale="log")
        axes.set_ylim(1e-4, 1.1)
        axes.legend(frameon=False)
        return axes


@dataclass(frozen=True, eq=False)
class AblationCurve(Results):
    """What :func:`fvu_curve` and :func:`ce_curve` return.

    Attributes
    ----------
    results : dict of int to Result
        The measure with codes projected on q principal components, under ``str(q)``. Less than the null is better.
    qs : list of int
    values : Tensor [len(qs)] float64
    full : float
        The measure with the codes as they are.
    """

    results: dict[str, Result]
    qs: list[int]
    values: Tensor
    full: float

    def plot(self, axes: Any = None) -> Any:
        """The measure against q, beside nulls (grey) and controls (orange); dashed: all of the codes."""
        axes = new_axes() if axes is None else axes
        rows = list(self.results.values())
        for color, group in (("0.6", "nulls"), ("C1", "controls")):
            for style, name in zip(cycle("-:"), getattr(rows[0], group)):
                lines = torch.stack([getattr(row, group)[name] for row in rows])
                labels = [name, *[None] * (lines.shape[1] - 1)]
                axes.plot(self.qs, lines.numpy(), color=color, ls=style, lw=1, label=labels)
        axes.plot(self.qs, self.values.tolist(), "o-", color="C0", ms=4, label="principal components of the codes")
        axes.axhline(self.full, color="C0", ls="--", lw=1)
        axes.set(xlabel="dimensions kept", ylabel=rows[0].name.split(", ")[0], xscale="log")
        axes.set_xticks(self.qs, [f"{q:,}" for q in self.qs])
        axes.minorticks_off()
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=1, borderaxespad=0)
        return axes


class Projected(nn.Module):
    """An SAE whose codes are projected on principal components before they are decoded.

    It goes where the SAE goes in :func:`sparsekern.splice` and :func:`sparsekern.training.loss_recovered`. No dense
    codes are made: the q scores of a token are a sparse decode with the components in the place of the decoder.

    Parameters
    ----------
    sae : SAE
        One that decodes codes z to ``z @ W_dec + b_dec``.
    basis : Basis
        Of its codes.
    q : int or None
        How many components of the basis; by default all.
    """

    directions: Tensor
    offset: Tensor
    writes: Tensor
    centre: Tensor

    def __init__(self, sae: sk.SAE, basis: Basis, q: int | None = None) -> None:
        super().__init__()
        _check_linear(sae)
        most = len(basis.components)
        if q is not None and not 0 <= q <= most:
            raise ValueError(f"q must be in 0 … {most}, the components of the basis, got {q}")
        if basis.components.shape[1] != sae.d_sae:
            raise ValueError(f"basis must be of {sae.d_sae} latents, got {basis.components.shape[1]}")
        self.sae, self.reads, self.d_sae = sae, sae.reads, sae.d_sae
        kept = basis.components[:q].to(sae.W_dec)
        mean = basis.mean.to(sae.W_dec)
        self.register_buffer("directions", kept.T.contiguous())
        self.register_buffer("offset", -(kept @ mean))
        self.register_buffer("writes", (kept @ sae.W_dec).detach())
        self.register_buffer("centre", (mean @ sae.W_dec + sae.b_dec).detach())

    def encode(self, x: Tensor) -> Any:
        """The SAE's codes of `x` ``[..., d_in]``."""
        return self.sae.encode(x)

    def scores(self, codes: Any) -> Tensor:
        """The codes' coordinates on the components, ``[..., q]``."""
        if self.writes.shape[0] == 0:
            return codes.values.new_zeros(codes.tokens, 0)
        return sk.sparse_decode(codes, self.directions, self.offset)

    def reconstruct(self, codes: Any, x: Tensor) -> Tensor:
        """What is decoded from the projected codes of `x`, ``[..., d_out]``."""
        return (self.scores(codes) @ self.writes + self.centre).reshape(*x.shape[:-1], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of `x`."""
        return self.reconstruct(self.encode(x), x)


@torch.no_grad()
def pca_spectrum(
    codes: sk.SparseCodes | sk.CSRCodes,
    q: int = 256,
    *,
    method: str = "auto",
    n_null: int = 5,
    n_bases: int = 1,
    seed: int = 0,
) -> Spectrum:
    """Eigenvalues and principal components of sparse codes about their mean.

    No tokens × W tensor is made. The dense method needs ``8 W²`` bytes for the covariance of the W active latents and
    three times as much again for their eigenvectors; Lanczos needs ``16 q W`` and products with the codes, and does not
    know what lies beyond its q eigenvalues: then the entropy rank is NaN, and q99 too where q components hold less.

    Parameters
    ----------
    codes : SparseCodes or CSRCodes
        Of at least two tokens.
    q : int
        Components to keep; as many as there are active latents, or one less with Lanczos, where that is fewer.
    method : {"auto", "dense", "lanczos"}
        By default dense up to 8,192 active latents.
    n_null : int
        Samples of the null: each latent's values permuted over tokens, so that its density and distribution stay and
        all correlation goes. Each costs as much as the spectrum.
    n_bases : int
        Of how many of them to keep the components, for the curves.
    seed : int
        Determines the null and where Lanczos starts.

    Returns
    -------
    Spectrum

    Raises
    ------
    ValueError
        For fewer than two tokens, codes that are not finite or do not vary, an unknown method, numbers out of range.

    References
    ----------
    The participation ratio is that of Gao et al., *A theory of multineuronal dimensionality* (2017); the entropy rank
    that of Roy & Vetterli, *The effective rank* (2007).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if q < 1:
        raise ValueError(f"q must be at least 1, got {q}")
    if not 0 <= n_bases <= n_null:
        raise ValueError(f"n_bases must be in 0 … n_null = {n_null}, got {n_bases}")
    z = _matrix(codes)
    active = np.flatnonzero(np.diff(z.tocsc().indptr))
    if len(active) == 0:
        raise ValueError("codes must have an active latent")
    z = z[:, active]
    dense = method == "dense" or (method == "auto" and len(active) <= _DENSE) or len(active) < 3
    rng = _numpy_generator(seed)
    decomposed = _dense if dense else _lanczos
    found = decomposed(z, q, True, rng)
    if not found.variance > 0:
        raise ValueError("codes must vary: all tokens have the same")
    drawn = [decomposed(_permuted(z, rng), q, sample < n_bases, rng) for sample in range(n_null)]
    titles = {
        "participation": "participation ratio of the codes' covariance",
        "entropy_rank": "entropy rank of the codes' covariance",
        "q99": "principal components with 99% of the codes' variance",
    }
    values, beside = found.measures(), [one.measures() for one in drawn]
    results = {
        key: Result(title, values[key], {_SHUFFLED: samples(one[key] for one in beside)}, tail="less")
        for key, title in titles.items()
    }
    width = codes.d_sae
    return Spectrum(
        results,
        torch.from_numpy(found.eigenvalues.copy()),
        found.variance,
        found.basis(active, width),
        torch.from_numpy(np.stack([one.eigenvalues for one in drawn]) if drawn else np.empty((0, 0))),
        [one.basis(active, width) for one in drawn[:n_bases]],
    )


def shuffled_codes(codes: sk.SparseCodes | sk.CSRCodes, seed: int = 0) -> sk.CSRCodes:
    """Codes in which each latent's values are permuted over tokens: the null of :func:`pca_spectrum`.

    A token then has any number of active latents, also where all had k.

    Parameters
    ----------
    codes : SparseCodes or CSRCodes
        Of at least two tokens.
    seed : int
        Determines the permutations.
    """
    z = _permuted(_matrix(codes), _numpy_generator(seed))
    z.sort_indices()
    crow, col = torch.from_numpy(z.indptr.astype(np.int64)), torch.from_numpy(z.indices.astype(np.int32))
    return sk.CSRCodes(crow, col, torch.from_numpy(z.data).to(codes.values.dtype), codes.d_sae)


@torch.no_grad()
def fvu_curve(spectrum: Spectrum, sae: sk.SAE, x: Tensor, qs: Sequence[int] | None = None) -> AblationCurve:
    """The FVU of an SAE's reconstruction when its codes keep q principal components only.

    Parameters
    ----------
    spectrum : Spectrum
        Of the SAE's codes, better of other tokens than `x`. Its ``null_bases`` are the null: with the components of
        permuted codes, which know each latent's variance but not what goes together.
    sae : SAE
        One that decodes codes z to ``z @ W_dec + b_dec``.
    x : Tensor [n, d_in]
        Activations, which are also the target.
    qs : sequence of int or None
        Components to keep, by default powers of two up to all of the basis.

    Returns
    -------
    AblationCurve
        With a control: the reconstruction itself projected on q of its own principal components, the best that q
        dimensions can do for it. From q = d on it loses nothing, which is what W > d gives for free.

    Raises
    ------
    ValueError
        For an SAE that decodes otherwise, `x` of a wrong shape, not finite or without variance, and q out of range.
    """
    rows = _checked_x(sae, x)
    kept = _checked_qs(spectrum, qs)
    centred = (rows - rows.mean(0)).double()
    total = float(centred.square().sum())
    if not total > 0:
        raise ValueError("x must vary: its rows are all the same")
    modules = [Projected(sae, basis) for basis in (spectrum.basis, *spectrum.null_bases)]
    moments = torch.zeros(sae.d_out, sae.d_out, dtype=torch.float64)
    sums = torch.zeros(sae.d_out, dtype=torch.float64)
    for part in rows.split(_TILE):
        recon = sae(part).double().cpu()
        moments += recon.T @ recon
        sums += recon.sum(0)
    mean = sums / len(rows)
    own = torch.linalg.eigh(moments / len(rows) - torch.outer(mean, mean)).eigenvectors.flip(1)
    errors = torch.zeros(len(kept), len(modules) + 1, dtype=torch.float64)
    whole = 0.0
    for part in rows.split(_TILE):
        codes = sae.encode(part)
        recon = sae.reconstruct(codes, part)
        whole += float((part - recon).double().square().sum())
        for column, module in enumerate(modules):
            scores = module.scores(codes)
            for index, q in enumerate(kept):
                less = scores[:, :q] @ module.writes[:q] + module.centre
                errors[index, column] += (part - less).double().square().sum().cpu()
        around, target = recon.double().cpu() - mean, part.double().cpu() - mean
        for index, q in enumerate(kept):
            top = own[:, :q]
            errors[index, -1] += (target - around @ top @ top.T).square().sum()
    fvu = errors / total
    results = {
        str(q): Result(f"FVU, {q} components", float(row[0]), {_SHUFFLED: row[1:-1]}, {_FREE: row[-1:]}, tail="less")
        for q, row in zip(kept, fvu, strict=True)
    }
    return AblationCurve(results, kept, fvu[:, 0], whole / total)


def ce_curve(
    spectrum: Spectrum,
    sae: sk.SAE,
    model: nn.Module,
    module: str,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    qs: Sequence[int] | None = None,
    *,
    read: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AblationCurve:
    """The cross-entropy of a language model with an SAE spliced in whose codes keep q principal components only.

    One :func:`sparsekern.training.loss_recovered` for each q and each basis: the spectrum's and those of its null.

    Parameters
    ----------
    spectrum, sae, qs
        As for :func:`fvu_curve`.
    model, module, batches, read
        As for :func:`sparsekern.training.loss_recovered`.
    progress : callable or None
        Called as ``progress(done, total)`` with the number of evaluations.

    Returns
    -------
    AblationCurve
        In nats. Controls: the model as it is, and with the module's output at its mean.

    Raises
    ------
    ValueError
        As :func:`fvu_curve` and :func:`sparsekern.training.loss_recovered` do.
    """
    _check_linear(sae)
    kept = _checked_qs(spectrum, qs)
    given = list(batches)
    bases = [spectrum.basis, *spectrum.null_bases]
    whole = loss_recovered(model, module, sae, given, read=read)
    controls = {"model as it is": samples([whole.ce_clean]), "mean ablation": samples([whole.ce_mean])}
    found: dict[str, Result] = {}
    for index, q in enumerate(kept):
        spliced = []
        for place, basis in enumerate(bases):
            stand_in = cast(sk.SAE, Projected(sae, basis, q))
            spliced.append(loss_recovered(model, module, stand_in, given, read=read).ce_spliced)
            if progress is not None:
                progress(index * len(bases) + place + 1, len(kept) * len(bases))
        nulls = {_SHUFFLED: samples(spliced[1:])}
        found[str(q)] = Result(f"cross-entropy in nats, {q} components", spliced[0], nulls, controls, tail="less")
    return AblationCurve(found, kept, samples(result.value for result in found.values()), whole.ce_spliced)


# Decompositions


@dataclass(frozen=True, eq=False)
class _Decomposed:
    """Eigenvalues of a covariance, falling, and its trace and that of its square."""

    eigenvalues: np.ndarray
    variance: float
    square: float
    whole: bool
    mean: np.ndarray
    vectors: np.ndarray | None

    def measures(self) -> dict[str, float]:
        shares = self.eigenvalues.clip(0) / self.variance
        held = np.cumsum(shares) >= 0.99 - 1e-12
        some = shares[shares > 0]
        return {
            "participation": self.variance**2 / self.square,
            "entropy_rank": float(np.exp(-(some * np.log(some)).sum())) if self.whole else float("nan"),
            "q99": float(held.argmax() + 1) if held.any() else float("nan"),
        }

    def basis(self, active: np.ndarray, width: int) -> Basis:
        assert self.vectors is not None
        mean, components = torch.zeros(width), torch.zeros(self.vectors.shape[1], width)
        mean[active] = torch.from_numpy(self.mean).float()
        components[:, active] = torch.from_numpy(self.vectors.T.copy()).float()
        return Basis(mean, components)


def _dense(z: csr_array, q: int, vectors: bool, rng: np.random.Generator) -> _Decomposed:
    n, width = z.shape
    mean = z.sum(0) / n
    covariance = np.empty((width, width))
    for start, product in _products(z):
        covariance[start : start + product.shape[0]] = product.toarray() / n
    covariance -= np.outer(mean, mean)
    variance, square = float(np.trace(covariance)), float((covariance**2).sum())
    if vectors:
        values, found = eigh(covariance, overwrite_a=True, check_finite=False, driver="evd")
        return _Decomposed(values[::-1].clip(0), variance, square, True, mean, found[:, ::-1][:, :q])
    values = eigvalsh(covariance, overwrite_a=True, check_finite=False)
    return _Decomposed(values[::-1].clip(0), variance, square, True, mean, None)


def _lanczos(z: csr_array, q: int, vectors: bool, rng: np.random.Generator) -> _Decomposed:
    n, width = z.shape
    mean = z.sum(0) / n
    transposed = z.T.tocsr()

    def times(v: np.ndarray) -> np.ndarray:
        column = v.ravel()
        return transposed @ (z @ column) / n - mean * (mean @ column)

    operator = LinearOperator((width, width), matvec=times, dtype=np.float64)
    values, found = eigsh(operator, k=min(q, width - 1), which="LA", v0=rng.standard_normal(width))
    variance = float((z.power(2).sum(0) / n - mean**2).sum())
    # tr (M − μμᵀ)² with M = ZᵀZ / n, whose entries are made a block at a time
    moments = sum(float((product.data**2).sum()) for _, product in _products(z)) / n**2
    norm = float(mean @ mean)
    square = moments - 2 * float(np.square(z @ mean).sum()) / n + norm**2
    return _Decomposed(values[::-1].clip(0), variance, square, False, mean, found[:, ::-1] if vectors else None)


def _products(z: csr_array) -> Iterable[tuple[int, csr_array]]:
    """Blocks of rows of ZᵀZ, and where they start."""
    transposed = z.T.tocsr()
    for start in range(0, z.shape[1], _BLOCK):
        yield start, transposed[start : start + _BLOCK] @ z


# Codes


def _matrix(codes: sk.SparseCodes | sk.CSRCodes) -> csr_array:
    """Codes as scipy's CSR in float64, without entries of value 0."""
    form = codes.to_csr() if isinstance(codes, sk.SparseCodes) else codes
    if form.tokens < 2:
        raise ValueError(f"codes must be of at least two tokens, got {form.tokens}")
    values = form.values.detach().double().cpu()
    if not values.isfinite().all():
        raise ValueError("codes must be finite: remove tokens with NaN or infinity")
    parts = values.numpy().copy(), form.col.long().cpu().numpy(), form.crow.cpu().numpy()
    z = csr_array(parts, shape=(form.tokens, form.d_sae))
    z.eliminate_zeros()
    return z


def _permuted(z: csr_array, rng: np.random.Generator) -> csr_array:
    """Each column's values at other rows, drawn without replacement."""
    columns = z.tocsc()
    rows = np.empty_like(columns.indices)
    n = z.shape[0]
    for start, stop in zip(columns.indptr[:-1], columns.indptr[1:], strict=True):
        rows[start:stop] = rng.choice(n, stop - start, replace=False)
    owner = np.repeat(np.arange(z.shape[1]), np.diff(columns.indptr))
    return csr_array((columns.data, (rows, owner)), shape=z.shape)


def _numpy_generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(null_generator(seed).initial_seed())


def _rest(values: Tensor, variance: float) -> tuple[list[int], list[float]]:
    rest = (1 - values.cumsum(0) / variance).clamp(min=1e-9)
    return list(range(1, len(values) + 1)), rest.tolist()


# Checks


def _check_linear(sae: sk.SAE) -> None:
    plain = isinstance(sae, sk.SAE) and all(
        getattr(type(sae), name) is getattr(sk.SAE, name) for name in ("decode", "reconstruct", "offset")
    )
    if not plain:
        raise ValueError(f"sae must be an SAE that decodes codes z to z @ W_dec + b_dec, got {type(sae).__name__}")


def _checked_x(sae: sk.SAE, x: Tensor) -> Tensor:
    _check_linear(sae)
    if sae.d_in != sae.d_out:
        raise ValueError(f"sae must reconstruct what it reads, got d_in {sae.d_in} and d_out {sae.d_out}")
    if x.dim() != 2 or x.shape[1] != sae.d_in or len(x) < 2:
        raise ValueError(f"x must be [n, {sae.d_in}] with at least two rows, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x must be finite: remove or repair the rows with NaN or infinity")
    return x.to(sae.W_dec)


def _checked_qs(spectrum: Spectrum, qs: Sequence[int] | None) -> list[int]:
    most = min(len(basis.components) for basis in (spectrum.basis, *spectrum.null_bases))
    if qs is None:
        return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]
    kept = list(qs)
    if not kept or not all(0 <= q <= most for q in kept):
        raise ValueError(f"qs must be in 0 … {most}, the components of the spectrum, got {kept}")
    return kept

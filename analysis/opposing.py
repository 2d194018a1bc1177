"""Opposing directions: latents whose encoder and decoder rows both point against those of another one.

A latent that is never negative writes half a line, so a direction that is used both ways costs two of them: an
antipodal pair. :func:`antipodal_pairs` finds them in wide dictionaries, :func:`antipodal_report` tells how many there
are beside dictionaries where chance put them, :func:`dense_latents` whether the dense latents are among them. The
experiments at the end make data that has such a direction, and data that has no direction at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.results import Result, frame, new_axes, plain, samples
from sparsekern.modules import Activation

_BLOCK_BYTES = 192 * 2**20  # of the latents that a batch of rows is compared with at a time
_BATCH_BYTES = 96 * 2**20  # of a batch of rows: enough of them for the int8 copy of the block to cost little
_CHUNK_BYTES = 32 * 2**20  # of temporaries
_KEPT = (8, 64)  # candidates of a row in a block, and those of a row that needs more
_ROUNDING = 2e-6  # of a score in float32
_NULL_ROWS = 1024  # random latents whose opposites are looked for among all of a null
_MEASURED = 8192  # fresh tokens of an experiment


# Pairs


@dataclass(frozen=True, eq=False)
class AntipodalPairs:
    """What :func:`antipodal_pairs` returns; W latents.

    Attributes
    ----------
    j : Tensor [W] int64
        The partner: the latent with which a latent has its score. −1 where no latent has two negative cosines with it.
    cos_dec, cos_enc : Tensor [W] float32
        Cosines of the decoder's and the encoder's rows with the partner's, both negative; NaN without a partner.
    score : Tensor [W] float32
        Product of the two, 0 … 1; 0 without a partner.
    is_pair : Tensor [W] bool
        Whether the score is at least `tau`.
    measured : Tensor [W] bool
        Latents that were compared: those asked for, less those with a row of zeros, which has no direction.
    tau : float
    repaired : int
        Latents that the first pass had no certificate for. They cost time and nothing else.
    """

    j: Tensor
    cos_dec: Tensor
    cos_enc: Tensor
    score: Tensor
    is_pair: Tensor
    measured: Tensor
    tau: float
    repaired: int

    @property
    def pairs(self) -> Tensor:
        """The pairs ``[n_pairs, 2]`` int64, the lower latent first, by rising latent: of each with its partner."""
        latents = self.is_pair.nonzero().squeeze(1)
        return torch.stack([latents, self.j[latents]], 1).sort(dim=1).values.unique(dim=0)

    @property
    def n_pairs(self) -> int:
        """Number of different pairs; latents that share a partner have a pair each."""
        return len(self.pairs)

    @property
    def share(self) -> float:
        """Share of the measured latents that are in a pair; NaN where none was measured."""
        return float(self.is_pair[self.measured].double().mean())


@torch.no_grad()
def antipodal_pairs(
    D: Tensor, E: Tensor | None = None, tau: float = 0.8, *, alive: Tensor | None = None
) -> AntipodalPairs:
    """For each latent the one that opposes it most, in decoder and encoder: exact, without a W × W tensor.

    The score of latent i is ``max_j cos(E_i, E_j) · cos(D_i, D_j)`` over the j with which *both* cosines are negative.
    Without that, duplicates would score as high as opposites.

    The product of two numbers is at most the square of their mean. So the latents with the most negative *mean* cosine
    are candidates, which is one exact top k of ``−U Uᵀ``, with ``U`` both unit rows side by side, by
    :func:`sparsekern.topk_encode`. A row whose best product is no less than the square of its last candidate's mean is
    certain; others are searched again with more candidates, and then in full. Scores are those of float32, and partners
    of equal score within its rounding (2e-6) are interchangeable.

    Besides the weights it takes 0.7 GiB for W = 131,072 rows of 768 numbers each, and hardly more for more.

    Parameters
    ----------
    D : Tensor [W, d_out]
        Decoder, one row a latent. Norms do not matter. In float32, whatever its dtype, once the rows have unit norm.
    E : Tensor [W, d_in] or None
        Encoder. Without it, it is taken to be `D`, as of tied weights: scores are then squares of negative cosines.
    tau : float
        Least score of a pair, above 0 and at most 1.
    alive : Tensor [W] bool or None
        Latents to compare; by default all. Dead ones keep the directions that they started with.

    Returns
    -------
    AntipodalPairs
        On the device of `D`.

    Raises
    ------
    ValueError
        On wrong shapes, dtypes or devices, NaN or infinity, and a `tau` out of range.

    References
    ----------
    Sun et al., *Dense SAE latents are features, not bugs* (arXiv 2506.15679), for the score.
    """
    _check_tau(tau)
    latents = _Latents(D, E, alive)
    rows = latents.known.nonzero().squeeze(1)
    found = _opposites(latents, rows)
    W, device = len(latents), latents.device
    j = torch.full((W,), -1, device=device)
    score = torch.zeros(W, device=device)
    cos_dec, cos_enc = (torch.full((W,), torch.nan, device=device) for _ in range(2))
    j[rows], score[rows], cos_dec[rows], cos_enc[rows] = found.j, found.score, found.cos_dec, found.cos_enc
    return AntipodalPairs(j, cos_dec, cos_enc, score, score >= tau, latents.known, tau, found.repaired)


class _Latents:
    """Unit rows of decoder and encoder side by side, over the root of two, made as they are needed.

    The product of two such rows is the mean of the cosines of decoder and encoder. Rows of latents that are left out
    are zero, so that they oppose nothing.
    """

    def __init__(self, decoder: Tensor, encoder: Tensor | None, alive: Tensor | None = None) -> None:
        _check_weight("D", decoder)
        # Of tied weights the score is a square, and half of the work is enough.
        self.tied = encoder is None or encoder is decoder
        self.weights = [decoder.detach()]
        if encoder is not None and not self.tied:
            _check_weight("E", encoder)
            if len(encoder) != len(decoder):
                raise ValueError(f"E must have a row for each of the {len(decoder)} rows of D, got {len(encoder)}")
            if encoder.device != decoder.device:
                raise ValueError(f"E must be on the device of D, {decoder.device}, got {encoder.device}")
            self.weights.append(encoder.detach())
        self.device = decoder.device
        norms = [_norms(name, weight) for name, weight in zip("DE", self.weights, strict=False)]
        self.known = torch.stack([norm > 0 for norm in norms]).all(0)
        if alive is not None:
            if alive.shape != (len(decoder),) or alive.dtype != torch.bool:
                got = f"{tuple(alive.shape)} {alive.dtype}"
                raise ValueError(f"alive must be [{len(decoder)}] bool, one for each row of D, got {got}")
            self.known &= alive.to(self.device)
        self.scales = [
            _scale(weight, norm).masked_fill_(~self.known, 0) / len(norms) ** 0.5
            for weight, norm in zip(self.weights, norms, strict=True)
        ]
        self.split = decoder.shape[1]
        self.width = sum(weight.shape[1] for weight in self.weights)

    def __len__(self) -> int:
        return len(self.known)

    def rows(self, which: Tensor) -> Tensor:
        """The rows `which` ``[n]`` int64: ``[n, width]`` float32."""
        rows = torch.empty(len(which), self.width, device=self.device)
        for part in _parts(len(which), _CHUNK_BYTES // (4 * self.width)):
            some, left = which[part], 0
            for weight, scale in zip(self.weights, self.scales, strict=True):
                into = rows[part, left : left + weight.shape[1]]
                torch.mul(weight[some], scale[some, None], out=into)
                left += weight.shape[1]
        return rows

    def opposition(self, reversed_rows: Tensor, others: Tensor) -> Tensor:
        """Of pairs of rows ``[n, width]``, the first times −1: cosines of decoder and encoder times −1, ``[n, 2]``."""
        product = (reversed_rows * others).mul_(len(self.weights))
        if self.tied:
            return product.sum(1, keepdim=True).expand(-1, 2)
        return torch.stack([product[:, : self.split].sum(1), product[:, self.split :].sum(1)], 1)


@dataclass(frozen=True, eq=False)
class _Found:
    """Opposites of n rows: the best so far, and what an unseen one could have at most."""

    j: Tensor
    score: Tensor
    opposition: Tensor  # [n, 2]: of decoder and encoder
    bound: Tensor
    repaired: int = 0

    @classmethod
    def none(cls, n: int, device: torch.device) -> _Found:
        zeros = torch.zeros(n, device=device)
        nowhere = torch.full((n,), -1, device=device)
        return cls(nowhere, zeros, torch.full((n, 2), torch.nan, device=device), zeros.clone())

    @property
    def cos_dec(self) -> Tensor:
        return -self.opposition[:, 0]

    @property
    def cos_enc(self) -> Tensor:
        return -self.opposition[:, 1]

    def uncertain(self) -> Tensor:
        """Rows, by number, that could have a better opposite."""
        return (self.bound > self.score + _ROUNDING).nonzero().squeeze(1)

    def replace_(self, rows: Tensor, better: _Found) -> None:
        """Put what a further search found in the place of these rows."""
        self.j[rows], self.score[rows], self.bound[rows] = better.j, better.score, better.bound
        self.opposition[rows] = better.opposition


def _opposites(latents: _Latents, rows: Tensor) -> _Found:
    """The best opposites of some latents among all: certain ones."""
    found = _among_nearest(latents, rows, 1 if latents.tied else _KEPT[0])
    uncertain = found.uncertain()
    repaired = len(uncertain)
    if repaired:
        found.replace_(uncertain, _among_nearest(latents, rows[uncertain], _KEPT[1]))
        uncertain = found.uncertain()
    if len(uncertain):
        found.replace_(uncertain, _among_all(latents, rows[uncertain]))
    return _Found(found.j, found.score, found.opposition, found.bound, repaired)


def _among_nearest(latents: _Latents, rows: Tensor, kept: int) -> _Found:
    """The best opposites of some latents among the `kept` in each block whose mean cosines are most negative."""
    found = _Found.none(len(rows), latents.device)
    for columns in _parts(len(latents), _BLOCK_BYTES // (4 * latents.width)):
        block = latents.rows(torch.arange(columns.start, columns.stop, device=latents.device))
        k = min(kept, len(block))
        for part in _parts(len(rows), _BATCH_BYTES // (4 * latents.width)):
            batch = latents.rows(rows[part]).neg_()
            mean, there, _ = sk.topk_encode(batch, block, None, k)
            if k < len(block):
                found.bound[part] = torch.maximum(found.bound[part], mean[:, -1].square())
            row, slot = (mean.square() > found.score[part, None]).nonzero(as_tuple=True)
            opposition = torch.zeros(*mean.shape, 2, device=latents.device)
            for some in _parts(len(row), _CHUNK_BYTES // (4 * latents.width)):
                at = row[some], slot[some]
                opposition[at] = latents.opposition(batch[at[0]], block[there[at].long()])
            _improve(found, part, opposition, there + columns.start)
    return found


def _among_all(latents: _Latents, rows: Tensor) -> _Found:
    """The best opposites of some latents, from all their cosines."""
    found = _Found.none(len(rows), latents.device)
    for columns in _parts(len(latents), _BLOCK_BYTES // (4 * latents.width)):
        block = latents.rows(torch.arange(columns.start, columns.stop, device=latents.device))
        for part in _parts(len(rows), _CHUNK_BYTES // (8 * len(block))):
            batch = latents.rows(rows[part]).neg_()
            score = (batch[:, : latents.split] @ block[:, : latents.split].T).clamp_(min=0)
            score *= (batch[:, latents.split :] @ block[:, latents.split :].T).clamp_(min=0)
            there = score.argmax(1)
            opposition = latents.opposition(batch, block[there])
            _improve(found, part, opposition[:, None], there[:, None] + columns.start)
    return found


def _improve(found: _Found, part: slice, opposition: Tensor, there: Tensor) -> None:
    """Take the best of some candidates ``[n, k]`` for the rows `part`, where it is better than what these have."""
    scores = opposition.clamp(min=0).prod(2)
    score, slot = scores.max(1)
    better = score > found.score[part]
    slot = slot[:, None]
    found.score[part] = torch.where(better, score, found.score[part])
    found.j[part] = torch.where(better, there.gather(1, slot).squeeze(1).long(), found.j[part])
    new = opposition.gather(1, slot[..., None].expand(-1, -1, 2)).squeeze(1)
    found.opposition[part] = torch.where(better[:, None], new, found.opposition[part])


def _parts(n: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _norms(name: str, weight: Tensor) -> Tensor:
    """Norms of the rows ``[W]`` in float64, which has room for their squares; ValueError unless they are finite."""
    some = _CHUNK_BYTES // (8 * weight.shape[1])
    norms = torch.cat([weight[part].double().norm(dim=1) for part in _parts(len(weight), some)])
    if not norms.isfinite().all():
        first = int((~norms.isfinite()).nonzero()[0])
        raise ValueError(f"{name} holds NaN or infinity, first in row {first}; repair such rows or leave them out")
    return norms


def _scale(weight: Tensor, norm: Tensor) -> Tensor:
    """What gives the rows unit norm, in float32 where neither it nor the rows lose anything by that."""
    usual = bool(((norm == 0) | ((norm > 1e-30) & (norm < 1e30))).all())
    return norm.reciprocal().to(torch.float32 if usual and weight.dtype != torch.float64 else torch.float64)


def _check_weight(name: str, weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name} must be a matrix of floating-point numbers, one row a latent, got {got}")


def _check_tau(tau: float) -> None:
    if not 0 < tau <= 1:
        raise ValueError(f"tau must be above 0 and at most 1, got {tau}")


# Beside chance


@dataclass(frozen=True, eq=False)
class DenseLatents:
    """What :func:`dense_latents` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``dense_paired``.
    density : Tensor [W] float64
        Share of the tokens on which each latent is active.
    latents : Tensor [n] int64
        The dense ones among those that were measured, densest first.
    """

    results: dict[str, Result]
    density: Tensor
    latents: Tensor


@torch.no_grad()
def dense_latents(
    activity: sk.SparseCodes | sk.CSRCodes | Tensor,
    pairs: AntipodalPairs,
    above: float = 0.3,
    n_null: int = 1000,
    seed: int = 0,
) -> DenseLatents:
    """Whether the dense latents are those that come in antipodal pairs.

    ``dense_paired`` is the share of dense latents with an antipodal partner, dense or not. Null: as many random ones of
    the measured latents that are active at all.

    Parameters
    ----------
    activity : SparseCodes, CSRCodes, or Tensor [W]
        Codes of some tokens, or the densities themselves, 0 … 1.
    pairs : AntipodalPairs
        Of the same latents.
    above : float
        Density above which a latent is dense.
    n_null : int
        Samples of the null.
    seed : int
        Determines it.

    References
    ----------
    Sun et al., *Dense SAE latents are features, not bugs* (arXiv 2506.15679).
    """
    density = _density(activity, len(pairs.j)).cpu()
    if not 0 <= above < 1:
        raise ValueError(f"above must be at least 0 and below 1, got {above}")
    _check_n_null(n_null)
    measured, is_pair = pairs.measured.cpu(), pairs.is_pair.cpu().double()
    order = density.argsort(descending=True, stable=True)
    latents = order[(density[order] > above) & measured[order]]
    among = (measured & (density > 0)).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    drawn = [among[torch.randperm(len(among), generator=generator)[: len(latents)]] for _ in range(n_null)]
    result = Result(
        f"share of latents of a density above {above:g} with an antipodal partner",
        float(is_pair[latents].mean()),
        {"as many random latents": samples(float(is_pair[some].mean()) for some in drawn)},
    )
    return DenseLatents({"dense_paired": result}, density, latents)


@dataclass(frozen=True, eq=False)
class AntipodalReport:
    """What :func:`antipodal_report` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``paired`` and ``min_cosine``; with codes or densities also ``dense_paired``.
    pairs : AntipodalPairs
        Of the latents that are active, where that is known.
    min_cosines : Tensor [W] float32
        Least decoder cosine of each latent with another one, 0 where none is negative; NaN where it was not measured.
    null_min_cosines : dict of str to Tensor [n]
        The same numbers under one sample of each null, for at most 1,024 latents.
    dense : DenseLatents or None
        What :func:`dense_latents` says.
    """

    results: dict[str, Result]
    pairs: AntipodalPairs
    min_cosines: Tensor
    null_min_cosines: Mapping[str, Tensor]
    dense: DenseLatents | None

    def to_frame(self) -> Any:
        """All results as one pandas.DataFrame."""
        return frame(self.results.values())

    def to_dict(self) -> dict[str, Any]:
        """Results and pairs as plain JSON values."""
        found = self.pairs
        records = [
            {"latents": pair, "score": float(found.score[pair].max()), "cos_dec": float(found.cos_dec[pair].min())}
            for pair in found.pairs.tolist()
        ]
        return plain(
            {
                "results": [record for result in self.results.values() for record in result.to_records()],
                "tau": found.tau,
                "measured": int(found.measured.sum()),
                "pairs": records,
            }
        )

    def plot(self, axes: Any = None) -> Any:
        """Histograms of the least decoder cosines, of the latents and under the nulls; returns the axes."""
        axes = new_axes() if axes is None else axes
        bins = torch.linspace(-1, 0, 51).tolist()
        groups = {"latents": self.min_cosines[self.pairs.measured].cpu(), **self.null_min_cosines}
        for index, (name, cosines) in enumerate(groups.items()):
            weights = [1 / len(cosines)] * len(cosines)
            look = (
                {"color": "C0", "alpha": 0.5} if index == 0 else {"color": f"C{index}", "histtype": "step", "lw": 1.5}
            )
            axes.hist(cosines.clamp(min=-1).tolist(), bins, weights=weights, label=name, **look)
        axes.set(xlabel="least decoder cosine with another latent", ylabel="share of latents", xlim=(-1, 0))
        axes.legend(frameon=False)
        return axes


@torch.no_grad()
def antipodal_report(
    source: sk.SAE | Tensor,
    encoder: Tensor | None = None,
    activity: sk.SparseCodes | sk.CSRCodes | Tensor | None = None,
    *,
    tau: float = 0.8,
    above: float = 0.3,
    n_null: int = 20,
    seed: int = 0,
) -> AntipodalReport:
    """How many latents come in antipodal pairs, beside how many would by chance.

    ``paired``
        Share of latents whose score of :func:`antipodal_pairs` is at least `tau`.
    ``min_cosine``
        Mean over the latents of their least decoder cosine.
    ``dense_paired``
        See :func:`dense_latents`.

    Nulls of the first two, each for at most 1,024 latents against all:

    - *random dictionary*: as many random directions, the same for encoder and decoder;
    - *random rows with their second moment*: normal rows whose covariance, of encoder and decoder together, is the
      second moment of the true ones;
    - *signs flipped*: half of the latents, drawn at random, with both rows reversed. Latents share lines as much as
      before, but opposites and duplicates are mixed;
    - *encoder rows permuted*, of ``paired`` only: what decoder and encoder say has nothing to do with each other. A
      rotation of the encoder would be no null: it changes no cosine.

    The nulls need copies of the weights, and n_null · 1,024 rows of each compared with all.

    Parameters
    ----------
    source : SAE or Tensor [W, d_out]
        What has one row a latent in both weights, or the decoder's rows.
    encoder : Tensor [W, d_in] or None
        With a tensor as `source`, the encoder's rows; as for :func:`antipodal_pairs`.
    activity : SparseCodes, CSRCodes, Tensor [W] or None
        Codes of some tokens, or densities of the latents. Only latents that are active are then measured.
    tau, above
        Those of :func:`antipodal_pairs` and :func:`dense_latents`.
    n_null : int
        Samples of each null.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        As :func:`antipodal_pairs`; and where no latent is left to be measured.
    """
    _check_n_null(n_null)
    decoder, encoder = _weights(source, encoder)
    density = None if activity is None else _density(activity, len(decoder)).to(decoder.device)
    pairs = antipodal_pairs(decoder, encoder, tau, alive=None if density is None else density > 0)
    if not pairs.measured.any():
        raise ValueError("no latent is left to be measured: all are silent, or their rows have no direction")
    lines = pairs if encoder is None else antipodal_pairs(decoder, tau=tau, alive=pairs.measured)
    min_cosines = lines.cos_dec.nan_to_num(0).masked_fill(~pairs.measured, torch.nan)
    paired: dict[str, list[float]] = {}
    least: dict[str, list[float]] = {}
    drawn: dict[str, Tensor] = {}
    for name, null_decoder, null_encoder, rows in _nulls(decoder, encoder, pairs.measured, n_null, seed):
        latents = _Latents(null_decoder, null_encoder)
        found = _opposites(latents, rows)
        paired.setdefault(name, []).append(float((found.score >= tau).double().mean()))
        if name != _PERMUTED:
            cosines = found if latents.tied else _opposites(_Latents(null_decoder, None), rows)
            drawn[name] = cosines.cos_dec.nan_to_num(0).cpu()
            least.setdefault(name, []).append(float(drawn[name].double().mean()))
    results = {
        "paired": Result(
            f"share of latents in an antipodal pair (score of {tau:g} or more)",
            pairs.share,
            {name: samples(shares) for name, shares in paired.items()},
        ),
        "min_cosine": Result(
            "mean of the latents' least decoder cosines",
            float(min_cosines[pairs.measured].double().mean()),
            {name: samples(means) for name, means in least.items()},
            tail="less",
        ),
    }
    dense = None if density is None else dense_latents(density, pairs, above, seed=seed)
    return AntipodalReport(results | (dense.results if dense else {}), pairs, min_cosines, drawn, dense)


_PERMUTED = "encoder rows permuted"


def _nulls(
    decoder: Tensor, encoder: Tensor | None, measured: Tensor, n_null: int, seed: int
) -> Iterator[tuple[str, Tensor, Tensor | None, Tensor]]:
    """Name, decoder, encoder, and the latents to be looked at."""
    if not measured.all():
        decoder, encoder = decoder[measured], None if encoder is None else encoder[measured]
    n, d = decoder.shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(decoder.device)

    root = _root_of_second_moment(_Latents(decoder, encoder))
    for _ in range(n_null):
        rows = torch.randperm(n, generator=generator)[:_NULL_ROWS].to(decoder.device)
        yield "random dictionary", normal(n, d), None, rows
        draw = normal(n, len(root)) @ root.T
        yield "random rows with their second moment", draw[:, :d], None if encoder is None else draw[:, d:], rows
        signs = 1 - 2 * torch.randint(2, (n, 1), generator=generator).to(decoder)
        yield "signs flipped", signs * decoder, None if encoder is None else signs * encoder, rows
        if encoder is not None:
            order = torch.randperm(n, generator=generator).to(decoder.device)
            yield _PERMUTED, decoder, encoder[order], rows


def _root_of_second_moment(latents: _Latents) -> Tensor:
    """``L`` ``[width, width]`` with ``L Lᵀ`` the mean outer product of the rows."""
    moment = torch.zeros(latents.width, latents.width, dtype=torch.float64, device=latents.device)
    for part in _parts(len(latents), _BATCH_BYTES // (4 * latents.width)):
        rows = latents.rows(torch.arange(part.start, part.stop, device=latents.device))
        moment += (rows.T @ rows).double()
    moment /= len(latents)
    # Rows may lie in a subspace, or decoder and encoder be equal: the factorisation then needs a little of everything.
    return torch.linalg.cholesky(moment + 1e-5 / latents.width * torch.eye(latents.width).to(moment)).float()


def _weights(source: sk.SAE | Tensor, encoder: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Decoder and encoder; no encoder where it is the decoder."""
    if isinstance(source, sk.SAE):
        if encoder is not None:
            raise ValueError("encoder must be left out where source is an SAE, which has one")
        decoder, encoder = source.W_dec.detach(), None if source.tied else source.W_enc.detach()
    else:
        decoder = source
    return decoder, None if encoder is decoder else encoder


def _density(activity: sk.SparseCodes | sk.CSRCodes | Tensor, W: int) -> Tensor:
    """Densities ``[W]`` float64 of codes, or those that were given."""
    if isinstance(activity, sk.SparseCodes | sk.CSRCodes):
        if activity.d_sae != W:
            raise ValueError(f"activity must be codes of {W} latents, got codes of {activity.d_sae}")
        return activity.firing_counts().double() / activity.tokens
    if not isinstance(activity, Tensor) or activity.shape != (W,) or not activity.is_floating_point():
        got = f"{tuple(activity.shape)} {activity.dtype}" if isinstance(activity, Tensor) else type(activity).__name__
        raise ValueError(f"activity must be codes, or a density for each of {W} latents, got {got}")
    density = activity.detach().double()
    if not ((density >= 0) & (density <= 1)).all():
        raise ValueError("activity must hold densities of 0 … 1, the shares of tokens on which latents are active")
    return density


def _check_n_null(n_null: int) -> None:
    if n_null < 1:
        raise ValueError(f"n_null must be at least 1, got {n_null}")


# Experiments


class DenseDirection:
    """Sparse features and one direction that every token has some of, of either sign.

    ``x = Σ_f a_f F_f + z u`` with ``z`` standard normal. A latent that is never negative writes half of u, so it takes
    two that oppose each other.

    Parameters
    ----------
    d : int
        Width of the activations.
    sparse : int
        Sparse features: random directions, with strengths uniform in 0.5 … 1.5 where they are active.
    active : float
        How many of them a token has, on average; each is active independently of the others.
    generator : torch.Generator or None
        For the directions.

    Attributes
    ----------
    features : Tensor [sparse + 1, d]
        True directions, of unit norm; the last is u.
    """

    def __init__(
        self, d: int = 32, sparse: int = 48, active: float = 3, generator: torch.Generator | None = None
    ) -> None:
        if d < 1 or sparse < 1:
            raise ValueError(f"d and sparse must be at least 1, got {d} and {sparse}")
        if not 0 <= active <= sparse:
            raise ValueError(f"active must be in 0 … sparse={sparse}, got {active}")
        self.d, self.active = d, active
        self.features = normalize(torch.randn(sparse + 1, d, generator=generator), dim=1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: ``(activations [n, sparse + 1], x [n, d])``; the last activation has both signs."""
        sparse = len(self.features) - 1
        on = torch.rand(n, sparse, generator=generator) < self.active / sparse
        strength = 0.5 + torch.rand(n, sparse, generator=generator)
        activations = torch.cat([on * strength, torch.randn(n, 1, generator=generator)], 1)
        return activations, activations @ self.features


@dataclass(frozen=True, eq=False)
class DenseDirectionRun:
    """What :func:`dense_direction` returns, measured on 8,192 fresh tokens.

    Attributes
    ----------
    results : dict of str to Result
        Those of the report, ``dense_score``, ``sparse_score`` and ``along``.
    sae : SAE
        In evaluation mode.
    toy : DenseDirection
        What made the data.
    report : AntipodalReport
        Of the active latents.
    cosines : Tensor [d_sae]
        Of the decoder's rows with u.
    fvu, l0 : float
    """

    results: dict[str, Result]
    sae: sk.SAE
    toy: DenseDirection
    report: AntipodalReport
    cosines: Tensor
    fvu: float
    l0: float

    @property
    def dense(self) -> Tensor:
        """The dense latents, densest first."""
        assert self.report.dense is not None
        return self.report.dense.latents


def dense_direction(
    seed: int = 0,
    *,
    activation: Activation | None = None,
    d_sae: int = 64,
    steps: int = 400,
    lr: float = 1e-2,
    batch_size: int = 512,
    n_null: int = 100,
) -> DenseDirectionRun:
    """Train an SAE on :class:`DenseDirection`: does it take an antipodal pair for the dense direction, and only there?

    Beside :func:`antipodal_report`, over the active latents:

    ``dense_score``, ``sparse_score``
        The largest score among the dense latents and among the others.
    ``along``
        The largest cosine, by size, of a dense latent's decoder row with u.

    Null of all three: random dictionaries of as many rows, the first of which stand for the dense ones.

    Parameters
    ----------
    seed : int
        Determines directions, weights, tokens and nulls.
    activation : Activation or None
        By default ``TopK(5)``. With ``AbsTopK(5)``, whose latents have both signs, one latent does.
    d_sae : int
        Latents.
    steps, lr, batch_size
        Of the training.
    n_null : int
        Samples of each null.

    References
    ----------
    Sun et al., *Dense SAE latents are features, not bugs* (arXiv 2506.15679); Zhu et al., *AbsTopK* (arXiv 2510.00404).
    """
    generator = torch.Generator().manual_seed(seed)
    toy = DenseDirection(generator=generator)
    sae = sk.SAE(toy.d, d_sae, activation or sk.TopK(5), generator=generator)
    _train(sae, lambda n: toy.sample(n, generator)[1], steps, lr, batch_size)
    x = toy.sample(_MEASURED, generator)[1]
    with torch.no_grad():
        codes = sae.encode(x)
    report = antipodal_report(sae, activity=codes, n_null=n_null, seed=seed)
    assert report.dense is not None
    cosines = normalize(sae.W_dec.detach(), dim=1) @ toy.features[-1]
    dense = torch.zeros(d_sae, dtype=torch.bool)
    dense[report.dense.latents] = True
    measured = report.pairs.measured

    def three(score: Tensor, along: Tensor, is_dense: Tensor) -> tuple[float, float, float]:
        return _largest(score[is_dense]), _largest(score[~is_dense]), _largest(along[is_dense].abs())

    random = []
    first = torch.arange(int(measured.sum())) < len(report.dense.latents)
    for _ in range(n_null):
        rows = torch.randn(len(first), toy.d, generator=generator)
        random.append(three(antipodal_pairs(rows).score, normalize(rows, dim=1) @ toy.features[-1], first))
    found = three(report.pairs.score[measured], cosines[measured], dense[measured])
    names = {
        "dense_score": "largest score of a dense latent",
        "sparse_score": "largest score of another latent",
        "along": "cosine of a dense latent's decoder row with the dense direction, without its sign",
    }
    results = dict(report.results)
    for index, (key, name) in enumerate(names.items()):
        null = {"random dictionary": samples(numbers[index] for numbers in random)}
        results[key] = Result(name, found[index], null)
    measures = sk.evaluate(sae, [x])
    return DenseDirectionRun(results, sae, toy, report, cosines, measures.fvu, measures.l0)


@dataclass(frozen=True, eq=False)
class CloudPoint:
    """One training of :func:`gaussian_cloud`.

    Attributes
    ----------
    name : str
        Activation and its coefficient or k.
    result : Result
        Share of the active latents whose least decoder cosine is below the bound, beside random dictionaries of as many
        rows.
    min_cosines : Tensor [alive]
        Least decoder cosine of each active latent with another one.
    fvu, l0 : float
    """

    name: str
    result: Result
    min_cosines: Tensor
    fvu: float
    l0: float

    @property
    def alive(self) -> int:
        """Active latents."""
        return len(self.min_cosines)


@dataclass(frozen=True, eq=False)
class GaussianCloud:
    """What :func:`gaussian_cloud` returns: a point for each coefficient, in their order, and one for each k."""

    points: list[CloudPoint]

    @property
    def results(self) -> dict[str, Result]:
        """The result of each point, by its name."""
        return {point.name: point.result for point in self.points}

    def to_frame(self) -> Any:
        """All points as one pandas.DataFrame, a row a null."""
        table = frame(self.results.values())
        for key in ("name", "alive", "fvu", "l0"):
            table[key] = [getattr(point, key) for point in self.points for _ in point.result.nulls]
        return table

    def plot(self, axes: Any = None) -> Any:
        """Shares of all points over their L0, with the range of random dictionaries; returns the axes."""
        axes = new_axes() if axes is None else axes
        for point in self.points:
            null = point.result.nulls["random dictionary"]
            axes.plot([point.l0] * 2, [float(null.min()), float(null.max())], color="0.6", lw=4, solid_capstyle="butt")
            axes.plot(point.l0, point.result.value, "o", color="C0")
            axes.annotate(point.name, (point.l0, point.result.value), xytext=(4, 4), textcoords="offset points")
        axes.set(xlabel="L0", ylabel="share of latents with an opposite", ylim=(-0.03, 1.1))
        return axes


def gaussian_cloud(
    seed: int = 0,
    *,
    d: int = 8,
    d_sae: int | None = None,
    p: float = 1.0,
    coefficients: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
    ks: Sequence[int] = (),
    below: float = -0.9,
    steps: int = 800,
    lr: float = 1e-2,
    batch_size: int = 512,
    n_null: int = 100,
) -> GaussianCloud:
    """Train SAEs on a cloud without any direction, x ~ N(0, I): does sparsity alone make opposites?

    A linear code of the cloud needs two opposite latents of each of d orthogonal lines. Whether an overcomplete
    dictionary falls back to that depends on what is charged for codes, so one coefficient tells nothing.

    Parameters
    ----------
    seed : int
        Determines weights, tokens and nulls, the same for all points.
    d : int
        Dimensions of the cloud.
    d_sae : int or None
        Latents; by default ``4 * d``.
    p : float
        Power of the penalty of :class:`sparsekern.ReLU`, which is of codes in units of the cloud's length √d and stands
        beside an FVU. A coefficient λ of ``Σ z^p`` beside a squared error is ``λ · d^(p/2 − 1)`` here.
    coefficients : sequence of float
        Of the penalty: a training for each.
    ks : sequence of int
        A training with ``TopK(k)`` for each.
    below : float
        Cosine below which two latents count as opposite.
    steps, lr, batch_size
        Of each training.
    n_null : int
        Random dictionaries for each point.

    Raises
    ------
    ValueError
        Without a coefficient or k, and for sizes or a bound out of range.
    """
    if d < 2:
        raise ValueError(f"d must be at least 2, got {d}")
    if not -1 < below < 0:
        raise ValueError(f"below must be above −1 and below 0, got {below}")
    if not len(coefficients) and not len(ks):
        raise ValueError("coefficients or ks must have at least one number, to train with")
    _check_n_null(n_null)
    width = 4 * d if d_sae is None else d_sae
    kinds: dict[str, Activation] = {
        f"L{p:g}, {coefficient:g}": sk.ReLU(coefficient, p=p, start_l0=min(d, width)) for coefficient in coefficients
    }
    kinds |= {f"TopK, {k}": sk.TopK(k) for k in ks}
    train = {"steps": steps, "lr": lr, "batch_size": batch_size}
    points = [
        _cloud_point(name, activation, seed, (d, width), below, n_null, **train) for name, activation in kinds.items()
    ]
    return GaussianCloud(points)


def _cloud_point(
    name: str, activation: Activation, seed: int, shape: tuple[int, int], below: float, n_null: int, **train: Any
) -> CloudPoint:
    generator = torch.Generator().manual_seed(seed)
    sae = sk.SAE(*shape, activation, generator=generator)
    _train(sae, lambda n: torch.randn(n, sae.d_in, generator=generator), **train)
    x = torch.randn(_MEASURED, sae.d_in, generator=generator)
    with torch.no_grad():
        alive = sae.encode(x).firing_counts() > 0
    least = _least_cosines(sae.W_dec.detach()[alive])
    random = [_least_cosines(torch.randn(len(least), sae.d_in, generator=generator)) for _ in range(n_null)]
    result = Result(
        f"share of active latents with another at a cosine below {below:g}",
        float((least < below).double().mean()),
        {"random dictionary": samples(float((cosines < below).double().mean()) for cosines in random)},
    )
    measures = sk.evaluate(sae, [x])
    return CloudPoint(name, result, least, measures.fvu, measures.l0)


def _least_cosines(rows: Tensor) -> Tensor:
    """Least cosine of each row with another one, 0 where none is negative."""
    return antipodal_pairs(rows).cos_dec.nan_to_num(0) if len(rows) else torch.empty(0)


def _largest(numbers: Tensor) -> float:
    return float(numbers.max()) if len(numbers) else float("nan")


def _train(sae: sk.SAE, draw: Callable[[int], Tensor], steps: int, lr: float, batch_size: int) -> None:
    trainer = sk.Trainer(sae, lr=lr, steps=steps)
    for _ in range(steps):
        trainer.step(draw(batch_size))
    sae.eval()

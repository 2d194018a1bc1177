"""How many latents come in antipodal pairs, and whether the dense ones do, beside what chance gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.opposing.pairs import (
    BATCH_BYTES,
    AntipodalPairs,
    Latents,
    antipodal_pairs,
    check_tau,
    opposites,
    parts,
)
from sparsekern.analysis.results import Result, Results, new_axes, plain, samples

_NULL_ROWS = 1024  # random latents whose opposites are looked for among all of a null
_FLIPPED, _PERMUTED = "signs flipped", "encoder rows permuted"


@dataclass(frozen=True, eq=False)
class DenseLatents(Results):
    """What :func:`dense_latents` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``dense_paired`` and ``dense_mean``.
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
    *,
    densest: int | None = None,
) -> DenseLatents:
    """Whether the dense latents are those that come in antipodal pairs.

    ``dense_paired``
        Share of dense latents with an antipodal partner, dense or not.
    ``dense_mean``
        Mean score of the dense latents, which needs no threshold of a pair.

    Null of both: as many random ones of the measured latents that are active at all.

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
    densest : int or None
        Take so many of the densest active latents, in place of those above a density.

    References
    ----------
    Sun et al., *Dense SAE latents are features, not bugs* (arXiv 2506.15679).
    """
    density = _density(activity, len(pairs.j)).cpu()
    if not 0 <= above < 1:
        raise ValueError(f"above must be at least 0 and below 1, got {above}")
    if densest is not None and densest < 1:
        raise ValueError(f"densest must be at least 1, got {densest}")
    check_n_null(n_null)
    measured, is_pair, score = pairs.measured.cpu(), pairs.is_pair.cpu().double(), pairs.score.cpu().double()
    order = density.argsort(descending=True, stable=True)
    latents = order[(density[order] > (above if densest is None else 0)) & measured[order]][:densest]
    among = (measured & (density > 0)).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    drawn = [among[torch.randperm(len(among), generator=generator)[: len(latents)]] for _ in range(n_null)]
    dense = f"latents of a density above {above:g}" if densest is None else f"the {len(latents)} densest latents"
    results = {
        key: Result(
            f"{what} {dense}{which}",
            float(numbers[latents].mean()),
            {"as many random latents": samples(float(numbers[some].mean()) for some in drawn)},
        )
        for key, what, which, numbers in (
            ("dense_paired", "share of", " with an antipodal partner", is_pair),
            ("dense_mean", "mean score of", "", score),
        )
    }
    return DenseLatents(results, density, latents)


@dataclass(frozen=True, eq=False)
class AntipodalReport(Results):
    """What :func:`antipodal_report` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``paired`` and ``min_cosine``; with codes or densities also ``dense_paired`` and ``dense_mean``.
    pairs : AntipodalPairs
        Of the latents that are active, where that is known.
    min_cosines : Tensor [W] float32
        Least decoder cosine of each latent with another one, 0 where none is negative; NaN where it was not measured.
    null_min_cosines : dict of str to Tensor [n]
        The same numbers under one sample of each null, for at most 1,024 latents.
    null_scores : dict of str to Tensor [n_null, n]
        Scores of these latents under each sample of each null.
    dense : DenseLatents or None
        What :func:`dense_latents` says.
    """

    results: dict[str, Result]
    pairs: AntipodalPairs
    min_cosines: Tensor
    null_min_cosines: Mapping[str, Tensor]
    null_scores: Mapping[str, Tensor]
    dense: DenseLatents | None

    def share(self, tau: float) -> Result:
        """``paired`` with another threshold: the share of latents of a score of `tau` or more, beside all nulls."""
        check_tau(tau)
        return _paired(self.pairs, self.null_scores, tau)

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
    densest: int | None = None,
) -> AntipodalReport:
    """How many latents come in antipodal pairs, beside how many would by chance.

    ``paired``
        Share of latents whose score of :func:`antipodal_pairs` is at least `tau`.
    ``min_cosine``
        Mean over the latents of their least decoder cosine.
    ``dense_paired``, ``dense_mean``
        See :func:`dense_latents`. The second also stands beside *signs flipped*.

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
    tau, above, densest
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
    check_n_null(n_null)
    decoder, encoder = _weights(source, encoder)
    density = None if activity is None else _density(activity, len(decoder)).to(decoder.device)
    pairs = antipodal_pairs(decoder, encoder, tau, alive=None if density is None else density > 0)
    if not pairs.measured.any():
        raise ValueError("no latent is left to be measured: all are silent, or their rows have no direction")
    lines = pairs if encoder is None else antipodal_pairs(decoder, tau=tau, alive=pairs.measured)
    min_cosines = lines.cos_dec.nan_to_num(0).masked_fill(~pairs.measured, torch.nan)
    dense = None if density is None else dense_latents(density, pairs, above, seed=seed, densest=densest)
    places = pairs.measured.cumsum(0) - 1  # of a measured latent among those that the nulls have
    scores: dict[str, list[Tensor]] = {}
    flipped = []
    least: dict[str, list[float]] = {}
    drawn: dict[str, Tensor] = {}
    for name, null_decoder, null_encoder, rows in _nulls(decoder, encoder, pairs.measured, n_null, seed):
        latents = Latents(null_decoder, null_encoder)
        found = opposites(latents, rows)
        scores.setdefault(name, []).append(found.score.cpu())
        if name != _PERMUTED:
            cosines = found if latents.tied else opposites(Latents(null_decoder, None), rows)
            drawn[name] = cosines.cos_dec.nan_to_num(0).cpu()
            least.setdefault(name, []).append(float(drawn[name].double().mean()))
        if name == _FLIPPED and dense is not None:
            among = places[dense.latents.to(places.device)]
            flipped.append(float(opposites(latents, among).score.double().mean()) if len(among) else float("nan"))
    null_scores = {name: torch.stack(some) for name, some in scores.items()}
    results = {
        "paired": _paired(pairs, null_scores, tau),
        "min_cosine": Result(
            "mean of the latents' least decoder cosines",
            float(min_cosines[pairs.measured].double().mean()),
            {name: samples(means) for name, means in least.items()},
            tail="less",
        ),
    }
    if dense is not None:
        results |= dense.results
        mean = dense.results["dense_mean"]
        results["dense_mean"] = replace(mean, nulls={**mean.nulls, _FLIPPED: samples(flipped)})
    return AntipodalReport(results, pairs, min_cosines, drawn, null_scores, dense)


def _paired(pairs: AntipodalPairs, null_scores: Mapping[str, Tensor], tau: float) -> Result:
    return Result(
        f"share of latents in an antipodal pair (score of {tau:g} or more)",
        float((pairs.score[pairs.measured] >= tau).double().mean()),
        {name: (scores >= tau).double().mean(1) for name, scores in null_scores.items()},
    )


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

    root = _root_of_second_moment(Latents(decoder, encoder))
    for _ in range(n_null):
        rows = torch.randperm(n, generator=generator)[:_NULL_ROWS].to(decoder.device)
        yield "random dictionary", normal(n, d), None, rows
        draw = normal(n, len(root)) @ root.T
        yield "random rows with their second moment", draw[:, :d], None if encoder is None else draw[:, d:], rows
        signs = 1 - 2 * torch.randint(2, (n, 1), generator=generator).to(decoder)
        yield _FLIPPED, signs * decoder, None if encoder is None else signs * encoder, rows
        if encoder is not None:
            order = torch.randperm(n, generator=generator).to(decoder.device)
            yield _PERMUTED, decoder, encoder[order], rows


def _root_of_second_moment(latents: Latents) -> Tensor:
    """``L`` ``[width, width]`` with ``L Lᵀ`` the mean outer product of the rows."""
    moment = torch.zeros(latents.width, latents.width, dtype=torch.float64, device=latents.device)
    for part in parts(len(latents), BATCH_BYTES // (4 * latents.width)):
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


def check_n_null(n_null: int) -> None:
    """ValueError unless there is to be a sample of each null."""
    if n_null < 1:
        raise ValueError(f"n_null must be at least 1, got {n_null}")

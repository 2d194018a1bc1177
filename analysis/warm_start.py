"""Latents that two seeds agree on, and what starting another SAE from them saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.canonical import Matching, match
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples
from sparsekern.analysis.toy import Toy, ZipfFeatures
from sparsekern.progress import Progress

_MEASURED = 8192  # fresh tokens that an experiment ends with
_CURVE = 4096  # fresh tokens of a point on a curve
_RECOVERED = 0.9  # cosine at which a decoder row is a true feature

# Rows to start from


@dataclass(frozen=True, eq=False)
class CanonicalRows:
    """Latents to start an SAE from.

    Attributes
    ----------
    encoder, decoder : Tensor [n, d_in], [n, d_out]
    bias : Tensor [n]
        Of the encoder, for activations less `center`.
    center : Tensor [d_in]
        What the encoder's input is taken less.
    thresholds : Tensor [n] or None
        Those of a ``JumpReLU``, in units of the activations.
    """

    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    center: Tensor
    thresholds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.encoder)

    @classmethod
    def of(cls, sae: sk.SAE, latents: Tensor) -> CanonicalRows:
        """The rows of some latents of `sae`: their indices, or a mask ``[d_sae]`` such as ``matching.shared``.

        Raises
        ------
        ValueError
            For weights that are shared, or not one row a latent, and for an activation with weights that are not
            thresholds.
        """
        _check_rows("sae", sae)
        if latents.dtype == torch.bool and latents.shape != (sae.d_sae,):
            raise ValueError(f"latents must be indices, or a mask [{sae.d_sae}], got a mask {tuple(latents.shape)}")
        chosen = torch.arange(sae.d_sae)[latents.cpu()].to(sae.device)
        center, act = sae.center(), sae.activation
        return cls(
            sae.W_enc.detach()[chosen],
            sae.W_dec.detach()[chosen],
            sae.b_enc.detach()[chosen],
            torch.zeros_like(sae.W_enc[0]) if center is None else center.detach().clone(),
            act.threshold.detach()[chosen] if isinstance(act, sk.JumpReLU) else None,
        )

    def permuted(self, generator: torch.Generator | None = None) -> CanonicalRows:
        """The same latents with the coordinates of all rows in another order: a control that knows nothing of the data.

        Norms, biases and the angles among encoder rows, and among decoder rows, are kept.
        """
        order = torch.randperm(self.encoder.shape[1], generator=generator).to(self.encoder.device)
        same = self.decoder.shape[1] == len(order)
        other = order if same else torch.randperm(self.decoder.shape[1], generator=generator).to(order.device)
        return CanonicalRows(self.encoder[:, order], self.decoder[:, other], self.bias, self.center, self.thresholds)


@torch.no_grad()
def warm_start(
    sae: sk.SAE,
    canonical: CanonicalRows,
    share: float = 1.0,
    *,
    into: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Copy known latents into an SAE, before its training; the rest of it stays as it is.

    Encoder and decoder rows and thresholds are copied. The bias is the known one, corrected where this SAE subtracts
    something else from its input, so that a copied latent has the pre-activations that it had. Fit the SAE's start to
    data first (:meth:`sparsekern.SAE.fit_start_`): the trainer does so only where no bias was set, and then scales the
    copied rows too.

    Parameters
    ----------
    sae : SAE
        Changed in place.
    canonical : CanonicalRows
        Latents of an SAE on the same activations, or on ones of the same space.
    share : float
        Which part of `canonical` is copied, at random.
    into : Tensor [n] of ints, or None
        Latents to overwrite, at least as many as are copied; the first ones by default.
    generator : torch.Generator or None
        For the random part.

    Returns
    -------
    Tensor [n] int64
        The latents that were overwritten.

    Raises
    ------
    ValueError
        For rows of another width, more of them than latents to overwrite, an SAE whose weights are tied, or that has
        thresholds where `canonical` has none or the other way round; for a share outside 0 … 1.

    References
    ----------
    Ghilardi et al., *Accelerating sparse autoencoder training via layer-wise transfer learning in large language
    models* (BlackboxNLP 2024), for starting from another layer's SAE.
    """
    _check_rows("sae", sae)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in 0 … 1, got {share}")
    widths, wanted = (canonical.encoder.shape[1], canonical.decoder.shape[1]), (sae.d_in, sae.W_dec.shape[1])
    if widths != wanted:
        raise ValueError(f"canonical must have encoder and decoder rows of widths {wanted}, got {widths}")
    act = sae.activation
    if isinstance(act, sk.JumpReLU) != (canonical.thresholds is not None):
        raise ValueError("canonical must have thresholds where sae has them, and only there")
    n = round(share * len(canonical))
    places = torch.arange(sae.d_sae) if into is None else into.cpu().long()
    if len(places.unique()) < len(places) or not ((places >= 0) & (places < sae.d_sae)).all():
        raise ValueError(f"into must name latents in [0, {sae.d_sae}), none twice, got {places.tolist()}")
    if n > len(places):
        raise ValueError(f"canonical must have at most as many latents as are overwritten, {len(places)}, got {n}")
    chosen = torch.randperm(len(canonical), generator=generator)[:n].sort().values.to(canonical.encoder.device)
    places = places[:n].to(sae.device)
    encoder = canonical.encoder[chosen].to(sae.W_enc)
    center = sae.center()
    moved = -canonical.center.to(encoder) if center is None else center - canonical.center.to(encoder)
    sae.W_enc[places] = encoder
    sae.W_dec[places] = canonical.decoder[chosen].to(sae.W_dec)
    sae.b_enc[places] = canonical.bias[chosen].to(sae.b_enc) + encoder @ moved
    if isinstance(act, sk.JumpReLU) and canonical.thresholds is not None:
        act.relative_threshold[places] = canonical.thresholds[chosen].to(act.relative_threshold) / act.length
    sae.tokens_since_fired[places] = 0
    return places


def _check_rows(name: str, sae: sk.SAE) -> None:
    if sae.tied or sae.W_enc.dim() != 2 or sae.W_dec.dim() != 2:
        raise ValueError(f"{name} must have an encoder and a decoder row of its own for each latent, not tied ones")
    others = sorted(dict(sae.activation.named_parameters()).keys() - {"relative_threshold"})
    if others:
        raise ValueError(f"{name} must have an activation without weights other than thresholds, got {others}")


# Experiments


@dataclass(frozen=True, eq=False)
class SeedPair(Results):
    """What :func:`seeds` returns.

    Attributes
    ----------
    saes : tuple of two SAE
        In evaluation mode.
    toy : Toy
        What made the data of both.
    matching : Matching
        Their alive latents, by decoder and encoder.
    recovered : Tensor [2]
        Share of the true features at a cosine above 0.9 with an alive decoder row of each.
    fvu : Tensor [2]
    results : dict of str to Result
        Those of the matching; ``decoder_shared``: share of alive latents that are shared by decoder rows alone;
        ``recovered``: mean of the two.
    """

    saes: tuple[sk.SAE, sk.SAE]
    toy: Toy
    matching: Matching
    recovered: Tensor
    fvu: Tensor
    results: dict[str, Result]


def seeds(
    seed: int = 0,
    *,
    width: int = 256,
    toy: Toy | None = None,
    k: int = 6,
    steps: int = 500,
    lr: float = 3e-3,
    batch_size: int = 256,
    n_null: int = 10,
    **options: Any,
) -> SeedPair:
    """Train two SAEs that differ in their starting weights and in their tokens: what do both find, and is it true?

    Parameters
    ----------
    seed : int
        Determines directions, weights, tokens and nulls.
    width : int
        Latents of each.
    toy : Toy or None
        By default 256 features of Zipf's frequencies in 64 dimensions, about six a token.
    k : int
        Latents a token, of TopK.
    steps, lr, batch_size
        Of the training.
    n_null : int
        Samples of each null; that of ``recovered`` is a random dictionary of as many rows as are alive.
    **options
        Those of the SAEs: ``dead_after`` …

    References
    ----------
    Paulo and Belrose, *Sparse autoencoders trained on the same data learn different features* (arXiv 2501.16615).
    """
    generator = torch.Generator().manual_seed(seed)
    toy = ZipfFeatures(generator=generator) if toy is None else toy
    saes = []
    for _ in range(2):
        sae = sk.SAE(toy.d, width, sk.TopK(k), generator=generator, **options)
        trainer = sk.Trainer(sae, lr=lr, steps=steps)
        for _ in range(steps):
            trainer.step(toy.sample(batch_size, generator)[1])
        saes.append(sae.eval())
    x = toy.sample(_MEASURED, generator)[1]
    found = [sk.evaluate(sae, [x], compared=1) for sae in saes]
    alive = [measures.density > 0 for measures in found]
    decoders, encoders = [sae.W_dec for sae in saes], [sae.W_enc for sae in saes]
    matching = match(*decoders, *encoders, alive1=alive[0], alive2=alive[1], n_null=n_null, seed=seed)
    by_decoder = match(*decoders, alive1=alive[0], alive2=alive[1], n_null=n_null, seed=seed)
    recovered = torch.stack([_recovered(W.detach()[a], toy.features) for W, a in zip(decoders, alive, strict=True)])
    counts = [int(a.sum()) for a in alive]
    by_chance = null_generator(seed)
    random = (
        torch.stack([_recovered(torch.randn(n, toy.d, generator=by_chance), toy.features) for n in counts])
        for _ in range(n_null)
    )
    results = {
        **matching.results,
        "decoder_shared": by_decoder.results["shared"],
        "recovered": Result(
            f"share of true features with a decoder row at a cosine above {_RECOVERED}",
            float(recovered.mean()),
            {"random dictionary": samples(float(share.mean()) for share in random)},
        ),
    }
    fvu = torch.tensor([measures.fvu for measures in found])
    return SeedPair((saes[0], saes[1]), toy, matching, recovered, fvu, results)


@dataclass(frozen=True, eq=False)
class Saving(Results):
    """What :func:`compare_starts` and :func:`warm_start_saving` return.

    Attributes
    ----------
    tokens : Tensor [m] int64
        Tokens of training at which the FVU was measured.
    fvu : dict of str to Tensor [m]
        Held-out FVU of each start there: ``cold``, ``half``, ``full``, and ``permuted 0`` and so on.
    copied : int
        Latents that the full start copies.
    results : dict of str to Result
        ``early`` and ``late``: explained variance (1 − FVU) of the full start, early and at the end; ``saving``: share
        of the cold run's tokens that it saves to reach the cold run's last FVU, 0 where it needs as many or never does.
    """

    tokens: Tensor
    fvu: dict[str, Tensor]
    copied: int
    results: dict[str, Result]

    def plot(self, axes: Any = None) -> Any:
        """FVU over tokens of training, a line for each start; returns the axes."""
        axes = new_axes() if axes is None else axes
        from matplotlib.ticker import EngFormatter

        looks = {"cold": "C3", "half": "C1", "full": "C0"}
        for name, curve in self.fvu.items():
            label = name if name in looks else "coordinates permuted" if name.endswith(" 0") else None
            axes.plot(self.tokens.tolist(), curve.tolist(), color=looks.get(name, "0.6"), label=label)
        axes.set(xlabel="tokens of training", ylabel="FVU on fresh tokens", yscale="log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(frameon=False)
        return axes


def warm_start_saving(
    seed: int = 0,
    *,
    width: int = 256,
    toy: Toy | None = None,
    k: int = 6,
    steps: int = 1000,
    early: int = 200,
    every: int = 10,
    lr: float = 3e-3,
    batch_size: int = 256,
    n_null: int = 2,
    **options: Any,
) -> Saving:
    """How many tokens of training it saves to start from latents that two earlier SAEs have in common.

    Two SAEs are trained (:func:`seeds`); the latents of the first that are shared are the known ones, from which
    :func:`compare_starts` starts others. What the first two cost is not counted.

    Parameters
    ----------
    seed : int
        Determines everything.
    width, toy, k, lr, batch_size, **options
        Those of :func:`seeds`, for all SAEs.
    steps : int
        Of every training.
    early : int
        Step of the early comparison; a multiple of `every`, as is `steps`.
    every : int
        Steps between two measurements.
    n_null : int
        Permutations; each costs a training.

    Raises
    ------
    ValueError
        Where the two SAEs share no latent, and for steps that are no multiples of `every`.
    """
    _check_steps(steps, early, every)
    pair = seeds(seed, width=width, toy=toy, k=k, steps=steps, lr=lr, batch_size=batch_size, n_null=0, **options)
    if not pair.matching.shared.any():
        raise ValueError("the two SAEs must share latents to start from, got none: train them for more steps")
    known = CanonicalRows.of(pair.saes[0], pair.matching.shared)
    held_out = pair.toy.sample(_CURVE, torch.Generator().manual_seed(seed + 1))[1]

    def make() -> sk.SAE:
        weights = torch.Generator().manual_seed(seed + 2)
        return sk.SAE(pair.toy.d, width, sk.TopK(k), generator=weights, **options)

    def batches() -> Iterator[Tensor]:
        tokens = torch.Generator().manual_seed(seed + 3)
        return (pair.toy.sample(batch_size, tokens)[1] for _ in range(steps))

    return compare_starts(
        make, known, batches, held_out, steps=steps, early=early, every=every, lr=lr, n_null=n_null, seed=seed
    )


def compare_starts(
    make: Callable[[], sk.SAE],
    known: CanonicalRows,
    batches: Callable[[], Iterator[Tensor]],
    held_out: Tensor,
    *,
    steps: int,
    early: int,
    every: int = 10,
    lr: float = 1e-3,
    n_null: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> Saving:
    """How many tokens of training it saves to start an SAE from known latents.

    SAEs with one other starting point are trained on the same tokens, at a constant learning rate after its warm-up:
    cold, with half and with all of the known latents copied, and with all of them after their coordinates were
    permuted, the null. What it cost to know the latents is not counted.

    Parameters
    ----------
    make : callable
        Makes an SAE with the same weights each time.
    known : CanonicalRows
        What is copied.
    batches : callable
        Begins anew with the same tokens each time: at least `steps` tensors ``[B, d_in]`` of one size.
    held_out : Tensor [n, d_in]
        Tokens to measure on.
    steps : int
        Of every training.
    early : int
        Step of the early comparison; a multiple of `every`, as is `steps`.
    every : int
        Steps between two measurements.
    lr : float
        Learning rate.
    n_null : int
        Permutations; each costs a training.
    seed : int
        Determines which half is copied, and the null.
    progress : bool
        Show progress.

    Raises
    ------
    ValueError
        For steps that are no multiples of `every`, and as :func:`warm_start`.

    References
    ----------
    Ghilardi et al., *Accelerating sparse autoencoder training via layer-wise transfer learning in large language
    models* (BlackboxNLP 2024), for starting from another layer's SAE.
    """
    _check_steps(steps, early, every)
    generator = null_generator(seed)
    starts: dict[str, tuple[CanonicalRows, float]] = {"cold": (known, 0.0), "half": (known, 0.5), "full": (known, 1.0)}
    starts |= {f"permuted {index}": (known.permuted(generator), 1.0) for index in range(n_null)}
    fvu: dict[str, Tensor] = {}
    with Progress("starts", len(starts), unit="trainings", shown=progress) as bar:
        for name, (rows, share) in starts.items():
            half = torch.Generator().manual_seed(seed)
            curve = _curve(make(), islice(batches(), steps), rows, share, half, held_out, every, steps, lr)
            fvu[name] = torch.tensor(list(curve))
            bar.update(len(fvu))
    size = len(next(batches()))
    tokens = size * every * torch.arange(1, steps // every + 1)
    goal = float(fvu["cold"][-1])

    def saved(curve: Tensor) -> float:
        reached = (curve <= goal).nonzero()
        return 1 - float(tokens[reached[0, 0]] / tokens[-1]) if len(reached) else 0.0

    def beside(name: str, number: Any) -> Result:
        nulls = {"coordinates permuted": samples(number(fvu[f"permuted {index}"]) for index in range(n_null))}
        controls = {"cold": samples([number(fvu["cold"])]), "half of the latents": samples([number(fvu["half"])])}
        return Result(name, number(fvu["full"]), nulls, controls)

    results = {
        "early": beside(f"explained variance after {early} steps", lambda curve: 1 - float(curve[early // every - 1])),
        "late": beside(f"explained variance after {steps} steps", lambda curve: 1 - float(curve[-1])),
        "saving": beside("share of the cold start's tokens saved", saved),
    }
    return Saving(tokens, fvu, len(known), results)


def _check_steps(steps: int, early: int, every: int) -> None:
    if not 1 <= every <= early <= steps or early % every or steps % every:
        raise ValueError(f"early and steps must be multiples of every={every}, not falling, got {early} and {steps}")


def _curve(
    sae: sk.SAE,
    batches: Iterator[Tensor],
    rows: CanonicalRows,
    share: float,
    generator: torch.Generator,
    held_out: Tensor,
    every: int,
    steps: int,
    lr: float,
) -> Iterator[float]:
    """Held-out FVU after every so many steps of a training that starts from a share of `rows`."""
    trainer = sk.Trainer(sae, lr=lr, steps=steps, decay_share=0, fit_start=False)
    for step, x in enumerate(batches, start=1):
        if step == 1:
            sae.fit_start_(x)
            warm_start(sae, rows, share, generator=generator)
        trainer.step(x)
        if step % every == 0:
            yield sk.evaluate(sae, [held_out], compared=1).fvu


def _recovered(decoder: Tensor, features: Tensor) -> Tensor:
    """Share of the features with a row at a cosine above 0.9: ``[]``."""
    cosines = normalize(features, dim=1) @ normalize(decoder, dim=1).T
    return (cosines.amax(1) > _RECOVERED).double().mean()

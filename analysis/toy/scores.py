"""What of the true features an SAE has found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.results import Result, Results, null_generator, samples
from sparsekern.analysis.toy.generators import TreeFeatures

try:
    from scipy.optimize import linear_sum_assignment
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

_BATCH = 8192


@dataclass(frozen=True, eq=False)
class GroundTruthScores(Results):
    """What :func:`ground_truth_scores` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``decoder_match`` and ``encoder_match``, and what the experiment adds.
    latent_of : Tensor [n_features] int64
        The latent of each feature; −1 where there are fewer latents than features.
    decoder, encoder : Tensor [n_features, n_features]
        Cosines of the decoder's and the encoder's row of the latent of a feature (the row of the table) with all
        features (its columns); NaN where it has none.
    """

    results: dict[str, Result]
    latent_of: Tensor
    decoder: Tensor
    encoder: Tensor


@torch.no_grad()
def ground_truth_scores(sae: sk.SAE, features: Tensor, n_null: int = 100, seed: int = 0) -> GroundTruthScores:
    """Match latents with the true features, and tell how well.

    One latent a feature, such that the sum of the cosines of their decoder and encoder rows with the features is
    largest. Both count, because absorption turns the decoder's row of the child towards the parent, and the encoder's
    row of the parent away from the child: by either alone the two could change places.

    Parameters
    ----------
    sae : SAE
        One that reconstructs what it reads.
    features : Tensor [n_features, d_in]
        True directions, of any norm but 0.
    n_null : int
        Random dictionaries: directions as many as latents, the same for encoder and decoder, matched in the same way.
    seed : int
        Determines the null.

    Raises
    ------
    ValueError
        For an SAE without one row of `d_in` numbers a latent in both weights, and for features that are none.
    """
    shape = (sae.d_sae, sae.d_in)
    if not sae.W_enc.shape == sae.W_dec.shape == shape:
        raise ValueError(f"sae must have weights of shape {shape}, got {sae.W_enc.shape} and {sae.W_dec.shape}")
    if features.dim() != 2 or not len(features) or features.shape[1] != sae.d_in:
        raise ValueError(f"features must have shape [n_features, {sae.d_in}], got {tuple(features.shape)}")
    norms = features.norm(dim=1)
    if not (norms.isfinite() & (norms > 0)).all():
        raise ValueError("features must be finite rows of a norm above 0")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    unit = normalize(features.float(), dim=1)
    latent_of, decoder, encoder = match(sae.W_dec, sae.W_enc, unit)
    random = [match(rows, rows, unit)[1] for rows in random_dictionaries(sae, n_null, seed)]
    null = {"random dictionary": samples(mean_of(cosines.diagonal()) for cosines in random)}
    results = {
        "decoder_match": Result("cosine of decoder rows with their features", mean_of(decoder.diagonal()), null),
        "encoder_match": Result("cosine of encoder rows with their features", mean_of(encoder.diagonal()), null),
    }
    return GroundTruthScores(results, latent_of, decoder, encoder)


@dataclass(frozen=True, eq=False)
class AbsorptionScores(GroundTruthScores):
    """What :func:`absorption_scores` returns.

    Attributes
    ----------
    pairs : Tensor [n_pairs, 2] int64
        Parent and child.
    silent : Tensor [n_pairs, 2]
        On what share of the tokens the parent's latent is silent: where parent and child are active; where the parent
        is, with no child. NaN where there are no such tokens, or no such latent.
    """

    pairs: Tensor
    silent: Tensor


@torch.no_grad()
def absorption_scores(
    sae: sk.SAE,
    toy: TreeFeatures,
    activations: Tensor,
    x: Tensor,
    n_null: int = 100,
    seed: int = 0,
) -> AbsorptionScores:
    """Whether latents of children have absorbed their parents.

    Beside :func:`ground_truth_scores`, means over all pairs of a parent and its child:

    ``holes``
        How much more often the parent's latent is silent where the child is active than where no child is. Null: the
        tokens that have the child drawn anew among both kinds.
    ``parent_encoder``
        Cosine of the encoder's row of the parent's latent with the child's direction: negative where it is told not to
        fire on the child. Null: random dictionaries.
    ``child_decoder``
        Cosine of the decoder's row of the child's latent with the parent's direction: positive where it writes both.
        Null: random dictionaries.

    Parameters
    ----------
    sae : SAE
        In evaluation mode, as it is to be judged.
    toy : TreeFeatures
        With at least one child.
    activations, x : Tensor [B, n_features], [B, d]
        What ``toy.sample`` gave.
    n_null : int
        Samples of each null.
    seed : int
        Determines the nulls.

    References
    ----------
    Chanin et al., *A is for absorption* (arXiv 2409.14507); Chanin, *Toy models of feature absorption in SAEs* (2024).
    """
    child = (toy.parent_of >= 0).nonzero().squeeze(1)
    if not len(child):
        raise ValueError("toy must have a feature whose parent is a feature")
    truth = ground_truth_scores(sae, toy.features, n_null, seed)
    pairs = torch.stack([toy.parent_of[child], child], 1)
    fires = torch.cat([sae.encode(part).to_dense() > 0 for part in x.split(_BATCH)])
    active = activations > 0
    generator = null_generator(seed)
    silent = torch.full((len(pairs), 2), torch.nan)
    permuted = torch.full((n_null, len(pairs)), torch.nan)
    for row, (parent, child_of_it) in enumerate(pairs.tolist()):
        latent = truth.latent_of[parent]
        has_child = active[:, child_of_it]
        alone = active[:, parent] & ~active[:, toy.parent_of == parent].any(1)
        if latent < 0 or not has_child.any() or not alone.any():
            continue
        off = (~fires[has_child | alone, latent]).float()
        labels = has_child[has_child | alone]
        silent[row, 0], silent[row, 1] = off[labels].mean(), off[~labels].mean()
        for sample in range(n_null):
            drawn = labels[torch.randperm(len(labels), generator=generator)]
            permuted[sample, row] = off[drawn].mean() - off[~drawn].mean()
    random = [match(rows, rows, toy.features)[1] for rows in random_dictionaries(sae, n_null, seed)]
    parent, child = pairs.unbind(1)
    results = {
        **truth.results,
        "holes": Result(
            "silence of parents' latents where the child is active, less that where none is",
            mean_of(silent[:, 0] - silent[:, 1]),
            {"child's tokens drawn anew": samples(mean_of(sample) for sample in permuted)},
        ),
        "parent_encoder": Result(
            "cosine of the parent's encoder row with the child",
            mean_of(truth.encoder[parent, child]),
            {"random dictionary": samples(mean_of(cosines[parent, child]) for cosines in random)},
            tail="less",
        ),
        "child_decoder": Result(
            "cosine of the child's decoder row with the parent",
            mean_of(truth.decoder[child, parent]),
            {"random dictionary": samples(mean_of(cosines[child, parent]) for cosines in random)},
        ),
    }
    return AbsorptionScores(results, truth.latent_of, truth.decoder, truth.encoder, pairs, silent)


@torch.no_grad()
def hedging_rate(control: sk.SAE, extended: sk.SAE, n_null: int = 50, seed: int = 0) -> Result:
    """How much of what an SAE had mixed into its latents goes to new ones, once it has them: 0 none, 1 all.

    Both continue the same training, `extended` with latents added at the end. With δ the difference of the old latents'
    decoder rows,
    ``π = mean ‖δ projected on the span of the new rows‖ / mean ‖row of the control‖``; over random spans of this rank π
    has the mean ``π_rand``, and the rate is ``max(0, (π − π_rand) / (1 − π_rand))``.

    Parameters
    ----------
    control, extended : SAE
        Of widths W and above W.
    n_null : int
        Random spans, at least 1; the null is the rate with each in the place of the new rows'.
    seed : int
        Determines them.

    Raises
    ------
    ValueError
        Unless `extended` is the wider one and new rows leave some dimensions out.

    References
    ----------
    Chanin et al., *Feature hedging* (arXiv 2505.11756), and its code.
    """
    old, wide = (sae.W_dec.detach().cpu().double() for sae in (control, extended))
    if wide.dim() != 2 or old.shape[1:] != wide.shape[1:] or len(wide) <= len(old):
        raise ValueError(
            f"extended must have more latents of the same width, got {tuple(old.shape)} and {tuple(wide.shape)}"
        )
    if n_null < 1:
        raise ValueError(f"n_null must be at least 1, got {n_null}")
    new, difference = wide[len(old) :], wide[: len(old)] - old
    rank = int(torch.linalg.matrix_rank(new))
    if not 0 < rank < wide.shape[1]:
        raise ValueError(f"the new latents' rows must span some of the {wide.shape[1]} dimensions, not {rank}")
    size = old.norm(dim=1).mean()

    def share(basis: Tensor) -> float:
        return float((difference @ basis.T).norm(dim=1).mean() / size)

    generator = null_generator(seed)
    draws = (torch.randn(wide.shape[1], rank, generator=generator, dtype=torch.float64) for _ in range(n_null))
    random = samples(share(torch.linalg.qr(draw)[0].T) for draw in draws)
    chance = float(random.mean())
    rate = (share(torch.linalg.svd(new, full_matrices=False)[2][:rank]) - chance) / (1 - chance)
    return Result("hedging rate", max(0.0, rate), {"random spans": ((random - chance) / (1 - chance)).clamp(min=0)})


def match(decoder: Tensor, encoder: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The latent of each feature, and both tables of cosines, in the order of the features."""
    decoder, encoder = (normalize(rows.detach().cpu().float(), dim=1) @ unit.T for rows in (decoder, encoder))
    latents, matched = linear_sum_assignment((decoder + encoder).numpy(), maximize=True)
    latent_of = torch.full((len(unit),), -1)
    latent_of[torch.from_numpy(matched)] = torch.from_numpy(latents)
    unmatched = (latent_of < 0)[:, None]
    decoder, encoder = (cosines[latent_of].masked_fill(unmatched, torch.nan) for cosines in (decoder, encoder))
    return latent_of, decoder, encoder


def random_dictionaries(sae: sk.SAE, count: int, seed: int) -> Iterator[Tensor]:
    """Weights ``[d_sae, d_in]`` of random directions."""
    generator = null_generator(seed)
    return (torch.randn(sae.d_sae, sae.d_in, generator=generator) for _ in range(count))


def mean_of(numbers: Tensor) -> float:
    """Mean of those that are defined."""
    return float(numbers.nanmean())

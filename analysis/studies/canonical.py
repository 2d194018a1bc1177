"""The study of canonical features: do SAEs from different seeds find the same latents?"""

from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.canonical import Matching, match, match_by_activation, mmcs
from sparsekern.analysis.completeness.shared import auc
from sparsekern.analysis.results import Result, markdown, new_axes, new_panels, null_generator, samples
from sparsekern.analysis.similarity import cka, procrustes_transfer, rsa, svcca
from sparsekern.analysis.studies.options import CanonicalOptions
from sparsekern.analysis.studies.page import HOW_TO_READ, Page, sentence, source_of
from sparsekern.analysis.studies.saes import TrainedSAEs, train_one, train_saes
from sparsekern.analysis.tokens import HeldOut
from sparsekern.analysis.warm_start import CanonicalRows, compare_starts
from sparsekern.data import ActivationLoader, ActivationStore
from sparsekern.progress import Progress

_EXAMPLES = 8  # latents of each kind whose tokens are shown
_LEAST = 8  # tokens on which they must be active
_BINS = 6  # of the density
_NEAR = 0.7  # least cosine of shared latents
_CURVE = 4096  # tokens of a point on the curve of a training


def study(store: ActivationStore, options: CanonicalOptions, output: Path, progress: bool = True) -> list[Path]:
    """Train or load SAEs of several seeds, match them, and write the page; returns its files.

    Raises
    ------
    ValueError
        If the folder of the SAEs has some of other options, or `other` has other tokens.
    """
    options = options.resolved(store.d, output)
    new_axes()  # a missing matplotlib is found before the training
    trained = train_saes(store, options, progress)
    page = Page(output, "Do SAEs from different seeds find the same latents?")
    _start(page, store, options, trained)
    matchings = _matched(page, trained, options, progress)
    _frequency(page, trained, matchings, options)
    _examples(page, store, trained, matchings)
    _by_activation(page, trained, matchings, options)
    _other(page, store, trained, options, progress)
    _warm_start(page, store, trained, matchings, options, progress)
    page.section("What this cannot tell")
    page.text(
        "- The SAEs see the same batches in the same order and differ in their first weights only; other data, or "
        "another order, would make them differ more.\n"
        "- A latent that only one seed has may still be right: what both seeds miss is not seen at all, and two seeds "
        "can make the same mistake.\n"
        f"- The threshold of {_NEAR:g} is a convention. The histograms show how much depends on it.\n"
        "- Few steps of training: latents that would converge later count as different here."
    )
    return page.write(options, store)


def _start(page: Page, store: ActivationStore, options: CanonicalOptions, trained: TrainedSAEs) -> None:
    page.text(
        "If a sparse autoencoder found *the* features of a model, training it again from other random weights would "
        "find them again. Here SAEs of the same width, which differ in nothing but the weights that they start from, "
        "are compared latent by latent.",
        trained.setting(store, options),
        HOW_TO_READ,
    )
    page.section("The SAEs")
    page.table(*trained.table())
    page.text("FVU is the fraction of variance unexplained on the held-out tokens, lower is better.")


def _matched(page: Page, trained: TrainedSAEs, options: CanonicalOptions, progress: bool) -> dict[int, list[Matching]]:
    """Pairs of seeds of each width; the nulls for the first pair only."""
    pairs = list(combinations(range(options.seeds), 2))
    matchings: dict[int, list[Matching]] = {}
    nearest: dict[int, dict[str, Result]] = {}
    with Progress("pairs of seeds", len(trained.widths) * len(pairs), unit="pairs", shown=progress) as bar:
        for width, group in trained.by_width.items():
            matchings[width] = []
            for first, second in pairs:
                one, two = group[first], group[second]
                n_null = options.n_costly if not matchings[width] else 0
                matchings[width].append(
                    match(
                        one.sae.W_dec,
                        two.sae.W_dec,
                        one.sae.W_enc,
                        two.sae.W_enc,
                        options.method,
                        alive1=one.alive,
                        alive2=two.alive,
                        threshold=_NEAR,
                        n_null=n_null,
                        seed=options.seed,
                    )
                )
                bar.update(sum(len(found) for found in matchings.values()))
            one, two = group[:2]
            nearest[width] = mmcs(
                one.sae.W_dec,
                two.sae.W_dec,
                alive1=one.alive,
                alive2=two.alive,
                n_null=options.n_costly,
                seed=options.seed,
            ).results
    page.section("Latents in common")
    rows = []
    for width, found in matchings.items():
        rows.append(
            [
                f"{width:,}",
                _both([m.results["shared"] for m in found]),
                ", ".join(f"{(m.cos_dec[m.alive1] >= _NEAR).double().mean():.3f}" for m in found),
                _both([m.results["cosine"] for m in found]),
                _both([nearest[width]["of_first"]]),
            ]
        )
    header = ["latents", "shared", "shared by decoder alone", "mean cosine of partners", "mean largest cosine"]
    page.table(header, rows)
    page.text(
        "Latents of two SAEs are made partners one to one, such that the cosines of the directions that they write "
        "(decoder rows) add up to the most, and once more by the directions that they read (encoder rows). "
        f"**Shared** are latents for which both ways find the same partner, at cosines of at least {_NEAR:g}; *by "
        f"decoder alone* asks for a decoder cosine of {_NEAR:g} only. The largest cosine asks for the nearest latent "
        f"of the other SAE, whoever else is near it. Every cell has the values of the pairs of seeds ({len(pairs)}; "
        "the largest cosine: one pair) and in brackets the highest sample of the nulls: a random dictionary, and the "
        "second SAE with its coordinates permuted.",
        _trend(matchings),
    )
    figure, panels = new_panels(len(matchings))
    for axes, (width, found) in zip(panels, matchings.items(), strict=True):
        found[0].plot(axes).set_title(f"{width:,} latents", fontsize=10)
    page.picture("cosines", figure, "Cosines of the decoder rows of partners, seeds 0 and 1, beside those of the nulls")
    page.record(
        saes={str(width): [{"seed": t.seed, "fvu": t.fvu} for t in group] for width, group in trained.by_width.items()},
        matchings={width: [m.results for m in found] for width, found in matchings.items()},
        mmcs=nearest,
    )
    return matchings


def _both(results: list[Result]) -> str:
    """The values, and the highest sample of the first one's nulls."""
    values = ", ".join(f"{result.value:.3f}" for result in results)
    nulls = [numbers.max() for numbers in results[0].nulls.values() if len(numbers)]
    return f"{values} ({max(nulls):.3f})" if nulls else values


def _trend(matchings: dict[int, list[Matching]]) -> str:
    shares = {width: samples(m.results["shared"].value for m in found) for width, found in matchings.items()}
    narrow, wide = min(shares), max(shares)
    if shares[wide].max() < shares[narrow].min():
        outcome = "is smaller in every pair"
    elif shares[wide].min() > shares[narrow].max():
        outcome = "is larger in every pair"
    else:
        outcome = "is not clearly different"
    return (
        f"From {narrow:,} to {wide:,} latents the share in common {outcome}: {shares[narrow].mean():.1%} → "
        f"{shares[wide].mean():.1%}. It is known to fall with width (Paulo and Belrose 2025, "
        "who found 30% of 131,072 latents in an 8-billion-parameter model)."
    )


def _frequency(
    page: Page, trained: TrainedSAEs, matchings: dict[int, list[Matching]], options: CanonicalOptions
) -> None:
    results = {}
    axes = new_axes()
    for index, (width, found) in enumerate(matchings.items()):
        one = trained.by_width[width][0]
        density, shared = one.density[one.alive], found[0].shared[one.alive]
        results[width] = _frequent_are_shared(density, shared, width, options)
        logs = density.log10()
        edges = torch.linspace(float(logs.min()), float(logs.max()) + 1e-6, _BINS + 1)
        place = torch.bucketize(logs, edges[1:-1])
        counts = torch.bincount(place, minlength=_BINS)
        share = torch.bincount(place[shared], minlength=_BINS) / counts
        middle = 10 ** ((edges[1:] + edges[:-1]) / 2)
        drawn = counts >= 5  # a share of fewer is noise
        axes.plot(middle[drawn].tolist(), share[drawn].tolist(), "o-", color=f"C{index}", label=f"{width:,} latents")
    axes.set(
        xscale="log", ylim=(0, 1), xlabel="share of tokens on which a latent is active", ylabel="share that is shared"
    )
    axes.legend(frameon=False)
    page.section("Are the frequent latents the shared ones?")
    page.picture("frequency", axes, "Share of latents that seeds 0 and 1 share, by how often they are active")
    page.text(
        "The number is the probability that of two latents, one shared and one not, the shared one is active on more "
        "tokens: 0.5 where frequency does not matter. Null: densities permuted among the latents.",
        *(f"- {sentence(result)}" for result in results.values()),
    )
    page.record(frequency=results)


def _frequent_are_shared(density: Tensor, shared: Tensor, width: int, options: CanonicalOptions) -> Result:
    """The area under the ROC curve of the density for being shared."""
    generator = null_generator(options.seed)
    orders = (torch.randperm(len(shared), generator=generator) for _ in range(options.n_null))
    null = samples(auc(shared, density[order]) for order in orders)
    name = f"with {width:,} latents, probability that the shared one of two is the more frequent"
    return Result(name, auc(shared, density), {"densities permuted": null}, tail="two-sided")


def _examples(page: Page, store: ActivationStore, trained: TrainedSAEs, matchings: dict[int, list[Matching]]) -> None:
    if not (trained.held_out.tokens >= 0).any():
        return
    width = trained.widths[len(trained.widths) // 2]
    one, two = trained.by_width[width][:2]
    found = matchings[width][0]
    kinds = {
        "shared": found.shared,
        "not shared": found.alive1 & ~found.shared & (found.partner >= 0) & (found.cos_dec < 0.5),
    }
    page.section(f"Some latents of the SAE of {width:,}")
    rows = []
    for kind, chosen in kinds.items():
        latents = chosen.nonzero().squeeze(1)
        often = latents[one.density[latents] * len(trained.held_out.x) >= _LEAST]
        often = often[one.density[often].argsort(descending=True, stable=True)]
        picked = often[((torch.arange(min(_EXAMPLES, len(often))) + 0.5) * len(often) / _EXAMPLES).long()]
        for latent in picked.tolist():
            partner = int(found.partner[latent])
            words = [side.words(store, trained.held_out, of) for side, of in ((one, latent), (two, partner))]
            rows.append([kind, f"{found.cos_dec[latent]:.2f}", words[0], words[1]])
    page.table(["", "cosine", "seed 0: words of its strongest tokens", "seed 1: those of its partner"], rows)
    page.text(
        f"Evenly spaced by frequency among the latents that are active on at least {_LEAST} held-out tokens; *not "
        "shared* are those whose partner is at a cosine below 0.5."
    )


def _by_activation(
    page: Page, trained: TrainedSAEs, matchings: dict[int, list[Matching]], options: CanonicalOptions
) -> None:
    page.section("By what they respond to, and the spaces that they span")
    results: dict[int, dict[str, Result]] = {}
    rows = []
    for width, group in trained.by_width.items():
        one, two = group[:2]
        found = match_by_activation(one.codes, two.codes, n_null=options.n_costly, seed=options.seed)
        i, j = found.pairs()
        by_weights = matchings[width][0].partner[i] == j
        X, Y = one.sae.W_dec.detach()[i], two.sae.W_dec.detach()[j]
        results[width] = {
            **found.results,
            "svcca": svcca(X, Y, n_null=options.n_null, seed=options.seed),
            "rsa": rsa(X, Y, n_null=options.n_null, seed=options.seed),
            "cka": cka(X, Y, n_null=options.n_null, seed=options.seed),
        }
        same = f"{by_weights.double().mean():.1%}" if len(i) else "–"
        names = ("matched", "correlation", "svcca", "rsa", "cka")
        rows.append([f"{width:,}", *(_both([results[width][name]]) for name in names), same])
    header = ["latents", "with a partner", "largest correlation", "SVCCA", "RSA", "CKA", "partner by weights too"]
    page.table(header, rows)
    page.text(
        "Here a latent's partner is the one of the other seed whose activations on the same tokens correlate most with "
        "its own (above 0.1); weights play no part, so this also works between models. Null: the other SAE's tokens "
        "shuffled. SVCCA, RSA and CKA then compare the decoder rows of these partners as two clouds of points, "
        "whatever their coordinates: 1 is the same shape. Null: the partners shuffled. In brackets the highest sample "
        "of the null; seeds 0 and 1. The last column: how many of these partners the weights chose as well."
    )
    page.record(by_activation=results)


def _other(page: Page, store: ActivationStore, trained: TrainedSAEs, options: CanonicalOptions, progress: bool) -> None:
    """The SAE of middle width beside one that is trained on another store of the same tokens."""
    if options.other is None:
        return
    other = ActivationStore(options.other)
    if other.d != store.d or not torch.equal(other.token_ids, store.token_ids):
        raise ValueError(f"other must hold the same tokens in the same order, and width {store.d}, got {options.other}")
    width = trained.widths[len(trained.widths) // 2]
    one = trained.by_width[width][0]
    held_out = HeldOut.of(other, options.held_out, options.seed, options.tokens)
    assert options.saes is not None
    apart = dataclasses.replace(options, saes=options.saes / "other")
    two = train_one(other, apart, width, options.seed, held_out, progress=progress)
    found = match_by_activation(one.codes, two.codes, n_null=options.n_costly, seed=options.seed)
    i, j = found.pairs()
    X, Y = one.sae.W_dec.detach()[i], two.sae.W_dec.detach()[j]
    kept = {"n_null": options.n_null, "seed": options.seed}
    results = [*found.results.values(), svcca(X, Y, **kept), rsa(X, Y, **kept), cka(X, Y, **kept)]
    transfers = [
        procrustes_transfer(one.sae, trained.held_out.x, held_out.x, n_null=options.n_costly, seed=options.seed),
        procrustes_transfer(two.sae, held_out.x, trained.held_out.x, n_null=options.n_costly, seed=options.seed),
    ]
    page.section("Other activations of the same tokens")
    page.text(
        f"Beside them: {source_of(other)}. An SAE of {width:,} latents was trained on these in the same way (FVU "
        f"{two.fvu:.4f}); partners are again latents whose activations correlate.",
        markdown(results),
        "Whether one SAE serves both: the explained variance of the first one on the other activations, as they are, "
        "moved to its mean, and moved and turned by the rotation that fits half of the tokens best (orthogonal "
        "Procrustes), measured on the other half. Control: its own activations. Nulls: a random rotation, and one that "
        "was fitted to tokens permuted. High cosines without a rotation say little where this is low.",
        markdown(transfers[0].results.values()),
        "And the other way round:",
        markdown(transfers[1].results.values()),
    )
    page.record(other={"source": other.source, "by_activation": results, "transfer": [t.results for t in transfers]})


def _warm_start(
    page: Page,
    store: ActivationStore,
    trained: TrainedSAEs,
    matchings: dict[int, list[Matching]],
    options: CanonicalOptions,
    progress: bool,
) -> None:
    page.section("What a warm start saves")
    width = trained.widths[0]
    found = matchings[width][0]
    if not found.shared.any():
        page.text(f"The SAEs of {width:,} latents share none: there is nothing to start from.")
        return
    known = CanonicalRows.of(trained.by_width[width][0].sae, found.shared)
    training = store.split(options.held_out, options.seed)[0]
    seed = options.seed + options.seeds  # weights and an order of the tokens that no SAE has seen
    every = max(1, options.steps // 60)
    steps = max(every, options.steps // 2 // every * every)

    def make() -> sk.SAE:
        return sk.SAE(store.d, width, sk.TopK(options.k), generator=torch.Generator().manual_seed(seed))

    saving = compare_starts(
        make,
        known,
        lambda: iter(ActivationLoader(training, options.batch_size, seed=seed)),
        trained.held_out.x[:_CURVE],
        steps=steps,
        early=max(every, steps // 5 // every * every),
        every=every,
        lr=options.lr,
        n_null=1,
        seed=options.seed,
        progress=progress,
    )
    page.text(
        f"A new SAE of {width:,} latents, with other weights and another order of the tokens, starts from the "
        f"{saving.copied:,} latents that seeds 0 and 1 share; beside it a cold start, one with half of them, and the "
        "null, in which the copied latents have their coordinates permuted."
    )
    page.picture("warm_start", saving.plot(), "FVU on held-out tokens while SAEs train from different starts")
    page.text(markdown(saving.results.values()))
    page.record(warm_start={"copied": saving.copied, "fvu": {k: v.tolist() for k, v in saving.fvu.items()}})
    page.record(warm_start_results=saving.results)

"""The study of completeness: does a wider SAE know more, are its latents sums of others, what is found, how much is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.analysis.completeness import (
    COMPOSITIONS,
    KINDS,
    Atomicity,
    MetaSAE,
    Stitching,
    Swapping,
    atomicity,
    meta_sae,
    stitch,
    swap,
)
from sparsekern.analysis.results import markdown, new_axes, new_panels, plot, samples, strip
from sparsekern.analysis.studies.completeness_found import cell, concepts_of, listed, mean_of, recovery, totals
from sparsekern.analysis.studies.options import CompletenessOptions
from sparsekern.analysis.studies.page import HOW_TO_READ, Page
from sparsekern.analysis.studies.saes import Trained, TrainedSAEs, train_saes
from sparsekern.data import ActivationStore
from sparsekern.progress import Progress

_SAME = 0.7  # cosine, or correlation, at which latents count as the same
_META_RATIO = 21  # latents a meta-latent, and parts of each: those of the published meta-SAE
_META_K = 4
_META_BATCH = 512
_EXAMPLES = 8  # composite latents shown
_COMPOSITE, _ATOMIC = COMPOSITIONS.index("composite"), COMPOSITIONS.index("atomic")
_OFTEN = 8  # tokens on which a latent is active, for these to be told
_REMOVED = ("error that all novel ones remove", "added up one by one", "less error of the wider SAE")


def study(store: ActivationStore, options: CompletenessOptions, output: Path, progress: bool = True) -> list[Path]:
    """Train or load SAEs of several widths and seeds, measure, and write the page; returns its files.

    Raises
    ------
    ValueError
        If the folder of the SAEs has some of other options, and for fewer than two widths.
    """
    options = options.resolved(store.d, output)
    if options.latents is None or len(options.latents) < 2:
        raise ValueError("latents must name two widths at least: a dictionary is complete beside a wider one")
    new_axes()  # a missing matplotlib is found before the training
    trained = train_saes(store, options, progress)
    page = Page(output, "Is a dictionary complete, and are its latents atomic?")
    _start(page, store, trained, options)
    _stitching(page, trained, options, progress)
    _swapping(page, trained, options, progress)
    _meta(page, trained, options, progress)
    _atomicity(page, store, trained, options, progress)
    concepts = concepts_of(store, trained, options)
    found = recovery(page, trained, concepts, options) if concepts else {}
    totals(page, trained, found, options, progress)
    page.section("What this cannot tell")
    page.text(
        "- One model, one layer, one kind of SAE and a short training. What is missing here may come with more steps.\n"
        "- Latents that are active on no held-out token take no part: rare ones among them are not dead, and are "
        "missed.\n"
        "- A novel latent lowers the error; that does not make it a feature that a person would name.\n"
        "- Atomic means that no sum was found in *this* narrower dictionary. What is atomic beside one can be "
        "composite beside another.\n"
        "- Tokens are the concepts that are known without asking anyone. They say nothing of meanings that span "
        "several tokens, which are what one would like to know about.\n"
        "- Seeds see the same data in the same order, so what they all miss leaves no trace in any count of what they "
        "have in common."
    )
    return page.write(options, store)


def _start(page: Page, store: ActivationStore, trained: TrainedSAEs, options: CompletenessOptions) -> None:
    page.text(
        "A sparse autoencoder is *complete* if a wider one would find nothing new, and its latents are *atomic* if "
        "none is a sum of others. This page asks for both: what a wider SAE adds to a narrower one, whether the wider "
        "one's latents are made of the narrower one's, which tokens have a latent of their own, and how many features "
        "there would be in all.",
        trained.setting(store, options),
        HOW_TO_READ,
        "Cells of tables have the values of all seeds and in brackets the highest sample of the nulls.",
    )
    page.section("The SAEs")
    page.table(*trained.table())
    page.text("FVU is the fraction of variance unexplained on the held-out tokens, lower is better.")
    page.record(saes={width: [{"seed": t.seed, "fvu": t.fvu} for t in g] for width, g in trained.by_width.items()})


class _Pair(NamedTuple):
    """A narrower SAE and a wider one, of another seed."""

    small: Trained
    large: Trained
    n_null: int
    same_seed: Trained  # the wider SAE of the narrower one's seed

    @property
    def name(self) -> str:
        return _between(self.small.sae.d_sae, self.large.sae.d_sae)


def _between(small: int, large: int) -> str:
    return f"{small:,} → {large:,}"


def _pairs(trained: TrainedSAEs, n_null: int) -> dict[str, list[_Pair]]:
    """Each width and the next, as many pairs as seeds; all samples of the nulls for the first, one for the others."""
    found: dict[str, list[_Pair]] = {}
    for narrow, wide in pairwise(trained.widths):
        smalls, larges = trained.by_width[narrow], trained.by_width[wide]
        found[_between(narrow, wide)] = [
            _Pair(small, larges[(seed + 1) % len(larges)], n_null if seed == 0 else 1, larges[seed])
            for seed, small in enumerate(smalls)
        ]
    return found


# Stitching


def _stitching(page: Page, trained: TrainedSAEs, options: CompletenessOptions, progress: bool) -> None:
    """Latents of a wider SAE, added to a narrower one by themselves."""
    found: dict[str, list[Stitching]] = {}
    x = trained.held_out.x
    pairs = _pairs(trained, options.n_null)
    with Progress("stitching", len(pairs) * options.seeds, unit="pairs", shown=progress) as bar:
        for name, every in pairs.items():
            found[name] = []
            for small, large, n_null, same in every:
                one = stitch(small.sae, large.sae, x, _SAME, n_null=n_null, seed=options.seed)
                if not found[name]:
                    twin = stitch(small.sae, same.sae, x, _SAME, n_null=1, seed=options.seed).results["max_cos"]
                    controls = {"the wider SAE of the same seed": samples([twin.value])}
                    one.results["max_cos"] = dataclasses.replace(one.results["max_cos"], controls=controls)
                found[name].append(one)
                bar.update(sum(len(some) for some in found.values()))
    page.section("Does a wider SAE know what a narrower one lacks?")
    page.text(
        "Each latent of the wider SAE is added to the narrower one, by itself, with the activations and the direction "
        "that it has. If the error on the held-out tokens falls, it brings something that the narrower SAE lacks, and "
        "is **novel**. If the error rises, the narrower one had it already, and it is a **reconstruction** latent.",
        "\n".join(f"- {_novelty(name, every)}" for name, every in found.items()),
    )
    rows = [
        [
            name,
            cell((one.results["novel"] for one in every), ".1%"),
            _of_often(pairs[name], (one.kind == KINDS.index("novel") for one in every)),
            cell(one.results["auc"] for one in every),
            cell(one.results["threshold"] for one in every),
            cell((one.results["together"] for one in every), ".1%"),
            listed((_added_up(one) for one in every), ".1%"),
            listed((1 - large.fvu / small.fvu for small, large, *_ in pairs[name]), ".0%"),
        ]
        for name, every in found.items()
    ]
    page.table(
        ["widths", "novel", f"of those on {_OFTEN} tokens", "AUC", f"told at {_SAME:g}", *_REMOVED],
        rows,
    )
    page.text(
        "- *Novel*: share of the wider SAE's active latents. Nulls: random directions with the same activations, and "
        f"the right directions on other tokens. *Of those on {_OFTEN} tokens*: the same for latents that are active on "
        f"at least {_OFTEN} tokens; of rarer ones a token or two decide.\n"
        "- *AUC*: chance that, of a novel and a reconstruction latent, the novel one is less like any latent of the "
        "narrower SAE (largest cosine of the directions that they write). 0.5 says that likeness tells nothing, 1 that "
        "it tells all. Null: the cosines permuted.\n"
        f"- *Told at {_SAME:g}*: how many of both kinds the published rule tells rightly, that novel latents are those "
        f"with a largest cosine below {_SAME:g}; the mean over the kinds, so that 0.5 is guessing.\n"
        "- *Error that all novel ones remove*: share of the narrower SAE's error that goes when they are all added at "
        "once. What two of them share is then added twice, so it can be below 0, and differs from their gains "
        "*added up one by one*. Null: as many latents drawn at random. *Less error of the wider SAE*: by how much the "
        "error (FVU) of the wider SAE is less than the narrower one's. Where that is much more, the wider SAE is "
        "better by doing the same differently, and not by what it has in addition.",
    )
    name = list(found)[-1]
    page.text(
        f"The first pair of seeds, {name}, with every null:",
        markdown(found[name][0].results.values()),
        "The two SAEs of a pair have different seeds. SAEs of one seed start from the same random rows, as far as the "
        "narrower one has them, and can stay alike for that: the control of the last number.",
    )
    figure, panels = new_panels(len(found), width=5.5, height=4)
    for axes, (name, of_seeds) in zip(panels, found.items(), strict=True):
        of_seeds[0].plot(axes).set_title(f"{name} latents", fontsize=10)
    page.picture(
        "stitching",
        figure,
        "What each latent of the wider SAE does to the error of the narrower one when it is added, by how like the "
        "nearest latent it is (first pair of seeds)",
    )
    page.record(stitching={name: [one.results for one in every] for name, every in found.items()})


def _of_often(pairs: list[_Pair], which: Iterable[Tensor]) -> str:
    """For each pair the share of the latents that are active often."""
    return listed((_share(of, _often(pair)) for pair, of in zip(pairs, which, strict=True)), ".1%")


def _often(pair: _Pair) -> Tensor:
    """Latents of the wider SAE that are active on so many tokens that these can be told, ``[d_large]`` bool."""
    return (pair.large.density * pair.large.codes.tokens).round() >= _OFTEN


def _share(which: Tensor, among: Tensor) -> float:
    return float(which[among].double().mean())


def _added_up(one: Stitching) -> float:
    """Share of the error that the novel latents would remove if their gains added up."""
    return float(-one.delta[one.latents("novel")].sum() / one.mse)


def _novelty(name: str, every: list[Stitching]) -> str:
    novel = mean_of(one.results["novel"].value for one in every)
    auc, chance = mean_of(one.results["auc"].value for one in every), every[0].results["auc"].null
    told = "above" if auc > chance.max() else "not above"
    return (
        f"**{name}: {novel:.1%} of the latents are novel; likeness tells them from the others with an AUC of "
        f"{auc:.2f}, {told} what chance gives.**"
    )


def _swapping(page: Page, trained: TrainedSAEs, options: CompletenessOptions, progress: bool) -> None:
    """Families of like latents, exchanged."""
    found: dict[str, list[Swapping]] = {}
    skipped: dict[str, int] = {}
    pairs = _pairs(trained, options.n_costly)
    with Progress("swapping", len(pairs) * options.seeds, unit="pairs", shown=progress) as bar:
        for index, (name, every) in enumerate(pairs.items()):
            for small, large, n_null, _ in every:
                try:
                    one = swap(small.sae, large.sae, trained.held_out.x, _SAME, n_null=n_null, seed=options.seed)
                except ValueError:  # no two latents are alike
                    skipped[name] = skipped.get(name, 0) + 1
                else:
                    found.setdefault(name, []).append(one)
            bar.update((index + 1) * options.seeds)
    page.section("Do like latents do each other's work?")
    page.text(
        f"Latents of both SAEs with a cosine above {_SAME:g} form a family. A reconstruction latent should do no harm "
        "if it takes the place of its family in the narrower SAE: if the narrower SAE's latent is only a coarser "
        "version of the wider one's, swapping leaves the error as it was, or lowers it.",
        *(f"{name}: no two latents are that alike in {n} of {options.seeds} pairs." for name, n in skipped.items()),
    )
    if not found:
        return
    rows = [
        [
            name,
            listed((len(one.insert) for one in every), ",d"),
            listed((float(one.insert.mean() / one.mse) for one in every), "+.2%"),
            listed((float(one.remove.mean() / one.mse) for one in every), "+.2%"),
            cell((one.results["swap"] for one in every), "+.2%"),
            cell((one.results["undone"] for one in every), ".1%"),
        ]
        for name, every in found.items()
    ]
    page.table(["widths", "families", "added", "left out", "swapped", "swapped beats added"], rows)
    page.text(
        "Mean change of the narrower SAE's error by a family: its wide latents *added*, its narrow ones *left out*, "
        "and both, *swapped*. *Swapped beats added*: share of the families for which swapping does less harm than "
        "adding. Null of the last two: as many other latents of the narrower SAE left out.",
        "\n".join(f"- {_exchange(name, every)}" for name, every in found.items()),
    )
    page.record(swapping={name: [one.results for one in every] for name, every in found.items()})


def _exchange(name: str, every: list[Swapping]) -> str:
    change = mean_of(one.results["swap"].value for one in every)
    added = mean_of(float(one.insert.mean()) / one.mse for one in every)
    harm = "does less harm than adding" if change < added else "does no less harm than adding"
    rest = "and lowers the error" if change < 0 else "but still raises the error"
    return f"**{name}: swapping {harm} on average, {rest}.**"


# Meta-SAEs


def _meta(page: Page, trained: TrainedSAEs, options: CompletenessOptions, progress: bool) -> None:
    """SAEs of the widest decoders."""
    found: list[MetaSAE] = []
    width = trained.widths[-1]
    with Progress("meta-SAEs", options.seeds, unit="SAEs", shown=progress) as bar:
        for one in trained.by_width[width]:
            rows = one.sae.W_dec.detach()[one.alive]
            found.append(
                meta_sae(
                    rows,
                    max(_META_K, len(rows) // _META_RATIO),
                    _META_K,
                    steps=options.meta_steps,
                    batch_size=_META_BATCH,
                    n_null=options.n_costly,
                    seed=one.seed,  # other nulls for each, too
                )
            )
            bar.update(len(found))
    explained = [one.results["explained"] for one in found]
    nulls = {null: torch.cat([result.nulls[null] for result in explained]) for null in explained[0].nulls}
    hardest = max(nulls, key=lambda null: float(nulls[null].mean()))
    mean = mean_of(result.value for result in explained)
    page.section("Are the wide SAE's latents sums of fewer directions?")
    page.text(
        f"An SAE of the directions that the {width:,} latents write: a **meta-SAE**, with a meta-latent for "
        f"{_META_RATIO} latents of which each latent has {_META_K}. If latents were sums of a few atoms, it would "
        "explain them well, and much better than as many random directions. It has no decoder bias: with one the fit "
        "can be as good where no part is an atom.",
        f"**It explains {mean:.1%} of the variance of the directions; of {hardest} the same training explains "
        f"{nulls[hardest].mean():.1%}.** The difference is what the directions have in common beyond their spread over "
        "the dimensions. For another model, and an SAE of 49,152 latents, 55.5% was published (Leask et al. 2025, "
        "2,304 meta-latents, about 4 a latent). The ratio and the number of parts here are those; the activations, the "
        f"training and the number of meta-latents, here {_counts(found)} in {trained.held_out.x.shape[1]} dimensions, "
        "are not.",
    )
    page.table(
        ["seed", "latents", "meta-latents", "explained", *nulls],
        [
            [
                str(one.seed),
                f"{one.alive.sum():,}",
                f"{of.sae.d_sae:,}",
                f"{result.value:.1%}",
                *(f"{result.nulls[null].mean():.1%}" for null in nulls),
            ]
            for one, of, result in zip(trained.by_width[width], found, explained, strict=True)
        ],
    )
    axes = new_axes(8, 1.8)
    strip(
        axes,
        {"decoder rows": (samples(r.value for r in explained), "C0")} | {k: (v, "0.45") for k, v in nulls.items()},
    )
    axes.set_xlabel("share of the variance explained")
    page.picture("meta", axes, f"Meta-SAEs of decoders of {width:,} latents, a dot a seed, and of random directions")
    page.record(meta=[one.results for one in found])


def _counts(found: list[MetaSAE]) -> str:
    counts = sorted({one.sae.d_sae for one in found})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


# Composite or atomic


def _atomicity(
    page: Page, store: ActivationStore, trained: TrainedSAEs, options: CompletenessOptions, progress: bool
) -> None:
    """Latents of a wider SAE as sums of those of a narrower one."""
    found: dict[str, list[Atomicity]] = {}
    pairs = _pairs(trained, options.n_null)
    with Progress("atomicity", len(pairs) * options.seeds, unit="pairs", shown=progress) as bar:
        for name, every in pairs.items():
            found[name] = []
            for small, large, n_null, _ in every:
                rows = large.sae.W_dec.detach(), small.sae.W_dec.detach()
                k = min(_META_K, small.sae.d_sae)
                one = atomicity(*rows, large.codes, small.codes, k, n_null=n_null, seed=options.seed)
                found[name].append(one)
                bar.update(sum(len(some) for some in found.values()))
    page.section("Which latents are composite, which atomic?")
    page.text(
        f"The direction of each latent of the wider SAE is fitted by a sum of at most {_META_K} directions of the "
        "narrower one, none of them with a negative weight. It is **composite** if two or more parts explain it better "
        "than 99% of random directions are explained *and* each part is active on more than 80% of the tokens on which "
        "it is; **shared** if it is not but one latent of the narrower SAE has nearly its direction (cosine of at "
        "least 0.8); and **atomic** otherwise.",
        "\n".join(f"- {_made_of(name, every)}" for name, every in found.items()),
    )
    page.table(
        [
            "widths",
            "composite",
            f"of those on {_OFTEN} tokens",
            "shared",
            "atomic",
            "a sum by its direction only",
            "R²",
        ],
        [
            [
                name,
                cell((one.results["composite"] for one in every), ".1%"),
                _of_often(pairs[name], (one.kind == _COMPOSITE for one in every)),
                cell((one.results["shared"] for one in every), ".1%"),
                listed((_share(one.kind == _ATOMIC, one.kind > 0) for one in every), ".1%"),
                listed((_share(_only_a_sum(one), one.kind > 0) for one in every), ".1%"),
                cell(one.results["r2"] for one in every),
            ]
            for name, every in found.items()
        ],
    )
    page.text(
        "Shares of the wider SAE's active latents. Nulls of *composite*: random directions with the second moment of "
        "the wider decoder, and the tokens of the narrower SAE permuted; of *shared*: the random directions; of *R²*, "
        "the mean share of a direction's squared length that the sum explains: the same, and the wider decoder turned "
        f"at random. *Of those on {_OFTEN} tokens*: of latents active on so many, since a part is soon active on all "
        "of one or two tokens. *A sum by its direction only*: by its direction it is a sum of parts, but these are not "
        "active when it is; such latents count as shared or atomic. So atomic does not mean unexplained: read it "
        "beside R².",
    )
    name = list(found)[-1]
    first = found[name][0]
    page.picture("atomicity", plot(first.results.values()), f"{name} latents, first pair of seeds, beside the nulls")
    page.record(atomicity={name: [one.results for one in every] for name, every in found.items()})
    if (trained.held_out.tokens >= 0).any():
        _composites(page, store, trained, pairs[name][0], first)


def _only_a_sum(one: Atomicity) -> Tensor:
    """Latents that pass for composite by their directions, ``[d_large]`` bool, and not by their codes."""
    return ((one.parts >= 0).sum(1) >= 2) & (one.r2 > one.least_r2) & (one.kind != _COMPOSITE)


def _made_of(name: str, every: list[Atomicity]) -> str:
    composite, shared = (mean_of(one.results[key].value for one in every) for key in ("composite", "shared"))
    highest = max(float(numbers.max()) for numbers in every[0].results["composite"].nulls.values())
    return f"**{name}: {composite:.1%} are composite (at most {highest:.1%} by chance), {shared:.1%} shared.**"


def _composites(page: Page, store: ActivationStore, trained: TrainedSAEs, pair: _Pair, found: Atomicity) -> None:
    """Some composites and their parts, by the words that they respond to."""
    latents = (_often(pair) & (found.kind == _COMPOSITE)).nonzero().squeeze(1)
    latents = latents[pair.large.density[latents].argsort(descending=True, stable=True)]
    count = min(_EXAMPLES, len(latents))
    if not count:
        page.text(f"No latent that is active on {_OFTEN} tokens is composite: there is none to show.")
        return
    rows = []
    for latent in latents[((torch.arange(count) + 0.5) * len(latents) / count).long()].tolist():
        parts = [
            f"{weight:.2f} × ({pair.small.words(store, trained.held_out, part)})"
            for part, weight in zip(found.parts[latent].tolist(), found.coefficients[latent].tolist(), strict=True)
            if part >= 0
        ]
        words = pair.large.words(store, trained.held_out, latent)
        rows.append([words, " + ".join(parts), f"{found.coactivation[latent]:.0%}", f"{found.r2[latent]:.2f}"])
    page.text(f"Some composites, {pair.name}, evenly spaced by how often they are active, on at least {_OFTEN} tokens:")
    page.table(["words of the latent", "words of its parts, with their weights", "parts active with it", "R²"], rows)
    page.text(
        "Words are those of the eight tokens on which a latent is most active, with how many of the eight each is. "
        "*Parts active with it*: the least, over its parts, of the share of its tokens on which the part is active too."
    )

"""The study of toys: made data whose features are known, and what SAEs of different losses make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsekern.analysis import toy
from sparsekern.analysis.results import Result, markdown, new_axes, new_panels
from sparsekern.analysis.studies.options import ToyOptions
from sparsekern.analysis.studies.page import HOW_TO_READ, Page, sentence
from sparsekern.progress import Progress

Run = TypeVar("Run")


def study(options: ToyOptions, output: Path, progress: bool = True) -> list[Path]:
    """Run all toys and write the page; returns its files."""
    options = options.resolved()
    new_axes()  # a missing matplotlib is found before the training
    page = Page(output, "What sparse autoencoders do where the truth is known")
    page.text(
        "Each section makes data of features that are known, trains small sparse autoencoders on them, and compares "
        "what they have learned with the truth. Real features are not known: what goes wrong here can go wrong there "
        "without being seen.",
        f"Seeds {options.seed} to {options.seed + options.seeds - 1}, where a section does not say otherwise; a seed "
        "draws directions, weights and tokens.",
        HOW_TO_READ,
    )
    sections: list[Callable[[Page, ToyOptions], None]] = [_law, _manifold, _absorption, _hedging, _wrong_l0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with matrices this small a second thread costs more than it does
    try:
        with Progress("toys", len(sections), unit="toys", shown=progress) as bar:
            for done, section in enumerate(sections, start=1):
                section(page, options)
                bar.update(done)
        if options.bigrams:
            _bigrams(page, options, progress)
    finally:
        torch.set_num_threads(threads)
    page.section("What this cannot tell")
    page.text(
        "- Whether a real model has such features: the toys show what a loss does with them if it has.\n"
        "- Features here are few, independent but for what a section plants, and orthogonal or random. Interference "
        "of many at once is not in them.\n"
        "- Short trainings of small SAEs. Where a loss has several minima, which one is found depends on the start; "
        "the sections say where it started."
    )
    return page.write(options)


def _law(page: Page, options: ToyOptions) -> None:
    page.section("When does a latent of its own pay for a pair?")
    page.text(
        "A token is a topic in a context: the sum of one of four topic directions and one of two context directions. "
        "An SAE can have a latent for each of the six *parts*, two active a token, or for each of the eight *pairs*, "
        "one active. With a penalty λ on the sum of the codes a pair saves 0.586 λ a token, so the predicted law is: "
        "pairs as soon as there are latents for them. Lines are the law (bands where it leaves a choice), dots what "
        "was trained; TopK has no penalty."
    )
    kinds = {"dictionaries": "from the parts and from the pairs, the better kept", "random": "from random rows"}
    found = {
        start: toy.splitting_law(options.seed, start=start, steps=options.law_steps, n_null=options.n_null)
        for start in kinds
    }
    figure, panels = new_panels(len(kinds), width=5)
    for axes, (start, title) in zip(panels, kinds.items(), strict=True):
        found[start].plot(axes).set_title(title, fontsize=10)
    page.picture("law", figure, f"Latents that stand for a pair, by width and penalty, seed {options.seed}")
    for start, title in kinds.items():
        page.text(f"*{title[:1].upper()}{title[1:]}*:", *(f"- {sentence(r)}" for r in found[start].results.values()))
    rows = []
    for cell in found["dictionaries"].to_records():
        least, most = cell["predicted"]
        law = f"{least}" if least == most else f"{least}–{most}"
        counts = "/".join(str(cell[name]) for name in ("topic", "context", "composite"))
        loss, predicted = cell["loss"], cell["predicted_loss"]
        rows.append([cell["penalty"], str(cell["width"]), counts, law, f"{loss:.3f}", f"{predicted:.3f}"])
    page.table(
        ["loss", "latents", "topics/contexts/pairs", "pairs by the law", "loss reached", "loss by the law"], rows
    )
    page.record(law={start: {"results": one.results, "cells": one.to_records()} for start, one in found.items()})


def _manifold(page: Page, options: ToyOptions) -> None:
    runs = _seeds(options, toy.manifold_or_finite, steps=options.manifold_steps, n_null=2)
    page.section("One continuous feature, or many related ones?")
    page.text(
        "Twelve points on a circle are twelve features; the whole circle is one continuous feature. As the SAE gets "
        "wider its loss stops falling at twelve latents if there are twelve features, a *knee*, and a circle could "
        "always be tiled more finely. The number is what is left at twelve latents of the excess over the least "
        "possible loss, in units of the excess at the smallest width; the null is the same for uniform circles."
    )
    page.picture(
        "manifold", runs[0].plot(), f"Loss by width for points of a circle and for all of it, seed {options.seed}"
    )
    page.text(
        *(f"- Seed {options.seed + i}: {sentence(r)}" for i, run in enumerate(runs) for r in run.results.values())
    )
    page.record(manifold=[run.results for run in runs])


def _absorption(page: Page, options: ToyOptions) -> None:
    steps = options.absorption_steps
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "tied weights": {"tied": True},
        "matryoshka": {"matryoshka": True, "prefixes": [1, 2]},
    }
    runs = {
        kind: _seeds(options, toy.absorption, steps=steps, n_null=options.n_null, **more)
        for kind, more in kinds.items()
    }
    page.section("Does a child's latent absorb its parent?")
    page.text(
        "Two features: a child that is active only where its parent is. An SAE saves activity when the child's latent "
        "writes both and the parent's latent is told not to fire: its activations then have *holes*, and who looks for "
        "the parent by its latent misses it. Trained from the true features with an L1 penalty.",
        "*Holes*: how much more often the parent's latent is silent where the child is active. *Parent's encoder*: "
        "cosine of what the parent's latent reads with the child, negative where it is told not to fire. *Child's "
        "decoder*: cosine of what the child's latent writes with the parent. In brackets the most extreme of the "
        "nulls.",
    )
    names = ("holes", "parent_encoder", "child_decoder")
    rows = [
        [kind, *(_extreme([run.scores.results[name] for run in group]) for name in names)]
        for kind, group in runs.items()
    ]
    page.table(["SAE", "holes", "parent's encoder", "child's decoder"], rows)
    page.text(
        f"All cosines of seed {options.seed}, decoder left, encoder right; rows are latents, columns features "
        "(parent, child):",
        "\n".join(
            f"- {kind}: {_matrix(group[0].scores.decoder)} · {_matrix(group[0].scores.encoder)}"
            for kind, group in runs.items()
        ),
    )
    page.record(absorption={kind: [run.scores.results for run in group] for kind, group in runs.items()})


def _hedging(page: Page, options: ToyOptions) -> None:
    runs = {
        name: _seeds(options, toy.hedging, hierarchical=hierarchical, n_null=options.n_null)
        for name, hierarchical in (("child needs the parent", True), ("independent child", False))
    }
    page.section("One latent for two features: does it hedge?")
    page.text(
        "An SAE with a single latent, which starts as the parent. Where the child comes with the parent, writing "
        "some of the child with every parent lowers the error: the latent *hedges*. Where the child is independent "
        "there is nothing to gain, and the decoder's bias takes up its mean. The hedging rate is how far the latent "
        "moves when a second one is added that takes the child over, less what random directions would give."
    )
    names = ("child_in_latent", "child_in_bias", "hedging_rate")
    rows = [
        [kind, *(_extreme([run.scores.results[name] for run in group]) for name in names)]
        for kind, group in runs.items()
    ]
    page.table(["features", "child in the latent (cosine)", "child in the bias", "hedging rate"], rows)
    page.text("In brackets the most extreme sample of the nulls.")
    page.record(hedging={kind: [run.scores.results for run in group] for kind, group in runs.items()})


def _wrong_l0(page: Page, options: ToyOptions) -> None:
    cases = [(k, correlation) for k in (2.0, 1.8) for correlation in (0.4, -0.4)]
    runs = {
        case: _seeds(options, toy.wrong_l0, k=case[0], correlation=case[1], n_null=options.n_null) for case in cases
    }
    page.section("What a wrong number of active latents does")
    page.text(
        "Five features, two active on average; one of them, f0, is correlated with the others. A BatchTopK SAE of the "
        "true k = 2 and one of 1.8, both from the true features. With too few latents a token the others take up some "
        "of f0 (or of its opposite, where they avoid it): the dictionary is wrong though the loss is low."
    )
    rows = []
    for (k, correlation), group in runs.items():
        results = [run.scores.results for run in group]
        mixed = _extreme([result["f0_in_others"] for result in results])
        match = ", ".join(f"{result['decoder_match'].value:.3f}" for result in results)
        rows.append([f"{k:g}", f"{correlation:+g}", mixed, match, ", ".join(f"{run.fvu:.4f}" for run in group)])
    page.table(["k", "correlation", "f0 in the others (cosine)", "match with the features", "FVU"], rows)
    page.text(
        "In brackets the most extreme sample of the nulls: another feature in the place of f0, random dictionaries."
    )
    page.record(wrong_l0={f"k={k:g}, {c:+g}": [run.scores.results for run in group] for (k, c), group in runs.items()})


def _bigrams(page: Page, options: ToyOptions, progress: bool) -> None:
    run = toy.bigram_splitting(
        options.seed, worlds=options.seeds, steps=options.bigram_steps, n_null=options.n_null, progress=progress
    )
    page.section("Does it matter what the features are for?")
    page.text(
        "A small network reads a token in a context and predicts an output. What a token means for the output agrees "
        "between contexts as much as ρ says: at ρ = 1 the context changes nothing, at 0 a token means something else "
        "in each. SAEs are trained on the network's hidden layer. A latent is *composite* if it stands for a token "
        "in a context rather than for a token or a context.",
    )
    page.picture("bigrams", run.plot(), "Share of composite latents by how much outputs agree between contexts")
    page.picture("bigrams_kl", run.plot_kl(), "What it does to the network's output when a composite is replaced")
    trends = [run.results[name] for name in ("composites", "mass", "kl", "kept") if name in run.results]
    page.text(
        "The second picture replaces what a composite writes by the best multiple of its token's direction, in the "
        "network, and counts the nats of KL divergence of the output. Trends: the number at the largest ρ less that at "
        "the smallest.",
        *(f"- {sentence(result)}" for result in trends),
        markdown(trends),
        "Nobody has published these numbers for such toys.",
    )
    page.record(bigrams={"results": run.results, "cells": run.to_records()})


def _seeds(options: ToyOptions, experiment: Callable[..., Run], **more: Any) -> list[Run]:
    return [experiment(seed, **more) for seed in range(options.seed, options.seed + options.seeds)]


def _extreme(results: list[Result]) -> str:
    """The values of all seeds, and of all their nulls the sample that is furthest out on the side of the values."""
    values = [result.value for result in results]
    nulls = torch.cat([numbers.double() for result in results for numbers in result.nulls.values()])
    shown = ", ".join(_hundredths(value) for value in values)
    nulls = nulls[~nulls.isnan()]
    furthest = nulls.max if sum(values) >= 0 else nulls.min
    return f"{shown} ({_hundredths(float(furthest()))})" if len(nulls) else shown


def _matrix(table: Tensor) -> str:
    return "; ".join(" ".join(_hundredths(number) for number in row) for row in table.tolist())


def _hundredths(number: float) -> str:
    return f"{round(number, 2) + 0.0:.2f}"  # never −0.00

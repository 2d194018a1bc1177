"""The study of feature splitting: which latents a wider SAE has for one of a narrower, and what makes them differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsekern.analysis.results import Result, markdown, new_axes, new_panels, null_generator, samples
from sparsekern.analysis.routing import kmeans
from sparsekern.analysis.splitting import (
    SplitMap,
    factor_directions,
    parallelogram,
    project_out,
    split_map,
    split_offsets,
    why_not_found,
)
from sparsekern.analysis.studies.options import SplittingOptions
from sparsekern.analysis.studies.page import HOW_TO_READ, Page, sentence
from sparsekern.analysis.studies.saes import Trained, TrainedSAEs, train_saes
from sparsekern.analysis.tokens import HeldOut
from sparsekern.data import ActivationStore
from sparsekern.progress import Progress

_LEAST = 5  # tokens on which a child must be active to have a topic
_PARENTS = 8  # shown with their children
_CHILDREN = 4  # shown of each
_METHODS = ("pca", "nmf", "sae")  # ICA explains what PCA does
_FACTORS = 8  # directions of a decomposition


def study(store: ActivationStore, options: SplittingOptions, output: Path, progress: bool = True) -> list[Path]:
    """Train or load SAEs of several widths, map which latents split into which, and write the page; returns its files.

    Raises
    ------
    ValueError
        If the folder of the SAEs has some of other options, and for fewer than two widths.
    """
    options = options.resolved(store.d, output)
    if options.latents is None or len(options.latents) < 2:
        raise ValueError("latents must name two widths at least: splitting is between a narrower and a wider SAE")
    new_axes()  # a missing matplotlib is found before the training
    trained = train_saes(store, options, progress)
    page = Page(output, "Which latents split, and into what?")
    page.text(
        "A wide sparse autoencoder often has several latents where a narrow one has one: one for a word, then one for "
        "that word in mathematics and one for it in physics. This page asks how many latents split, into what, and "
        "whether different latents are split by the *same* directions.",
        trained.setting(store, options),
        HOW_TO_READ,
    )
    page.section("The SAEs")
    page.table(*trained.table())
    maps = _maps(page, trained, options, progress)
    small, large = trained.widths[-2:]
    _examples(page, store, trained, maps[small, large])
    found = _topics(page, trained, maps[small, large], options)
    if found is not None:
        _factors(page, found, options, progress)
        _missing(page, trained, found, options)
    page.section("What this cannot tell")
    page.text(
        "- A cosine between two decoder rows is not the same as firing on the same tokens: a child can be near its "
        "parent and respond to something else.\n"
        "- A child belongs to every parent that it is near enough to; the threshold is a choice, and the numbers move "
        "with it.\n"
        "- The topics are clusters of contexts that k-means made of these activations. Other topics would give other "
        "offsets, and a topic that shifts all activations of its contexts is shared for that reason alone: compare "
        "with the activations themselves.\n"
        "- Nobody has published such a test of parallelograms between latents: there is no number to compare with."
    )
    return page.write(options, store)


def _maps(
    page: Page, trained: TrainedSAEs, options: SplittingOptions, progress: bool
) -> dict[tuple[int, int], SplitMap]:
    """Each width to the next, for every seed; nulls, and the maps that are returned, for the first."""
    steps = list(zip(trained.widths, trained.widths[1:], strict=False))
    maps: dict[tuple[int, int], SplitMap] = {}
    values: dict[tuple[int, int], list[dict[str, Result]]] = {step: [] for step in steps}
    with Progress("maps", len(steps) * options.seeds, unit="maps", shown=progress) as bar:
        for step in steps:
            for seed in range(options.seeds):
                rows = [one.sae.W_dec.detach() * one.alive[:, None] for one in _pair(trained, step, seed)]
                n_null = options.n_costly if seed == 0 else 0
                found = split_map(*rows, cos=options.cos, n_null=n_null, seed=options.seed)
                maps.setdefault(step, found)
                values[step].append(found.results)
                bar.update(sum(len(some) for some in values.values()))
    page.section("Who splits")
    names = {"split": "latents that split", "placed": "with a parent", "best_cosine": "mean largest cosine"}
    rows_ = [
        [f"{small:,} → {large:,}", *(_cell([found[name] for found in values[small, large]]) for name in names)]
        for small, large in steps
    ]
    page.table(["widths", *names.values()], rows_)
    page.text(
        "A latent of the wider SAE is a **child** of those of the narrower one whose direction is within a cosine of "
        f"{options.cos:g} of its own. *Latents that split*: share of the narrower SAE's latents with two children at "
        "least; *with a parent*: share of the wider one's. Every cell has the values of all pairs of seeds and in "
        "brackets the highest sample of the nulls: the coordinates of each row of the wider SAE permuted, and random "
        "directions with their second moment. Latents that are active on no held-out token take no part. The two "
        "SAEs of a pair have different seeds, because those of one seed start from the same random rows."
    )
    figure, panels = new_panels(len(steps), width=5)
    for axes, step in zip(panels, steps, strict=True):
        maps[step].plot(axes).set_title(f"{step[0]:,} → {step[1]:,} latents", fontsize=10)
    page.picture("children", figure, "How many children a latent of the narrower SAE has, beside the mean of the nulls")
    page.record(maps={f"{small}-{large}": found for (small, large), found in values.items()})
    return maps


def _cell(results: list[Result]) -> str:
    values = ", ".join(f"{result.value:.3f}" for result in results)
    return f"{values} ({max(numbers.max() for numbers in results[0].nulls.values()):.3f})"


def _pair(trained: TrainedSAEs, step: tuple[int, int], seed: int = 0) -> tuple[Trained, Trained]:
    """A narrower and a wider SAE, of different seeds: those of one seed start from the same random rows."""
    narrow, wide = (trained.by_width[width] for width in step)
    return narrow[seed], wide[(seed + 1) % len(wide)]


def _examples(page: Page, store: ActivationStore, trained: TrainedSAEs, found: SplitMap) -> None:
    if not (trained.held_out.tokens >= 0).any():
        return
    small, large = _pair(trained, (trained.widths[-2], trained.widths[-1]))
    parents = (found.n_children >= 2).nonzero().squeeze(1)
    parents = parents[small.density[parents] * len(trained.held_out.x) >= _LEAST]
    parents = parents[small.density[parents].argsort(descending=True, stable=True)]
    count = min(_PARENTS, len(parents))
    rows = []
    for parent in parents[((torch.arange(count) + 0.5) * len(parents) / max(1, count)).long()].tolist():
        children = found.children(parent)
        told = "; ".join(large.words(store, trained.held_out, child) for child in children[:_CHILDREN].tolist())
        rows.append([str(parent), small.words(store, trained.held_out, parent), str(len(children)), told])
    page.section("Some latents and their children")
    page.table(["latent", "words of its strongest tokens", "children", f"those of the nearest {_CHILDREN}"], rows)
    page.text("Parents evenly spaced by frequency, first pair of seeds, between the two widest SAEs.")


class _Offsets(NamedTuple):
    """Offsets of children from their parents, by topic."""

    offsets: Tensor  # [P, T, d], NaN where a parent has no child of the topic
    by_topic: Tensor  # [T], how alike those of a topic are


def _topics(page: Page, trained: TrainedSAEs, found: SplitMap, options: SplittingOptions) -> _Offsets | None:
    """Whether a topic moves every parent in the same direction."""
    page.section("Does a topic move every latent in the same direction?")
    held_out = trained.held_out
    topics = _topics_of(held_out, options)
    small, large = _pair(trained, (trained.widths[-2], trained.widths[-1]))
    children = _children_by_topic(found, large, topics, options.topics)
    kept = _frequent((children >= 0).sum(1) >= 2, small.density, options.parents)
    if int(kept.sum()) < 2:
        page.text("Too few latents have children of different topics to tell.")
        return None
    rows, parents = large.sae.W_dec.detach(), small.sae.W_dec.detach()
    offsets = _offsets_of(rows, parents, children[kept], kept.nonzero().squeeze(1))
    try:
        measured = parallelogram(offsets, n_null=options.n_null, seed=options.seed)
    except ValueError as error:  # no topic that two parents have
        page.text(f"There is nothing to compare: {error}.")
        return None
    generator = null_generator(options.seed)
    drawn: list[dict[str, Result]] = []
    for _ in range(options.n_null):
        shuffled = _permuted_contexts(topics, held_out.contexts, generator)
        again = _children_by_topic(found, large, shuffled, options.topics)
        some = _frequent((again >= 0).sum(1) >= 2, small.density, options.parents)
        drawn.append(
            parallelogram(_offsets_of(rows, parents, again[some], some.nonzero().squeeze(1)), n_null=0).results
        )
    controls = parallelogram(_offsets_of_tokens(held_out.x, small, topics, kept, options.topics), n_null=0).results
    results = {
        name: dataclasses.replace(
            result,
            nulls={**result.nulls, "topics of contexts permuted": samples(one[name].value for one in drawn)},
            controls={"activations themselves": samples([controls[name].value])},
        )
        for name, result in measured.results.items()
    }
    counts = torch.bincount(topics, minlength=options.topics)
    page.text(
        f"The contexts were put into {options.topics} topics by k-means of their mean activations "
        f"({int(counts.min()):,} to {int(counts.max()):,} tokens a topic). A child's topic is the one that its tokens "
        "have more of than its parent's, and **offset** is what the child's direction has that its parent's has not. "
        f"Here are the {int(kept.sum())} most frequent latents that have children of two topics or more, with "
        f"{int((children[kept] >= 0).sum())} offsets in all. If a topic moves every latent in the same direction, "
        "offsets of one topic under different latents are alike, and parents and children are corners of "
        "parallelograms: the **gap**, the cosine of offsets of the same topic less that of different ones, is above "
        "0.",
        "Nulls: the topics permuted among a parent's children; each parent's offsets turned at random; and the topics "
        "permuted among the contexts, with children chosen anew. Control: the same for the activations themselves, the "
        "mean over a parent's tokens of one topic less the mean over all its tokens.",
        sentence(results["gap"]),
        markdown(results.values()),
    )
    page.picture("topics", measured.plot(), "How alike the offsets of each topic are under different latents")
    page.record(topics=results)
    return _Offsets(offsets, measured.by_topic)


def _frequent(chosen: Tensor, density: Tensor, most: int) -> Tensor:
    """The most frequent of the chosen latents, as a mask like `chosen`."""
    order = torch.where(chosen, density, -1.0).argsort(descending=True, stable=True)[:most]
    return torch.zeros_like(chosen).index_fill_(0, order, True) & chosen


def _topics_of(held_out: HeldOut, options: SplittingOptions) -> Tensor:
    """A topic for each token: the cluster of its context's mean activation, ``[B]`` int64."""
    _, which, counts = held_out.contexts.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), held_out.x.shape[1]).index_add_(0, which, held_out.x) / counts[:, None]
    clusters = kmeans(normalize(means - means.mean(0), dim=1), min(options.topics, len(means)), options.seed)[0]
    return clusters[which]


def _permuted_contexts(topics: Tensor, contexts: Tensor, generator: torch.Generator) -> Tensor:
    """The topics of the contexts in another order."""
    _, which = contexts.unique(return_inverse=True)
    of_context = torch.zeros(int(which.max()) + 1, dtype=torch.int64).index_copy_(0, which, topics)
    return of_context[torch.randperm(len(of_context), generator=generator)][which]


def _tokens_by_topic(one: Trained, topics: Tensor, n_topics: int) -> Tensor:
    """On how many tokens of each topic each latent is active, ``[d_sae, T]``."""
    tokens, slots = (one.codes.values > 0).nonzero(as_tuple=True)
    place = one.codes.indices[tokens, slots].long() * n_topics + topics[tokens]
    return torch.bincount(place, minlength=one.sae.d_sae * n_topics).view(-1, n_topics).double()


def _children_by_topic(found: SplitMap, large: Trained, topics: Tensor, n_topics: int) -> Tensor:
    """For each latent of the small SAE the child of each topic, ``[d_small, T]`` int64; −1 where there is none.

    A child's topic is the one with the largest ratio of its share among the child's tokens to that among the tokens of
    all children of the parent. Of several with one topic that with more tokens is the topic's.
    """
    counts = _tokens_by_topic(large, topics, n_topics)[found.child]
    of_parent = torch.zeros(len(found.n_children), n_topics, dtype=torch.float64).index_add_(0, found.parent, counts)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    usual = (of_parent / of_parent.sum(1, keepdim=True).clamp(min=1))[found.parent]
    topic = (share / usual.clamp(min=1e-12)).argmax(1)
    told = counts.sum(1) >= _LEAST
    order = counts.sum(1).argsort(stable=True)  # rare ones first: the most frequent is written last
    children = torch.full((len(found.n_children), n_topics), -1)
    for edge in order[told[order]].tolist():
        children[found.parent[edge], topic[edge]] = found.child[edge]
    return children


def _offsets_of(rows: Tensor, parents: Tensor, children: Tensor, which: Tensor) -> Tensor:
    """Offsets ``[P, T, d]`` of the children ``[P, T]``, NaN where there is none."""
    there = normalize(rows, dim=1)[children.clamp(min=0)].masked_fill((children < 0)[:, :, None], torch.nan)
    return split_offsets(parents[which], there)


def _offsets_of_tokens(x: Tensor, small: Trained, topics: Tensor, kept: Tensor, n_topics: int) -> Tensor:
    """The same for means of activations: of a latent's tokens of one topic, less that of all its tokens."""
    latents = kept.nonzero().squeeze(1)
    tokens, slots = (small.codes.values > 0).nonzero(as_tuple=True)
    place = torch.full((small.sae.d_sae,), -1).index_copy_(0, latents, torch.arange(len(latents)))
    parent = place[small.codes.indices[tokens, slots].long()]
    tokens, parent = tokens[parent >= 0], parent[parent >= 0]
    cell = parent * n_topics + topics[tokens]
    counts = torch.bincount(cell, minlength=len(latents) * n_topics).view(-1, n_topics)
    sums = torch.zeros(len(latents) * n_topics, x.shape[1]).index_add_(0, cell, x[tokens]).view(*counts.shape, -1)
    overall = sums.sum(1) / counts.sum(1, keepdim=True).clamp(min=1)
    offsets = sums / counts.clamp(min=1)[:, :, None] - overall[:, None]
    return offsets.masked_fill((counts < _LEAST)[:, :, None], torch.nan)


def _factors(page: Page, found: _Offsets, options: SplittingOptions, progress: bool) -> None:
    """What the offsets have in common, whatever the topics."""
    there = ~found.offsets.isnan().any(2)
    rows = found.offsets[there]
    r = min(_FACTORS, len(rows) - 1, rows.shape[1])
    results: dict[str, Result] = {}
    with Progress("factors", len(_METHODS), unit="decompositions", shown=progress) as bar:
        for method in _METHODS:
            factors = factor_directions(rows, method, r, n_null=options.n_costly, seed=options.seed)
            results[method] = factors.results["explained"]
            bar.update(len(results))
    topics = torch.arange(there.shape[1]).expand_as(there)[there]
    page.section("Are there a few directions along which latents split?")
    page.text(
        f"The {len(rows)} offsets, decomposed into {r} directions: the share of their variance that these explain. "
        "Where splitting follows a few directions it is much above the nulls, random rows of these lengths and columns "
        "permuted, each decomposed again. PCA explains the most that a linear method can; the SAE (one active latent a "
        "row) and NMF, whose parts only add up, explain less, of directions that are easier to read.",
        markdown(results.values()),
    )
    page.record(factors=results)
    if not 2 <= len(topics.unique()) < len(topics):
        return
    told = project_out(rows, labels=topics, n_null=options.n_costly, seed=options.seed).results["silhouette"]
    page.text(
        "Discriminant analysis looks for directions that tell the topics apart and drops the rest. It always finds "
        "some, so the null is fitted again to permuted topics, and only what goes beyond it is in the data: "
        f"{sentence(told)}"
    )
    page.record(discriminants=told)


def _missing(page: Page, trained: TrainedSAEs, found: _Offsets, options: SplittingOptions) -> None:
    """Why the SAE has no latent for the topic whose offsets agree best."""
    narrow = trained.by_width[trained.widths[-2]][0]
    topic = int(found.by_topic.nan_to_num(-2).argmax())
    direction = found.offsets[:, topic].nanmean(0)
    nearest = float(torch.cosine_similarity(narrow.sae.W_dec.detach(), direction[None]).max())
    order = torch.randperm(len(trained.held_out.x), generator=torch.Generator().manual_seed(options.seed))
    why = why_not_found(
        narrow.sae,
        trained.held_out.x[order],
        direction,
        steps=options.refit_steps,
        lr=options.lr,
        n_null=options.n_costly,
        seed=options.seed,
    )
    meaning = {
        "optimisation": "the loss falls, and by more than with any random direction: training had missed it",
        "width": "the loss falls, but as much as with random directions: any latent more would do",
        "sparsity": "the loss does not fall: with this loss the SAE is better off without it",
    }
    page.section("Why has the SAE no latent for a shared direction?")
    page.text(
        f"The mean offset of topic {topic}, the one whose offsets agree best (mean cosine "
        f"{found.by_topic[topic]:.2f}), is a direction that splits several latents. The nearest latent of the SAE of "
        f"{trained.widths[-2]:,} has a cosine of {nearest:.2f} with it. That SAE was trained on for "
        f"{options.refit_steps:,} steps with a latent that starts as this direction, and without. Verdict: "
        f"**{why.verdict}**, {meaning[why.verdict]}. The latent is active on {why.density:.2%} of the tokens. It is "
        "trained on, and measured on, parts of the held-out tokens.",
        markdown(why.results.values()),
    )
    page.record(why_not_found={"verdict": why.verdict, "density": why.density, "topic": topic, **why.results})

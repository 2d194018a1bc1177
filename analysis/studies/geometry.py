"""The study of geometry: how many dimensions codes fill, what shapes there are, how latents stand to each other."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.geometry import (
    AblationCurve,
    CircleSearch,
    HelixFit,
    ImplicationGraph,
    OneSpaceOrMany,
    capacity,
    ce_curve,
    cluster_search,
    dictionary_clusters,
    fourier_power,
    fvu_curve,
    helix_fit,
    hierarchical_orthogonality,
    implication_graph,
    one_space_or_many,
    pca_spectrum,
    subspace_clusters,
    union_of_subspaces,
    word_groups,
    word_points,
)
from sparsekern.analysis.results import Result, markdown, new_axes, new_panels, null_generator
from sparsekern.analysis.studies.harvested import Harvested
from sparsekern.analysis.studies.options import GeometryOptions
from sparsekern.analysis.studies.page import HOW_TO_READ, Page, token_text
from sparsekern.analysis.studies.saes import Trained, TrainedSAEs, train_saes
from sparsekern.analysis.tokens import over_represented
from sparsekern.data import ActivationStore
from sparsekern.progress import Progress

_FITTED = 0.75  # share of the held-out tokens that principal components are of; curves are of the rest
_CE_TOKENS = 5000  # places in contexts that the cross-entropy is measured on, about
_COSINES = (0.5, 0.4)  # above which rows are neighbours; the first is the published one
_POINTS = 2000  # tokens of a group that are looked at, at most
_PLANES = 3  # clusters that are drawn
_DOTS = 1500  # tokens in a picture
_NAMED = 5  # tokens that are named in it
_CERTAIN = (0.95, 0.8)  # least shares of a child's tokens on which its parent is active; the first is the published one
_EDGES = 12  # that are told
_ROWS = 1000  # of a decoder, that subspaces are looked for in
_RANDOM_GROUPS = (3, 3, 12)  # parents, children of each, tokens of each child
_SERIES = {
    "weekdays": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "digits": "0 1 2 3 4 5 6 7 8 9",
    "number words": "zero one two three four five six seven eight nine",
    "letters": "a b c d e f g h i j k l",
}
_TEMPLATES = ("It was {}.", "See {} below.", "The word {} is here.", "We had {} then.", "Only {} and no other.")
_PERIODS = (2.0, 5.0, 10.0)  # of 0 to 99, that divide it often enough to be told from an open curve

_SPACE, _LINE = "Ġ", "Ċ"  # in vocabularies of bytes

_NO_MODEL = "This part asks a model about words, and the activations were imported: their model is not known."


def study(store: ActivationStore, options: GeometryOptions, output: Path, progress: bool = True) -> list[Path]:
    """Train or load the SAEs, measure, and write the page, its pictures and the record into `output`; returns them.

    Raises
    ------
    ValueError
        If the folder of the SAEs has some of other options, or the store's model now gives other activations.
    """
    options = options.resolved(store.d, output)
    new_axes()  # a missing matplotlib is found before the training
    trained = train_saes(store, options, progress)
    known = store.source.get("model") is not None and store.source.get("hook") is not None
    harvested = Harvested.of(store, trained.held_out) if known else None
    work = _Study(Page(output, "The geometry of codes and dictionary"), store, options, trained, harvested, progress)
    work.page.text(
        "A sparse autoencoder (SAE) writes an activation as a sum of a few rows of its dictionary, each times a number "
        "of its own; these numbers are the token's **code**. This page asks how many dimensions the codes fill, "
        "whether some features have two dimensions rather than one, whether numbers and days lie on circles, which "
        "latents are active only where others are, whether concepts inside concepts can be seen, and whether the "
        "dictionary is one space or several.",
        trained.setting(store, options),
        HOW_TO_READ,
    )
    if any(piece.startswith(_SPACE) for piece in store.vocab or ()):
        work.page.text(f"In tokens {_SPACE} stands for a space and {_LINE} for a new line.")
    work.page.section("The SAEs")
    work.page.table(*trained.table())
    parts = (_dimensions, _circles, _words, _implications, _hierarchies, _spaces, _room)
    findings = []
    with Progress("geometry", len(parts), unit="parts", shown=progress) as bar:
        for done, part in enumerate(parts, start=1):
            findings += part(work)
            bar.update(done)
    work.page.short(findings)
    _end(work)
    return work.page.write(options, store)


@dataclasses.dataclass(frozen=True, eq=False)
class _Study:
    """What every section needs."""

    page: Page
    store: ActivationStore
    options: GeometryOptions
    trained: TrainedSAEs
    harvested: Harvested | None
    progress: bool

    @property
    def saes(self) -> dict[str, Trained]:
        """All SAEs under names for tables."""
        groups = self.trained.by_width
        return {f"{width:,}, seed {one.seed}": one for width, group in groups.items() for one in group}

    def words(self, one: Trained, latent: int) -> str:
        return one.words(self.store, self.trained.held_out, latent)


# Dimensions


def _dimensions(work: _Study) -> list[str]:
    page, options = work.page, work.options
    x, d = work.trained.held_out.x, work.store.d
    cut = max(2, int(_FITTED * len(x)))
    page.section("How many dimensions do the codes fill?")
    spectra = {
        name: pca_spectrum(
            sk.SparseCodes(one.codes.values[:cut], one.codes.indices[:cut], one.codes.d_sae),
            2 * d,
            n_null=options.n_costly,
            seed=options.seed,
        )
        for name, one in work.saes.items()
    }
    page.text(
        f"The covariance of the codes of {cut:,} tokens has an eigenvalue for each principal component, the variance "
        "along it. *Participation ratio* and *entropy rank* count how many components matter, the first by the large "
        "ones; *99%* is how many it takes for that share of the variance. In brackets, the same with each latent's "
        "values dealt out to other tokens, which keeps how often and how strongly each is active, and takes away "
        "what goes together: fewer dimensions than that is structure."
    )
    page.table(
        ["latents", "active", "participation ratio", "entropy rank", "components with 99%"],
        (
            [
                name,
                f"{int(work.saes[name].alive.sum()):,}",
                *(_beside(found.results[key], "{:,.0f}") for key in ("participation", "entropy_rank", "q99")),
            ]
            for name, found in spectra.items()
        ),
    )
    name, first = next(iter(spectra.items()))
    sae = work.saes[name].sae
    page.picture("spectrum", first.plot(), f"Variance beyond the first q principal components; {name}")
    most = min(len(basis.components) for basis in (first.basis, *first.null_bases))
    qs = sorted({min(q, most) for q in (max(1, d // 16), max(1, d // 4), max(1, d // 2), d, 2 * d)})
    curve = fvu_curve(first, sae, x[cut:], qs)
    page.text(
        f"**What is lost with q of them.** The codes of the other {len(x) - cut:,} tokens, with q principal components "
        f"kept and the rest dropped before they are decoded ({name}). That few dimensions are enough for the "
        f"*reconstruction* is no finding: the activations have {d} numbers, so {d} directions of it lose nothing. The "
        "control shows that. FVU is the share of the variance that is not explained."
    )
    page.table(["q", "FVU", "components of permuted codes", "components of the reconstruction"], _curve_rows(curve))
    page.text(f"With all of the code FVU is {curve.full:.3f}.")
    page.picture("fvu", curve.plot(), "FVU with q principal components of the codes; dashed: the whole code")
    page.record(
        spectrum={key: found.results for key, found in spectra.items()}, fvu_curve=curve.results, fvu=curve.full
    )
    ranks = [found.results["entropy_rank"] for found in spectra.values()]
    findings = [
        f"**Dimensions.** By entropy the codes fill {_list((rank.value for rank in ranks), ',.0f')} dimensions, "
        f"{_list((rank.value / float(rank.null.mean()) for rank in ranks), '.2f')} of what permuted codes fill. With "
        f"{qs[-2]} of their components FVU is {float(curve.values[-2]):.3f} instead of {curve.full:.3f}, and "
        f"{float(curve.results[str(qs[-2])].null.mean()):.3f} with those of permuted codes."
    ]
    if work.harvested is None:
        return findings
    if not work.harvested.causal:
        page.text("The model does not predict the next token, so that there is no cross-entropy to measure.")
        return findings
    ce = ce_curve(first, sae, work.harvested.model, work.harvested.hook, _later(work.harvested, cut), qs)
    clean, mean = (float(ce.results[str(qs[0])].controls[key]) for key in ("model as it is", "mean ablation"))
    page.text(
        f"**The same, measured by what the model predicts.** Its cross-entropy on contexts of these tokens, in nats, "
        f"with the projected reconstruction in the place of `{work.harvested.hook}`. As it is the model has "
        f"{clean:.3f}, with all of the code {ce.full:.3f}, with the mean activation everywhere {mean:.3f}."
    )
    page.table(["q", "cross-entropy", "components of permuted codes"], (row[:3] for row in _curve_rows(ce)))
    page.picture("ce", ce.plot(), "Cross-entropy with q principal components of the codes; dashed: the whole code")
    page.record(ce_curve=ce.results, ce=ce.full)
    first_result, lost = ce.results[str(qs[-2])], mean - ce.full
    return [
        *findings,
        f"**Cross-entropy.** With {qs[-2]} components the model has {first_result.value:.3f} nats instead of "
        f"{ce.full:.3f} with the whole code, which is {(first_result.value - ce.full) / lost:.0%} of what the mean "
        f"activation would cost; with components of permuted codes {float(first_result.null.mean()):.3f}.",
    ]


def _curve_rows(curve: AblationCurve) -> list[list[str]]:
    return [
        [q, f"**{result.value:.3f}**", _samples(result.null, "{:.3f}"), _samples(_last(result.controls), "{:.3f}")]
        for q, result in curve.results.items()
    ]


def _later(harvested: Harvested, cut: int) -> list[dict[str, Tensor]]:
    """Batches of contexts after the first `cut` tokens; the last one where there are none."""
    start, places, found = 0, 0, []
    for batch in harvested.batches:
        if start >= cut and places < _CE_TOKENS:
            found.append(batch)
            places += int(batch["attention_mask"].sum())
        start += int(harvested.rows(batch).sum())
    return found or harvested.batches[-1:]


# Circles


def _circles(work: _Study) -> list[str]:
    page, options = work.page, work.options
    page.section("Are there features of two dimensions?")
    page.text(
        "Days of the week could lie on a circle: a feature that has an angle, not just a size. Then a group of similar "
        "latents would share its plane. Groups are what hangs together when each row of the dictionary is joined to "
        "its two nearest above a cosine. What a group writes on tokens is projected on planes of principal components, "
        "and a plane is scored by (1 − M) · S: S, in bits, is how much one coordinate tells of the other however the "
        "plane is turned (two separate features: 0), and M the share of tokens that lie on a line (features that "
        "exclude each other: 1). A circle has about 2.3, seven noisy points of one 1.1."
    )
    searches: dict[str, CircleSearch] = {}
    rows = []
    for name, one in work.saes.items():
        decoder = one.sae.W_dec.detach()
        for cosine in _COSINES:
            clusters = dictionary_clusters(decoder, cos=cosine, latents=one.alive.nonzero().squeeze(1))
            try:
                found = cluster_search(
                    decoder, one.codes, clusters, max_points=_POINTS, n_null=options.n_null, seed=options.seed
                )
            except ValueError as error:  # no cluster has enough tokens
                page.text(f"At {name} and a cosine of {cosine:g} there is nothing to look at: {error}.")
                continue
            searches[f"{name}, cosine {cosine:g}"] = found
            best = found.results["best"]
            highest = (f"{float(numbers.max()):.2f}" for numbers in best.nulls.values())
            sizes = [len(cluster) for cluster in found.clusters]
            rows.append(
                [
                    name,
                    f"{cosine:g}",
                    f"{len(sizes)} of {min(sizes)} to {max(sizes)} latents",
                    f"**{best.value:.2f}**",
                    *highest,
                    _p(best.p),
                ]
            )
    if not searches:
        return ["**Circles.** No group of latents is active on enough tokens to be looked at."]
    nulls = list(next(iter(searches.values())).results["best"].nulls)
    page.table(["latents", "cosine", "groups", "best score", *(f"{null}: highest" for null in nulls), "p"], rows)
    page.text(
        f"The nulls search again, {options.n_null} times each: *random latents* in groups of the same sizes; the same "
        "codes with a *random dictionary*, which shows what latents that exclude each other make without any "
        "geometry; and *coordinates permuted*. p is of the best group beside the best groups of the hardest null."
    )
    drawn = max(
        (name for name in searches if name.startswith(next(iter(work.saes)))),
        key=lambda name: len(searches[name].clusters),
        default=next(iter(searches)),
    )
    one = next(one for name, one in work.saes.items() if drawn.startswith(name))
    top = searches[drawn]
    page.text(f"The best groups of {drawn}:")
    page.table(
        ["latents", "words of their strongest tokens", "score", "S", "M", "mean cosine", "tokens", "p"],
        (
            [
                ", ".join(map(str, cluster.tolist()[:4])) + (" …" if len(cluster) > 4 else ""),
                "; ".join(one.words(work.store, work.trained.held_out, latent, 2) for latent in cluster.tolist()[:3]),
                f"{float(top.scores[rank]):.2f}",
                f"{float(top.separability[rank]):.2f}",
                f"{float(top.mixture[rank]):.2f}",
                f"{float(top.cosine[rank]):.2f}",
                f"{int(top.tokens[rank]):,}",
                _p(float(top.p[rank])),
            ]
            for rank, cluster in enumerate(top.clusters[:5])
        ),
    )
    page.picture(
        "planes", _plot_planes(work, one, top), f"What the best {_PLANES} groups write, in their best plane; {drawn}"
    )
    page.record(circles={name: found.results for name, found in searches.items()})
    standing = [name for name, found in searches.items() if found.results["best"].p <= 0.05]
    scores = [found.results["best"].value for found in searches.values()]
    where = f"in {_of(len(standing), len(searches), 'searches')} the best group is beyond the nulls (p ≤ 0.05)"
    return [f"**Circles.** The best groups score {min(scores):.2f} to {max(scores):.2f}; {where}."]


def _plot_planes(work: _Study, one: Trained, found: CircleSearch) -> Any:
    shown = min(_PLANES, len(found.clusters))
    figure, panels = new_panels(shown, width=4.2, height=3.9)
    decoder, tokens = one.sae.W_dec.detach(), work.trained.held_out.tokens
    for rank, axes in enumerate(panels):
        cluster, plane = found.clusters[rank], int(found.planes[rank])
        z = one.codes.values_of(cluster.tolist())
        active = (z > 0).any(1).nonzero().squeeze(1)
        points = z[active] @ decoder[cluster]
        points = points - points.mean(0)
        points = points @ torch.linalg.svd(points, full_matrices=False).Vh[plane : plane + 2].T
        ids = tokens[active]
        common = [token for token, _ in Counter(ids.tolist()).most_common(_NAMED) if token >= 0]
        for color, token in enumerate([None, *common]):
            of_token = (ids == token) if token is not None else ~torch.isin(ids, torch.tensor(common, dtype=ids.dtype))
            part = points[of_token][:_DOTS].T.tolist()
            label = "other tokens" if token is None else _plain(token_text(work.store, token))
            axes.plot(
                *part,
                "o",
                ms=3,
                mew=0,
                alpha=0.5 if token is not None else 0.3,
                color="0.6" if token is None else f"C{color - 1}",
                label=label,
            )
        axes.set_title(f"latents {', '.join(map(str, cluster.tolist()[:3]))}{' …' if len(cluster) > 3 else ''}")
        axes.set(xlabel=f"component {plane + 1}", ylabel=f"component {plane + 2}")
        axes.set_aspect("equal", adjustable="datalim")
        axes.legend(frameon=False, fontsize=7, markerscale=1.5)
    return figure


# Days, months, numbers


class _Seen(NamedTuple):
    """Vectors of words at a place in the model."""

    place: str
    last: bool
    points: dict[str, Tensor]  # [words, templates, d]


def _words(work: _Study) -> list[str]:
    page, options = work.page, work.options
    page.section("Do days and months lie on circles, and numbers on a helix?")
    if work.harvested is None:
        page.text(_NO_MODEL)
        return []
    tokenizer, causal = work.harvested.tokenizer, work.harvested.causal
    series = {name: words.split() for name, words in _SERIES.items()} | {"0 to 99": [str(n) for n in range(100)]}
    pieces = {name: [_pieces(tokenizer, word) for word in words] for name, words in series.items()}
    seen = [_seen(work, series, None, False)] if not causal else []
    seen.append(_seen(work, series, work.harvested.hook, causal))
    whole = {name: sum(len(ids) == 1 for ids in found) for name, found in pieces.items()}
    taken = (
        "A word has the activation of its last token, the only one that has seen all of it; the embeddings of this "
        "model are left out, since they are of tokens and not of words."
        if causal
        else "A word has the mean activation of its tokens."
    )
    page.text(
        f"Each word stands in {len(_TEMPLATES)} short sentences, and its point is the mean of these. {taken} Of how "
        "many the word is a single token: "
        + ", ".join(f"{name} {count} of {len(series[name])}" for name, count in whole.items())
        + ".",
        "**Circles.** In their order, points on a circle have most of their power at the *lowest frequency*, one turn "
        "over all; but so has an open curve. *Closure* tells them apart: the distance of the last point from the first "
        "over that of neighbours, near 1 where the curve comes back (its p says whether it is *more open* than the "
        "order permuted). *R², left out* predicts each word from a circle fitted to the others, beside a line.",
    )
    rows, record, findings, closed = [], {}, [], []
    for at in seen:
        for name in _SERIES:
            points = at.points[name]
            n = len(points)
            power = fourier_power(points.mean(1), n_null=10 * options.n_null, seed=options.seed)
            numbers = torch.arange(float(n)).repeat_interleave(points.shape[1])
            fit = helix_fit(
                points.flatten(0, 1),
                numbers,
                (float(n),),
                linear=False,
                n_folds=n,
                n_null=options.n_null,
                seed=options.seed,
            )
            lowest, closure, r2 = power.results["lowest"], power.results["closure"], fit.results["helix"]
            line = float(r2.controls["line"])
            rows.append(
                [
                    at.place,
                    name,
                    _beside(lowest, "{:.2f}"),
                    _p(lowest.p),
                    f"**{closure.value:.2f}**",
                    _p(closure.p),
                    _beside(r2, "{:.2f}", "numbers permuted"),
                    f"{line:.2f}",
                    _p(r2.p_values()["numbers permuted"]),
                ]
            )
            record[f"{at.place}: {name}"] = power.results | {"circle": r2}
            told = r2.value > line and r2.p_values()["numbers permuted"] <= 0.05
            if lowest.p <= 0.05 and closure.p > 0.05 and told and at is seen[-1]:
                closed.append(name)
    header = ["place", "words", "lowest frequency [order permuted]", "p", "closure", "p of being open"]
    page.table([*header, "R², left out [permuted]", "a line's", "p"], rows)
    page.picture(
        "series", _plot_series(seen[-1]), f"Words in their order on two principal components; {seen[-1].place}"
    )
    findings.append(
        f"**Days and months.** Words whose order comes back to its start at {seen[-1].place} (power at the lowest "
        "frequency with p ≤ 0.05, not open, and words left out better predicted by a circle than by a line and "
        f"than in another order): {', '.join(closed) or 'none'}, of {', '.join(_SERIES)}."
    )
    findings += _helices(work, seen, record)
    page.record(words=record)
    return findings


def _seen(work: _Study, series: dict[str, list[str]], module: str | None, last: bool) -> _Seen:
    assert work.harvested is not None
    tokenizer, model = work.harvested.tokenizer, work.harvested.model
    templates = _TEMPLATES[:1] if work.options.quick else _TEMPLATES
    points = {
        name: word_points(tokenizer, model, words, module, templates, last=last) for name, words in series.items()
    }
    return _Seen("embeddings" if module is None else f"`{module}`", last, points)


def _helices(work: _Study, seen: Sequence[_Seen], record: dict[str, Any]) -> list[str]:
    """Numbers of at most two digits."""
    assert work.harvested is not None
    page, options = work.page, work.options
    numbers = torch.arange(100.0)
    fits: dict[str, HelixFit] = {}
    rows, power_rows, gains = [], [], []
    for at in seen:
        points = at.points["0 to 99"].mean(1)
        fit = fits[at.place] = helix_fit(points, numbers, n_null=options.n_null, seed=options.seed)
        helix, gain = fit.results["helix"], fit.results["gain"]
        controls = [f"{float(numbers_):.2f}" for numbers_ in helix.controls.values()]
        other, permuted = helix.nulls["other periods"], helix.nulls["numbers permuted"]
        rows.append(
            [
                at.place,
                f"**{helix.value:.2f}**",
                f"{float(permuted.mean()):.2f}",
                _samples(other, "{:.2f}"),
                _p(helix.p_values()["other periods"]),
                *controls,
                f"{fit.fitted:.2f}",
            ]
        )
        gains.append(gain)
        power = fourier_power(points, _PERIODS, detrend=True, n_null=10 * options.n_null, seed=options.seed)
        share = power.results["periods"]
        beside = [_samples(numbers_, "{:.3f}") for numbers_ in share.nulls.values()]
        power_rows.append([at.place, f"**{share.value:.3f}**", *beside, _p(share.p)])
        record[f"{at.place}: 0 to 99"] = fit.results | {"periods": share} | {"closure": power.results["closure"]}
    first = fits[seen[-1].place].results["helix"]
    page.text(
        "**Numbers.** A helix of the numbers 0 to 99 is a line and circles of the periods 2, 5, 10 and 100 at once. R² "
        "on numbers that were left out of the fit, ten folds. *Numbers permuted* asks whether there is any order; "
        "*other periods* whether these matter; polynomials whether a smooth curve would do as well. *Fitted* is R² on "
        "the same numbers, which is what is mostly published."
    )
    page.table(
        ["place", "helix", "numbers permuted", "other periods", "p of these", *first.controls, "fitted"],
        rows,
    )
    page.text(
        f"Share of the power at the periods {_list(_PERIODS, 'g')}, after the best line:",
    )
    page.table(["place", "at the periods", *share.nulls, "p"], power_rows)
    split, units = _by_last_digit(work.harvested)
    by_token = seen[-1].last and units > split / 2 > 0
    if by_token:
        page.text(
            f"**Not a finding.** {split} of the 100 numbers are several tokens, and of {units} of these the last token "
            "is their last digit alone. The periods 10, 5 and 2 then come with the token, and tell nothing of how the "
            "model counts."
        )
    gain, others = gains[-1], first.nulls["other periods"]
    return [
        f"**Numbers.** At {seen[-1].place} a helix has an R² of {first.value:.2f} on numbers left out, a polynomial of "
        f"as many columns {first.value - gain.value:.2f}, other periods {float(others.mean()):.2f} (at most "
        f"{float(others.max()):.2f})."
        + (" But most numbers end in the token of their last digit, which has these periods by itself." * by_token)
    ]


def _by_last_digit(harvested: Harvested) -> tuple[int, int]:
    """How many of 0 to 99 are several tokens, and of how many of these the last one is their last digit alone."""
    digits = [_pieces(harvested.tokenizer, str(digit), "")[-1] for digit in range(10)]
    split = [(n, ids) for n in range(100) if len(ids := _pieces(harvested.tokenizer, str(n))) > 1]
    return len(split), sum(ids[-1] == digits[n % 10] for n, ids in split)


def _pieces(tokenizer: Any, word: str, before: str = " ") -> list[int]:
    """Tokens of a word after a space, or another text."""
    return list(tokenizer(before + word, add_special_tokens=False)["input_ids"])


def _plot_series(at: _Seen) -> Any:
    names = list(_SERIES)[:3]
    figure, panels = new_panels(len(names), width=4.2, height=3.9)
    for axes, name in zip(panels, names, strict=True):
        points = at.points[name].mean(1)
        points = points - points.mean(0)
        points = points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].T
        axes.plot(*points.T.tolist(), "o-", color="C0", lw=0.8, ms=4)
        axes.plot(*points[[-1, 0]].T.tolist(), ":", color="C0", lw=0.8)
        for word, (x, y) in zip(_SERIES[name].split(), points.tolist(), strict=True):
            axes.annotate(word, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=8)
        axes.set_title(name)
        axes.set(xticks=[], yticks=[], xlabel="component 1", ylabel="component 2")
        axes.margins(0.15)
    return figure


# Implications


def _implications(work: _Study) -> list[str]:
    page, options = work.page, work.options
    page.section("Which latents are active only where others are?")
    page.text(
        "A latent B *implies* another one A if A is active on nearly all of B's tokens, but B on at most half of A's. "
        f"Both must hold beyond doubt, with all pairs tested counted in. The published threshold is "
        f"{_CERTAIN[0]:g}; {_CERTAIN[1]:g} is a weaker one. Being active together is not enough for a hierarchy: a "
        "latent that is active everywhere is implied by all. *Hierarchical* is the share of the edges where parent and "
        "child both lower the error, and both rows are among the five of the dictionary that are nearest to what the "
        "child is about (the mean of its tokens less that of all). Its null has another parent of the same density."
    )
    graphs: dict[tuple[str, float], ImplicationGraph] = {
        (name, least): implication_graph(
            one.codes, least, sae=one.sae, x=work.trained.held_out.x, n_null=options.n_null, seed=options.seed
        )
        for name, one in work.saes.items()
        for least in _CERTAIN
    }
    rows = []
    for (name, least), found in graphs.items():
        pairs, placed, depth = (found.results[key] for key in ("implications", "placed", "depth"))
        condition = found.results["hierarchical"]
        rows.append(
            [name, f"{least:g}", f"**{pairs.value:.0f}**"]
            + [f"{float(numbers.max()):.0f}" for numbers in pairs.nulls.values()]
            + [_beside(placed, "{:.1%}"), f"{depth.value:.0f}", _beside(condition, "{:.2f}")]
        )
    nulls = list(next(iter(graphs.values())).results["implications"].nulls)
    header = ["latents", "at least", "implications", *(f"{null}: most" for null in nulls)]
    page.table([*header, "latents that imply one", "longest chain", "hierarchical [another parent]"], rows)
    first = next(iter(work.saes))
    shown = next((least for least in _CERTAIN if len(graphs[first, least].parent)), None)
    if shown is not None:
        shown = _CERTAIN[-1] if len(graphs[first, _CERTAIN[-1]].parent) > len(graphs[first, shown].parent) else shown
        _tree(work, graphs[first, shown], work.saes[first], f"{first}, at least {shown:g}")
    page.record(implications={f"{name}, {least:g}": found.results for (name, least), found in graphs.items()})
    counts = {least: [graphs[name, least].n_implications for name in work.saes] for least in _CERTAIN}
    most = max(
        float(numbers.max()) for found in graphs.values() for numbers in found.results["implications"].nulls.values()
    )
    told = "; ".join(f"{_list(numbers, 'd')} at {least:g}" for least, numbers in counts.items())
    return [
        f"**Implications.** Pairs of which one latent implies the other: {told}; in all samples of the nulls at "
        f"most {most:.0f}."
    ]


def _tree(work: _Study, found: ImplicationGraph, one: Trained, name: str) -> None:
    held_out = work.trained.held_out
    labels = {}
    for latent in (found.depth >= 0).nonzero().squeeze(1).tolist():
        strongest = one.strongest(work.store, held_out, latent)
        labels[latent] = _plain(strongest[0][0])[:14] if strongest else "–"
    work.page.picture(
        "implications",
        found.plot(labels=labels),
        f"The largest families, children below parents, with the commonest word of each latent's strongest tokens. "
        f"Blue edges are hierarchical; {name}",
    )
    kept = found.share.argsort(descending=True, stable=True)[:_EDGES].tolist()
    condition = found.reconstruction
    assert condition is not None
    work.page.table(
        ["parent", "child", "P(parent given child)", "P(child given parent)", "child's tokens", "hierarchical"],
        (
            [
                f"{int(found.parent[edge])}: {work.words(one, int(found.parent[edge]))}",
                f"{int(found.child[edge])}: {work.words(one, int(found.child[edge]))}",
                f"{float(found.share[edge]):.3f}",
                f"{float(found.reverse[edge]):.3f}",
                f"{int(found.active[found.child[edge]]):,}",
                "yes" if condition.hierarchical[edge] else "no",
            ]
            for edge in kept
        ),
    )


# Hierarchies


def _hierarchies(work: _Study) -> list[str]:
    page, options = work.page, work.options
    page.section("Can concepts inside concepts be seen in the model's words?")
    if work.harvested is None:
        page.text(_NO_MODEL)
        return []
    table, what = _table_of_words(work.harvested)
    groups, parents = word_groups(_OneToken(work.harvested.tokenizer))
    page.text(
        f"Rows of the model's {what} ({len(table):,} tokens, {table.shape[1]} numbers each), whitened. A concept is a "
        "set of words, its vector points to where they have in common that others have not. It has been published that "
        "what a child (*bird*) adds to its parent (*animal*) is **orthogonal** to the parent's vector: a mean cosine "
        "of 0. What follows asks whether that takes any concepts."
    )
    made_up = not parents
    if made_up:
        page.text(
            "Too few of the words of concepts are single tokens of this model, so its concepts are not measured. In "
            "their place stands a hierarchy of tokens drawn at random, which has no concepts at all."
        )
        groups, parents = _random_groups(len(table), options.seed)
    try:
        found = hierarchical_orthogonality(table, groups, parents, n_null=options.n_null, seed=options.seed)
    except ValueError as error:
        page.text(f"There is nothing to measure: {error}.")
        return []
    orthogonal = found.results["orthogonal"]
    inside, outside = orthogonal.nulls["words of the parent"], orthogonal.nulls["other words"]
    page.text(
        f"{len(groups)} {'groups' if made_up else 'concepts'}, {len(parents)} of them inside others. Nulls: a *random "
        "hierarchy*, other words in the place of all; *words of the parent*, a child's words drawn from its parent's; "
        "*other words*, a child's words drawn from outside its parent.",
        markdown(found.results.values()),
        f"**The trivial part.** A child whose words are *any* words of its parent has a cosine of "
        f"{_range(inside, '{:.3f}')}, beside {orthogonal.value:.3f} for "
        f"{'the random hierarchy' if made_up else 'real concepts'}; only words from outside the parent have "
        f"{_range(outside, '{:.3f}')}. Orthogonality follows from the child's words being some of the parent's, and is "
        "no evidence. What can be: words that were *left out* when a concept's vector was made. Their projection on it "
        "should be 1, that of others 0, and AUC is how often a word of the concept lies above another (chance 0.5).",
    )
    if not made_up:
        page.picture("hierarchies", found.plot(), "Projections of words that were left out, and of all others")
    page.record(hierarchies=found.results, hierarchies_of="random tokens" if made_up else "concepts")
    trivial = (
        f"a hierarchy of {'random tokens' if made_up else 'concepts'} has a mean cosine of {orthogonal.value:.3f}, any "
        f"words of the parent {float(inside.mean()):.3f}, words from outside it {float(outside.mean()):.3f}"
    )
    if made_up:
        return [f"**Hierarchies.** Orthogonality needs no concepts: {trivial}."]
    projection, auc = found.results["projection"], found.results["auc_within"]
    return [
        f"**Hierarchies.** Orthogonality tells nothing: {trivial}. But words left out project on their concept at "
        f"{projection.value:.2f} (random hierarchies {float(projection.null.mean()):.2f}) and are told from others of "
        f"the parent with an AUC of {auc.value:.2f} ({float(auc.null.mean()):.2f})."
    ]


class _OneToken:
    """A tokenizer of words as they stand inside a sentence, in small letters or not, whichever is a single token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, word: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        forms = (f" {word}", f" {word.capitalize()}", word, word.capitalize())
        found = [list(self._tokenizer(form, add_special_tokens=add_special_tokens)["input_ids"]) for form in forms]
        return {"input_ids": next((ids for ids in found if len(ids) == 1), found[0])}


def _table_of_words(harvested: Harvested) -> tuple[Tensor, str]:
    """A vector for each token, and what it is."""
    if harvested.causal:
        return harvested.model.get_output_embeddings().weight.detach().float(), "unembedding"
    return harvested.model.get_input_embeddings().weight.detach().float(), "word embeddings"


def _random_groups(rows: int, seed: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Groups of tokens drawn at random, in a hierarchy of two levels."""
    n_parents, n_children, size = _RANDOM_GROUPS
    size = max(4, min(size, rows // (4 * n_parents * n_children)))
    order = torch.randperm(rows, generator=null_generator(seed)).split(size)
    groups: dict[str, Tensor] = {}
    parents: dict[str, str] = {}
    for p in range(n_parents):
        children = {f"{p}.{c}": order[p * n_children + c] for c in range(n_children)}
        groups |= children | {f"{p}": torch.cat(list(children.values()))}
        parents |= dict.fromkeys(children, f"{p}")
    return groups, parents


# Spaces


def _spaces(work: _Study) -> list[str]:
    page, options, held_out = work.page, work.options, work.trained.held_out
    page.section("One space or many?")
    page.text(
        "Latents that are active in the same places may form **lobes**, parts of the dictionary for different kinds of "
        f"text. Here they are put into {options.lobes} by φ, the correlation of where two latents are active: in which "
        "contexts, or on which tokens. *Within* is the mean φ inside lobes less that of all pairs: are there lobes? "
        "*AMI* compares them with clusters of the decoder's rows by angle, and *accuracy* is that of telling a "
        f"latent's lobe from its row (balanced; chance {1 / options.lobes:.2f}): does the dictionary know of them? "
        f"*Ranks* is the sum of the lobes' dimensions over that of all rows: 1 if each lobe has a subspace of its own, "
        f"{options.lobes} if each needs the whole space.",
        "Nulls: in brackets *tokens shuffled*, each latent active in as many places drawn at random, and lobes made "
        "again (of ranks: latents permuted among the lobes); p is that of the hardest, *latents permuted* and a "
        "*random decoder* among them.",
    )
    rows, record = [], {}
    first: dict[str, tuple[str, Trained, OneSpaceOrMany]] = {}
    for name, one in work.saes.items():
        decoder = one.sae.W_dec.detach()
        for places, chunks in (("contexts", held_out.contexts), ("tokens", None)):
            try:
                found = one_space_or_many(
                    one.codes, decoder, chunks, options.lobes, n_null=options.n_null, seed=options.seed
                )
            except ValueError as error:  # too few latents
                page.text(f"{name}, by {places}: {error}.")
                continue
            ranks = union_of_subspaces(decoder[found.latents], found.lobe, n_null=options.n_null, seed=options.seed)
            sizes = torch.bincount(found.lobe).tolist()
            cells = []
            for key, form in (("within", "{:.4f}"), ("ami", "{:.2f}"), ("accuracy", "{:.2f}")):
                result = found.results[key]
                cells += [_beside(result, form, "tokens shuffled"), _p(result.p)]
            rows.append([name, places, _list(sizes, "d"), *cells, _beside(ranks, "{:.2f}")])
            record[f"{name}, {places}"] = found.results | {"ranks": ranks}
            first.setdefault(places, (name, one, found))
    if not rows:
        return []
    page.table(["latents", "by", "sizes", "within", "p", "AMI", "p", "accuracy", "p", "ranks"], rows)
    places = list(first)[-1]
    name, one, found = first[places]
    page.picture(
        "lobes", found.plot(), f"Mean φ inside and between lobes, and latents by two eigenvectors; {name}, by {places}"
    )
    lobe = torch.full((one.codes.d_sae,), -1).index_copy_(0, found.latents, found.lobe)
    of_token = torch.where(one.codes.values[:, 0] > 0, lobe[one.codes.indices[:, 0].long()], -1)
    known = of_token >= 0
    told = [
        [
            str(label),
            f"{int((found.lobe == label).sum()):,}",
            f"{float((of_token == label).double().mean()):.0%}",
            ", ".join(
                f"`{token_text(work.store, some.token)}`"
                for some in over_represented(of_token[known], held_out.tokens[known], label)[:8]
            )
            or "–",
        ]
        for label in range(options.lobes)
    ]
    page.table(["lobe", "latents", "tokens whose strongest latent it has", "tokens it has most more of"], told)
    page.record(lobes=record, **_subspaces(work, name, one))
    accuracy = [found["accuracy"] for found in record.values()]
    ratio = [found["ranks"].value / float(found["ranks"].null.mean()) for found in record.values()]
    beyond = sum(found["ami"].p <= 0.05 for found in record.values())
    return [
        f"**One space or many.** The decoder knows of the lobes, by AMI beyond all nulls (p ≤ 0.05), in "
        f"{_of(beyond, len(record), 'cases')}; accuracy {min(r.value for r in accuracy):.2f} to "
        f"{max(r.value for r in accuracy):.2f}, where shuffled tokens give at most "
        f"{max(float(r.nulls['tokens shuffled'].max()) for r in accuracy):.2f}. The sum of their ranks is "
        f"{min(ratio):.2f} to {max(ratio):.2f} of that of permuted lobes."
    ]


def _subspaces(work: _Study, name: str, one: Trained) -> dict[str, Any]:
    """Clusters by direction alone."""
    rows = one.sae.W_dec.detach()[one.alive]
    options = work.options
    try:
        found = subspace_clusters(rows, options.lobes, max_rows=_ROWS, n_null=options.n_null, seed=options.seed)
    except ValueError as error:
        work.page.text(f"Subspaces of rows alone: {error}.")
        return {}
    work.page.text(
        f"**By directions alone.** Each of {len(found.rows):,} rows is made up of at most five others, and rows that "
        f"make each other up are put together ({name}). *Own* is the share of the coefficients inside the clusters.",
        markdown(found.results.values()),
    )
    return {"subspaces": found.results}


def _room(work: _Study) -> list[str]:
    page, options = work.page, work.options
    page.section("Would spaces of their own be worth it?")
    quick = options.quick
    shares = {"all": 1.0, "half": 0.5, "none": 0.0}
    found = {
        name: capacity(exclusive=share, seeds=1 if quick else 5, seed=options.seed) for name, share in shares.items()
    }
    toys = {
        name: capacity(
            16, 64, 3, exclusive=shares[name], seeds=1 if quick else 3, trained=5 if quick else 250, seed=options.seed
        )
        for name in ("all", "none")
    }
    page.text(
        "Where the truth is known: features of two groups, three a token, in as many dimensions. *Recall*: 256 random "
        "directions in 32 dimensions, the share of a token's features that the largest products find. *FVU*: the toy "
        "model ReLU(W Wᵀ a + b) of 64 features in 16 dimensions, trained. One space of all dimensions, two of half as "
        "many that match the groups, and two with the features dealt out at random; mean over seeds."
    )
    names = list(found["all"].recall)
    page.table(
        ["tokens of one group only", "measure", *(name.replace("one", "one space") for name in names)],
        [
            [share, kind, *(f"{float(column[name].mean()):.2f}" for name in names)]
            for kind, group in (("recall", found), ("FVU", toys))
            for share, one in group.items()
            for column in ([one.recall] if kind == "recall" else [one.fvu])
        ],
    )
    page.record(
        capacity={share: one.results for share, one in found.items()},
        capacity_trained={share: one.results for share, one in toys.items()},
    )
    one_space, two = (float(found["all"].recall[name].mean()) for name in names[:2])
    better = "worse" if two < one_space else "better" if two > one_space else "no other"
    return [
        f"**Room.** In a toy whose groups never meet, two spaces that match them are {better} than one: "
        f"{two:.2f} of the features are found, {one_space:.2f} in one space."
    ]


def _end(work: _Study) -> None:
    work.page.section("What this cannot tell")
    work.page.text(
        "- Codes of TopK have a fixed number of active latents, and these are few: what looks like many dimensions is "
        "in part that. A dense SAE, trained with an L1 penalty, was not trained here; `docs/analyses.md` has one "
        "on made data.\n"
        "- The search for circles sees groups of latents with similar rows only, and no groups whose latents are rarer "
        "than 100 tokens in the sample. A score is no circle yet: look at the planes.\n"
        f"- Words stand in {len(_TEMPLATES)} made-up sentences. There are seven days and twelve months: p says that "
        "the order matters, and nothing of the exact shape. That a helix predicts numbers does not say that the model "
        "uses it.\n"
        "- An implication needs dozens of tokens of the child. In TopK a parent that its child makes superfluous is "
        "not active any more, so that missing implications are no proof of missing hierarchies.\n"
        "- Concepts are lists of words that people made. That left-out words project on a concept's vector is also "
        "what similar words do, with no hierarchy.\n"
        "- Lobes were asked for in a given number, and tokens of one context are not independent, as shuffled ones "
        "are. The published chunks have 256 tokens; contexts here are shorter.\n"
        "- Every measure was tried on several SAEs or places; p is not corrected for that."
    )


# Words and cells


def _beside(result: Result, form: str, null: str | None = None) -> str:
    """The value with the mean of a null, by default the hardest to beat."""
    if result.value != result.value:
        return "–"
    numbers = result.null if null is None else result.nulls[null]
    return f"**{form.format(result.value)}**" + (f" [{form.format(float(numbers.mean()))}]" if len(numbers) else "")


def _p(value: float) -> str:
    return "–" if value != value else f"{value:.2g}"


def _samples(numbers: Tensor, form: str) -> str:
    """Mean and range."""
    if not len(numbers):
        return "–"
    mean, low, high = (form.format(float(value)) for value in (numbers.mean(), numbers.min(), numbers.max()))
    return mean if low == high else f"{mean} ({low} … {high})"


def _range(numbers: Tensor, form: str) -> str:
    low, high = form.format(float(numbers.min())), form.format(float(numbers.max()))
    return low if low == high else f"{low} to {high}"


def _last(controls: Any) -> Tensor:
    return list(controls.values())[-1]


def _list(numbers: Any, form: str) -> str:
    return ", ".join(format(number, form) for number in numbers)


def _of(count: int, of: int, what: str) -> str:
    return f"none of {of} {what}" if count == 0 else f"all {of} {what}" if count == of else f"{count} of {of} {what}"


def _plain(text: str) -> str:
    """Text as matplotlib should draw it, which takes dollars for formulas."""
    return text.replace("$", r"\$")

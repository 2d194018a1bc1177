"""Two sections of the study of completeness: which tokens have a latent of their own, how many features there are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.analysis.canonical import match, match_by_activation
from sparsekern.analysis.completeness import (
    RecoveryCurve,
    TotalFeatures,
    best_f1,
    estimate_total_features,
    feature_recovery_curve,
    matched_features,
)
from sparsekern.analysis.results import Result, new_axes, null_generator, samples
from sparsekern.analysis.studies.options import CompletenessOptions
from sparsekern.analysis.studies.page import Page
from sparsekern.analysis.studies.saes import Trained, TrainedSAEs
from sparsekern.data import ActivationStore
from sparsekern.progress import Progress

_SAME = 0.7  # cosine, or correlation, at which latents count as the same
_AS_SAME = (0.5, 0.6, 0.7, 0.8, 0.9)


def cell(results: Iterable[Result], form: str = ".3f") -> str:
    """The values, and the highest sample of the first one's nulls."""
    every = list(results)
    highest = _highest(every[0])
    return f"{listed((result.value for result in every), form)} ({number(highest, form)})"


def _highest(result: Result) -> float:
    return max(float(numbers.max()) for numbers in result.nulls.values())


def listed(numbers: Iterable[float], form: str) -> str:
    """Numbers in that format, one beside the other."""
    return ", ".join(number(value, form) for value in numbers)


def number(value: float, form: str) -> str:
    """A number in that format; a dash for NaN."""
    return format(value, form) if value == value else "–"


def mean_of(numbers: Iterable[float]) -> float:
    """Their mean."""
    return float(samples(numbers).mean())


# What is found


class Concepts(NamedTuple):
    """Tokens that can be looked for."""

    ids: Tensor  # [n] int64
    classes: Tensor  # [B] int64, place of each held-out token among the ids; −1 for the others
    frequency: Tensor  # [n] float64, in the whole store


def concepts_of(store: ActivationStore, trained: TrainedSAEs, options: CompletenessOptions) -> Concepts | None:
    """Tokens that are frequent enough to be looked for; None where they are too few to fit a curve to."""
    tokens = trained.held_out.tokens
    known, count = tokens[tokens >= 0].unique(return_counts=True)
    every = store.token_ids.long()
    frequency = torch.bincount(every[every >= 0], minlength=int(known.max()) + 1 if len(known) else 0)[known].double()
    frequency /= store.tokens
    # Rarer ones are often among the held-out tokens only if these have a context that is full of them.
    kept = (count >= options.least) & (frequency >= options.least / len(tokens))
    ids, frequency = known[kept], frequency[kept]
    if len(frequency.unique()) < 2:
        return None
    place = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
    return Concepts(ids, torch.where(ids[place] == tokens, place, -1), frequency)


def recovery(
    page: Page, trained: TrainedSAEs, concepts: Concepts, options: CompletenessOptions
) -> dict[int, list[Tensor]]:
    """Which tokens have a latent of their own; for each width and seed which are found, ``[n]`` bool."""
    generator = null_generator(options.seed)
    found: dict[int, list[Tensor]] = {}
    shares: dict[int, list[Result]] = {}
    curves: dict[int, list[RecoveryCurve]] = {}
    for width, group in trained.by_width.items():
        found[width], shares[width], curves[width] = [], [], []
        for one in group:
            told = _told(one, concepts.classes, options)
            shuffled = (
                concepts.classes[torch.randperm(len(concepts.classes), generator=generator)]
                for _ in range(options.n_null if not found[width] else 1)
            )
            nulls = {
                "held-out tokens permuted": samples(
                    float(_told(one, classes, options).double().mean()) for classes in shuffled
                )
            }
            share = Result(f"share of tokens with a latent of their own, {width:,} latents", mean_of(told), nulls)
            found[width].append(told)
            shares[width].append(share)
            curves[width].append(feature_recovery_curve(told, concepts.frequency, seed=options.seed))
    page.section("What is found, and how frequent must it be?")
    page.text(
        f"Concepts whose truth is known: the {len(concepts.ids):,} tokens of the vocabulary that occur at least "
        f"{options.least} times among the held-out ones, and are so frequent in the store that as many can be "
        "expected. A token counts as **found** if some latent is active on nearly all of its occurrences and on little "
        f"else: an F1 above {options.found_at:g}, the harmonic mean of the share of its occurrences that the latent is "
        "active on and of the share of the latent's tokens that are this one.",
        _rarer(curves),
    )
    rows = []
    for width, group_of in curves.items():
        rows.append(
            [
                f"{width:,}",
                cell(shares[width], ".1%"),
                listed((one.slope for one in group_of), ".2f"),
                number(max(_highest(one.results["slope"]) for one in group_of), ".2f"),
                ", ".join(_half(one) for one in group_of),
            ]
        )
    header = ["latents", "tokens found", "slope, logits a decade", "slope, highest of permuted", "half are found at"]
    page.table(header, rows)
    page.text(
        "A logistic curve P(found) = σ(a + b log₁₀ frequency) is fitted to each SAE. Its *slope* b is above 0 where "
        "frequent tokens are found and rare ones are not; null: frequencies permuted. *Half are found at*: the share "
        "of the store at which the curve is one half, with 95% of a bootstrap over tokens in brackets, where it is "
        f"among the frequencies looked at, {_percent(concepts.frequency.min())} to "
        f"{_percent(concepts.frequency.max())}. Null of *tokens found*: which token is which, permuted among the "
        "held-out ones.",
        *_changes(found, concepts),
    )
    page.picture(
        "recovery",
        _drawn(curves),
        "Share of tokens that have a latent of their own, by how frequent they are: dots are eighths of the tokens and "
        "bands 95% of a bootstrap (seed 0), thin lines the fits of the other seeds",
    )
    page.record(
        found=shares,
        recovery={
            width: [{"half": one.half, "half_interval": one.half_interval, **one.results} for one in group_of]
            for width, group_of in curves.items()
        },
    )
    return found


def _told(one: Trained, classes: Tensor, options: CompletenessOptions) -> Tensor:
    """Which classes have a latent of their own."""
    return best_f1(one.codes, classes)[0] > options.found_at


def _half(curve: RecoveryCurve) -> str:
    told = _within(curve.half, curve.frequency)
    if not curve.frequency.min() <= curve.half <= curve.frequency.max():
        return told
    low, high = (_percent(end) if 0 < end < math.inf else "–" for end in curve.half_interval)
    return f"{told} ({low} … {high})"


def _percent(share: float | Tensor) -> str:
    return f"{100 * float(share):.2g}%"


def _within(half: float, frequency: Tensor) -> str:
    """The frequency at which half are found, if it is one of those that were looked at."""
    if half != half:
        return "–"
    if half < frequency.min():
        return f"below {_percent(frequency.min())}"
    return f"above {_percent(frequency.max())}" if half > frequency.max() else _percent(half)


def _rarer(curves: dict[int, list[RecoveryCurve]]) -> str:
    """Whether half are found at a lower frequency with more latents."""
    halves = {width: samples(one.half for one in group) for width, group in curves.items()}
    defined = {width: numbers for width, numbers in halves.items() if bool((numbers > 0).all())}
    if len(defined) < 2:
        return "Too few tokens are found, or missed, to say at which frequency half of them are."
    widths = sorted(defined)
    frequency = curves[widths[0]][0].frequency
    told = " → ".join(f"{_within(float(defined[w].log().mean().exp()), frequency)} ({w:,} latents)" for w in widths)
    steps = list(pairwise(widths))
    rounding = 1 + 1e-6  # two fits of the same curve need not agree in every bit
    if all(defined[wide].max() * rounding < defined[narrow].min() for narrow, wide in steps):
        return f"**The wider the SAE, the rarer the tokens that it finds, in every seed:** half are found at {told}."
    if all(defined[wide].min() > defined[narrow].max() * rounding for narrow, wide in steps):
        return f"**The wider the SAE, the more frequent a token must be to be found:** half are found at {told}."
    return f"Width does not move the frequency at which half are found the same way in every seed: {told}."


def _changes(found: dict[int, list[Tensor]], concepts: Concepts) -> list[str]:
    """What the widest SAE finds that the narrowest does not, and the other way round."""
    narrow, wide = min(found), max(found)
    lines = []
    for here, there in ((wide, narrow), (narrow, wide)):
        only = [a & ~b for a, b in zip(found[here], found[there], strict=True)]
        frequencies = concepts.frequency[torch.stack(only).any(0)]
        how = f", of a median frequency of {_percent(frequencies.median())}" if len(frequencies) else ""
        counts = listed((float(one.sum()) for one in only), ".0f")
        lines.append(f"- Found with {here:,} latents and not with {there:,}: {counts} tokens in the seeds{how}.")
    return ["\n".join(lines)]


def _drawn(curves: dict[int, list[RecoveryCurve]], bins: int = 8) -> Any:
    """The curves of all widths in one picture."""
    axes = new_axes()
    for index, (width, group) in enumerate(curves.items()):
        first, color = group[0], f"C{index}"
        log = first.frequency.log10()
        grid = torch.linspace(float(log.min()), float(log.max()), 200, dtype=torch.float64)
        if len(first.resampled):
            band = torch.sigmoid(first.resampled[:, :1] + first.resampled[:, 1:] * grid)
            low, high = band.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
            axes.fill_between(10**grid, low, high, color=color, alpha=0.15, lw=0)
        for place, curve in enumerate(group):
            axes.plot(10**grid, curve.predict(10**grid), color=color, lw=0.7 if place else 1.8)
        for part in log.argsort().tensor_split(min(bins, len(log))):
            axes.plot(10 ** log[part].mean(), first.found[part].double().mean(), "o", color=color, ms=5)
        axes.plot([], [], "o-", color=color, label=f"{width:,} latents")
    axes.set(
        xscale="log",
        xlabel="share of the tokens of the store",
        ylabel="share that has a latent of its own",
        ylim=(-0.03, 1.03),
    )
    axes.legend(frameon=False, loc="upper left")
    return axes


# How many there are


_BY_WEIGHTS, _BY_ACTIVATION, _TOKENS = "latents, by weights", "latents, by activations", "tokens"


def totals(
    page: Page, trained: TrainedSAEs, tokens: dict[int, list[Tensor]], options: CompletenessOptions, progress: bool
) -> None:
    """Capture and recapture over the seeds."""
    found: dict[tuple[str, int, float], TotalFeatures] = {}
    paired: list[dict[str, float]] = []
    with Progress("totals", len(trained.widths), unit="widths", shown=progress) as bar:
        for done, (width, group) in enumerate(trained.by_width.items()):
            tables_of, by_chance = _tables(group, options)
            paired.append(by_chance)
            for identity, tables in tables_of.items():
                for at, table in tables.items():
                    found[identity, width, at] = _counted(table, options)
            if width in tokens and all(bool(one.any()) for one in tokens[width]):
                found[_TOKENS, width, _SAME] = _counted(torch.stack(tokens[width]), options)
            bar.update(done + 1)
    shown = {key: one for key, one in found.items() if key[2] == _SAME}
    page.section("How many features are there?")
    page.text(
        f"If {options.seeds} people count the fish in a lake and mostly meet the same ones, there are few more. In the "
        "same way the number of features can be estimated from how many of those that one seed has found another has "
        "found too. **It is only as good as the answer to what counts as the same feature**, so it is asked in three "
        f"ways: latents paired by their weights (cosines of decoder and encoder rows of at least {_SAME:g}), by their "
        f"activations on the held-out tokens (correlation of at least {_SAME:g}, of latents active on ten tokens), and "
        "tokens found, as above, for which there is no doubt about what is the same.",
        _range_of(found),
    )
    page.table(
        ["the same", "latents", "seen", f"found by 1 … {options.seeds} seeds", *_ESTIMATES, "spread (chance)"],
        [
            [
                identity,
                f"{width:,}",
                f"{one.observed:,}",
                listed(one.found_by[1:].tolist(), ",d"),
                f"{one.results['chao'].value:,.0f} ({one.interval['chao'][0]:,.0f} … {one.interval['chao'][1]:,.0f})",
                f"{one.results['lincoln_petersen'].value:,.0f} ± {one.error['lincoln_petersen']:,.0f}",
                f"{one.results['jackknife'].value:,.0f} ± {one.error['jackknife']:,.0f}",
                cell([one.results["spread"]], ".2f") if len(one.results["spread"].null) else "–",
            ]
            for (identity, width, _), one in sorted(shown.items(), key=lambda entry: _ORDER.index(entry[0][0]))
        ],
    )
    page.text(
        "- *Seen*: features that some seed has found. *Chao*, *Lincoln–Petersen* and the *jackknife* estimate how many "
        "there are in all; brackets are 95%, and ± the standard deviation, of a bootstrap, which knows of chance and "
        "not of bias.\n"
        "- *Spread*: variance of the number of seeds that find a feature, in brackets the highest sample of a null in "
        "which all features are equally easy to find. Above it, some are easier than others, and all three estimates "
        "are too small as far as the matching is right: Lincoln–Petersen, which assumes that all are equally easy, can "
        "then be less than what has been seen.\n"
        "- A wrong or missed match looks like two features, each found once. That makes all estimates too large, "
        f"without a limit. {_by_chance(paired)}",
        *_known(found, tokens),
        "So the number is no property of the model: it is how many things such SAEs would find if more seeds were "
        "trained, by one definition of a thing. Features that these SAEs have no room for, at this width and with so "
        "many active latents, are found by no seed and are not in it.",
    )
    page.picture("totals", _drawn_totals(found), "Chao's estimate by how alike two latents must be to be one feature")
    page.record(totals={f"{key[0]}, {key[1]}, {key[2]:g}": _numbers(one) for key, one in found.items()})


_ESTIMATES = ("Chao: at least", "Lincoln–Petersen", "jackknife")
_ORDER = [_BY_WEIGHTS, _BY_ACTIVATION, _TOKENS]


def _counted(table: Tensor, options: CompletenessOptions) -> TotalFeatures:
    return estimate_total_features(table, seed=options.seed)


def _tables(
    group: list[Trained], options: CompletenessOptions
) -> tuple[dict[str, dict[float, Tensor]], dict[str, float]]:
    """Which seeds found which features, by how latents are paired and how alike they must be; and pairs by chance.

    The latter are the shares of latents that have a partner in what was permuted, at the least likeness.
    """
    alive = [one.alive for one in group]
    links: dict[str, dict[float, dict[tuple[int, int], tuple[Tensor, Tensor]]]] = {
        identity: {at: {} for at in _AS_SAME} for identity in (_BY_WEIGHTS, _BY_ACTIVATION)
    }
    compared = [torch.zeros_like(one) for one in alive]
    by_chance: dict[str, float] = {}
    for a, b in combinations(range(len(group)), 2):
        one, two = group[a], group[b]
        weights = match(
            one.sae.W_dec,
            two.sae.W_dec,
            one.sae.W_enc,
            two.sae.W_enc,
            "sparse",
            alive1=one.alive,
            alive2=two.alive,
            threshold=min(_AS_SAME),
            n_null=0 if by_chance else 1,
            seed=options.seed,
        )
        if not by_chance:
            by_chance[_BY_WEIGHTS] = _highest(weights.results["shared"])
        alike = torch.minimum(weights.cos_dec, weights.cos_enc)
        for at in _AS_SAME:
            first = (weights.shared & (alike >= at)).nonzero().squeeze(1)
            links[_BY_WEIGHTS][at][a, b] = first, weights.partner[first]
        try:
            activity = match_by_activation(one.codes, two.codes, threshold=min(_AS_SAME), n_null=1, seed=options.seed)
        except ValueError:  # no latent is active often enough
            continue
        by_chance.setdefault(_BY_ACTIVATION, _highest(activity.results["matched"]))
        compared[a] |= activity.alive1
        compared[b] |= activity.alive2
        for at in _AS_SAME:
            first = ((activity.partner >= 0) & (activity.best >= at)).nonzero().squeeze(1)
            links[_BY_ACTIVATION][at][a, b] = first, activity.partner[first]
    tables = {_BY_WEIGHTS: {at: matched_features(alive, pairs) for at, pairs in links[_BY_WEIGHTS].items()}}
    if all(bool(one.any()) for one in compared):
        tables[_BY_ACTIVATION] = {at: matched_features(compared, pairs) for at, pairs in links[_BY_ACTIVATION].items()}
    return tables, by_chance


def _by_chance(paired: list[dict[str, float]]) -> str:
    """How many pairs are made where there are none."""
    highest = {how: max(one.get(how, 0.0) for one in paired) for how in (_BY_WEIGHTS, _BY_ACTIVATION)}
    return (
        f"By chance (coordinates or tokens permuted, one sample) at most {highest[_BY_WEIGHTS]:.1%} of the latents are "
        f"paired by weights and {highest[_BY_ACTIVATION]:.1%} by activations, at {min(_AS_SAME):g}."
    )


def _range_of(found: dict[tuple[str, int, float], TotalFeatures]) -> str:
    """How far the estimates for the widest SAEs are apart."""
    width = max(key[1] for key in found)
    numbers = [one.results["chao"].value for (how, of, _), one in found.items() if of == width and how != _TOKENS]
    return (
        f"**For the {width:,} latents Chao's estimate goes from {min(numbers):,.0f} to {max(numbers):,.0f}, by whether "
        f"weights or activations are compared and whether {_AS_SAME[0]:g} or {_AS_SAME[-1]:g} is alike enough.**"
    )


def _known(found: dict[tuple[str, int, float], TotalFeatures], tokens: dict[int, list[Tensor]]) -> list[str]:
    """The estimates for tokens beside how many tokens there are."""
    lines = []
    for (how, width, _), one in found.items():
        if how == _TOKENS:
            chao = one.results["chao"].value
            lines.append(f"{chao:,.0f} of {len(tokens[width][0]):,} with {width:,} latents")
    if not lines:
        return []
    return [
        "Of tokens the truth is known: there are as many as were looked for. Chao's estimate is "
        f"{', '.join(lines)}: it counts what SAEs of that width can find, not what there is."
    ]


def _drawn_totals(found: dict[tuple[str, int, float], TotalFeatures]) -> Any:
    axes = new_axes()
    widths = sorted({width for _, width, _ in found})
    styles = {_BY_WEIGHTS: "o-", _BY_ACTIVATION: "s--"}
    for index, width in enumerate(widths):
        for identity, style in styles.items():
            ats = [at for how, of, at in found if (how, of) == (identity, width)]
            if ats:
                values = [found[identity, width, at].results["chao"].value for at in ats]
                label = f"{width:,} {identity}"
                axes.plot(ats, values, style, color=f"C{index}", ms=5, label=label)
    axes.set(
        yscale="log",
        xlabel="cosine or correlation at which two latents are one feature",
        ylabel="features in all, at least (Chao)",
        xticks=_AS_SAME,
    )
    axes.legend(frameon=False, fontsize=8)
    return axes


def _numbers(one: TotalFeatures) -> dict[str, Any]:
    return {
        "observed": one.observed,
        "found_by": one.found_by.tolist(),
        "interval": one.interval,
        "error": one.error,
        "results": one.results,
    }

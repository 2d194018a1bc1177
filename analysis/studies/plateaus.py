"""The study of plateaus: how far an activation can be moved before the model's output notices, and which way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekern.analysis.plateaus import (
    BASES,
    DIRECTIONS,
    Difference,
    Plateaus,
    SAEErrorKL,
    plateaus,
    response_metrics,
    sae_error_kl,
)
from sparsekern.analysis.plateaus.curves import bootstrap_means, interval, paired
from sparsekern.analysis.results import new_axes, new_panels
from sparsekern.analysis.studies.harvested import Harvested
from sparsekern.analysis.studies.options import PlateausOptions
from sparsekern.analysis.studies.page import HOW_TO_READ, Page, sentence
from sparsekern.analysis.studies.saes import Trained, TrainedSAEs, train_one, train_saes
from sparsekern.analysis.tokens import HeldOut
from sparsekern.data import ActivationStore
from sparsekern.progress import Progress

_ALPHAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
_READ = (0.25, 0.5, 1.0)  # of these, where effects of latents are told
_METRICS = ("width", "onset", "slope", "steepness", "sensitivity", "area")
_OF_BASES = ("width", "area", "sensitivity")
_GENERIC = ("isotropic", "cov_mixture", "cov_difference", "real_difference", "real_mixture")
_LATENTS = ("isotropic", "cov_mixture", "active_latent", "inactive_latent", "sae_error")
_NULLS = ("isotropic", "cov_difference", "cov_mixture")
_BATCH_TOKENS = 2048
_MEASURES = {"kl": "KL, nats", "distance": "distance in the last layer"}
_SHAPES = {"kl": "square", "distance": "line"}  # of a smooth response without any plateau
_POWERS = {"kl": 2, "distance": 1}


@dataclass(frozen=True, eq=False)
class _Measured:
    """An SAE and what was measured with it, by measure of the response."""

    name: str
    trained: Trained
    curves: dict[str, Plateaus]
    errors: dict[str, SAEErrorKL]

    def effect(self, measure: str, direction: str, alpha: float) -> Tensor:
        """Response at each token ``[n]`` to a perturbation of that size, real bases."""
        found = self.curves[measure]
        return found.values[0, found.directions.index(direction), :, 1 + _ALPHAS.index(alpha)]


@dataclass(frozen=True)
class _Outcome:
    """A number, its interval, and p where there is a null."""

    value: float
    low: float
    high: float
    p: float = float("nan")

    @staticmethod
    def of(difference: Difference) -> _Outcome:
        return _Outcome(difference.value, difference.low, difference.high, difference.result.p)

    @property
    def cell(self) -> str:
        if self.value != self.value:
            return "–"
        beside = "" if self.p != self.p else f", p {self.p:.2g}"
        return f"{_number(self.value)} ({_number(self.low)} … {_number(self.high)}{beside})"


@dataclass(frozen=True)
class _Claim:
    """What is expected, who expects it, and what was found with each SAE.

    `side` is 1 where the number should be above `reference`, −1 below, 0 not above.
    """

    text: str
    source: str
    number: str
    reference: float
    side: int
    found: dict[str, _Outcome]

    def verdict(self, outcome: _Outcome) -> str:
        """Yes, open, or opposite, by where the interval lies."""
        if outcome.value != outcome.value:
            return "open"
        above, below = outcome.low > self.reference, outcome.high < self.reference
        if self.side == 0:
            return "opposite" if above else "yes"
        wanted, other = (above, below) if self.side > 0 else (below, above)
        return "yes" if wanted else "opposite" if other else "open"

    @property
    def verdicts(self) -> list[str]:
        return [self.verdict(outcome) for outcome in self.found.values()]

    @property
    def holds(self) -> str:
        """The verdicts in words."""
        said = self.verdicts
        yes, opposite = said.count("yes"), said.count("opposite")
        if yes == len(said):
            return "**yes**" if yes == 1 else "**yes**, in all"
        if opposite == len(said):
            return "no, the opposite" if opposite == 1 else "no, the opposite in all"
        parts = [f"yes in {yes} of {len(said)}"] if yes else []
        parts += [f"the opposite in {opposite} of {len(said)}"] if opposite else []
        return ", ".join(parts) or "not seen"


def study(store: ActivationStore, options: PlateausOptions, output: Path, progress: bool = True) -> list[Path]:
    """Train or load the SAEs, move activations of the model, and write the page; returns its files.

    Raises
    ------
    ValueError
        If the store is not a harvest of a model, has too few tokens in contexts that can be run, or the folder of the
        SAEs has some of other options.
    """
    options = options.resolved(store.d, output)
    new_axes()  # a missing matplotlib is found before the training
    held_out = HeldOut.of(store, options.held_out, options.seed, options.tokens)
    harvested = Harvested.of(store, held_out)  # a store without a model too
    contexts = _contexts(harvested, options)
    trained = train_saes(store, options, progress)
    lower = _train_lower(store, options, output, held_out, progress)
    measures = ["kl", "distance"] if harvested.causal else ["distance"]
    looked: list[_Measured] = []
    lowered: list[_Measured] = []
    plan = [*((one, False) for group in trained.by_width.values() for one in group), *((one, True) for one in lower)]
    with Progress("moved", len(plan), unit="SAEs", shown=progress) as bar:
        for one, is_lower in plan:
            found = _measure(harvested, contexts, one, measures, options, is_lower)
            (lowered if is_lower else looked).append(found)
            bar.update(len(looked) + len(lowered))

    claims = {measure: _claims(measure, looked, lowered) for measure in measures}
    page = Page(output, "How far can an activation be moved before the model notices?")
    _start(page, store, options, trained, harvested, contexts, lowered)
    _short(page, measures[0], looked, claims[measures[0]])
    _curves(page, measures, looked)
    _bases(page, measures, looked)
    _comparisons(page, measures, looked, claims)
    _errors(page, measures, looked + lowered, options)
    _latents(page, measures, looked, lowered, options)
    _end(page, harvested, lowered)
    return page.write(options, store)


def _contexts(harvested: Harvested, options: PlateausOptions) -> list[dict[str, Tensor]]:
    """Contexts one by one, short enough to run often, with the activations that the store has of them.

    Those of a causal model may be cut: a later token changes nothing of an earlier one. Others have to be short.
    """
    kept, tokens = [], 0
    for batch in harvested.batches:
        rows = harvested.rows(batch)
        for place, here in enumerate(rows):
            stop = int(batch["attention_mask"][place].sum())
            if int(here.sum()) > options.context_length:
                if not harvested.causal:
                    continue
                stop = int(here.nonzero()[options.context_length - 1]) + 1
            kept.append({name: tensor[place : place + 1, :stop] for name, tensor in batch.items()})
            tokens += int(here[1:stop].sum())
    if tokens < max(2, options.moved):
        raise ValueError(
            f"context_length must leave {max(2, options.moved)} tokens to move in held-out contexts, got "
            f"{options.context_length}, which leaves {tokens}"
        )
    return kept


def _train_lower(
    store: ActivationStore, options: PlateausOptions, output: Path, held_out: HeldOut, progress: bool
) -> list[Trained]:
    """SAEs of the first width with fewer active latents, in a folder of their own."""
    assert options.latents is not None
    k = max(1, options.k // 4)
    fewer = dataclasses.replace(options, k=k, saes=output / f"saes-k{k}")
    seeds = range(options.seed, options.seed + min(options.lower, options.seeds))
    return [train_one(store, fewer, options.latents[0], seed, held_out, progress=progress) for seed in seeds]


def _measure(
    harvested: Harvested,
    contexts: Sequence[dict[str, Tensor]],
    one: Trained,
    measures: Sequence[str],
    options: PlateausOptions,
    is_lower: bool,
) -> _Measured:
    """An SAE's curves and its error; with fewer latents only what needs latents, at real bases."""
    directions, bases = (
        (list(DIRECTIONS), list(BASES)) if not is_lower else (["active_latent", "inactive_latent"], ["real"])
    )
    common: dict[str, Any] = {"n": options.moved, "seed": one.seed, "batch_tokens": _BATCH_TOKENS}
    model, hook = harvested.model, harvested.hook
    curves, errors = {}, {}
    for measure in measures:
        curves[measure] = plateaus(
            model, hook, contexts, one.sae, directions, bases, _ALPHAS, measure=measure, **common
        )
        errors[measure] = sae_error_kl(
            model, hook, one.sae, contexts, nulls=_NULLS, n_null=options.n_null, measure=measure, **common
        )
    assert options.latents is not None
    width = f"{one.sae.d_sae:,} latents, " if len(options.latents) > 1 else ""
    k = f", k = {max(1, options.k // 4)}" if is_lower else ""
    return _Measured(f"{width}seed {one.seed}{k}", one, curves, errors)


def _claims(measure: str, looked: Sequence[_Measured], lowered: Sequence[_Measured]) -> list[_Claim]:
    """What the literature expects, and what was found."""
    shape = _SHAPES[measure]
    without = _without_plateau(measure)

    def each(number: Callable[[_Measured], _Outcome]) -> dict[str, _Outcome]:
        return {one.name: number(one) for one in looked}

    def mean(metric: str) -> Callable[[_Measured], _Outcome]:
        return lambda one: _mean(one.curves[measure].metric(metric, "real", "isotropic"), one.trained.seed)

    def widths(first: str, second: str) -> dict[str, _Outcome]:
        return each(lambda one: _Outcome.of(one.curves[measure].difference("width", (first, None), (second, None))))

    def onsets(first: str, second: str) -> dict[str, _Outcome]:
        return each(lambda one: _Outcome.of(one.curves[measure].difference("onset", ("real", first), ("real", second))))

    def ratios(null: str) -> dict[str, _Outcome]:
        return each(lambda one: _ratio(one.errors[measure], null))

    heimersheim, better = "Heimersheim 2024", "Lee & Heimersheim, 2410.12555"
    bags = "Giglemiani et al., 2409.15019"
    width, onset = "difference in width", "difference in onset"
    claims = [
        _Claim(
            f"a curve from a real base is flat for longer than a {shape}",
            heimersheim,
            f"width, isotropic; a {shape}: {without['width']:.3f}",
            without["width"],
            1,
            each(mean("width")),
        ),
        _Claim(
            f"a curve from a real base is later steeper than a {shape}",
            heimersheim,
            f"steepness, isotropic; a {shape}: {without['steepness']:.2f}",
            without["steepness"],
            1,
            each(mean("steepness")),
        ),
        _Claim(
            "real bases are flat for longer than Gaussian ones",
            f"{heimersheim}; Janiak et al., 2409.17113",
            width,
            0,
            1,
            widths("real", "random"),
        ),
        _Claim("real bases are flat for longer than bags of latents", bags, width, 0, 1, widths("real", "bag")),
        _Claim("structured bags are flat for longer than plain ones", bags, width, 0, 1, widths("structured", "bag")),
        _Claim(
            "real differences act sooner than isotropic directions",
            heimersheim,
            onset,
            0,
            -1,
            onsets("real_difference", "isotropic"),
        ),
        _Claim(
            "real differences act sooner than covariance mixtures",
            f"asked with the baseline of {better}",
            onset,
            0,
            -1,
            onsets("real_difference", "cov_mixture"),
        ),
        _Claim(
            "real differences act sooner than covariance differences",
            "asked here: both take x away",
            onset,
            0,
            -1,
            onsets("real_difference", "cov_difference"),
        ),
        _Claim(
            "real mixtures act sooner than covariance mixtures",
            "asked here: neither knows x",
            onset,
            0,
            -1,
            onsets("real_mixture", "cov_mixture"),
        ),
        _Claim(
            "active latents act sooner than covariance mixtures",
            "asked here",
            onset,
            0,
            -1,
            onsets("active_latent", "cov_mixture"),
        ),
        _Claim(
            "inactive latents act sooner than covariance mixtures",
            "asked here",
            onset,
            0,
            -1,
            onsets("inactive_latent", "cov_mixture"),
        ),
        _Claim(
            "an SAE's error disturbs more than isotropic perturbations",
            "Gurnee 2024",
            "ratio of mean responses",
            1,
            1,
            ratios("isotropic"),
        ),
        _Claim(
            "an SAE's error disturbs no more than covariance mixtures",
            better,
            "ratio of mean responses",
            1,
            0,
            ratios("cov_mixture"),
        ),
    ]
    for direction in ("inactive_latent", "active_latent") if lowered else ():
        claims.append(
            _Claim(
                f"{_words(direction)} of an SAE of lower L0 act more",
                better,
                f"difference in response at {_READ[1]:g} ℓ",
                0,
                1,
                {
                    one.name: _Outcome.of(_lower_less_higher(measure, one, looked, direction, _READ[1]))
                    for one in lowered
                },
            )
        )
    return claims


def _lower_less_higher(
    measure: str, lower: _Measured, looked: Sequence[_Measured], direction: str, alpha: float
) -> Difference:
    """Response to latents of an SAE of lower L0 less that to the SAE's of the same width and seed, the same tokens."""
    other = _partner(lower, looked)
    apart = lower.effect(measure, direction, alpha) - other.effect(measure, direction, alpha)
    return paired(f"response to {_words(direction)} at {alpha:g} ℓ: lower L0 − higher", apart, lower.trained.seed)


def _partner(lower: _Measured, looked: Sequence[_Measured]) -> _Measured:
    wanted = (lower.trained.sae.d_sae, lower.trained.seed)
    return next(one for one in looked if (one.trained.sae.d_sae, one.trained.seed) == wanted)


def _without_plateau(measure: str) -> dict[str, float]:
    """What a response that is a line or a square gives on the grid."""
    alphas = torch.tensor([0.0, *_ALPHAS], dtype=torch.float64)
    return {name: float(number) for name, number in response_metrics(alphas, alphas ** _POWERS[measure]).items()}


def _ratio(errors: SAEErrorKL, null: str) -> _Outcome:
    value, low, high = errors.ratio(null)
    return _Outcome(value, low, high, errors.results["kl"].p_values()[null])


def _mean(numbers: Tensor, seed: int) -> _Outcome:
    kept = numbers[numbers.isfinite()]
    low, high = interval(bootstrap_means(kept[:, None], seed)).flatten().tolist()
    return _Outcome(float(kept.mean()), low, high)


# The page


def _start(
    page: Page,
    store: ActivationStore,
    options: PlateausOptions,
    trained: TrainedSAEs,
    harvested: Harvested,
    contexts: Sequence[dict[str, Tensor]],
    lowered: Sequence[_Measured],
) -> None:
    usable = sum(int(harvested.rows(context)[:, 1:].sum()) for context in contexts)
    cut = (
        f"the first {options.context_length} tokens of each; the model is causal, so what follows changes nothing"
        if harvested.causal
        else f"those of at most {options.context_length} tokens, as later tokens have a say in earlier ones here"
    )
    page.text(
        """A network that corrects errors should not notice when an activation is moved a little: around the activations
that it really has there should be a **plateau**, left soonest in the directions that mean something to it. Here one
activation at one token becomes x + α ℓ v: x is the **base**, v a unit **direction**, ℓ the root mean square distance of
the activations from their mean, and the response of the model is measured while α grows from 0 to 2.""",
        f"""{trained.setting(store, options)}
- Moved: {options.moved} tokens for each SAE, of as many contexts as there are, one at a time; other ones
  for another seed. Contexts: {len(contexts):,} held-out ones, {cut}; {usable:,} tokens in all, which also give mean,
  covariance and ℓ.
- {_response(harvested)}
- α: {", ".join(f"{alpha:g}" for alpha in _ALPHAS)}; between them curves are taken as straight.""",
        HOW_TO_READ,
        "In brackets after a mean: a 90% interval, bootstrapped over the tokens. In tables of differences p comes from "
        "1,000 swaps of the two labels within tokens.",
    )
    page.table(*trained.table())
    page.text("FVU is the fraction of variance unexplained, lower is better; a number for each seed.")
    if lowered:
        said = "; ".join(f"{one.name}: FVU {one.trained.fvu:.4f}" for one in lowered)
        page.text(f"For the last section also trained, in the same way but for k: {said}.")
    page.table(["direction", "before it is scaled"], ([_words(name), what] for name, what in DIRECTIONS.items()))
    page.table(["base", "what is moved"], ([name, what] for name, what in BASES.items()))


def _response(harvested: Harvested) -> str:
    if harvested.causal:
        return (
            "Response: KL(p ‖ p_α) of the next token's distributions at that token, and beside it the Euclidean "
            "distance in the output of the last layer. If layers add to what they are given, the moved activation "
            "itself arrives there: a line is then what a model gives that does nothing."
        )
    return (
        "Response: Euclidean distance at that token in the output of the last layer. The model is not causal and "
        "predicts no next token, so there is no KL divergence."
    )


def _short(page: Page, measure: str, looked: Sequence[_Measured], claims: Sequence[_Claim]) -> None:
    page.section("In short")
    without = _without_plateau(measure)
    shape = _SHAPES[measure]
    widths = [_mean(one.curves[measure].metric("width", "real", "isotropic"), one.trained.seed) for one in looked]
    flat = claims[0].verdicts.count("yes")
    steep = claims[1].verdicts.count("yes")
    lines = [
        f"**Plateau.** Along random directions a real activation can be moved by {_list(w.value for w in widths)} ℓ "
        f"before 5% of the largest response is there; a {shape}, which has no plateau, gives {without['width']:.3f}. "
        f"Flat for longer than a {shape}: {_of(flat, len(looked))}; steeper than one afterwards: "
        f"{_of(steep, len(looked))}."
    ]
    for verdict, what in (
        ("yes", "Expected, and found with every SAE"),
        ("opposite", "Expected, and the opposite found with every SAE"),
    ):
        kept = [claim.text for claim in claims if set(claim.verdicts) == {verdict}]
        if kept:
            lines.append(f"**{what}.** {_sentence('; '.join(kept))}")
    mixed = [f"{claim.text} ({claim.holds})" for claim in claims if _mixed(claim.verdicts)]
    if mixed:
        lines.append(f"**Expected, and not clear here.** {_sentence('; '.join(mixed))}")
    page.text("\n".join(f"- {line}" for line in lines))


def _mixed(verdicts: Sequence[str]) -> bool:
    return len(set(verdicts)) > 1 or verdicts[0] == "open"


def _curves(page: Page, measures: Sequence[str], looked: Sequence[_Measured]) -> None:
    page.section("Curves from real activations")
    page.text(
        """- **Width**: α at which a curve reaches 5% of its own largest value.
- **5% point** (onset): α at which it reaches a level that all curves of a model share, 5% of the mean largest response.
  Directions are compared by this one, as widths refer to different heights.
- **Slope**: the largest one; **steepness**: the same in units of the mean slope of that curve.
- **Sensitivity**: how fast the response starts: response over α for distances, 2 × response over α² for KL, at the
  smallest α.
- **Area**: mean of the curve over its largest value, low for a curve that is flat for long."""
    )
    for measure in measures:
        without = _without_plateau(measure)
        rows = [[f"a {_SHAPES[measure]}", "", *(_reference(name, without) for name in _METRICS)]]
        for direction in DIRECTIONS:
            for one in looked:
                found = one.curves[measure]
                cells = (_mean(found.metric(name, "real", direction), found.seed).cell for name in _METRICS)
                rows.append([_words(direction), one.name, *cells])
        page.text(f"Response: {_MEASURES[measure]}.")
        page.table(["direction", "SAE", "width", "5% point", "slope", "steepness", "sensitivity", "area"], rows)
        first = looked[0]
        figure, panels = new_panels(2, 5, 4)
        for axes, directions in zip(panels, (_GENERIC, _LATENTS), strict=True):
            found = first.curves[measure]
            for direction in directions:
                kept = found.values[0, found.directions.index(direction)]
                _draw(axes, found, kept, _words(direction), f"C{list(DIRECTIONS).index(direction)}")
            axes.set_xlabel("α, in lengths ℓ of the activations")
            axes.legend(frameon=False, fontsize=8)
        top = max(axes.get_ylim()[1] for axes in panels)
        for axes in panels:
            axes.set_ylim(0, top)
        panels[0].set_ylabel(_MEASURES[measure])
        page.picture(
            f"curves-{measure}",
            figure,
            f"Mean response ({_MEASURES[measure]}) from real bases with 90% bands, {first.name}",
        )
    page.record(
        curves={one.name: {m: one.curves[m].summary().to_dict("records") for m in measures} for one in looked},
        length={one.name: one.curves[measures[0]].length for one in looked},
    )


def _reference(metric: str, without: dict[str, float]) -> str:
    """A line's or a square's, where it does not depend on the height."""
    return f"{without[metric]:.3g}" if metric in ("width", "steepness", "area") else ""


def _draw(axes: Any, found: Plateaus, values: Tensor, label: str, color: str, style: str = "-") -> None:
    kept = values[values.isfinite().all(1)]
    if not len(kept):
        return
    low, high = interval(bootstrap_means(kept, found.seed))
    axes.plot(found.alphas, kept.mean(0), style, color=color, label=label)
    axes.fill_between(found.alphas, low, high, color=color, alpha=0.15, lw=0)


def _bases(page: Page, measures: Sequence[str], looked: Sequence[_Measured]) -> None:
    page.section("Real activations beside made-up ones")
    page.text(
        "If only the activations that the model really has lie on plateaus, then what is like them in some way and no "
        "real one should respond sooner: a larger width and a smaller area and sensitivity at real bases. Means over "
        "all directions that both bases have."
    )
    made_up = [base for base in BASES if base != "real"]
    found: dict[str, dict[str, dict[str, Difference]]] = {}
    for measure in measures:
        rows = []
        for one in looked:
            curves = one.curves[measure]
            differences = {
                f"{metric}: real − {base}": curves.difference(metric, ("real", None), (base, None))
                for metric in _OF_BASES
                for base in made_up
            }
            found.setdefault(one.name, {})[measure] = differences
            for metric in _OF_BASES:
                rows.append(
                    [
                        one.name,
                        metric,
                        *(_number(float(curves.metric(metric, base).nanmean())) for base in BASES),
                        *(_Outcome.of(differences[f"{metric}: real − {base}"]).cell for base in made_up),
                    ]
                )
        page.text(f"Response: {_MEASURES[measure]}.")
        page.table(["SAE", "metric", *BASES, *(f"real − {base}" for base in made_up)], rows)
        figure, panels = new_panels(2, 5, 4)
        curves = looked[0].curves[measure]
        for axes, direction in zip(panels, ("isotropic", "real_difference"), strict=True):
            for number, base in enumerate(BASES):
                kept = curves.values[number, curves.directions.index(direction)]
                _draw(axes, curves, kept, f"{base} bases", f"C{number}")
            axes.set(xlabel="α, in lengths ℓ of the activations", title=_words(direction), ylim=(0, None))
        panels[0].legend(frameon=False)
        panels[0].set_ylabel(_MEASURES[measure])
        page.picture(
            f"bases-{measure}",
            figure,
            f"Mean response ({_MEASURES[measure]}) from the four kinds of bases, {looked[0].name}",
        )
    page.record(bases=_recorded(found))


def _comparisons(
    page: Page, measures: Sequence[str], looked: Sequence[_Measured], claims: dict[str, list[_Claim]]
) -> None:
    page.section("What was expected, and what is here")
    count = sum(len(claim.found) for claim in claims[measures[0]])
    page.text(
        "Differences are the first less the second at the same tokens. An expectation **holds** with an SAE where the "
        "90% interval lies wholly on the expected side, the **opposite** does where it lies wholly on the other, and "
        "*no more than* holds where the interval is not wholly above 1. Each has a chance of about 5% to seem to hold "
        f"if there is nothing, so of these {count} comparisons one or another may."
    )
    for measure in measures:
        page.text(f"Response: {_MEASURES[measure]}.")
        page.table(
            ["expected", "by", "number", "found", "holds here"],
            (
                [
                    claim.text,
                    claim.source,
                    claim.number,
                    "; ".join(outcome.cell for outcome in claim.found.values()),
                    claim.holds,
                ]
                for claim in claims[measure]
            ),
        )
    figure, panels = new_panels(len(measures), 7, 4)
    for axes, measure in zip(panels, measures, strict=True):
        _forest(axes, measure, looked)
    page.picture(
        "onsets",
        figure,
        "How much sooner (left of 0) or later each direction reaches the 5% point than isotropic directions (filled) "
        "and than covariance mixtures (open), at real bases; 90% intervals, a colour for each SAE",
    )
    page.record(
        expected={
            measure: [
                {
                    "expected": claim.text,
                    "holds": claim.holds,
                    "found": {name: dataclasses.asdict(outcome) for name, outcome in claim.found.items()},
                }
                for claim in found
            ]
            for measure, found in claims.items()
        },
        onsets={one.name: _recorded({m: one.curves[m].differences for m in measures}) for one in looked},
    )


def _forest(axes: Any, measure: str, looked: Sequence[_Measured]) -> None:
    names = [name for name in DIRECTIONS if name not in ("isotropic", "cov_mixture")]
    for number, one in enumerate(looked):
        for place, name in enumerate(names):
            for step, (baseline, fill) in enumerate((("isotropic", f"C{number}"), ("cov_mixture", "white"))):
                found = one.curves[measure].differences[f"{name} − {baseline}"]
                y = place + (2 * number + step - len(looked) + 0.5) * 0.7 / (2 * len(looked))
                axes.plot([found.low, found.high], [y, y], color=f"C{number}", lw=1.5)
                axes.plot([found.value], [y], "o", ms=5, color=f"C{number}", mfc=fill)
    axes.axvline(0, color="0.45", lw=1)
    axes.set_yticks(range(len(names)), [_words(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(f"difference in α at the 5% point ({_MEASURES[measure]})")


def _errors(page: Page, measures: Sequence[str], looked: Sequence[_Measured], options: PlateausOptions) -> None:
    page.section("The error of the SAE")
    page.text(
        f"""One activation is replaced by its reconstruction x̂, and the mean response is divided by that to
perturbations of the same length ‖x̂ − x‖ in other directions, {options.n_null} of each kind for each token. Beside
isotropic ones an error seems pathological as soon as it lies where activations vary, for the model reads little
elsewhere. Covariance mixtures lie there too, and know neither x nor x̂. Covariance differences take x away as well. p
is the share of the {options.n_null} that disturb as much or more in the mean over the tokens, the error counted in."""
    )
    for measure in measures:
        rows = []
        for one in looked:
            found = one.errors[measure]
            length = float(found.length.double().mean()) / one.curves[measure].length
            ratios = (_ratio(found, null).cell for null in _NULLS)
            rows.append([one.name, f"{length:.2f} ℓ", f"**{_number(float(found.kl.mean()))}**", *ratios])
        page.text(f"Response: {_MEASURES[measure]}.")
        header = ["SAE", "mean ‖x̂ − x‖", "mean response", *(f"over {_words(null)}" for null in _NULLS)]
        page.table(header, rows)
    result = looked[0].errors[measures[0]].results["kl"]
    result = dataclasses.replace(result, nulls={_words(null): samples for null, samples in result.nulls.items()})
    page.text(f"{_sentence(looked[0].name)} {sentence(result)}")
    axes = result.plot()
    page.picture("error", axes, f"Mean response to x̂ in the place of x, and to what is as long, {looked[0].name}")
    page.record(
        errors={one.name: {m: one.errors[m].results for m in measures} for one in looked},
        error_ratios={
            one.name: {m: {null: one.errors[m].ratio(null) for null in _NULLS} for m in measures} for one in looked
        },
    )


def _latents(
    page: Page,
    measures: Sequence[str],
    looked: Sequence[_Measured],
    lowered: Sequence[_Measured],
    options: PlateausOptions,
) -> None:
    page.section("Latents that are active, and latents that are not")
    page.text(
        "The response to a step of the same length along the decoder row of a latent that is active at the token, and "
        "of one that is not but fires elsewhere; at real bases. Nothing published says which of them should act more."
    )
    kinds = ("active_latent", "inactive_latent")
    differences: dict[str, dict[str, dict[str, Difference]]] = {}
    for measure in measures:
        rows = []
        for one in looked:
            seed = one.trained.seed
            for direction in ("isotropic", "cov_mixture", *kinds):
                effects = (_mean(one.effect(measure, direction, alpha), seed).cell for alpha in _READ)
                rows.append([one.name, _words(direction), *effects])
            apart = {
                f"{alpha:g}": paired(
                    f"response at {alpha:g} ℓ: active latents − inactive latents",
                    one.effect(measure, kinds[0], alpha) - one.effect(measure, kinds[1], alpha),
                    seed,
                )
                for alpha in _READ
            }
            differences.setdefault(one.name, {})[measure] = apart
            rows.append([one.name, "active − inactive", *(_Outcome.of(found).cell for found in apart.values())])
        page.text(f"Response: {_MEASURES[measure]}.")
        page.table(["SAE", "along", *(f"at {alpha:g} ℓ" for alpha in _READ)], rows)
        said = [found[measure][f"{_READ[1]:g}"] for found in differences.values()]
        more, less = sum(one.low > 0 for one in said), sum(one.high < 0 for one in said)
        page.text(
            f"At {_READ[1]:g} ℓ active latents act more than inactive ones: {_of(more, len(said))}; less: "
            f"{_of(less, len(said))}."
        )
    page.record(active_less_inactive=_recorded(differences))
    if lowered:
        _lower(page, measures, looked, lowered, options)


def _lower(
    page: Page,
    measures: Sequence[str],
    looked: Sequence[_Measured],
    lowered: Sequence[_Measured],
    options: PlateausOptions,
) -> None:
    kinds = ("active_latent", "inactive_latent")
    k = max(1, options.k // 4)
    page.section("SAEs of a lower L0")
    page.text(
        f"L0 is the number of active latents a token. An SAE that may use {k} in the place of {options.k} has to put "
        "more into each, and Lee & Heimersheim found that latents of a lower L0 act more. At the same tokens, the "
        "lower less the higher:"
    )
    record: dict[str, dict[str, dict[str, Difference]]] = {}
    rows = []
    for one in lowered:
        for measure in measures:
            for direction in kinds:
                found = {f"{alpha:g}": _lower_less_higher(measure, one, looked, direction, alpha) for alpha in _READ}
                record.setdefault(one.name, {})[f"{measure}, {direction}"] = found
                cells = (_Outcome.of(difference).cell for difference in found.values())
                rows.append([one.name, _MEASURES[measure], _words(direction), *cells])
    page.table(["SAE", "response", "along", *(f"at {alpha:g} ℓ" for alpha in _READ)], rows)
    first = lowered[0]
    other = _partner(first, looked)
    figure, panels = new_panels(len(measures), 5, 4)
    for axes, measure in zip(panels, measures, strict=True):
        for one, style, which in ((other, "-", options.k), (first, "--", k)):
            curves = one.curves[measure]
            for direction, color in zip(kinds, ("C5", "C6"), strict=True):
                kept = curves.values[0, curves.directions.index(direction)]
                _draw(axes, curves, kept, f"{_words(direction)}, k = {which}", color, style)
        axes.set(xlabel="α, in lengths ℓ of the activations", ylabel=_MEASURES[measure], ylim=(0, None))
    panels[0].legend(frameon=False, fontsize=8)
    page.picture("lower", figure, f"Mean response along latents with 90% bands, {other.name} and {first.name}")
    page.record(lower=_recorded(record))


def _end(page: Page, harvested: Harvested, lowered: Sequence[_Measured]) -> None:
    page.section("What this cannot tell")
    lines = [
        "A width is not a plateau. Any smooth model has one of some size; only beside a line or a square, and beside "
        "other bases, does it say something.",
        "How few layers lie behind the moved one matters: there may be too few of them here to correct anything. The "
        "published plateaus are those of larger models, with more layers behind the moved one.",
        "The tokens of one model are the sample. Intervals say how the same model does on other tokens, with this SAE, "
        "and not what another model does. SAEs of other seeds share the model.",
        "One token is moved at a time, and read at that token. What its change does to later tokens, and what happens "
        "if all are moved, was not looked at.",
        "The Gaussians have the covariance of the activations and nothing else of them. Real activations have longer "
        "tails, so a difference from them is not a difference between meaning and none.",
    ]
    if not harvested.causal:
        lines.append(
            "Distances in the last layer weigh all its directions alike. What of them a task would read is not known. "
            "Long contexts were left out."
        )
    if lowered:
        lines.append("SAEs of a lower L0 also have a larger error; the two cannot be told apart here.")
    page.text("\n".join(f"- {line}" for line in lines))


# Words and cells


def _recorded(found: Any) -> Any:
    """Differences as their records and their intervals, at any depth."""
    if isinstance(found, Difference):
        return {"low": found.low, "high": found.high, "beside": found.result.to_records()}
    return {name: _recorded(entry) for name, entry in found.items()}


def _words(direction: str) -> str:
    """A direction as it is named on the page."""
    return _NAMES[direction]


_NAMES = {
    "isotropic": "isotropic",
    "cov_difference": "covariance difference",
    "cov_mixture": "covariance mixture",
    "real_difference": "real difference",
    "real_mixture": "real mixture",
    "active_latent": "active latents",
    "inactive_latent": "inactive latents",
    "sae_error": "SAE error",
}


def _number(number: float) -> str:
    if number != number:
        return "–"
    size = abs(number)
    form = ".3g" if size >= 10 else ".2f" if size >= 1 else ".3f" if size >= 0.01 or size == 0 else ".2g"
    return format(number, form).replace("-", "−")


def _list(numbers: Iterable[float]) -> str:
    return " and ".join(_number(number) for number in numbers)


def _of(count: int, of: int) -> str:
    return f"with {'all' if count == of else count if count else 'none'} of the {of} SAEs"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."

"""The study of opposing directions: which latents point against each other, and what these do on tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.opposing import (
    AntipodalPairs,
    AntipodalReport,
    PairUse,
    antipodal_pairs,
    antipodal_report,
    dense_direction,
    dense_latents,
    gaussian_cloud,
    pair_use,
    two_sided,
)
from sparsekern.analysis.results import Result, new_axes, strip
from sparsekern.analysis.studies.options import OpposingOptions
from sparsekern.analysis.studies.page import HOW_TO_READ, Page, sentence, source_of, token_text
from sparsekern.analysis.studies.saes import Trained, TrainedSAEs, train_one, train_saes
from sparsekern.analysis.tokens import LEAST_COUNT, HeldOut, over_represented
from sparsekern.data import ActivationStore
from sparsekern.progress import Progress

_WEAKER = (0.5, 0.2)  # scores that are no pair yet, and far from what chance gives
_DENSE = 0.3  # density of the published dense latents
_WORDS = 6  # of each side of a pair
_SHOWN = 2000  # tokens in a picture
_DRAWS = "as many random latents"  # the null of dense latents


@dataclass(frozen=True, eq=False)
class _Looked:
    """An SAE and its opposites: its densest latents and their mean score; a report for first seeds only."""

    trained: Trained
    pairs: AntipodalPairs
    least: float
    densest: Tensor
    dense: Result
    use: PairUse | None
    report: AntipodalReport | None

    @property
    def largest(self) -> float:
        """The largest score."""
        return float(self.pairs.score.max())

    @property
    def dense_stand_out(self) -> bool:
        """Whether the densest latents score higher than every draw of random ones."""
        return self.dense.value > float(self.dense.nulls[_DRAWS].max())

    @property
    def densities(self) -> Tensor:
        """Of the densest latents."""
        return self.trained.density[self.densest]

    @property
    def strongest_dense(self) -> str:
        """How many latents of the strongest pairs are among the densest."""
        latents = torch.empty(0, dtype=torch.int64) if self.use is None else self.use.pairs.flatten()
        return f"{int(torch.isin(latents, self.densest).sum())} of {len(latents)}"

    def above(self, score: float) -> int:
        """Latents of at least that score."""
        return int((self.pairs.score >= score).sum())

    @property
    def numbers(self) -> dict[str, Any]:
        """For the record."""
        numbers = {
            "seed": self.trained.seed,
            "fvu": self.trained.fvu,
            "largest_score": self.largest,
            "pairs": self.pairs.n_pairs,
            "latents_above": {f"{score:g}": self.above(score) for score in _WEAKER},
            "mean_least_cosine": self.least,
            "densest": self.densest.tolist(),
            "dense": self.dense,
        }
        if self.use is not None:
            numbers["use"] = self.use.results
            numbers["strongest"] = [
                {"latents": pair, "score": float(self.pairs.score[pair[0]]), "both": both, "explained": explained}
                for pair, both, explained in zip(
                    self.use.pairs.tolist(), self.use.both.tolist(), self.use.explained.tolist(), strict=True
                )
            ]
        return numbers


def study(store: ActivationStore, options: OpposingOptions, output: Path, progress: bool = True) -> list[Path]:
    """Train or load the SAEs, measure, and write the page, its pictures and the record into `output`; returns them.

    Raises
    ------
    ValueError
        If the folder of the SAEs has some of other options or activations.
    """
    options = options.resolved(store.d, output)
    new_axes()  # a missing matplotlib is found before the training
    trained = train_saes(store, options, progress)
    middle = trained.widths[len(trained.widths) // 2]
    signed = [
        train_one(store, options, middle, one.seed, trained.held_out, sk.AbsTopK(options.k), progress)
        for one in trained.by_width[middle][: options.signed]
    ]
    looked: dict[int, list[_Looked]] = {width: [] for width in trained.widths}
    x = trained.held_out.x
    with Progress("opposites", len(trained.widths) * options.seeds + len(signed), unit="SAEs", shown=progress) as bar:
        for width, group in trained.by_width.items():
            for one in group:
                looked[width].append(_look(one, x, options, nulls=one is group[0]))
                bar.update(sum(map(len, looked.values())))
        controls = [_look(one, x, options, nulls=False) for one in signed]

    page = Page(output, "Which latents oppose each other")
    _start(page, store, options, trained)
    _short(page, options, looked, controls, middle)
    _pairs(page, options, looked, middle)
    _dense(page, options, looked)
    _sides(page, store, trained.held_out, options, looked, middle)
    _signed(page, options, looked[middle][: len(controls)], controls)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with matrices this small a second thread costs more than it does
    try:
        _toys(page, options, progress)
    finally:
        torch.set_num_threads(threads)
    _end(page)
    return page.write(options, store)


def _look(one: Trained, x: Tensor, options: OpposingOptions, nulls: bool) -> _Looked:
    decoder, encoder = one.sae.W_dec.detach(), one.sae.W_enc.detach()
    density = one.density.double()
    report = None
    if nulls:
        report = antipodal_report(
            one.sae,
            activity=density,
            tau=options.tau,
            n_null=options.n_null,
            seed=options.seed,
            densest=options.densest,
        )
        assert report.dense is not None
        pairs, least = report.pairs, report.results["min_cosine"].value
        densest, dense = report.dense.latents, report.results["dense_mean"]
    else:
        pairs = antipodal_pairs(decoder, encoder, options.tau, alive=one.alive)
        cosines = antipodal_pairs(decoder, alive=one.alive).cos_dec[one.alive].nan_to_num(0)
        least = float(cosines.double().mean())
        found = dense_latents(density, pairs, seed=options.seed, densest=options.densest)
        densest, dense = found.latents, found.results["dense_mean"]
    strongest = pairs.strongest(options.strongest)
    use = None
    if len(strongest) and int(one.alive.sum()) > 2:  # another partner is a third latent
        use = pair_use(x, one.codes, decoder, strongest, n_null=10 * options.n_null, seed=options.seed)
    return _Looked(one, pairs, least, densest, dense, use, report)


# The page


def _start(page: Page, store: ActivationStore, options: OpposingOptions, trained: TrainedSAEs) -> None:
    page.text(
        """A latent of a sparse autoencoder (SAE) with ReLU or TopK is never negative, so it can write only one half of
a line. A direction that the model uses both ways then costs two latents that point against each other, in what they
read (encoder) and in what they write (decoder): an **antipodal pair**. Which latents oppose each other, how strongly,
are they the dense ones, and what do the two sides do on tokens?""",
        f"""- Activations: {source_of(store)}.
- SAEs: TopK, k = {options.k}, {options.steps:,} steps of {options.batch_size:,} tokens each; {options.seeds} seeds of
  each width, which differ in their first weights only.
- Measured on {len(trained.held_out.x):,} tokens of held-out contexts, of which nothing was trained; latents that are
  silent there are left out.""",
        HOW_TO_READ,
    )
    page.table(*trained.table())
    page.text(
        "FVU is the fraction of variance unexplained on the held-out tokens, lower is better; a number for each seed."
    )


def _short(
    page: Page, options: OpposingOptions, looked: dict[int, list[_Looked]], controls: list[_Looked], middle: int
) -> None:
    every = [one for group in looked.values() for one in group]
    with_pairs = sum(one.pairs.n_pairs > 0 for one in every)
    scores = [one.largest for one in every]
    first = looked[middle][0]
    page.section("In short")
    lines = [
        f"**Pairs.** {_of(with_pairs, len(every), 'SAEs')} {'has' if with_pairs == 1 else 'have'} a pair of a score of "
        f"{options.tau:g} or more. The largest scores are {min(scores):.2f} to {max(scores):.2f}, where 1 is an exact "
        f"opposite; the largest of all random rows is {_chance(every):.2f}.",
        f"**Dense latents.** {sentence(first.dense)} (The first SAE of {middle:,} latents.)",
    ]
    if first.use is not None:
        lines += [
            f"**On tokens.** In that SAE's {len(first.use.pairs)} strongest pairs: "
            f"{_uncapitalised(sentence(first.use.results['together']))} "
            f"{sentence(first.use.results['explained'])}"
        ]
    of_topk = looked[middle][: len(controls)]
    lines.append(
        f"**Signed latents.** With AbsTopK, whose latents have both signs, the largest scores are "
        f"{_list(one.largest for one in controls)}, with TopK from the same seeds "
        f"{_list(one.largest for one in of_topk)}; FVU {_list((one.trained.fvu for one in controls), '.4f')} and "
        f"{_list((one.trained.fvu for one in of_topk), '.4f')}."
    )
    page.text("\n".join(f"- {line}" for line in lines))


def _pairs(page: Page, options: OpposingOptions, looked: dict[int, list[_Looked]], middle: int) -> None:
    page.section("How strongly latents oppose each other")
    page.text(
        f"""The **score** of a latent is the largest product of its encoder's and its decoder's cosine with another
latent, over those with which both are negative: 0 where no latent opposes it, 1 where one is its exact opposite. A
score of {options.tau:g} makes a pair; {" and ".join(map(str, _WEAKER))} are weaker, and still far from what random
rows give. The *least cosine* of a latent is that of its decoder row with the row most opposed to it, whatever the
encoder says."""
    )
    header = ["latents", "largest score", f"pairs (score ≥ {options.tau:g})"]
    header += [f"latents of a score ≥ {score:g}" for score in _WEAKER] + ["mean least cosine"]
    page.table(
        header,
        (
            [
                f"{width:,}",
                _list(one.largest for one in group),
                _list((one.pairs.n_pairs for one in group), "d"),
                *(_list((one.above(score) for one in group), "d") for score in _WEAKER),
                _list((one.least for one in group), ".3f"),
            ]
            for width, group in looked.items()
        ),
    )
    page.text("A number for each seed. The same measures beside their nulls, of the first seed of each width:")
    reports = {width: group[0].report for width, group in looked.items()}
    results = {}
    rows = []
    for width, report in reports.items():
        assert report is not None
        results[width] = [report.results["paired"], *map(report.share, _WEAKER), report.results["min_cosine"]]
        form = ["share"] * (1 + len(_WEAKER)) + ["cosine"]
        names = [f"share of a score ≥ {score:g}" for score in (options.tau, *_WEAKER)] + ["mean least cosine"]
        for kind, name, result in zip(form, names, results[width], strict=True):
            show = (lambda v: f"{v:.2%}") if kind == "share" else (lambda v: f"{v:.3f}")
            cells = [_beside(result.nulls.get(null), show) for null in _NULLS]
            rows.append([f"{width:,}", name, f"**{show(result.value)}**", *cells, f"{result.p:.2g}"])
    page.table(["latents", "measure", "value", *_NULLS, "p"], rows)
    drawn = options.n_null * min(1024, min(int(group[0].pairs.measured.sum()) for group in looked.values()))
    page.text(
        f"""Mean and range of {options.n_null} samples of each null; p is the largest of all nulls. *Random
dictionary*: as many random rows. *Second moment*: random rows as unevenly spread over the directions as the
latents' are. *Signs flipped*: half of the latents turned around, which keeps every line and leaves half of the
opposites; it asks whether opposites are more than crowded lines, and against a few pairs it can say little.
*Encoder permuted*: whether encoder and decoder oppose each other in the same latents. A null looks at up to 1,024
latents a sample, at least {drawn:,} in all, so it resolves shares of about {1 / drawn:.2%}; an entry of 0.00% means
that none of them had the score.""",
        "\n".join(f"- {width:,} latents: {_uncapitalised(sentence(found[-1]))}" for width, found in results.items()),
    )
    page.picture("scores", _plot_scores(options, looked), "Score and density of every latent, first seed of each width")
    report = reports[middle]
    assert report is not None
    axes = report.plot()
    page.picture("cosines", axes, f"Least decoder cosine of each latent, {middle:,} latents, first seed")
    page.record(
        saes={width: [one.numbers for one in group] for width, group in looked.items()},
        pairs=results,
    )


_NULLS = ("random dictionary", "random rows with their second moment", "signs flipped", "encoder rows permuted")
_RANDOM = _NULLS[:2]


def _plot_scores(options: OpposingOptions, looked: dict[int, list[_Looked]]) -> Any:
    axes = new_axes(7, 4.2)
    for index, (width, group) in reversed(list(enumerate(looked.items()))):
        one = group[0]
        kept = one.pairs.measured & (one.pairs.score > 0)
        axes.plot(
            one.trained.density[kept].tolist(),
            one.pairs.score[kept].tolist(),
            "o",
            ms=3.5,
            mew=0,
            alpha=0.5,
            color=f"C{index}",
            label=f"{width:,} latents",
        )
    for height, what in ((options.tau, "a pair"), (_chance([g[0] for g in looked.values()]), "largest of random rows")):
        axes.axhline(height, color="0.45", lw=1, ls="--")
        axes.annotate(
            what,
            (0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            color="0.3",
        )
    axes.set(xlabel="density: share of tokens on which the latent is active", ylabel="score", xscale="log", ylim=(0, 1))
    axes.legend(frameon=False, loc="center left", markerscale=2)
    return axes


def _dense(page: Page, options: OpposingOptions, looked: dict[int, list[_Looked]]) -> None:
    page.section("Are the dense latents the ones that oppose each other?")
    every = [one for group in looked.values() for one in group]
    counts = [int((one.trained.density > _DENSE).sum()) for one in every]
    some = sum(count > 0 for count in counts)
    draws = len(every[0].dense.nulls[_DRAWS])
    page.text(
        f"""In larger SAEs, trained for longer, the latents that are active on more than {_DENSE:.0%} of the tokens
come almost all in antipodal pairs (Sun et al. 2025). {_of(some, len(every), "SAEs")} here
{"has" if some == 1 else "have"} such a latent ({sum(counts)} in all); looked at are the {options.densest} densest
latents of each, however dense. Their mean score is beside that of as many random active latents (mean and largest of
{draws:,} draws); for the first seed also with the signs of half of all latents flipped, which leaves half of what
pairs give and all of what crowded lines give."""
    )
    rows = []
    for width, group in looked.items():
        for one in group:
            random = one.dense.nulls[_DRAWS]
            rows.append(
                [
                    f"{width:,}",
                    str(one.trained.seed),
                    f"{float(one.densities.min()):.0%} … {float(one.densities.max()):.0%}",
                    f"**{one.dense.value:.3f}**",
                    f"{float(random.mean()):.3f} (≤ {float(random.max()):.3f})",
                    _beside(one.dense.nulls.get("signs flipped"), lambda v: f"{v:.3f}"),
                    f"{one.dense.p:.2g}",
                    one.strongest_dense,
                ]
            )
    page.table(
        [
            "latents",
            "seed",
            f"density of the {options.densest} densest",
            "their mean score",
            "random latents",
            "signs flipped",
            "p",
            "of the strongest pairs' latents, among the densest",
        ],
        rows,
    )
    beyond = sum(one.dense_stand_out for one in every)
    page.text(
        f"In {_uncapitalised(_of(beyond, len(every), 'SAEs'))} the densest latents score higher than every draw of "
        f"random ones. The last column looks from the other side: at the {options.strongest} strongest pairs."
    )


def _sides(
    page: Page,
    store: ActivationStore,
    held_out: HeldOut,
    options: OpposingOptions,
    looked: dict[int, list[_Looked]],
    middle: int,
) -> None:
    page.section("What the two sides do on tokens")
    page.text(
        f"""That two rows are opposed does not say that the latents are used as the two sides of one line. Of the
{options.strongest} pairs of the highest scores of each SAE (of latents that are each other's strongest opposite):

- **Together**: tokens on which both are active, over those of independent latents: 0 where one excludes the other,
  1 where they know nothing of each other. Nulls: the tokens of one permuted; another partner for one of them, out
  of the 16 latents of the nearest density. The latter knows that latents compete for a token's {options.k} places.
- **Explained**: the share of the variance of the tokens' projection on the pair's axis (the difference of both
  decoder rows) that the difference of both activations explains: 1 where they are its two signs and nothing else
  touches it. Null: another partner, with the axis that it makes. Control: the better side alone, which for half of
  a normal projection would be 0.73."""
    )
    rows = []
    for width, group in looked.items():
        for one in group:
            if one.use is None:
                continue
            together, explained = one.use.results["together"], one.use.results["explained"]
            partner = [result.nulls["another partner"] for result in (together, explained)]
            rows.append(
                [
                    f"{width:,}",
                    str(one.trained.seed),
                    _beside(one.pairs.score[one.use.pairs[:, 0]], lambda v: f"{v:.2f}"),
                    f"**{_or_dash(together.value)}**",
                    _beside(partner[0], _or_dash),
                    f"{together.p:.2g}",
                    f"**{explained.value:.2f}**",
                    _beside(partner[1], _or_dash),
                    f"{explained.controls['the better side alone'].item():.2f}",
                    f"{explained.p:.2g}",
                ]
            )
    page.table(
        [
            "latents",
            "seed",
            "scores",
            "together",
            "another partner",
            "p",
            "explained",
            "another partner",
            "one side",
            "p",
        ],
        rows,
    )
    first = looked[middle][0]
    if first.use is None:
        return
    strongest = first.use.pairs[0].tolist()
    page.picture(
        "axis",
        _plot_axis(first, held_out.x, strongest),
        f"The strongest pair of the first SAE of {middle:,} latents, {strongest[0]} and {strongest[1]}: each dot is a "
        "token",
    )
    page.text(f"The pairs of that SAE ({middle:,} latents, seed {first.trained.seed}):")
    header = ["pair", "score", "densities", "both active (independent)", "explained (one side)"]
    listed = [_pair_row(first, index) for index in range(len(first.use.pairs))]
    if (held_out.tokens >= 0).any():
        groups = [_sides_of(first.trained.codes, pair) for pair in first.use.pairs.tolist()]
        generator = torch.Generator().manual_seed(options.seed)
        shuffled = [group[torch.randperm(len(group), generator=generator)] for group in groups]
        least = max(
            (token.score for g in shuffled for side in (1, 2) for token in over_represented(g, held_out.tokens, side)),
            default=0.0,
        )
        header += ["tokens of the first", "tokens of the second"]
        for row, side_of in zip(listed, groups, strict=True):
            for side in (1, 2):
                told = [t for t in over_represented(side_of, held_out.tokens, side) if t.score > least][:_WORDS]
                row.append(", ".join(f"`{token_text(store, t.token)}` {t.here}/{t.in_all}" for t in told) or "–")
        page.table(header, listed)
        page.text(
            f"""Tokens that a side has more of than its share, those first that tell most about it, with the occurrences
on which the side is active alone, of all. At least {LEAST_COUNT} occurrences, and more telling than any token of
any side after the sides were permuted among the tokens. The denser a latent, the
more kinds of tokens it is active on, and the less its list can say."""
        )
    else:
        page.table(header, listed)
    page.record(listed=listed)


def _pair_row(one: _Looked, index: int) -> list[str]:
    use = one.use
    assert use is not None
    i, j = use.pairs[index].tolist()
    tokens = one.trained.codes.tokens
    return [
        f"{i}, {j}",
        f"{float(one.pairs.score[i]):.2f}",
        ", ".join(f"{int(count) / tokens:.1%}" for count in use.active[index]),
        f"{int(use.both[index]):,} ({float(use.expected[index]):,.0f})",
        f"{float(use.explained[index]):.2f} ({float(use.alone[index]):.2f})",
    ]


def _sides_of(codes: sk.SparseCodes, pair: Sequence[int]) -> Tensor:
    """1 on tokens of the first latent alone, 2 on those of the second, 0 elsewhere and where both are active."""
    first, second = (codes.values_of(pair) > 0).unbind(1)
    return (first & ~second).long() + 2 * (second & ~first).long()


def _plot_axis(one: _Looked, x: Tensor, pair: list[int]) -> Any:
    rows = normalize(one.trained.sae.W_dec.detach()[pair], dim=1)
    z = one.trained.codes.values_of(pair)[:_SHOWN]
    kept = x[:_SHOWN]
    along = (kept - x.mean(0)) @ normalize(rows[0] - rows[1], dim=0)
    axes = new_axes(6.5, 4)
    for what, where, color in (
        (f"only latent {pair[0]}", (z[:, 0] != 0) & (z[:, 1] == 0), "C0"),
        (f"only latent {pair[1]}", (z[:, 1] != 0) & (z[:, 0] == 0), "C3"),
        ("both", (z != 0).all(1), "k"),
        ("none", (z == 0).all(1), "0.6"),
    ):
        axes.plot(
            along[where].tolist(),
            (z[where, 0] - z[where, 1]).tolist(),
            "o",
            ms=3,
            mew=0,
            alpha=0.6,
            color=color,
            label=what,
        )
    axes.set(
        xlabel="projection of the token on the pair's axis, from the mean",
        ylabel="difference of both activations",
    )
    axes.legend(frameon=False, markerscale=2)
    return axes


def _signed(page: Page, options: OpposingOptions, of_topk: list[_Looked], controls: list[_Looked]) -> None:
    page.section("A control by architecture: latents with a sign")
    latents = len(controls[0].trained.density)
    page.text(
        f"""If opposites come from latents that cannot be negative, they should vanish where latents can. AbsTopK
keeps the k = {options.k} pre-activations of largest *size* of each token, with their signs. Width ({latents:,}),
batches and first weights are those of TopK."""
    )
    sides = [two_sided(one.trained.codes, one.densest, seed=options.seed) for one in controls]
    rows = []
    for topk, control, both in zip(of_topk, controls, sides, strict=True):
        for name, one in (("TopK", topk), ("AbsTopK", control)):
            random = one.dense.nulls[_DRAWS]
            rows.append(
                [
                    name,
                    str(one.trained.seed),
                    f"{one.trained.fvu:.4f}",
                    f"**{one.largest:.2f}**",
                    f"{one.above(_WEAKER[-1]):,}",
                    f"**{one.dense.value:.3f}**",
                    f"{float(random.mean()):.3f} (≤ {float(random.max()):.3f})",
                    one.strongest_dense,
                    *(_or_dash(one.use.results[key].value) if one.use else "–" for key in ("together", "explained")),
                    f"{int((one.trained.density > _DENSE).sum()):,}",
                    f"{both.value:.0%}; {float(both.null.mean()):.0%}" if one is control else "–",
                ]
            )
    page.table(
        [
            "",
            "seed",
            "FVU",
            "largest score",
            f"latents ≥ {_WEAKER[-1]:g}",
            f"mean score, {options.densest} densest",
            "random latents",
            "of the strongest pairs' latents, among the densest",
            "together",
            "explained",
            f"latents denser than {_DENSE:.0%}",
            "rarer sign, densest; random",
        ],
        rows,
    )
    n, both_kinds = len(controls), list(zip(controls, of_topk, strict=True))
    lower = sum(signed.largest < plain.largest for signed, plain in both_kinds)
    dense = sum(signed.dense.value < plain.dense.value for signed, plain in both_kinds)
    better = sum(signed.trained.fvu < plain.trained.fvu for signed, plain in both_kinds)
    still = sum(signed.dense_stand_out for signed in controls)
    page.text(
        f"""AbsTopK has the lower largest score in {_seeds(lower, n)}, the lower mean score of the densest latents in
{_seeds(dense, n)}, and the lower FVU in {_seeds(better, n)}. Its densest latents still score higher than every draw of
random ones in {_seeds(still, n)}. The last column is the share of a latent's tokens on which it has the rarer of its
two signs, 50% where both are as frequent: of the densest latents, and of as many random ones. First seed:
{_uncapitalised(sentence(sides[0]))}""",
        """Two latents of AbsTopK that oppose each other need not be the halves of a line: each could write all of it.
With one of them turned around they are what duplicates are in TopK. *Together* and *explained*, those of the strongest
pairs as above, tell the two apart: halves exclude each other and explain their axis, duplicates are active on the same
tokens.""",
    )
    page.picture(
        "signed", _plot_signed(of_topk, controls), f"Scores of the {options.densest} densest latents, a dot each"
    )
    page.record(signed=[one.numbers for one in controls], rarer_sign=sides)


def _plot_signed(of_topk: list[_Looked], controls: list[_Looked]) -> Any:
    groups = {
        f"{name}, seed {one.trained.seed}": (one.pairs.score[one.densest], color)
        for name, ones, color in (("TopK", of_topk, "C0"), ("AbsTopK", controls, "C1"))
        for one in ones
    }
    axes = new_axes(7, 1 + 0.35 * len(groups))
    strip(axes, groups)
    axes.set(xlabel="score", xlim=(-0.02, 1.02))
    return axes


def _toys(page: Page, options: OpposingOptions, progress: bool) -> None:
    page.section("Where the truth is known")
    steps = {"steps": 20} if options.quick else {}
    kinds = {"TopK": sk.TopK, "AbsTopK": sk.AbsTopK}
    runs: dict[str, list[Any]] = {name: [] for name in kinds}
    with Progress("toys", 2 * options.toy_seeds + 2, unit="trainings", shown=progress) as bar:
        for seed in range(options.seed, options.seed + options.toy_seeds):
            for name, kind in kinds.items():
                runs[name].append(dense_direction(seed, activation=kind(5), n_null=2 * options.n_null, **steps))
                bar.update(sum(map(len, runs.values())))
        common: dict[str, Any] = {"n_null": 2 * options.n_null, **steps}
        clouds = [gaussian_cloud(options.seed, coefficients=(0.03, 0.1, 0.3), ks=(2,), **common)]
        clouds.append(gaussian_cloud(options.seed, p=0.5, coefficients=(0.01, 0.04), **common))
    page.text(
        """**A direction that every token has.** 48 sparse features in 32 dimensions, and one direction that every
token has some of, of either sign (normal); 64 latents, five a token. TopK should take two opposite latents for that
direction and for no other; AbsTopK one."""
    )
    page.table(
        ["", "seed", "dense latents", "their cosines with it", "largest score, dense", "largest score, others", "FVU"],
        (
            [
                name,
                str(seed),
                str(len(run.dense)),
                ", ".join(f"{cosine:.2f}" for cosine in run.cosines[run.dense].sort().values.tolist()) or "–",
                _toy_cell(run.results["dense_score"]),
                _toy_cell(run.results["sparse_score"]),
                f"{run.fvu:.3f}",
            ]
            for name, group in runs.items()
            for seed, run in enumerate(group, start=options.seed)
        ),
    )
    page.text(f"In brackets the mean of {2 * options.n_null} random dictionaries.")
    page.picture("direction", _plot_direction(runs), "Every latent that is active, first seed of each kind")
    page.text(
        """**A cloud without directions.** Normal tokens in 8 dimensions, 32 latents: no direction is used more than
any other, and what opposes is made by the training. A linear code would take two opposite latents for each of eight
lines. The picture has the share of active latents with another one at a decoder cosine below −0.9, over the number
of latents that a token uses (L0); the coefficient is of the penalty Σ zᵖ (L1: p = 1; L0.5: p = 0.5)."""
    )
    page.table(
        ["trained", "share with an opposite", "random dictionaries", "active latents", "L0", "FVU"],
        (
            [
                point.name,
                f"**{point.result.value:.2f}**",
                _beside(point.result.null, lambda v: f"{v:.2f}"),
                str(point.alive),
                f"{point.l0:.1f}",
                f"{point.fvu:.3f}",
            ]
            for cloud in clouds
            for point in cloud.points
        ),
    )
    axes = clouds[1].plot(clouds[0].plot())
    page.picture("cloud", axes, "Share of latents with an opposite (blue) beside random dictionaries (grey bars)")
    page.text(
        "One seed. Whether sparsity alone makes opposites depends on what it costs, so one training tells nothing."
    )
    page.record(
        toy_direction={name: [run.results for run in group] for name, group in runs.items()},
        toy_cloud=[cloud.results for cloud in clouds],
    )


def _plot_direction(runs: dict[str, list[Any]]) -> Any:
    axes = new_axes(6.5, 3.6)
    for index, (name, group) in enumerate(runs.items()):
        run = group[0]
        measured = run.report.pairs.measured
        density = run.report.dense.density
        axes.plot(
            run.cosines[measured].tolist(), density[measured].tolist(), "os"[index], ms=6, mew=0, alpha=0.6, label=name
        )
    axes.axhline(_DENSE, color="0.45", lw=1, ls="--")
    axes.set(xlabel="cosine of the latent's decoder row with the dense direction", ylabel="density", xlim=(-1.05, 1.05))
    axes.legend(frameon=False, loc="upper center")
    return axes


def _toy_cell(result: Result) -> str:
    value = "–" if result.value != result.value else f"**{result.value:.3f}**"
    return f"{value} ({float(result.null.mean()):.2f})" if len(result.null) else value


def _end(page: Page) -> None:
    page.section("What this cannot tell")
    page.text(
        """- Opposed rows that are never active together do not say what their line *means*; the lists of tokens are
  a hint and no more.
- Two latents that exclude each other and explain their axis are what a two-sided direction would look like; that
  the model uses the direction was not tested. The test of the cited work, to take a pair's axis out of the
  activations and train again (do the dense latents go away?), was left out: it costs a training for each pair.
- Short trainings on few tokens: scores may still rise, and latents may still become denser. The threshold of a pair
  comes from larger SAEs.
- The strongest pairs are the extremes of many latents; their scores are beside nulls as shares of all latents, and
  what they do on tokens was not used to choose them.
- Latents fire in contexts, and tokens of one context are not independent: p of *together*, with the tokens
  permuted, is too small, which is why another partner stands beside it.
- AbsTopK differs from TopK in more than the sign: it has twice as many half-lines to choose from with the same
  number of latents."""
    )


# Words and cells


def _chance(looked: Iterable[_Looked]) -> float:
    """The largest score of any random row of the reports' nulls."""
    reports = [one.report for one in looked if one.report is not None]
    return max(float(report.null_scores[null].max()) for report in reports for null in _RANDOM)


def _of(count: int, of: int, what: str) -> str:
    return f"None of {of} {what}" if count == 0 else f"All {of} {what}" if count == of else f"{count} of {of} {what}"


def _seeds(count: int, of: int) -> str:
    return _uncapitalised(_of(count, of, "seeds"))


def _list(numbers: Iterable[float], form: str = ".2f") -> str:
    return ", ".join("–" if number != number else format(number, form) for number in numbers)


def _beside(numbers: Tensor | None, show: Any) -> str:
    """Mean and range of the samples of a null."""
    if numbers is None or len(numbers) == 0:
        return "–"
    mean, low, high = (show(float(value)) for value in (numbers.double().mean(), numbers.min(), numbers.max()))
    return mean if low == high else f"{mean} ({low} … {high})"


def _or_dash(number: float) -> str:
    return "–" if number != number else f"{number:.2f}"


def _uncapitalised(text: str) -> str:
    return text[:1].lower() + text[1:]

"""``page.md`` of the study of a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import sparsekern as sk
from sparsekern.analysis.latents import one_line
from sparsekern.analysis.results import Result, markdown
from sparsekern.analysis.routing import RouterGeometry
from sparsekern.analysis.studies.options import MoeOptions
from sparsekern.analysis.studies.page import sentence
from sparsekern.analysis.tokens import LABELS, LEAST_COUNT, HeldOut, Represented
from sparsekern.data import ActivationStore
from sparsekern.training import versions

_LISTED = 8  # tokens of each expert
_EXAMPLES = 2  # contexts of each expert
_STARTS = {"kmeans": "at clusters of the first batch", "random": "at random"}


def _piece(store: ActivationStore, token: int) -> str:
    """A token as it stands in the vocabulary; its id where there is none."""
    vocab = store.vocab
    return vocab[token] if vocab is not None and 0 <= token < len(vocab) else str(token)


def leaf_name(expert: int, tokens: list[Represented], store: ActivationStore) -> str:
    """An expert's number behind its most over-represented tokens, for the leaves of a plotted tree."""
    words = " ".join(_piece(store, token) for token, *_ in tokens[:4])
    return f"{words}  {expert}".replace("$", r"\$").strip()  # matplotlib would read formulas


@dataclass(frozen=True)
class Page:
    """``page.md``."""

    store: ActivationStore
    options: MoeOptions
    sae: sk.SwitchSAE
    held_out: HeldOut
    geometry: RouterGeometry
    table: dict[str, dict[str, float]]
    tokens: list[list[Represented]]
    chance: list[list[Represented]]
    toys: list[list[str]]
    pictures: set[str]

    def text(self) -> str:
        """The page, as Markdown."""
        parts = [
            self._start(),
            self._short(),
            self._arms(),
            self._loads(),
            self._agreements(),
            self._experts(),
            self._examples(),
        ]
        return "\n\n".join([*filter(None, [*parts, self._directions(), self._tree(), self._toy(), self._end()])]) + "\n"

    def _start(self) -> str:
        sae, source = self.sae, self.store.source
        activations = f"{source.get('model', 'imported activations')}, {source.get('hook', '–')}"
        trained = f"trained for {self.options.steps:,} steps of {self.options.batch_size:,} tokens"
        how = "loaded" if self.options.sae else trained
        experts = "one expert" if sae.n_active == 1 else f"{sae.n_active} experts"
        return f"""# What the experts of a mixture of experts divide among themselves

A sparse autoencoder whose {sae.d_sae:,} latents are dealt out to {sae.n_experts} **experts**,
{sae.latents_per_expert:,} each. A **router**, a linear map, sends every token to {experts}; only the latents
of these are computed. Is the division of labour one that a person would recognise, or only one that is
convenient?

- Activations: {activations}; {self.store.tokens:,} tokens of width {self.store.d}.
- Module: SwitchSAE, {how}; k = {getattr(sae.activation, "k", "–")} active latents a token,
  {sae.gate} gate, balance = `{sae.balance}`; the router started {_STARTS[sae.router_start]}.
- Measured on {len(self.held_out.x):,} tokens of held-out contexts, of which nothing was trained.

Every number stands beside the same number for something that cannot know the answer (a **null**: labels or
latents permuted, a router of random directions), or for a simple rival (a **control**: k-means). In the
pictures the blue line is the number, grey dots are nulls, orange dots are controls. p is the share of a
null's samples that are as extreme, the number itself counted in: with n samples it cannot be less than
1/(n + 1)."""

    def _short(self) -> str:
        lines = ["## In short", ""]
        for key, result in self.geometry.results.items():
            if key.startswith("ami_"):
                lines.append(f"- **{key.removeprefix('ami_').capitalize()}.** {sentence(result)}")
        for key in ("evenness", "silhouette", "overlap", "duplicates_across"):
            lines.append(f"- {sentence(self.geometry.results[key])}")
        return "\n".join(lines)

    def _arms(self) -> str:
        if len(self.table) < 2:
            return ""
        names = [key.removeprefix("ami_") for key in self.table["switch"] if key.startswith("ami_")]
        header = ["trained", "FVU", "silent", "evenness", *(f"AMI {name}" for name in names), "duplicates in, across"]
        lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for name, row in self.table.items():
            cells = [f"{row['fvu']:.4f}", f"{row['silent']:.1%}", _cell(row, "evenness", ".3f")]
            cells += [_cell(row, f"ami_{label}", ".3f") for label in names]
            cells.append(f"{_cell(row, 'duplicates_within', '.2%')}, {_cell(row, 'duplicates_across', '.2%')}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        small, large = list(self.table)[-2:]
        return f"""## The same training with other routers, and with none

{chr(10).join(lines)}

FVU is the fraction of variance unexplained on the held-out tokens, lower is better; *silent* latents are
active on none of them. The router of *switch* starts at clusters of the first batch (spherical k-means) and is
then trained. What that start is worth is the difference to *switch, random start*; what training the router
adds to clusters is the difference to *fixed k-means router*. The fixed routers were not trained.

A token costs the encoder as much in every routed row as in *{small}*, and
{self.sae.n_experts / self.sae.n_active:g} times that in *{large}*, which has as many latents as the experts
together. What is known from larger models: worse than plain TopK at equal width, better at equal cost (Mudide
et al. 2024)."""

    def _loads(self) -> str:
        share = self.geometry.loads / self.geometry.loads.sum()
        empty = int((self.geometry.loads == 0).sum())
        return f"""## Loads

![Loads](loads.png)

The share of tokens that each expert serves, from {share.max():.1%} to {share.min():.1%}; {empty} of
{self.sae.n_experts} serve none. Even shares would be {1 / self.sae.n_experts:.1%}.
{sentence(self.geometry.results["evenness"])}"""

    def _agreements(self) -> str:
        found = [result for key, result in self.geometry.results.items() if key.startswith("ami_")]
        if not found:
            return "## What the experts correspond to\n\nThe store has no token ids to compare with."
        names = [key.removeprefix("ami_") for key in self.geometry.results if key.startswith("ami_")]
        meaning = "\n".join(f"- **{name}**: {LABELS[name]}" for name in names)
        return f"""## What the experts correspond to

![Agreement with labels](agreement.png)

Adjusted mutual information between a token's expert and a label of the token: 0 is chance, 1 means that each
tells the other. The labels:

{meaning}

Permuted labels say what chance gives. The random router says what any linear router gives, only because near
tokens go to the same expert; only what goes beyond it was learned. The k-means router says what clusters of
the activations give. AMI is small where a label has many more classes than there are experts, even if experts
are unions of classes: compare with the controls and not with 1.

{markdown(found)}"""

    def _experts(self) -> str:
        if not any(self.tokens):
            return ""
        least = max((token.score for found in self.chance for token in found), default=0)
        lines = ["| expert | tokens | over-represented tokens: count here / in all |", "|---|---|---|"]
        for expert in self.geometry.loads.argsort(descending=True, stable=True).tolist():
            told = [token for token in self.tokens[expert] if token.score > least][:_LISTED]
            words = [f"`{self._shown(token.token)}` {token.here}/{token.in_all}" for token in told]
            served = int((self.geometry.experts == expert).sum())
            lines.append(f"| {expert} | {served:,} | {', '.join(words) or '–'} |")
        return f"""## What each expert responds to

{chr(10).join(lines)}

The tokens that an expert serves more often than its share, those first that tell most about the expert (their
term of the mutual information, in nats times tokens), at most {_LISTED}; at least {LEAST_COUNT} occurrences. The null:
with the experts permuted among the tokens the highest term of any token in any expert is {least:.1f}; only those
above it are listed."""

    def _shown(self, token: int) -> str:
        """A token inside a cell of a table."""
        return _piece(self.store, token).replace("|", "¦").replace("`", "ˋ")

    def _examples(self) -> str:
        if not any(self.tokens):
            return ""
        generator = torch.Generator().manual_seed(self.options.seed)
        lines = ["## Tokens of each expert, drawn at random", ""]
        for expert in range(self.sae.n_experts):
            served = (self.geometry.experts == expert).nonzero().squeeze(1)
            for index in served[torch.randperm(len(served), generator=generator)[:_EXAMPLES]].tolist():
                text = self.store.context_text(
                    int(self.held_out.contexts[index]),
                    mark=int(self.held_out.positions[index]),
                    marks=("⟦", "⟧"),
                    window=10,
                )
                lines.append(f"- expert {expert}: {one_line(text)}")
        return "\n".join(lines)

    def _directions(self) -> str:
        results = self.geometry.results
        ranks = self.geometry.ranks
        nearer = _reading(
            results["silhouette"],
            "an expert's latents are nearer to each other than a random deal would make them",
            "an expert's latents are further from each other than a random deal would make them: each covers its "
            "ground by itself, and near latents are found elsewhere",
        )
        shared = _reading(
            results["overlap"],
            "experts share more directions than a random deal of the same latents would make them share",
            "experts share fewer directions than a random deal of the same latents would make them share",
        )
        return f"""## Directions and latents

![Measures of the routers and latents](measures.png)

Over the {int(self.geometry.alive.sum()):,} of {self.sae.d_sae:,} latents that are active on these tokens.

- *Router rows*: {sentence(results["router_cosine"])} Rows are taken less their mean,
  which sends no token elsewhere.
- *Silhouette*: whether a decoder row is nearer to those of its own expert (towards 1) or of another one
  (towards −1). {sentence(results["silhouette"])}{nearer}
- *Overlap*: an expert's span is the leading directions that hold 90% of its decoder rows' energy
  ({int(ranks.min())} to {int(ranks.max())} of {self.store.d} dimensions); the overlap of two is the mean
  squared cosine of their principal angles, here averaged over all pairs. {sentence(results["overlap"])}{shared}
- *Duplicates*: latents with another one at a decoder cosine above 0.9. Those across experts are what routing
  costs: the same feature learned again. {sentence(results["duplicates_within"])}
  {sentence(results["duplicates_across"])}

{markdown(result for key, result in results.items() if not key.startswith("ami_"))}"""

    def _tree(self) -> str:
        if "tree" not in self.pictures:
            return ""
        return f"""## Merge tree

![Merge tree](tree.png)

![Similarities](similarities.png)

Experts merge, nearest first, by the similarity of what their latents write: the cosine of the experts' second
moments, that is their latents' mean squared cosine, normalised (average linkage). The words are each expert's
most over-represented tokens. {sentence(self.geometry.results["similarity"])}
{sentence(self.geometry.results["tree"])}"""

    def _toy(self) -> str:
        if not self.toys:
            return ""
        header = ["trained", "seed", "AMI", "k-means", "permuted", "random router", "FVU", "loads", "duplicates across"]
        rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(r)} |" for r in self.toys)]
        return f"""## Where the answer is known

![Toy](toy.png)

The same measures on made data: four clusters of features in orthogonal subspaces, a token has features of one
cluster only. Four experts of sixteen latents could take a cluster each and lose nothing, and a linear router
that does so exists. An agreement of 1 means that the router has found it. By default the router starts at
clusters of the first batch; from a *random start* it must find them by training alone. *Started at the axes* it
makes no mistake at first, and training should leave it there.

{chr(10).join(rows)}"""

    def _end(self) -> str:
        return f"""## What this cannot tell

- One training of one seed: what differs between seeds is not shown, except in the toy.
- Agreement with a label is no proof that the label is what the router uses: token, position and context are
  themselves related. Low agreement with these labels is no proof that there is no meaning.
- Permuted labels treat tokens as independent; tokens of a context are not, so p for *context* asks only
  whether a context's tokens share experts at all.

All numbers are in [results.json](results.json); the formulas, sources and limits of each measure are in
`docs/analyses/routing.md`. sparsekern {versions()["sparsekern"]}, torch {versions()["torch"]}, seed
{self.options.seed}."""


def _cell(row: dict[str, float], key: str, form: str) -> str:
    return format(row[key], form) if key in row and row[key] == row[key] else "–"


def _reading(result: Result, above: str, below: str) -> str:
    """`above` or `below` where the value is beyond all samples of the first null, which permutes latents."""
    numbers = next(iter(result.nulls.values()))
    if len(numbers) and result.value > numbers.max():
        return f" So {above}."
    return f" So {below}." if len(numbers) and result.value < numbers.min() else " That is no more than chance gives."

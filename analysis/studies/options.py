"""The options of ``sparsekern study …``: apart from the studies, whose libraries the command line can start without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

from sparsekern.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeOptions(Options):
    """Options of ``sparsekern study moe``."""

    sae: str | None = option(None, "a trained SwitchSAE to study, folder or Hub id; by default one is trained")
    controls: bool = option(True, "train the controls too: no balancing, a random start, fixed routers, plain TopK")
    toy: bool = option(True, "repeat the study on made data whose clusters are known")
    latents: int | None = option(None, "of all experts together; by default 16 times the width", at_least=2)
    experts: int = option(16, "experts; must divide the latents", at_least=2)
    active_experts: int = option(1, "experts a token", at_least=1)
    k: int = option(32, "active latents a token", at_least=1)
    gate: str = option("sigmoid", "what multiplies an expert's values", choices=("sigmoid", "softmax"))
    balance: str = option("loss", "how experts are kept evenly loaded", choices=("loss", "bias", "none"))
    steps: int = option(300, "of each training", at_least=1)
    batch_size: int = option(2048, "tokens a step", unit="tokens", at_least=2)
    lr: float = option(1e-3, "peak learning rate", above=0)
    held_out: float = option(0.05, "share of the contexts that is measured and not trained on", above=0, below=1)
    tokens: int = option(32768, "held-out tokens measured, at most", unit="tokens", at_least=2)
    n_null: int = option(20, "random routers, and permutations", at_least=1)
    n_costly: int = option(20, "random dictionaries, and permutations for spans and tree", at_least=1)
    toy_seeds: int = option(3, "trainings of each kind on made data", at_least=1)
    seed: int = option(0, "seed of weights, split and nulls; with a trained SAE, the one of its training", at_least=0)
    device: str | None = option(None, "where to train; by default a GPU if there is one")
    quick: bool = option(False, "a few short trainings: shows that everything runs; the figures mean nothing")

    def resolved(self, width: int) -> MoeOptions:
        """These options with what is unset, and what `quick` stands for, on activations of that width."""
        options = dataclasses.replace(self, latents=self.latents or 16 * width)
        if not self.quick:
            return options
        return dataclasses.replace(
            options,
            latents=8 * width,
            experts=4,
            k=min(self.k, 4),
            steps=20,
            batch_size=128,
            tokens=min(self.tokens, 2048),
            n_null=3,
            n_costly=2,
            toy_seeds=1,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAEsOptions(Options):
    """What the studies of harvested activations share: plain TopK SAEs of some widths, from some seeds each."""

    saes: Path | None = option(
        None, "folder of the SAEs; studies that name the same one train them once; by default `saes` in the output"
    )
    latents: list[int] | None = option(None, "of an SAE; repeat for each; by default 2, 8 and 32 times the width")
    seeds: int = option(3, "SAEs of each width; they differ in their first weights only", at_least=2)
    k: int = option(16, "active latents a token", at_least=1)
    steps: int = option(2000, "of each training", at_least=1)
    batch_size: int = option(512, "tokens a step", unit="tokens", at_least=2)
    lr: float = option(2e-3, "peak learning rate", above=0)
    held_out: float = option(0.05, "share of the contexts that is measured and not trained on", above=0, below=1)
    tokens: int = option(16384, "held-out tokens measured, at most", unit="tokens", at_least=16)
    n_null: int = option(10, "samples of each null", at_least=1)
    n_costly: int = option(3, "samples of nulls that cost as much as a matching or a training", at_least=1)
    seed: int = option(0, "seed of the first SAE, the split, the batches and the nulls", at_least=0)
    device: str | None = option(None, "where to train; by default a GPU if there is one")
    quick: bool = option(False, "a few short trainings: shows that everything runs; the figures mean nothing")

    def resolved(self: Studied, width: int, output: Path) -> Studied:
        """These options with what is unset, and what `quick` stands for, on activations of that width."""
        widths = sorted(set(self.latents or (2 * width, 8 * width, 32 * width)))
        options = dataclasses.replace(self, latents=widths, saes=self.saes or output / "saes")
        if not self.quick:
            return options
        return dataclasses.replace(
            options,
            latents=[2 * width, 4 * width, 8 * width],
            seeds=2,
            k=min(self.k, 4),
            steps=20,
            batch_size=128,
            tokens=min(self.tokens, 1024),
            n_null=2,
            n_costly=1,
        )


Studied = TypeVar("Studied", bound=SAEsOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpposingOptions(SAEsOptions):
    """Options of ``sparsekern study opposing``."""

    tau: float = option(0.8, "least score of an antipodal pair", above=0, at_most=1)
    densest: int = option(16, "latents of each SAE that stand for the dense ones", at_least=1)
    strongest: int = option(8, "pairs of each SAE that are looked at on tokens", at_least=1)
    signed: int = option(1, "SAEs of signed latents (AbsTopK), at most one for each seed", at_least=1)
    toy_seeds: int = option(3, "trainings of each kind on made data", at_least=1)

    def resolved(self, width: int, output: Path) -> OpposingOptions:
        """As :meth:`SAEsOptions.resolved`."""
        options = super().resolved(width, output)
        return dataclasses.replace(options, toy_seeds=1) if options.quick else options


@dataclasses.dataclass(frozen=True, kw_only=True)
class CanonicalOptions(SAEsOptions):
    """Options of ``sparsekern study canonical``."""

    other: Path | None = option(None, "another store of the same tokens, such as another layer, to compare with")
    method: str = option("sparse", "how latents are paired", choices=("hungarian", "sparse", "mnn"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplittingOptions(SAEsOptions):
    """Options of ``sparsekern study splitting``."""

    cos: float = option(0.5, "cosine above which a latent of the wider SAE is a child", above=0, below=1)
    topics: int = option(12, "that the contexts are put into", at_least=2)
    parents: int = option(300, "of the most frequent ones whose children are compared by topic", at_least=2)
    refit_steps: int = option(200, "of training on with a direction added", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletenessOptions(SAEsOptions):
    """Options of ``sparsekern study completeness``."""

    meta_steps: int = option(500, "of training of a meta-SAE", at_least=1)
    least: int = option(5, "occurrences of a token among the held-out ones, for an SAE to be asked for it", at_least=1)
    found_at: float = option(0.8, "F1 above which a token has a latent of its own", above=0, below=1)

    def resolved(self, width: int, output: Path) -> CompletenessOptions:
        """These options with what is unset, and what `quick` stands for, on activations of that width."""
        options = super().resolved(width, output)
        return dataclasses.replace(options, meta_steps=20, least=2) if self.quick else options


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(SAEsOptions):
    """What the studies of a store's model share: SAEs of one width, from two seeds."""

    latents: list[int] | None = option(None, "of an SAE; repeat for each; by default 8 times the width")
    seeds: int = option(2, "SAEs of each width; they differ in their first weights only", at_least=1)

    def resolved(self: Modelled, width: int, output: Path) -> Modelled:
        """These options with what is unset, and what `quick` stands for, on activations of that width."""
        widths = [4 * width] if self.quick else sorted(set(self.latents or [8 * width]))
        seeds = min(self.seeds, 2) if self.quick else self.seeds
        return dataclasses.replace(super().resolved(width, output), latents=widths, seeds=seeds)


Modelled = TypeVar("Modelled", bound=ModelOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeometryOptions(ModelOptions):
    """Options of ``sparsekern study geometry``."""

    n_null: int = option(19, "samples of each null", at_least=1)
    lobes: int = option(3, "that latents are put into, and as many clusters of the decoder's rows", at_least=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolytopeOptions(ModelOptions):
    """Options of ``sparsekern study polytope``."""

    rank: int = option(16, "components that codes are decomposed into", at_least=2)
    related: int = option(4096, "tokens on which codes are held against latents, at most", unit="tokens", at_least=64)
    clustered: int = option(2000, "tokens that are clustered, at most", unit="tokens", at_least=16)
    segments: int = option(100, "on which boundaries are looked for, of each measure", at_least=2)
    pulled: int = option(8, "contexts through which components are pulled back", at_least=1)

    def resolved(self, width: int, output: Path) -> PolytopeOptions:
        """As :meth:`ModelOptions.resolved`."""
        options = super().resolved(width, output)
        if not options.quick:
            return options
        return dataclasses.replace(options, rank=4, related=256, clustered=100, segments=8, pulled=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlateausOptions(ModelOptions):
    """Options of ``sparsekern study plateaus``."""

    lower: int = option(1, "SAEs of a quarter of k, at most one for each seed", at_least=0)
    moved: int = option(128, "tokens at which an activation is moved, for each SAE", unit="tokens", at_least=2)
    context_length: int = option(32, "tokens of a context that is run again and again", unit="tokens", at_least=2)
    n_null: int = option(19, "perturbations of each kind as long as an SAE's error", at_least=1)

    def resolved(self, width: int, output: Path) -> PlateausOptions:
        """As :meth:`ModelOptions.resolved`."""
        options = super().resolved(width, output)
        return dataclasses.replace(options, moved=min(self.moved, 4)) if options.quick else options


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyOptions(Options):
    """Options of ``sparsekern study toy``."""

    seeds: int = option(3, "of each toy", at_least=1)
    n_null: int = option(50, "samples of each null that costs no training", at_least=1)
    law_steps: int = option(150, "of each training for the splitting law", at_least=1)
    manifold_steps: int = option(150, "of each training on points and manifolds", at_least=1)
    absorption_steps: int = option(1000, "of each training for absorption", at_least=1)
    bigrams: bool = option(True, "train networks on bigrams too, which takes the longest")
    bigram_steps: int = option(150, "of each SAE on bigrams", at_least=1)
    seed: int = option(0, "the first of the seeds", at_least=0)
    quick: bool = option(False, "a few short trainings: shows that everything runs; the figures mean nothing")

    def resolved(self) -> ToyOptions:
        """These options with what `quick` stands for."""
        if not self.quick:
            return self
        return dataclasses.replace(
            self, seeds=1, n_null=3, law_steps=5, manifold_steps=5, absorption_steps=5, bigram_steps=5
        )

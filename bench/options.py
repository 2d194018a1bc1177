"""The options of ``sparsekern bench``, and the cases that they ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sparsekern.options import Options, option

SHAPES = ["2048,768,32768,32", "1024,384,65536,32", "512,2048,65536,64"]
QUICK_SHAPES = ["64,32,512,8"]

CONTENDERS = (
    "sparsekern",
    "torch",
    "torch-compile",
    "sparsify",
    "saelens",
    "saelens-sparse",
    "dictionary-learning",
    "sparsekern-1-thread",
    "sparsekern-avx2",
    "switch-8",
    "switch-16",
    "switch-32",
    "switch-16-masked",
)
"""Names of what a full step is timed of; :mod:`sparsekern.bench.contenders` says what each one is."""

ARCHITECTURES = (
    "topk",
    "multi-topk",
    "groupmax",
    "abstopk",
    "batchtopk",
    "matryoshka",
    "jumprelu",
    "relu",
    "lp",
    "gated",
    "tied",
    "transcoder",
    "skip-transcoder",
    "crosscoder",
    "cross-layer",
)
"""Architectures whose steps are timed beside the peers' own; :mod:`sparsekern.bench.peers` says who has which."""

UNROUTED = tuple(name for name in CONTENDERS if not name.startswith("switch-"))
"""Those that are timed where none are named: other models have other costs."""


@dataclass(frozen=True)
class Case:
    """One shape on one kind of data."""

    data: str
    rows: int
    d: int
    d_sae: int
    k: int

    @property
    def label(self) -> str:
        """For headings: data and shape."""
        return f"{self.data} {self.rows}, {self.d}, {self.d_sae}, {self.k}"


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """Options of ``sparsekern bench``."""

    shapes: list[str] | None = option(
        None, f"B,d,N,k: tokens, width, latents, active latents; may be repeated; by default {' and '.join(SHAPES)}"
    )
    activations: Path | None = option(
        None, "a harvested store to measure on too: at the shapes of its width, or at 2048,d,64d,32 if none is given"
    )
    data: str = option(
        "all", "made Zipf data, the harvested activations, or all there is", choices=("all", "zipf", "activations")
    )
    parts: list[str] | None = option(
        None, "what to measure, may be repeated; by default both", choices=("kernels", "steps")
    )
    contenders: list[str] | None = option(
        None,
        "whose full steps, may be repeated; by default, without `architectures`, all that are installed and not routed",
        choices=CONTENDERS,
    )
    architectures: list[str] | None = option(
        None, "time these beside the peers that have them, may be repeated; by default none", choices=ARCHITECTURES
    )
    rounds: int = option(9, "timed turns of each", at_least=2)
    warm_up: int = option(10, "training steps before anything is timed", unit="steps", at_least=2)
    lr: float = option(1e-4, "learning rate of every contender", above=0)
    threads: int | None = option(None, "of torch and the kernels; by default torch's own number", at_least=1)
    seed: int = option(0, "of data and weights", at_least=0)
    memory_share: float = option(0.6, "of the free memory that the processes alive at one time may take", above=0)
    quick: bool = option(False, "one tiny shape, few rounds: shows that everything runs; the figures mean nothing")
    output: Path = option(Path("bench/results/bench.json"), "the record; the plot goes next to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix != ".json":
            raise ValueError(f"output must end in .json, got {self.output}")
        if self.data == "activations" and self.activations is None:
            raise ValueError("data=activations needs a store: give its folder as activations")
        for shape in self.shapes or []:
            parse_shape(shape)

    def resolved(self) -> BenchOptions:
        """These options with those that `quick` stands for."""
        if not self.quick:
            return self
        return dataclasses.replace(self, shapes=self.shapes or QUICK_SHAPES, rounds=3, warm_up=2)

    def cases(self, store_width: int | None) -> list[Case]:
        """What to measure, given the width of the harvested activations where there are any."""
        shapes = [parse_shape(shape) for shape in self.shapes or SHAPES]
        made = [Case("zipf", *shape) for shape in shapes if self.data != "activations"]
        if store_width is None or self.data == "zipf":
            return made
        if self.shapes is None:
            shapes = [(2048, store_width, 64 * store_width, 32)]
        harvested = [Case("activations", *shape) for shape in shapes if shape[1] == store_width]
        if not harvested:
            raise ValueError(f"shapes must hold one of d={store_width}, the width of the activations")
        return made + harvested


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """``B,d,N,k`` as numbers."""
    try:
        rows, d, d_sae, k = (int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"shapes must be four whole numbers B,d,N,k, got {text!r}") from error
    if min(rows, d, d_sae, k) < 1 or rows < 2 or k > d_sae:
        raise ValueError(f"shapes must have B of at least 2, d and N of at least 1, and k in 1 … N, got {text!r}")
    return rows, d, d_sae, k

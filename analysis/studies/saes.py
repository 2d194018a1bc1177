"""The SAEs that the studies of harvested activations share: some widths, some seeds of each."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.studies.options import SAEsOptions
from sparsekern.analysis.studies.page import source_of, token_text
from sparsekern.analysis.tokens import HeldOut
from sparsekern.data import ActivationStore
from sparsekern.files import write_json
from sparsekern.modules import Activation

_STRONGEST = 8  # tokens of a latent whose words are told
_SHARED = ("k", "steps", "batch_size", "lr", "held_out", "seed")


@dataclass(frozen=True, eq=False)
class Trained:
    """An SAE and what it does on the held-out tokens.

    Attributes
    ----------
    sae : SAE
        On the CPU, for evaluation.
    seed : int
        Of its first weights.
    codes : SparseCodes
        Of the held-out tokens.
    density : Tensor [d_sae]
        Share of these on which each latent is active.
    fvu : float
        On the same tokens.
    """

    sae: sk.SAE
    seed: int
    codes: sk.SparseCodes
    density: Tensor
    fvu: float

    @property
    def alive(self) -> Tensor:
        """Latents that are active on a held-out token, ``[d_sae]`` bool."""
        return self.density > 0

    def words(self, store: ActivationStore, held_out: HeldOut, latent: int, count: int = 3) -> str:
        """The words of the tokens on which a latent is most active, for a cell of a table."""
        found = self.strongest(store, held_out, latent)[:count]
        shown = ((word.replace("|", "¦").replace("`", "ˋ"), n) for word, n in found)
        return ", ".join(f"`{word}` ×{n}" for word, n in shown) or "–"

    def strongest(self, store: ActivationStore, held_out: HeldOut, latent: int) -> list[tuple[str, int]]:
        """These words with how often they are among the strongest tokens, the commonest first."""
        tokens, slots = ((self.codes.indices == latent) & (self.codes.values > 0)).nonzero(as_tuple=True)
        strongest = tokens[self.codes.values[tokens, slots].argsort(descending=True, stable=True)[:_STRONGEST]]
        rows = held_out.rows[strongest].tolist()
        # A token of spaces is no part of a word: it stands for itself.
        return Counter(
            store.word_text(row) or token_text(store, int(store.token_ids[row])) for row in rows
        ).most_common()


@dataclass(frozen=True, eq=False)
class TrainedSAEs:
    """What :func:`train_saes` returns: `by_width` has the SAEs of each width, by seed."""

    held_out: HeldOut
    by_width: dict[int, list[Trained]]

    @property
    def widths(self) -> list[int]:
        """Numbers of latents, rising."""
        return list(self.by_width)

    def setting(self, store: ActivationStore, options: SAEsOptions) -> str:
        """What was trained on what, and measured, for the opening of a page."""
        return (
            f"- Activations: {source_of(store)}.\n"
            f"- SAEs: TopK, k = {options.k}, {options.seeds} seeds of each width, {options.steps:,} steps of "
            f"{options.batch_size:,} tokens, with AuxK.\n"
            f"- Measured on {len(self.held_out.x):,} tokens of held-out contexts. Latents that are active on none of "
            "these take no part."
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows that say what the SAEs are like."""
        header = ["latents", "FVU", "silent on the held-out tokens"]
        rows = []
        for width, group in self.by_width.items():
            fvus = ", ".join(f"{one.fvu:.4f}" for one in group)
            silent = ", ".join(f"{1 - one.alive.double().mean():.1%}" for one in group)
            rows.append([f"{width:,}", fvus, silent])
        return header, rows


def train_saes(store: ActivationStore, options: SAEsOptions, progress: bool = True) -> TrainedSAEs:
    """Train the SAEs that the (resolved) options name, or load those that are in their folder already.

    All see the same batches in the same order: those of one width differ in the random rows that they start from.

    Raises
    ------
    ValueError
        If the folder has SAEs of other options or activations.
    """
    assert options.latents is not None
    held_out = HeldOut.of(store, options.held_out, options.seed, options.tokens)
    by_width = {
        width: [
            train_one(store, options, width, seed, held_out, progress=progress)
            for seed in range(options.seed, options.seed + options.seeds)
        ]
        for width in options.latents
    }
    return TrainedSAEs(held_out, by_width)


def train_one(
    store: ActivationStore,
    options: SAEsOptions,
    width: int,
    seed: int,
    held_out: HeldOut,
    activation: Activation | None = None,
    progress: bool = True,
) -> Trained:
    """Train one SAE as :func:`train_saes` does, or load it: with an activation other than TopK, for a control.

    Its folder has the name of that activation between the width and the seed.
    """
    assert options.saes is not None
    _check_folder(store, options)
    kind = "" if activation is None else f"-{activation.name}"
    folder = options.saes / f"{width}{kind}-seed{seed}"
    if (folder / "summary.json").is_file():
        return _measured(sk.SAE.from_pretrained(folder / "sae").eval(), seed, held_out.x)
    if progress:
        print(f"{folder.name}:", file=sys.stderr, flush=True)
    sae = sk.SAE(
        store.d,
        width,
        activation or sk.TopK(options.k),
        dead_after=max(1, min(10_000_000, options.steps * options.batch_size // 4)),
        generator=torch.Generator().manual_seed(seed),
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    result = sk.train(
        sae,
        store,
        output=folder,
        resume=(folder / "checkpoints").is_dir(),
        progress=progress,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        held_out=options.held_out,
        seed=options.seed,
        eval_every=options.steps,
        checkpoint_every=options.steps,
        keep_checkpoints=1,
        eval_tokens=options.tokens,
    )
    return _measured(result.sae.to("cpu"), seed, held_out.x)


def _check_folder(store: ActivationStore, options: SAEsOptions) -> None:
    """Write down what the SAEs of the folder were trained with; raise if it is something else."""
    assert options.saes is not None
    wanted = {name: getattr(options, name) for name in _SHARED} | {"tokens": store.tokens, "source": store.source}
    path = options.saes / "saes.json"
    if not path.is_file():
        options.saes.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    other = [f"{name} {found.get(name)!r}" for name, value in wanted.items() if found.get(name) != value]
    if other:
        raise ValueError(f"saes must name a folder of SAEs of these options; those in {options.saes} have {other[0]}")


@torch.no_grad()
def _measured(sae: sk.SAE, seed: int, x: Tensor) -> Trained:
    codes = sae.encode(x)
    assert isinstance(codes, sk.SparseCodes)
    density = codes.firing_counts() / len(x)
    error = (sae.decode(codes) - x).double().square().sum() / (x - x.mean(0)).double().square().sum()
    return Trained(sae, seed, codes, density, float(error))

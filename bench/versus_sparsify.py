"""Held-out FVU after the same training, in sparsekern and in EleutherAI's sparsify.

::

    python -m sparsekern.bench.versus_sparsify STORE --steps 600 --lr 1e-3 --seed 0 1 --output versus_sparsify.json

Both libraries see the same batches in the same order, for the same number of steps, with ``torch.optim.Adam`` at the
same learning rates, in float32. Each starts from its own initialization and takes its own kind of step, as documented
at :func:`train_sparsify` and :class:`sparsekern.Trainer`. One function measures both. ``docs/quality.md`` tells what
came out.

Needs ``pip install 'sparsekern[bench]'``. Says nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

import sparsekern as sk
from sparsekern.bench import record
from sparsekern.data import ActivationLoader, ActivationStore
from sparsekern.files import write_json
from sparsekern.training import pca_fvu
from sparsekern.training.schedule import default_lr, warmup_and_decay

CURVE_POINTS, CURVE_TOKENS = 5, 4096


@dataclass(frozen=True)
class Settings:
    """What every arm is trained with; learning rate and seed come on top."""

    expansion: int
    k: int
    steps: int
    batch_size: int
    warmup_steps: int
    decay_share: float
    aux_coefficient: float
    held_out: float
    eval_tokens: int


Arm = Callable[[ActivationLoader, Settings, float, int], Iterator[sk.SAE]]
"""Trains on a loader with settings, a learning rate and a seed, and gives the autoencoder after every step."""


def train_sparsekern(loader: ActivationLoader, settings: Settings, lr: float, seed: int) -> Iterator[sk.SAE]:
    """Train in :class:`sparsekern.Trainer`."""
    sae = sk.SAE(
        loader.d,
        settings.expansion * loader.d,
        sk.TopK(settings.k),
        aux_coefficient=settings.aux_coefficient,
        generator=torch.Generator().manual_seed(seed),
    )
    trainer = sk.Trainer(
        sae, lr=lr, steps=settings.steps, warmup_steps=settings.warmup_steps, decay_share=settings.decay_share
    )
    for step in range(settings.steps):
        trainer.step(loader.batch(step))
        yield sae


def train_sparsify(loader: ActivationLoader, settings: Settings, lr: float, seed: int) -> Iterator[sk.SAE]:
    """Train a ``sparsify.SparseCoder`` in the steps of sparsify's own trainer, as read in eai-sparsify 1.3.3.

    There, ``Trainer.__init__`` seeds torch and builds the coder in float32. The forward hook in ``Trainer.fit`` moves
    ``b_dec`` to the mean of the first batch, scales the decoder rows to unit norm *before* every forward pass, and
    differentiates the FVU. ``Trainer.fit`` then removes the gradient along the decoder rows and takes the optimizer's
    step; nothing clips the gradient. Its ``adam`` is ``torch.optim.Adam`` with torch's defaults where bitsandbytes is
    not installed. Its schedule, a linear warm-up of 1,000 steps and a linear decay, makes way for the common one.
    """
    torch.manual_seed(seed)
    config = SparseCoderConfig(expansion_factor=settings.expansion, k=settings.k)
    coder = SparseCoder(loader.d, config, dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=lr)
    view = as_sparsekern(coder)
    for step in range(settings.steps):
        x = loader.batch(step)
        if step == 0:
            coder.b_dec.data.copy_(x.mean(0))
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        factor = warmup_and_decay(step, settings.warmup_steps, settings.steps, settings.decay_share)
        optimizer.param_groups[0]["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad()
        yield view


def as_sparsekern(coder: SparseCoder) -> sk.SAE:
    """The same autoencoder as an :class:`sparsekern.SAE`, on the same memory."""
    sae = sk.SAE(coder.d_in, coder.num_latents, sk.TopK(coder.cfg.k), device="meta")
    weights = {"W_enc": coder.encoder.weight, "b_enc": coder.encoder.bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    sae.load_state_dict({name: w.detach() for name, w in weights.items()}, strict=False, assign=True)
    return sae


def forward_difference(x: Tensor, k: int) -> float:
    """Largest difference of sparsify's reconstructions from those of :func:`as_sparsekern`, relative to `x`."""
    coder = SparseCoder(x.shape[1], SparseCoderConfig(expansion_factor=4, k=k))
    coder.b_dec.data.copy_(x.mean(0))
    with torch.no_grad():
        return ((as_sparsekern(coder)(x) - coder(x).sae_out).abs().max() / x.abs().max()).item()


def compare(store: ActivationStore, arms: dict[str, Arm], settings: Settings, lr: float, seed: int) -> dict[str, Any]:
    """Train every arm once and measure all on the same held-out tokens."""
    training, rest = store.split(settings.held_out, seed)
    held_out = rest.load(settings.eval_tokens)
    result: dict[str, Any] = {
        "lr": lr,
        "seed": seed,
        "heldout_tokens": len(held_out),
        "pca_fvu": pca_fvu(training.load(100_000), held_out, settings.k),
    }
    points = {settings.steps * point // CURVE_POINTS for point in range(1, CURVE_POINTS + 1)}
    for name, train in arms.items():
        curve = {}
        loader = ActivationLoader(training, settings.batch_size, seed=seed)
        for step, sae in enumerate(train(loader, settings, lr, seed), 1):
            if step in points:
                curve[step] = sk.evaluate(sae, held_out[:CURVE_TOKENS].split(settings.batch_size)).fvu
        final = sk.evaluate(sae, held_out.split(settings.batch_size))
        measures = {measure: getattr(final, measure) for measure in ("fvu", "l0", "silent_fraction")}
        ratio = final.fvu / result["sparsify"]["fvu"] if "sparsify" in result else 1.0
        result[name] = {**measures, "ratio_to_sparsify": ratio, "curve": curve}
        print(f"lr {lr:.2e}  seed {seed}  {name:24}  FVU {final.fvu:.5f}  ratio {ratio:.4f}  {curve}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="activations written by `sparsekern harvest`")
    parser.add_argument("--lr", type=float, nargs="+", help="peak; by default 1e-3 and the rule of both libraries")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1], help="of weights, split and order of the data")
    parser.add_argument("--expansion", type=int, default=64, help="latents as a multiple of the width")
    parser.add_argument("--k", type=int, default=32, help="active latents a token")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=2048, help="tokens a step")
    parser.add_argument("--warmup-steps", type=int, help="by default a twentieth of the run")
    parser.add_argument("--decay-share", type=float, default=0.2, help="final share of the run that decays to 0")
    parser.add_argument("--aux-coefficient", type=float, default=0.0, help="AuxK in sparsekern; sparsify has it off")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the contexts")
    parser.add_argument("--eval-tokens", type=int, default=65536, help="held-out tokens measured, at most")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--output", type=Path, help="JSON file of the results, written after every comparison")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.warmup_steps is None:
        args.warmup_steps = args.steps // 20
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    arms: dict[str, Arm] = {"sparsify": train_sparsify, "sparsekern": train_sparsekern}

    store = ActivationStore(args.store)
    difference = forward_difference(store.rows(0, 1024), settings.k)
    if difference > 1e-5:
        raise SystemExit(f"the two libraries disagree on the same weights, by {difference:.1e}")
    comparisons: list[dict[str, Any]] = []
    report = {
        **record.provenance(),
        "peer": {"eai-sparsify": importlib.metadata.version("eai-sparsify")},
        "data": {**store.source, "tokens": store.tokens, "d": store.d},
        "settings": asdict(settings),
        "comparisons": comparisons,
    }
    for seed in args.seed:
        for lr in args.lr or [1e-3, default_lr(settings.expansion * store.d)]:
            comparisons.append(compare(store, arms, settings, lr, seed))
            if args.output:
                write_json(args.output, report)


if __name__ == "__main__":
    main()

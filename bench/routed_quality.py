"""Held-out FVU of routed SAEs beside plain ones: at equal width, and at equal FLOPs of the encoder.

::

    python -m sparsekern.bench.routed_quality STORE --width 12288 --base 1536 --seed 0 1 2 --output routed_quality.json
    python -m sparsekern.bench.routed_quality --table bench/results/routed_quality.json

Every arm sees the same batches in the same order, for the same number of steps, at the same learning rate and k.
*Equal width* compares arms of `width` latents. *Equal FLOPs* compares a plain SAE of `base` latents with mixtures of E
experts of `base` latents each, one active: their encoders multiply as much for a token, the router apart.
``docs/quality.md`` tells what came out. Says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sparsekern as sk
from sparsekern.bench import record
from sparsekern.data import ActivationStore
from sparsekern.files import write_json


class Arm(NamedTuple):
    """One kind of SAE: so many latents, in so many experts, of which so many are active, and the router's options."""

    name: str
    group: str
    latents: int
    n_experts: int = 1
    n_active: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def build(self, d: int, k: int, dead_after: int, seed: int) -> sk.SAE:
        """A fresh SAE."""
        generator = torch.Generator().manual_seed(seed)
        if self.n_experts == 1:
            return sk.SAE(d, self.latents, sk.TopK(k), dead_after=dead_after, generator=generator)
        return sk.SwitchSAE(
            d,
            self.latents,
            sk.TopK(k),
            n_experts=self.n_experts,
            n_active=self.n_active,
            dead_after=dead_after,
            generator=generator,
            **dict(self.options),
        )

    def encoder_flops(self, d: int) -> int:
        """Multiplications and additions of the encoder for a token, the router included."""
        router = self.n_experts if self.n_experts > 1 else 0
        return 2 * d * (self.latents // self.n_experts * self.n_active + router)


def arms(width: int, base: int) -> list[Arm]:
    """What is compared."""
    counts = [e for e in (2, 4, 8, 16, 32) if e * base <= width]
    few = width // base
    return [
        Arm("TopK", "equal width", width),
        Arm(f"{few} experts", "equal width", width, few),
        Arm(f"{2 * few} experts", "equal width", width, 2 * few),
        Arm(f"2 of {few} experts", "equal width", width, few, 2),
        Arm(f"2 of {few} experts, feature scaling", "equal width", width, few, 2, (("feature_scaling", True),)),
        Arm(f"{few} experts, softmax gate", "equal width", width, few, 1, (("gate", "softmax"),)),
        Arm(f"{few} experts, random start", "equal width", width, few, 1, (("router_start", "random"),)),
        Arm("TopK", "equal FLOPs", base),
        *(Arm(f"{e} experts", "equal FLOPs", e * base, e) for e in counts),
    ]


def measure(arm: Arm, store: ActivationStore, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one arm and measure it on the held-out tokens."""
    dead_after = args.steps * args.batch_size // 4
    sae = arm.build(store.d, args.k, dead_after, seed)
    result = sk.train(
        sae,
        store,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=seed,
        eval_every=args.steps,
        progress=False,
    )
    found = {name: getattr(result.evaluation, name) for name in ("fvu", "l0", "silent_fraction")}
    if isinstance(sae, sk.SwitchSAE):
        loads = sae.loads / sae.loads.sum() * sae.n_experts
        found |= {"load_min": loads.min().item(), "load_max": loads.max().item()}
    return {"seed": seed, **found}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: mean and range over seeds, and the ratio to the TopK SAE of the group, seed by seed."""
    lines = []
    for group in ("equal width", "equal FLOPs"):
        rows = [row for row in report["arms"] if row["group"] == group]
        plain = {run["seed"]: run["fvu"] for run in rows[0]["runs"]}
        lines += [
            f"**{group}**",
            "",
            "| | latents | encoder, MFLOP a token | held-out FVU: mean (range) | ÷ TopK: mean (range) "
            "| silent latents | loads ÷ even, last batch |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            runs = row["runs"]
            ratios = [run["fvu"] / plain[run["seed"]] for run in runs]
            loads = "–"
            if "load_min" in runs[0]:
                loads = f"{min(r['load_min'] for r in runs):.2f} – {max(r['load_max'] for r in runs):.2f}"
            silent = statistics.mean(run["silent_fraction"] for run in runs)
            cells = [
                row["name"],
                f"{row['latents']:,}",
                f"{row['encoder_flops'] / 1e6:.2f}",
                _spread([run["fvu"] for run in runs], 4),
                _spread(ratios, 3),
                f"{silent:.1%}",
                loads,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _spread(numbers: list[float], digits: int) -> str:
    mean, low, high = statistics.mean(numbers), min(numbers), max(numbers)
    return f"{mean:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="activations written by `sparsekern harvest`")
    parser.add_argument("--table", type=Path, help="print the tables of a report instead")
    parser.add_argument("--width", type=int, default=12288, help="latents of the arms of equal width")
    parser.add_argument("--base", type=int, default=1536, help="latents that a token meets at equal FLOPs")
    parser.add_argument("--k", type=int, default=32, help="active latents a token")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=2048, help="tokens a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="of weights and order of the data")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--output", type=Path, help="JSON file of the report, written after every run")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.store is None:
        parser.error("give a store, or --table")
    if args.threads:
        torch.set_num_threads(args.threads)
    store = ActivationStore(args.store)
    settings = {name: getattr(args, name) for name in ("width", "base", "k", "steps", "batch_size", "lr")}
    rows: list[dict[str, Any]] = []
    report = {
        **record.provenance(),
        "data": {**store.source, "tokens": store.tokens, "d": store.d},
        "settings": settings,
        "arms": rows,
    }
    chosen = arms(args.width, args.base)
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    for arm in chosen:
        flops = arm.encoder_flops(store.d)
        rows.append({**arm._asdict(), "encoder_flops": flops, "runs": []})
    for seed in args.seed:
        for arm, row in zip(chosen, rows, strict=True):
            key = (*arm[2:], seed)  # an arm of both groups is trained once
            done[key] = done.get(key) or measure(arm, store, args, seed)
            row["runs"].append(done[key])
            print(f"seed {seed}  {arm.group:12}  {arm.name:36}  FVU {done[key]['fvu']:.5f}", flush=True)
            if args.output:
                write_json(args.output, report)


if __name__ == "__main__":
    main()

"""What it saves and what it costs to let idle rows rest: ``python -m sparsekern.bench.rest_after STORE``.

Trains the same autoencoder on the same batches with several ``rest_after``, by turns: one step of each in every round,
so that their times can be compared. Reports held-out FVU and silent latents at the end, the time of a step relative to
Adam's (``rest_after`` none), and the share of the rows that a late step updates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import sparsekern as sk
from sparsekern.bench import record
from sparsekern.data import ActivationLoader, ActivationStore
from sparsekern.files import write_json
from sparsekern.progress import Progress


def compare(
    store: ActivationStore, latents: int, k: int, patience: list[int | None], steps: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Train an autoencoder for each `rest_after` in `patience`; results by its name."""
    training, rest = store.split(0.05, seed)
    held_out = rest.load(32768)
    loader = ActivationLoader(training, batch_size, seed=seed)
    trainers: dict[int | None, sk.Trainer] = {}
    times: dict[int | None, list[float]] = {}
    for rest_after in patience:
        sae = sk.SAE(store.d, latents, sk.TopK(k), generator=torch.Generator().manual_seed(seed))
        trainers[rest_after] = sk.Trainer(sae, lr=1e-3, steps=steps, rest_after=rest_after)
        times[rest_after] = []
    with Progress("training", total=steps * batch_size * len(patience)) as progress:
        for step in range(steps):
            x = loader.batch(step)
            # The order changes, so that nobody always follows the same neighbour.
            for rest_after in patience if step % 2 else reversed(patience):
                start = time.perf_counter()
                trainers[rest_after].step(x)
                times[rest_after].append(time.perf_counter() - start)
            progress.update((step + 1) * batch_size * len(patience))
    results = {}
    for rest_after, trainer in trainers.items():
        late = slice(steps // 2, None)
        ratio = [mine / adams for mine, adams in zip(times[rest_after][late], times[None][late], strict=True)]
        measured = sk.evaluate(trainer.sae, held_out.split(batch_size))
        moments = trainer.optimizer.state[trainer.sae.W_enc]
        updated = (moments["last"] == int(moments["step"])).float().mean().item() if "last" in moments else 1.0
        results["never" if rest_after is None else str(rest_after)] = {
            "fvu": measured.fvu,
            "silent_fraction": measured.silent_fraction,
            "step_over_adam": statistics.median(ratio),
            "rows_updated": updated,
        }
        print(f"latents {latents}  seed {seed}  rest_after {rest_after}  {results}", flush=True)
    return results


def main() -> None:
    """Run all comparisons and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="activations written by `sparsekern harvest`")
    parser.add_argument("--latents", type=int, nargs="+", default=[24576, 98304])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rest-after", type=int, nargs="+", default=[64, 8, 1])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path("bench/results/rest_after.json"))
    args = parser.parse_args()
    store = ActivationStore(args.store)
    report: dict[str, Any] = {
        **record.provenance(),
        "data": {**store.source, "tokens": store.tokens, "d": store.d},
        "settings": {"k": args.k, "steps": args.steps, "batch_size": args.batch_size, "lr": 1e-3},
        "comparisons": [],
    }
    patience = [None, *args.rest_after]
    for latents in args.latents:
        for seed in args.seed:
            found = compare(store, latents, args.k, patience, args.steps, args.batch_size, seed)
            report["comparisons"].append({"latents": latents, "seed": seed, "rest_after": found})
            write_json(args.output, report)


if __name__ == "__main__":
    main()

"""Held-out FVU of every architecture after the same training, in sparsekern and in the libraries that have it.

::

    python -m sparsekern.bench.versus_peers STORE --seed 0 1 --output versus_peers.json
    python -m sparsekern.bench.versus_peers STORE --architectures transcoder --layers STORE STORE … --output …
    python -m sparsekern.bench.versus_peers --table bench/results/versus_peers.json

Every arm sees the same batches in the same order, for the same number of steps, at the same learning rates, in float32.
Each starts from its library's own initialization, has the input at the scale that its
library asks for, and takes its library's own kind of step, as the classes of :mod:`~sparsekern.bench.peers` and
:mod:`~sparsekern.bench.architectures` say. One function measures all through each library's own encoder and decoder.

Where the number of active latents is not given but comes out of a penalty, an arm is trained with several weights of
the penalty, until two of them enclose the wanted number; log FVU is interpolated between them in log L0. Peers' weights
rise from 0 over the first steps; ours, which begins with few latents active, has its weight from the first.

The record is written after every run; a run that it holds already is not done again. ``docs/quality.md`` tells what
came out. Needs ``pip install 'sparsekern[bench]'``. Says nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.bench import record
from sparsekern.bench.architectures import ENTRIES, contenders_of
from sparsekern.bench.contenders import Contender, Plan
from sparsekern.bench.options import ARCHITECTURES, Case
from sparsekern.data import ActivationLoader, ActivationStore, ActivationView
from sparsekern.files import write_json
from sparsekern.progress import Progress
from sparsekern.training import pca_fvu

CLOSE = 1.5  # points whose numbers of active latents are within this factor may be interpolated between
MOST_RUNS = 6  # to find them
BAR = 1.015  # ours may have this many times the FVU of a peer


@dataclass(frozen=True)
class Settings:
    """What every arm is trained with."""

    latents: int
    k: int
    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    decay_share: float
    sparsity_warmup_steps: int
    held_out: float
    eval_tokens: int


class Point(NamedTuple):
    """A run: the weight of its penalty, active latents a token, FVU."""

    sparsity: float
    l0: float
    fvu: float


class Data:
    """Batches of the same tokens in one layer or several."""

    def __init__(self, stores: list[ActivationStore], settings: Settings, seed: int) -> None:
        views = [store.split(settings.held_out, seed) for store in stores]
        if any(not torch.equal(views[0][part].lengths, view[part].lengths) for view in views for part in (0, 1)):
            raise ValueError("the stores of the layers must hold the same contexts")
        self.training = [view[0] for view in views]
        self._loaders = [ActivationLoader(view, settings.batch_size, seed=seed) for view in self.training]
        self._held_out = [self._whole(view[1], settings) for view in views]

    @staticmethod
    def _whole(view: ActivationView, settings: Settings) -> Tensor:
        rows = view.load(settings.eval_tokens)
        return rows[: len(rows) // settings.batch_size * settings.batch_size]

    def batch(self, number: int, layers: int) -> Tensor:
        """``[layers, B, d]``."""
        return torch.stack([loader.batch(number) for loader in self._loaders[:layers]])

    def held_out(self, rows: int, layers: int) -> Iterator[Tensor]:
        """Batches of tokens that nothing trains on."""
        return zip_stacked([layer.split(rows) for layer in self._held_out[:layers]])


def zip_stacked(layers: list[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """The n-th batches of all layers, stacked."""
    return (torch.stack(batches) for batches in zip(*layers, strict=True))


@torch.no_grad()
def measure(contender: Contender, batches: Iterator[Tensor], scale: float, mode: str) -> dict[str, float]:
    """FVU and active latents a token over batches ``[layers, B, d]``, in float64 sums; of several targets the mean."""
    error = norm = total = torch.zeros((), dtype=torch.float64)
    active, tokens = 0, 0
    for layers in batches:
        given = contender.inputs(layers * scale)
        x, y = given[0], given[-1].double()
        recon, l0 = contender.reconstruct(x, mode)
        rows, recon = y.view(len(y), -1, y.shape[-1]), recon.double().view(len(y), -1, y.shape[-1])
        error = error + (rows - recon).square().sum((0, 2))
        norm = norm + rows.square().sum((0, 2))
        total = total + rows.sum(0)
        active += int(l0.sum())
        tokens += len(y)
    if tokens < 2:
        raise ValueError(f"held_out must leave at least one batch of tokens to measure, got {tokens}")
    variance = norm - total.square().sum(-1) / tokens
    return {"fvu": (error / variance).mean().item(), "l0": active / tokens}


def train(
    name: str, data: Data, settings: Settings, seed: int, sparsity: float | None, minutes: float, meter: Meter
) -> dict[str, Any]:
    """Train one contender once and measure it; ``stopped`` says so if it took too long."""
    kind = ENTRIES[name].kind
    torch.manual_seed(seed)
    case = Case("activations", settings.batch_size, data.training[0].d, settings.latents, settings.k)
    plan = Plan(settings.steps, settings.warmup_steps, settings.decay_share)
    contender = kind(case, settings.lr, plan=plan)
    scale = contender.input_scale(data.batch(0, 1)[0])
    run: dict[str, Any] = {"contender": name, "seed": seed, "sparsity": sparsity, "input_scale": scale}
    start = time.perf_counter()
    meter.expect(settings.steps)
    for step in range(settings.steps):
        if sparsity is not None:
            ramp = (step + 1) / (settings.sparsity_warmup_steps + 1)
            ramps = contender.ramps and not contender.aims
            contender.set_sparsity(sparsity * (min(1.0, ramp) if ramps else 1.0))
        contender.step(*contender.inputs(data.batch(step, contender.layers) * scale))
        meter.add(1, f"{name}, seed {seed}" + (f", sparsity {sparsity:.3g}" if sparsity else ""))
        if time.perf_counter() - start > 60 * minutes:
            return {**run, "stopped": f"after {step + 1} steps, for taking {minutes:g} minutes"}
    run["minutes"] = (time.perf_counter() - start) / 60
    held_out = {
        mode: measure(contender, data.held_out(settings.batch_size, contender.layers), scale, mode)
        for mode in contender.modes
    }
    return {**run, **held_out[contender.modes[0]], "modes": held_out}


def next_sparsity(points: list[Point], start: float, target: float, aims: bool) -> float | None:
    """The next weight of the penalty to try; None once the points enclose the target closely, or if it was tried.

    The number of active latents is taken to be a power of the weight between two points, its inverse near a single one.
    """
    if not points:
        return start
    below, above = neighbours(points, target)
    if below and above and above.l0 <= CLOSE * below.l0:
        return None
    # Aim at the other side of the target, so as to enclose it.
    from_below = above is None or (below is not None and target / below.l0 < above.l0 / target)
    nearest = below if from_below else above
    assert nearest is not None
    aim = target * (1.15 if from_below else 1 / 1.15)
    slope = 1.0 if aims else -1.0
    others = [point for point in points if point.l0 != nearest.l0 and point.sparsity != nearest.sparsity]
    if others:
        other = (above if from_below else below) or min(others, key=lambda p: abs(math.log(p.l0 / nearest.l0)))
        found = math.log(other.l0 / nearest.l0) / math.log(other.sparsity / nearest.sparsity)
        slope *= min(3.0, max(0.3, found / slope))
    found = nearest.sparsity * min(30.0, max(1 / 30, (aim / nearest.l0) ** (1 / slope)))
    return None if any(math.isclose(found, point.sparsity, rel_tol=1e-3) for point in points) else found


def neighbours(points: list[Point], target: float) -> tuple[Point | None, Point | None]:
    """The nearest points on both sides of the target."""
    below = max((point for point in points if point.l0 <= target), key=lambda point: point.l0, default=None)
    above = min((point for point in points if point.l0 > target), key=lambda point: point.l0, default=None)
    return below, above


def at_target(points: list[Point], target: float) -> float | None:
    """FVU at the target, log FVU being linear in log L0 between the neighbours; None without close ones."""
    below, above = neighbours(points, target)
    if below is None or above is None or above.l0 > CLOSE * below.l0:
        return None
    share = math.log(target / below.l0) / math.log(above.l0 / below.l0)
    return below.fvu * (above.fvu / below.fvu) ** share


def points_of(runs: list[dict[str, Any]], name: str, seed: int) -> list[Point]:
    """What is known of a contender whose number of active latents varies."""
    own = [run for run in runs if run["contender"] == name and run["seed"] == seed and "fvu" in run]
    return [Point(run["sparsity"], max(run["l0"], 1e-2), run["fvu"]) for run in own]


class Meter:
    """Counts steps into a progress bar."""

    def __init__(self, bar: Progress, total: int) -> None:
        self.bar, self.done, self.total = bar, 0, total

    def expect(self, steps: int) -> None:
        """Make room for a run: how many a search takes is not known before."""
        self.total = max(self.total, self.done + steps)

    def add(self, steps: int, note: str) -> None:
        """Report `steps` more."""
        self.done += steps
        self.bar.update(self.done, total=self.total, note=note)


def arm(
    name: str, data: Data, settings: Settings, seed: int, minutes: float, meter: Meter, runs: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The runs of one contender that `runs` lacks."""
    kind = ENTRIES[name].kind
    if kind.sparsity is None:
        if not any(run["contender"] == name and run["seed"] == seed for run in runs):
            yield train(name, data, settings, seed, None, minutes, meter)
        return
    while True:
        own = [run for run in runs if run["contender"] == name and run["seed"] == seed]
        if len(own) >= MOST_RUNS or any("stopped" in run for run in own):
            return
        # Another seed's last weight is a better start than the class's.
        tried = [run["sparsity"] for run in runs if run["contender"] == name and "fvu" in run]
        sparsity = next_sparsity(
            points_of(runs, name, seed), tried[-1] if tried else kind.sparsity, settings.k, kind.aims
        )
        if sparsity is None:
            return
        yield train(name, data, settings, seed, sparsity, minutes, meter)


def fvu_at_k(runs: list[dict[str, Any]], name: str, seed: int, k: int) -> float | None:
    """FVU of a contender at k active latents; None where it is not known."""
    if ENTRIES[name].kind.sparsity is not None:
        return at_target(points_of(runs, name, seed), k)
    return next((r["fvu"] for r in runs if r["contender"] == name and r["seed"] == seed and "fvu" in r), None)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: FVU at k active latents and ratio to each peer's, seed by seed; bold beyond the bar."""
    k, runs = report["settings"]["k"], report["runs"]
    names = list(dict.fromkeys(run["contender"] for run in runs))
    seeds = sorted({run["seed"] for run in runs})
    lines = [
        f"| architecture | peer | sparsekern's FVU at {k} active latents | the peer's | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in names:
        own = ENTRIES[name].against
        if name == own:
            continue
        found = [(fvu_at_k(runs, own, seed, k), fvu_at_k(runs, name, seed, k)) for seed in seeds]
        ratios = [ours / theirs if ours and theirs else None for ours, theirs in found]
        columns = zip(*found, strict=True)
        cells = [", ".join("–" if value is None else f"{value:.4f}" for value in column) for column in columns]
        marked = ["–" if r is None else f"**{r:.3f}**" if r > BAR else f"{r:.3f}" for r in ratios]
        lines.append(f"| {own} | {name.removeprefix(own + '-')} | {' | '.join(cells)} | {', '.join(marked)} |")
    return "\n".join(lines)


def modes_table(report: dict[str, Any]) -> str:
    """Where a library has two ways to encode: FVU and active latents of both."""
    lines = ["| contender | seed | mode | FVU | active latents |", "| --- | --- | --- | --- | --- |"]
    for run in report["runs"]:
        if len(run.get("modes", {})) > 1:
            for mode, found in run["modes"].items():
                lines.append(
                    f"| {run['contender']} | {run['seed']} | {mode} | {found['fvu']:.4f} | {found['l0']:.1f} |"
                )
    return "\n".join(lines)


def installed(name: str) -> bool:
    """Whether the library of a contender is."""
    return all(importlib.util.find_spec(module.split(".")[0]) for module in ENTRIES[name].kind.imports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="activations written by `sparsekern harvest`")
    parser.add_argument("--table", type=Path, help="print the tables of a report instead")
    parser.add_argument("--layers", type=Path, nargs="+", help="stores of successive layers, for what takes several")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, help="by default all that have the data")
    parser.add_argument("--contenders", nargs="+", help="only these, such as relu-saelens; by default all installed")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1], help="of weights, split and order of the data")
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32, help="active latents a token")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=1024, help="tokens a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup-steps", type=int, help="by default a twentieth of the run")
    parser.add_argument("--decay-share", type=float, default=0.2, help="final share of the run that decays to 0")
    parser.add_argument("--sparsity-warmup-steps", type=int, help="of peers' weights; by default a fifth of the run")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the contexts")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="held-out tokens measured, at most")
    parser.add_argument("--minutes", type=float, default=30, help="that a run may take")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--output", type=Path, help="JSON file of the record; runs that it holds are not done again")
    args = parser.parse_args()
    if args.table:
        report = json.loads(args.table.read_text())
        print(table(report), modes_table(report), sep="\n\n")
        return
    if args.store is None:
        parser.error("give a store, or --table")
    if args.threads:
        torch.set_num_threads(args.threads)
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels want a GPU's tensors
    args.warmup_steps = args.steps // 20 if args.warmup_steps is None else args.warmup_steps
    if args.sparsity_warmup_steps is None:
        args.sparsity_warmup_steps = args.steps // 5
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    single = [ActivationStore(args.store)]
    several = [ActivationStore(path) for path in args.layers or []]
    names = [
        name
        for name in contenders_of(args.architectures or list(ARCHITECTURES))
        if name in (args.contenders or [name]) and installed(name)
        if ENTRIES[name].kind.layers in range(1, max(2, len(several) + 1))
    ]
    report = {
        **record.provenance(),
        "peers": {
            package: importlib.metadata.version(package)
            for package in sorted({ENTRIES[name].kind.distribution for name in names} - {"sparsekern", "torch"})
        },
        "data": [{**store.source, "tokens": store.tokens, "d": store.d} for store in (*single, *several)],
        "settings": asdict(settings),
        "pca_fvu": {},
        "runs": [],
    }
    if args.output and args.output.exists():
        before = json.loads(args.output.read_text())
        if before["settings"] != report["settings"]:
            raise SystemExit(f"{args.output} was made with other settings: {before['settings']}")
        report |= {"runs": before["runs"], "pca_fvu": before["pca_fvu"]}
    compare(report, names, single, several, settings, args.seed, args.minutes, args.output)
    print(table(report))


def compare(
    report: dict[str, Any],
    names: list[str],
    single: list[ActivationStore],
    several: list[ActivationStore],
    settings: Settings,
    seeds: list[int],
    minutes: float,
    output: Path | None,
) -> None:
    """Do what `report` lacks of the runs of `names`, and write it after each."""
    runs = report["runs"]
    least = [3 if ENTRIES[name].kind.sparsity is not None else 1 for name in names]
    total = settings.steps * sum(least) * len(seeds)
    with Progress("versus peers", total, unit="steps") as bar:
        meter = Meter(bar, total)
        for seed in seeds:
            data = {1: Data(single, settings, seed)}
            if several:
                data[2] = Data(several, settings, seed)
            if str(seed) not in report["pca_fvu"]:
                held_out = torch.cat([layers[0] for layers in data[1].held_out(settings.batch_size, 1)])
                report["pca_fvu"][str(seed)] = pca_fvu(data[1].training[0].load(100_000), held_out, settings.k)
            for name in names:
                own = data[min(2, ENTRIES[name].kind.layers)]
                for run in arm(name, own, settings, seed, minutes, meter, runs):
                    runs.append(run)
                    print({key: value for key, value in run.items() if key != "modes"}, flush=True)
                    if output:
                        write_json(output, report)


if __name__ == "__main__":
    main()

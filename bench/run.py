"""The coordinator of ``sparsekern bench``: starts a process for each contender and lets them work by turns.

Never two at a time. In a round every contender does one step and, right before or after it, one fp32 matmul
``[B, d] × [d, N]`` with its own encoder; the ratio of the two belongs to one moment of the machine, and a slow moment
is spread over all contenders. Separate processes tell each one's memory apart, and let a broken peer fail alone.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsekern.backends import cpu
from sparsekern.bench import memory, record
from sparsekern.bench.architectures import ENTRIES, contenders_of
from sparsekern.bench.options import UNROUTED, BenchOptions, Case
from sparsekern.data import ActivationLoader, ActivationStore, zipf_activations
from sparsekern.files import write_json
from sparsekern.progress import Progress

BATCHES = 8  # different ones, which the steps go through again and again
PAUSE = 0.02  # seconds after each call: OpenMP threads spin for a moment before they sleep
BASE_BYTES = 800 * 2**20  # of a process that has imported torch and a peer


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message is its traceback, or the end of what it printed."""


class Worker:
    """A process that answers requests, see :mod:`sparsekern.bench.worker`."""

    def __init__(self, what: str, threads: int) -> None:
        entry = ENTRIES.get(what)
        threads = (entry and entry.threads) or threads
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compiler processes beside the contenders
            "SPARSIFY_DISABLE_TRITON": "1",  # its kernels want a GPU's tensors, and everything here is on the CPU
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            **(entry.environment if entry else {}),
        }
        self.what = what
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparsekern.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | environment,
            text=True,
        )

    def ask(self, do: str, **request: Any) -> Any:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            raise WorkerError(f"the process ended with {code}: {self._log.read()[-2000:].strip() or 'no message'}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["ok"]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def run(options: BenchOptions, progress: bool = False) -> dict[str, Any]:
    """Measure everything that `options` ask for; the record is written after every case.

    Returns
    -------
    dict
        The record. Contenders that failed are under ``failed`` of a case, those left out under ``skipped``.

    Raises
    ------
    ValueError
        If a contender that was named is not installed, or no shape fits the store.
    """
    options = options.resolved()
    threads = options.threads or torch.get_num_threads()
    wanted = (options.contenders or []) + contenders_of(options.architectures or [])
    names, skipped = available(wanted or None, threads)
    parts = options.parts or ["kernels", "steps"]
    store = None if options.activations is None else ActivationStore(options.activations)
    cases = options.cases(None if store is None else store.d)
    done: list[dict[str, Any]] = []
    result = {
        **record.provenance(),
        "device": record.cpu_name(),  # also where there is a GPU
        "threads": threads,
        "options": {name: v for name, v in options.to_dict().items() if not isinstance(v, Path)},
        "store": None if store is None else {**store.source, "tokens": store.tokens, "d": store.d},
        "skipped": skipped,
        "cases": done,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    plan = [groups(names, case, options.memory_share) if "steps" in parts else [] for case in cases]
    turns = (options.warm_up + options.rounds) * sum(("kernels" in parts) + sum(map(len, teams)) for teams in plan)
    with Progress("bench", turns, unit="turns", shown=progress) as bar:
        meter = Meter(bar)
        for case, teams in zip(cases, plan, strict=True):
            entry: dict[str, Any] = {"data": case.data, "shape": shape(case), "failed": {}}
            with batches_file(case, store, options.seed) as batches:
                bench = Bench(case, options, batches, threads, meter, entry["failed"])
                if "kernels" in parts:
                    entry["kernels"] = bench.kernels()
                if "steps" in parts:
                    entry["steps"] = bench.steps(teams)
            done.append(entry)
            write_json(options.output, result)
    return result


def shape(case: Case) -> dict[str, int]:
    """The shape as a record has it."""
    return {"B": case.rows, "d": case.d, "d_sae": case.d_sae, "k": case.k}


def available(wanted: list[str] | None, threads: int) -> tuple[list[str], dict[str, str]]:
    """The contenders that can run here, and why the others cannot; a ValueError if one of those was named."""
    skipped = {}
    for name in wanted or UNROUTED:
        module = next(iter(ENTRIES[name].kind.imports), "torch").split(".")[0]
        if importlib.util.find_spec(module) is None:
            skipped[name] = f"{module} is not installed"
        elif name == "sparsekern-1-thread" and threads == 1:
            skipped[name] = "all have one thread"
        elif name == "sparsekern-avx2" and cpu.isa() not in ("avx2", "avx512"):
            skipped[name] = f"the CPU kernels are {cpu.isa() or 'not built'}"
    if wanted and skipped:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"contenders cannot run ({reasons}); peers come with `pip install 'sparsekern[bench]'`")
    return [name for name in ENTRIES if name in (wanted or UNROUTED) and name not in skipped], skipped


@contextmanager
def batches_file(case: Case, store: ActivationStore | None, seed: int) -> Iterator[str]:
    """A file with the batches of a case: every contender reads the same, and none pays for making them."""
    x: Tensor
    if case.data == "zipf":
        x = zipf_activations(BATCHES * case.rows, case.d, outliers=min(2, case.d), seed=seed)
    else:
        assert store is not None
        loader = ActivationLoader(store, case.rows, seed=seed, buffer_tokens=BATCHES * case.rows)
        x = torch.cat([loader.batch(number) for number in range(BATCHES)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.safetensors"
        save_file({"x": x.view(BATCHES, case.rows, case.d)}, path)
        del x
        yield str(path)


class Meter:
    """Counts turns into a progress bar."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.done = bar, 0

    def add(self, turns: int, note: str) -> None:
        """Report `turns` more."""
        self.done += turns
        self.bar.update(self.done, note=note)


class Bench:
    """The measurements of one case."""

    def __init__(
        self, case: Case, options: BenchOptions, batches: str, threads: int, meter: Meter, failed: dict[str, str]
    ) -> None:
        self.case, self.options, self.batches, self.threads = case, options, batches, threads
        self.meter, self.failed = meter, failed

    def open(self, what: str, stack: ExitStack) -> tuple[Worker, dict[str, Any]]:
        """Start a worker and let it build and warm up."""
        self.meter.add(0, f"{self.case.label}: {what} warms up")
        worker = Worker(what, self.threads)
        stack.callback(worker.stop)
        reply = worker.ask(
            "open",
            what=what,
            case=dataclasses.asdict(self.case),
            batches=self.batches,
            lr=self.options.lr,
            warm_up=self.options.warm_up,
            seed=self.options.seed,
        )
        self.meter.add(self.options.warm_up, f"{self.case.label}: {what}")
        return worker, reply

    def time(self, worker: Worker, call: str, batch: int) -> float:
        """Milliseconds of one call, alone on the machine."""
        milliseconds: float = worker.ask("time", call=call, batch=batch)["ms"]
        time.sleep(PAUSE)
        return milliseconds

    def kernels(self) -> dict[str, Any] | None:
        """Every kernel by turns in one process: milliseconds, and the ratio to the matmul of the same round."""
        with ExitStack() as stack:
            try:
                worker, opened = self.open("kernels", stack)
                taken: dict[str, list[float]] = {call: [] for call in opened["calls"]}
                for _ in range(self.options.rounds):
                    for call in taken:
                        taken[call].append(self.time(worker, call, 0))
                    self.meter.add(1, f"{self.case.label}: kernels")
            except WorkerError as error:
                self.failed["kernels"] = str(error)
                return None
        base = taken["matmul"]
        return {
            **opened["facts"],
            "ms": {call: record.spread(samples) for call, samples in taken.items()},
            "ratio": {
                call: record.spread([one / other for one, other in zip(samples, base, strict=True)])
                for call, samples in taken.items()
            },
        }

    def steps(self, teams: list[list[str]]) -> dict[str, Any]:
        """Full steps of the contenders, one team after the other."""
        result: dict[str, Any] = {}
        for team in teams:
            result = self._team(team) | result  # a reference is in several teams: its first measurement stands
        return {name: result[name] for name in ENTRIES if name in result}

    def _team(self, names: list[str]) -> dict[str, Any]:
        """Contenders whose processes are alive together, by turns."""
        opened: dict[str, tuple[Worker, dict[str, Any]]] = {}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        with ExitStack() as stack:
            for name in names:
                try:
                    opened[name] = self.open(name, stack)
                except WorkerError as error:
                    self.failed[name] = str(error)
            for number in range(self.options.rounds):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    if name not in self.failed:
                        try:
                            taken[name].append(self._turn(opened[name][0], number))
                        except WorkerError as error:
                            self.failed[name] = str(error)
                    self.meter.add(1, f"{self.case.label}: {name}")
            result = {}
            for name in names:
                if name not in self.failed:
                    worker, reply = opened[name]
                    result[name] = {**reply["facts"], **worker.ask("close"), **summary(taken, name)}
        return result

    def _turn(self, worker: Worker, number: int) -> tuple[float, float]:
        """Milliseconds of a step and of a matmul. The first one finds colder caches: they take turns in that, too."""
        order = ["matmul", "step"] if number % 2 else ["step", "matmul"]
        pair = {call: self.time(worker, call, number) for call in order}
        return pair["step"], pair["matmul"]


def summary(taken: dict[str, list[tuple[float, float]]], name: str) -> dict[str, Any]:
    """Spreads of a contender's pairs of step and matmul, and of its steps against sparsekern's of the same round and
    architecture.
    """
    steps, matmuls = zip(*taken[name], strict=True)
    result = {
        "step_ms": record.spread(list(steps)),
        "matmul_ms": record.spread(list(matmuls)),
        "ratio": record.spread([step / matmul for step, matmul in taken[name]]),
    }
    reference = ENTRIES[name].against
    ours = [step for step, _ in taken.get(reference, [])]
    if name != reference and len(ours) == len(steps):
        result["over_sparsekern"] = record.spread([step / our for step, our in zip(steps, ours, strict=True)])
    return result


def groups(names: list[str], case: Case, memory_share: float) -> list[list[str]]:
    """Contenders whose processes fit into memory together; what they are compared with is in each group.

    A resting process holds weights, gradients and Adam's two moments; the one at work a few ``B × N`` tensors more.
    """
    resting = BASE_BYTES + 4 * 4 * 2 * case.d_sae * case.d
    working = 6 * 4 * case.rows * case.d_sae
    free = memory.available()
    room = len(names) if free is None else max(2, int((memory_share * free - working) // resting))
    teams = []
    for reference in dict.fromkeys(ENTRIES[name].against for name in names):
        ours = [reference] if reference in names else []
        others = [name for name in names if ENTRIES[name].against == reference and name != reference]
        size = max(1, room - len(ours))
        teams += [ours + others[first : first + size] for first in range(0, max(1, len(others)), size)]
    return teams

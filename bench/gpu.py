"""Correctness, kernels and full training steps of one GPU in one command of a few minutes.

::

    python -m sparsekern.bench.gpu                          # → bench/results/gpu_<device>.json
    python -m sparsekern.bench.gpu_table RECORD             # its tables and its plot
    python -m sparsekern.bench.gpu --device cpu --quick     # a rehearsal: whether everything runs

Checks come first, and the CUDA C++ kernels under compute-sanitizer where that is installed; what fails is recorded,
ends the command with 1, and the timings run nevertheless. Then come the roofs of the device, the shapes in order of
importance, and what Nsight Compute counts of the CUDA C++ kernels. Work is left out with a reason where it does not fit
into the time that is left or into the memory. The record is written after each piece of work.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparsekern as sk
from sparsekern.backends import cuda
from sparsekern.bench import gpu_checks, gpu_kernels, gpu_steps, gpu_table, gpu_tools, memory, record, roofs
from sparsekern.bench.options import Case
from sparsekern.bench.timing import Clock
from sparsekern.files import write_json
from sparsekern.training import versions

SHAPES = {
    "F": (8192, 768, 131072, 32),
    "A": (8192, 4096, 131072, 64),
    "B": (8192, 768, 2**20, 32),
    "D": (8192, 768, 32768, 32),
    "G": (16384, 2304, 65536, 64),
    "E": (65536, 2048, 65536, 64),
    "W": (4096, 768, 2**22, 32),
}
"""``B, d, N, k`` by name, in order of importance; at W offsets do not fit into 32 bits."""

CHECKED = ("D", "A", "G", "W")
QUICK_SHAPES = {"x": (64, 32, 512, 8), "y": (96, 48, 1024, 8)}
ROUTED = ("F", "A", *QUICK_SHAPES)
"""Where routed encoders are timed."""
GAUSSIAN = 3  # the first so many shapes are timed on Gaussian data too
PARTS = ("checks", "tools", "kernels", "steps")

GUESSED_SECONDS = {"checks": 30.0, "kernels": 25.0, "steps": 15.0, "compiled": 60.0}
"""What a piece takes besides its timings, compilation above all, until a first one shows it."""

STEP_FLOORS = {"checks": 0, "kernels": 25, "steps": 12, "compiled": 12}
"""How many of a step's floors one turn takes: torch.topk and the steps of others are slow."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    device: torch.device
    quick: bool
    minutes: float
    shapes: dict[str, tuple[int, int, int, int]]
    parts: tuple[str, ...]
    contenders: tuple[str, ...]
    seed: int
    output: Path | None

    @property
    def turns(self) -> int:
        """Timed turns of everything, where there is time."""
        return 3 if self.quick else 40

    @property
    def most_seconds(self) -> float:
        """Bound on the turns of one group of calls."""
        return 1.0 if self.quick else 6.0

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "quick": self.quick,
            "minutes": self.minutes,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "parts": list(self.parts),
            "contenders": list(self.contenders),
            "seed": self.seed,
            "turns": self.turns,
        }


class Budget:
    """The time that is left, and how long a piece of work will take, learned from the pieces before it."""

    def __init__(self, minutes: float) -> None:
        self._start = time.monotonic()
        self._end = self._start + 60 * minutes
        self._worst: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds."""
        return time.monotonic() - self._start

    def expected(self, kind: str, timings: float) -> float:
        """Seconds of a piece whose timings take so many."""
        return self._worst.get(kind, GUESSED_SECONDS[kind]) + timings

    def took(self, kind: str, seconds: float, timings: float) -> None:
        """Learn from a piece that is done."""
        self._worst[kind] = max(self._worst.get(kind, 0.0), seconds - timings)


@dataclass(frozen=True)
class Piece:
    """Work that is done, recorded or left out as one: kernel groups or full steps, at one shape on one kind of data."""

    shape: str
    case: Case
    kind: str
    what: tuple[str, ...]

    def __str__(self) -> str:
        part = "kernels" if self.kind == "kernels" else "steps of"
        return f"{self.shape} {self.case.label}: {part} {', '.join(self.what)}"


def plan(options: Options) -> list[Piece]:
    """All pieces, the most important ones first."""
    zipf = {name: Case("zipf", *shape) for name, shape in options.shapes.items()}
    eager = tuple(name for name in options.contenders if name != "torch-compile")
    pieces = []
    for name, case in zipf.items():
        if "kernels" in options.parts:
            groups = tuple(group for group in gpu_kernels.GROUPS if group != "routed" or name in ROUTED)
            pieces.append(Piece(name, case, "kernels", groups))
        if "steps" in options.parts and eager:
            pieces.append(Piece(name, case, "steps", eager))
    if "kernels" in options.parts:
        for name, shape in list(options.shapes.items())[:GAUSSIAN]:
            pieces.append(Piece(name, Case("gaussian", *shape), "kernels", ("encode", "decode", "backward")))
    if "steps" in options.parts and "torch-compile" in options.contenders:
        pieces += [Piece(name, case, "compiled", ("torch-compile",)) for name, case in zipf.items()]
    return pieces


class Bench:
    """One run of the command, and its record."""

    def __init__(self, options: Options) -> None:
        self.options, self.device = options, options.device
        self.budget = Budget(options.minutes)
        self.cases: dict[tuple[str, str], dict[str, Any]] = {}
        self.record: dict[str, Any] = {
            **record.provenance(),
            **describe(options.device),
            "options": options.to_dict(),
            "backends": [row._asdict() for row in sk.backends(options.device)],
            "roofs": {},
            "cuda_kernels": cuda.summary(),
            "checks": {"backends": {}, "entries": [], "skipped": {}},
            "tools": {},
            "cases": [],
            "finished": False,
        }

    def run(self) -> dict[str, Any]:
        """Everything, in order."""
        self.say(f"{self.record['device']}, seed {self.options.seed}; CUDA C++ kernels: {self.record['cuda_kernels']}")
        if "checks" in self.options.parts:
            self.check()
        if "tools" in self.options.parts:
            self.sanitize()
        self.clock = Clock(self.device)
        size = (2**22, 128) if self.options.quick else (2**31, 8192)
        found, missing = roofs.measure(self.clock, *size, turns=self.options.turns)
        self.record["roofs"] = {**found, "missing": missing}
        gpu_kernels.release(self.device)
        shown = [f"{1e-12 * rate:.4g} {'TB/s' if 'bytes' in name else 'TFLOP/s'}" for name, rate in found.items()]
        self.say(f"roofs: {', '.join(f'{n.split(chr(95))[0]} {r}' for n, r in zip(found, shown, strict=True))}")
        self.write()
        for piece in plan(self.options):
            try:
                self.do(piece)
            finally:  # an error of the device may end the run here
                self.write()
        if "tools" in self.options.parts:
            self.tool("ncu", lambda: gpu_tools.profile(self.device, min(60.0, self.budget.left)))
        self.record["finished"] = True
        self.write()
        return self.record

    def check(self) -> None:
        """The backends' own checks, and comparisons at real shapes."""
        checks = self.record["checks"]
        checks["backends"] = gpu_checks.of_backends(self.device)
        shapes = {name: shape for name, shape in self.options.shapes.items() if name in CHECKED or self.options.quick}
        for name in sorted(shapes, key=lambda name: CHECKED.index(name) if name in CHECKED else 0):
            case, start = Case("zipf", *shapes[name]), time.monotonic()
            # A weight, its gradient twice, and as much again that comes and goes.
            needed = 2 * 4 * case.d_sae * case.d + gpu_kernels.state_needs(case, trained=False)
            reason = self.too_much("checks", needed, 0.0, share=0.5)
            if reason is not None:
                checks["skipped"][name] = reason
                self.say(f"checks at {name}: left out, {reason}")
                continue
            try:
                for entry in gpu_checks.of_case(
                    case, self.device, self.options.seed, steps=name == "D" or self.options.quick
                ):
                    checks["entries"].append({"shape": name, **entry})
                    self.say(f"check {name}: {gpu_table.check_line(entry)}")
                    self.write()
            except Exception as error:  # not of a check, each of which has its entry, but of its inputs
                entry = {
                    "shape": name,
                    "case": case.label,
                    "check": "inputs",
                    "dtype": "",
                    "passed": False,
                    "seconds": 0.0,
                }
                checks["entries"].append({**entry, "raised": gpu_kernels.one_line(error)})
            gpu_kernels.release(self.device)
            self.budget.took("checks", time.monotonic() - start, 0.0)

    def sanitize(self) -> None:
        """The CUDA C++ kernels on small shapes under each tool of compute-sanitizer, in a tenth of the time at most."""
        for name in gpu_tools.SANITIZERS:
            limit = min(6 * self.options.minutes, self.budget.left)
            self.tool(name, lambda name=name, limit=limit: gpu_tools.sanitize(name, self.device, limit))  # type: ignore[misc]

    def tool(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """What a tool of the CUDA toolkit says, or why there is none."""
        found = self.record["tools"][name] = run()
        self.say(f"{name}: {gpu_table.tool_line(found)}")
        self.write()

    def do(self, piece: Piece) -> None:
        """One piece, or the reason why it is left out."""
        case, entry, start = piece.case, self.entry(piece), time.monotonic()
        floor = roofs.step_floor_ms(case, min(case.d_sae, case.rows * case.k), self.record["roofs"])
        timings = min(
            1e-3 * floor * STEP_FLOORS[piece.kind] * self.options.turns,
            self.options.most_seconds * len(piece.what),
        )
        state = gpu_kernels.state_needs(case, trained=piece.kind != "kernels")
        reason = self.too_much(piece.kind, state, timings)
        if reason is not None:
            entry["skipped"] |= dict.fromkeys(piece.what, reason)
            self.say(f"{piece}: left out, {reason}")
            return
        self.say(str(piece))
        try:
            (self.kernels if piece.kind == "kernels" else self.steps)(piece, entry)
        except Exception as error:  # the other pieces go on
            entry["failed"] |= {"kernels" if piece.kind == "kernels" else "steps": gpu_kernels.one_line(error)}
        gpu_kernels.release(self.device)
        self.budget.took(piece.kind, time.monotonic() - start, timings)
        for line in gpu_table.failures(entry):
            self.say(f"  {line}")

    def kernels(self, piece: Piece, entry: dict[str, Any]) -> None:
        """Groups of kernels on weights that have been trained for a few steps, where that fits."""
        case, options = piece.case, self.options
        made = gpu_kernels.batches(case, self.device, options.seed)
        free = memory.available(self.device)
        trained = free is None or free > gpu_kernels.state_needs(case, trained=True)
        subject = gpu_kernels.Subject.build(case, made, trained, self.clock)
        entry |= {"trained": trained, "first_step_s": subject.first_step_s, "touched": subject.touched()}
        for group in piece.what:
            reason = self.too_much("group", gpu_kernels.needs(case, group), options.most_seconds)
            if reason is None and group == "select":
                reason = gpu_kernels.why_not_cuda("row_topk", made[0])
            if reason is None and group == "update" and not trained:
                reason = "the optimizer's state does not fit"
            if reason is not None:
                entry["skipped"][group] = reason
                continue
            try:
                measured, failed = gpu_kernels.measure(
                    gpu_kernels.GROUPS[group](subject),
                    self.clock,
                    self.record["roofs"],
                    turns=options.turns,
                    seconds=min(options.most_seconds, max(1.0, self.budget.left / 8)),
                )
                entry["kernels"] |= measured
                entry["failed"] |= failed
                for name, found in measured.items():
                    self.say(f"  {gpu_table.kernel_line(name, found)}")
            except Exception as error:
                entry["failed"][group] = gpu_kernels.one_line(error)
            gpu_kernels.release(self.device)
            self.write()

    def steps(self, piece: Piece, entry: dict[str, Any]) -> None:
        """Full steps."""
        absent = {name: reason for name in piece.what if (reason := gpu_steps.absent(name, self.device)) is not None}
        entry["skipped"] |= absent
        made = gpu_kernels.batches(piece.case, self.device, self.options.seed)
        measured, failed = gpu_steps.measure(
            [name for name in piece.what if name not in absent],
            piece.case,
            made,
            self.clock,
            turns=self.options.turns,
            seconds=min(self.options.most_seconds, max(1.0, self.budget.left / 8)),
        )
        touched = entry.get("touched", min(piece.case.d_sae, piece.case.rows * piece.case.k))
        entry["step_floor_ms"] = roofs.step_floor_ms(piece.case, touched, self.record["roofs"])
        entry["steps"] |= {name: found for name, found in measured.items() if name not in entry["steps"]}
        entry["failed"] |= failed
        for name, found in measured.items():
            self.say(f"  {gpu_table.step_line(name, found)}")

    def too_much(self, kind: str, needed: float, timings: float, share: float = 1.0) -> str | None:
        """Why something does not fit: into a share of the time that is left, or into the memory that is free."""
        free = memory.available(self.device)
        if free is not None and needed > free:
            return f"needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        expected = timings if kind == "group" else self.budget.expected(kind, timings)
        if expected > share * self.budget.left:
            return f"would take about {expected:.0f} s, {max(0.0, share * self.budget.left):.0f} are left for it"
        return None

    def entry(self, piece: Piece) -> dict[str, Any]:
        """The case's place in the record."""
        key, case = (piece.shape, piece.case.data), piece.case
        if key not in self.cases:
            shape = {"B": case.rows, "d": case.d, "d_sae": case.d_sae, "k": case.k}
            parts: dict[str, Any] = {"kernels": {}, "steps": {}, "skipped": {}, "failed": {}}
            self.cases[key] = {"name": piece.shape, "data": case.data, "shape": shape, **parts}
            self.record["cases"].append(self.cases[key])
        return self.cases[key]

    def write(self) -> None:
        """The record as it stands."""
        self.record["seconds"] = self.budget.spent
        if self.options.output is not None:
            write_json(self.options.output, self.record)

    def say(self, line: str) -> None:
        """One line of progress."""
        print(f"[{self.budget.spent:5.0f} s] {line}", flush=True)


def describe(device: torch.device) -> dict[str, Any]:
    """The device and what drives it."""
    found = {**versions(), "triton": _triton_version(), "cuda": torch.version.cuda}
    if device.type != "cuda":
        return {"device": "cpu", "device_type": "cpu", "processor": record.cpu_name(), "versions": found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "device_type": "cuda",
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver_version(),
        "versions": found,
    }


def _triton_version() -> str | None:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def _driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def slug(name: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def failed(result: dict[str, Any]) -> bool:
    """Whether a check of a record failed."""
    own = any(
        "error" in found or any(not entry["passed"] for entry in found.get("results", []))
        for found in result["checks"]["backends"].values()
    )
    tools = any(found.get("passed") is False for found in result["tools"].values())
    return own or tools or any(not entry["passed"] for entry in result["checks"]["entries"])


def parse(arguments: list[str] | None = None) -> Options:
    """The options, checked; ends with a message where they make no sense here."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsekern.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 …, or cpu for a rehearsal with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, three turns; the figures mean nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="of wall-clock for everything")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help=f"some of {', '.join(SHAPES)}; by default all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--contenders", nargs="+", choices=gpu_steps.CONTENDERS, default=list(gpu_steps.CONTENDERS))
    parser.add_argument("--seed", type=int, help="of data and weights; drawn and recorded by default")
    parser.add_argument("--output", type=Path, help="the record; of a GPU bench/results/gpu_<device>.json by default")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type not in ("cuda", "cpu"):
        parser.error(f"--device must be a CUDA GPU or cpu, got {given.device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; `--device cpu --quick` rehearses the command without one")
    if device.type == "cpu" and not given.quick:
        parser.error("--device cpu is for rehearsals: add --quick; `sparsekern bench` measures CPUs")
    if given.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {given.minutes}")
    known = QUICK_SHAPES if given.quick else SHAPES
    unknown = [name for name in given.shapes or [] if name not in known]
    if unknown:
        parser.error(f"--shapes must be some of {', '.join(known)}, got {', '.join(unknown)}")
    output = given.output
    if output is not None and output.suffix != ".json":
        parser.error(f"--output must end in .json, got {output}")
    if device.type == "cpu" and output is not None and output.name.startswith("gpu"):
        parser.error(f"a record of a CPU must not be named after a GPU, got {output.name}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and output is None:
        output = Path(f"bench/results/gpu_{slug(torch.cuda.get_device_name(device))}.json")
    return Options(
        device=device,
        quick=given.quick,
        minutes=given.minutes,
        shapes={name: known[name] for name in given.shapes or known},
        parts=tuple(given.parts),
        contenders=tuple(given.contenders),
        seed=secrets.randbelow(2**31) if given.seed is None else given.seed,
        output=output,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device.type == "cpu":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels want a GPU's tensors
    torch.set_float32_matmul_precision("highest")  # float32 means float32, in checks and roofs
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    result = Bench(options).run()
    print(f"\n{gpu_table.markdown(result)}")
    if options.output is not None:
        print(f"\n→ {options.output}")
    return int(failed(result))


if __name__ == "__main__":
    raise SystemExit(main())

"""Tables and roofline plot of a record: ``python -m sparsekern.bench.gpu_table bench/results/gpu_<device>.json``.

Prints Markdown and draws the plot beside the record. Each target of the project stands beside what was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sparsekern.bench import plot, roofs
from sparsekern.bench.options import Case
from sparsekern.bench.table import Grid, Record, bold, heading, spread


class Target(NamedTuple):
    """What the project wants to reach: the figure of a case, its bound at each shape (or at any), which way."""

    title: str
    figure: Callable[[Record, Record], float]
    bounds: dict[str, float]
    at_least: bool

    def bound(self, case: Record) -> float | None:
        """At this case; None where there is none."""
        return self.bounds.get(case["name"], self.bounds.get("any"))

    def missed(self, value: float, case: Record) -> bool:
        """Whether a value is on the wrong side of the bound."""
        bound = self.bound(case)
        return bound is not None and (value < bound if self.at_least else value > bound)


def _ms(kernel: str, case: Record) -> float:
    found: float = case["kernels"][kernel]["ms"]["median"]
    return found


def _traffic(kernel: str, byte_count: Callable[[Case], float]) -> Callable[[Record, Record], float]:
    """Share of the copy's bandwidth at which a kernel moves so many bytes."""
    return lambda case, record: byte_count(of(case)) / (1e-3 * _ms(kernel, case) * record["roofs"]["copy_bytes_s"])


def _updated_bytes(case: Case) -> float:
    return roofs.update(case).bytes


UPDATE, BACKWARD = "gradients and Adam of both weights", "gather_dot and scatter_outer"

TARGETS = [
    Target(
        "topk_encode ÷ cuBLAS bf16 alone",
        lambda case, _: case["kernels"]["topk_encode"]["over"]["median"],
        {"A": 1.15, "F": 1.3, "B": 1.3},
        False,
    ),
    Target("sparse_decode: gather traffic ÷ copy", _traffic("sparse_decode", roofs.gather_traffic), {"any": 0.8}, True),
    Target("backward: gather traffic ÷ copy", _traffic(BACKWARD, roofs.backward_traffic), {"any": 0.6}, True),
    Target("Adam: least traffic ÷ copy", _traffic(UPDATE, _updated_bytes), {"any": 0.85}, True),
    Target(
        "sparsify's step ÷ sparsekern's",
        lambda case, _: case["steps"]["sparsify"]["over_sparsekern"]["median"],
        {"A": 2.5, "F": 3.5, "B": 3.5},
        True,
    ),
    Target(
        "step ÷ its floor",
        lambda case, _: case["steps"]["sparsekern"]["step_ms"]["median"] / case["step_floor_ms"],
        {"any": 1.4},
        False,
    ),
    Target(
        "memory of a step beyond its state ÷ one B × N in bf16",
        lambda case, _: case["steps"]["sparsekern"]["beyond_bytes"] / (2 * case["shape"]["B"] * case["shape"]["d_sae"]),
        {"any": 1.0},
        False,
    ),
    Target(
        "steps that wait for the device",
        lambda case, _: {"no": 0.0}.get(case["steps"]["sparsekern"]["waits"], 1.0),
        {"any": 0.0},
        False,
    ),
]


def of(case: Record) -> Case:
    """The case that an entry of the record tells of."""
    return Case(case["data"], *case["shape"].values())


def targets(record: Record) -> Grid:
    """Each target and what was measured, bold where it is missed. A rehearsal on a CPU has none."""
    cases = [case for case in record["cases"] if case["kernels"] or case["steps"]]
    rows = []
    for target in TARGETS if record["device_type"] == "cuda" else []:
        cells = []
        for case in cases:
            try:
                value = target.figure(case, record)
                cells.append(bold(f"{value:.2f}", target.missed(value, case)))
            except (KeyError, TypeError):  # not measured
                cells.append("–")
        sign = "≥" if target.at_least else "≤"
        wanted = "; ".join(f"{sign} {b:g}{'' if name == 'any' else f' at {name}'}" for name, b in target.bounds.items())
        rows.append([target.title, wanted, *cells])
    return Grid("targets (bold: missed)", ["", "target", *[title(case) for case in cases]], rows)


def kernels(case: Record) -> Grid:
    """Every kernel of a case; bold where the baseline is the faster one."""
    rows = []
    for name, found in case["kernels"].items():
        ms, over, floor = found["ms"]["median"], found.get("over"), found["floor_ms"]
        ahead = over is not None and over["median"] > 1 and not name.startswith(("topk_encode", "matmul", "routed"))
        rows.append(
            [
                name,
                found["backend"],
                spread(found["ms"], 3),
                bold(f"{over['median']:.2f}", ahead) if over else "–",
                "–" if floor is None else f"{floor:.3f}",
                "–" if floor is None else f"{ms / floor:.2f}",
                f"{1e-9 * found['flops'] / ms:.3g}",
                f"{1e-9 * found['bytes'] / ms:.3g}",
                _mebibytes(found["memory_bytes"]),
                f"{found['host_ms']:.2f}",
                f"{found['first_call_s']:.2f}",
                str(found["samples"]),
            ]
        )
    header = [
        "",
        "by",
        "ms",
        "÷ baseline",
        "floor, ms",
        "÷ floor",
        "TFLOP/s",
        "TB/s",
        "memory",
        "host, ms",
        "first, s",
        "samples",
    ]
    first = case.get("first_step_s")
    start = ", weights as they start" if first is None else f", first step {first:.1f} s"
    return Grid(f"kernels at {title(case)}: {heading(case)}{start}", header, rows)


def routed(case: Record) -> Grid:
    """Routed encoders beside the dense one, and beside what their work leaves of its time."""
    rows = []
    for name, found in case["kernels"].items():
        if "least" in found and "over" in found:
            over = found["over"]["median"]
            rows.append([name, f"{over:.3f}", f"{found['least']:.3f}", f"{over / found['least']:.2f}"])
    header = ["", "÷ dense", f"max(e/E, {roofs.BALANCE}/B)", "÷ that"]
    return Grid(f"routed encoders at {title(case)}: {heading(case)}", header, rows)


def steps(case: Record) -> Grid:
    """Full steps of a case; bold where another library's is the faster one."""
    rows = []
    for name, found in case["steps"].items():
        ms, over = found["step_ms"]["median"], found.get("over_sparsekern")
        rows.append(
            [
                name,
                spread(found["step_ms"]),
                f"{found['tokens_s']:,.0f}",
                "–" if over is None else bold(f"{over['median']:.2f}", over["median"] < 1) + "*" * ("alone" in found),
                f"{ms / case['step_floor_ms']:.2f}",
                _mebibytes(found["beyond_bytes"]),
                found["waits"] or "–",
                f"{found['first_call_s']:.2f}",
                str(found["samples"]),
            ]
        )
    header = [
        "",
        "ms",
        "tokens/s",
        "÷ sparsekern",
        "÷ floor",
        "beyond state",
        "waits for the device",
        "first, s",
        "samples",
    ]
    floor = f", floor {case['step_floor_ms']:.2f} ms" if rows else ""
    return Grid(f"full steps at {title(case)}: {heading(case)}{floor}", header, rows)


def checks(record: Record) -> Grid:
    """Every comparison; bold where it fails."""
    rows = []
    for entry in record["checks"]["entries"]:
        error = entry.get("raised") or f"{entry['error']:.1e}"
        rows.append(
            [
                f"{entry['check']}, {entry['dtype']}",
                entry["shape"],
                bold("passed" if entry["passed"] else "FAILED", not entry["passed"]),
                error,
                f"{entry['bound']:.1e}" if "bound" in entry else "–",
                f"{entry['recall']:.6f}" if entry.get("recall") is not None else "–",
                str(entry.get("wrong", "–")),
                {True: "yes", False: "**no**"}.get(entry.get("repeatable"), "–"),
            ]
        )
    for name, backend in record["checks"]["backends"].items():
        for entry in backend.get("results", []):
            passed = bold("passed" if entry["passed"] else "FAILED", not entry["passed"])
            error, bound = f"{entry['error']:.1e}", f"{entry['bound']:.1e}"
            own = f"{entry['kernel']}, {entry['dtype']} ({name}'s own)"
            rows.append([own, "–", passed, error, bound, "–", "–", "–"])
    header = ["", "shape", "", "error", "bound", "recall", "wrong", "repeatable"]
    return Grid("against the reference backend in float64", header, rows)


def profile(record: Record) -> Grid:
    """What Nsight Compute counted."""
    figures = record["tools"].get("ncu", {}).get("kernels", [])
    names = list(dict.fromkeys(name for found in figures for name in found if name != "kernel"))
    rows = [[found["kernel"], *(f"{found[name]:.4g}" if name in found else "–" for name in names)] for found in figures]
    return Grid("CUDA C++ kernels by Nsight Compute", ["", *names], rows)


def ceilings(record: Record) -> Grid:
    """The roofs."""
    found = {name: rate for name, rate in record["roofs"].items() if name != "missing"}
    units = {name: "TB/s" if "bytes" in name else "TFLOP/s" for name in found}
    rows = [[name.split("_")[0], f"{1e-12 * rate:.4g} {units[name]}"] for name, rate in found.items()]
    rows += [[name, reason] for name, reason in record["roofs"].get("missing", {}).items()]
    return Grid("roofs: a device-to-device copy, read and written, and square matrix products", ["", "measured"], rows)


def tables(record: Record) -> list[Grid]:
    """Everything that a record has to show."""
    grids = [targets(record), ceilings(record)]
    for case in record["cases"]:
        grids += [kernels(case), routed(case), steps(case)]
    return [grid for grid in [*grids, profile(record), checks(record)] if grid.rows]


def missing(record: Record) -> list[str]:
    """One line for everything that was left out or failed, and for a run that was cut short."""
    lines = [
        f"{name}'s own checks: {word}, {backend[word]}"
        for name, backend in record["checks"]["backends"].items()
        for word in ("missing", "error")
        if word in backend
    ]
    lines += [f"checks at {name}: left out, {reason}" for name, reason in record["checks"]["skipped"].items()]
    lines += [f"{name}: {tool_line(found)}" for name, found in record["tools"].items()]
    for case in record["cases"]:
        lines += [f"{name} at {title(case)}: left out, {reason}" for name, reason in case["skipped"].items()]
        lines += [f"at {title(case)}: {line}" for line in failures(case)]
    return lines if record["finished"] else [*lines, "the run was cut short: what is here was measured before that"]


def failures(case: Record) -> list[str]:
    """One line for everything that failed at a case."""
    return [f"{name}: failed, {error}" for name, error in case["failed"].items()]


def markdown(record: Record) -> str:
    """All tables, with where they come from."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    where = f"{record['device']}, {record['date']}, commit {record['commit'][:7]}, seed {record['options']['seed']}"
    if record["device_type"] == "cuda":
        where += f", capability {record['capability']}, driver {record['driver']}"
    else:
        where = f"**A rehearsal on a CPU: no figure of a GPU, and none to compare.** {where}"
    parts = [
        f"{where}. {versions}. {record['seconds']:.0f} s in all. CUDA C++ kernels: "
        f"{record['cuda_kernels']}. Shapes are B, d, N, k."
    ]
    for grid in tables(record):
        lines = [grid.header, ["---"] * len(grid.header), *grid.rows]
        parts.append(f"**{grid.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    if any("alone" in found for case in record["cases"] for found in case["steps"].values()):
        parts.append("\\* timed alone: there was no room for sparsekern's weights beside it.")
    return "\n\n".join([*parts, *(f"- {line}" for line in missing(record))])


# Single lines, for the terminal.


def tool_line(found: Record) -> str:
    """What a tool has shown."""
    if "missing" in found:
        return f"left out, {found['missing']}"
    verdict = {True: "nothing found", False: "FAILED", None: "done"}[found.get("passed")]
    return f"{verdict}, {found['seconds']:.0f} s{''.join(f'; {line}' for line in found['lines'])}"


def check_line(entry: Record) -> str:
    """An entry of the checks."""
    verdict = "passed" if entry["passed"] else "FAILED"
    figures = entry.get("raised") or f"error {entry['error']:.1e}, bound {entry['bound']:.1e}"
    return f"{entry['check']}, {entry['dtype']}: {verdict}, {figures}, {entry['seconds']:.1f} s"


def kernel_line(name: str, found: Record) -> str:
    """A kernel's times."""
    over = f", {found['over']['median']:.2f} × {found['against']}" if "over" in found else ""
    floor = f", {found['ms']['median'] / found['floor_ms']:.2f} × its floor" if found["floor_ms"] else ""
    return f"{name}: {found['ms']['median']:.3f} ms{over}{floor}"


def step_line(name: str, found: Record) -> str:
    """A contender's times."""
    over = f", {found['over_sparsekern']['median']:.2f} × sparsekern" if "over_sparsekern" in found else ""
    return f"{name}: {found['step_ms']['median']:.2f} ms, {found['tokens_s']:,.0f} tokens/s{over}"


def title(case: Record) -> str:
    """Name of the shape, and of the data where it is not the usual one."""
    return str(case["name"]) + ("" if case["data"] == "zipf" else f", {case['data']}")


def _mebibytes(size: float | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.0f} MiB"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="written by `python -m sparsekern.bench.gpu`")
    parser.add_argument("--plot", type=Path, help="PNG to draw; by default beside the record")
    given = parser.parse_args(arguments)
    record = json.loads(given.record.read_text())
    if "roofs" not in record:
        parser.error(f"{given.record} is no record of `python -m sparsekern.bench.gpu`")
    print(markdown(record))
    picture = given.plot or given.record.with_suffix(".png")
    plot.check_installed()
    if plot.plot_roofline(record, picture):
        print(f"\n→ {picture}")


if __name__ == "__main__":
    main()

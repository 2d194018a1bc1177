"""The tables of a record: ``python -m sparsekern.bench.table bench/results/bench.json`` prints them as Markdown.

What the docs say comes from here, so that no figure is copied by hand. Bold marks where a peer wins.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sparsekern.bench.options import ARCHITECTURES

Record = dict[str, Any]


class Grid(NamedTuple):
    """A table: what it shows, the heading of each column, and rows of cells; bold is written ``**so**``."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(record: Record) -> list[Grid]:
    """Everything that a record has to show."""
    return [
        grid
        for make in (summary, architectures, steps, against, active, routing, memory, kernels, exactness)
        if (grid := make(record)).rows
    ]


def summary(record: Record) -> Grid:
    """What the project promises, one figure a case; of SAELens the faster of its two ways."""

    def over(*names: str) -> Callable[[Any, Any], float]:
        return lambda steps, _: min(steps[name]["over_sparsekern"]["median"] for name in names if name in steps)

    def peak(measured: Any) -> float:
        kept: float = measured["parameters_and_optimizer_bytes"]
        return (kept + measured["beyond_bytes"]) / kept

    lines: dict[str, Callable[[Any, Any], float]] = {
        "full step ÷ one fp32 matmul": lambda steps, _: steps["sparsekern"]["ratio"]["median"],
        "– with AVX2 kernels": lambda steps, _: steps["sparsekern-avx2"]["ratio"]["median"],
        "encode alone ÷ one fp32 matmul": lambda _, kernels: kernels["ratio"]["topk_encode"]["median"],
        "sparsify's step ÷ sparsekern's": over("sparsify"),
        "SAELens' step ÷ sparsekern's": over("saelens", "saelens-sparse"),
        "dictionary_learning's step ÷ sparsekern's": over("dictionary-learning"),
        "torch.compile's step ÷ sparsekern's": over("torch-compile"),
        "speed-up from the first thread to all": over("sparsekern-1-thread"),
        "peak memory ÷ parameters and optimizer": lambda steps, _: peak(steps["sparsekern"]),
    }

    def cell(figure: Callable[[Any, Any], float], case: Any) -> str:
        try:
            return f"{figure(case.get('steps') or {}, case.get('kernels') or {}):.2f}"
        except (KeyError, ValueError, TypeError):  # not measured
            return "–"

    rows = [[name, *[cell(figure, case) for case in record["cases"]]] for name, figure in lines.items()]
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    return Grid("in short, medians", ["", *map(heading, record["cases"])], rows)


def architectures(record: Record) -> Grid:
    """Each architecture beside the fastest of its peers."""
    rows = []
    for case in record["cases"]:
        measured = case.get("steps") or {}
        for name in ARCHITECTURES:
            peers = [peer for peer in measured if peer.startswith(f"{name}-") and "over_sparsekern" in measured[peer]]
            if name not in measured or not peers:
                continue
            fastest = min(peers, key=lambda peer: measured[peer]["over_sparsekern"]["median"])
            over = bold(spread(measured[fastest]["over_sparsekern"]), wins(fastest, measured[fastest]))
            ours, theirs = (_multiple(measured[which]) for which in (name, fastest))
            rows.append([name, spread(measured[name]["ratio"]), fastest.removeprefix(f"{name}-"), over, ours, theirs])
    header = ["", "step ÷ matmul", "fastest peer", "its step ÷ sparsekern's", "memory, sparsekern", "the peer"]
    return Grid("architectures; memory is peak ÷ parameters and optimizer state", header, rows)


def steps(record: Record) -> Grid:
    """Full steps in units of the matmul."""

    def cell(name: str, measured: Any) -> str:
        return bold(spread(measured["ratio"]), wins(name, measured))

    return by_case(record, "steps", "full step ÷ one fp32 encoder matmul: median (quartiles)", cell)


def against(record: Record) -> Grid:
    """Full steps in units of sparsekern's."""

    def cell(name: str, measured: Any) -> str:
        over = measured.get("over_sparsekern")
        return bold(spread(over), wins(name, measured)) if over else "–"

    grid = by_case(record, "steps", "full step ÷ sparsekern's full step: median (quartiles)", cell)
    return grid._replace(rows=[row for row in grid.rows if row[0] != "sparsekern" and set(row[1:]) != {"–"}])


def active(record: Record) -> Grid:
    """Active latents a token of those whose number of them varies."""

    def cell(name: str, measured: Any) -> str:
        return f"{measured['l0']:.1f} → {measured['l0_at_end']:.1f}" if "l0" in measured else "–"

    grid = by_case(record, "steps", "active latents a token, before the timed steps → after them", cell)
    return grid._replace(rows=[row for row in grid.rows if set(row[1:]) != {"–"}])


def routing(record: Record) -> Grid:
    """What routing saves: encoders and steps beside those without a router, and the masked form beside ours."""
    pairs = {}
    for active, count in ((1, 8), (2, 8), (1, 32), (2, 32), (1, 128)):
        which = f"{active} of {count} experts"
        pairs[f"routed encode ÷ encode, {which}"] = ("kernels", f"routed_topk_encode, {which}", "topk_encode")
    pairs |= {
        f"full step ÷ that without a router, {count} experts": ("steps", f"switch-{count}", "sparsekern")
        for count in (8, 16, 32)
    }
    pairs["masked step ÷ routed step, 16 experts"] = ("steps", "switch-16-masked", "switch-16")

    def cell(part: str, above: str, below: str, case: Any) -> str:
        measured = case.get(part) or {}
        ratios = measured.get("ratio", {}) if part == "kernels" else {n: m["ratio"] for n, m in measured.items()}
        if above not in ratios or below not in ratios:
            return "–"
        return f"{ratios[above]['median'] / ratios[below]['median']:.3f}"

    rows = [[name, *[cell(*pair, case) for case in record["cases"]]] for name, pair in pairs.items()]
    return Grid(
        "routing, medians", ["", *map(heading, record["cases"])], [row for row in rows if set(row[1:]) != {"–"}]
    )


def memory(record: Record) -> Grid:
    """Highest memory of a step as a multiple of what must be kept, and how much that is beyond it."""

    def cell(name: str, measured: Any) -> str:
        beyond = measured["beyond_bytes"]
        return "–" if beyond is None else f"{_multiple(measured)} (+{beyond / 2**20:,.0f} MiB)"

    title = "peak memory of a step ÷ parameters and optimizer state (gradients count as beyond)"
    return by_case(record, "steps", title, cell)


def _multiple(measured: Any) -> str:
    """Highest memory of a step as a multiple of parameters and optimizer."""
    kept, beyond = measured["parameters_and_optimizer_bytes"], measured["beyond_bytes"]
    return "–" if beyond is None else f"{(kept + beyond) / kept:.2f}"


def kernels(record: Record) -> Grid:
    """Single operations in units of the matmul."""
    cases = [case for case in record["cases"] if case.get("kernels")]
    rows = []
    for call in dict.fromkeys(call for case in cases for call in case["kernels"]["ratio"]):
        cells = []
        for case in cases:
            ratio = case["kernels"]["ratio"]
            ours = ratio.get("topk_encode" if call.startswith("topk_encode") else f"{call.split(', ')[0]}, cpu")
            ahead = ours is not None and ratio[call]["median"] < ours["median"]
            cells.append(bold(spread(ratio[call], 3), ahead))
        rows.append([call, *cells])
    return Grid("kernel ÷ one fp32 encoder matmul: median (quartiles)", ["", *map(heading, cases)], rows)


def exactness(record: Record) -> Grid:
    """The encoder's answers beside float64's, its repairs and its memory."""
    cases = [case for case in record["cases"] if case.get("kernels")]
    found = [case["kernels"]["exactness"] for case in cases]
    encode = [case["kernels"]["encode_bytes"] for case in cases]
    repaired = ["–" if f["repaired_rows"] is None else f"{f['repaired_rows']} of {f['batch_rows']}" for f in found]
    rows = [
        ["rows compared", *[str(f["rows"]) for f in found]],
        ["recall against float64", *[f"{f['recall_float64']:.6f}" for f in found]],
        ["– of the float32 reference", *[f"{f['recall_float64_of_reference']:.6f}" for f in found]],
        ["indices that neither has", *[f"{f['wrong']} of {f['indices']}" for f in found]],
        ["repaired rows", *repaired],
        ["memory of an encode", *["–" if b is None else f"{b / 2**20:,.0f} MiB" for b in encode]],
    ]
    return Grid("exactness of topk_encode", ["", *map(heading, cases)], rows if cases else [])


def is_own(name: str) -> bool:
    """Whether a contender is sparsekern's."""
    return name in ARCHITECTURES or (name.startswith(("sparsekern", "switch-")) and not name.endswith("-masked"))


def wins(name: str, measured: Any) -> bool:
    """Whether this is another implementation, and its step the faster one."""
    return not is_own(name) and measured.get("over_sparsekern", {"median": 1.0})["median"] < 1


def by_case(record: Record, part: str, title: str, cell: Callable[[str, Any], str]) -> Grid:
    """A row for each contender, a column for each case."""
    cases = [case for case in record["cases"] if case.get(part)]
    names = list(dict.fromkeys(name for case in cases for name in case[part]))
    rows = [[name, *[cell(name, case[part][name]) if name in case[part] else "–" for case in cases]] for name in names]
    return Grid(title, ["", *map(heading, cases)], rows)


def heading(case: Record) -> str:
    """A case as the head of a column."""
    return f"{case['data']} {', '.join(str(number) for number in case['shape'].values())}"


def spread(of: dict[str, float], digits: int = 2) -> str:
    """Median and quartiles."""
    return f"{of['median']:.{digits}f} ({of['low']:.{digits}f}–{of['high']:.{digits}f})"


def bold(text: str, when: bool) -> str:
    """Bold in Markdown."""
    return f"**{text}**" if when else text


def missing(record: Record) -> list[str]:
    """One line for each contender that was left out or failed."""
    lines = [f"{name}: left out, {reason}" for name, reason in record["skipped"].items()]
    for case in record["cases"]:
        for name, error in case["failed"].items():
            lines.append(f"{name}: failed at {heading(case)}: {error.strip().splitlines()[-1]}")
    return lines


def markdown(record: Record) -> str:
    """All tables, with where they come from."""
    parts = [
        f"{record['device']}, {record['threads']} threads, kernels {record['cpu_kernels']}, {record['date']}, "
        f"commit {record['commit'][:7]}, {record['options']['rounds']} rounds. Columns: data B, d, N, k. "
        "Bold: a peer is ahead."
    ]
    for grid in tables(record):
        lines = [grid.header, ["---"] * len(grid.header), *grid.rows]
        parts.append(f"**{grid.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts += [f"- {line}" for line in missing(record)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="written by `sparsekern bench`")
    print(markdown(json.loads(parser.parse_args().record.read_text())))


if __name__ == "__main__":
    main()

"""The pictures of records: full steps in units of one matmul, and the kernels of a GPU under its roofs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sparsekern.bench.roofs import UNITS
from sparsekern.bench.table import heading, is_own


def check_installed() -> None:
    """Raise ValueError where matplotlib is missing: better before a long measurement than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need `pip install 'sparsekern[report]'`")


def plot_steps(record: dict[str, Any], path: Path) -> bool:
    """Draw a bar for each contender and case, on a log scale, with quartiles; False where no steps were measured."""
    from matplotlib.figure import Figure

    cases = [case for case in record["cases"] if case.get("steps")]
    if not cases:
        return False
    heights = [0.28 * len(case["steps"]) + 0.7 for case in cases]
    figure = Figure(figsize=(7.5, sum(heights) + 0.4), dpi=150, layout="constrained")
    grid = figure.subplots(len(cases), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, case in zip(grid[:, 0], cases, strict=True):
        names = list(case["steps"])
        ratios = [case["steps"][name]["ratio"] for name in names]
        middle = [ratio["median"] for ratio in ratios]
        reach = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        colors = ["C0" if is_own(name) else "0.7" for name in names]
        axes.barh(names, middle, xerr=reach, color=colors, ecolor="0.3", height=0.7)
        for number, value in enumerate(middle):
            end = (ratios[number]["high"], number)
            axes.annotate(f"{value:.2f}", end, (4, 0), textcoords="offset points", va="center", fontsize=8)
        for line, style in ((1.0, "-"), (0.5, "--")):
            axes.axvline(line, color="C3", lw=1, ls=style)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(heading(case), fontsize=9, loc="left")
    medians = [measured["ratio"]["median"] for case in cases for measured in case["steps"].values()]
    low, high = min(0.3, 0.7 * min(medians)), max(2.0, 1.5 * max(medians))  # shared by all panels
    grid[-1, 0].set(xscale="log", xlim=(low, high))
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
    grid[-1, 0].set_xticks(ticks, [str(tick) for tick in ticks])
    grid[-1, 0].set_xticks([], minor=True)
    grid[-1, 0].set_xlabel("full training step ÷ one fp32 encoder matmul (lower is better)")
    figure.savefig(path)
    return True


ROOFLINE = {
    "matmul, bf16": ("0.45", "s"),
    "topk_encode": ("C0", "o"),
    "sparse_decode": ("C1", "o"),
    "gather_dot": ("C2", "D"),
    "scatter_outer": ("C3", "s"),
    "gradients and Adam of both weights": ("C4", "o"),
}
"""Kernels that the roofline shows, their colours and their markers."""


def plot_roofline(record: dict[str, Any], path: Path) -> bool:
    """Draw each kernel and shape at its operations per byte and its rate, under the roofs; False without any."""
    from matplotlib.figure import Figure

    points = [
        (name, case["name"], found["flops"] / found["bytes"], 1e-9 * found["flops"] / found["ms"]["median"])
        for case in record["cases"]
        if case["data"] == "zipf"
        for name, found in case["kernels"].items()
        if name in ROOFLINE
    ]
    if not points:
        return False
    rates = {unit: 1e-12 * record["roofs"][f"{unit}_flops_s"] for unit in UNITS if f"{unit}_flops_s" in record["roofs"]}
    bandwidth = 1e-12 * record["roofs"]["copy_bytes_s"]
    # The screening passes lie decades from the rest, and close together: they have a panel of their own.
    dense = [point for point in points if point[0].startswith(("matmul", "topk_encode"))]
    panels = [panel for panel in (dense, [point for point in points if point not in dense]) if panel]
    figure = Figure(figsize=(5.5 * len(panels), 5.5), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, panel, rates, bandwidth)
    cpu = record["device_type"] == "cpu"
    figure.suptitle("a rehearsal on a CPU: no figure of a GPU" if cpu else record["device"], fontsize=10)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path)
    return True


def _panel(axes: Any, points: list[tuple[str, str, float, float]], rates: dict[str, float], bandwidth: float) -> None:
    """Some of the kernels under as much of the roofs as lies above them."""
    for name, (color, marker) in ROOFLINE.items():
        own = [(intensity, rate) for kernel, _, intensity, rate in points if kernel == name]
        if own:
            axes.scatter(*zip(*own, strict=True), s=100, c=color, marker=marker, alpha=0.8, lw=0, label=name)
    for _, shape, intensity, rate in points:
        axes.annotate(shape, (intensity, rate), fontsize=7, color="w", weight="bold", ha="center", va="center")
    left, right = 0.5 * min(p[2] for p in points), 2.5 * max(p[2] for p in points)
    top = min(max(rates.values()), right * bandwidth)
    end = max(rates.values()) / bandwidth
    line = {"color": "0.3", "lw": 1, "zorder": 0}
    axes.plot([left, end], [left * bandwidth, end * bandwidth], **line)
    for unit, rate in rates.items():
        axes.plot([rate / bandwidth, max(right, end)], [rate, rate], ls="-" if unit == "bf16" else ":", **line)
        if rate <= top and rate / bandwidth < right:
            label = f"{unit}, {rate:{',.0f' if rate >= 100 else '.3g'}} TFLOP/s"
            axes.annotate(label, (right, rate), (-2, 2), textcoords="offset points", fontsize=8, ha="right")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(0.5 * min(p[3] for p in points), 1.6 * top))
    axes.set_title(f"copy: {bandwidth:.3g} TB/s", fontsize=8, loc="left")
    axes.set_xlabel("operations per byte of least traffic")
    axes.set_ylabel("TFLOP/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.5)

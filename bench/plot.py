"""The picture of a record: full steps in units of one matmul."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sparsekern.bench.table import heading


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
        colors = ["C0" if name.startswith("sparsekern") else "0.7" for name in names]
        axes.barh(names, middle, xerr=reach, color=colors, ecolor="0.3", height=0.7)
        for number, value in enumerate(middle):
            end = (ratios[number]["high"], number)
            axes.annotate(f"{value:.2f}", end, (4, 0), textcoords="offset points", va="center", fontsize=8)
        for line, style in ((1.0, "-"), (0.5, "--")):
            axes.axvline(line, color="C3", lw=1, ls=style)
        axes.invert_yaxis()
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

"""What every record under bench/results/ says about where it came from, and how its timings are taken."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsekern.backends import cpu
from sparsekern.files import write_json
from sparsekern.training import versions


def provenance() -> dict[str, Any]:
    """Device, date, commit and versions of a measurement."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": cpu.isa() or "not built",
        "versions": versions(),
    }


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Time `calls` in turn, `rounds` times after one warm-up: milliseconds, median with quartiles.

    Taking turns spreads a machine's slow moments over all of them, so that their ratios can be trusted where the times
    themselves cannot.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: dict(zip(("low", "median", "high"), statistics.quantiles(taken, n=4), strict=True))
        for name, taken in times.items()
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    print(f"→ {path}")

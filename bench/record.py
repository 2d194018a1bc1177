"""What every record under bench/results/ says about where it came from, and how its samples are summed up."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from sparsekern.backends import cpu
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


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles of at least two samples."""
    return dict(zip(("low", "median", "high"), statistics.quantiles(samples, n=4, method="inclusive"), strict=True))

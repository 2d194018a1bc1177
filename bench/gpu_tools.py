"""The CUDA C++ kernels under the tools of the CUDA toolkit, each in a process of its own.

compute-sanitizer watches the backend's own checks: small shapes, every op and dtype. Nsight Compute (``ncu``) measures
what the kernels of a training step keep busy, at one of the shapes that are timed. Where there is neither, or they are
not allowed to look, the record says so.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sparsekern.backends import cuda
from sparsekern.bench.gpu_kernels import FORCED

SANITIZERS = ("memcheck", "racecheck", "synccheck")
PROFILED = (8192, 768, 131072, 32)
"""``B, d, N, k`` of what is profiled: shape F."""

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
FIGURES = {
    "ms": ("gpu__time_duration.sum", 1e-6),
    "memory, %": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "L2, %": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "multiprocessors, %": ("sm__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "issue, %": ("sm__inst_issued.avg.pct_of_peak_sustained_active", 1.0),
    "warps, %": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1.0),
    "registers": ("launch__registers_per_thread", 1.0),
}
"""What is shown of a kernel: a metric of these sections, in base units, and a factor. Not every device has each."""

_OURS = "regex:sparsekern::cuda"

_CHECKS = """
import torch
from sparsekern.backends import check, cuda
wrong = [result for result in check.run(cuda, "cuda") if not result.passed]
assert not wrong, wrong
"""

_SUBJECT = """
import torch
import sparsekern as sk
rows, d, n, k = {shape}
sae = sk.SAE(d, n, sk.TopK(k), aux_coefficient=0, device="cuda")
trainer = sk.Trainer(sae, lr=1e-4, warmup_steps=0)
for _ in range(2):
    trainer.step(torch.randn(rows, d, device="cuda"))
torch.cuda.synchronize()
torch.cuda.cudart().cudaProfilerStart()
trainer.step(torch.randn(rows, d, device="cuda"))
torch.cuda.synchronize()
"""


def tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)])
    return shutil.which(name, path=folders)


def why_not(name: str, device: torch.device) -> str | None:
    """Why a tool cannot be used on a device; None where it may work."""
    if device.type != "cuda":
        return "it looks into kernels on a GPU"
    return cuda.missing(device) or (None if tool(name) else f"{name} is not installed")


def sanitize(name: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """The backend's own checks under one of :data:`SANITIZERS`, if they end in time."""
    reason = why_not("compute-sanitizer", device)
    if reason is not None:
        return {"missing": reason}
    options = ["--tool", name, "--kernel-name", "kns=sparsekern", "--error-exitcode", "7"]
    found = _run([str(tool("compute-sanitizer")), *options, sys.executable, "-c", _CHECKS], device, seconds)
    if "missing" in found:
        return found
    lines = [line.removeprefix("=========").strip() for line in found["output"].splitlines() if "=====" in line]
    return {"passed": found["code"] == 0, "seconds": found["seconds"], "lines": lines[-3:] or _last(found["output"])}


def profile(device: torch.device, seconds: float, shape: tuple[int, int, int, int] = PROFILED) -> dict[str, Any]:
    """Figures of each CUDA C++ kernel of one training step."""
    reason = why_not("ncu", device)
    if reason is not None:
        return {"missing": reason}
    options = ["--csv", "--page", "raw", "--print-units", "base", "--kernel-name-base", "demangled"]
    options += ["--kernel-name", _OURS, "--profile-from-start", "off"]
    options += [word for section in SECTIONS for word in ("--section", section)]
    script = _SUBJECT.format(shape=shape)
    found = _run([str(tool("ncu")), *options, sys.executable, "-c", script], device, seconds)
    if "missing" in found:
        return found
    kernels = figures(found["output"])
    lines = [] if kernels else _last(found["output"])
    return {"kernels": kernels, "shape": list(shape), "seconds": found["seconds"], "lines": lines}


def figures(output: str) -> list[dict[str, Any]]:
    """The rows of Nsight Compute's table, with the names and units of :data:`FIGURES`."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    found = []
    for row in csv.DictReader(lines):
        if not (row.get("ID") or "").isdigit():  # the line of units
            continue
        name = row["Kernel Name"].replace("(anonymous namespace)::", "").split("(")[0].replace("sparsekern::cuda::", "")
        entry: dict[str, Any] = {"kernel": name.removeprefix("void ")}
        for label, (metric, factor) in FIGURES.items():
            try:
                entry[label] = factor * float(row[metric].replace(",", ""))
            except (KeyError, ValueError):  # this device does not count it
                continue
        found.append(entry)
    return found


def _run(command: list[str], device: torch.device, seconds: float) -> dict[str, Any]:
    """A command with the CUDA C++ kernels chosen: its exit code and output, or that it took too long."""
    index = torch.cuda.current_device() if device.index is None else device.index
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = seen.split(",")[index] if seen else str(index)
    # Each tensor in memory of its own, so that memcheck sees what is beyond it.
    variables = os.environ | {**FORCED, "CUDA_VISIBLE_DEVICES": there, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"missing": f"it was not through within {seconds:.0f} s"}
    return {"code": done.returncode, "output": done.stdout, "seconds": time.monotonic() - start}


def _last(output: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if line.strip()][-3:]

"""The memory of this process, as Linux counts it (None elsewhere), and of a GPU, as torch's allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

CPU = torch.device("cpu")


def resident(device: torch.device = CPU) -> int | None:
    """Bytes in memory now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _read(Path("/proc/self/status"), "VmRSS")


def peak(device: torch.device = CPU) -> int | None:
    """Most bytes in memory since the start or :func:`reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _read(Path("/proc/self/status"), "VmHWM")


def available(device: torch.device = CPU) -> int | None:
    """Bytes that new processes could have of the machine, or that this process could still have of a GPU."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return _read(Path("/proc/meminfo"), "MemAvailable")


def reset_peak(device: torch.device = CPU) -> bool:
    """Let :func:`peak` begin anew; False where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def growth(call: Callable[[], object], device: torch.device = CPU) -> int | None:
    """Bytes by which `call` raises the memory at its highest."""
    before = resident(device)
    if before is None or not reset_peak(device):
        return None
    call()
    highest = peak(device)
    return None if highest is None else max(0, highest - before)


def _read(path: Path, entry: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)

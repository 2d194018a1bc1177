"""The memory of this process, as Linux counts it; None elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def resident() -> int | None:
    """Bytes in memory now."""
    return _read(Path("/proc/self/status"), "VmRSS")


def peak() -> int | None:
    """Most bytes in memory since the start or :func:`reset_peak`."""
    return _read(Path("/proc/self/status"), "VmHWM")


def available() -> int | None:
    """Bytes of the machine that new processes could have."""
    return _read(Path("/proc/meminfo"), "MemAvailable")


def reset_peak() -> bool:
    """Let :func:`peak` begin anew; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def growth(call: Callable[[], object]) -> int | None:
    """Bytes by which `call` raises the memory at its highest."""
    before = resident()
    if before is None or not reset_peak():
        return None
    call()
    highest = peak()
    return None if highest is None else max(0, highest - before)


def _read(path: Path, entry: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)

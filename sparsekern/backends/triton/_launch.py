"""The one place where kernels are launched, and where what would be launched can be recorded instead.

Inside :func:`recording` nothing runs: tensors may be on the ``meta`` device, and each launch is kept with its arguments
and compile options. That is how every configuration is compiled ahead of time without a GPU
(``sparsekern.bench.resources``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes
    ----------
    kernel : JITFunction
    grid : tuple of int
    args : tuple
        The arguments in order: tensors, numbers, or None for a pointer that is not used.
    constants : dict
        ``constexpr`` arguments by name.
    options : dict
        ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


FUSION = {"enable_fp_fusion": True}
"""Multiply-adds in one instruction, with one rounding. Said, because Triton is about to change what it does unasked."""

_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within this context launches are collected instead of made."""
    global _recorded
    if _recorded is not None:
        raise RuntimeError("launches are already being recorded")
    launches: list[Launch] = []
    _recorded = launches
    try:
        yield launches
    finally:
        _recorded = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Launch `kernel` on the device of its first tensor; an empty grid launches nothing."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, {"num_warps": num_warps, "num_stages": num_stages}))
    if _recorded is not None or not all(grid):
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages, **FUSION)
    else:
        kernel[grid](*args, **constants)

"""Triton kernels for CUDA tensors, sm_80 and newer: float32, bfloat16 and float16.

The kernels are loaded when the first call is served, so that ``import sparsekern`` does not import Triton. The first
call of an op on a device with a dtype checks its kernels there (:mod:`sparsekern.backends.check`); where they disagree
with the reference, that serves.

With ``TRITON_INTERPRET=1`` and ``SPARSEKERN_BACKEND=triton`` the kernels run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MODULES = {
    "topk_encode": "encode",
    "last_encode": "encode",
    "quantized": "encode",
    "batch_topk_encode": "csr_encode",
    "threshold_encode": "csr_encode",
    "route": "routing",
    "group_slots": "routing",
    "routed_topk_encode": "routing",
    "sparse_decode": "products",
    "gather_dot": "products",
    "scatter_outer": "products",
    "weighted_row_sum": "products",
    "csr_decode": "products",
    "csr_gather_dot": "products",
    "csr_scatter_outer": "products",
    "bit_distances": "bits",
    "bit_neighbors": "bits",
    "cooccurrence": "bits",
    "SortedFactors": "adam",
    "clip_factor": "adam",
    "row_adam": "adam",
    "encode_plan": "plans",
    "routed_plan": "plans",
}
"""Where each function is."""

ENCODE_PATHS = ("fused", "chunked")
"""The ways of :func:`topk_encode`, to be checked each."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WHOLE_NUMBERS = ("group_slots", "bit_distances", "bit_neighbors", "cooccurrence")  # checked once, for no dtype
_FOR_SCREEN = {"bf16": (8, 0), "fp16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def unavailable(op: str, device: torch.device, dtype: torch.dtype, screen: str) -> str | None:
    """Why this backend cannot serve such a call; None when it can. Runs the check of `op` where it has not run yet."""
    if device.type != "cuda" and not _interpreted(device):
        return f"serves cuda tensors, not {device.type}"
    if op not in _MODULES:
        return f"has no {op} kernel"
    if op in _WHOLE_NUMBERS:
        dtype = torch.float32
    if dtype not in _DTYPES:
        return f"serves float32, bfloat16 and float16, not {dtype}"
    reason = missing(device) or _no_screen(op, device, dtype, screen)
    if reason is None and device.type == "cuda":
        from sparsekern.backends import check

        reason = check.verdict(sys.modules[__name__], check.name_of(op, screen), dtype, device)
    return reason


def missing(device: torch.device) -> str | None:
    """Why there are no kernels for any device; None where there are."""
    installed = importlib.util.find_spec("triton") is not None
    return None if installed else "not built (triton is not installed: pip install triton)"


def _interpreted(device: torch.device) -> bool:
    """Whether kernels would run in Triton's interpreter."""
    return (
        device.type == "cpu"
        and os.environ.get("TRITON_INTERPRET") == "1"
        and os.environ.get("SPARSEKERN_BACKEND") == "triton"
    )


def _no_screen(op: str, device: torch.device, dtype: torch.dtype, screen: str) -> str | None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    if capability < (8, 0):
        return f"needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    if screen in ("auto", "none"):
        return None
    if screen not in _FOR_SCREEN or (screen == "fp8" and op != "topk_encode"):
        return f"has no {screen} screening for {op}; use screen='auto', 'fp16' or 'none'"
    if capability < _FOR_SCREEN[screen]:
        return f"{screen} screening needs compute capability 8.9, this device has {capability[0]}.{capability[1]}"
    return None


def build() -> str:
    """The compiler and the sources of the kernels: what the outcome of a check depends on, besides the device."""
    import triton

    from sparsekern.backends.check import digest

    return f"triton {triton.__version__}; kernels {digest(Path(__file__).parent.glob('*.py'))}"


def updates(weight: Tensor) -> bool:
    """Whether :func:`row_adam` serves this weight."""
    from sparsekern.backends.factored_adam import fits

    return fits(weight) and unavailable("row_adam", weight.device, weight.dtype, "auto") is None


def screens(n: int, d: int) -> bool:
    """Whether :func:`topk_encode` would use a copy of ``[n, d]`` weights that the optimizer keeps."""
    from sparsekern.backends.triton import plans

    return n > plans.MOST_KEYS

"""CUDA C++ kernels (csrc/cuda) for what Triton cannot bring to the limit of a Hopper GPU.

They serve ``topk_encode``, ``routed_topk_encode`` and the update of the weights (``row_adam``, and what leads to it);
``row_topk`` is the selection alone. float32, bfloat16 and float16; for the update float32.

They are **off** unless ``SPARSEKERN_BACKEND=cuda`` asks for them, until the record of a device shows them right and
faster than the Triton kernels. With it, the ops that have no kernel here are served by Triton's (:func:`stand_in`), so
that a whole training runs. The first call of an op on a device with a dtype checks its kernels there
(:mod:`sparsekern.backends.check`); where they disagree with the reference the call fails, since it asked for them.

The same kernels run on CPU tensors in an emulator of CUDA, inside :func:`._library.emulating`, which tests use. The
reference stands in there.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekern.backends.cuda import _library
from sparsekern.backends.triton import screens

__all__ = ["screens", "stand_in", "unavailable", "updates"]

_MODULES = {
    "topk_encode": "encode",
    "routed_topk_encode": "encode",
    "last_encode": "encode",
    "quantized": "encode",
    "row_topk": "selection",
    "SortedFactors": "adam",
    "clip_factor": "adam",
    "row_adam": "adam",
    "encode_plan": "encode",
    "routed_plan": "encode",
}
"""Where each function is."""

_OPS = ("topk_encode", "routed_topk_encode", "row_topk", "row_adam")
_ENCODERS = ("topk_encode", "routed_topk_encode")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ENCODE_PATHS = ("fused", "chunked")
"""The ways of :func:`topk_encode`, to be checked each."""

OFF = "off until a record of a device shows it right and faster; SPARSEKERN_BACKEND=cuda chooses it"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def unavailable(op: str, device: torch.device, dtype: torch.dtype, screen: str) -> str | None:
    """Why this backend cannot serve such a call; None when it can. Runs the check of `op` where it has not run yet."""
    reason = None if device.type == "cuda" else missing(device)  # the library is loaded only for who chose it
    if reason is not None:
        return reason
    if op not in _OPS:
        return f"has no {op} kernel"
    if not _chosen():
        return OFF
    if dtype not in _DTYPES:
        return f"serves float32, bfloat16 and float16, not {dtype}"
    reason = missing(device)
    if reason is None and op in _ENCODERS:
        from sparsekern.backends.cuda import encode

        reason = encode.serves(op, device, dtype, screen)
    if reason is None and device.type == "cuda":
        from sparsekern.backends import check

        reason = check.verdict(sys.modules[__name__], check.name_of(op, screen), dtype, device)
    return reason


def missing(device: torch.device) -> str | None:
    """Why no kernel can run on `device`; None where they can."""
    if device.type == "cuda":
        return _library.built(device)
    emulated = device.type == "cpu" and _library.emulated()
    return None if emulated else f"serves cuda tensors, not {device.type}"


def summary() -> str:
    """What was compiled, what drives it, and whether it is used, in one line for `sparsekern doctor`."""
    found = _library.info()
    if found is None:
        return (
            f"{_library.built()}; nvcc makes them when the package is installed, SPARSEKERN_BUILD_CUDA=1 says why not"
        )
    compiled = f"sm_{', sm_'.join(found['architectures'])} by nvcc {found['nvcc']}, runtime {found['runtime']}"
    return f"{compiled}; {found['driver']}; {'on' if _chosen() else OFF}"


def stand_in(op: str, device: torch.device) -> str | None:
    """The backend that serves `op` on `device` where this one is chosen and has no kernel for it."""
    if op in _OPS:
        return None
    return "triton" if device.type == "cuda" else "reference" if _library.emulated() else None


def _chosen() -> bool:
    return os.environ.get("SPARSEKERN_BACKEND") == "cuda"


def build() -> str:
    """The library and its Python side: what the outcome of a check depends on, besides the device."""
    from sparsekern.backends.check import digest

    return f"kernels {digest([_library.path(), *Path(__file__).parent.glob('*.py')])}"


def updates(weight: Tensor) -> bool:
    """Whether :func:`row_adam` serves this weight."""
    from sparsekern.backends.factored_adam import fits

    return fits(weight) and unavailable("row_adam", weight.device, weight.dtype, "auto") is None

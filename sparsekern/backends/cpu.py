"""C++ kernels for the CPU (csrc/cpu), float32 and float64.

The kernels take addresses and strides; this module makes the arguments contiguous where they must be, allocates the
results and passes torch's thread count on.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_native: Any
try:
    _native = importlib.import_module("sparsekern._native")
except ImportError as error:  # no compiler at install time, or a binary that this system cannot load
    if "SPARSEKERN_CPU_ISA" in os.environ:
        raise  # who asks for an instruction set does not want another one, or none
    _native, _not_built = None, f"not built ({error})"

_DTYPES = (torch.float32, torch.float64)


def _loaded_openmp() -> str | None:
    """Path of the OpenMP library (libgomp) that torch runs on, if this process has one loaded."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    except OSError:  # no Linux
        return None
    # Another package may have brought a copy of its own: torch's lies beside torch.
    beside = [path for path in mapped if path.startswith(str(Path(torch.__file__).parents[1] / "torch"))]
    return min(beside or mapped, default=None)


_openmp = _loaded_openmp()
borrows_threads: bool = _native is not None and _openmp is not None and _native.use_openmp(_openmp)
"""Whether the kernels run on torch's own threads; they start some of their own otherwise."""


def unavailable(op: str, device: str, dtype: torch.dtype, screen: str) -> str | None:
    """Why this backend cannot serve such a call; None when it can."""
    if device != "cpu":
        return f"serves cpu tensors, not {device}"
    if op not in globals():
        return f"has no {op} kernel"
    if _native is None:
        return _not_built
    if dtype not in _DTYPES:
        return f"serves float32 and float64, not {dtype}"
    return None


def isa() -> str | None:
    """The instruction set that the kernels use, or None when they are not built."""
    return None if _native is None else _native.isa()


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with unit stride along its last axis; rows may be any distance apart."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`sparsekern.backends.reference.sparse_decode`."""
    values, indices, weight = values.contiguous(), indices.contiguous(), _rows(weight)
    bias = None if bias is None else bias.contiguous()
    out = values.new_empty(values.shape[0], weight.shape[1])
    _native.sparse_decode(
        values.element_size(),
        indices.data_ptr(),
        values.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *indices.shape,
        *weight.shape,
        torch.get_num_threads(),
    )
    return out


def gather_dot(grad: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """See :func:`sparsekern.backends.reference.gather_dot`."""
    grad, indices, weight = _rows(grad), indices.contiguous(), _rows(weight)
    out = grad.new_empty(indices.shape)
    _native.gather_dot(
        grad.element_size(),
        indices.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        grad.data_ptr(),
        grad.stride(0),
        out.data_ptr(),
        *indices.shape,
        *weight.shape,
        torch.get_num_threads(),
    )
    return out


def scatter_outer(values: Tensor, indices: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    """See :func:`sparsekern.backends.reference.scatter_outer`."""
    values, indices, grad = values.contiguous(), indices.contiguous(), _rows(grad)
    out = grad.new_empty(d_sae, grad.shape[1])
    _native.scatter_outer(
        values.element_size(),
        indices.data_ptr(),
        values.data_ptr(),
        grad.data_ptr(),
        grad.stride(0),
        out.data_ptr(),
        *indices.shape,
        d_sae,
        grad.shape[1],
        torch.get_num_threads(),
    )
    return out

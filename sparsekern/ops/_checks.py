"""Argument checks that the ops share. Every message names the argument and says what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

SCREENS = ("auto", "none", "bf16", "fp16", "tf32", "fp8", "int8")


def check_floating(**tensors: Tensor | None) -> None:
    """Each given tensor holds floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}; use {name}.float()")


def check_matrix(name: str, tensor: Tensor, columns: tuple[str, int] | None = None) -> None:
    """`tensor` is 2-D, with as many columns as `columns` (what they are, how many) says."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be 2-D, got shape {tuple(tensor.shape)}")
    if columns is not None and tensor.shape[1] != columns[1]:
        raise ValueError(f"{name} must have {columns[1]} columns ({columns[0]}), got shape {tuple(tensor.shape)}")


def check_vector(name: str, tensor: Tensor | None, size: tuple[str, int]) -> None:
    """`tensor`, if given, is 1-D with the entries that `size` (what they are, how many) says."""
    if tensor is not None and tensor.shape != (size[1],):
        raise ValueError(f"{name} must have shape ({size[1]},) ({size[0]}), got {tuple(tensor.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """All given tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"tensors must be on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}")


def check_k(k: int, d_sae: int) -> None:
    """1 ≤ k ≤ d_sae."""
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must be between 1 and d_sae={d_sae}, got {k}")


def check_finite(name: str, tensor: Tensor) -> None:
    """No NaN or infinity in the rows of `tensor`; looks at values, so it waits for the device."""
    # A sum is finite only where all its terms are, and takes one pass; a sum of large finite numbers may overflow.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        rows = tensor.reshape(-1, tensor.shape[-1])
        first = int((~rows.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name} holds NaN or infinity, first in row {first}; remove or repair such rows")


def check_indices(indices: Tensor, d_sae: int, name: str = "indices") -> None:
    """Indices lie in ``[0, d_sae)``; looks at values, so it waits for the device."""
    if indices.numel():
        low, high = torch.aminmax(indices)
        if low < 0 or high >= d_sae:
            raise ValueError(f"{name} must lie in [0, {d_sae}), got values from {int(low)} to {int(high)}")


def check_csr(crow: Tensor, col: Tensor, d_sae: int) -> None:
    """`crow` starts the rows of `col`, whose indices are in range; looks at values, so it waits for the device."""
    nnz = col.shape[0]
    if crow.shape[0] == 0 or crow[0] != 0 or crow[-1] != nnz or (crow.diff() < 0).any():
        raise ValueError(f"crow must go from 0 to {nnz} (the entries of col) and never fall, got {crow.tolist()[:10]}…")
    check_indices(col, d_sae, "col")

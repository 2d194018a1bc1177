"""The one place that decides which implementation serves a call.

A backend is a module with the functions below, all with the same arguments and the same answers:

``topk_encode(x, weight, bias, k, screen, absolute=False)``
    -> values ``[B, k]``, indices ``[B, k]`` int32
``sparse_decode(values, indices, weight, bias)``
    -> ``[B, d]``
``gather_dot(grad, indices, weight)``
    -> ``[B, k]``
``scatter_outer(values, indices, grad, d_sae)``
    -> ``[d_sae, d]``
``batch_topk_encode(x, weight, bias, count, screen)``, with a count from 1 to ``B · d_sae``
    -> crow ``[B + 1]`` int64, col ``[count]`` int32, values ``[count]``
``threshold_encode(x, weight, bias, threshold, screen)``, with a threshold 0-dim or ``[d_sae]``,
float32 or float64, of any sign
    -> crow ``[B + 1]`` int64, col ``[nnz]`` int32, values ``[nnz]``
``csr_decode(values, crow, col, weight, bias)``
    -> ``[B, d]``
``csr_gather_dot(grad, crow, col, weight)``
    -> ``[nnz]``
``csr_scatter_outer(values, crow, col, grad, d_sae)``
    -> ``[d_sae, d]``
``weighted_row_sum(coefficients, weight)``
    -> ``[d]``
``route(x, weight, bias, n_active, gate)``, with a gate "softmax" or "sigmoid" and a bias that only selects
    -> logits ``[B, E]``, gates ``[B, n_active]``, experts ``[B, n_active]`` int32, and what ``group_slots`` returns
``group_slots(experts, n_experts)``
    -> order ``[B · n_active]`` int32, offsets ``[E + 1]`` int32
``routed_topk_encode(x, weight, bias, experts, order, offsets, k, per_expert, screen)``
    -> values ``[B, k]``, indices ``[B, k]`` int32; with `per_expert` both ``[B, n_active · k]``
``bit_distances(a, b, metric)``, with rows of bits and a metric "hamming" or "jaccard"
    -> ``[N, M]`` int32, or float32 for Jaccard
``bit_neighbors(a, b, k, metric, itself)``
    -> distances ``[N, k]`` as above, indices ``[N, k]`` int32; without `itself` row i is not its own neighbour
``cooccurrence(crow, col, d_sae, at_least)``, of rows that rise
    -> crow ``[d_sae + 1]`` int64, col ``[pairs]`` int32, counts ``[pairs]`` int32

and ``unavailable(op, device, dtype, screen) -> str | None``: why it cannot serve such a call, or None when it can.
:mod:`~sparsekern.backends.reference` serves everything and is the specification of the others.
:mod:`~sparsekern.backends.cpu`, :mod:`~sparsekern.backends.triton` and :mod:`~sparsekern.backends.cuda` also have the
update of the weights, ``row_adam``, which :mod:`sparsekern.optim` calls.

The choice follows the device and dtype of the tensors. ``SPARSEKERN_BACKEND=<name>`` forces one backend, and a call
that it cannot serve then fails instead of falling back. A backend that is to have only some of the ops names, in
``stand_in(op, device)``, who serves the others where it is forced: ``cuda``, which is used in no other way yet.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.backends import cpu, cuda, reference, triton

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}
"""By name, in order of preference."""

OPS = (
    "topk_encode",
    "sparse_decode",
    "gather_dot",
    "scatter_outer",
    "weighted_row_sum",
    "batch_topk_encode",
    "threshold_encode",
    "csr_decode",
    "csr_gather_dot",
    "csr_scatter_outer",
    "route",
    "group_slots",
    "routed_topk_encode",
    "bit_distances",
    "bit_neighbors",
    "cooccurrence",
)

_warned: set[str] = set()


class BackendInfo(NamedTuple):
    """What one backend would do for one op on one device."""

    op: str
    backend: str
    device: str
    chosen: bool
    reason: str


def forced() -> str | None:
    """The backend named by ``SPARSEKERN_BACKEND``, or None."""
    name = os.environ.get("SPARSEKERN_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"SPARSEKERN_BACKEND={name!r}: must be one of {', '.join(BACKENDS)}")
    return name


def _forced_for(op: str, device: torch.device) -> str | None:
    """The only backend that may serve `op`, or None: the forced one, or who stands in for what it does not have."""
    name = forced()
    stand_in = getattr(BACKENDS[name], "stand_in", None) if name else None
    return (stand_in and stand_in(op, device)) or name


def choose(op: str, tensor: Tensor, screen: str = "auto") -> ModuleType:
    """The backend that serves `op` for tensors like `tensor`.

    Raises
    ------
    ValueError
        If the forced backend cannot serve the call, or no backend offers the asked `screen`.
    """
    device, dtype = tensor.device, tensor.dtype
    name = _forced_for(op, device)
    if name is not None:
        reason = BACKENDS[name].unavailable(op, device, dtype, screen)
        if reason is not None:
            who = "" if name == forced() else f", where {name} stands in"
            raise ValueError(f"SPARSEKERN_BACKEND={forced()} cannot serve {op} on {device.type} {dtype}{who}: {reason}")
        return BACKENDS[name]
    reasons = {}
    for name, backend in BACKENDS.items():
        reason = backend.unavailable(op, device, dtype, screen)
        if reason is None:
            return backend
        reasons[name] = reason
        _warn_if_not_built(name, device.type, reason)
    details = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"no backend serves {op} on {device.type} {dtype} with screen={screen!r} ({details})")


def updater(weight: Tensor) -> ModuleType | None:
    """The backend that updates `weight` from gradients kept as factors; None where torch is to do it."""
    names = [forced()] if forced() else list(BACKENDS)
    for backend in (BACKENDS[name] for name in names if name):
        if hasattr(backend, "updates") and backend.updates(weight):
            return backend
    return None


def _warn_if_not_built(name: str, device: str, reason: str) -> None:
    """Say once that a device's own kernels are missing: the slow path should not be a silent surprise."""
    own = {"cpu": "cpu", "cuda": "triton"}
    if reason.startswith("not built") and own.get(device) == name and name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"sparsekern's {name} kernels are {reason}; running on the slower reference backend. "
            "`sparsekern doctor` tells more.",
            RuntimeWarning,
            stacklevel=4,
        )


def backends(device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> list[BackendInfo]:
    """What would run for each op, and why the other backends would not.

    Parameters
    ----------
    device
        Device to ask about; by default ``cuda`` where a GPU is present, else ``cpu``.
    dtype
        Dtype of the weights.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for op in OPS:
        taken, only = False, _forced_for(op, device)
        for name, backend in BACKENDS.items():
            reason = backend.unavailable(op, device, dtype, "auto")
            if only not in (None, name) and (name != forced() or reason is None):
                reason = f"SPARSEKERN_BACKEND={forced()}"
            chosen = reason is None and not taken
            rows.append(BackendInfo(op, name, device.type, chosen, reason or ("chosen" if chosen else "not needed")))
            taken = taken or chosen
    return rows

"""Gradients of weights, kept as factors for the optimizers that can use them so.

The gradient of a weight of one row a latent is a sum of outer products: ``dW[i] = Σ values[b, j] · vectors[b]`` over
the slots with ``indices[b, j] == i``. The factors take ``B (2k + d)`` numbers where the gradient takes ``d_sae · d``.
Inside :func:`kept_as_factors` backward passes leave the factors here and make no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class OuterProducts(NamedTuple):
    """``dW[i] = Σ values[b, j] · vectors[b]`` over the slots with ``indices[b, j] == i``."""

    values: Tensor
    indices: Tensor
    vectors: Tensor


# By address: a backward pass may see its saved weights as other Python objects than the parameters. Not thread-local,
# because autograd runs backward passes on threads of its own choosing.
_kept: dict[int, list[OuterProducts]] = {}


@contextmanager
def kept_as_factors(weights: Iterable[Tensor]) -> Iterator[dict[int, list[OuterProducts]]]:
    """Within this context, gradients of these weights are collected as factors, by ``data_ptr()``."""
    if _kept:
        raise RuntimeError("gradients are already being kept as factors; run one such backward pass at a time")
    collected: dict[int, list[OuterProducts]] = {weight.data_ptr(): [] for weight in weights}
    _kept.update(collected)
    try:
        yield collected
    finally:
        _kept.clear()


def keep(weight: Tensor, values: Tensor, indices: Tensor, vectors: Tensor) -> bool:
    """Keep the factors of ``dW`` if somebody collects them for this weight; whether that was so."""
    if not _kept or torch.is_grad_enabled():  # nobody does, or the gradient is to be differentiated itself
        return False
    parts = _kept.get(weight.data_ptr())
    if parts is None:
        return False
    parts.append(OuterProducts(values, indices, vectors))
    return True

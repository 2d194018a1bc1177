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
    """``dW[i] = Σ values[b, j] · vectors[b]`` over the slots with ``indices[b, j] == i``.

    Or, where there is a `crow` ``[B + 1]``, over the entries with ``indices[e] == i`` in CSR form: values and indices
    ``[nnz]``, of which those of vector b are ``crow[b]:crow[b + 1]``.
    """

    values: Tensor
    indices: Tensor
    vectors: Tensor
    crow: Tensor | None = None


def identity(tensor: Tensor) -> tuple[int, int]:
    """What two Python objects for one tensor have in common, also where it has no address (on ``meta``)."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


# By identity: a backward pass may see its saved weights as other Python objects than the parameters. Not thread-local,
# because autograd runs backward passes on threads of its own choosing.
_kept: dict[tuple[int, int], list[OuterProducts]] = {}


@contextmanager
def kept_as_factors(weights: Iterable[Tensor]) -> Iterator[dict[tuple[int, int], list[OuterProducts]]]:
    """Within this context, gradients of these weights are collected as factors, by :func:`identity`."""
    if _kept:
        raise RuntimeError("gradients are already being kept as factors; run one such backward pass at a time")
    collected: dict[tuple[int, int], list[OuterProducts]] = {identity(weight): [] for weight in weights}
    _kept.update(collected)
    try:
        yield collected
    finally:
        _kept.clear()


def keep(weight: Tensor, product: OuterProducts) -> bool:
    """Keep the factors of ``dW`` if somebody collects them for this weight; whether that was so."""
    if not _kept or torch.is_grad_enabled():  # nobody does, or the gradient is to be differentiated itself
        return False
    parts = _kept.get(identity(weight))
    if parts is None:
        return False
    parts.append(product)
    return True

"""Batches of samples or of tokens, and what a layer gives for each of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Tensor | Mapping[str, Any]
Where = Tensor | Callable[[Any], Tensor]


def batches(x: Any, batch_size: int, where: Where | None) -> Iterator[tuple[Batch, Tensor | None]]:
    """Batches, and for tokens which of them are wanted."""
    if isinstance(x, Tensor | Mapping):
        length = length_of(x)
        if isinstance(where, Tensor) and len(where) != length:
            raise ValueError(f"where must have a row for each of {length} samples, got shape {tuple(where.shape)}")
        for start in range(0, length, batch_size):
            part = slice(start, start + batch_size)
            batch = {k: v[part] for k, v in x.items()} if isinstance(x, Mapping) else x[part]
            yield batch, _mask(batch, where[part] if isinstance(where, Tensor) else where)
        return
    if isinstance(where, Tensor):
        raise ValueError("where must be a callable of a batch, or None, where x is an iterable of batches")
    for batch in x:
        if not isinstance(batch, Tensor | Mapping):
            raise ValueError(f"x must give batches that are tensors or mappings of tensors, got {type(batch).__name__}")
        yield batch, _mask(batch, where)


def _mask(batch: Batch, where: Where | None) -> Tensor | None:
    values = list(batch.values()) if isinstance(batch, Mapping) else [batch]
    if where is not None:
        mask = where if isinstance(where, Tensor) else where(batch)
        shape = tuple(values[0].shape[:2])
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"where must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
        return mask
    if isinstance(batch, Mapping) and "attention_mask" in batch:
        return batch["attention_mask"].bool()
    ids = [value for value in values if value.dim() == 2 and not value.is_floating_point()]
    return torch.ones(ids[0].shape, dtype=torch.bool) if ids else None


def length_of(batch: Batch) -> int:
    """Samples of a batch; a ValueError where its tensors have different numbers of them."""
    lengths = {len(value) for value in batch.values()} if isinstance(batch, Mapping) else {len(batch)}
    if len(lengths) != 1:
        raise ValueError(f"x must have tensors of one length, got {sorted(lengths)}")
    return lengths.pop()


def moved(batch: Batch, device: torch.device | None) -> Batch:
    """A batch on a device, or as it is."""
    if device is None:
        return batch
    return {k: v.to(device) for k, v in batch.items()} if isinstance(batch, Mapping) else batch.to(device)


def rows_of(name: str, values: Tensor, length: int, mask: Tensor | None) -> Tensor:
    """A row a sample, or a row a token where there is a mask: ``[rows, units]``."""
    if mask is None:
        if values.dim() == 0 or len(values) != length:
            raise ValueError(f"layer {name!r} must give a row for each of {length} samples, got {tuple(values.shape)}")
        return values.reshape(length, -1)
    if tuple(values.shape[:2]) != tuple(mask.shape) and len(values) != mask.numel():
        raise ValueError(
            f"layer {name!r} must give a row for each of {tuple(mask.shape)} tokens, got {tuple(values.shape)}"
        )
    return values.reshape(mask.numel(), -1)[mask.flatten().to(values.device)]

"""Boolean tensors as bits: one bit an entry, bit i of a row in byte ``i // 8`` at place ``i % 8`` from the lowest."""

from __future__ import annotations

import torch
from torch import Tensor

_PLACES = (0, 1, 2, 3, 4, 5, 6, 7)


def pack_bits(flags: Tensor) -> Tensor:
    """Pack the last dimension of a boolean tensor: ``[..., n]`` to ``[..., ⌈n/8⌉]`` uint8; the bits past n are 0.

    Raises
    ------
    ValueError
        If `flags` is not boolean, or has no dimension.
    """
    if flags.dtype != torch.bool or flags.ndim == 0:
        raise ValueError(f"flags must be a bool tensor [..., n], got {flags.dtype} {list(flags.shape)}")
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 8)).view(torch.uint8)
    groups = padded.unflatten(-1, (-1, 8))
    packed = torch.zeros_like(groups[..., 0])
    for place in _PLACES:
        packed |= groups[..., place] << place
    return packed


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The first `n` flags of each row of :func:`pack_bits`: ``[..., ⌈n/8⌉]`` uint8 to ``[..., n]`` bool.

    Raises
    ------
    ValueError
        If `packed` is not uint8, or is not as wide as `n` bits need.
    """
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != -(-n // 8):
        raise ValueError(
            f"packed must be a uint8 tensor [..., {-(-n // 8)}] for n = {n}, got {packed.dtype} {list(packed.shape)}"
        )
    places = torch.tensor(_PLACES, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> places & 1).flatten(-2)[..., :n].bool()

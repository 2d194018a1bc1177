"""How a call is run: which path, how many buckets, which tiles.

:data:`TILES` is the table of measured tiles; shapes that are not in it get the heuristic's. Both hold only what was
compiled within bounds for every architecture they name (see ``docs/kernels.md``).
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch

SCREEN_DTYPE = torch.float16
"""Of the screen for float32 weights, with a scale for each row: as fast as bfloat16, and eight times as precise."""

MOST_KEYS = 4096 * 3
"""Keys of a token that one program holds in registers."""

MOST_TOP = 2048
"""The largest k: that many scores are sorted by one program."""


FEW_ROOM = 32
"""Candidates of a routed row that is to keep up to 4 latents: those, and the 16 of a bucket that has to be opened."""


class Tile(NamedTuple):
    """Shape of a program of the fused screen: ``rows × (buckets · members)`` scores, `depth` of the width at a time."""

    rows: int
    buckets: int
    members: int
    depth: int
    warps: int
    stages: int


class EncodePlan(NamedTuple):
    """How one call of ``topk_encode`` is run.

    Attributes
    ----------
    operand : torch.dtype
        Of the screen.
    precision : {"ieee", "tf32"}
        Of float32 operands.
    n_buckets, n_members, keep : int
        Latent i is member ``i // n_buckets`` of bucket ``i % n_buckets``; `keep` keys of each bucket.
    room : int
        Candidates of a token, at most; a power of two.
    tile : Tile or None
        Of the fused screen; None for the chunked one.
    panel_rounding : float
        Relative rounding of the chunked screen's scores.
    statistical : bool
        Whether the bound on the screen's errors is an estimate.
    absolute : bool
        Whether scores are compared by size.
    """

    operand: torch.dtype
    precision: str
    n_buckets: int
    n_members: int
    keep: int
    room: int
    tile: Tile | None
    panel_rounding: float
    statistical: bool
    absolute: bool = False

    @property
    def member_bits(self) -> int:
        """Bits of a key that hold the number of the member."""
        return (self.n_members - 1).bit_length()


assumed_capability = (9, 0)
"""For tensors that are on no GPU: in the interpreter, and where kernels are compiled ahead of time."""

TILES: dict[tuple[int, int], Tile] = {
    # (9 for data-centre cards with 227 KiB of shared memory a block, else 8; bytes of an operand).
    # Not measured yet: chosen by registers and shared memory, of which cards like sm_86 and sm_89 have 99 KiB.
    (8, 2): Tile(rows=128, buckets=8, members=16, depth=32, warps=8, stages=4),
    (8, 4): Tile(rows=128, buckets=8, members=16, depth=32, warps=8, stages=3),
    (8, 1): Tile(rows=64, buckets=8, members=16, depth=64, warps=8, stages=4),
    (9, 2): Tile(rows=128, buckets=8, members=32, depth=64, warps=8, stages=4),
    (9, 4): Tile(rows=128, buckets=8, members=16, depth=32, warps=8, stages=4),
    (9, 1): Tile(rows=128, buckets=8, members=32, depth=128, warps=8, stages=3),
}

UNALIGNED = Tile(rows=64, buckets=8, members=16, depth=32, warps=8, stages=2)
"""For rows that do not begin at multiples of 16 bytes, which the tensor cores' operands go through registers for."""

FUSED_UP_TO = 2048
"""Widest input for which the fused screen is the default. Its matmul is slower than the library's, which costs in
proportion to the width; what it saves, writing and reading the scores, does not depend on it. Not measured yet."""

_SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11}


def encode_plan(
    rows: int,
    d: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    screen: str,
    capability: tuple[int, int],
    *,
    has_copy: bool,
    path: str = "auto",
) -> EncodePlan | None:
    """The plan of a call; None where the reference is to serve it.

    `path` is ``"fused"``, ``"chunked"``, or ``"auto"``: then ``SPARSEKERN_TRITON_ENCODE`` decides, or the shape.
    """
    buckets = _buckets(n, k)
    if buckets is None:
        return None
    n_buckets, keep, room = buckets
    operand, precision = _operand(rows, dtype, screen, has_copy)
    fused = screen != "none" and d <= FUSED_UP_TO
    path = path if path != "auto" else os.environ.get("SPARSEKERN_TRITON_ENCODE", "auto")
    if path not in ("auto", "fused", "chunked"):
        raise ValueError(f"SPARSEKERN_TRITON_ENCODE={path!r}: must be auto, fused or chunked")
    if path != "auto":
        fused = path == "fused"
    if operand == torch.float8_e4m3fn:
        fused = True  # there is no other
    elif precision == "ieee" and operand == torch.float32:
        fused = False  # without tensor cores the library is far ahead
    tile = None
    if fused:
        tile = TILES[9 if capability[0] in (9, 10) else 8, operand.itemsize]
        tile = tile if d * operand.itemsize % 16 == 0 else UNALIGNED
        tile = tile._replace(rows=max(16, min(tile.rows, 1 << (rows - 1).bit_length())))
    elif precision == "tf32" and not _library_takes_tf32():
        precision = "ieee"
    panel = 0.0 if fused or operand == torch.float32 else 2.0 ** -_SIGNIFICANT_BITS[operand]
    statistical = operand == torch.float8_e4m3fn
    return EncodePlan(operand, precision, n_buckets, -(-n // n_buckets), keep, room, tile, panel, statistical)


def routed_plan(
    tokens: int,
    n_active: int,
    n_experts: int,
    d: int,
    latents: int,
    k: int,
    dtype: torch.dtype,
    screen: str,
    capability: tuple[int, int],
    *,
    has_copy: bool,
    per_expert: bool,
) -> EncodePlan | None:
    """The plan of a call that looks at the latents of `n_active` experts of each token, `latents` each.

    `n_buckets` counts those of all experts that one selection is made from: of a token's, or of one with `per_expert`.
    The screen is fused at every width, since no library's matmul stands in for it; and without tensor cores it would be
    far slower, so float32 operands are rounded to tf32 also where `screen` is "none". The certificate covers that.
    """
    n_owners = 1 if per_expert else n_active
    buckets = _routed_buckets(latents, n_owners, k)
    if buckets is None:
        return None
    across, keep, room = buckets
    n_members = -(-latents // across)
    load = -(-tokens * n_active // n_experts)  # tokens of an expert, on average
    operand, precision = _operand(load, dtype, screen, has_copy)
    if operand == torch.float32:
        precision = "tf32"
    aligned = d * operand.itemsize % 16 == 0
    whole = TILES[9 if capability[0] in (9, 10) else 8, operand.itemsize] if aligned else UNALIGNED
    # With few members more buckets, as far as registers go: each keeps its keys there.
    members = min(whole.members, 1 << (n_members - 1).bit_length())
    columns = 256 if members == 32 else 128 if aligned else 64
    # The last tile of an expert is only partly full: lower ones waste less. Not measured yet.
    rows = whole.rows if load >= 512 and members >= 16 else min(whole.rows, 64)
    tile = whole._replace(rows=rows, buckets=columns // members, members=members)
    return EncodePlan(operand, precision, n_owners * across, n_members, keep, room, tile, 0.0, False)


def _routed_buckets(latents: int, n_owners: int, k: int) -> tuple[int, int, int] | None:
    """:func:`_buckets` for the latents of several experts: buckets of each of them, keys of each, room."""
    n = n_owners * latents
    # Short buckets spare most of the keys where hardly one of them has to be opened.
    for members in (16, 8):
        across = -(-latents // members)
        if k <= MOST_TOP and n <= MOST_KEYS and _opened(n_owners * across, k) * members <= k / 4:
            return across, 3, max(4 * (1 << (k - 1).bit_length()), FEW_ROOM if k <= 4 else 64)
    found = _buckets(n, k)
    if found is None:
        return None
    n_buckets, keep, room = found
    if keep == 1 and k <= 4:  # no bucket hides anything
        room = FEW_ROOM
    across = min(latents, n_buckets // n_owners)
    return None if across == 0 or latents > across * 2**12 else (across, keep, room)


def _opened(n_buckets: int, k: int) -> float:
    """How many buckets hold three candidates or more, where there are 2k of them, and are opened whole."""
    crowd = 2 * k / n_buckets
    return n_buckets * (1 - math.exp(-crowd) * (1 + crowd + crowd**2 / 2))


def _operand(rows: int, dtype: torch.dtype, screen: str, has_copy: bool) -> tuple[torch.dtype, str]:
    if screen == "fp8":
        return torch.float8_e4m3fn, "ieee"
    if screen == "none" or dtype != torch.float32:
        tf32 = dtype == torch.float32 and _library_takes_tf32()
        return dtype, "tf32" if tf32 else "ieee"
    # Rounding all weights costs six bytes each, which few tokens do not earn back: tf32 reads them as they are.
    if screen == "bf16":
        return torch.bfloat16, "ieee"
    if screen == "fp16" or (screen == "auto" and (has_copy or rows >= 1024)):
        return SCREEN_DTYPE, "ieee"
    return torch.float32, "tf32"


def _library_takes_tf32() -> bool:
    """Whether this process lets float32 matmuls round their operands to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 raises where it was set by this name


def _buckets(n: int, k: int) -> tuple[int, int, int] | None:
    """Number of buckets, keys of each, and room for candidates; None where k is too large for this."""
    if k > MOST_TOP or n >= 2**31:
        return None
    top = max(16, 1 << (k - 1).bit_length())
    if n <= MOST_KEYS:  # every latent its own bucket
        return n, 1, max(4 * top, 64)
    # Of twice k candidates in as many buckets, few share one; and no bucket should be long.
    n_buckets = min(MOST_KEYS // 3, max(1024, 1 << (32 * k - 1).bit_length(), 1 << (n // 128 - 1).bit_length()))
    keep, members = 3, -(-n // n_buckets)
    if members > 16:  # whole tiles: members that are not there cost as much as others
        members = -(-members // 32) * 32
        n_buckets = -(-n // members)
    room = 4 * top
    while room < 4 * k + 2 * members:
        room *= 2
    if _opened(n_buckets, k) * members > room / 2 or members > 2**12:
        return None
    return n_buckets, keep, room


def whole_tiles(n: int, k: int) -> tuple[int, int, int, int] | None:
    """Buckets, members, keys of each and room where both have to fill tiles, of 8 buckets and of 16 members.

    There can be a few latents fewer than members of buckets. None where such buckets would not do.
    """
    found = _buckets(n, k)
    if found is None:
        return None
    n_buckets, _, room = found
    members = 16 * -(-n // (16 * n_buckets))
    return _tiled(8 * -(-n // (8 * members)), members, k, room)


def routed_tiles(latents: int, n_owners: int, k: int) -> tuple[int, int, int, int] | None:
    """:func:`whole_tiles` for the latents of several experts, where members are to be as many as latents."""
    found = _routed_buckets(latents, n_owners, k)
    if found is None or latents % 128:
        return None
    across, _, room = found
    members = 16 * -(-latents // (16 * across))
    if latents % (8 * members):
        members = 16
    tiles = _tiled(n_owners * (latents // members), members, k, room)
    return tiles and (tiles[0] // n_owners, *tiles[1:])


def _tiled(n_buckets: int, members: int, k: int, room: int) -> tuple[int, int, int, int] | None:
    while room < 4 * k + 2 * members:
        room *= 2
    fits = k <= 3 * n_buckets <= MOST_KEYS and members <= 2**12
    return (n_buckets, members, 3, room) if fits and _opened(n_buckets, k) * members <= room / 2 else None

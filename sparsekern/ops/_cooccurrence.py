"""``cooccurrence``: on how many tokens each pair of latents is active, without a ``d_sae × d_sae`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import choose
from sparsekern.codes import Cooccurrence, CSRCodes, SparseCodes, entry_rows
from sparsekern.ops._checks import check_csr


def cooccurrence(codes: CSRCodes | SparseCodes, at_least: int = 1) -> Cooccurrence:
    """Count the tokens on which two latents are both active: ``XᵀX`` above its diagonal, where X says what is active.

    Slots and entries whose value is 0 do not count. Time grows with the pairs that tokens have, ``Σ n(n − 1)/2`` for
    tokens of n active latents, and memory with the pairs that are found and with the entries of the codes. How many
    pairs there are depends on the data, so a GPU is waited for.

    Parameters
    ----------
    codes : CSRCodes or SparseCodes
        Codes of any number of tokens. CSR codes must hold each token's latents by rising index, as every encoder
        returns them; that is checked on the CPU.
    at_least : int
        Pairs with fewer tokens are left out.

    Returns
    -------
    Cooccurrence
        The pairs ``i < j`` in compressed sparse row form, and on how many tokens each latent is active.

    Raises
    ------
    ValueError
        If `codes` are neither kind of codes, have 2³¹ tokens or more, repeat an active latent or are out of order, or
        `at_least` is below 1.
    """
    if not isinstance(codes, SparseCodes | CSRCodes):
        raise ValueError(f"codes must be SparseCodes or CSRCodes, got {type(codes).__name__}")
    if at_least < 1:
        raise ValueError(f"at_least must be 1 or more, got {at_least}")
    if codes.tokens >= 2**31:
        raise ValueError(f"codes must be of fewer than 2**31 tokens, got {codes.tokens}")
    crow, col = _active(codes)
    first, others, counts = _cooccurrence(crow, col, codes.d_sae, at_least)
    return Cooccurrence(first, others, counts, codes.firing_counts())


def _active(codes: CSRCodes | SparseCodes) -> tuple[Tensor, Tensor]:
    """``crow`` and ``col`` of what is active."""
    if isinstance(codes, SparseCodes):
        col = codes.indices.reshape(codes.tokens, codes.k)
        active = codes.values.reshape(col.shape) != 0
        col = col.masked_fill(~active, codes.d_sae).sort(dim=1).values  # the slots that do not count come last
        crow = torch.cat([active.new_zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
        return crow, col[col < codes.d_sae]
    kept = codes.values != 0
    before = torch.cat([codes.crow.new_zeros(1), kept.cumsum(0)])
    return before[codes.crow], codes.col[kept]


@torch.library.custom_op("sparsekern::cooccurrence", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _cooccurrence(crow: Tensor, col: Tensor, d_sae: int, at_least: int) -> tuple[Tensor, Tensor, Tensor]:
    if col.device.type == "cpu":
        check_csr(crow, col, d_sae)
        rows = entry_rows(crow, col)
        if ((col[1:] <= col[:-1]) & (rows[1:] == rows[:-1])).any():
            raise ValueError("codes must name a token's active latents once each, by rising index in CSR form")
    return choose("cooccurrence", col).cooccurrence(crow, col, d_sae, at_least)


@_cooccurrence.register_fake
def _(crow: Tensor, col: Tensor, d_sae: int, at_least: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return crow.new_empty(d_sae + 1), col.new_empty(pairs), col.new_empty(pairs)

"""Encoding with a variable number of latents a token: threshold and batch top-k.

The screen marks, one bit for each pre-activation, what could be above the threshold; bits become CSR entries in order,
these are rescored in float32, and the exact scores decide. The bits of some tokens take ``N / 8`` bytes each, and are
bounded like every workspace by working on some tokens at a time.

How many entries there are has to be known to allocate them, so :func:`threshold_encode` waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.backends import reference, screening
from sparsekern.backends.triton import encode as topk
from sparsekern.backends.triton._launch import launch
from sparsekern.backends.triton.plans import EncodePlan, encode_plan
from sparsekern.backends.triton.products import csr_gather_dot


@triton.jit(do_not_specialize=["n_rows", "n", "first", "width", "words"])
def _mark(
    panel, panel_stride, x_scale, weight_scale, bias, threshold, slack, marks, counts,
    n_rows, n, first, width, words, relative,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, PER_LATENT: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A bit for each score of a panel that could be above the threshold, and how many of them there are in a row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    margin = tl.load(slack + row, mask=row < n_rows, other=0.0)
    if SCALED:
        by_row = tl.load(x_scale + row, mask=row < n_rows, other=0.0)
    found = tl.zeros([ROWS], tl.int32)
    for step in range(0, width, WORDS * 32):
        column = step + tl.arange(0, WORDS * 32)
        inside = (row < n_rows)[:, None] & ((column < width) & (first + column < n))[None, :]
        place = row.to(tl.int64)[:, None] * panel_stride + column[None, :]
        score = tl.load(panel + place, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            by_column = tl.load(weight_scale + first + column, mask=first + column < n, other=0.0)
            score *= by_row[:, None] * by_column[None, :]
        if HAS_BIAS:
            score += tl.load(bias + first + column, mask=first + column < n, other=0.0).to(tl.float32)[None, :]
        if PER_LATENT:
            least = tl.load(threshold + first + column, mask=first + column < n, other=0.0).to(tl.float32)[None, :]
        else:
            least = tl.load(threshold).to(tl.float32)
        possible = inside & (score + relative * tl.abs(score) + margin[:, None] >= least)
        found += tl.sum(possible.to(tl.int32), axis=1)
        bits = possible.to(tl.int32) << (column % 32)[None, :]
        packed = tl.sum(tl.reshape(bits, [ROWS, WORDS, 32]), axis=2)
        word = (first + step) // 32 + tl.arange(0, WORDS)
        out = marks + row.to(tl.int64)[:, None] * words + word[None, :]
        tl.store(out, packed, mask=(row < n_rows)[:, None] & (word < words)[None, :])
    tl.atomic_add(counts + row, found, mask=row < n_rows)


@triton.jit(do_not_specialize=["words"])
def _list(marks, crow, col, words, WORDS: tl.constexpr):
    """The marked latents of one token, in order."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(crow + row)
    bit = tl.arange(0, WORDS * 32)
    for step in range(0, words, WORDS):
        word = step + bit // 32
        packed = tl.load(marks + row * words + word, mask=word < words, other=0)
        on = ((packed >> (bit % 32)) & 1) != 0
        rank = tl.cumsum(on.to(tl.int32), axis=0)
        tl.store(col + place + rank - 1, step * 32 + bit, mask=on)
        place += tl.sum(on.to(tl.int32), axis=0).to(tl.int64)


def threshold_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.threshold_encode`."""
    x = x.contiguous()
    plan = _plan(x, weight, 1, screen)
    if plan is None:
        return reference.threshold_encode(x, weight, bias, threshold, "none")
    screened = topk.screen_operands(x, weight, bias, plan, topk.current_copy(weight))
    crow, col, score = _above(x, weight, bias, threshold, screened)
    return _keep(crow, col, score.to(x.dtype), score > (threshold if threshold.dim() == 0 else threshold[col]))


def batch_topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: int, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.batch_topk_encode`.

    Two passes of the screen: the count-th largest of the keys, which are some of the scores, is at most that of all
    scores, and less the errors a threshold for the second.
    """
    x, rows = x.contiguous(), x.shape[0]
    plan = _plan(x, weight, -(-count // rows), screen)
    if plan is None:
        return reference.batch_topk_encode(x, weight, bias, count, "none")
    screened = topk.screen_operands(x, weight, bias, plan, topk.current_copy(weight))
    best = None
    for part in topk.chunks(rows, 4 * plan.n_buckets * plan.keep):
        keys = topk.lowest_scores(topk.screen_keys(screened, part, bias, plan), plan)
        score = keys - 2 * screened.slack[part, None, None] - 2 * screened.relative * keys.abs()
        score = score.flatten() if best is None else torch.cat([best, score.flatten()])
        best = score.topk(min(count, score.numel()), sorted=False).values
    assert best is not None  # there is a row
    crow, col, score = _above(x, weight, bias, best.amin(), screened)
    # Entries are in order of row and latent, which a stable sort keeps among ties.
    order = score.sort(descending=True, stable=True).indices[:count]
    kept = torch.zeros(score.shape[0], dtype=torch.bool, device=x.device)
    kept[order] = True
    return _keep(crow, col, score.relu().to(x.dtype), kept)


def _plan(x: Tensor, weight: Tensor, k: int, screen: str) -> EncodePlan | None:
    """The plan for panels of scores."""
    copy = topk.current_copy(weight)
    shape = (x.shape[0], weight.shape[1], weight.shape[0], k)
    return encode_plan(*shape, x.dtype, screen, topk.capability(x), has_copy=copy is not None, path="chunked")


def mark(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, screened: topk.Screened, part: slice
) -> tuple[Tensor, Tensor]:
    """Bits ``[rows, N / 32]`` of what could be above the threshold in the rows `part`, and their number in each row."""
    operand, weights, n = screened.x.rows[part], screened.weight.rows, weight.shape[0]
    rows, words = operand.shape[0], triton.cdiv(n, 32)
    marks = torch.empty(rows, words, dtype=torch.int32, device=x.device)
    counts = torch.zeros(rows, dtype=torch.int32, device=x.device)
    width = max(256, screening.PANEL_BYTES // (rows * operand.element_size()) // 256 * 256)
    for first in range(0, n, width):
        panel = topk.panel_scores(operand, weights[first : first + width])
        launch(
            _mark,
            (triton.cdiv(rows, 4),),
            panel,
            panel.stride(0),
            *screened.scales(part),
            bias,
            threshold,
            screened.slack[part],
            marks,
            counts,
            rows,
            n,
            first,
            panel.shape[1],
            words,
            screened.relative,
            HAS_BIAS=bias is not None,
            SCALED=screened.weight.scale is not None,
            PER_LATENT=threshold.dim() == 1,
            ROWS=4,
            WORDS=8,
        )
    return marks, counts


def entries(marks: Tensor, crow: Tensor, col: Tensor) -> None:
    """Write the marked latents of every row to `col`, in order."""
    launch(_list, (marks.shape[0],), marks, crow, col, marks.shape[1], WORDS=32)


def _above(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, screened: topk.Screened
) -> tuple[Tensor, Tensor, Tensor]:
    """All entries that could be above the threshold, with their exact scores: ``crow``, ``col``, scores."""
    found = []
    for part in topk.chunks(x.shape[0], weight.shape[0] // 8 + 4):
        marks, counts = mark(x, weight, bias, threshold, screened, part)
        crow = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=x.device)
        torch.cumsum(counts, 0, out=crow[1:])
        col = torch.empty(int(crow[-1]), dtype=torch.int32, device=x.device)
        entries(marks, crow, col)
        score = csr_gather_dot(x[part].float(), crow, col, weight)
        found.append((crow, col, score if bias is None else score + bias[col].float()))
    starts = torch.tensor([0, *(len(col) for _, col, _ in found[:-1])], device=x.device).cumsum(0)
    crows = [found[0][0][:1], *(crow[1:] + start for (crow, _, _), start in zip(found, starts, strict=True))]
    return torch.cat(crows), torch.cat([col for _, col, _ in found]), torch.cat([score for _, _, score in found])


def _keep(crow: Tensor, col: Tensor, values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries that are `kept`, in CSR form."""
    before = torch.zeros(col.shape[0] + 1, dtype=torch.int64, device=col.device)
    torch.cumsum(kept, 0, out=before[1:])
    return before[crow], col[kept], values[kept]

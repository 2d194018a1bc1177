"""C++ kernels for the CPU (csrc/cpu), float32 and float64.

The kernels take addresses and strides; this module makes the arguments contiguous where they must be, allocates the
results and passes torch's thread count on.
"""

from __future__ import annotations

import importlib
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.backends import reference
from sparsekern.codes import entry_rows
from sparsekern.factors import OuterProducts

_native: Any
try:
    _native = importlib.import_module("sparsekern._native")
except ImportError as error:  # no compiler at install time, or a binary that this system cannot load
    if "SPARSEKERN_CPU_ISA" in os.environ:
        raise  # who asks for an instruction set does not want another one, or none
    _native, _not_built = None, f"not built ({error})"

_DTYPES = (torch.float32, torch.float64)
_WHOLE_NUMBERS = ("group_slots", "bit_distances", "bit_neighbors", "cooccurrence")  # no dtype to choose by


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


def unavailable(op: str, device: torch.device, dtype: torch.dtype, screen: str) -> str | None:
    """Why this backend cannot serve such a call; None when it can."""
    if device.type != "cpu":
        return f"serves cpu tensors, not {device.type}"
    if op not in globals():
        return f"has no {op} kernel"
    if _native is None:
        return _not_built
    if op in ("topk_encode", "routed_topk_encode", "batch_topk_encode", "threshold_encode"):
        if screen not in ("auto", "none", "int8"):
            return f"has no {screen} screening; use screen='auto', 'int8' or 'none'"
        if dtype != torch.float32:
            return f"serves float32, not {dtype}"
    elif dtype not in _DTYPES and op not in _WHOLE_NUMBERS:
        return f"serves float32 and float64, not {dtype}"
    return None


def isa() -> str | None:
    """The instruction set that the kernels use, or None when they are not built."""
    return None if _native is None else _native.isa()


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with unit stride along its last axis; rows may be any distance apart."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


# Screening


class Quantized:
    """The int8 copy of an encoder's weight that :func:`topk_encode` screens with.

    It is valid as long as nobody but its keeper changes the weight. Changes by torch are seen by the tensor's version;
    those through ``weight.data``, which has none, by the first column, unless they leave that as it is.
    """

    def __init__(self, weight: Tensor) -> None:
        n, d = weight.shape
        padded = _native.padded_latents(n)
        self.packed = torch.empty(padded * _native.padded_width(d), dtype=torch.uint8)
        self.scale, self.error, self.norm = (torch.zeros(padded) for _ in range(3))
        self.address = weight.data_ptr()
        _native.quantize(weight.data_ptr(), weight.stride(0), n, d, self.addresses(), torch.get_num_threads())
        self.mark_current(weight)

    def addresses(self) -> list[int]:
        """Of the arrays, as the kernels take them."""
        return [tensor.data_ptr() for tensor in (self.packed, self.scale, self.error, self.norm)]

    def mark_current(self, weight: Tensor) -> None:
        """Say that the copy is that of `weight` as it now is."""
        self._version, self._column = weight._version, weight.detach()[:, 0].clone()

    def is_current(self, weight: Tensor) -> bool:
        """Whether the copy is still that of `weight`."""
        return (
            weight.data_ptr() == self.address
            and weight.shape[0] == self._column.shape[0]
            and weight._version == self._version
            and torch.equal(weight.detach()[:, 0], self._column)
        )


_quantized: weakref.WeakValueDictionary[int, Quantized] = weakref.WeakValueDictionary()
"""By address of the weight. The optimizer that refreshes a copy owns it."""


def quantized(weight: Tensor, screen: str = "auto") -> Quantized:
    """A quantised copy of `weight` for the caller to own, which :func:`topk_encode` uses while it is current.

    It is in int8, whatever the `screen`: there is no other here.
    """
    copy = _quantized[weight.data_ptr()] = Quantized(weight)
    return copy


class EncodeStats(NamedTuple):
    """What one call of :func:`topk_encode` did.

    Attributes
    ----------
    rows : int
        Rows encoded.
    rescored : int
        Latents, over all rows, whose scores were computed again in float32.
    repaired : int
        Rows that were computed in full, for want of a certificate.
    """

    rows: int
    rescored: int
    repaired: int


last_encode: EncodeStats | None = None
"""Of the last screened call in this process."""


_WIDEST = 65536  # the widest input whose int8 products add up in 32 bits


def screens(n: int, d: int) -> bool:
    """Whether a screening pass over ``[n, d]`` weights is ever faster here than the matmul of the reference."""
    return isa() not in (None, "generic") and n >= 1024 and 32 <= d <= _WIDEST


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, screen: str, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.topk_encode`."""
    copy = _current_copy(weight)
    # A k that makes most latents candidates is not worth it.
    if not _screened(x, weight, copy, screen, k <= weight.shape[0] // 16):
        return reference.topk_encode(x, weight, bias, k, "none", absolute)
    values, indices, repair = _encode(x, weight, bias, k, copy, x.shape[0], (0, 1, 0, 0, False, True), absolute)
    if repair.numel():
        values[repair], indices[repair] = reference.topk_encode(x[repair], weight, bias, k, "none", absolute)
    return values, indices


def _screened(x: Tensor, weight: Tensor, copy: Quantized | None, screen: str, worth: bool = True) -> bool:
    """Whether an encoder is to screen, which its arguments may make `worth` it or not."""
    n, d = weight.shape
    # A few rows are not worth a pass that quantises all weights.
    worth = worth and screens(n, d) and (x.shape[0] >= 8 or copy is not None)
    return d <= _WIDEST and (screen == "int8" or (screen == "auto" and worth))


def _current_copy(weight: Tensor) -> Quantized | None:
    copy = _quantized.get(weight.data_ptr())
    return copy if copy is not None and copy.is_current(weight) else None


def _encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    copy: Quantized | None,
    out_rows: int,
    routed: tuple[int, int, int, int, bool, bool],
    absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices ``[out_rows, k]``, and which of these rows have to be computed otherwise."""
    global last_encode
    values = x.new_empty(out_rows, k)
    indices = torch.empty(out_rows, k, dtype=torch.int32)
    certain = torch.empty(out_rows, dtype=torch.bool)
    inputs, _alive = _encoder_input(x, weight, bias, copy)
    rescored = _native.topk_encode(
        inputs, routed, k, absolute, values.data_ptr(), indices.data_ptr(), certain.data_ptr()
    )
    repair = (~certain).nonzero().squeeze(1)
    last_encode = EncodeStats(out_rows, rescored, repair.numel())
    return values, indices, repair


def _encoder_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, copy: Quantized | None
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """What every encoder kernel takes, and the tensors that must live as long."""
    x, weight, bias = _rows(x), _rows(weight), None if bias is None else bias.contiguous()
    inputs = (
        weight.data_ptr(),
        weight.stride(0),
        *weight.shape,
        [0, 0, 0, 0] if copy is None else copy.addresses(),
        0 if bias is None else bias.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        torch.get_num_threads(),
    )
    return inputs, [x, weight, bias]


# Codes of any number of latents a token. Rows that screening cannot answer for are added in full, a block at a time.


def threshold_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.threshold_encode`."""
    global last_encode
    copy = _current_copy(weight)
    if not _screened(x, weight, copy, screen):
        return reference.threshold_encode(x, weight, bias, threshold, "none")
    (rows, n), threads = (x.shape[0], weight.shape[0]), torch.get_num_threads()
    threshold = threshold.expand(n).contiguous()
    certain = torch.empty(rows, dtype=torch.bool)
    found = _native.ThresholdEntries(rows)
    inputs, _alive = _encoder_input(x, weight, bias, copy)
    rescored = _native.threshold_encode(inputs, threshold.data_ptr(), found, certain.data_ptr())
    repair = (~certain).nonzero().squeeze(1)
    for some, scores in _scores(x, weight, bias, repair):
        found.add_rows(some.data_ptr(), some.numel(), scores.data_ptr(), n, threshold.data_ptr(), threads)
    last_encode = EncodeStats(rows, rescored, repair.numel())
    nnz = len(found)
    crow, col, values = torch.empty(rows + 1, dtype=torch.int64), torch.empty(nnz, dtype=torch.int32), x.new_empty(nnz)
    found.copy(crow.data_ptr(), col.data_ptr(), values.data_ptr(), threads)
    return crow, col, values


def batch_topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: int, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.batch_topk_encode`."""
    global last_encode
    copy = _current_copy(weight)
    rows = x.shape[0]
    if not _screened(x, weight, copy, screen, count <= rows * (weight.shape[0] // 16)):
        return reference.batch_topk_encode(x, weight, bias, count, "none")
    certain = torch.empty(rows, dtype=torch.bool)
    inputs, _alive = _encoder_input(x, weight, bias, copy)
    found = _native.BatchLargest(inputs, count)
    rescored = _native.batch_topk_encode(inputs, found, certain.data_ptr())
    repair = (~certain).nonzero().squeeze(1)
    last_encode = EncodeStats(rows, rescored, repair.numel())
    for some, scores in _scores(x, weight, bias, repair):
        if not found.add_rows(some.data_ptr(), some.numel(), scores.data_ptr()):  # there is no order among them
            return reference.batch_topk_encode(x, weight, bias, count, "none")
    crow, col = torch.empty(rows + 1, dtype=torch.int64), torch.empty(count, dtype=torch.int32)
    values = x.new_empty(count)
    found.copy(crow.data_ptr(), col.data_ptr(), values.data_ptr())
    return crow, col, values


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """These rows, some at a time, with all of their scores: as many as the reference makes at one time."""
    for some in rows.split(max(1, reference.WORKSPACE_BYTES // (4 * weight.shape[0]))):
        scores = x[some] @ weight.T
        yield some, scores if bias is None else scores.add_(bias)


# Routing


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, n_active: int, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.route`."""
    logits = x @ weight.T
    gates = logits.softmax(1) if gate == "softmax" else logits.sigmoid()
    scores = logits if bias is None else gates + bias.to(gates.dtype)
    experts = torch.empty(x.shape[0], n_active, dtype=torch.int32)
    _native.largest(
        scores.element_size(), scores.data_ptr(), *scores.shape, n_active, experts.data_ptr(), torch.get_num_threads()
    )
    return logits, gates.gather(1, experts.long()), experts, *group_slots(experts, weight.shape[0])


def group_slots(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.group_slots`."""
    offsets, order = _sort_slots(experts.contiguous(), n_experts)
    return order, offsets


_DIRECT_UP_TO = 128
"""Latents of an expert up to which float32 scores cost less than screening."""


def routed_topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    order: Tensor,
    offsets: Tensor,
    k: int,
    per_expert: bool,
    screen: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.routed_topk_encode`."""
    (rows, active), (n, d), count = experts.shape, weight.shape, offsets.shape[0] - 1
    copy = _current_copy(weight)
    share = n // count
    screened = (
        d <= _WIDEST
        and screen != "none"
        and (
            screen == "int8"
            or (
                isa() != "generic"
                and share > max(_DIRECT_UP_TO, 4 * k)
                and d >= 32
                and (copy is not None or rows * active >= 8 * count)
            )
        )
    )
    order, offsets = order.contiguous(), offsets.contiguous()
    out_rows = rows * active if per_expert else rows
    routed = (count, active, order.data_ptr(), offsets.data_ptr(), per_expert, screened)
    values, indices, repair = _encode(x, weight, bias, k, copy if screened else None, out_rows, routed)
    values, indices = values.view(rows, -1), indices.view(rows, -1)
    if repair.numel():
        again = (repair // active).unique() if per_expert else repair
        chosen = experts[again]
        slots = group_slots(chosen, count)
        values[again], indices[again] = reference.routed_topk_encode(
            x[again], weight, bias, chosen, *slots, k, per_expert, "none"
        )
    return values, indices


# Sparse products


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`sparsekern.backends.reference.sparse_decode`."""
    return _decode(values, indices.contiguous(), None, weight, bias)


def csr_decode(values: Tensor, crow: Tensor, col: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`sparsekern.backends.reference.csr_decode`."""
    return _decode(values, col.contiguous(), crow.contiguous(), weight, bias)


def _decode(values: Tensor, indices: Tensor, crow: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    values, weight = values.contiguous(), _rows(weight)
    bias = None if bias is None else bias.contiguous()
    entries = _entries(indices, crow)
    out = values.new_empty(entries[1], weight.shape[1])
    _native.sparse_decode(
        values.element_size(),
        entries,
        values.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *weight.shape,
        torch.get_num_threads(),
    )
    return out


def gather_dot(grad: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """See :func:`sparsekern.backends.reference.gather_dot`."""
    return _gather_dot(grad, indices.contiguous(), None, weight)


def csr_gather_dot(grad: Tensor, crow: Tensor, col: Tensor, weight: Tensor) -> Tensor:
    """See :func:`sparsekern.backends.reference.csr_gather_dot`."""
    return _gather_dot(grad, col.contiguous(), crow.contiguous(), weight)


def _gather_dot(grad: Tensor, indices: Tensor, crow: Tensor | None, weight: Tensor) -> Tensor:
    grad, weight = _rows(grad), _rows(weight)
    out = grad.new_empty(indices.shape)
    _native.gather_dot(
        grad.element_size(),
        _entries(indices, crow),
        weight.data_ptr(),
        weight.stride(0),
        grad.data_ptr(),
        grad.stride(0),
        out.data_ptr(),
        *weight.shape,
        torch.get_num_threads(),
    )
    return out


def scatter_outer(values: Tensor, indices: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    """See :func:`sparsekern.backends.reference.scatter_outer`."""
    return _scatter_outer(values, indices.contiguous(), None, grad, d_sae)


def csr_scatter_outer(values: Tensor, crow: Tensor, col: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    """See :func:`sparsekern.backends.reference.csr_scatter_outer`."""
    return _scatter_outer(values, col.contiguous(), crow.contiguous(), grad, d_sae)


def _scatter_outer(values: Tensor, indices: Tensor, crow: Tensor | None, grad: Tensor, d_sae: int) -> Tensor:
    values, grad = values.contiguous(), _rows(grad)
    out = grad.new_empty(d_sae, grad.shape[1])
    _native.scatter_outer(
        values.element_size(),
        _entries(indices, crow),
        values.data_ptr(),
        grad.data_ptr(),
        grad.stride(0),
        out.data_ptr(),
        d_sae,
        grad.shape[1],
        torch.get_num_threads(),
    )
    return out


def _entries(indices: Tensor, crow: Tensor | None) -> tuple[int, int, int, int]:
    """Slots of a fixed number a row, or entries of rows that begin at `crow`, as the kernels take them."""
    if crow is None:
        return indices.data_ptr(), *indices.shape, 0
    return indices.data_ptr(), crow.shape[0] - 1, 0, crow.data_ptr()


def weighted_row_sum(coefficients: Tensor, weight: Tensor) -> Tensor:
    """See :func:`sparsekern.backends.reference.weighted_row_sum`; reads only the rows whose coefficient is not zero."""
    found = coefficients.nonzero().squeeze(1)
    if not found.numel():
        return weight.new_zeros(weight.shape[1])
    # Sixteen partial sums, for the threads to share and the order of summation not to depend on how many they are.
    parts = 16
    rows = torch.nn.functional.pad(found, (0, -found.numel() % parts))
    values = coefficients[rows]
    values[found.numel() :] = 0
    return sparse_decode(values.view(parts, -1), rows.int().view(parts, -1), weight, None).sum(0)


# Bits and pairs


def bit_distances(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """See :func:`sparsekern.backends.reference.bit_distances`."""
    dtype = torch.int32 if metric == "hamming" else torch.float32
    out = torch.empty(a.shape[0], b.shape[0], dtype=dtype)
    a, b = _whole_words(a), _whole_words(b)
    _native.bit_distances(_bits(a), _bits(b), metric == "jaccard", out.data_ptr(), torch.get_num_threads())
    return out


def bit_neighbors(a: Tensor, b: Tensor, k: int, metric: str, itself: bool) -> tuple[Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.bit_neighbors`."""
    distances = torch.empty(a.shape[0], k, dtype=torch.int32 if metric == "hamming" else torch.float32)
    indices = torch.empty(a.shape[0], k, dtype=torch.int32)
    a, b = _whole_words(a), _whole_words(b)
    _native.bit_neighbors(
        *(_bits(a), _bits(b), k, metric == "jaccard", itself),
        *(distances.data_ptr(), indices.data_ptr(), torch.get_num_threads()),
    )
    return distances, indices


def _whole_words(rows: Tensor) -> Tensor:
    """Rows one after the other, of a multiple of four bytes."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)).contiguous()


def _bits(rows: Tensor) -> tuple[int, int, int]:
    """Rows of bits as the kernels take them."""
    return rows.data_ptr(), rows.shape[0], rows.shape[1] // 4


def cooccurrence(crow: Tensor, col: Tensor, d_sae: int, at_least: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsekern.backends.reference.cooccurrence`."""
    crow, col, threads = crow.contiguous(), col.contiguous(), torch.get_num_threads()
    found = _native.Cooccurrences(_entries(col, crow), d_sae, at_least, threads)
    out = crow.new_empty(d_sae + 1), col.new_empty(len(found)), col.new_empty(len(found))
    found.copy(*(tensor.data_ptr() for tensor in out), threads)
    return out


# Adam over gradients kept as factors


def updates(weight: Tensor) -> bool:
    """Whether :func:`row_adam` serves this weight."""
    return (
        _native is not None and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    )


class SortedFactors:
    """Outer products sorted by latent, as the kernels take them."""

    def __init__(self, parts: Sequence[OuterProducts], d_sae: int) -> None:
        self._outer_products = parts
        self._alive: list[Tensor] = []
        self._d_sae = d_sae
        self.parts: list[tuple[int, int, int, int, int, int, int]] = []
        sorted_before: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for part in parts:
            values, indices, vectors = part.values.contiguous(), part.indices.contiguous(), _rows(part.vectors)
            key = indices.data_ptr(), indices.numel()
            if key not in sorted_before:
                sorted_before[key] = _sort_slots(indices, d_sae)
            start, order = sorted_before[key]
            self._alive += [values, indices, vectors, start, order]
            rows = None if part.crow is None else entry_rows(part.crow, indices).int()
            if rows is not None:
                self._alive.append(rows)
            self.parts.append(
                (
                    start.data_ptr(),
                    order.data_ptr(),
                    values.data_ptr(),
                    values.shape[1] if rows is None else 0,
                    vectors.data_ptr(),
                    vectors.stride(0),
                    0 if rows is None else rows.data_ptr(),
                )
            )

    def square_bound(self) -> Tensor:
        """An upper bound on the sum of squares of the gradient, by the triangle inequality: next to no work."""
        lengths = torch.zeros(self._d_sae)
        for values, indices, vectors, crow in self._outer_products:
            norms = vectors.norm(dim=1)
            slots = values.abs() * (norms[:, None] if crow is None else norms[entry_rows(crow, indices)])
            lengths.index_add_(0, indices.flatten(), slots.flatten())
        return 1.001 * lengths.square().sum(dtype=torch.float64)


def _sort_slots(indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    start = torch.empty(d_sae + 1, dtype=torch.int32)
    order = torch.empty(indices.numel(), dtype=torch.int32)
    _native.sort_slots(indices.data_ptr(), indices.numel(), d_sae, start.data_ptr(), order.data_ptr())
    return start, order


def clip_factor(factors: Sequence[tuple[SortedFactors, Tensor, bool]], rest: Tensor, clip_norm: float) -> float:
    """What to multiply all gradients by so that their norm is at most `clip_norm`.

    Parameters
    ----------
    factors : sequence of (SortedFactors, Tensor, bool)
        Gradients, their weights, and whether these have unit rows.
    rest : Tensor []
        Sum of squares of the other gradients.
    clip_norm : float
        Infinite for none.
    """
    # The norm takes a pass over the factors of its own, unless it is plain that clipping will not bite: then it comes
    # with the update.
    if rest + sum(found.square_bound() for found, _, _ in factors) <= clip_norm**2:
        return 1.0
    squares = [gradient_squares(*each) for each in factors]
    norm = torch.stack([rest, *squares]).sum().sqrt()
    return min(1.0, clip_norm / (norm.item() + 1e-6))  # as torch.nn.utils.clip_grad_norm_ has it


def gradient_squares(factors: SortedFactors, weight: Tensor, unit_rows: bool) -> Tensor:
    """Sum of squares of the gradient, without its components along the rows where these are `unit_rows`."""
    squares = torch.empty(weight.shape[0])
    _native.gradient_squares(
        factors.parts, *weight.shape, weight.data_ptr(), unit_rows, squares.data_ptr(), torch.get_num_threads()
    )
    return squares.sum(dtype=torch.float64)


def row_adam(
    factors: SortedFactors,
    weight: Tensor,
    unit_rows: bool,
    state: dict[str, Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    clip: float,
    copy: Quantized | None,
    finite: Tensor | None = None,
    rest_after: int | None = None,
) -> Tensor:
    """One step of Adam on `weight` in one pass over memory; `state` is that of ``torch.optim.Adam``.

    Where `finite` ``[]`` is false nothing changes. Returns the sum of squares of the gradient before clipping, as
    :func:`gradient_squares` would have.
    """
    if finite is not None and not finite:
        return torch.zeros((), dtype=torch.float64)
    squares = torch.empty(weight.shape[0])
    state["step"] += 1
    step = int(state["step"])
    rests = rest_after is not None
    if rests and "last" not in state:
        state["last"] = torch.full((weight.shape[0],), step - 1, dtype=torch.int32)
        state["active"] = torch.full((weight.shape[0],), step - 1, dtype=torch.int32)
    _native.row_adam(
        factors.parts,
        *weight.shape,
        weight.data_ptr(),
        unit_rows,
        state["exp_avg"].data_ptr(),
        state["exp_avg_sq"].data_ptr(),
        clip,
        lr / (1 - betas[0] ** step),
        *betas,
        eps,
        math.sqrt(1 - betas[1] ** step),
        state["last"].data_ptr() if rests else 0,
        state["active"].data_ptr() if rests else 0,
        step,
        rest_after or 0,
        [0, 0, 0, 0] if copy is None else copy.addresses(),
        squares.data_ptr(),
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(weight)
    if copy is not None:
        copy.mark_current(weight)
    return squares.sum(dtype=torch.float64)

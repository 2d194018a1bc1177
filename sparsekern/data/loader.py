"""A shuffled, resumable stream of batches over activations that need not fit in memory.

Three steps, each a pure function of its arguments, so that any batch can be had at any time:

1. In epoch ``e`` the contexts are permuted by ``(seed, e)``. All epochs one after the other are the *virtual rows*.
2. Buffer ``i`` is the virtual rows ``i·R … (i + 1)·R``, shuffled by ``(seed, i)``.
3. Batch ``t`` is the ``t``-th run of ``batch_size`` rows through the buffers.

Contexts are read whole, which keeps the reads long; the buffers mix their rows. An epoch visits every row exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekern.data.store import ActivationStore, ActivationView, first_nonfinite_row, seeded_permutation

__all__ = ["ActivationLoader"]

_TENSOR_CONTEXT = 256  # rows of a plain tensor that count as one context
_EPOCH_STREAM, _BUFFER_STREAM = 0, 1  # keep the two kinds of permutation apart


class ActivationLoader:
    """Infinite, deterministic, shuffled stream of ``[batch_size, d]`` float32 batches.

    Parameters
    ----------
    data
        An :class:`ActivationStore`, an :class:`ActivationView`, or a floating-point tensor ``[n, d]``, of which each
        256 rows count as one context.
    batch_size
        Rows of a batch; at most the rows of the data.
    seed
        Non-negative. Determines the order, together with the data, ``batch_size`` and ``buffer_tokens``.
    buffer_tokens
        Rows that are shuffled together, rounded to a multiple of ``batch_size`` and to no more than one epoch needs.
        Two such buffers are held while iterating: one is used and the next is read in the background.
    device
        Where the batches are put; the CPU by default.

    Attributes
    ----------
    position : int
        Number of the batch that iteration gives next.
    tokens : int
        Rows in an epoch.
    d : int
        Width of the activations.

    Raises
    ------
    ValueError
        If the tensor is not floating-point ``[n, d]``, empty or not finite; if ``batch_size``, ``buffer_tokens`` or
        ``seed`` is out of range.

    Examples
    --------
    >>> loader = ActivationLoader(torch.randn(1000, 16), batch_size=100)
    >>> next(iter(loader)).shape
    torch.Size([100, 16])
    """

    def __init__(
        self,
        data: ActivationStore | ActivationView | Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        buffer_tokens: int = 131072,
        device: torch.device | str | None = None,
    ) -> None:
        self._read, self._starts, self._lengths, self.d, digest = _contexts_of(data)
        self.tokens = int(self._lengths.sum())
        if not 1 <= batch_size <= self.tokens:
            raise ValueError(f"batch_size must be in 1 … {self.tokens}, the rows of the data, not {batch_size}")
        if buffer_tokens < 1:
            raise ValueError(f"buffer_tokens must be at least 1, not {buffer_tokens}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, not {seed}")
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device or "cpu")
        self.position = 0
        self._batches_per_buffer = max(1, min(round(buffer_tokens / batch_size), -(-self.tokens // batch_size)))
        self._fingerprint = {
            "seed": seed,
            "batch_size": batch_size,
            "buffer_rows": self._batches_per_buffer * batch_size,
            "rows": self.tokens,
            "d": self.d,
            "data": digest,
        }
        # Every buffer is filled on this one thread, also those that are waited for.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sparsekern-loader")
        self._buffers: dict[int, Future[Tensor]] = {}

    def batch(self, t: int) -> Tensor:
        """Return batch number ``t``, float32 ``[batch_size, d]``, whatever was read before."""
        if t < 0:
            raise ValueError(f"t must not be negative, not {t}")
        index, within = divmod(t, self._batches_per_buffer)
        for stale in set(self._buffers) - {index, index + 1}:
            del self._buffers[stale]
        rows = self._buffer(index).result()[within * self.batch_size : (within + 1) * self.batch_size]
        return rows.to(self.device, copy=True)  # the caller's own, also on the CPU

    def __iter__(self) -> Iterator[Tensor]:
        """Give the batches from :attr:`position` on, without end."""
        while True:
            batch = self.batch(self.position)
            self._buffer(self.position // self._batches_per_buffer + 1)  # read ahead
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and a fingerprint of the settings and the data that give it its meaning."""
        return {"position": self.position, "fingerprint": dict(self._fingerprint)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises
        ------
        ValueError
            If the settings or the data differ from those of then; the message says which.
        """
        then = state["fingerprint"]
        differing = [
            f"{key} was {then.get(key)!r} and is {value!r}"
            for key, value in self._fingerprint.items()
            if then.get(key) != value
        ]
        if differing:
            raise ValueError(f"cannot resume, the batches would be others: {'; '.join(differing)}")
        self.position = int(state["position"])

    def _buffer(self, index: int) -> Future[Tensor]:
        if index not in self._buffers:
            self._buffers[index] = self._worker.submit(self._fill, index)
        return self._buffers[index]

    def _fill(self, index: int) -> Tensor:
        size = self._batches_per_buffer * self.batch_size
        buffer = np.empty((size, self.d), dtype=np.float32)  # NumPy for the reason given in ActivationStore.rows
        slots = seeded_permutation(size, self.seed, _BUFFER_STREAM, index).numpy()
        done = 0
        while done < size:
            epoch, offset = divmod(index * size + done, self.tokens)
            for start, rows in self._epoch_pieces(epoch, offset, size - done):
                buffer[slots[done : done + rows]] = self._read(start, start + rows).numpy()
                done += rows
        return torch.from_numpy(buffer)

    def _epoch_pieces(self, epoch: int, offset: int, limit: int) -> Iterator[tuple[int, int]]:
        """Give (first row, rows) of the contexts that cover up to ``limit`` rows of an epoch from ``offset`` on."""
        order = seeded_permutation(self._lengths.numel(), self.seed, _EPOCH_STREAM, epoch)
        ends = self._lengths[order].cumsum(0)
        first = int(torch.searchsorted(ends, offset, right=True))
        last = int(torch.searchsorted(ends, offset + limit)) + 1
        for context, end in zip(order[first:last].tolist(), ends[first:last].tolist(), strict=True):
            begin = end - int(self._lengths[context])
            skipped = max(0, offset - begin)
            yield int(self._starts[context]) + skipped, min(end, offset + limit) - begin - skipped


def _contexts_of(
    data: ActivationStore | ActivationView | Tensor,
) -> tuple[Callable[[int, int], Tensor], Tensor, Tensor, int, str]:
    """Return what the loader needs of its data: a reader of rows, starts and lengths of the contexts, d, a digest."""
    if isinstance(data, Tensor):
        rows = _checked(data)
        starts = torch.arange(0, rows.shape[0], _TENSOR_CONTEXT)
        lengths = (rows.shape[0] - starts).clamp(max=_TENSOR_CONTEXT)
        sample = rows[:: max(1, rows.shape[0] // 1024)]  # enough to tell data sets apart, and fast for any size
        digest = hashlib.sha256(sample.contiguous().numpy().tobytes())
        return (lambda start, stop: rows[start:stop]), starts, lengths, rows.shape[1], digest.hexdigest()
    if isinstance(data, ActivationStore):
        data = ActivationView(data, torch.arange(data.n_contexts))
    if not isinstance(data, ActivationView):
        raise ValueError(f"data must be an ActivationStore, an ActivationView or a tensor, not {type(data).__name__}")
    if data.n_contexts == 0:
        raise ValueError("data has no contexts")
    digest = hashlib.sha256("".join(shard["sha256"] for shard in data.store.manifest["shards"]).encode())
    digest.update(data.contexts.numpy().tobytes())
    return data.store.rows, data.starts, data.lengths, data.d, digest.hexdigest()


def _checked(data: Tensor) -> Tensor:
    if data.ndim != 2 or not data.is_floating_point():
        raise ValueError(f"data must be a floating-point tensor [n, d], not {data.dtype} {list(data.shape)}")
    if data.numel() == 0:
        raise ValueError(f"data is empty: {list(data.shape)}")
    rows = data.detach().to("cpu", torch.float32)
    bad = first_nonfinite_row(rows)
    if bad is not None:
        raise ValueError(f"data is not finite in float32: first at row {bad}")
    return rows

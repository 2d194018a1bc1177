"""Training steps as CUDA graphs: recorded once for each shape, then replayed in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsekern.training.trainer import Trainer

WARM_UP = 3
"""Steps of a shape that run without a graph first: they compile and check kernels, which cannot be recorded."""


class _Recorded(NamedTuple):
    """A recorded step with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    target: Tensor | None
    lr: Tensor
    measures: dict[str, Tensor]


class StepGraphs:
    """The recorded steps of one trainer, by the shape of the batch and by the room for dead latents."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._recorded: dict[tuple[object, ...], _Recorded] = {}
        self._seen: dict[tuple[object, ...], int] = {}

    def step(self, x: Tensor, target: Tensor | None, room: int | None, lr: float) -> dict[str, Tensor]:
        """What :meth:`sparsekern.Trainer.device_step` does and returns."""
        key = (x.shape, x.dtype, None if target is None else target.dtype, room)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= WARM_UP:
            return self._trainer.device_step(x, target, room, lr)
        if key not in self._recorded:
            self._recorded[key] = self._record(x, target, room)
        recorded = self._recorded[key]
        recorded.x.copy_(x)
        if recorded.target is not None and target is not None:
            recorded.target.copy_(target)
        recorded.lr.fill_(lr)
        recorded.graph.replay()
        return {name: value.clone() for name, value in recorded.measures.items()}  # the next replay writes over them

    def _record(self, x: Tensor, target: Tensor | None, room: int | None) -> _Recorded:
        own_x, own_target = x.clone(), None if target is None else target.clone()
        lr = torch.zeros((), device=x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            measures = self._trainer.device_step(own_x, own_target, room, lr)
        return _Recorded(graph, own_x, own_target, lr, measures)

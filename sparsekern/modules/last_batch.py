"""Gradient checkpointing of a loss that counts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sparsekern.factors import identity


class LastBatch:
    """Tells a batch that gradient checkpointing computes again from the next one.

    Checkpointing calls a function a second time, in the middle of the backward pass. By then :meth:`SAE.loss` has
    counted the batch: the second call would count it twice, and see other dead latents and a warmer penalty than the
    first. So it is refused. A batch of its own that is trained on in a backward hook is none of this.
    """

    def __init__(self) -> None:
        self._storage: StorageWeakRef | None = None  # tells whether another tensor may have the memory by now
        self._place: tuple[object, ...] | None = None

    def __reduce__(self) -> tuple[type[LastBatch], tuple[()]]:
        return LastBatch, ()  # a copy of the module has not seen it

    def next(self, x: Tensor) -> None:
        """The batch `x` is about to be counted.

        Raises
        ------
        ValueError
            If it is the last one again, in a backward pass.
        """
        # By memory: checkpointing may come with another Python object for the same tensor.
        place = (*identity(x), x.shape)
        if (
            torch._C._current_graph_task_id() != -1  # in a backward pass
            and self._storage is not None
            and not self._storage.expired()
            and self._place == place
        ):
            raise ValueError(
                "loss must not be checkpointed in training mode: it has counted this batch, and reads what it counts. "
                "Checkpoint encode, decode or the module's forward instead"
            )
        self._storage, self._place = StorageWeakRef(x.untyped_storage()), place

"""Several stores of the same tokens as one, side by side: what transcoders and crosscoders are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.data.store import ActivationStore


class JoinedStore(ActivationStore):
    """The activations of several stores next to each other, for harvests of the same texts at several hooks.

    Parameters
    ----------
    stores : sequence of ActivationStore
        Of the same contexts and tokens. All but rows and widths is that of the first.

    Raises
    ------
    ValueError
        If their contexts or tokens differ.
    """

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        if not stores:
            raise ValueError("stores must hold at least one store")
        self.stores = tuple(stores)
        first = self.stores[0]
        for store in self.stores[1:]:
            same = torch.equal(store.context_bounds, first.context_bounds)
            if not same or not torch.equal(store.token_ids, first.token_ids):
                raise ValueError(
                    f"{store.path} is not of the same tokens as {first.path}: harvest the same texts with the same "
                    "model and context length, at another hook"
                )
        self.__dict__.update({name: value for name, value in first.__dict__.items() if name != "stores"})
        self.d = sum(store.d for store in self.stores)
        shards = [shard for store in self.stores for shard in store.manifest["shards"]]
        self.manifest = {**first.manifest, "d": self.d, "shards": shards}
        hooks = [str(store.source.get("hook", store.path)) for store in self.stores]
        self.source = {**first.source, "hook": ", ".join(hooks)}

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows ``start:stop`` as float32 ``[stop - start, d]``."""
        return torch.cat([store.rows(start, stop) for store in self.stores], 1)

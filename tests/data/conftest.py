from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsekern.data import ActivationStore, StoreWriter


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., ActivationStore]:
    """Make a store of random contexts; ``store.rows(0, store.tokens)`` is deterministic for the same arguments."""

    def make(
        contexts: int = 12,
        *,
        dtype: str = "float32",
        d: int = 3,
        per_shard: int = 5,
        vocab: list[str] | None = None,
        name: str = "store",
    ) -> ActivationStore:
        generator = torch.Generator().manual_seed(0)
        writer = StoreWriter(tmp_path / name, dtype=dtype, d=d, source={"kind": "test"}, vocab=vocab)
        for context in range(contexts):
            length = int(torch.randint(1, 9, (), generator=generator))
            activations = torch.randn(length, d, generator=generator)
            writer.add(activations, torch.arange(length) + context, [length])
            if (context + 1) % per_shard == 0:
                writer.flush(cursor=context + 1)
        writer.finish()
        return ActivationStore(tmp_path / name)

    return make

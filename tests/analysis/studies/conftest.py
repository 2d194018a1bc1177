"""A store that every study can run on in seconds."""

import pytest
import torch

from sparsekern.data import ActivationStore, StoreWriter


@pytest.fixture
def store(tmp_path):
    """Contexts of 24 tokens; token t is direction t plus noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(50, 16, generator=generator), dim=1)
    ids = torch.randint(0, 50, (2400,), generator=generator)
    x = directions[ids] + 0.05 * torch.randn(2400, 16, generator=generator)
    vocab = [f"word{i}" for i in range(50)]
    writer = StoreWriter(tmp_path / "acts", dtype="float32", d=16, source={"model": "made", "hook": "up"}, vocab=vocab)
    writer.add(x, ids.int(), [24] * 100)
    writer.finish()
    return ActivationStore(tmp_path / "acts")

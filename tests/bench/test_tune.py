"""Tuning: every candidate is timed, what cannot run is left out with its reason."""

import pytest
import torch

pytest.importorskip("triton")

from sparsekern.backends.cuda import encode as cuda_encode
from sparsekern.backends.triton import encode, plans
from sparsekern.bench import tune
from sparsekern.bench.timing import Clock

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="times in the interpreter")


@pytest.mark.usefixtures("triton_device")
def test_tiles_are_timed_beside_the_chunked_path(monkeypatch):
    monkeypatch.setattr(plans, "_buckets", lambda n, k: (16, 3, 64))
    good, bad = plans.Tile(16, 8, 2, 16, 4, 2), plans.Tile(16, 8, 3, 16, 4, 2)  # three is no power of two
    times, left_out = tune.measure(Clock(torch.device("cpu")), (8, 16, 100, 2), "tf32", [good, bad], 1.0)
    assert set(times) == {str(tuple(good)), "chunked", "matmul"}
    assert all(taken > 0 for taken in times.values())
    assert list(left_out) == [str(tuple(bad))]


def test_the_shipped_tiles_are_among_the_candidates_or_smaller():
    for tile in plans.TILES.values():
        assert tile in tune.CANDIDATES
    assert tune.OPERANDS["fp16"] == encode.SCREEN_DTYPE


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.usefixtures("triton_device")
def test_clusters_are_timed_beside_triton(monkeypatch):
    """Each with its number of blocks, which is what it was before at the end. The kernels are stand-ins here."""
    seen = []
    monkeypatch.setattr(cuda_encode, "CLUSTER", 2)
    monkeypatch.setattr(cuda_encode, "screen_operands", lambda x, *arguments: x)
    monkeypatch.setattr(encode, "screen_operands", lambda x, *arguments: x)
    monkeypatch.setattr(cuda_encode, "screen_keys", lambda *arguments: seen.append(cuda_encode.CLUSTER))
    monkeypatch.setattr(encode, "screen_keys", lambda *arguments: seen.append("triton"))
    times, left_out = tune.measure_clusters(Clock(torch.device("cpu")), (8, 64, 20_000, 2), "fp16", 1.0)
    assert list(times) == ["clusters of 1", "clusters of 2", "clusters of 4", "triton", "matmul"]
    assert seen[:4] == [1, 2, 4, "triton"]
    assert left_out == {}
    assert cuda_encode.CLUSTER == 2

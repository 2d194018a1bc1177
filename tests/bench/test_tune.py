"""Tuning: every candidate is timed, what cannot run is left out with its reason."""

import pytest
import torch

pytest.importorskip("triton")

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

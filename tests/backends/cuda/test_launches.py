"""What calls would launch, recorded without a device."""

import pytest
import torch

from sparsekern.backends import cuda
from sparsekern.backends.cuda import _library
from sparsekern.bench.cuda_resources import Launch, launch_problems, launch_table, launches
from sparsekern.bench.resources import CASES


def test_launches_of_the_benchmark_fit(emulated):
    """The tensors have no storage. The compiled module asks for the same."""
    found = [one for shape in CASES.values() for one in launches(emulated, shape)]
    assert launch_problems(found) == []
    names = {one.name for one in found}
    assert {
        "screen",
        "gather_rows",
        "select_candidates",
        "rescore",
        "rescore_by_latent",
        "repair",
        "take_best",
    } <= names
    assert {"cast_rows", "bucket_panel", "row_topk", "row_adam", "sum_piece", "bound_row", "place"} <= names
    assert all(one.cluster == 1 for one in found if one.name != "screen")
    (screen,) = [row for row in launch_table(found).splitlines() if "`screen`" in row]
    assert screen.startswith("| `screen` | 384 | ")
    assert emulated.record_launches(lambda: None) == []


def test_an_error_ends_the_recording(emulated):
    with pytest.raises(ZeroDivisionError):
        emulated.record_launches(lambda: 1 // 0)
    keys = torch.arange(64.0).view(2, 32)
    with _library.emulating(emulated):
        values, _ = cuda.row_topk(keys, 2)  # runs, where it would only be recorded
    assert values.tolist() == [[31, 30], [63, 62]]


def test_a_launch_that_wants_too_much_is_named():
    wide = Launch("screen", 1, 384, 200 * 1024, 2)
    assert launch_problems([wide]) == []
    (problem,) = launch_problems([wide._replace(name="take_best")] * 2)
    assert problem == "take_best wants 204800 bytes of shared memory of 166912"

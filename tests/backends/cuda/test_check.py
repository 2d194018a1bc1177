"""The check at first use, with the kernels in the emulator: right kernels pass, wrong ones do not."""

import pytest
import torch

from sparsekern.backends import check, cuda
from sparsekern.backends.cuda import _library, adam, encode, selection
from sparsekern.backends.triton import plans

CPU = torch.device("cpu")
CHECKS = [name for name in check.CASES if name.split()[0] in cuda._OPS]


@pytest.fixture(autouse=True)
def _emulating(emulated, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    monkeypatch.setattr(check, "WIDE", 640)
    monkeypatch.setattr(plans, "MOST_KEYS", 3 * 64)
    with _library.emulating(emulated):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("op", CHECKS)
def test_right_kernels_pass(op):
    assert op in check.names(cuda)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if dtype == torch.float32 or op not in check._FLOAT32_ONLY:
            result = check.run_one(cuda, op, dtype, CPU)
            assert result.passed, result
            assert result.error <= result.bound / 4


@pytest.mark.parametrize("op", ["topk_encode fp8", "row_topk", "row_adam"])
def test_wrong_kernels_do_not(op, monkeypatch):
    def one_place_off(right):
        def wrong(*arguments, **options):
            values, indices = right(*arguments, **options)
            indices[0, -1] = (indices[0, -1] + 1) % arguments[1 if right is topk_encode else 0].shape[0]
            return values, indices

        return wrong

    topk_encode, update = encode.topk_encode, adam.row_adam
    monkeypatch.setattr(encode, "topk_encode", one_place_off(topk_encode))
    monkeypatch.setattr(selection, "row_topk", one_place_off(selection.row_topk))
    monkeypatch.setattr(
        adam, "row_adam", lambda *arguments, **options: update(*arguments, **{**options, "lr": 1.001e-2})
    )
    case = torch.randn(5, 16), torch.randn(60, 16), torch.zeros(60), 4
    monkeypatch.setattr(check, "_encode_cases", lambda engine, dtype: [case])
    result = check.run_one(cuda, op, torch.float32, CPU)
    assert not result.passed
    assert result.note

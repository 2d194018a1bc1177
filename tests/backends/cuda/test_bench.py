"""The GPU run with the CUDA C++ kernels in it, rehearsed in the emulator: checks, timings, steps and tables."""

import json

import pytest
import torch

from sparsekern.backends.cuda import _library, encode
from sparsekern.bench import gpu, gpu_checks, gpu_table
from sparsekern.bench.options import Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _emulating(emulated):
    with _library.emulating(emulated):
        yield


@pytest.mark.slow
def test_the_rehearsal_has_both_backends_side_by_side(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "QUICK_SHAPES", {"x": (9, 16, 256, 4)})
    path = tmp_path / "r.json"
    contenders = ["--contenders", "sparsekern", "sparsekern-cuda"]
    code = gpu.main(["--device", "cpu", "--quick", *contenders, "--seed", "7", "--output", str(path)])
    record = json.loads(path.read_text())
    assert code == 0, [entry for entry in record["checks"]["entries"] if not entry["passed"]]
    checked = {(entry["check"], entry["dtype"]) for entry in record["checks"]["entries"]}
    for dtype in ("float32", "bfloat16"):
        for check in ("topk_encode, auto", "topk_encode, fp8", "topk_encode, absolute", "row_topk", "best of 4 groups"):
            assert (f"{check}, cuda", dtype) in checked
        assert ("sparse_decode", dtype) in checked
        assert ("sparse_decode, cuda", dtype) not in checked
    assert ("Trainer.step, topk, 3 times, cuda", "float32") in checked

    case = record["cases"][0]
    assert not case["failed"]
    assert not case["skipped"]
    by = {name: found["backend"] for name, found in case["kernels"].items()}
    assert by["torch.topk, bfloat16"] == by["matmul, bf16"] == "torch"
    for name in ("topk_encode", "topk_encode, bf16 weights", gpu_table.UPDATE, "routed_topk_encode, 1 of 8 experts"):
        assert by[f"{name}, cuda"] == "cuda"
        assert by[name] != "cuda"
    assert by["row_topk, bfloat16"] == by["row_topk, float32"] == "cuda"
    assert case["kernels"]["row_topk, float32"]["against"] == "torch.topk, float32"
    assert list(case["steps"]) == ["sparsekern", "sparsekern-cuda"]
    assert case["steps"]["sparsekern-cuda"]["over_sparsekern"]["median"] > 0

    text = gpu_table.markdown(record)
    assert "| topk_encode, cuda | cuda |" in text
    assert "- memcheck: left out, it looks into kernels on a GPU" in text


def test_a_wrong_cuda_kernel_fails_the_checks_of_the_run(monkeypatch):
    right = encode.topk_encode

    def wrong(*arguments, **options):
        values, indices = right(*arguments, **options)
        return values * 1.001, indices

    monkeypatch.setattr(encode, "topk_encode", wrong)
    entries = list(gpu_checks.of_case(Case("zipf", 9, 16, 256, 4), CPU, 3, steps=False))
    failed = {entry["check"] for entry in entries if not entry["passed"]}
    assert "topk_encode, auto, cuda" in failed
    assert all(check.startswith("topk_encode") and check.endswith("cuda") for check in failed)

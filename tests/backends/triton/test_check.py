"""The check at first use: right kernels pass, wrong ones are replaced by the reference, outcomes are remembered."""

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from sparsekern.backends import check, choose, cuda, reference, triton
from sparsekern.backends.triton import adam, encode, plans, products
from sparsekern.cli import app

CUDA = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch, tmp_path, triton_device):
    """A device that says it is CUDA's, whose kernels run where they can; and a cache of its own."""
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(check, "_fingerprint", lambda engine, index: "a card; driver 1; triton 1")
    monkeypatch.setattr(check, "_verdicts", {})
    run_one = check.run_one
    there = torch.device(triton_device)
    monkeypatch.setattr(check, "run_one", lambda engine, op, dtype, device: run_one(engine, op, dtype, there))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv("SPARSEKERN_BACKEND")
    return tmp_path / "checks.json"


def unavailable(op, dtype=torch.float32):
    return triton.unavailable(op, CUDA, dtype, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("op", [name for name in check.CASES if name.split()[0] in triton._MODULES])
def test_right_kernels_pass(monkeypatch, triton_device, op):
    if triton_device == "cpu":
        if op.endswith("bf16"):
            pytest.skip("products of bfloat16 tiles are garbage in the interpreter of Triton 3.9")
        if op.endswith("fp8"):
            pytest.skip("takes minutes in the interpreter; test_encode.py has smaller cases")
        monkeypatch.setattr(check, "WIDE", 640)
        monkeypatch.setattr(plans, "MOST_KEYS", 3 * 64)
    for dtype in (torch.float32, torch.float16):
        if dtype == torch.float32 or op not in check._FLOAT32_ONLY:
            result = check.run_one(triton, op, dtype, torch.device(triton_device))
            assert result.passed, result
            assert result.error <= result.bound / 4


def test_every_op_has_a_check():
    helpers = {"last_encode", "quantized", "SortedFactors", "clip_factor", "encode_plan", "routed_plan"}
    assert set(triton._MODULES) - helpers == {name.split()[0] for name in check.names(triton)}
    assert set(cuda._OPS) == {name.split()[0] for name in check.CASES if name.split()[0] in cuda._MODULES}


def test_outcomes_are_remembered(monkeypatch, a_gpu):
    assert unavailable("sparse_decode") is None
    assert json.loads(a_gpu.read_text()) == {"a card; driver 1; triton 1": {"sparse_decode torch.float32": True}}
    monkeypatch.setattr(check, "_verdicts", {})
    monkeypatch.setattr(check, "run_one", lambda *a: pytest.fail("it was checked again"))
    assert unavailable("sparse_decode") is None
    monkeypatch.setattr(check, "_verdicts", {})
    monkeypatch.setattr(check, "_fingerprint", lambda engine, index: "another driver")
    with pytest.raises(pytest.fail.Exception, match="checked again"):
        unavailable("sparse_decode")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a card; driver 1; triton 1": {"sparse_decode torch.float32": "yes"}}']
)
def test_a_damaged_memory_is_no_verdict(a_gpu, content):
    a_gpu.write_text(content)
    assert unavailable("sparse_decode") is None
    assert json.loads(a_gpu.read_text())["a card; driver 1; triton 1"] == {"sparse_decode torch.float32": True}


def test_a_memory_that_cannot_be_written_is_no_harm(monkeypatch, a_gpu):
    monkeypatch.setenv("SPARSEKERN_CACHE", "/dev/null/nowhere")
    assert unavailable("gather_dot") is None


@pytest.mark.parametrize("op", ["sparse_decode", "scatter_outer", "row_adam"])
def test_a_wrong_kernel_is_replaced_with_one_warning(monkeypatch, a_gpu, op):
    """Each wrong in its own way: a result a little off, one that changes from run to run, and one that does not run."""
    if op == "sparse_decode":
        right = products.sparse_decode
        monkeypatch.setattr(products, "sparse_decode", lambda *a: right(*a) * (1 + 1e-5))
    elif op == "scatter_outer":
        right = products.scatter_outer
        monkeypatch.setattr(products, "scatter_outer", lambda *a: right(*a) + 1e-7 * torch.randn(50, 77))
    else:
        monkeypatch.setattr(adam, "clip_factor", None)
    with pytest.warns(RuntimeWarning, match=rf"kernels for {op} on torch.float32 failed .* report .* a card; driver 1"):
        reason = unavailable(op)
    assert reason.startswith("failed its check on this device")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unavailable(op) == reason
    assert not a_gpu.exists()
    assert unavailable("gather_dot") is None  # the others serve on


def test_wrong_indices_are_noticed(monkeypatch, a_gpu):
    """One latent off in a slot that holds nearly the same value."""
    right = encode.topk_encode

    def wrong(*arguments, **options):
        values, indices = right(*arguments, **options)
        indices[0, -1] = (indices[0, -1] + 1) % arguments[1].shape[0]
        return values, indices

    monkeypatch.setattr(encode, "topk_encode", wrong)
    case = torch.randn(5, 16), torch.randn(60, 16), torch.zeros(60), 4
    monkeypatch.setattr(check, "_encode_cases", lambda engine, dtype: [case])
    with pytest.warns(RuntimeWarning, match="a latent outside the top k was taken|taken twice"):
        assert unavailable("topk_encode") is not None


def test_dispatch_follows_the_verdict(monkeypatch, a_gpu):
    """A tensor that says it is on CUDA goes to Triton, or to the reference where the check failed."""

    class OnCuda:
        device, dtype = CUDA, torch.float32

    assert choose("sparse_decode", OnCuda()) is triton
    monkeypatch.setattr(
        check, "_verdicts", {(triton.__name__, "sparse_decode", torch.float32, 0): "failed its check on this device"}
    )
    assert choose("sparse_decode", OnCuda()) is reference
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"SPARSEKERN_BACKEND=triton cannot serve sparse_decode .* failed its check"):
        choose("sparse_decode", OnCuda())


def test_what_it_cannot_serve_and_why(monkeypatch, a_gpu):
    assert "float32, bfloat16 and float16, not torch.float64" in unavailable("sparse_decode", torch.float64)
    assert unavailable("no_such_op") == "has no no_such_op kernel"
    assert (
        triton.unavailable("topk_encode", torch.device("cpu"), torch.float32, "auto") == "serves cuda tensors, not cpu"
    )
    assert "no int8 screening" in triton.unavailable("topk_encode", CUDA, torch.float32, "int8")
    assert "no fp8 screening for threshold_encode" in triton.unavailable("threshold_encode", CUDA, torch.float32, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert "needs compute capability 8.9" in triton.unavailable("topk_encode", CUDA, torch.float32, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "needs compute capability 8.0, this device has 7.5" in unavailable("sparse_decode")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert unavailable("sparse_decode").startswith("not built (triton is not installed")


def test_doctor_prints_every_check(monkeypatch):
    results = [
        check.Result("sparse_decode", "float32", True, 1e-7, 4e-6, 0.5, ""),
        check.Result("row_adam", "float32", False, float("nan"), 4e-6, 0.5, "out of luck"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "a card")
    monkeypatch.setattr(check, "run", lambda engine, device: results)
    monkeypatch.setattr(check, "verdict", lambda engine, op, dtype, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    out = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert out.exit_code == 1, out.output
    assert "out of luck" in out.output

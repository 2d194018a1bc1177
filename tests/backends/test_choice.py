"""Who serves a call, who is forced to, and what is said when nobody can."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from sparsekern.backends import BACKENDS, OPS, choose, cpu, reference

needs_native = pytest.mark.skipif(cpu.isa() is None, reason="the native kernels are not built")


def test_every_backend_that_serves_an_op_has_it():
    for name, backend in BACKENDS.items():
        for op in OPS:
            if backend.unavailable(op, torch.device("cpu"), torch.float32, "auto") is None:
                assert callable(getattr(backend, op)), f"{name}.{op}"
        reason = backend.unavailable("no_such_op", torch.device("cpu"), torch.float32, "auto")
        assert reason is not None or backend is reference


@needs_native
def test_cpu_tensors_go_to_the_kernels_and_the_rest_to_the_reference():
    assert choose("sparse_decode", torch.ones(1)) is cpu
    assert choose("sparse_decode", torch.ones(1, dtype=torch.bfloat16)) is reference
    assert choose("sparse_decode", torch.ones(1, device="meta")) is reference
    assert choose("topk_encode", torch.ones(1)) is cpu
    assert choose("topk_encode", torch.ones(1, dtype=torch.float64)) is reference
    assert choose("csr_decode", torch.ones(1)) is cpu
    assert choose("csr_decode", torch.ones(1, dtype=torch.bfloat16)) is reference
    assert choose("threshold_encode", torch.ones(1, dtype=torch.float64)) is reference


def test_a_forced_backend_fails_loudly(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cpu")
    with pytest.raises(ValueError, match="SPARSEKERN_BACKEND=cpu cannot serve sparse_decode on meta"):
        choose("sparse_decode", torch.ones(1, device="meta"))
    monkeypatch.setenv("SPARSEKERN_BACKEND", "tpu")
    with pytest.raises(ValueError, match="SPARSEKERN_BACKEND='tpu': must be one of cuda, triton, cpu, reference"):
        choose("sparse_decode", torch.ones(1))


def test_backends_names_one_choice_an_op_and_a_reason_for_the_rest(monkeypatch):
    rows = sk.backends("cpu")
    for op in OPS:
        assert sum(row.chosen for row in rows if row.op == op) == 1
    assert all(row.reason for row in rows)
    monkeypatch.setenv("SPARSEKERN_BACKEND", "reference")
    assert {row.backend for row in sk.backends("cpu") if row.chosen} == {"reference"}


def test_missing_kernels_are_said_once(monkeypatch):
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(cpu, "_not_built", "not built (no compiler)", raising=False)
    monkeypatch.setattr(sys.modules["sparsekern.backends"], "_warned", set())
    codes = sk.SparseCodes(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), 1)
    with pytest.warns(RuntimeWarning, match="cpu kernels are not built"):
        sk.sparse_decode(codes, torch.ones(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.sparse_decode(codes, torch.ones(1, 1))


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_passes_the_tests_of_the_kernels(isa):
    tests = Path(__file__).parents[1]
    files = ["backends/test_cpu_encode.py", "ops/test_sparse_decode.py", "optim/test_adam.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(tests / file) for file in files)],
        env=os.environ | {"SPARSEKERN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if "this machine has no" in run.stdout + run.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert run.returncode == 0, run.stdout[-4000:]


@needs_native
def test_an_unknown_instruction_set_is_refused():
    run = subprocess.run(
        [sys.executable, "-c", "import sparsekern"],
        env=os.environ | {"SPARSEKERN_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "SPARSEKERN_CPU_ISA=sse9: must be generic, avx2 or avx512" in run.stderr


_OWN_THREADS = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)  # a copy that nobody told about torch's threads
spec.loader.exec_module(native)
values, index = torch.rand(4000, 8), torch.randint(0, 500, (4000, 8), dtype=torch.int32)
weight, out = torch.randn(500, 96), torch.empty(4000, 96)
addresses = [t.data_ptr() for t in (values, weight)]
native.sparse_decode(4, (index.data_ptr(), 4000, 8, 0), *addresses, 96, 0, out.data_ptr(), 500, 96, 3)
torch.testing.assert_close(out, (values.unsqueeze(2) * weight[index]).sum(1))
assert not native.use_openmp("/no/such/library.so")
"""


@needs_native
def test_the_kernels_borrow_torch_threads_or_start_their_own():
    assert cpu.borrows_threads == (cpu._loaded_openmp() is not None)
    subprocess.run([sys.executable, "-c", _OWN_THREADS, cpu._native.__file__], check=True)

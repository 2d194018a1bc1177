"""Who serves what where there are CUDA C++ kernels, and why they do not: off, not built, wrong device or results."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.backends import OPS, backends, check, choose, cuda, reference, triton
from sparsekern.backends.cuda import _library
from sparsekern.cli import app

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
INFO = {"architectures": ["80", "90a"], "nvcc": "13.0", "runtime": "13.0", "driver": "no driver"}


@pytest.fixture
def library(monkeypatch):
    """A compiled module that holds nothing, and a GPU of compute capability 9.0 to go with it."""
    module = ModuleType("sparsekern._cuda")
    module.device_info = lambda: INFO
    module.__file__ = __file__
    monkeypatch.setattr(_library, "_load", lambda: (module, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return module


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")


class OnGpu:
    device, dtype = GPU, torch.float32


def unavailable(op, dtype=torch.float32, device=GPU, screen="auto"):
    return cuda.unavailable(op, device, dtype, screen)


def test_it_is_off_unless_it_is_asked_for(library, monkeypatch):
    monkeypatch.setattr(check, "verdict", lambda *arguments: None)
    monkeypatch.setattr(triton, "unavailable", lambda *arguments: None)
    assert unavailable("topk_encode") == cuda.OFF
    assert choose("topk_encode", OnGpu()) is triton
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    assert unavailable("row_adam") is None
    assert choose("topk_encode", OnGpu()) is cuda


def test_what_it_cannot_serve_and_why(library, chosen, monkeypatch):
    monkeypatch.setattr(check, "verdict", lambda *arguments: None)
    assert unavailable("topk_encode", device=CPU) == "serves cuda tensors, not cpu"
    assert unavailable("sparse_decode") == "has no sparse_decode kernel"
    assert "not torch.float64" in unavailable("topk_encode", torch.float64)
    assert "no int8 screening" in unavailable("topk_encode", screen="int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "not built for this device (sm_100): compiled for sm_80, sm_90a" in unavailable("row_adam")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in unavailable("row_adam")
    monkeypatch.setattr(_library, "_load", lambda: (None, "not built (no module)"))
    assert unavailable("row_adam") == "not built (no module)"
    with pytest.raises(ValueError, match=r"SPARSEKERN_BACKEND=cuda cannot serve topk_encode .*: not built"):
        choose("topk_encode", OnGpu())


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        *[("80", (8, 0), True), ("80", (8, 9), True), ("86", (8, 0), False), ("80", (9, 0), False)],
        *[("90a", (9, 0), True), ("90a", (9, 1), False), ("120a", (12, 0), True), ("100", (10, 3), True)],
    ],
)
def test_code_runs_on_devices_of_its_kind(architecture, capability, runs):
    assert _library.runs_on(architecture, capability) == runs


def test_others_stand_in_for_what_it_does_not_have(library, chosen, monkeypatch):
    monkeypatch.setattr(check, "verdict", lambda *arguments: None)
    monkeypatch.setattr(triton, "unavailable", lambda *arguments: None)
    assert choose("sparse_decode", OnGpu()) is triton
    rows = {(row.op, row.backend): row for row in backends(GPU)}
    for op in OPS:
        assert sum(row.chosen for row in rows.values() if row.op == op) == 1
    assert rows["topk_encode", "cuda"].chosen
    assert rows["topk_encode", "triton"].reason == "SPARSEKERN_BACKEND=cuda"
    assert rows["sparse_decode", "triton"].chosen
    assert rows["sparse_decode", "cuda"].reason == "has no sparse_decode kernel"
    monkeypatch.setattr(triton, "unavailable", lambda *arguments: "not built")
    with pytest.raises(ValueError, match=r"cannot serve sparse_decode on cuda torch\.float32, where triton stands in"):
        choose("sparse_decode", OnGpu())


def test_emulated_kernels_serve_cpu_tensors_inside_the_context_alone(chosen):
    module = ModuleType("_cuda_emulated")
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="serve cuda tensors, not cpu"):
        _library.module_for(x)
    with pytest.raises(ValueError, match="cannot serve sparse_decode on cpu"):
        choose("sparse_decode", x)
    with _library.emulating(module):
        assert _library.module_for(x) is module
        assert _library.stream_of(x) == 0
        assert choose("topk_encode", x) is cuda
        assert choose("sparse_decode", x) is reference
        with pytest.raises(RuntimeError, match="already being emulated"), _library.emulating(module):
            pass
        assert _library.emulated()
    assert not _library.emulated()


def test_kernels_run_on_the_device_of_the_tensor(library, monkeypatch):
    seen = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            seen.append(self.device)

        def __exit__(self, *error):
            seen.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Current)
    library.launch = lambda number: seen.append(number) or 2 * number
    other = torch.device("cuda", 1)
    assert _library.module_for(SimpleNamespace(device=GPU)) is library
    assert _library.module_for(SimpleNamespace(device=other)).launch(4) == 8
    assert seen == [other, 4, None]


def test_a_wrong_kernel_is_refused_with_one_warning(library, chosen, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(check, "_fingerprint", lambda engine, index: "a card")
    monkeypatch.setattr(check, "_verdicts", {})
    result = check.Result("row_adam", "float32", False, 0.5, 4e-6, 0.1, "the results are too far from float64")
    monkeypatch.setattr(check, "run_one", lambda engine, *rest: result if engine is cuda else pytest.fail("not asked"))
    with pytest.warns(RuntimeWarning, match="sparsekern's cuda kernels for row_adam on torch.float32 failed"):
        assert "failed its check" in unavailable("row_adam")
    weight = SimpleNamespace(device=GPU, dtype=torch.float32, shape=(8, 4), is_contiguous=lambda: True, is_cuda=True)
    assert not cuda.updates(weight)


def test_every_kernel_has_a_check():
    checked = {name.split()[0] for name in check.CASES}
    assert set(cuda._OPS) <= checked
    assert set(cuda._OPS) <= set(cuda._MODULES)


def test_doctor_says_what_was_built_and_why_it_is_not_used(library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert out.exit_code == 0, out.output
    said = "CUDA C++ kernels: sm_80, sm_90a by nvcc 13.0, runtime 13.0; no driver; off until a record"
    assert said in " ".join(out.output.split())  # however wide the terminal is
    monkeypatch.setattr(_library, "_load", lambda: (None, "not built (No module named 'sparsekern._cuda')"))
    out = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert out.exit_code == 0, out.output
    said = "CUDA C++ kernels: not built (No module named 'sparsekern._cuda'); nvcc makes them"
    assert said in " ".join(out.output.split())


def test_doctor_checks_the_kernels_of_every_engine(library, monkeypatch):
    good = check.Result("sparse_decode", "float32", True, 1e-7, 4e-6, 0.5, "")
    bad = check.Result("row_adam", "float32", False, 1.0, 4e-6, 0.5, "out of luck")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "a card")
    monkeypatch.setattr(triton, "missing", lambda device: None)
    monkeypatch.setattr(check, "run", lambda engine, device: [bad] if engine is cuda else [good])
    monkeypatch.setattr(check, "verdict", lambda *arguments: None)
    out = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert "out of luck" in " ".join(out.output.split())
    assert out.exit_code == 0, "they are not used"
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    assert CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"]).exit_code == 1


def test_the_real_library_loads_without_a_driver():
    """Where nvcc built it: it says what it is, and fails only when it is called."""
    module = pytest.importorskip("sparsekern._cuda")
    found = module.device_info()
    assert set(found) == set(INFO)
    assert found["architectures"]
    assert issubclass(module.CudaError, RuntimeError)
    assert sys.modules["sparsekern._cuda"] is module
    assert sk.backends("cpu")

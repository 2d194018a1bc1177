"""The tools of the CUDA toolkit: what they are asked, how their answers are read, and machines that lack them."""

import os
import stat

import pytest
import torch

from sparsekern.backends import cuda
from sparsekern.bench import gpu, gpu_table, gpu_tools

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

# As `ncu --csv --page raw --print-units base` prints it.
SPACE = "sparsekern::cuda::"
COLUMNS = ["ID", "Kernel Name", *(gpu_tools.FIGURES[name][0] for name in ("ms", "registers", "warps, %"))]
ROWS = [
    COLUMNS,
    ["", "", "ns", "register/thread", "%"],
    ["0", f"void {SPACE}(anonymous namespace)::screen<{SPACE}f16, 3>(Params)", "5,250,000", "168", "18.2"],
    ["1", f"{SPACE}take(Params)", "81,000", "n/a", "50"],
]
NCU = "==PROF== Connected to process 17\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in ROWS) + "\n"


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """A function that installs a stand-in for a tool: a shell script. There are no others, and kernels for a GPU."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_tools, "tool", lambda name: str(tmp_path / name) if (tmp_path / name).exists() else None)
    monkeypatch.setattr(cuda, "missing", lambda device: None)

    def install(name, script):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return install


def test_the_sanitizer_watches_our_kernels_alone_and_its_verdict_counts(tools):
    asked = 'echo "========= $SPARSEKERN_BACKEND $PYTORCH_NO_CUDA_MEMORY_CACHING $*"'
    tools("compute-sanitizer", f'{asked}; echo "========= ERROR SUMMARY: 0 errors"')
    found = gpu_tools.sanitize("racecheck", GPU, 20.0)
    assert found["passed"]
    asked, summary = found["lines"][0], found["lines"][-1]
    assert asked.startswith("cuda 1 --tool racecheck --kernel-name kns=sparsekern --error-exitcode 7 ")
    assert summary == "ERROR SUMMARY: 0 errors"
    assert gpu_table.tool_line(found).startswith("nothing found")
    tools("compute-sanitizer", "echo '========= Invalid __global__ read of size 16 bytes'; exit 7")
    found = gpu_tools.sanitize("memcheck", GPU, 20.0)
    assert not found["passed"]
    assert "FAILED" in gpu_table.tool_line(found)
    assert "Invalid __global__ read" in gpu_table.tool_line(found)
    result = {"checks": {"backends": {}, "entries": []}, "tools": {"memcheck": found}}
    assert gpu.failed(result)


def test_a_tool_that_takes_too_long_is_ended(tools):
    tools("compute-sanitizer", "exec /bin/sleep 30")
    assert gpu_tools.sanitize("memcheck", GPU, 0.2) == {"missing": "it was not through within 0 s"}


def test_figures_of_the_profiler(tools, tmp_path):
    (tmp_path / "answer").write_text(NCU)
    tools("ncu", f"/bin/cat {tmp_path / 'answer'}")
    found = gpu_tools.profile(GPU, 20.0)
    assert found["kernels"] == [
        {"kernel": "screen<f16, 3>", "ms": 5.25, "registers": 168.0, "warps, %": 18.2},
        {"kernel": "take", "ms": 0.081, "warps, %": 50.0},
    ]
    grid = gpu_table.profile({"tools": {"ncu": found}})
    assert grid.header == ["", "ms", "warps, %", "registers"]
    assert grid.rows[1] == ["take", "0.081", "50", "–"]


def test_a_profiler_that_may_not_look_says_so(tools):
    tools("ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1")
    found = gpu_tools.profile(GPU, 20.0)
    assert found["kernels"] == []
    assert "ERR_NVGPUCTRPERM" in gpu_table.tool_line(found)


def test_machines_that_lack_them(tools, monkeypatch):
    assert gpu_tools.sanitize("memcheck", GPU, 9.0) == {"missing": "compute-sanitizer is not installed"}
    assert gpu_tools.profile(GPU, 9.0) == {"missing": "ncu is not installed"}
    assert gpu_tools.profile(CPU, 9.0) == {"missing": "it looks into kernels on a GPU"}
    monkeypatch.setattr(cuda, "missing", lambda device: "not built")
    assert gpu_tools.profile(GPU, 9.0) == {"missing": "not built"}
    assert gpu_table.tool_line({"missing": "not built"}) == "left out, not built"


def test_tools_are_looked_for_beside_nvcc(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "ncu"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_tools.tool("ncu") == str(script)

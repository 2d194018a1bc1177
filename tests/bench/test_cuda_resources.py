"""Every CUDA kernel compiles without a complaint, within its bounds, to the instructions that it is written for."""

import pytest

from sparsekern.bench import cuda_resources
from sparsekern.bench.cuda_resources import Kernel

needs_nvcc = pytest.mark.skipif(cuda_resources.why_not() is not None, reason=str(cuda_resources.why_not()))


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_is_compiled_within_its_bounds():
    """With the objects of the package's build where they are of the same sources; else it takes minutes."""
    kernels, complaints = cuda_resources.measure()
    assert complaints == []
    assert cuda_resources.problems(kernels) == []
    assert {kernel.arch for kernel in kernels} == {"80", "90a"}
    sources = {kernel.source for kernel in kernels}
    assert sources == {source for source, _ in cuda_resources.WRITTEN_FOR}
    table = cuda_resources.table(kernels)
    assert all(f"`{kernel.source}.cu` `{kernel.name}` | {kernel.arch} |" in table for kernel in kernels)


def kernel(**changed):
    instructions = dict.fromkeys(cuda_resources.SHOWN, 0)
    return Kernel("screen", "screen", "90a", 168, 0, 0, instructions)._replace(**changed)


def test_what_is_out_of_bounds_is_named():
    (stack,) = cuda_resources.problems([kernel(source="other", stack=16, spills=4)])
    assert stack == "other.cu: screen on sm_90a has 16 bytes of stack and 4 instructions that use it"
    wanted = cuda_resources.WRITTEN_FOR["screen", "90a"]
    missing = cuda_resources.problems([kernel()])
    assert missing == [f"screen.cu: no kernel on sm_90a has {label}" for label in wanted]
    whole = dict.fromkeys(cuda_resources.SHOWN, 1)
    assert cuda_resources.problems([kernel(), kernel(instructions=whole)]) == []


def test_the_table_has_the_largest_of_all_variants():
    variants = [kernel(registers=100), kernel(registers=90, instructions=dict.fromkeys(cuda_resources.SHOWN, 3))]
    *_, row = cuda_resources.table(variants).splitlines()
    assert row.startswith("| `screen.cu` `screen` | 90a | 2 | 100 | 0 | HGMMA × 3, QGMMA × 3")


@pytest.mark.parametrize(
    ("mangled", "plain"),
    [
        ("_ZN10sparsekern4cuda12_GLOBAL__N_16selectINS0_4bf16ELi3EEEvNS1_6ParamsE", "select"),
        ("_ZN10sparsekern4cuda9cast_rowsENS0_6ParamsE", "cast_rows"),
        ("_Z7nothingv", "nothing"),
        ("nothing", "nothing"),
    ],
)
def test_names_are_bare(mangled, plain):
    assert cuda_resources._plain(mangled) == plain


def test_without_nvcc_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        cuda_resources.main([])
    assert "nvcc is neither on the PATH nor in CUDA_HOME/bin" in capsys.readouterr().err
    monkeypatch.setattr(cuda_resources, "CSRC", tmp_path)
    assert "run it in a clone" in cuda_resources.why_not()

"""The package as users get it: import cost and needs, wheel and editable installs, no compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_IMPORT = """
import sys, time
import torch
start = time.perf_counter()
import sparsekern
print(time.perf_counter() - start)
extras = "typer rich pydantic yaml transformers scipy sklearn matplotlib huggingface_hub tensorboard wandb hypothesis"
print(*[name for name in extras.split() if name in sys.modules])
"""


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, **options).stdout


def test_import_is_light():
    best = 9.0
    for _ in range(3):  # the fastest of three: the first one fills the disk cache
        seconds, *extras = python("-c", _IMPORT).split()
        assert not extras
        best = min(best, float(seconds))
    assert best < 0.3


def test_import_needs_only_torch_numpy_and_safetensors():
    hidden = [
        "typer",
        "rich",
        "pydantic",
        "yaml",
        "transformers",
        "scipy",
        "sklearn",
        "matplotlib",
        "huggingface_hub",
        "hypothesis",
    ]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({hidden}))"  # None in sys.modules: ImportError
    python("-c", f"{blocked}\nimport sparsekern as sk, torch\nsk.SAE(4, 8, sk.TopK(2))(torch.randn(3, 4))")
    failed = subprocess.run(
        [sys.executable, "-c", f"{blocked}\nfrom sparsekern.__main__ import main; main()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install 'sparsekern[cli]'" in failed.stderr


def copy_source(folder):
    """What git would have, without built files. Its kernels are not optimized: that halves the time they take."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "sparsekern", "analysis", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    setup = (folder / "setup.py").read_text()
    assert setup.count('"-O3",\n') == 1  # of the CPU's kernels
    (folder / "setup.py").write_text(setup.replace('"-O3",\n', '"-O0",\n'))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project that the tests of this module build in."""
    return copy_source(tmp_path_factory.mktemp("project") / "source")


@pytest.fixture
def clean_python(tmp_path):
    """Python of a new environment that sees the packages of this one, all but sparsekern."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    interpreter = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = subprocess.run([interpreter, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    # A folder named in a .pth file is searched, but the .pth files inside it (an editable sparsekern) are not read.
    Path(site, "outer.pth").write_text(sysconfig.get_paths()["purelib"])
    return interpreter


def install(interpreter, what, *options, **environment):
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--ignore-installed", *options, str(what)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


_USE = """
import sparsekern as sk, sparsekern.analysis.latents, torch
from sparsekern.backends import cpu
sae = sk.SAE(8, 32, sk.TopK(4))
sae(torch.randn(6, 8)), sae(torch.randn(6, 8))
print(cpu.isa(), sk.__file__, sparsekern.analysis.latents.__file__, sep="|")
"""


def use(interpreter, cwd):
    """Use the installed package; returns the instruction set, where package and analysis lie, and the warnings."""
    run = subprocess.run([interpreter, "-c", _USE], cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    isa, package, analysis = run.stdout.strip().split("|")
    return isa, Path(package), Path(analysis), run.stderr


@pytest.mark.slow
def test_wheel(source, clean_python, tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sparsekern/analysis/latents.py", "sparsekern/bench/worker.py"} <= set(names)
    assert "sparsekern/py.typed" in names
    assert any(name.startswith("sparsekern/_native") for name in names)
    assert not any(name.startswith(("tests", "bench", "analysis", "csrc")) for name in names)
    install(clean_python, wheel)
    isa, package, analysis, _ = use(clean_python, tmp_path)
    assert isa != "None"
    assert package.is_relative_to(tmp_path / "venv")
    assert analysis == package.parent / "analysis" / "latents.py"


@pytest.mark.slow
def test_editable(source, clean_python, tmp_path):
    install(clean_python, source, "-e")
    isa, package, analysis, _ = use(clean_python, tmp_path)
    assert isa != "None"
    assert package == source / "sparsekern" / "__init__.py"
    assert analysis == source / "analysis" / "latents.py"


@pytest.mark.slow
def test_without_a_compiler_it_installs_works_and_says_so_once(clean_python, tmp_path):
    install(clean_python, copy_source(tmp_path / "source"), CC="no-such-compiler", CXX="no-such-compiler")
    isa, package, _, warnings = use(clean_python, tmp_path)
    assert isa == "None"
    assert not list(package.parent.glob("_native*"))
    assert warnings.count("kernels are not built") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_sources_are_built_where_nvcc_is_and_only_there(source, tmp_path):
    """With a stand-in source, until csrc/cuda has its own."""
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    (folder / "csrc" / "cuda").mkdir(exist_ok=True)
    (folder / "csrc" / "cuda" / "stand_in.cu").write_text(
        "#include <pybind11/pybind11.h>\n"
        "__global__ void nothing() {}\n"
        'PYBIND11_MODULE(_cuda, m) { m.def("answer", [] { return 42; }); }\n'
    )
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    # The CPU's kernels are not at issue; nvcc finds its own compiler.
    base = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    off = base | {"SPARSEKERN_BUILD_CUDA": "0"}
    subprocess.run(build, cwd=folder, env=off, check=True, capture_output=True)
    assert not list((folder / "out").rglob("_cuda*"))
    on = base | {"SPARSEKERN_BUILD_CUDA": "1", "SPARSEKERN_CUDA_ARCHS": "90a"}
    subprocess.run(build, cwd=folder, env=on, check=True, capture_output=True)
    assert list((folder / "out").rglob("_cuda*"))
    missing = on | {"CUDA_HOME": str(tmp_path)}
    failed = subprocess.run(build, cwd=folder, env=missing, check=False, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "SPARSEKERN_BUILD_CUDA=1 but nvcc" in failed.stderr

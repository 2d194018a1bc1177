"""The package as users get it: import cost and needs, wheel and editable installs, no compiler."""

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pybind11
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
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
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


# What the kernels of a GPU have to do with packaging has tests of its own: they take long to compile.
NO_CUDA = {"SPARSEKERN_BUILD_CUDA": "0"}


def install(interpreter, what, *options, **environment):
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--ignore-installed", *options, str(what)],
        env=os.environ | NO_CUDA | environment,
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
    subprocess.run([*pip, str(source)], env=os.environ | NO_CUDA, check=True, capture_output=True)
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


def test_the_source_distribution_has_all_that_is_compiled(source, tmp_path):
    """Also the CUDA kernels, though it is made where there is no nvcc."""
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, env=os.environ | NO_CUDA, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {path.relative_to(source).as_posix() for path in source.glob("csrc/**/*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert {"csrc/nvcc.py", "csrc/cpu/largest.h", "setup.py"} <= wanted | names
    assert wanted <= names


# A compiler that compiles nothing: what it was asked is in its log. It fails where a source has "broken" in it, warns
# where it has "spills", and its products are empty.
FAKE_NVCC = """#!/bin/sh
case "$*" in *--version*) echo "release 13.0"; exit 0;; esac
echo "$*" >> "$(dirname "$0")/log"
while [ $# -gt 0 ]; do
    case "$1" in -o) shift; out="$1";; -c) shift; from="$1";; esac
    shift
done
if [ -n "$from" ] && grep -q broken "$from"; then echo "$from(1): error: broken"; exit 2; fi
if [ -n "$from" ] && grep -q spills "$from"; then
    echo "ptxas warning : Registers are spilled to local memory in function 'f'"
fi
if [ -n "$from" ]; then echo "ptxas info    : Used 32 registers"; fi
: > "$out"
"""


@pytest.fixture
def cuda_build(source, tmp_path):
    """A function that builds two CUDA sources with the compiler above: the run, and the sources that it compiled."""
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "csrc" / "cuda", ignore_errors=True)
    (folder / "csrc" / "cuda").mkdir()
    for name in ("bindings.cu", "kernel.cu", "kernel.h"):
        (folder / "csrc" / "cuda" / name).write_text(f"// {name}\n")
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(FAKE_NVCC)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    log = compiler.parent / "log"

    def build(**environment):
        log.write_text("")
        # The CPU's kernels are not at issue.
        base = {"CC": "no-such-compiler", "CXX": "no-such-compiler", "CUDA_HOME": str(tmp_path / "cuda")}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SPARSEKERN_")}
        done = subprocess.run(
            command, cwd=folder, env=variables | base | environment, capture_output=True, text=True, check=False
        )
        calls = [line.split() for line in log.read_text().splitlines()]
        compiled = sorted(Path(call[call.index("-c") + 1]).name for call in calls if "-c" in call)
        built = bool(list((folder / "out").rglob("_cuda*")))
        shutil.rmtree(folder / "out", ignore_errors=True)
        return done, compiled, built, calls

    build.folder = folder / "csrc" / "cuda"
    return build


def test_cuda_sources_are_compiled_one_by_one_and_only_when_they_change(cuda_build, tmp_path):
    both = ["bindings.cu", "kernel.cu"]
    done, compiled, built, calls = cuda_build()
    assert (done.returncode, compiled, built) == (0, both, True), done.stderr
    (of_kernel,) = (call for call in calls if any(word.endswith("kernel.cu") for word in call))
    assert {f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")} <= set(of_kernel)
    assert "-cudart=static" in calls[-1]
    assert cuda_build()[1:3] == ([], True)  # linked anew, from the objects that are there
    shutil.copytree(Path(pybind11.__file__).parent, tmp_path / "elsewhere" / "pybind11")
    assert cuda_build(PYTHONPATH=str(tmp_path / "elsewhere"))[1:3] == ([], True)  # as pip's builds have it
    (cuda_build.folder / "kernel.cu").write_text("// another\n")
    assert cuda_build()[1:3] == (["kernel.cu"], True)
    (cuda_build.folder / "kernel.h").write_text("// another\n")
    assert cuda_build()[1:3] == (both, True)
    done, compiled, _, calls = cuda_build(SPARSEKERN_CUDA_ARCHS="89")
    assert compiled == both
    assert not any("sm_90a" in word for call in calls for word in call)


def test_a_failed_cuda_build_leaves_the_rest_unless_it_was_asked_for(cuda_build):
    (cuda_build.folder / "kernel.cu").write_text("broken\n")
    done, _, built, _ = cuda_build()
    assert (done.returncode, built) == (0, False)
    assert "the CUDA kernels could not be built and are left out" in done.stderr
    assert "kernel.cu(1): error: broken" in done.stdout
    done, _, built, _ = cuda_build(SPARSEKERN_BUILD_CUDA="1")
    assert (done.returncode != 0, built) == (True, False)
    assert "SPARSEKERN_BUILD_CUDA=1 but the CUDA kernels could not be built" in done.stderr
    (cuda_build.folder / "kernel.cu").write_text("// mended\n")
    assert cuda_build()[1:3] == (["kernel.cu"], True)


def test_warnings_of_the_cuda_compiler_are_shown_also_from_objects_that_are_there(cuda_build):
    (cuda_build.folder / "kernel.cu").write_text("// spills\n")
    for _ in range(2):
        done, _, built, _ = cuda_build()
        assert built
        assert "kernel.cu: ptxas warning : Registers are spilled" in done.stdout
        assert "ptxas info" not in done.stdout


def test_whether_cuda_kernels_are_built_is_a_choice(cuda_build, tmp_path):
    assert cuda_build(SPARSEKERN_BUILD_CUDA="0")[1:3] == ([], False)
    done, _, built, _ = cuda_build(CUDA_HOME=str(tmp_path / "nowhere"))
    assert (done.returncode, built) == (0, False)
    failed = cuda_build(CUDA_HOME=str(tmp_path / "nowhere"), SPARSEKERN_BUILD_CUDA="1")[0]
    assert failed.returncode != 0
    assert "SPARSEKERN_BUILD_CUDA=1 but nvcc" in failed.stderr
    failed = cuda_build(SPARSEKERN_BUILD_CUDA="yes")[0]
    assert "SPARSEKERN_BUILD_CUDA=yes: must be 0, 1 or auto" in failed.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_module_by_the_real_compiler_loads_without_a_driver(cuda_build):
    """A small one: the kernels themselves are compiled when the package is installed."""
    (cuda_build.folder / "kernel.cu").write_text(
        "__global__ void nothing() {}\n"
        "int answer() { cudaFuncAttributes a; (void)cudaFuncGetAttributes(&a, nothing); return 42; }\n"
    )
    (cuda_build.folder / "bindings.cu").write_text(
        "#include <Python.h>\n"
        "#define TEXT(...) #__VA_ARGS__\n"
        "#define EXPANDED(...) TEXT(__VA_ARGS__)\n"
        "int answer();\n"
        'static PyModuleDef def = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};\n'
        "PyMODINIT_FUNC PyInit__cuda() {\n"
        "    PyObject* module = PyModule_Create(&def);\n"
        '    PyModule_AddIntConstant(module, "answer", answer());\n'
        '    PyModule_AddStringConstant(module, "archs", EXPANDED(SPARSEKERN_CUDA_ARCHS));\n'
        "    return module;\n"
        "}\n"
    )
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    variables = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler", "SPARSEKERN_BUILD_CUDA": "1"}
    folder = cuda_build.folder.parents[1]
    subprocess.run(command, cwd=folder, env=variables, check=True, capture_output=True)
    (built,) = (folder / "out").rglob("_cuda*")
    load = (
        "import importlib.util as u; s = u.spec_from_file_location('_cuda', {!r}); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); print(m.answer, m.archs)"
    )
    assert python("-c", load.format(str(built))).strip() == "42 80,90a"

"""The CUDA kernels built for the CPU, on the emulator of csrc/cuda: what the tests of this folder run."""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build/emulated"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
SYSTEM = [pybind11.get_include(), sysconfig.get_paths()["include"]]
# For bindings.cu, which takes longest to compile and has no loops.
QUICK = ["-O0"]


class Build:
    """Objects and what is linked of them, made again only where a source, a header of ours or a flag has changed."""

    def __init__(self, compiler, folder=FOLDER):
        self.compiler, self.folder = compiler, folder
        self.version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout

    def module(self):
        kernels = sorted(ROOT.glob("csrc/cuda/*.cu"))
        return self._link("_cuda_emulated.so", kernels, ["-shared"])

    def driver(self):
        """The program of tests/native/cuda."""
        kernels = sorted(path for path in ROOT.glob("csrc/cuda/*.cu") if path.name != "bindings.cu")
        return self._link("driver", [*kernels, *sorted(ROOT.glob("tests/native/cuda/*.cpp"))], ["-pthread"])

    def _link(self, name, sources, flags):
        sources = [ROOT / "csrc/cuda/emulator.cpp", *sources]
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "lock"), ThreadPoolExecutor(_jobs()) as pool:
            objects = list(pool.map(self.object, sources))
            target = self.folder / name
            command = [*self.compiler, *flags, *map(str, objects), "-o", str(target)]
            self._make(target, command, objects)
        return target

    def object(self, source):
        target = self.folder / f"{source.stem}.o"
        dependencies = target.with_suffix(".d")
        command = [*self.compiler, *FLAGS, *(QUICK if source.stem == "bindings" else [])]
        command += [f"-isystem{path}" for path in SYSTEM]
        command += ["-MMD", "-MF", str(dependencies), "-x", "c++", "-c", str(source), "-o", str(target)]
        self._make(target, command, [source], dependencies)
        return target

    def _make(self, target, command, sources, dependencies=None):
        """Run `command` unless `target` was made by the same one, of files with the same contents."""
        record = target.with_suffix(target.suffix + ".json")

        def state(files):
            digest = hashlib.sha256(self.version + repr(command).encode())
            for file in files:
                digest.update(Path(file).read_bytes())
            return digest.hexdigest()

        with contextlib.suppress(OSError, ValueError):
            files, made_of = json.loads(record.read_text())
            if target.exists() and made_of == state(files):
                return
        record.unlink(missing_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        files = [str(source) for source in sources]
        if dependencies is not None:  # as make reads it: "target: source header ..."
            files = shlex.split(dependencies.read_text().partition(":")[2].replace("\\\n", " "))
        record.write_text(json.dumps([files, state(files)]))


@contextlib.contextmanager
def _locked(path):
    """One process builds at a time: pytest-xdist runs several."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _jobs():
    return int(os.environ.get("SPARSEKERN_BUILD_JOBS") or os.cpu_count() or 1)


@pytest.fixture(scope="session")
def emulator_build(compiler):
    return Build(compiler)


@pytest.fixture(scope="session")
def emulated(emulator_build):
    """The module with the functions of ``sparsekern._cuda``, for memory of the host."""
    path = emulator_build.module()
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

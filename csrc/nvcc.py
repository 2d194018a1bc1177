"""How the CUDA kernels are compiled: the one place that knows, for setup.py and for sparsekern.bench.cuda_resources.

Objects, and what the compiler said of them, stay in a folder: what has not changed is not compiled again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pybind11

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "build/cuda"


class Object(NamedTuple):
    """A compiled source: the object file, and all that nvcc and ptxas printed."""

    source: Path
    file: Path
    log: str

    @property
    def complaints(self) -> list[str]:
        """Warnings, and the advice that ptxas numbers: that it serialized matmuls or ignored a register count."""
        return [line for line in self.log.splitlines() if re.search(r"\bwarning\b|\(C\d{4}\)", line, re.IGNORECASE)]


def find() -> str | None:
    """Path of nvcc: in ``CUDA_HOME`` where that is set, else on the PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def architectures() -> list[str]:
    """What to compile for."""
    return os.environ.get("SPARSEKERN_CUDA_ARCHS", "80;90a").split(";")


def sources() -> list[Path]:
    """All of them; none where the folder is not here."""
    return sorted(HERE.glob("cuda/*.cu"))


def headers() -> list[Path]:
    """What the sources depend on."""
    return sorted(HERE.glob("cuda/*.h"))


def compile_all(nvcc: str, archs: Sequence[str], folder: Path = CACHE) -> list[Object]:
    """Every source by a call of nvcc of its own, some at a time: ``SPARSEKERN_BUILD_JOBS``, else one for each core.

    Raises ``subprocess.CalledProcessError``, with the compiler's words printed, where one does not compile.
    """
    flags = ["-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v,-warn-spills"]
    flags += ["-DSPARSEKERN_CUDA_ARCHS=" + r"\,".join(archs)]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    include = [f"-I{path}" for path in (HERE, pybind11.get_include(), sysconfig.get_paths()["include"])]
    # Without the folders: pip has another one for pybind11 in every build.
    common = hashlib.sha256(f"{version} {flags}".encode())
    for header in headers():
        common.update(header.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Object:
        made = folder / f"{source.stem}.o"
        wanted, versions = [*targets, "-O3"], ""
        if source.stem == "bindings":  # they have no kernels and no loops, and much that is read for each architecture
            wanted, versions = [targets[-1], "-O1"], f"{sys.version} {pybind11.__version__}"
        log, key, state = made.with_suffix(".log"), made.with_suffix(".key"), common.copy()
        state.update(f"{wanted} {versions}".encode() + source.read_bytes())
        if not (made.exists() and key.exists() and key.read_text() == state.hexdigest()):
            key.unlink(missing_ok=True)
            command = [nvcc, *flags, *wanted, *include, "-c", str(source), "-o", str(made)]
            print(" ".join(command), flush=True)
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode != 0:
                print(done.stdout, flush=True)
            done.check_returncode()
            log.write_text(done.stdout)
            key.write_text(state.hexdigest())
        found = Object(source, made, log.read_text())
        for line in found.complaints:
            print(f"{source.name}: {line}", flush=True)
        return found

    jobs = int(os.environ.get("SPARSEKERN_BUILD_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compiled, sources()))


def link(nvcc: str, objects: Sequence[Object], target: Path) -> None:
    """The extension module, with the CUDA runtime inside."""
    target.parent.mkdir(parents=True, exist_ok=True)
    files = [str(one.file) for one in objects]
    subprocess.run([nvcc, "-shared", "-cudart=static", "-o", str(target), *files], check=True)

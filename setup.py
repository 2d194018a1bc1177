"""Builds the native kernels; everything else about the package is in pyproject.toml.

sparsekern._native (csrc/cpu)   CPU kernels. Without a working C++ compiler it is left out and the package runs on the
                                reference backend.
sparsekern._cuda (csrc/cuda)    CUDA kernels, when that folder has sources and nvcc is on the PATH or in CUDA_HOME.
                                SPARSEKERN_BUILD_CUDA=1 makes a missing nvcc an error, =0 leaves them out;
                                SPARSEKERN_CUDA_ARCHS names the architectures (default "80;90a").
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")


def native_extension() -> Extension:
    """The CPU kernels; `optional` lets the install go on when they cannot be compiled."""
    return Extension(
        "sparsekern._native",
        sources=sorted(str(p) for p in [CSRC / "bindings.cpp", *CSRC.glob("cpu/*.cpp")]),
        depends=sorted(str(p) for p in [*CSRC.glob("cpu/*.h"), *CSRC.glob("cpu/*.inl")]),
        include_dirs=[str(CSRC), pybind11.get_include()],
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-fopenmp-simd",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fvisibility=hidden",
            "-Wall",
        ],
        extra_link_args=["-pthread", "-ldl"] if sys.platform == "linux" else ["-pthread"],
        language="c++",
        optional=True,
    )


def find_nvcc() -> str | None:
    """Path of nvcc, or None where CUDA kernels are not to be built."""
    wanted = os.environ.get("SPARSEKERN_BUILD_CUDA", "auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None and wanted == "1":
        raise SystemExit("SPARSEKERN_BUILD_CUDA=1 but nvcc is neither on the PATH nor in CUDA_HOME/bin")
    return nvcc


def cuda_extensions() -> list[Extension]:
    """The CUDA kernels as a list of none or one."""
    sources = sorted(str(p) for p in [*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")])
    if not sources or find_nvcc() is None:
        return []
    return [Extension("sparsekern._cuda", sources=sources, include_dirs=[str(CSRC), pybind11.get_include()])]


class BuildExt(build_ext):
    """build_ext that sends _cuda through nvcc, which setuptools' compilers do not know."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension module."""
        if ext.name != "sparsekern._cuda":
            super().build_extension(ext)
            return
        nvcc = find_nvcc()
        assert nvcc is not None, "cuda_extensions() lists _cuda only where nvcc was found"
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("SPARSEKERN_CUDA_ARCHS", "80;90a").split(";")
        includes = [*ext.include_dirs, sysconfig.get_paths()["include"]]
        command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        command += [f"-I{path}" for path in includes] + ["-o", str(target), *ext.sources]
        print(" ".join(command))
        subprocess.run(command, check=True)


ParallelCompile("SPARSEKERN_BUILD_JOBS").install()  # by default a job for each core
setup(ext_modules=[native_extension(), *cuda_extensions()], cmdclass={"build_ext": BuildExt})

"""Builds the native kernels; everything else about the package is in pyproject.toml.

sparsekern._native (csrc/cpu)   CPU kernels. Without a working C++ compiler it is left out and the package runs on the
                                reference backend.
sparsekern._cuda (csrc/cuda)    CUDA kernels, where nvcc is on the PATH or in CUDA_HOME. SPARSEKERN_BUILD_CUDA=0 leaves
                                them out, =1 makes a missing nvcc or a failed build an error, and auto, the default,
                                goes on without them and says so. SPARSEKERN_CUDA_ARCHS names the architectures
                                ("80;90a"). Objects stay in build/cuda, for the next build of the same sources.
SPARSEKERN_BUILD_JOBS           how many sources are compiled at a time, by default one for each core.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")

sys.path.insert(0, str(Path(__file__).resolve().parent / CSRC))
import nvcc  # noqa: E402


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
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"SPARSEKERN_BUILD_CUDA={wanted}: must be 0, 1 or auto")
    found = None if wanted == "0" else nvcc.find()
    if found is None and wanted == "1":
        raise SystemExit("SPARSEKERN_BUILD_CUDA=1 but nvcc is neither on the PATH nor in CUDA_HOME/bin")
    return found


def cuda_extensions() -> list[Extension]:
    """The CUDA kernels as a list of none or one."""
    if not nvcc.sources() or find_nvcc() is None:
        return []
    optional = os.environ.get("SPARSEKERN_BUILD_CUDA") != "1"
    sources = [str(CSRC / "cuda" / path.name) for path in nvcc.sources()]
    return [Extension("sparsekern._cuda", sources, optional=optional)]


class BuildExt(build_ext):
    """build_ext that sends _cuda through nvcc, which setuptools' compilers do not know."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension module."""
        if ext.name != "sparsekern._cuda":
            super().build_extension(ext)
            return
        compiler = find_nvcc()
        assert compiler is not None, "cuda_extensions() lists _cuda only where nvcc was found"
        try:
            objects = nvcc.compile_all(compiler, nvcc.architectures())
            nvcc.link(compiler, objects, Path(self.get_ext_fullpath(ext.name)))
        except (OSError, subprocess.CalledProcessError) as error:
            if not ext.optional:
                raise SystemExit(f"SPARSEKERN_BUILD_CUDA=1 but the CUDA kernels could not be built: {error}") from error
            print(
                f"sparsekern: the CUDA kernels could not be built and are left out ({error}). "
                "SPARSEKERN_BUILD_CUDA=1 makes this an error, SPARSEKERN_BUILD_CUDA=0 does not try.",
                file=sys.stderr,
            )


ParallelCompile("SPARSEKERN_BUILD_JOBS").install()  # by default a job for each core
setup(ext_modules=[native_extension(), *cuda_extensions()], cmdclass={"build_ext": BuildExt})

"""The emulator, through its C++ tests (tests/native/cuda) and the module that the Python tests use."""

import os
import subprocess


def test_kernels_in_cpp(emulator_build):
    """All of tests/native/cuda; `make sanitize` runs it under the sanitizers."""
    done = subprocess.run([emulator_build.driver()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_module_says_what_it_is(emulated):
    assert emulated.device_info() == {"architectures": [], "nvcc": "none", "runtime": "emulator", "driver": "emulator"}
    assert issubclass(emulated.CudaError, RuntimeError)
    assert emulated.CudaError.__name__ == "CudaError"


def test_nothing_is_built_twice(emulator_build):
    """What tests start with is there at once, and a touched file is no changed one."""
    module = emulator_build.module()
    made = module.stat().st_mtime_ns
    os.utime(module.parent / "emulator.o")
    assert emulator_build.module().stat().st_mtime_ns == made

"""The emulator, through its C++ tests (tests/native/cuda) and the module that the Python tests use."""

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


def test_objects_are_made_again_when_a_file_changes(emulator_build, tmp_path):
    """When its contents do: a new checkout has new times."""
    build = type(emulator_build)(emulator_build.compiler, tmp_path)
    source, header = tmp_path / "probe.cpp", tmp_path / "a header.h"
    source.write_text('#include "a header.h"\nint number() { return NUMBER; }\n')
    made = []
    for number in (1, 1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        made.append(build.object(source).stat().st_mtime_ns)
    assert made[0] == made[1] != made[2]

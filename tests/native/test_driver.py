"""The C++ driver of this folder at -O3: under the sanitizers of `make sanitize` the loops are not vectorized."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kernels_as_optimized(tmp_path, compiler):
    sources = [*ROOT.glob("csrc/cpu/*.cpp"), *Path(__file__).parent.glob("*.cpp")]
    flags = ["-std=c++17", "-O3", "-fopenmp-simd", "-ffp-contract=fast", f"-I{ROOT / 'csrc'}"]
    libraries = ["-pthread", "-ldl"] if sys.platform == "linux" else ["-pthread"]
    driver = tmp_path / "driver"
    build = [*compiler, *flags, *map(str, sorted(sources)), "-o", str(driver), *libraries]
    for command in (build, [str(driver)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

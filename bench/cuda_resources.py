"""Registers, stack, instructions and shared memory of every CUDA C++ kernel: no GPU is needed.

``python -m sparsekern.bench.cuda_resources`` compiles the sources of a clone as the package's build does, with whose
objects it shares a cache, and reads the machine code. What launches ask for it records from the compiled module, on
tensors without storage, at the shapes of the GPU benchmark. Both tables stand in ``docs/kernels.md``. It needs nvcc,
and cuobjdump from the CUDA toolkit or from Triton's wheel. It exits with 1 where the compiler complains, registers are
spilled, a kernel has lost the instructions that it is written for, or a launch wants more shared memory than there is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from sparsekern.bench.resources import CASES, MOST_SHARED, Shape, empty

CSRC = Path(__file__).resolve().parents[1] / "csrc"

SHOWN = {
    "HGMMA": r"HGMMA\.",
    "QGMMA": r"QGMMA\.",
    "HMMA": r"HMMA\.",
    "TMA": r"UTMALDG\.",
    "load 128": r"LDG\.E\.(?:\w+\.)*128",
    "store 128": r"STG\.E\.(?:\w+\.)*128",
    "async copy": r"LDGSTS\.",
}
"""Instructions by the names that the table gives them: matrix products, bulk tensor copies, 16 bytes at a time."""

_SPILLS = r"(?:LDL|STL)[. ]"

_WIDE = ("load 128",)
WRITTEN_FOR: dict[tuple[str, str], tuple[str, ...]] = {
    ("by_latent", "80"): (),
    ("by_latent", "90a"): (),
    ("candidates", "80"): _WIDE,
    ("candidates", "90a"): _WIDE,
    ("row_adam", "80"): ("load 128", "store 128"),
    ("row_adam", "90a"): ("load 128", "store 128"),
    ("row_topk", "80"): _WIDE,
    ("row_topk", "90a"): _WIDE,
    ("screen", "80"): _WIDE,
    ("screen", "90a"): ("HGMMA", "QGMMA", "TMA"),
}
"""What the kernels of a source are to have on an architecture, in one variant at least. Every source is here."""


class Kernel(NamedTuple):
    """One instance of a kernel on one architecture.

    Attributes
    ----------
    source, name : str
        Name of its file, and its own, without template arguments.
    arch : str
        Such as ``"90a"``.
    registers, stack : int
        Registers and bytes of stack a thread. Shared memory is what a :class:`Launch` asks for.
    spills : int
        Instructions that read or write the stack.
    instructions : dict[str, int]
        How many there are of :data:`SHOWN`.
    """

    source: str
    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    instructions: dict[str, int]


def why_not() -> str | None:
    """Why nothing can be compiled or read here; None where it can."""
    if not (CSRC / "nvcc.py").exists():
        return "the sources are not here: run it in a clone of the repository"
    if _nvcc().find() is None:
        return "nvcc is neither on the PATH nor in CUDA_HOME/bin"
    return None if _cuobjdump() else "cuobjdump is neither beside nvcc nor in Triton's wheel"


def _nvcc() -> ModuleType:
    """``csrc/nvcc.py``, which knows how the kernels are compiled."""
    spec = importlib.util.spec_from_file_location("nvcc", CSRC / "nvcc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=bundled) if bundled else None)


def measure() -> tuple[list[Kernel], list[str]]:
    """Every kernel of every source, and what the compiler complained of."""
    nvcc = _nvcc()
    objects = nvcc.compile_all(nvcc.find(), nvcc.architectures())
    kernels = [kernel for one in objects for kernel in read(one.source.stem, one.file)]
    return kernels, [f"{one.source.name}: {line}" for one in objects for line in one.complaints]


def read(source: str, file: Path) -> Iterator[Kernel]:
    """The kernels of an object file."""
    tool = _cuobjdump()
    assert tool is not None, "why_not() was asked"

    def output(what: str) -> str:
        return subprocess.run([tool, what, str(file)], capture_output=True, text=True, check=True).stdout

    used = {
        (arch, name): [int(number) for number in numbers]
        for arch, name, *numbers in _by_arch(output("-res-usage"), r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
    }
    code: dict[tuple[str, str], str] = {}
    for arch, name, text in _by_arch(output("-sass"), r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)"):
        code[arch, name] = text
    for (arch, name), (registers, stack) in used.items():
        text = code[arch, name]
        found = {label: len(re.findall(pattern, text)) for label, pattern in SHOWN.items()}
        yield Kernel(source, _plain(name), arch, registers, stack, len(re.findall(_SPILLS, text)), found)


def _by_arch(text: str, pattern: str) -> Iterator[tuple[str, ...]]:
    """Matches of a pattern in the parts of a dump, each behind the architecture of its part."""
    parts = re.split(r"^arch = sm_(\w+)$", text, flags=re.MULTILINE)
    for arch, part in zip(parts[1::2], parts[2::2], strict=True):
        for match in re.finditer(pattern, part, re.DOTALL):
            yield (arch, *match.groups())


def _plain(mangled: str) -> str:
    """The bare name of a kernel: the last of the names that the mangled one is nested in."""
    names, rest = [], mangled.removeprefix("_Z").removeprefix("N")
    while length := re.match(r"\d+", rest):
        begin, end = length.end(), length.end() + int(length.group())
        names.append(rest[begin:end])
        rest = rest[end:]
    return names[-1] if names else mangled


class Launch(NamedTuple):
    """One launch: threads and bytes of shared memory of a block, blocks of a cluster."""

    name: str
    blocks: int
    threads: int
    shared: int
    cluster: int


def launches(module: Any, shape: Shape) -> list[Launch]:
    """What `module`, the compiled one or the emulated one, would launch for a step at `shape` and the other calls.

    Tensors without storage have no address, as operands that are left out have none: what is launched for these alone,
    ``copy_row``, is not there. It takes as much as ``row_adam``.
    """
    from sparsekern.backends import cuda
    from sparsekern.backends.cuda import _library, encode
    from sparsekern.backends.screening import Quantized
    from sparsekern.factors import OuterProducts

    rows, d, n, k = shape

    def calls() -> None:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias = empty(rows, d, dtype=dtype), empty(n, d, dtype=dtype), empty(n, dtype=dtype)
            for path in ("fused", "chunked"):
                cuda.topk_encode(x, weight, bias, k, "auto", path)
        x, weight = empty(rows, d), empty(n, d)
        cuda.topk_encode(x, weight, None, k, "fp8")
        experts = empty(256, 1, dtype=torch.int32)  # no more: slots of a part of the tokens need numbers, to be sorted
        call: Any = (256, 1, 8, d, n // 8, k, torch.float32, "auto", (9, 0))
        if n % 8 == 0 and k <= n // 8 and encode.routed_plan(*call, has_copy=False, per_expert=False) is not None:
            routed = (experts, experts.flatten(), empty(9, dtype=torch.int32))
            cuda.routed_topk_encode(x[:256], weight, None, *routed, k, False, "auto")
        part = OuterProducts(empty(rows, k), empty(rows, k, dtype=torch.int32), x)
        entries = OuterProducts(empty(rows * k), empty(rows * k, dtype=torch.int32), x, empty(rows + 1).long())
        for parts in ([part], [part, entries], [part] * 5):
            factors = cuda.SortedFactors(parts, n)
            clip = cuda.clip_factor([(factors, weight, True), (factors, weight, False)], empty(), 1.0)
            for unit_rows, rounded in ((True, None), (False, torch.float16), (False, torch.float8_e4m3fn)):
                copy = None if rounded is None else Quantized(weight, encode.cast_rows(weight, rounded))
                state = {"step": empty(), "exp_avg": weight, "exp_avg_sq": weight}
                options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "clip": clip, "copy": copy}
                cuda.row_adam(factors, weight, unit_rows, state, **options, finite=empty(dtype=torch.bool))
        cuda.row_topk(empty(rows, n), min(k, 1024))

    with _library.emulating(module):
        return [Launch(*one) for one in module.record_launches(calls)]


def launch_table(found: Sequence[Launch]) -> str:
    """Markdown: for each launch by name the most threads, shared memory and blocks of a cluster."""
    lines = ["| launch | threads | shared memory, B | cluster |", "|---|---|---|---|"]
    groups: dict[str, list[Launch]] = {}
    for one in found:
        groups.setdefault(one.name, []).append(one)
    for name, ones in sorted(groups.items()):
        threads, shared, cluster = (
            max(getattr(one, what) for one in ones) for what in ("threads", "shared", "cluster")
        )
        lines.append(f"| `{name}` | {threads} | {shared:,} | {cluster} |")
    return "\n".join(lines)


def launch_problems(found: Sequence[Launch]) -> list[str]:
    """Launches that want more than a block can have: of the screen on sm_90, of the others on sm_80 too."""
    return [
        f"{one.name} wants {one.shared} bytes of shared memory of {most}"
        for one in dict.fromkeys(found)
        for most in [MOST_SHARED[90 if one.name == "screen" else 80]]
        if one.shared > most
    ]


def problems(kernels: Sequence[Kernel]) -> list[str]:
    """What is out of bounds."""
    found = []
    for one in kernels:
        if one.stack or one.spills:
            found.append(
                f"{one.source}.cu: {one.name} on sm_{one.arch} has {one.stack} bytes of stack and {one.spills} "
                "instructions that use it"
            )
    for (source, arch), wanted in WRITTEN_FOR.items():
        of = [one for one in kernels if (one.source, one.arch) == (source, arch)]
        missing = [label for label in wanted if not any(one.instructions[label] for one in of)]
        found += [f"{source}.cu: no kernel on sm_{arch} has {label}" for label in missing if of]
    return found


def table(kernels: Sequence[Kernel]) -> str:
    """Markdown: for each kernel and architecture the largest numbers over its variants."""
    lines = [
        "| kernel | sm | variants | registers | stack, B | instructions |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for one in kernels:
        groups.setdefault((one.source, one.name, one.arch), []).append(one)
    for (source, name, arch), ones in sorted(groups.items()):
        most = {what: max(getattr(one, what) for one in ones) for what in ("registers", "stack")}
        seen: Counter[str] = Counter()
        for one in ones:
            seen |= Counter(one.instructions)
        shown = ", ".join(f"{label} × {seen[label]}" for label in SHOWN if seen[label])
        numbers = f"{most['registers']} | {most['stack']}"
        lines.append(f"| `{source}.cu` `{name}` | {arch} | {len(ones)} | {numbers} | {shown} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsekern.bench.cuda_resources", description=__doc__.splitlines()[0]
    )
    parser.parse_args(arguments)
    reason = why_not()
    if reason is not None:
        parser.error(reason)
    kernels, complaints = measure()
    print(table(kernels))
    found = problems(kernels)
    try:
        module = importlib.import_module("sparsekern._cuda")
    except ImportError as error:
        found.append(f"no launches were recorded, since the package was built without the CUDA kernels: {error}")
    else:
        launched = [one for shape in CASES.values() for one in launches(module, shape)]
        print(f"\n{launch_table(launched)}")
        found += launch_problems(launched)
    for line in (*complaints, *found):
        print(line, file=sys.stderr)
    return 1 if complaints or found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Registers, stack and shared memory of every Triton kernel, compiled ahead of time: no GPU is needed.

``python -m sparsekern.bench.resources`` runs the backend on tensors without storage, records what it would launch at
the shapes of :data:`CASES`, compiles each distinct launch for sm_80 and sm_90, and prints the table of
``docs/kernels.md``. It exits with 1 where a kernel is beyond its bounds.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.bench.gpu import SHAPES

ARCHS = (80, 89, 90)
MOST_STACK = 64
"""Bytes of stack a thread, at most: registers spilled. ``_repair`` leaves a few words there, at half of the
registers, ``_select`` on sm_80, and ``_gate`` on sm_90."""
MOST_SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block can have."""


class Kernel(NamedTuple):
    """One kernel as it would be compiled: all that its machine code depends on.

    Attributes
    ----------
    module, name : str
        Where it is.
    types : tuple of str
        Of the arguments, as Triton names them; ``"constexpr"`` for those that are compiled in.
    aligned : tuple of bool
        Whether each argument is known to be a multiple of 16.
    constants : tuple of (str, value)
        The arguments that are compiled in.
    num_warps, num_stages : int
    """

    module: str
    name: str
    types: tuple[str, ...]
    aligned: tuple[bool, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int


class Resources(NamedTuple):
    """What a kernel takes on one architecture: registers and stack (bytes) a thread, shared memory (bytes) a block."""

    kernel: Kernel
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_cores: str

    def problems(self) -> list[str]:
        """Which bounds it breaks."""
        found = []
        if self.stack > MOST_STACK:
            found.append(f"has {self.stack} bytes of stack a thread, more than {MOST_STACK}")
        if self.shared > MOST_SHARED[self.arch]:
            found.append(f"wants {self.shared} bytes of shared memory of {MOST_SHARED[self.arch]}")
        return found


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def describe(launch: Any) -> Kernel:
    """The kernel of a recorded launch, specialized as Triton does: by dtype, ``None``, 1 and multiples of 16."""
    function = launch.kernel
    kept = set(function.do_not_specialize or ())
    types, aligned, constants = [], [], list(launch.constants.items())
    for name, value in zip(function.arg_names, launch.args, strict=False):
        if isinstance(value, Tensor):
            types.append(_POINTERS[value.dtype])
            aligned.append(value.storage_offset() * value.element_size() % 16 == 0)
        elif value is None or (value == 1 and name not in kept and isinstance(value, int)):
            types.append("constexpr")
            aligned.append(False)
            constants.append((name, value))
        elif isinstance(value, float):
            types.append("fp32")
            aligned.append(False)
        else:
            types.append("i32" if -(2**31) <= value < 2**31 else "i64")
            aligned.append(value % 16 == 0 and name not in kept)
    return Kernel(
        function.fn.__module__, function.fn.__name__, tuple(types), tuple(aligned), tuple(constants), **launch.options
    )


def source(kernel: Kernel) -> Any:
    """What Triton compiles `kernel` from, an ``ASTSource``."""
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel.module), kernel.name)
    names = function.arg_names
    types = dict(zip(names, kernel.types, strict=False))
    constants = dict(kernel.constants)
    return ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, yes in enumerate(kernel.aligned) if yes},
    )


def compile_kernel(kernel: Kernel, arch: int) -> Any:
    """The compiled kernel, with its intermediate forms in ``asm``."""
    import triton
    from triton.backends.compiler import GPUTarget

    from sparsekern.backends.triton._launch import FUSION

    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, **FUSION}
    return triton.compile(source(kernel), target=GPUTarget("cuda", arch, 32), options=options)


def measure(kernel: Kernel, arch: int) -> Resources:
    """Compile `kernel` and read what it takes off the machine code."""
    import triton

    compiled = compile_kernel(kernel, arch)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources for {kernel.name}: {text!r}")
    cores = re.search(r"(wgmma\.mma_async|mma\.sync)\.\S+", compiled.asm["ptx"])
    name = "" if cores is None else cores.group(1).split(".")[0]
    return Resources(kernel, arch, int(found.group(1)), int(found.group(2)), compiled.metadata.shared, name)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


Shape = tuple[int, int, int, int]

CASES: dict[str, Shape] = {
    **SHAPES,
    "small": (96, 50, 1000, 7),
    "AuxK": (8192, 768, 8192, 384),
}
"""The shapes whose launches are compiled: those of the GPU benchmark, an odd small one, and one of AuxK."""

ROUTINGS = ((8, 1), (32, 2), (128, 2), (200, 1), (512, 2))
"""Experts, and how many of them a token has, that routers and routed encoders are compiled for."""

ROUTED = ("F", "A", "small")
"""The cases that these are compiled at."""

GROUPS = (32, 64, 250)
"""Groups of latents of which each token keeps the best one (``GroupMax``), where they divide the latents."""


def launches(shape: Shape, arch: int) -> list[Any]:
    """Every launch of one training step at `shape` on one architecture, and of the other ways to encode."""
    from sparsekern.backends import triton
    from sparsekern.backends.triton import _launch, csr_encode, encode, plans
    from sparsekern.factors import OuterProducts

    rows, d, n, k = shape
    plans.assumed_capability = divmod(arch, 10)
    with _launch.recording() as found:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, weight, bias = empty(rows, d, dtype=dtype), empty(n, d, dtype=dtype), empty(n, dtype=dtype)
            for path in ("fused", "chunked"):
                triton.topk_encode(x, weight, bias, k, "auto", path)
            if dtype == torch.float16:
                continue  # the products differ by the width of a number, not by its kind
            values, indices = empty(rows, k, dtype=dtype), empty(rows, k, dtype=torch.int32)
            triton.sparse_decode(values, indices, weight, x[0])
            triton.sparse_decode(values, indices, weight, None)
            triton.gather_dot(x, indices, weight)
            triton.scatter_outer(values, indices, x, n)
            triton.weighted_row_sum(bias, weight)
            if dtype != torch.float32:
                continue
            triton.topk_encode(x, weight, None, k, "auto")
            triton.topk_encode(x, weight, bias, k, "none")
            for absolute in (False, True):
                triton.topk_encode(x[:512], weight, bias, k, "auto", absolute=absolute)
                triton.topk_encode(x, weight, bias, k, "bf16", absolute=absolute)
                if arch >= 89:
                    triton.topk_encode(x, weight, bias, k, "fp8", absolute=absolute)
            for path in ("fused", "chunked"):
                triton.topk_encode(x, weight, bias, k, "auto", path, absolute=True)
            triton.scatter_outer(values, indices, x[:, :1], n)
            crow, col = empty(rows + 1, dtype=torch.int64), empty(rows * k, dtype=torch.int32)
            triton.csr_decode(values.flatten(), crow, col, weight, None)
            triton.csr_gather_dot(x, crow, col, weight)
            triton.csr_scatter_outer(values.flatten(), crow, col, x, n)
            csr_encode.entries(empty(rows, -(-n // 32), dtype=torch.int32), crow, col)
            plan = plans.encode_plan(rows, d, n, k, dtype, "auto", (9, 0), has_copy=False, path="chunked")
            if plan is not None:
                screened = encode.screen_operands(x, weight, bias, plan, None)
                for threshold in (empty(n), empty()):
                    csr_encode.mark(x[:256], weight, bias, threshold, screened, slice(0, 256))
        weight, grad = empty(n, d), empty(rows, d)
        part = OuterProducts(empty(rows, k), empty(rows, k, dtype=torch.int32), grad)
        entries = OuterProducts(empty(rows * k), empty(rows * k, dtype=torch.int32), grad, empty(rows + 1).long())
        for parts in ([part], [part, part], [entries], [part, entries]):
            factors = triton.SortedFactors(parts, n)
            clip = triton.clip_factor([(factors, weight, True), (factors, weight, False)], empty(), 1.0)
            dtypes = (encode.SCREEN_DTYPE, torch.bfloat16, torch.float8_e4m3fn)[: 2 + (arch >= 89)]
            copies = [encode.Quantized(weight, encode.cast_rows(weight, dtype)) for dtype in dtypes]
            for unit_rows, copy in ((True, None), *((False, copy) for copy in copies)):
                state = {"step": empty(), "exp_avg": weight, "exp_avg_sq": weight}
                options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "clip": clip, "copy": copy}
                triton.row_adam(factors, weight, unit_rows, state, **options, finite=empty(dtype=torch.bool))
        bit_launches(rows, n, k)
    return found


def bit_launches(rows: int, n: int, k: int) -> None:
    """Launch the kernels of bits and pairs: codes of n bits, and the pairs of n latents."""
    from sparsekern.backends.triton import bits

    codes = empty(rows, -(-n // 8), dtype=torch.uint8)
    for metric in ("hamming", "jaccard"):
        bits.bit_distances(codes, codes, metric)
    entry, col = empty(rows * k, dtype=torch.int64), empty(rows * k, dtype=torch.int32)
    bits.count_pairs(entry, entry.clone(), col, empty(max(1, bits.COUNT_BYTES // (4 * n)), n, dtype=torch.int32), 0, k)


def routed_launches(shape: Shape, routing: tuple[int, int], arch: int) -> list[Any]:
    """Every launch of one router, and of the encoders behind it, at `shape` on one architecture."""
    from sparsekern.backends import triton
    from sparsekern.backends.triton import _launch, plans

    (rows, d, n, k), (n_experts, n_active) = shape, routing
    plans.assumed_capability = divmod(arch, 10)
    with _launch.recording() as found:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, weight, bias = empty(rows, d, dtype=dtype), empty(n, d, dtype=dtype), empty(n, dtype=dtype)
            _, _, experts, *_ = triton.route(x, weight[:n_experts], bias[:n_experts], n_active, "softmax")
            if dtype == torch.float32:
                triton.route(x, weight[:n_experts], None, n_active, "sigmoid")
            if n % n_experts or k > n // n_experts:
                continue
            routed = (experts, *triton.group_slots(experts, n_experts))
            triton.routed_topk_encode(x, weight, bias, *routed, k, False, "auto")
            if dtype == torch.float32:
                triton.routed_topk_encode(x, weight, bias, *routed, k, False, "none")
                triton.routed_topk_encode(x, weight, None, *routed, k, True, "auto")
    return found


def group_launches(shape: Shape, groups: int, arch: int) -> list[Any]:
    """Every launch of the encoder that keeps the best latent of each group, at `shape` on one architecture."""
    from sparsekern.backends import triton
    from sparsekern.backends.triton import _launch, plans

    rows, d, n, _ = shape
    plans.assumed_capability = divmod(arch, 10)
    experts = empty(rows, groups, dtype=torch.int32)
    every = (experts, experts.flatten(), empty(groups + 1, dtype=torch.int32))
    with _launch.recording() as found:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias = empty(rows, d, dtype=dtype), empty(n, d, dtype=dtype), empty(n, dtype=dtype)
            if n % groups == 0:
                triton.routed_topk_encode(x, weight, bias, *every, 1, True, "auto")
    return found


def jobs(cases: Sequence[str]) -> list[tuple[Kernel, int]]:
    """The distinct kernels of some cases, with the architecture that they would be compiled for."""
    found: dict[tuple[Kernel, int], None] = {}
    for arch in ARCHS:
        for case in cases:
            shape, is_routed = CASES[case], case in ROUTED
            routed = [one for routing in ROUTINGS if is_routed for one in routed_launches(shape, routing, arch)]
            grouped = [one for groups in GROUPS if is_routed for one in group_launches(shape, groups, arch)]
            for launch in (*launches(shape, arch), *routed, *grouped):
                kernel = describe(launch)
                # sm_89 is compiled for what it has and sm_80 has not.
                if arch != 89 or "*fp8e4nv" in kernel.types:
                    found[kernel, arch] = None
    return list(found)


def covering(jobs: Sequence[tuple[Kernel, int]]) -> list[tuple[Kernel, int]]:
    """Some of `jobs` in which everything occurs that does in all of them, on each architecture.

    That is each dtype and alignment of an argument, constant and option of a kernel, though not each combination: most
    of what breaks a bound is one of them, and all combinations take minutes.
    """
    left: dict[tuple[str, str, int], dict[tuple[Kernel, int], set[Any]]] = {}
    for kernel, arch in jobs:
        has = {*enumerate(zip(kernel.types, kernel.aligned, strict=True)), *kernel.constants}
        has |= {("warps", kernel.num_warps), ("stages", kernel.num_stages)}
        left.setdefault((kernel.module, kernel.name, arch), {})[kernel, arch] = has
    chosen = []
    for variants in left.values():
        wanted = set().union(*variants.values())
        while wanted:
            best = max(variants, key=lambda job: len(variants[job] & wanted))
            wanted -= variants[best]
            chosen.append(best)
    return chosen


def _job(job: tuple[Kernel, int]) -> Resources:
    return measure(*job)


def table(measured: Sequence[Resources]) -> str:
    """Markdown: for each kernel and architecture the largest registers, stack and shared memory over its variants."""
    lines = [
        "| kernel | sm | variants | registers | stack, B | shared memory, B | tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int], list[Resources]] = {}
    for one in measured:
        groups.setdefault((one.kernel.name, one.arch), []).append(one)
    for (name, arch), ones in sorted(groups.items()):
        cores = ", ".join(sorted({one.tensor_cores for one in ones} - {""}))
        registers, stack, shared = (
            max(getattr(one, what) for one in ones) for what in ("registers", "stack", "shared")
        )
        lines.append(f"| `{name}` | {arch} | {len(ones)} | {registers} | {stack} | {shared:,} | {cores} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m sparsekern.bench.resources", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="shapes to compile for; default all"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument(
        "--covering", action="store_true", help="only as many variants as it takes to have every property once"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 keeps Triton from compiling; unset it")
    chosen = jobs(options.cases)
    with ProcessPoolExecutor(options.jobs) as pool:
        measured = list(pool.map(_job, covering(chosen) if options.covering else chosen, chunksize=4))
    print(table(measured))
    broken = [(one, problem) for one in measured for problem in one.problems()]
    for one, problem in broken:
        print(f"{one.kernel.name} on sm_{one.arch} {problem}: {one.kernel}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time: no GPU is needed.

``python -m sparsekern.bench.resources`` runs the backend on tensors without storage, records what it would launch at
the shapes of :data:`CASES`, compiles each distinct launch for sm_80 and sm_90, and prints the table of
``docs/kernels.md``. It exits with 1 where a kernel is beyond its bounds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ARCHS = (80, 90)
MOST_SPILLED = 0
"""Bytes of registers spilled to memory by a thread, at most."""
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}
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
    """What a kernel takes on one architecture: registers and spilled bytes a thread, bytes of shared memory a block."""

    kernel: Kernel
    arch: int
    registers: int
    spilled: int
    shared: int
    tensor_cores: str

    def problems(self) -> list[str]:
        """Which bounds it breaks."""
        found = []
        if self.spilled > MOST_SPILLED:
            found.append(f"spills {self.spilled} bytes a thread")
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


def compile_kernel(kernel: Kernel, arch: int) -> Any:
    """The compiled kernel, with its intermediate forms in ``asm``."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel.module), kernel.name)
    names = function.arg_names
    types = dict(zip(names, kernel.types, strict=False))
    constants = dict(kernel.constants)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, yes in enumerate(kernel.aligned) if yes},
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


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

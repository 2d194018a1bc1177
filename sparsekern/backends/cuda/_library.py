"""The extension modules that hold the CUDA C++ kernels, and whether one can be used here.

``sparsekern._cuda`` is what nvcc makes of ``csrc/cuda``; its functions take addresses, sizes, strides and a stream. Of
the same sources and an emulator of CUDA any C++ compiler makes a module with the same functions, for tensors on the
CPU. Nothing but :func:`emulating` brings that one into use: it is made for tests, and thousands of times slower.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_emulated: ModuleType | None = None


@contextmanager
def emulating(module: ModuleType) -> Iterator[None]:
    """Within this context `module`, an emulated build of the kernels, serves tensors on the CPU."""
    global _emulated
    if _emulated is not None:
        raise RuntimeError("the kernels are already being emulated")
    _emulated = module
    try:
        yield
    finally:
        _emulated = None


def emulated() -> bool:
    """Whether tensors on the CPU are served, by the emulator."""
    return _emulated is not None


def module_for(tensor: Tensor) -> Any:
    """The module whose kernels read and write memory such as that of `tensor`; they run on its device.

    Raises
    ------
    RuntimeError
        If there is none: ``unavailable`` of the backend was not asked.
    """
    if tensor.device.type != "cuda":
        if _emulated is None:
            raise RuntimeError(f"the CUDA kernels serve cuda tensors, not {tensor.device.type}")
        return _emulated
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"the CUDA kernels are {reason}")
    return module if tensor.device.index == torch.cuda.current_device() else _OnDevice(module, tensor.device)


def stream_of(tensor: Tensor) -> int:
    """Handle of the stream that work on the device of `tensor` goes to now; 0 in the emulator."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


class _OnDevice:
    """The functions of a module with another device made the current one around each call."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        self._module, self._device = module, device

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with torch.cuda.device(self._device):
                return function(*arguments, **options)

        return call


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None with the reason."""
    try:
        return importlib.import_module("sparsekern._cuda"), ""
    except ImportError as error:  # no nvcc at install time, or a binary that this system cannot load
        return None, f"not built ({error})"


def info() -> dict[str, Any] | None:
    """What the compiled module says of itself, its runtime and the driver; None where it is not built."""
    module = _load()[0]
    return None if module is None else module.device_info()


def path() -> Path:
    """The file of the compiled module, which there must be."""
    module, reason = _load()
    if module is None or module.__file__ is None:
        raise RuntimeError(f"the CUDA kernels are {reason}")
    return Path(module.__file__)


def architectures() -> tuple[str, ...]:
    """What the module was compiled for, such as ``("80", "90a")``; none where it is not built."""
    found = info()
    return () if found is None else tuple(found["architectures"])


def built(device: torch.device | None = None) -> str | None:
    """Why the kernels are missing, or cannot run on `device` (by default the current one); None where they can."""
    module, reason = _load()
    if module is None:
        return reason
    if not torch.cuda.is_available():
        return f"built for sm_{', sm_'.join(architectures())}, but torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if not any(runs_on(architecture, capability) for architecture in architectures()):
        return (
            f"not built for this device (sm_{capability[0]}{capability[1]}): compiled for "
            f"sm_{', sm_'.join(architectures())}; SPARSEKERN_CUDA_ARCHS names others at install time"
        )
    return None


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architecture` runs at `capability`: the same major version, and no older minor one.

    What is made for one chip, as 90a is, runs on that chip alone.
    """
    major, minor = divmod(int(architecture.rstrip("af")), 10)
    if architecture.endswith("a"):
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]

import importlib.util
import os
import shutil
import signal
import subprocess

# The tests are tiny: where cores are shared, a team of threads mostly waits for its members. Also for subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

# Triton reads this when it is imported, and torch imports it late.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sparsekern.backends import cpu

# Timings on shared machines vary: a slow example is no failure.
settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _fixed_state(monkeypatch):
    """Every test starts from the same random state and its own choice of backend."""
    torch.manual_seed(0)
    monkeypatch.delenv("SPARSEKERN_BACKEND", raising=False)


@pytest.fixture(params=["reference", "cpu"])
def product_backend(request, monkeypatch):
    """Runs a test of the sparse products once for each backend that this machine has."""
    if request.param == "cpu" and cpu.isa() is None:
        if os.environ.get("CI"):
            pytest.fail("the native kernels must be built in CI")
        pytest.skip("the native kernels are not built")
    monkeypatch.setenv("SPARSEKERN_BACKEND", request.param)
    return request.param


@pytest.fixture
def triton_device(monkeypatch):
    """Where Triton's kernels run: on the GPU, or in Triton's interpreter on the CPU. Nothing else may serve."""
    if importlib.util.find_spec("triton") is None:
        if os.environ.get("CI"):
            pytest.fail("triton must be installed in CI")
        pytest.skip("triton is not installed")
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_memory():
    """Memory that nobody wrote holds NaN, or the largest whole number."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def interruptible():
    """Starts a process that heeds Ctrl-C, also where the tests themselves run in the background of a shell.

    Such a shell has the signal ignored, children inherit that, and Python then installs no handler.
    """

    def start(command, **options):
        return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)

    return start


@pytest.fixture(scope="session")
def compiler():
    """The command of the C++ compiler."""
    command = os.environ.get("CXX", "").split() or [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]
    if shutil.which(command[0]) is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have a C++ compiler")
        pytest.skip(f"no C++ compiler: {command[0]} is not on the PATH (set CXX)")
    return command


@pytest.fixture
def no_waiting():
    """A context that refuses what would wait for a device."""
    return NoWaiting


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device, also inside the ops of this package."""

    waits = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "lift_fresh")
    waits += ("unique_dim", "_unique", "_unique2", "unique_consecutive")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "sparsekern":
            with self:
                return torch._library.custom_ops.OPDEFS[f"sparsekern::{name}"]._init_fn(*args, **kwargs)
        masked = "index" in name and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for arg in args[1:]
            if isinstance(arg, list | tuple)
            for index in arg
        )
        sized = name != "repeat_interleave" or kwargs.get("output_size") is not None
        if name in self.waits or masked or not sized:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **kwargs)

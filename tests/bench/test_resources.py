"""Every Triton kernel compiles ahead of time for every architecture, within its bounds."""

import itertools
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from sparsekern.bench import resources


def report(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sparsekern.bench.resources", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_kernel_compiles_within_its_bounds_with_every_property_that_it_is_given():
    run = report("--cases", "F", "A", "small", "AuxK", "--covering")  # all variants take minutes
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines()[2:]]
    assert {row[1] for row in rows} == {"80", "89", "90"}
    cores = {(row[0], row[1]): row[6] for row in rows}
    assert cores["_screen", "80"] == cores["_screen", "89"] == "mma"
    assert cores["_screen", "90"] == "wgmma"
    kernels = {row[0] for row in rows}
    assert {"_screen", "_select", "_rescore", "_repair", "_take", "_decode", "_row_adam", "_mark", "_order"} <= kernels
    assert {"_gate", "_count_slots", "_order_slots"} <= kernels


def test_a_covering_has_every_property_of_every_kernel():
    kernels = [
        resources.Kernel("m", name, ("*fp32", size), (True, even), (("K", k), ("ON", on)), warps, 2)
        for name in ("one", "other")
        for size, even, k, on, warps in itertools.product(("i32", "i64"), (True, False), (1, 2, 3), (0, 1), (4, 8))
    ]
    jobs = [(kernel, arch) for kernel in kernels for arch in (80, 90)]
    chosen = resources.covering(jobs)
    assert set(chosen) <= set(jobs)
    assert len(chosen) < len(jobs) / 8

    def properties(some):
        return {
            (kernel.name, arch, *one)
            for kernel, arch in some
            for one in [
                *(("argument", i, *both) for i, both in enumerate(zip(kernel.types, kernel.aligned, strict=True))),
                *kernel.constants,
                ("warps", kernel.num_warps),
            ]
        }

    assert properties(chosen) == properties(jobs)


def test_the_interpreter_is_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "sparsekern.bench.resources", "--cases", "small"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "unset it" in run.stderr


def test_what_is_out_of_bounds_is_named():
    kernel = resources.Kernel("module", "name", (), (), (), 4, 2)
    assert resources.Resources(kernel, 90, 255, 0, 227 * 1024, "").problems() == []
    (stack,) = resources.Resources(kernel, 90, 255, 128, 0, "").problems()
    assert stack == "has 128 bytes of stack a thread, more than 64"
    (shared,) = resources.Resources(kernel, 89, 255, 0, 100 * 1024 + 1, "").problems()
    assert "wants 102401 bytes of shared memory" in shared

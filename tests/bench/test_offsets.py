"""The index arithmetic of the Triton kernels holds beyond 2**31 elements, and what does not is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from sparsekern.bench import offsets


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_offset_of_every_kernel_fits():
    report = run("-m", "sparsekern.bench.offsets")
    assert report.returncode == 0, report.stderr[-4000:]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in report.stdout.splitlines()[2:]]
    accesses, known, large, wide = ({row[0]: int(row[i]) for row in rows} for i in (2, 3, 4, 5))
    assert known == accesses
    assert min(accesses.values()) > 0
    assert wide == large
    within_bounds = {"_count", "_place", "_order", "_select", "_take", "_mark", "_bucket_panel"}
    within_bounds |= {"_count_slots", "_order_slots", "_count_pairs"}
    assert {name for name, number in large.items() if number == 0} == within_bounds
    assert {"_screen", "_rescore", "_repair", "_decode", "_gather_dot", "_sum_pieces", "_row_adam", "_gate"} <= set(
        large
    )


@pytest.fixture(scope="module")
def found():
    report = run(str(Path(__file__).with_name("offset_kernels.py")))
    assert report.returncode == 0, report.stderr[-4000:]
    return json.loads(report.stdout)


@pytest.mark.parametrize("name", ["right", "right_from_memory", "right_in_a_loop"])
def test_right_kernels_pass(found, name):
    report = found["kernels"][name]
    assert report["problems"] == []
    assert report["large"] == report["wide"] == 1
    assert report["farthest"] >= 2**32 - 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("product_in_32_bits", "0 to 4294963200 in 32 bits: %"),
        ("extended_too_late", "0 to 4294963200 in 32 bits: %"),
        ("product_of_what_was_read", "-4096 to 4294963200 in 32 bits: %"),
        ("nobody_knows", "an offset without bounds: tt.store"),
        ("never_far", "x is addressed by 32-bit offsets alone: tt.store"),
        ("sum_in_a_loop", "an offset without bounds: tt.store"),
        ("counts_past_the_end", "0 to 2147487742 in 32 bits: scf.for"),
    ],
)
def test_wrong_kernels_are_found(found, name, problem):
    problems = found["kernels"][name]["problems"]
    assert any(problem in one for one in problems), problems


def test_sums_over_latents_hold_up_to_the_most_entries_that_they_accept(found):
    assert set(found["most"]) == {"_count", "_place", "_order", "_scatter_outer"}
    assert [report["problems"] for report in found["most"].values()] == [[]] * 4
    assert {name for name, report in found["more"].items() if report["problems"]} == {"_order", "_scatter_outer"}


IR = """
module {
  tt.func public @kernel(%x: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x"(#loc)), %n: i32 loc("n"(#loc))) {
    %c7_i32 = arith.constant 7 : i32 loc(#loc1)
    %c-3_i32 = arith.constant -3 : i32 loc(#loc1)
    %0 = tt.get_program_id y : i32 loc(callsite(#loc1 at #loc2))
    %1 = arith.divsi %n, %c7_i32 : i32 loc("a name (of sorts)"(#loc1))
    %2 = arith.remsi %n, %c7_i32 : i32 loc(#loc1)
    %3 = arith.cmpi slt, %0, %n : i32 loc(#loc1)
    %4 = scf.if %3 -> (i32) {
      %6 = arith.muli %0, %c-3_i32 : i32 loc(#loc1)
      scf.yield %6 : i32 loc(#loc1)
    } else {
      %6 = arith.andi %5, %c7_i32 : i32 loc(#loc1)
      scf.yield %6 : i32 loc(#loc1)
    } loc(#loc1)
    %7 = "tt.reduce"(%8) <{axis = 0 : i32}> ({
    ^bb0(%6: i32 loc(unknown), %9: i32 loc(unknown)):
      %10 = arith.addi %6, %9 : i32 loc(#loc1)
      tt.reduce.return %10 : i32 loc(#loc1)
    }) : (tensor<16x32xi32>) -> tensor<32xi32> loc(#loc1)
    %11 = arith.addi %4, %2 : i32 loc(#loc1)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


def test_intervals():
    setting = offsets.Setting(((1, 1), (2, 5)), {"n": (-20, 30)}, {}, {})
    bounds = offsets.Bounds(setting)
    values = {value.text.split(" ")[0]: bounds.of(value) for value in offsets.parse(IR) if value.text.startswith("%")}
    assert values["%0"] == (0, 4)
    assert values["%1"] == (-2, 4)
    assert values["%2"] == (-6, 6)
    assert values["%7"] is None
    assert values["%11"] == (-18, 13)
    assert offsets.analyse("kernel", IR, setting).problems == ()
    huge = setting._replace(grid=((1, 1), (1, 2**16)))
    assert offsets.analyse("kernel", IR, huge).problems == ("axis 1 of the grid has 65536 programs",)


def test_the_interpreter_is_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "sparsekern.bench.offsets", "--cases", "W"]
    report = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert report.returncode == 2
    assert "unset it" in report.stderr

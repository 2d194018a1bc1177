"""The index arithmetic of every Triton kernel holds for tensors of more than 2**31 elements: by intervals, not by runs.

``python -m sparsekern.bench.offsets`` records what the backend would launch at the shapes of :data:`SHAPES` on tensors
without storage, lowers each distinct kernel to Triton's own IR, and bounds every integer in it from what a launch
fixes: its numbers, its grid, and what its integer tensors hold (:func:`contents`). Nothing is allocated or run.
It prints a table and exits with 1 where one of these can happen:

- a sum, difference, product or shift leaves its type, as a 32-bit product does that is extended afterwards, or the
  counter of a loop does;
- the offset of a load, store or atomic has no known bounds;
- a tensor of more than 2**31 elements is addressed by 32-bit offsets alone.

Bounds are those of all lanes and programs, and of each number for itself: ``i < n`` in a mask says nothing about ``i``.
So they err towards reporting, and no slack is taken off: arithmetic that a mask switches off has to fit as well, since
the mask is computed from it. ``tt.addptr`` extends every offset to 64 bits before it adds, so offsets that follow one
another fit one by one. Launches that differ in numbers only, like those of one chunk after the other, are taken
together, with bounds that hold for them all.

It does not show that an offset lies inside its tensor. Beyond 2**31 / 3 entries it cannot show that ``_sum_pieces``
stays within 32 bits, which rests on a piece not coming before the first one of its latent.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from sparsekern.bench.resources import (
    CASES,
    ROUTINGS,
    Kernel,
    Shape,
    describe,
    group_launches,
    launches,
    routed_launches,
    source,
)

ARCH = 90
GROUPS = 32
"""Of latents of which the best one is kept."""

LARGE = 2**31
"""Elements beyond which a 32-bit offset cannot reach."""

SHAPES: dict[str, Shape] = {
    "W": CASES["W"],
    "E": CASES["E"],
    "weights": (2**15, 4096, 2**22, 64),
    "tokens": (2**20, 4096, 65536, 64),
    "entries": (2**18, 768, 65536, 2048),
}
"""B, d, N, k. The last three are large in N·d and B·N / 32, in B·d, and in B·k, of which the pieces have
2·B·k·d / 128 elements."""

Interval = tuple[int, int]
"""The least and the greatest value, both included; None stands for unknown."""


class Setting(NamedTuple):
    """What the launches of one kernel fix: bounds of the grid, of numbers and of integers in tensors, sizes of tensors.

    `extents` are elements from the first to the last that a tensor has, which for strided ones is more than ``numel``.
    """

    grid: tuple[Interval, ...]
    numbers: dict[str, Interval]
    contents: dict[str, Interval]
    extents: dict[str, int]


def contents(shape: Shape) -> dict[str, Interval]:
    """Bounds of the integers that kernels read, by the name of the argument."""
    from sparsekern.backends.triton.products import SPLIT

    rows, _, n, k = shape
    entries, pieces = rows * k, 2 * rows * k // SPLIT
    latent, entry, place = (-1, n - 1), (0, entries - 1), (0, entries)
    found = {"start": place, "order": entry, "row_of": (0, rows - 1), "piece_start": (0, pieces)}
    found |= {f"other_{name}": bounds for name, bounds in found.items()}
    found |= {"indices": latent, "candidates": latent, "col": latent, "placed": entry, "cursor": place, "crow": place}
    found |= {"entry": entry, "stop": place}
    # Where a count stands for "too many" it is the largest number there is.
    return found | {"piece_latent": (0, n), "count": (0, 2**31 - 1), "repaired": (0, 1)}


def routed_contents(shape: Shape, routing: tuple[int, int]) -> dict[str, Interval]:
    """The same for what :func:`~sparsekern.bench.resources.routed_launches` launches."""
    (rows, *_), (n_experts, n_active) = shape, routing
    slots = rows * n_active
    found = contents(shape) | {"experts": (0, n_experts - 1), "order": (0, slots - 1)}
    # A tile has 16 slots at least; those that are not there say so by an expert that is not there either.
    found |= {"offsets": (0, slots), "first_tile": (0, slots // 16 + n_experts), "tile_expert": (0, n_experts)}
    return found | {"place": (0, slots)}


# The IR


@dataclass(eq=False)
class Value:
    """A value of the IR and what makes it, or an operation without a result."""

    op: str
    operands: list[Value] = field(default_factory=list)
    text: str = ""

    @property
    def bits(self) -> int:
        """Width of its integers, for a ``tt.addptr`` that of the offset; 0 where they are none."""
        found = re.search(r"i(\d+)>*$", self.text)
        return int(found[1]) if found else 0


@dataclass
class _Region:
    """An operation with regions while it is read: yields come at the end of each."""

    op: str
    results: list[Value]
    inputs: list[Value]
    arguments: list[Value]
    text: str
    yields: list[list[Value]] = field(default_factory=list)
    body: list[Value] = field(default_factory=list)

    def close(self, text: str) -> None:
        """Say what the results and the arguments of the regions are, now that all of it is read."""
        last = self.yields[-1] if self.yields else []
        if self.op == "scf.if" and len(self.yields) == 2:
            for result, yes, no in zip(self.results, *self.yields, strict=True):
                result.op, result.operands, result.text = "arith.select", [yes, yes, no], yes.text
        elif self.op == "scf.for":
            bounds = self.inputs[:3]
            self.arguments[0].op, self.arguments[0].operands = "induction", bounds
            carried = zip(self.results, self.arguments[1:], self.inputs[3:], last, strict=True)
            for result, argument, first, following in carried:
                argument.op, argument.operands, argument.text = "carried", [first, following, *bounds], first.text
                result.op, result.operands, result.text = "same", [argument], first.text
        elif self.op == "scf.while":
            before, passed, after = self.arguments[: len(self.inputs)], *self.yields
            for argument, first, following in zip(before, self.inputs, after, strict=True):
                argument.op, argument.operands, argument.text = "carried", [first, following], first.text
            for receiver, given in zip(self.arguments[len(before) :] + self.results, passed * 2, strict=True):
                receiver.op, receiver.operands, receiver.text = "same", [given], given.text
        elif self.op in ("tt.reduce", "tt.scan") and len(self.results) == 1 and len(self.body) == 2:
            self.results[0].op = f"{self.op} {self.body[0].op}"
            self.results[0].operands, self.results[0].text = self.inputs, self.text + text


_NAME = r"%[-\w.$]+(?:#\d+)?"
_LINE = re.compile(rf'(?:({_NAME})(?::(\d+))? = )?"?([a-z_]+\.[a-z_]+(?:\.[a-z]+)?)"?(.*)')


def parse(text: str) -> list[Value]:
    """Everything in the function that Triton's IR `text` has, in order. Names hold inside their region only."""
    values: list[Value] = []
    scopes: list[dict[str, Value]] = [{}]
    regions: list[_Region] = []

    def define(name: str, op: str = "unknown", operands: Sequence[Value] = (), text: str = "") -> Value:
        scopes[-1][name] = Value(op, list(operands), text)
        return scopes[-1][name]

    def seen(name: str) -> Value:
        return next((scope[name] for scope in reversed(scopes) if name in scope), Value("unknown"))

    for line in text.splitlines():
        line = re.sub(r"\s*loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)", "", line).strip()
        if line.startswith("}"):
            scopes.pop()
            if line.endswith("{"):
                scopes.append({})
            elif regions:
                regions.pop().close(line)
            continue
        if line.startswith("^"):
            regions[-1].arguments += [define(name) for name in re.findall(_NAME, line)]
            continue
        found = _LINE.match(line)
        if line.startswith("tt.func"):
            scopes.append({})
            for name, kind in re.findall(r"%(\w+): ([^\s,){]+)", line):
                values.append(define(f"%{name}", f"argument {name}", text=kind))
        elif found is not None:
            name, count, op, rest = found.groups()
            operands = [seen(operand) for operand in re.findall(_NAME, rest)]
            if not line.endswith("{"):
                value = define(name, op, operands, line) if name else Value(op, operands, line)
                values.append(value)
                if regions:
                    regions[-1].body.append(value)
                if op in ("scf.yield", "scf.condition"):
                    regions[-1].yields.append(operands[op == "scf.condition" :])
                continue
            names = [name] if not count else [f"{name}#{i}" for i in range(int(count))]
            results = [define(each, text=line) for each in names if name]
            pairs = re.findall(rf"({_NAME}) = ({_NAME})", rest)
            inputs = [seen(given) for _, given in pairs] or operands
            if op == "scf.for":
                inputs[1:1] = [seen(bound) for bound in re.findall(rf"(?:to|step) ({_NAME})", rest)]
            scopes.append({})
            arguments = [define(each, text=line.rstrip(" {")) for each, _ in pairs]
            regions.append(_Region(op, results, inputs, arguments, line))
            values += results + arguments
    return values


# Intervals


def _corners(function: Callable[[int, int], int]) -> Callable[[Interval, Interval], Interval]:
    """For a function of two integers that is monotonic in each."""

    def bounds(a: Interval, b: Interval) -> Interval:
        found = [function(x, y) for x in a for y in b]
        return min(found), max(found)

    return bounds


def _and(a: Interval, b: Interval) -> Interval | None:
    largest = [high for low, high in (a, b) if low >= 0]
    return (0, min(largest)) if largest else None


def _remainder(a: Interval, b: Interval) -> Interval | None:
    if b[0] <= 0:
        return None
    return max(a[0], 1 - b[1]) if a[0] < 0 else 0, min(max(a[1], 0), b[1] - 1)


_BINARY: dict[str, Callable[[Interval, Interval], Interval | None]] = {
    "addi": _corners(lambda x, y: x + y),
    "subi": _corners(lambda x, y: x - y),
    "muli": _corners(lambda x, y: x * y),
    "minsi": _corners(min),
    "maxsi": _corners(max),
    "andi": _and,
    "divsi": lambda a, b: _corners(lambda x, y: x // y if x >= 0 else -(-x // y))(a, b) if b[0] > 0 else None,
    "remsi": _remainder,
    "shli": lambda a, b: _corners(lambda x, y: x << y)(a, b) if b[0] >= 0 and b[1] < 64 else None,
    "shrsi": lambda a, b: _corners(lambda x, y: x >> y)(a, b) if b[0] >= 0 and b[1] < 64 else None,
}
_BOOL = {"true": "1", "false": "0"}
_ACCESSES = {"tt.load", "tt.store", "tt.atomic_rmw"}
_FOREIGN = ("tt.atomic_cas", "tt.call", "tt.descriptor", "tt.make_tensor", "tt.gather", "cf.")
"""What would have to be understood if it came up."""
_SAME = {"same", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.trunci"}


def _hull(a: Interval | None, b: Interval | None) -> Interval | None:
    return None if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))


class Bounds:
    """Intervals of the values of one kernel in one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._known: dict[Value, Interval | None] = {}

    def of(self, value: Value) -> Interval | None:
        """The interval of an integer, over all lanes and programs."""
        if value not in self._known:
            self._known[value] = None  # for whoever asks before it is found: what a loop carries
            found = self.unbounded(value)
            self._known[value] = found if found is None or _fits(found, value.bits) else None
        return self._known[value]

    def unbounded(self, value: Value) -> Interval | None:
        """The same of the exact result, before it is forced into its type."""
        op, operands, text = value.op, value.operands, value.text
        if op == "arith.constant":
            found = re.search(r"constant (?:dense<)?(-?\d+|true|false)(?:>| :|$)", text)
            return None if found is None else (int(_BOOL.get(found[1], found[1])),) * 2
        if op == "tt.make_range":
            start, end = (int(re.search(rf"{name} = (\d+)", text)[1]) for name in ("start", "end"))  # type: ignore
            return start, end - 1
        if op in ("tt.get_program_id", "tt.get_num_programs"):
            programs = self.setting.grid["xyz".index(re.search(r" ([xyz]) :", text)[1])]  # type: ignore
            return (0, programs[1] - 1) if op == "tt.get_program_id" else programs
        if op.startswith("argument "):
            return self.setting.numbers.get(op.split()[1])
        if op in ("tt.load", "tt.atomic_rmw"):
            pointer = self.pointer(operands[0])
            read = None if pointer is None else self.setting.contents.get(pointer.argument)
            return read if op == "tt.atomic_rmw" or len(operands) < 3 else _hull(read, self.of(operands[2]))
        if op in ("arith.cmpi", "arith.cmpf"):
            return 0, 1
        if op == "arith.select":
            return _hull(self.of(operands[1]), self.of(operands[2]))
        if op == "carried":
            return self._carried(value, *operands)
        intervals = [self.of(operand) for operand in operands]
        if op == "arith.andi":  # bounds whatever it is given
            whole = -(2 ** (value.bits - 1)), 2 ** (value.bits - 1) - 1
            intervals = [whole if found is None else found for found in intervals]
        known = [found for found in intervals if found is not None]
        if not known or len(known) < len(intervals):
            return None
        first, *rest = known
        if op == "arith.extsi" and re.search(r"i1>* to", text):
            return None
        if op in _SAME or op.endswith((" arith.maxsi", " arith.minsi")):
            return first
        if op == "arith.extui":
            return first if first[0] >= 0 else None
        if op == "induction":
            return (first[0], max(first[0], rest[0][1] - 1)) if rest[1][0] > 0 else None
        if op.endswith(" arith.addi"):  # tt.reduce or tt.scan
            axis = int(re.search(r"axis = (\d+)", text)[1])  # type: ignore
            terms = int(re.search(r": \(tensor<([\dx]+)x", text)[1].split("x")[axis])  # type: ignore
            return min(first[0], terms * first[0]), max(first[1], terms * first[1])
        function = _BINARY.get(op.removeprefix("arith."))
        return function(first, rest[0]) if function is not None and rest else None

    def _carried(self, value: Value, first: Value, following: Value, *loop: Value) -> Interval | None:
        """What a loop carries: where it is only added to, as far as its rounds can take it; else all it is set to."""
        start = self.of(first)
        if start is None:
            return None
        before = dict(self._known)  # what is found now knows nothing about this value
        end = self.of(following)
        others = [operand for operand in following.operands if operand is not value]
        added = self.of(others[0]) if following.op == "arith.addi" and len(others) == 1 and loop else None
        self._known = before
        if added is None:
            return _hull(start, end)
        low, high, step = (self.of(bound) for bound in loop)
        if low is None or high is None or step is None or step[0] <= 0:
            return None
        rounds = max(0, -(-(high[1] - low[0]) // step[0]))
        return start[0] + min(0, rounds * added[0]), start[1] + max(0, rounds * added[1])

    def pointer(self, value: Value) -> Pointer | None:
        """Where a pointer comes from and what was added to it."""
        if value.op.startswith("argument "):
            return Pointer(value.op.split()[1], ())
        if value.op not in _SAME | {"tt.addptr", "tt.bitcast"}:
            return None
        base = self.pointer(value.operands[0])
        if base is None or value.op != "tt.addptr":
            return base
        return Pointer(base.argument, (*base.offsets, (value.bits, self.of(value.operands[1]))))


class Pointer(NamedTuple):
    """An argument, and the width and the interval of every offset added to it."""

    argument: str
    offsets: tuple[tuple[int, Interval | None], ...]

    @property
    def total(self) -> Interval | None:
        """The interval of their sum; None where one is unknown."""
        known = [interval for _, interval in self.offsets if interval is not None]
        if len(known) < len(self.offsets):
            return None
        return sum(low for low, _ in known), sum(high for _, high in known)


def _fits(interval: Interval, bits: int) -> bool:
    if bits == 1:
        return interval[0] >= -1 and interval[1] <= 1
    return bits == 0 or (-(2 ** (bits - 1)) <= interval[0] and interval[1] < 2 ** (bits - 1))


class Report(NamedTuple):
    """What was found in one kernel: its accesses to memory, and what is wrong.

    `known` of the `accesses` have bounds. `large` are those to tensors beyond :data:`LARGE`, of which `wide` have
    an offset of 64 bits and bounds that reach the last element. `farthest` is the greatest bound.
    """

    kernel: str
    accesses: int
    known: int
    large: int
    wide: int
    farthest: int
    problems: tuple[str, ...]


def analyse(name: str, text: str, setting: Setting) -> Report:
    """The report on the kernel with the IR `text` in `setting`."""
    bounds, problems = Bounds(setting), []
    accesses = known = large = wide = farthest = 0
    for axis, (_, programs) in enumerate(setting.grid):
        if programs >= (2**31 if axis == 0 else 2**16):
            problems.append(f"axis {axis} of the grid has {programs} programs")
    for value in parse(text):
        result = bounds.unbounded(value) if value.op.startswith("arith.") else None
        if value.op == "induction":
            _, high, step = (bounds.of(bound) for bound in value.operands)
            result = None if high is None or step is None else (0, high[1] - 1 + step[1])
        # A bit may be shifted up to the sign, as in a mask. What comes out has no bounds here.
        room = value.bits + (value.op == "arith.shli")
        if result is not None and not _fits(result, room):
            problems.append(f"{result[0]} to {result[1]} in {value.bits} bits: {value.text}")
        if value.op.startswith(_FOREIGN):
            problems.append(f"not understood: {value.text}")
        if value.op not in _ACCESSES:
            continue
        accesses += 1
        pointer = bounds.pointer(value.operands[0])
        total = None if pointer is None else pointer.total
        if pointer is None or total is None:
            problems.append(f"an offset without bounds: {value.text}")
            continue
        known, farthest = known + 1, max(farthest, total[1])
        if setting.extents[pointer.argument] > LARGE:
            has_wide = any(bits == 64 for bits, _ in pointer.offsets)
            large, wide = large + 1, wide + (has_wide and total[1] >= setting.extents[pointer.argument] - 1)
            if not has_wide:
                problems.append(f"{pointer.argument} is addressed by 32-bit offsets alone: {value.text}")
    return Report(name, accesses, known, large, wide, farthest, tuple(problems))


def lower(kernel: Kernel, arch: int) -> str:
    """Triton's own IR of `kernel`, optimized as far as that goes: nothing is compiled."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = GPUTarget("cuda", arch, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({"num_warps": kernel.num_warps, "num_stages": kernel.num_stages})
    begun, stages = source(kernel), dict[str, Any]()
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    module = begun.make_ir(target, options, *functions, context)
    backend.add_stages(stages, options, begun.language)
    return str(stages["ttir"](module, {}))


# Launches


def settings(recorded: Sequence[Any], held: dict[str, Interval]) -> dict[Kernel, Setting]:
    """For every kernel that is launched, the bounds over its launches, where integer tensors hold `held`."""
    found: dict[Kernel, Setting] = {}
    for launch in recorded:
        if not all(launch.grid):
            continue  # of no program
        kernel = describe(launch)
        setting = found.get(kernel, Setting(tuple((size, size) for size in launch.grid), {}, held, {}))
        pairs = zip(setting.grid, launch.grid, strict=True)
        found[kernel] = setting._replace(grid=tuple((min(low, size), max(high, size)) for (low, high), size in pairs))
        for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
            if isinstance(value, Tensor):
                extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
                setting.extents[name] = max(extent, setting.extents.get(name, 0))
            elif isinstance(value, int):
                low, high = setting.numbers.get(name, (value, value))
                setting.numbers[name] = min(low, value), max(high, value)
    return found


def reports(shapes: dict[str, Shape], arch: int = ARCH) -> list[tuple[str, Report]]:
    """The report on every distinct kernel of every shape."""
    texts: dict[Kernel, str] = {}
    found = []
    for case, shape in shapes.items():
        recorded = [settings(launches(shape, arch), contents(shape))]
        for routing in ROUTINGS:
            recorded.append(settings(routed_launches(shape, routing, arch), routed_contents(shape, routing)))
        every = settings(group_launches(shape, GROUPS, arch), routed_contents(shape, (GROUPS, GROUPS)))
        recorded.append(every)
        for kernel, setting in (pair for fixed in recorded for pair in fixed.items()):
            if kernel not in texts:
                texts[kernel] = lower(kernel, arch)
            found.append((case, analyse(kernel.name, texts[kernel], setting)))
    return found


def table(found: Sequence[tuple[str, Report]]) -> str:
    """Markdown: for each kernel its accesses over all variants and shapes."""
    lines = ["| kernel | analyses | accesses | known | to large tensors | of these known and wide | farthest |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in sorted({report.kernel for _, report in found}):
        ones = [report for _, report in found if report.kernel == name]
        accesses, known, large, wide = (
            sum(getattr(one, what) for one in ones) for what in ("accesses", "known", "large", "wide")
        )
        farthest = max(one.farthest for one in ones)
        lines.append(f"| `{name}` | {len(ones)} | {accesses} | {known} | {large} | {wide} | {farthest:.3g} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m sparsekern.bench.offsets", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES), help="shapes; default all")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 keeps Triton from lowering kernels; unset it")
    found = reports({case: SHAPES[case] for case in options.cases})
    print(table(found))
    broken = [f"{report.kernel} at {case}: {problem}" for case, report in found for problem in report.problems]
    for problem in dict.fromkeys(broken):
        print(problem, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""Where a straight line through the input of a piecewise-linear net passes from one linear piece to the next, exactly.

Inside a piece every pre-activation is affine along the line, so one forward pass with a forward derivative, at any
point of it, tells how far the piece reaches to both sides. What lies between two known pieces is probed in the same
way, all gaps of all segments together, until nothing is left: as many passes as there are pieces, in about as many
rounds as the logarithm of their number.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from sparsekern.analysis.polytope.codes import PolytopeCodes
from sparsekern.analysis.polytope.watch import Site, pool_windows, sites, watching
from sparsekern.bits import pack_bits, unpack_bits
from sparsekern.hooks import evaluating, named_module

_NOISE = 1e-13  # a pre-activation below this part of its layer's largest is rounding
_CLOSED = 1e-13  # a gap shorter than this part of the segment is one boundary
_FRACTIONS = (0.4142135623730951, 0.6180339887498949, 0.2360679774997898, 0.7912878474779199)  # where a gap is probed
_SKETCHES = 4  # random projections of each layer by which neighbouring pieces are compared
_AGREE = 1e-7  # of the size of a layer
_MOST_PIECES = 10_000_000
_BLOCK_BITS = 2**24  # flags that are unpacked at a time


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Where a segment from `a` (t = 0) to `b` (t = 1) changes its linear piece; m boundaries.

    Attributes
    ----------
    t : Tensor [m] float64
        Rising, above 0 and below 1. Units that change together have one boundary each, at the same t.
    layer : Tensor [m] int64
        Index into ``codes.layers`` of the unit that changes.
    unit : Tensor [m] int64
        Its index in the layer; of a max pool the cell, ``[C, H', W']`` flattened, whose largest entry changes.
    piece : Tensor [m] int64
        The boundary is between the pieces ``piece`` and ``piece + 1``, rows of `codes`.
    codes : PolytopeCodes
        Of the pieces, in order; first and last are those at the ends.
    length : float
        Euclidean length of the segment.
    """

    t: Tensor
    layer: Tensor
    unit: Tensor
    piece: Tensor
    codes: PolytopeCodes
    length: float

    def __len__(self) -> int:
        return len(self.t)

    @property
    def density(self) -> float:
        """Boundaries per unit of length; NaN for a segment of no length."""
        return len(self) / self.length if self.length > 0 else float("nan")

    def by_layer(self) -> Tensor:
        """Boundaries of each layer, ``[n_layers]``."""
        return torch.bincount(self.layer, minlength=len(self.codes.layers))


def boundaries_on_segment(
    net: nn.Module,
    a: Tensor,
    b: Tensor,
    layers: Sequence[str] | None = None,
    *,
    at: str | None = None,
    base: Tensor | Mapping[str, Any] | None = None,
    batch_size: int = 256,
    strict: bool = True,
) -> Boundaries:
    """All boundaries on one segment; :func:`boundaries_on_segments` for a batch of one, which see.

    Parameters
    ----------
    net : nn.Module
        A piecewise-linear net.
    a, b : Tensor […]
        The ends, without a batch dimension.
    layers, at, base, batch_size, strict
        As there.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    options: Any = {"at": at, "base": base, "batch_size": batch_size, "strict": strict}
    return boundaries_on_segments(net, a[None], b[None], layers, **options)[0]


@torch.no_grad()
def boundaries_on_segments(
    net: nn.Module,
    a: Tensor,
    b: Tensor,
    layers: Sequence[str] | None = None,
    *,
    at: str | None = None,
    base: Tensor | Mapping[str, Any] | None = None,
    batch_size: int = 256,
    strict: bool = True,
) -> list[Boundaries]:
    """Every change of a unit's side on S segments, exact for nets that are piecewise linear.

    The net runs in float64 and in evaluation mode, with forward derivatives; its parameters stay as they are. What is
    found is checked: pre-activations of neighbouring pieces must agree where they meet, and those of the outer pieces
    with the net at both ends.

    Parameters
    ----------
    net : nn.Module
        Linear, convolution, BatchNorm, average pool, addition, … between ``nn.ReLU``, ``nn.LeakyReLU``, ``nn.PReLU``
        and ``nn.MaxPool2d``, whose boundaries are those of :func:`polytope_codes`.
    a, b : Tensor [S, …]
        The ends, as the net, or the module `at`, takes them.
    layers : sequence of str, or None
        Modules whose boundaries are wanted, as in :func:`polytope_codes`. None: all activation modules and max pools.
        The others are followed in any case. Where activations are called as functions, name the linear layers before
        all of them.
    at : str or None
        The segment is in the input of this module: it runs from there, whatever the net has computed so far. Needs a
        `base`.
    base : Tensor [1, …], mapping of str to Tensor [1, …], or None
        The net's input with `at`.
    batch_size : int
        Points that run through the net at a time.
    strict : bool
        Whether a net that is found not to be piecewise linear is an error, or a warning and boundaries that are wrong.

    Returns
    -------
    list of Boundaries
        One for each segment. Changes that are less than 1e-13 of the segment apart count as one moment, and a unit
        that changes twice in it as none. A unit that touches 0 and turns has no boundary; neither has one whose
        pre-activation is 0 along a piece, up to rounding: it is off there.

    Raises
    ------
    ValueError
        For shapes that do not fit, values that are not finite, modules that are not there, and nets that are not
        piecewise linear between their activation modules and max pools.
    """
    if a.shape != b.shape or a.dim() < 2:
        raise ValueError(f"a and b must have one shape [S, …], got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a and b must be finite")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if (at is None) != (base is None):
        raise ValueError("at and base must be given together: where the segment is, and what the net runs on")
    wanted = sites(net, layers, pools=True)
    known = {site.name for site in wanted}
    others = [] if layers is None else [site for site in _all_kinks(net) if site.name not in known]
    if len(a) == 0:
        return []
    device = next((parameter.device for parameter in net.parameters()), a.device)
    ends = a.to(device, torch.float64), b.to(device, torch.float64)
    with evaluating(net):
        line = _Line(net, *ends, wanted, others, layers is not None, at, base, batch_size)
        pieces = _pieces(line)
        _verify(line, pieces, strict)
        return _read(line, pieces)


@contextmanager
def frozen_norms(net: nn.Module, base: Tensor | Mapping[str, Any]) -> Iterator[None]:
    """Inside the block every LayerNorm and RMSNorm of `net` divides by what it divided by at `base`.

    That leaves an affine map, so that blocks of linear maps and ReLUs behind a norm are piecewise linear.

    Parameters
    ----------
    net : nn.Module
        With ``nn.LayerNorm``, ``nn.RMSNorm``, or classes of that name with a `weight` and an epsilon.
    base : Tensor [1, …] or mapping of str to Tensor [1, …]
        One sample, for all that run inside the block; each token of it has its own scale.

    Raises
    ------
    ValueError
        If there is no norm, one that runs twice in a forward pass, or one that does not compute what its name says.
    """
    norms = {name: module for name, module in net.named_modules() if _norm_kind(module)}
    if not norms:
        raise ValueError(f"net must have a LayerNorm or RMSNorm: {type(net).__name__} has none")
    scales: dict[str, Tensor] = {}

    def measure(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if name in scales:
                raise ValueError(f"net must run {name!r} once in a forward pass for its scale to be frozen")
            scales[name] = _scale(module, args[0])
            off = (_normed(module, args[0], scales[name]) - output).abs().max()
            if off > 1e-3 * output.abs().max():
                raise ValueError(f"net has a norm that cannot be frozen: {name!r}, a {type(module).__name__}")

        return hook

    with ExitStack() as stack, torch.no_grad(), evaluating(net):
        for name, module in norms.items():
            stack.callback(module.register_forward_hook(measure(name)).remove)
        net(**base) if isinstance(base, Mapping) else net(base)
    with ExitStack() as stack:
        for name, scale in scales.items():
            hook = _replacement(scale)
            stack.callback(norms[name].register_forward_hook(hook).remove)
        yield


def _replacement(scale: Tensor) -> Any:
    return lambda module, args, output: _normed(module, args[0], scale.to(args[0].dtype))


def _norm_kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.LayerNorm):
        return "layer"
    return "rms" if type(module).__name__.endswith("RMSNorm") else None


def _axes(module: Any) -> tuple[int, ...]:
    return tuple(range(-len(getattr(module, "normalized_shape", (0,))), 0))


def _scale(module: Any, x: Tensor) -> Tensor:
    if _norm_kind(module) == "layer":
        return (x.var(_axes(module), unbiased=False, keepdim=True) + module.eps).rsqrt()
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return (x.square().mean(_axes(module), keepdim=True) + eps).rsqrt()


def _normed(module: Any, x: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(_axes(module), keepdim=True) if _norm_kind(module) == "layer" else x
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    scaled = centred * scale if weight is None else centred * scale * weight
    return scaled if bias is None else scaled + bias


def _all_kinks(net: nn.Module) -> list[Site]:
    try:
        return sites(net, None, pools=True)
    except ValueError:  # activations as functions only: the layers that are named stand for them
        return []


# The pieces


@dataclass
class _Affine:
    """Pre-activations near P points: how far they keep their sides, and what they are."""

    left: Tensor  # [P]: to the last boundary before the point, as a part of the segment; −inf without
    right: Tensor  # [P]: to the first one behind it
    on_boundary: Tensor  # [P] bool
    codes: Tensor  # [P, ⌈n/8⌉]
    value: Tensor  # [P, layers, sketches]
    slope: Tensor  # [P, layers, sketches]
    size: Tensor  # [P, layers]: root mean square of the values

    @classmethod
    def cat(cls, parts: Sequence[_Affine]) -> _Affine:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def __getitem__(self, rows: Tensor) -> _Affine:
        return _Affine(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass
class _Pieces:
    segment: Tensor
    t: Tensor
    first: Tensor  # where it begins
    last: Tensor
    affine: _Affine


class _Line:
    """The net along S segments."""

    def __init__(
        self,
        net: nn.Module,
        a: Tensor,
        b: Tensor,
        wanted: Sequence[Site],
        others: Sequence[Site],
        named: bool,
        at: str | None,
        base: Tensor | Mapping[str, Any] | None,
        batch_size: int,
    ) -> None:
        self.net, self.a, self.direction, self.batch_size = net, a, b - a, batch_size
        self.wanted, self.others, self.named = wanted, others, named
        self.at, self.base = None if at is None else named_module(net, at, "at"), base
        self.weights = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in (*net.named_parameters(), *net.named_buffers())
        }
        self.layers: tuple[tuple[str, int], ...] = ()
        self.cells: list[int] = []  # bits that stand for one unit: 1, or the entries of a window
        self._projections: dict[str, Tensor] = {}

    def probe(self, segment: Tensor, t: Tensor, ignore: Tensor) -> _Affine:
        """The pre-activations at `t` of each `segment`; `ignore` units that are 0 there."""
        parts = zip(*(whole.split(self.batch_size) for whole in (segment, t, ignore)), strict=True)
        return _Affine.cat([self._probe(*part) for part in parts])

    def _probe(self, segment: Tensor, t: Tensor, ignore: Tensor) -> _Affine:
        direction = self.direction[segment]
        point = self.a[segment] + t.view(-1, *(1,) * (direction.dim() - 1)) * direction
        count = len(t)
        left, right = t.new_full((count,), -torch.inf), t.new_full((count,), torch.inf)
        on_boundary = torch.zeros(count, dtype=torch.bool, device=t.device)
        flags, names, cells, sketches, sizes = [], [], [], [], []
        wanted, called = {site.name for site in self.wanted}, set()

        def see(name: str, site: Site, dual: Tensor) -> None:
            nonlocal left, right, on_boundary
            called.add(site.name)
            value, slope = forward_ad.unpack_dual(dual)
            slope = torch.zeros_like(value) if slope is None else slope
            if not value.isfinite().all():
                raise ValueError(f"net must have finite pre-activations on the segments: those of {name!r} are not")
            if value.dtype != torch.float64 or len(value) != count:
                raise ValueError(f"layer {name!r} must keep float64 and the {count} samples, got {_shape(value)}")
            both = torch.stack([value.reshape(count, -1), slope.reshape(count, -1)])
            largest = both.abs().amax(2, keepdim=True) if both.shape[2] else both.new_zeros(2, count, 1)
            sketches.append(both @ self._projection(name, both))
            sizes.append(both[0].square().mean(1).sqrt())
            window = 1
            if site.at == "pool":
                both, bits, window = _pool_margins(site.module, value, slope)
            else:
                bits = both[0] > 0
            no_value, no_slope = both.abs() <= _NOISE * largest
            unsure = no_value & ~no_slope & ~ignore[:, None]
            on_boundary |= unsure.any(1)
            to = torch.where(no_value & ~unsure | (both[1] == 0), torch.inf, -both[0] / both[1])
            left = torch.maximum(left, to.masked_fill(to >= 0, -torch.inf).amax(1))
            right = torch.minimum(right, to.masked_fill(to <= 0, torch.inf).amin(1))
            if site.name in wanted:
                flags.append(bits if site.at == "pool" else bits & ~no_value)
                names.append((name, bits.shape[1]))
                cells.append(window)

        with forward_ad.dual_level(), watching([*self.wanted, *self.others], see):
            self._run(forward_ad.make_dual(point, direction))
        missing = wanted - called
        if missing and (self.named or not called):
            raise ValueError(f"layers must be called in the forward pass: {', '.join(sorted(missing))} are not")
        self.layers, self.cells = tuple(names), cells
        value, slope = torch.stack(sketches, 2)
        return _Affine(left, right, on_boundary, pack_bits(torch.cat(flags, 1)), value, slope, torch.stack(sizes, 1))

    def _run(self, point: Tensor) -> None:
        if self.at is None:
            functional_call(self.net, self.weights, (point,))
            return

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (point, *args[1:]), kwargs
            first = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
            return args, {**kwargs, first: point}

        handle = self.at.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            if isinstance(self.base, Mapping):
                inputs = {key: _repeat(value, len(point)) for key, value in self.base.items()}
                functional_call(self.net, self.weights, (), inputs)
            elif self.base is not None:
                functional_call(self.net, self.weights, (_repeat(self.base, len(point)),))
        finally:
            handle.remove()

    def _projection(self, name: str, both: Tensor) -> Tensor:
        if name not in self._projections:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(both.shape[2], _SKETCHES, generator=generator, dtype=torch.float64)
            self._projections[name] = (drawn / max(1, both.shape[2]) ** 0.5).to(both.device)
        return self._projections[name]


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _repeat(value: Any, count: int) -> Any:
    """A sample as a batch of `count`, in float64 where it is of floats."""
    if not isinstance(value, Tensor):
        return value
    if len(value) != 1:
        raise ValueError(f"base must have one sample, got tensors of {len(value)}")
    return (value.double() if value.is_floating_point() else value).expand(count, *value.shape[1:])


def _pool_margins(pool: nn.Module, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, int]:
    """By how much each entry of a window is below the largest, and its slope; which is the largest; window size."""
    assert isinstance(pool, nn.MaxPool2d)
    values, slopes = pool_windows(pool, value, -torch.inf), pool_windows(pool, slope, 0.0)
    best = values.argmax(-1, keepdim=True)
    margins = torch.stack([windows.gather(-1, best) - windows for windows in (values, slopes)])
    margins[:, values.isinf()] = torch.tensor(
        [[1.0], [0.0]], dtype=value.dtype, device=value.device
    )  # beyond the border
    bits = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, best, True)
    return margins.flatten(2), bits.flatten(1), values.shape[-1]


def _pieces(line: _Line) -> _Pieces:
    """Probe gaps until none is left: pieces sorted by segment and place."""
    count, device = len(line.a), line.a.device
    segment = torch.arange(count, device=device)
    first, last = (
        torch.zeros(count, dtype=torch.float64, device=device),
        torch.ones(count, dtype=torch.float64, device=device),
    )
    tries = torch.zeros(count, dtype=torch.int64, device=device)
    fractions = torch.tensor(_FRACTIONS, dtype=torch.float64, device=device)
    found: list[_Pieces] = []
    total = 0
    while len(segment):
        t = first + (last - first) * fractions[tries % len(_FRACTIONS)]
        # A probe that hits a boundary tries another place. Where all of a gap is one, up to rounding, the unit is 0.
        near = line.probe(segment, t, tries >= len(_FRACTIONS))
        begin, end = torch.maximum(t + near.left, first), torch.minimum(t + near.right, last)
        clear = ~near.on_boundary
        found.append(_Pieces(segment[clear], t[clear], begin[clear], end[clear], near[clear]))
        total += int(clear.sum())
        if total > _MOST_PIECES:
            raise ValueError(f"a and b must have fewer than {_MOST_PIECES:,} boundaries between them in all")
        before, behind = clear & (begin - first > _CLOSED), clear & (last - end > _CLOSED)
        segment = torch.cat([segment[before], segment[behind], segment[~clear]])
        first, last = (
            torch.cat([first[before], end[behind], first[~clear]]),
            torch.cat([begin[before], last[behind], last[~clear]]),
        )
        tries = torch.cat([tries.new_zeros(len(segment) - int((~clear).sum())), tries[~clear] + 1])
    segment, t, first, last = (
        torch.cat([getattr(part, name) for part in found]) for name in ("segment", "t", "first", "last")
    )
    order = t.argsort(stable=True)
    order = order[segment[order].argsort(stable=True)]
    affine = _Affine.cat([part.affine for part in found])
    return _Pieces(segment[order], t[order], first[order], last[order], affine[order])


def _verify(line: _Line, pieces: _Pieces, strict: bool) -> None:
    """Whether pieces agree where they meet, and the outer ones with the net at the ends."""
    affine, segment = pieces.affine, pieces.segment
    inner = (segment[1:] == segment[:-1]).nonzero().squeeze(1)
    meet = (pieces.last[inner] + pieces.first[inner + 1]) / 2

    def at(rows: Tensor, t: Tensor) -> Tensor:
        return affine.value[rows] + affine.slope[rows] * (t - pieces.t[rows])[:, None, None]

    size = torch.maximum(affine.size[inner], affine.size[inner + 1])
    bad = _differ(at(inner, meet), at(inner + 1, meet), size)
    border = torch.ones(len(segment) + 1, dtype=torch.bool, device=segment.device)
    border[1:-1] = segment[1:] != segment[:-1]
    for rows, t in ((border[:-1].nonzero().squeeze(1), 0.0), (border[1:].nonzero().squeeze(1), 1.0)):
        where = torch.full_like(pieces.t[rows], t)
        seen = line.probe(segment[rows], where, torch.ones_like(rows, dtype=torch.bool))
        size = torch.maximum(seen.size, affine.size[rows])
        bad = torch.cat([bad, _differ(seen.value, at(rows, where), size)])
    if bad.any():
        message = (
            f"net is not piecewise linear between its activation modules and max pools: {int(bad.sum())} of {len(bad)} "
            "ends of pieces do not agree. Smooth activations and norms are not (see frozen_norms); where activations "
            "are called as functions, layers must name the linear layers before them"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)


def _differ(one: Tensor, other: Tensor, size: Tensor) -> Tensor:
    return ((one - other).abs() > _AGREE * size[:, :, None]).flatten(1).any(1)


def _read(line: _Line, pieces: _Pieces) -> list[Boundaries]:
    """What changes between neighbouring pieces; those with the same code are one."""
    codes, segment = pieces.affine.codes, pieces.segment
    inner = segment[1:] == segment[:-1]
    changes = torch.cat(
        [torch.ones(1, dtype=torch.bool, device=inner.device), ~inner | (codes[1:] != codes[:-1]).any(1)]
    )
    kept = changes.nonzero().squeeze(1)
    of = segment[kept]  # segment of each piece that is kept
    meets = (inner & changes[1:]).nonzero().squeeze(1) + 1
    place = (pieces.last[meets - 1] + pieces.first[meets]) / 2
    n = sum(count for _, count in line.layers)
    step = max(1, _BLOCK_BITS // max(1, n))
    events = []
    for start in range(0, len(meets), step):
        some = meets[start : start + step]
        rows, bits = unpack_bits(codes[some] ^ codes[some - 1], n).nonzero(as_tuple=True)
        events.append(torch.stack([rows + start, bits]))
    row, bit = torch.cat(events, 1) if events else torch.zeros(2, 0, dtype=torch.int64, device=codes.device)
    starts = torch.tensor([0, *(count for _, count in line.layers)], device=bit.device).cumsum(0)
    layer = torch.bucketize(bit, starts[1:], right=True)
    unit = (bit - starts[layer]) // torch.tensor(line.cells, device=bit.device)[layer]
    event = torch.stack([row, layer, unit], 1).unique(dim=0)  # a cell of a pool changes two bits
    row, layer, unit = event.unbind(1)
    rank = changes.cumsum(0) - 1  # of each piece among the kept ones
    begins = torch.searchsorted(of, torch.arange(len(line.a), device=of.device))
    lengths = line.direction.flatten(1).norm(dim=1).tolist()
    sizes = torch.bincount(of, minlength=len(line.a)).tolist()
    counts = torch.bincount(segment[meets[row]], minlength=len(line.a)).tolist()
    piece = rank[meets[row]] - 1 - begins[segment[meets[row]]]
    parts = zip(
        *(values.cpu().split(counts) for values in (place[row], layer, unit, piece)),
        codes[kept].cpu().split(sizes),
        lengths,
        strict=True,
    )
    return [
        Boundaries(t, layer, unit, piece, PolytopeCodes(data, line.layers, "sign"), length)
        for t, layer, unit, piece, data, length in parts
    ]

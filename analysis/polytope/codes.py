"""Which side of every unit's threshold a sample is on, as one bit a unit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.analysis.polytope.batches import Batch, Where, batches, length_of, moved, rows_of
from sparsekern.analysis.polytope.watch import Site, pool_windows, sites, watching
from sparsekern.bits import pack_bits, unpack_bits
from sparsekern.files import write_json
from sparsekern.hooks import evaluating
from sparsekern.progress import Progress

KINDS = ("sign", "soft", "gate")

_FORMAT = "sparsekern-polytope-codes"
_VERSION = 1
_DATA, _MANIFEST = "codes.npy", "manifest.json"


@dataclass(frozen=True, eq=False)
class PolytopeCodes:
    """Codes of N samples, as :func:`polytope_codes` gives them.

    Attributes
    ----------
    data : Tensor
        Of kind "sign" and "gate" ``[N, ⌈n/8⌉]`` uint8, the n bits of a row packed by ``sparsekern.bits.pack_bits``
        and each row, not each layer, padded to a byte; of kind "soft" ``[N, n]`` float16. May be memory-mapped.
    layers : tuple of (str, int)
        Name and number of units of each layer, in the order in which the net calls them.
    kind : {"sign", "soft", "gate"}
    """

    data: Tensor
    layers: tuple[tuple[str, int], ...]
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        width, dtype = (self.n_units, torch.float16) if self.kind == "soft" else (-(-self.n_units // 8), torch.uint8)
        if self.data.dim() != 2 or self.data.shape[1] != width or self.data.dtype != dtype:
            got = f"{tuple(self.data.shape)} {self.data.dtype}"
            raise ValueError(
                f"data must be [N, {width}] {dtype} for {self.n_units} units of kind {self.kind}, got {got}"
            )

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"PolytopeCodes({len(self):,} rows, {self.n_units:,} units of {len(self.layers)} layers, {self.kind})"

    @property
    def n_units(self) -> int:
        """Units of all layers: the length of an unpacked row."""
        return sum(count for _, count in self.layers)

    def unpack(self, rows: slice | Tensor | None = None, layer: str | None = None) -> Tensor:
        """Rows as one entry a unit: ``[rows, n]``, bool of kind "sign" and "gate", float32 of kind "soft".

        Parameters
        ----------
        rows : slice, Tensor of indices or of bool, or None
            All where it is None.
        layer : str or None
            The units of this layer only.

        Raises
        ------
        ValueError
            For a layer that is not there.
        """
        start, stop = (0, self.n_units) if layer is None else self.span(layer)
        data = self.data if rows is None else self.data[rows]
        if self.kind == "soft":
            return data[:, start:stop].float()
        first = start // 8
        return unpack_bits(data[:, first : -(-stop // 8)], stop - 8 * first)[:, start - 8 * first :]

    def layer(self, name: str) -> PolytopeCodes:
        """The codes of one layer, a copy of them.

        Raises
        ------
        ValueError
            For a layer that is not there.
        """
        start, stop = self.span(name)
        if self.kind == "soft":
            data = self.data[:, start:stop].clone()
        else:
            step = max(1, 2**24 // max(1, stop - start))  # unpacked bits that exist at a time
            parts = [pack_bits(self.unpack(slice(at, at + step), name)) for at in range(0, len(self), step)]
            data = torch.cat([self.data[:0, : -(-(stop - start) // 8)], *parts])
        return PolytopeCodes(data, ((name, stop - start),), self.kind)

    def span(self, name: str) -> tuple[int, int]:
        """First unit of a layer, and the one after its last.

        Raises
        ------
        ValueError
            For a layer that is not there.
        """
        start = 0
        for known, count in self.layers:
            if known == name:
                return start, start + count
            start += count
        raise ValueError(f"layer must be one of {', '.join(known for known, _ in self.layers)}, got {name!r}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder of ``codes.npy`` and ``manifest.json``, which :meth:`load` reads."""
        writer = _Folder(Path(path), self.kind)
        with writer:
            for start in range(0, max(1, len(self)), 65536):
                writer.add(self.data[start : start + 65536], self.layers)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = True) -> PolytopeCodes:
        """Read what :meth:`save` or ``polytope_codes(output=…)`` wrote.

        Parameters
        ----------
        path : path
            The folder.
        mmap : bool
            Map the file into memory rather than read it. What is written to the tensor is not written to the file.

        Raises
        ------
        ValueError
            If there are no complete codes of a known version in the folder.
        """
        folder = Path(path)
        try:
            manifest = json.loads((folder / _MANIFEST).read_bytes())
        except FileNotFoundError as error:
            raise ValueError(f"path must be a folder of polytope codes: {folder} has no {_MANIFEST}") from error
        if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
            raise ValueError(
                f"path must hold polytope codes of version {_VERSION}: {folder / _MANIFEST} says otherwise"
            )
        array = np.load(folder / _DATA, mmap_mode="c" if mmap else None, allow_pickle=False)
        layers = tuple((name, count) for name, count in manifest["layers"])
        return cls(torch.from_numpy(array), layers, manifest["kind"])


@torch.no_grad()
def polytope_codes(
    net: nn.Module,
    x: Batch | Iterable[Batch],
    layers: Sequence[Any] | None = None,
    kind: str = "sign",
    *,
    batch_size: int = 256,
    output: str | os.PathLike[str] | None = None,
    progress: bool = False,
    where: Where | None = None,
) -> PolytopeCodes:
    """Which units are on, for every sample: the linear piece of a piecewise-linear net that the sample is in.

    The net runs in evaluation mode, on the device of its parameters, and is left as it was.

    Parameters
    ----------
    net : nn.Module
        What is run on `x`.
    x : Tensor [N, …], mapping of str to Tensor [N, …], or iterable of such batches
        A mapping is given to the net as keyword arguments. Integers ``[N, T]``, in a tensor or a mapping, are token
        ids: the net's layers are then ``[N, T, units]``, and a row of the codes is a token.
    layers : sequence of str, or None
        Names of modules. An activation module (``nn.ReLU``, ``nn.GELU``, …, those of transformers) is watched at its
        input, a max pool by the place of the largest entry (k² bits a cell of a k × k pool, one of them set), and any
        other module at its output. None: all activation modules that are called. A module that is called more than
        once in a forward pass gives a layer for each call: ``"relu"``, ``"relu#2"``, … Of kind "gate" pairs of
        names (gate, value), or None for all siblings ``gate_proj`` and ``up_proj``.
    kind : {"sign", "soft", "gate"}
        "sign": 1[pre-activation > 0]. "soft": the activation's derivative there, clipped to [0, 1]; the same as "sign"
        for a ReLU. "gate": for gated linear units, signs of gates and of values.
    batch_size : int
        Samples at a time; batches of an iterable stay as they are.
    output : path or None
        Write the codes to this folder while they are computed, and give them memory-mapped.
    progress : bool
        Show progress.
    where : Tensor [N, T] bool, callable of a batch that gives one, or None
        Which tokens have a row. None: an ``attention_mask`` among the input, otherwise all. If it is given, `x` holds
        tokens also where it is not of integers.

    Returns
    -------
    PolytopeCodes

    Raises
    ------
    ValueError
        For wrong arguments, layers that are not called, that have another number of units in another batch, or
        pre-activations that are not finite.

    References
    ----------
    Black et al., *Interpreting neural networks through the polytope lens* (arXiv 2211.12312).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    watched = sites(net, _flat(_gates(net) if layers is None else layers) if kind == "gate" else layers)
    if kind == "soft" and any(site.at == "output" for site in watched):
        names = ", ".join(site.name for site in watched if site.at == "output")
        raise ValueError(f"layers must be activation modules for kind 'soft', which takes their derivative: {names}")
    writer = _Memory(kind) if output is None else _Folder(Path(output), kind)
    device = next((parameter.device for parameter in net.parameters()), None)
    total = len(x) if isinstance(x, Tensor) else None
    done = 0
    with evaluating(net), writer, Progress("polytope codes", total, unit="samples", shown=progress) as bar:
        for batch, mask in batches(x, batch_size, where):
            rows, counts = _codes(net, moved(batch, device), mask, watched, kind, layers is not None)
            writer.add((rows.half() if kind == "soft" else pack_bits(rows)).cpu(), counts)
            done += length_of(batch)
            bar.update(done)
        if writer.n == 0:
            raise ValueError("x must have a sample at least, and where a token")
    return writer.codes()


def _codes(
    net: nn.Module, batch: Batch, mask: Tensor | None, watched: Sequence[Site], kind: str, named: bool
) -> tuple[Tensor, tuple[tuple[str, int], ...]]:
    """Rows of a batch, not packed, and the layers that they are made of."""
    seen: list[tuple[str, Tensor]] = []
    called = set()
    length = length_of(batch)

    def see(name: str, site: Site, u: Tensor) -> None:
        called.add(site.name)
        if site.at == "pool":
            windows = pool_windows(site.module, u, -torch.inf)
            values = nn.functional.one_hot(windows.argmax(-1), windows.shape[-1]).bool()
        else:
            values = _derivative(site.module, u) if kind == "soft" else u > 0
        # The extremes first, which are cheap: what is not finite may be a token that is not wanted.
        suspect = u.numel() > 0 and not all(end.isfinite() for end in u.aminmax())
        if suspect and not rows_of(name, u.isfinite(), length, mask).all():
            raise ValueError(f"net must have finite pre-activations: those of layer {name!r} are not")
        seen.append((name, rows_of(name, values, length, mask)))

    with watching(watched, see):
        net(**batch) if isinstance(batch, Mapping) else net(batch)
    missing = [site.name for site in watched if site.name not in called]
    if missing and (named or len(missing) == len(watched)):
        raise ValueError(f"layers must be called in the forward pass: {', '.join(missing)} are not")
    rows = torch.cat([values for _, values in seen], 1)
    return rows, tuple((name, values.shape[1]) for name, values in seen)


def _derivative(module: nn.Module, u: Tensor) -> Tensor:
    """The derivative of an elementwise module at `u`, clipped to [0, 1]."""
    with torch.enable_grad():
        at = u.detach().clone().requires_grad_()
        # A second copy, since the module may work in place; and forward, not a call, which would run the hooks again.
        (slope,) = torch.autograd.grad(module.forward(at.clone()).sum(), at)
    return slope.clamp(0, 1)


def _gates(net: nn.Module) -> list[tuple[str, str]]:
    names = [name for name, _ in net.named_modules()]
    prefixes = [name.removesuffix("gate_proj") for name in names if name.split(".")[-1] == "gate_proj"]
    pairs = [(f"{prefix}gate_proj", f"{prefix}up_proj") for prefix in prefixes if f"{prefix}up_proj" in names]
    if not pairs:
        raise ValueError("layers must be given as pairs (gate, value): net has no siblings gate_proj and up_proj")
    return pairs


def _flat(pairs: Sequence[Any]) -> list[str]:
    if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"layers must be pairs of names (gate, value) for kind 'gate', got {list(pairs)}")
    return [name for pair in pairs for name in pair]


class _Memory:
    """Codes that are computed batch by batch, and kept."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.layers: tuple[tuple[str, int], ...] = ()
        self.n = 0
        self._parts: list[Tensor] = []

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def add(self, data: Tensor, layers: tuple[tuple[str, int], ...]) -> None:
        """Add rows."""
        if self.layers and layers != self.layers:
            raise ValueError(f"x must give every batch the same layers and units, got {self.layers} and then {layers}")
        self.layers = layers
        self.n += len(data)
        self._put(data)

    def _put(self, data: Tensor) -> None:
        self._parts.append(data)

    def codes(self) -> PolytopeCodes:
        """What was added."""
        return PolytopeCodes(torch.cat(self._parts), self.layers, self.kind)


class _Folder(_Memory):
    """Codes that go to disk batch by batch; the manifest comes last, so that a folder with one is complete."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(kind)
        self._path = path
        self._draft = path / f"{_DATA}.tmp"

    def __enter__(self) -> _Folder:
        self._path.mkdir(parents=True, exist_ok=True)
        self._file = open(self._draft, "wb")
        return self

    def _put(self, data: Tensor) -> None:
        self._width = data.shape[1]
        if self._file.tell() == 0:
            self._head(0)
        self._file.write(data.contiguous().numpy().tobytes())

    def _head(self, n: int) -> None:
        """NumPy's header, which has the same length for every n."""
        description = "<f2" if self.kind == "soft" else "|u1"
        header = {"descr": description, "fortran_order": False, "shape": (n, self._width)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._file.seek(0)
                self._head(self.n)
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if error[0] is not None:
                self._draft.unlink()
        if error[0] is None:
            (self._path / _MANIFEST).unlink(missing_ok=True)
            os.replace(self._draft, self._path / _DATA)
            layers = [list(layer) for layer in self.layers]
            manifest = {"format": _FORMAT, "version": _VERSION, "kind": self.kind, "rows": self.n, "layers": layers}
            write_json(self._path / _MANIFEST, manifest)

    def codes(self) -> PolytopeCodes:
        """What was added, memory-mapped."""
        return PolytopeCodes.load(self._path)

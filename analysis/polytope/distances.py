"""How many units two samples differ in, and which samples differ least."""

from __future__ import annotations

from torch import Tensor

import sparsekern as sk
from sparsekern.analysis.polytope.codes import PolytopeCodes
from sparsekern.ops import BitNeighbors


def hamming(a: PolytopeCodes, b: PolytopeCodes | None = None) -> Tensor:
    """Units in which two samples differ, for all pairs: ``[N, M]`` int32.

    Of a max pool the cells that differ count twice, once for each place. Meant for few samples; :func:`neighbors`
    makes no table.

    Parameters
    ----------
    a, b : PolytopeCodes
        Of the same layers, of kind "sign" or "gate"; without `b` the samples of `a` among themselves.

    Raises
    ------
    ValueError
        For codes of kind "soft", or of different layers.
    """
    return sk.bit_distances(*_bits(a, b), metric="hamming")


def jaccard(a: PolytopeCodes, b: PolytopeCodes | None = None) -> Tensor:
    """Units in which two samples differ, as a share of those that are on in either: ``[N, M]`` float32.

    0 where no unit is on in either. Parameters and errors as those of :func:`hamming`.
    """
    return sk.bit_distances(*_bits(a, b), metric="jaccard")


def neighbors(a: PolytopeCodes, b: PolytopeCodes | None = None, k: int = 8, metric: str = "hamming") -> BitNeighbors:
    """The `k` samples of `b` nearest to each of `a`, exactly, without a table of all distances.

    Parameters
    ----------
    a, b : PolytopeCodes
        As :func:`hamming` takes them; without `b` no sample is its own neighbour.
    k : int
        At most M, or N − 1 without `b`.
    metric : {"hamming", "jaccard"}
        As :func:`hamming` and :func:`jaccard` have them.

    Returns
    -------
    BitNeighbors
        ``distances [N, k]`` and ``indices [N, k]``, nearest first, ties to the lower index.

    Raises
    ------
    ValueError
        For codes of kind "soft" or of different layers, a wrong metric, and `k` out of range.
    """
    return sk.bit_neighbors(*_bits(a, b), k=k, metric=metric)


def _bits(a: PolytopeCodes, b: PolytopeCodes | None) -> tuple[Tensor, Tensor | None]:
    for name, codes in (("a", a), ("b", b)):
        if codes is not None and codes.kind == "soft":
            raise ValueError(f"{name} must be codes of kind 'sign' or 'gate', got {codes!r}")
    if b is not None and (a.layers, a.kind) != (b.layers, b.kind):
        raise ValueError(f"b must have the layers and the kind of a, {a!r}, got {b!r}")
    return a.data, None if b is None else b.data

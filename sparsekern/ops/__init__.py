"""Differentiable torch custom ops, one file an op: checks, registration, fake kernel, autograd formula.

An op checks its arguments, asks :mod:`sparsekern.backends` who serves them, and says how its result is differentiated.
It holds no arithmetic of its own.
"""

from sparsekern.ops._batch_topk_encode import batch_topk_encode
from sparsekern.ops._bits import BitNeighbors, bit_distances, bit_neighbors
from sparsekern.ops._cooccurrence import cooccurrence
from sparsekern.ops._route import route
from sparsekern.ops._routed_topk_encode import routed_topk_encode
from sparsekern.ops._sparse_decode import sparse_decode
from sparsekern.ops._threshold_encode import threshold_encode
from sparsekern.ops._topk_encode import topk_encode

__all__ = [
    "BitNeighbors",
    "batch_topk_encode",
    "bit_distances",
    "bit_neighbors",
    "cooccurrence",
    "route",
    "routed_topk_encode",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
]

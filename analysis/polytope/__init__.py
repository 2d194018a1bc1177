"""Polytope codes: which side of every unit's threshold a sample is on, and where a line through the data changes sides.

A net of linear maps and ReLUs is linear on pieces, and a piece is named by the units that are on in it.
:func:`polytope_codes` gives these names as bits, for smooth activations the nearest thing to them;
:func:`surrogate_agreement` compares what that could be. :func:`hamming`, :func:`jaccard` and :func:`neighbors` compare
samples by their codes. :func:`boundaries_on_segment` finds every change of piece between two points, exactly, and
:func:`boundary_density` tells where there are many.
"""

from sparsekern.analysis.polytope.codes import PolytopeCodes, polytope_codes
from sparsekern.analysis.polytope.density import BoundaryDensity, boundary_density
from sparsekern.analysis.polytope.distances import hamming, jaccard, neighbors
from sparsekern.analysis.polytope.segments import (
    Boundaries,
    boundaries_on_segment,
    boundaries_on_segments,
    frozen_norms,
)
from sparsekern.analysis.polytope.surrogates import SurrogateAgreement, surrogate_agreement

__all__ = [
    "Boundaries",
    "BoundaryDensity",
    "PolytopeCodes",
    "SurrogateAgreement",
    "boundaries_on_segment",
    "boundaries_on_segments",
    "boundary_density",
    "frozen_norms",
    "hamming",
    "jaccard",
    "neighbors",
    "polytope_codes",
    "surrogate_agreement",
]

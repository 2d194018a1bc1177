"""Polytope codes: which side of every unit's threshold a sample is on, and where a line through the data changes sides.

A net of linear maps and ReLUs is linear on pieces, and a piece is named by the units that are on in it.
:func:`polytope_codes` gives these names as bits, for smooth activations the nearest thing to them;
:func:`surrogate_agreement` compares what that could be. :func:`hamming`, :func:`jaccard` and :func:`neighbors` compare
samples by their codes. :func:`boundaries_on_segment` finds every change of piece between two points, exactly, and
:func:`boundary_density` tells where there are many.

:func:`decompose_codes` finds units that come and go together. :func:`code_feature_relation`, :func:`similarity`,
:func:`pulled_directions` and :func:`shared_examples` hold codes against the latents of an SAE, and
:func:`cluster_codes` and :func:`compare_distances` ask what samples of near codes have in common.
"""

from sparsekern.analysis.polytope.clusters import Clusters, DistanceComparison, cluster_codes, compare_distances
from sparsekern.analysis.polytope.codes import PolytopeCodes, polytope_codes
from sparsekern.analysis.polytope.decompose import Decomposition, decompose_codes
from sparsekern.analysis.polytope.density import BoundaryDensity, boundary_density
from sparsekern.analysis.polytope.distances import hamming, jaccard, neighbors
from sparsekern.analysis.polytope.pull import PulledDirections, pulled_directions
from sparsekern.analysis.polytope.relation import (
    CodeFeatureRelation,
    SharedExamples,
    code_feature_relation,
    shared_examples,
    similarity,
)
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
    "Clusters",
    "CodeFeatureRelation",
    "Decomposition",
    "DistanceComparison",
    "PolytopeCodes",
    "PulledDirections",
    "SharedExamples",
    "SurrogateAgreement",
    "boundaries_on_segment",
    "boundaries_on_segments",
    "boundary_density",
    "cluster_codes",
    "code_feature_relation",
    "compare_distances",
    "decompose_codes",
    "frozen_norms",
    "hamming",
    "jaccard",
    "neighbors",
    "polytope_codes",
    "pulled_directions",
    "shared_examples",
    "similarity",
    "surrogate_agreement",
]

"""Geometry of latents: how they stand to each other by their directions and by the tokens on which they are active.

:func:`implication_graph` finds latents that are active only where others are, :func:`hierarchical_orthogonality` asks
what the vectors of concepts inside concepts have in common, :func:`one_space_or_many` whether latents form lobes and
whether the decoder knows of them, :func:`subspace_clusters` and :func:`union_of_subspaces` whether decoder rows lie in
subspaces, and :func:`capacity` what it would be worth to keep two groups of features apart.
"""

from sparsekern.analysis.geometry.hierarchy import (
    ABOVE,
    WORDS,
    HierarchicalOrthogonality,
    hierarchical_orthogonality,
    word_groups,
)
from sparsekern.analysis.geometry.implication import ImplicationGraph, Reconstruction, implication_graph
from sparsekern.analysis.geometry.lobes import (
    Capacity,
    OneSpaceOrMany,
    PlantedLobes,
    SubspaceClusters,
    capacity,
    one_space_or_many,
    subspace_clusters,
    union_of_subspaces,
)

__all__ = [
    "ABOVE",
    "WORDS",
    "Capacity",
    "HierarchicalOrthogonality",
    "ImplicationGraph",
    "OneSpaceOrMany",
    "PlantedLobes",
    "Reconstruction",
    "SubspaceClusters",
    "capacity",
    "hierarchical_orthogonality",
    "implication_graph",
    "one_space_or_many",
    "subspace_clusters",
    "union_of_subspaces",
    "word_groups",
]

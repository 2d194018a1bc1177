"""The geometry of an SAE's codes and dictionary: how many dimensions, which shapes, which relations.

:mod:`~sparsekern.analysis.geometry.spectrum` counts the dimensions that codes fill, and what is lost without the rest;
:mod:`~sparsekern.analysis.geometry.circles` looks for features of two dimensions, such as the days of the week;
:mod:`~sparsekern.analysis.geometry.helix` fits numbers; :mod:`~sparsekern.analysis.geometry.implication` finds latents
that are active only where others are; :mod:`~sparsekern.analysis.geometry.hierarchy` asks what the vectors of concepts
inside concepts have in common; :mod:`~sparsekern.analysis.geometry.lobes` whether latents form lobes or lie in
subspaces, whether the decoder knows of them, and what it would be worth to keep two groups of features apart.
``docs/analyses/geometry.md`` says what the nulls are.
"""

from sparsekern.analysis.geometry.circles import (
    CircleSearch,
    Plane,
    closure,
    cluster_search,
    dictionary_clusters,
    mixture_index,
    plane_scores,
    separability,
)
from sparsekern.analysis.geometry.helix import (
    FourierPower,
    HelixFit,
    fourier_power,
    helix_columns,
    helix_fit,
    word_points,
)
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
from sparsekern.analysis.geometry.spectrum import (
    AblationCurve,
    Basis,
    Projected,
    Spectrum,
    ce_curve,
    fvu_curve,
    pca_spectrum,
    shuffled_codes,
)

__all__ = [
    "ABOVE",
    "WORDS",
    "AblationCurve",
    "Basis",
    "Capacity",
    "CircleSearch",
    "FourierPower",
    "HelixFit",
    "HierarchicalOrthogonality",
    "ImplicationGraph",
    "OneSpaceOrMany",
    "Plane",
    "PlantedLobes",
    "Projected",
    "Reconstruction",
    "Spectrum",
    "SubspaceClusters",
    "capacity",
    "ce_curve",
    "closure",
    "cluster_search",
    "dictionary_clusters",
    "fourier_power",
    "fvu_curve",
    "helix_columns",
    "helix_fit",
    "hierarchical_orthogonality",
    "implication_graph",
    "mixture_index",
    "one_space_or_many",
    "pca_spectrum",
    "plane_scores",
    "separability",
    "shuffled_codes",
    "subspace_clusters",
    "union_of_subspaces",
    "word_groups",
    "word_points",
]

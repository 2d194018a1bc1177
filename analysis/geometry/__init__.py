"""The geometry of an SAE's codes and dictionary: how many dimensions, which shapes, which relations.

:mod:`~sparsekern.analysis.geometry.spectrum` counts the dimensions that codes fill, and what is lost without the rest;
:mod:`~sparsekern.analysis.geometry.circles` looks for features of two dimensions, such as the days of the week;
:mod:`~sparsekern.analysis.geometry.helix` fits numbers. ``docs/analyses/geometry.md`` says what the nulls are.
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
    "AblationCurve",
    "Basis",
    "CircleSearch",
    "FourierPower",
    "HelixFit",
    "Plane",
    "Projected",
    "Spectrum",
    "ce_curve",
    "closure",
    "cluster_search",
    "dictionary_clusters",
    "fourier_power",
    "fvu_curve",
    "helix_columns",
    "helix_fit",
    "mixture_index",
    "pca_spectrum",
    "plane_scores",
    "separability",
    "shuffled_codes",
    "word_points",
]

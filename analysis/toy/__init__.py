"""Made data whose features are known: what an analysis must find when it is there to be found.

A generator has its true directions as ``features`` ``[n_features, d]`` and
``sample(n, generator) -> (activations [n, n_features], x [n, d])``, with ``x = activations @ features`` plus noise.
:func:`ground_truth_scores` says which of them an SAE has found; the experiments train SAEs on them.
"""

from sparsekern.analysis.toy.experiments import PlantedRun, absorption, wrong_l0
from sparsekern.analysis.toy.generators import (
    PARENT_AND_CHILD,
    TWENTY_FEATURES,
    ContextTopics,
    CopulaFeatures,
    ManifoldFeatures,
    Node,
    SubspaceClusters,
    Toy,
    TreeFeatures,
)
from sparsekern.analysis.toy.scores import (
    AbsorptionScores,
    GroundTruthScores,
    absorption_scores,
    ground_truth_scores,
)

__all__ = [
    "PARENT_AND_CHILD",
    "TWENTY_FEATURES",
    "AbsorptionScores",
    "ContextTopics",
    "CopulaFeatures",
    "GroundTruthScores",
    "ManifoldFeatures",
    "Node",
    "PlantedRun",
    "SubspaceClusters",
    "Toy",
    "TreeFeatures",
    "absorption",
    "absorption_scores",
    "ground_truth_scores",
    "wrong_l0",
]

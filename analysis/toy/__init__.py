"""Made data whose features are known: what an analysis must find when it is there to be found.

A generator has its true directions as ``features`` ``[n_features, d]`` and
``sample(n, generator) -> (activations [n, n_features], x [n, d])``, with ``x = activations @ features`` plus noise.
:func:`ground_truth_scores` says which of them an SAE has found; the experiments train SAEs on them.
"""

from sparsekern.analysis.toy.bigrams import Bigrams, BigramSplitting, bigram_splitting, response_shares
from sparsekern.analysis.toy.experiments import HedgingRun, PlantedRun, absorption, hedging, wrong_l0
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
    ZipfFeatures,
)
from sparsekern.analysis.toy.law import Prediction, SplittingLaw, predicted_split, splitting_law
from sparsekern.analysis.toy.manifold import ManifoldOrFinite, manifold_or_finite
from sparsekern.analysis.toy.scores import (
    AbsorptionScores,
    GroundTruthScores,
    absorption_scores,
    ground_truth_scores,
    hedging_rate,
)

__all__ = [
    "PARENT_AND_CHILD",
    "TWENTY_FEATURES",
    "AbsorptionScores",
    "BigramSplitting",
    "Bigrams",
    "ContextTopics",
    "CopulaFeatures",
    "GroundTruthScores",
    "HedgingRun",
    "ManifoldFeatures",
    "ManifoldOrFinite",
    "Node",
    "PlantedRun",
    "Prediction",
    "SplittingLaw",
    "SubspaceClusters",
    "Toy",
    "TreeFeatures",
    "ZipfFeatures",
    "absorption",
    "absorption_scores",
    "bigram_splitting",
    "ground_truth_scores",
    "hedging",
    "hedging_rate",
    "manifold_or_finite",
    "predicted_split",
    "response_shares",
    "splitting_law",
    "wrong_l0",
]

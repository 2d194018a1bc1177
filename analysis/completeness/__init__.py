"""Whether a dictionary is complete and its latents atomic.

*Complete*: does a larger SAE have latents whose information a smaller one lacks (:func:`stitch`, :func:`swap`), which
features are found at all (:func:`best_f1`, :func:`feature_recovery_curve`), and how many are there
(:func:`matched_features`, :func:`estimate_total_features`)?
*Atomic*: are latents sums of others (:func:`meta_sae`, :func:`atomicity`)? Every number comes as a
:class:`~sparsekern.analysis.results.Result`; ``docs/analyses/completeness.md`` has what each cannot tell.
"""

from sparsekern.analysis.completeness.composition import COMPOSITIONS, Atomicity, MetaSAE, atomicity, meta_sae
from sparsekern.analysis.completeness.stitching import KINDS, Stitching, Swapping, stitch, stitched_mse, swap
from sparsekern.analysis.completeness.totals import (
    RecoveryCurve,
    TotalFeatures,
    best_f1,
    estimate_total_features,
    feature_recovery_curve,
    matched_features,
)

__all__ = [
    "COMPOSITIONS",
    "KINDS",
    "Atomicity",
    "MetaSAE",
    "RecoveryCurve",
    "Stitching",
    "Swapping",
    "TotalFeatures",
    "atomicity",
    "best_f1",
    "estimate_total_features",
    "feature_recovery_curve",
    "matched_features",
    "meta_sae",
    "stitch",
    "stitched_mse",
    "swap",
]

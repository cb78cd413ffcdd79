"""Metrics of curvature: pure functions, and thin torchmetrics classes over them that add up over processes.

``diagonal`` has the statistics of a diagonal, ``distribution`` its shares by layer and its histogram, ``step`` what a
step did, ``comparison`` the distance to the true diagonal.
"""

from hesscale_lightning.metrics.comparison import CurvatureAuditError, cosine_similarity, relative_l1_error
from hesscale_lightning.metrics.diagonal import (
    STATISTICS,
    CurvatureMaxAbs,
    CurvatureMeanAbs,
    CurvatureNegativeFraction,
    CurvatureTrace,
    max_abs,
    mean_abs,
    negative_fraction,
    trace,
)
from hesscale_lightning.metrics.distribution import (
    CurvatureHistogram,
    CurvatureLayerShares,
    layer_shares,
    log_histogram,
)
from hesscale_lightning.metrics.step import (
    EffectiveLearningRate,
    LossDecrease,
    StepSizeScale,
    effective_learning_rate,
    predicted_decrease,
)

__all__ = [
    "STATISTICS",
    "CurvatureAuditError",
    "CurvatureHistogram",
    "CurvatureLayerShares",
    "CurvatureMaxAbs",
    "CurvatureMeanAbs",
    "CurvatureNegativeFraction",
    "CurvatureTrace",
    "EffectiveLearningRate",
    "LossDecrease",
    "StepSizeScale",
    "cosine_similarity",
    "effective_learning_rate",
    "layer_shares",
    "log_histogram",
    "max_abs",
    "mean_abs",
    "negative_fraction",
    "predicted_decrease",
    "relative_l1_error",
    "trace",
]

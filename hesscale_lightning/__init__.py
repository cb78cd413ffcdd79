"""HesScale for PyTorch: the diagonal of the Hessian for about the cost of one more backward pass.

The torch-only names are importable at once; those that need Lightning or torchmetrics are imported when they are first
asked for, so a plain PyTorch program does not pay for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hesscale_lightning import _earlier_paths
from hesscale_lightning import _torch_names as _torch_names  # first: it says which names a changed torch lacks
from hesscale_lightning._version import __version__
from hesscale_lightning.compiled_step import CaptureError, compile_step
from hesscale_lightning.curvature import (
    UnsupportedOperationError,
    attach,
    backward,
    coverage,
    exact_hess_diag,
    register_rule,
    with_curvature,
)
from hesscale_lightning.optim import AdaHesScale, CalibratedRadius, SkipNonfinite, StepSizeScaling

if TYPE_CHECKING:
    from hesscale_lightning.command_line.data import DiabetesDataModule, DigitsDataModule, MNIST1DDataModule
    from hesscale_lightning.command_line.module import HesScaleModule
    from hesscale_lightning.metrics import (
        CurvatureAuditError,
        CurvatureHistogram,
        CurvatureLayerShares,
        CurvatureMaxAbs,
        CurvatureMeanAbs,
        CurvatureNegativeFraction,
        CurvatureTrace,
        EffectiveLearningRate,
        LossDecrease,
        StepSizeScale,
    )
    from hesscale_lightning.trainer.callback import HesScaleCallback
    from hesscale_lightning.trainer.compiled_training import CompiledStepMixin
    from hesscale_lightning.trainer.nonfinite_steps import SkipNonfiniteSteps
    from hesscale_lightning.uses.data_diagonal import hess_diag_over
    from hesscale_lightning.uses.hess_diag_state import HessDiagState
    from hesscale_lightning.uses.laplace_backend import HesScaleGGN
    from hesscale_lightning.uses.pruning import HesScalePruning
    from hesscale_lightning.uses.quantization import quantization_cost, quantized
    from hesscale_lightning.uses.sparsity_schedule import SparsitySchedule

# name -> module that defines it; imported on first access, because these modules import lightning or torchmetrics
_LAZY = {
    "CompiledStepMixin": "hesscale_lightning.trainer.compiled_training",
    "HesScaleCallback": "hesscale_lightning.trainer.callback",
    "HesScaleModule": "hesscale_lightning.command_line.module",
    "DiabetesDataModule": "hesscale_lightning.command_line.data",
    "DigitsDataModule": "hesscale_lightning.command_line.data",
    "MNIST1DDataModule": "hesscale_lightning.command_line.data",
    "SkipNonfiniteSteps": "hesscale_lightning.trainer.nonfinite_steps",
    "CurvatureAuditError": "hesscale_lightning.metrics",
    "CurvatureHistogram": "hesscale_lightning.metrics",
    "CurvatureLayerShares": "hesscale_lightning.metrics",
    "CurvatureMaxAbs": "hesscale_lightning.metrics",
    "CurvatureMeanAbs": "hesscale_lightning.metrics",
    "CurvatureNegativeFraction": "hesscale_lightning.metrics",
    "CurvatureTrace": "hesscale_lightning.metrics",
    "EffectiveLearningRate": "hesscale_lightning.metrics",
    "LossDecrease": "hesscale_lightning.metrics",
    "StepSizeScale": "hesscale_lightning.metrics",
    "HesScaleGGN": "hesscale_lightning.uses.laplace_backend",
    "HesScalePruning": "hesscale_lightning.uses.pruning",
    "SparsitySchedule": "hesscale_lightning.uses.sparsity_schedule",
    "HessDiagState": "hesscale_lightning.uses.hess_diag_state",
    "quantization_cost": "hesscale_lightning.uses.quantization",
    "quantized": "hesscale_lightning.uses.quantization",
    "hess_diag_over": "hesscale_lightning.uses.data_diagonal",
}

__all__ = [
    "AdaHesScale",
    "CalibratedRadius",
    "CaptureError",
    "CompiledStepMixin",
    "CurvatureAuditError",
    "CurvatureHistogram",
    "CurvatureLayerShares",
    "CurvatureMaxAbs",
    "CurvatureMeanAbs",
    "CurvatureNegativeFraction",
    "CurvatureTrace",
    "DiabetesDataModule",
    "DigitsDataModule",
    "EffectiveLearningRate",
    "HesScaleCallback",
    "HesScaleGGN",
    "HesScaleModule",
    "HesScalePruning",
    "HessDiagState",
    "LossDecrease",
    "MNIST1DDataModule",
    "SkipNonfinite",
    "SkipNonfiniteSteps",
    "SparsitySchedule",
    "StepSizeScale",
    "StepSizeScaling",
    "UnsupportedOperationError",
    "__version__",
    "attach",
    "backward",
    "compile_step",
    "coverage",
    "exact_hess_diag",
    "hess_diag_over",
    "quantization_cost",
    "quantized",
    "register_rule",
    "with_curvature",
]

_earlier_paths.install()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

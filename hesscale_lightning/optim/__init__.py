"""Optimizers that use a Hessian diagonal: AdaHesScale, and step-size scaling for any optimizer. Torch only."""

from hesscale_lightning.optim.adahesscale import AdaHesScale
from hesscale_lightning.optim.nonfinite import SkipNonfinite
from hesscale_lightning.optim.radius import CalibratedRadius
from hesscale_lightning.optim.step_size_scaling import StepSizeScaling

__all__ = ["AdaHesScale", "CalibratedRadius", "SkipNonfinite", "StepSizeScaling"]

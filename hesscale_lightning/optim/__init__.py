"""Optimizers that use a Hessian diagonal: AdaHesScale, and step-size scaling for any optimizer. Torch only."""

from hesscale_lightning.optim.adahesscale import AdaHesScale

__all__ = ["AdaHesScale"]

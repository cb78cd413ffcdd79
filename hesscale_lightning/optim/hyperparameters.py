"""Checks and readings of AdaHesScale's param-group options."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.optim.curvature_average import DENOMINATORS
from hesscale_lightning.optim.tensor_lists import as_host_number


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError, with the value, for a hyperparameter out of its range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have one element, but it has shape {tuple(lr.shape)}")
    for name in ("lr", "eps", "weight_decay", "damping", "lr_scale"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must be >= 0, got {group[name]}")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    for name in ("max_update", "delta"):
        if group[name] is not None and not group[name] > 0:
            raise ValueError(f"{name} must be > 0 or None, got {group[name]}")
    check_denominator(group["denominator"])


def check_denominator(denominator: str) -> None:
    """Raise ValueError unless it is one of the known denominators."""
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator must be one of {', '.join(DENOMINATORS)}, got {denominator!r}")


def learning_rate(group: dict[str, Any]) -> float | Tensor:
    """``lr * lr_scale``; a tensor only where it has to stay on the device. It may be negative: schedules overshoot."""
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.squeeze() if group["capturable"] else as_host_number(lr.squeeze())
    factor: float = group["lr_scale"]
    return lr * factor


def use_foreach(requested: bool | None, params: Iterable[Tensor]) -> bool:
    """Multi-tensor kernels unless refused, or unless a parameter is of a tensor subclass, which they may not know."""
    if requested is not None:
        return requested
    return all(type(param) in (Tensor, torch.nn.Parameter) for param in params)

"""Curvature is carried in float32 or better: half precision is raised before it is squared, never after."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def full(x: Tensor) -> Tensor:
    """``x`` in float32 if it is half precision, else ``x`` itself."""
    return x.float() if x.dtype in HALF else x


def squared(x: Tensor) -> Tensor:
    """``x * x``, in float32 or better."""
    if x.dtype in HALF:
        x = x.float()
    return x * x

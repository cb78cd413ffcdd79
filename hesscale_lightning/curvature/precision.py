"""Curvature is carried in float32 or better: half precision is raised before it is squared, never after."""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)

"""AdaHesScale's state of one parameter: its dtypes and devices, when it is made and when it is loaded."""

from typing import Any

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_COUNTERS = ("step", "hess_step")


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of gradient and curvature averages: float32 for half-precision parameters, else the parameter's."""
    return torch.float32 if param.dtype in _LOW_PRECISION else param.dtype


def new_state(param: Tensor, *, capturable: bool) -> dict[str, Tensor]:
    """Counters and averages at zero.

    Counters live on the CPU, where reading them costs nothing, unless the step is to be captured in a graph.
    """
    dtype = state_dtype(param)
    device = param.device if capturable else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "hess_step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_hess": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
    }


def restored(value: Any, name: str, param: Tensor, *, capturable: bool) -> Any:
    """A saved entry of the state as a copy on the right device and in the right dtype."""
    if not isinstance(value, Tensor):
        return value
    if name in _COUNTERS:
        return value.detach().to(device=param.device if capturable else "cpu", dtype=torch.float32, copy=True)
    return value.detach().to(device=param.device, dtype=state_dtype(param), copy=True)

"""Parameters that are DTensors: every process updates its own part by ordinary kernels, and only sums cross processes.

Arithmetic on whole DTensors would be right in principle, but a sum over one is partial: its ``item()`` is the sum of
this process's part, another number in every process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor; without the import where there can be none."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: the tensor itself unless it is a DTensor."""
    return tensor._local_tensor if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def layout(tensor: Any) -> Any:
    """The mesh and those of its dimensions over which a tensor is split; None if this process holds all of it."""
    if not is_distributed(tensor):
        return None
    split = tuple(d for d, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return (tensor.device_mesh, split) if split else None


def total(value: float | Tensor, where: Any) -> float | Tensor:
    """The sum over the processes between which ``where`` (a :func:`layout`) splits a tensor; the same bits in each."""
    if where is None:
        return value
    mesh, split = where
    number = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64, device=mesh.device_type)
    number = number.clone()
    for d in split:
        dist.all_reduce(number, group=mesh.get_group(d))
    return number if isinstance(value, Tensor) else number.item()


def check_placements(param: Any, name: str, value: Any) -> None:
    """Raise ValueError unless a gradient or diagonal is spread over processes exactly as its parameter is."""
    if type(param) in _PLAIN and type(value) in _PLAIN:  # at every step, for every parameter
        return
    if not is_distributed(param) and not is_distributed(value):
        return
    expected, found = getattr(param, "placements", None), getattr(value, "placements", None)
    if expected != found:
        raise ValueError(
            f"{name} has placements {found}, but its parameter has placements {expected}: redistribute it "
            f"(value.redistribute(placements=param.placements)) before the step"
        )


def refuse_radius(params: Iterable[Tensor]) -> None:
    """Raise ValueError if some parameter is a DTensor: steps are not measured across processes."""
    if any(is_distributed(param) for param in params):
        raise ValueError(
            "a CalibratedRadius cannot measure steps of sharded parameters (DTensor), expected radius=None: use delta "
            "in the quadratic model's own units"
        )

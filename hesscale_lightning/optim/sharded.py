"""Parameters that are DTensors: every process updates its own part by ordinary kernels, and only sums cross processes.

Arithmetic on whole DTensors would be right in principle, but a sum over one is partial: its ``item()`` is the sum of
this process's part, another number in every process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
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


def total(value: float | Tensor, where: Any, largest: bool = False) -> float | Tensor:
    """The sum over the processes between which ``where`` (a :func:`layout`) splits a tensor; the same bits in each.

    With ``largest`` it is the largest of them.
    """
    if where is None:
        return value
    mesh, split = where
    number = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64, device=mesh.device_type)
    number = number.clone()
    for d in split:
        dist.all_reduce(number, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=mesh.get_group(d))
    return number if isinstance(value, Tensor) else number.item()


def whole(terms: Sequence[Tensor], places: Sequence[Any] | None, largest: bool = False) -> Tensor:
    """The sum of tensors of one shape, each over the processes of its place, by one reduction for each place.

    Args:
        terms: what this process has of each.
        places: the :func:`layout` of each; None where nothing is split.
        largest: take the largest, entry by entry, instead of the sum.
    """
    joined = torch.maximum if largest else torch.add
    parts: dict[Any, Tensor] = {}
    for term, where in zip(terms, places or [None] * len(terms), strict=True):
        parts[where] = term if where not in parts else joined(parts[where], term.to(parts[where].device))
    result: Any = None
    for where, part in parts.items():
        value: Any = total(part, where, largest)
        result = value if result is None else joined(result, value.to(result.device))
    return result  # type: ignore[no-any-return]


def is_trial(param_groups: Iterable[dict[str, Any]]) -> bool:
    """Whether a step is the one by which ``torch.distributed.checkpoint`` has an optimizer make its state.

    Before it reads or writes the state of an optimizer that has none, it sets gradients of zeros and a learning rate
    of 0, and calls ``step``.
    """
    groups = list(param_groups)
    params = [param for group in groups for param in group["params"]]
    if any(getattr(param, "hess_diag", None) is not None for param in params):  # asked first: it needs no device
        return False
    grads = [local(param.grad) for param in params if param.grad is not None]
    return bool(grads) and all(group.get("lr", 0) == 0 for group in groups) and not any(grad.any() for grad in grads)


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


def place_gradients(params: Iterable[Any]) -> None:
    """Spread gradients as their parameters are, where both are DTensors of one mesh.

    Torch itself leaves some otherwise, as that of an embedding that is split by rows. Nothing happens to the others.
    """
    for param in params:
        if type(param) in _PLAIN:  # at every step, for every parameter
            continue
        grad = param.grad
        if grad is None or not (is_distributed(param) and is_distributed(grad)):
            continue
        if grad.placements != param.placements and grad.device_mesh == param.device_mesh:
            param.grad = grad.redistribute(placements=param.placements)


def refuse_radius(params: Iterable[Tensor]) -> None:
    """Raise ValueError if some parameter is a DTensor: steps are not measured across processes."""
    if any(is_distributed(param) for param in params):
        raise ValueError(
            "a CalibratedRadius cannot measure steps of sharded parameters (DTensor), expected radius=None: use delta "
            "in the quadratic model's own units"
        )

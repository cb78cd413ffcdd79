"""Steps whose gradient or diagonal is not finite are not taken: one such step would make every weight NaN."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hesscale_lightning.optim.sharded import layout, local, total

_INF = float("inf")


class SkipNonfinite:
    r"""Lets an optimizer skip the steps at which an entry of a gradient or of a diagonal is infinite or not a number.

    With gradients :math:`g` and diagonals :math:`h` of all parameters, a step is taken if
    :math:`\max(|g|_\infty, |h|_\infty) < \infty`. A skipped step leaves parameters and the optimizer's state as they
    are, to the bit: the gradients and diagonals are dropped (``p.grad`` and ``p.hess_diag`` become None), and without
    them an optimizer has nothing to do. The check reads all gradients once, and one number from the device.

    For loops that call ``backward()`` and then ``step()``, and for Stable-Baselines3; with Lightning, which passes a
    closure to ``step``, add :class:`hesscale_lightning.SkipNonfiniteSteps` to the Trainer's callbacks instead.

    Args:
        optimizer: any optimizer; it holds the check until :meth:`remove`.
        max_in_a_row: raise an error at the next step after so many skipped ones in a row: then it is not one bad batch.

    Attributes:
        skipped: how many steps were skipped.
        in_a_row: how many of them since the last step that was taken.

    Raises:
        ValueError: if ``max_in_a_row`` is below 1, or ``step`` is called with a closure.
        FloatingPointError: in ``step``, after too many skipped steps in a row. Nothing is updated then.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> guard = SkipNonfinite(optimizer)
        >>> for entry in (1.0, float("nan"), 1.0):
        ...     weight.grad = torch.tensor([entry, 0.0])
        ...     optimizer.step()
        >>> weight.tolist(), guard.skipped
        ([0.0, 1.0], 1)
    """

    def __init__(self, optimizer: Optimizer, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"Found max_in_a_row={max_in_a_row}, expected at least 1.")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0
        optimizer.skip_nonfinite = self  # type: ignore[attr-defined]  # where a logger finds the count

        def check(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            closures = [*args[1:], kwargs.get("closure")]  # args[0] is the optimizer
            if any(closure is not None for closure in closures):
                name = type(optimizer).__name__
                raise ValueError(
                    f"Found a closure in {name}.step(), whose gradients come after the check; expected gradients that "
                    "are there. Call backward() before step(), or with Lightning add SkipNonfiniteSteps() to the "
                    "Trainer's callbacks"
                )
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if is_finite(parameters):
                self.in_a_row = 0
            else:
                self._skip(parameters, optimizer)

        self._handle = optimizer.register_step_pre_hook(check)

    def _skip(self, parameters: list[Tensor], optimizer: Optimizer) -> None:
        if self.in_a_row >= self.max_in_a_row:
            raise too_many(self.in_a_row, nonfinite_names(parameters, optimizer))
        drop(parameters)
        self.skipped += 1
        self.in_a_row += 1

    def remove(self) -> None:
        """Takes the check off the optimizer."""
        self._handle.remove()


def too_many(in_a_row: int, where: str) -> FloatingPointError:
    """The error after too many skipped steps."""
    return FloatingPointError(
        f"Skipped {in_a_row} steps in a row, and the next one is not finite either ({where}): this is not one bad "
        "batch. Look for NaN in weights and inputs, lower the learning rate, or load an earlier checkpoint"
    )


def is_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every entry of the gradients and diagonals of some parameters is finite, on all processes.

    Args:
        parameters: with gradients of any shape and dtype, or without. Those that are spread over processes (DTensor)
            are checked together, in a collective that every process has to join.
    """
    parts: dict[tuple[Any, torch.device, torch.dtype], list[Tensor]] = {}
    for p in parameters:
        for x in (p.grad, getattr(p, "hess_diag", None)):
            if x is None:
                continue
            part = local(x)
            if part.is_sparse:
                part = part.coalesce().values()
            if part.numel() or layout(x) is not None:
                parts.setdefault((layout(x), part.device, part.dtype), []).append(part)
    counts: dict[tuple[Any, torch.device], Tensor] = {}  # of tensors with an entry that is not finite
    for (where, device, _), tensors in parts.items():
        largest = torch._foreach_norm([x for x in tensors if x.numel()] or [tensors[0].new_zeros(1)], _INF)
        count = (~torch.stack(list(largest)).isfinite()).sum().float()
        counts[where, device] = counts[where, device] + count if (where, device) in counts else count
    found = [total(count, where) for (where, _), count in counts.items()]
    return not any(float(count) for count in found)


def drop(parameters: Iterable[Tensor]) -> None:
    """Takes gradients and diagonals off, without which an optimizer's step does nothing."""
    for p in parameters:
        p.grad = None
        if getattr(p, "hess_diag", None) is not None:
            p.hess_diag = None  # type: ignore[attr-defined]


def nonfinite_names(
    parameters: Iterable[Tensor], optimizer: Optimizer, known: Mapping[str, Tensor] | None = None
) -> str:
    """Which gradients and diagonals are not finite, in words, for messages.

    Args:
        parameters: to look at.
        optimizer: that has them; its parameters' names are used, else their positions.
        known: parameters by name, as a module has them.
    """
    names = {id(p): name for name, p in (known or {}).items()}
    for k, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            own = group["param_names"][i] if "param_names" in group else f"parameter {i} of group {k}"
            names.setdefault(id(p), own)
    found = []
    for p in parameters:
        for kind, x in (("gradient", p.grad), ("diagonal", getattr(p, "hess_diag", None))):
            if x is not None and not bool(local(x).isfinite().all()):
                found.append(f"{kind} of {names.get(id(p), 'a parameter')}")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (", ".join(found[:3]) + more) or "on another process"

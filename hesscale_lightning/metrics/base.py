"""What the metric classes share, and what the pure functions check and add up."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class CurvatureMetric(Metric):
    """Not differentiable, no better direction, state that adds up over updates and processes."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value, or several over time.

        Args:
            val: one result of ``compute`` or ``forward``, or a list of them; None draws ``compute()``.
            ax: a matplotlib axis to draw into; None makes a new figure.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)


def wide(diagonals: Iterable[Tensor]) -> list[Tensor]:
    """The diagonals with entries, in at least float32: a sum of half-precision squares overflows."""
    diagonals = list(diagonals)
    for position, h in enumerate(diagonals):
        if h is None or isinstance(h, torch.nn.Parameter):
            found = "None" if h is None else f"a parameter of shape {tuple(h.shape)}"
            raise TypeError(
                f"Found {found} at position {position}, expected a diagonal. Give [p.hess_diag for p in parameters], "
                "after backward() and before optimizer.step(), which takes the diagonals and leaves None."
            )
    hs = [h.detach() if h.dtype in (torch.float32, torch.float64) else h.detach().float() for h in diagonals]
    hs = [h for h in hs if h.numel()]
    if not hs:
        raise ValueError(
            "Found no diagonal to summarise, expected at least one tensor with entries. p.hess_diag is set by the "
            "backward pass that follows hesscale_lightning.attach(loss)."
        )
    return hs


def count(diagonals: Iterable[Tensor]) -> int:
    """Number of entries, from the shapes."""
    return sum(h.numel() for h in diagonals)


def gather(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars of any devices as one vector on the first one's device."""
    first = scalars[0]
    return torch.stack([s.to(device=first.device, dtype=first.dtype) for s in scalars])


def total(scalars: Sequence[Tensor]) -> Tensor:
    """Sum of scalars of any devices."""
    return gather(scalars).sum()


def paired(first: Iterable[Tensor], second: Iterable[Tensor], names: tuple[str, str]) -> list[tuple[Tensor, Tensor]]:
    """Tensors of two lists that belong together, in at least float32; raises if they do not fit."""
    left, right = list(first), list(second)
    if len(left) != len(right) or any(a.shape != b.shape for a, b in zip(left, right, strict=True)):
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (left, right)]
        raise ValueError(
            f"Found {names[0]} of shapes {shapes[0]} and {names[1]} of shapes {shapes[1]}, expected one of each for "
            "every parameter, of its shape."
        )
    if not left:
        raise ValueError(f"Found no {names[0]}, expected at least one tensor.")
    return [(_wide(a), _wide(b)) for a, b in zip(left, right, strict=True)]


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()

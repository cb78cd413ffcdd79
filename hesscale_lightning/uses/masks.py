"""Masks of pruned parameters, as torch.nn.utils.prune puts them on, by an importance that has a sign."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


class LowestImportance(prune.BasePruningMethod):
    """Prunes the entries of lowest importance, which has a sign, unlike a magnitude.

    Args:
        amount: A fraction of the entries, or their number.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: int | float) -> None:
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask without the entries of lowest importance ``t``."""
        mask = default_mask.clone(memory_format=torch.contiguous_format)
        mask.view(-1)[lowest(t.reshape(-1), self.amount)] = 0
        return mask


@contextmanager
def order_kept(owner: nn.Module, name: str) -> Iterator[None]:
    """Leaves a parameter that gets a mask at its place, by which the optimizer, made later, finds its saved state."""
    before = list(owner._parameters)
    yield
    for other in before:
        key = f"{name}_orig" if other == name else other
        owner._parameters[key] = owner._parameters.pop(key)


def lowest(importance: Tensor, amount: Any) -> Tensor:
    """Where the entries of lowest importance are: an amount of them, in one dimension."""
    left = importance.numel()
    if isinstance(amount, bool) or not isinstance(amount, Real) or not float(amount) >= 0:
        raise ValueError(f"Found amount={amount!r}, expected a fraction from 0 to 1, or a number of entries.")
    count = int(amount) if isinstance(amount, Integral) else round(float(amount) * left)
    if count > left:
        raise ValueError(f"Found amount={amount}, expected at most the {left} entries that are left.")
    return torch.topk(importance, count, largest=False).indices


def original(owner: nn.Module, name: str) -> Tensor:
    """A parameter, also where a mask stands before it."""
    found: Any = getattr(owner, f"{name}_orig", None)
    return getattr(owner, name) if found is None else found  # type: ignore[no-any-return]


def mask_of(owner: nn.Module, name: str) -> Tensor:
    """The mask of a parameter; ones if it has none."""
    found: Any = getattr(owner, f"{name}_mask", None)
    return torch.ones_like(original(owner, name)) if found is None else found

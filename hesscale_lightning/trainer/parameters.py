"""The parameters of optimizers and the diagonals that wait on them."""

from collections.abc import Container, Iterable, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer


def parameters_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """All parameters of some optimizers, in their order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def diagonals_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The diagonals that are there."""
    return [h for p in parameters if (h := getattr(p, "hess_diag", None)) is not None]


def clear_diagonals(parameters: Iterable[Tensor]) -> None:
    """Takes the diagonals off."""
    for p in parameters:
        if getattr(p, "hess_diag", None) is not None:
            del p.hess_diag  # type: ignore[attr-defined]


def reduce_diagonals(trainer: pl.Trainer, parameters: Sequence[Tensor], skipped: Container[int]) -> None:
    """Averages the diagonals over the processes, as DDP averages gradients, in one call.

    A parameter that this process did not use takes part with zeros, so the buffer is laid out alike everywhere.

    Args:
        trainer: the trainer of every process.
        parameters: the same parameters in every process.
        skipped: the ``id`` of those that are to have no diagonal.
    """
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    diagonals = [getattr(p, "hess_diag", None) for p in parameters]
    flat = torch.cat(
        [
            p.new_zeros(p.numel(), dtype=dtype) if h is None else h.reshape(-1).to(dtype)
            for p, h in zip(parameters, diagonals, strict=True)
        ]
    )
    flat = trainer.strategy.reduce(flat, reduce_op="mean")
    parts = flat.split([p.numel() for p in parameters])
    for p, h, part in zip(parameters, diagonals, parts, strict=True):
        if h is not None:
            h.copy_(part.view_as(h))
        elif p.grad is not None and id(p) not in skipped:  # another process used it
            p.hess_diag = part.view_as(p).to(torch.promote_types(p.dtype, torch.float32))  # type: ignore[attr-defined]

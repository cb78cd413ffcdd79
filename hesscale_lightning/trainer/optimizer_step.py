"""What an optimizer finds when it steps: the diagonal of the whole batch's loss, and perhaps a trust region."""

from collections.abc import Container

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from hesscale_lightning.optim import StepSizeScaling
from hesscale_lightning.optim.sharded import local, place_gradients
from hesscale_lightning.trainer.parameters import diagonals_of, parameters_of, reduce_diagonals
from hesscale_lightning.trainer.settings import is_model_parallel


def add_trust_regions(trainer: pl.Trainer, delta: float) -> None:
    """Puts a trust region around each of the trainer's optimizers."""
    trainer.optimizers = [StepSizeScaling(optimizer, delta) for optimizer in trainer.optimizers]


def complete_diagonals(trainer: pl.Trainer, optimizer: Optimizer, refreshing: bool, skipped: Container[int]) -> None:
    """Turns what this process computed into the diagonal of the whole batch's loss: unscaled, and averaged.

    Args:
        trainer: the trainer of every process.
        optimizer: the optimizer that is about to step.
        refreshing: whether this step has a diagonal.
        skipped: the ``id`` of the parameters that are to have none.
    """
    parameters = parameters_of([optimizer])
    place_gradients(parameters)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if refreshing and scaler is not None:
        torch._foreach_mul_([local(h) for h in diagonals_of(parameters)], 1.0 / scaler.get_scale())
    # Under ModelParallelStrategy diagonals are split as the gradients are, and averaged with them.
    if refreshing and trainer.world_size > 1 and not is_model_parallel(trainer):
        reduce_diagonals(trainer, parameters, skipped)
    if (scaler is not None or trainer.world_size > 1) and hasattr(optimizer, "record_gradients"):
        # Our optimizers compare each gradient with what backward left; up to here its changes are accounted for.
        optimizer.record_gradients()

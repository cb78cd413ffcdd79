"""Collects what a batch's steps have done and writes it to the trainer's loggers."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from hesscale_lightning.trainer.histograms import write_histogram
from hesscale_lightning.trainer.step_log import StepLog, layer_names, note_step


class StepLogger:
    """Logs one batch's steps, of one optimizer or of several."""

    def __init__(self) -> None:
        self._logs: dict[int, StepLog] = {}  # what this batch's end will log, by the optimizer's index

    def reset(self) -> None:
        """Forgets what was not written."""
        self._logs = {}

    def note(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
        statistics: bool,
        audit: dict[str, Tensor],
        per_layer: bool,
        histogram: bool,
    ) -> None:
        """Notes what is known before an optimizer's step.

        Args:
            trainer: the trainer.
            pl_module: its module.
            optimizer: the optimizer that is about to step.
            statistics: whether more than the audit is logged.
            audit: the audit's figures, empty where there was none.
            per_layer: also log each layer.
            histogram: also log a histogram of the entries' sizes.
        """
        index = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
        prefix = f"curvature/optimizer_{index}" if len(trainer.optimizers) > 1 else "curvature"
        if statistics:
            layers = layer_names(pl_module) if per_layer else None
            log = note_step(prefix, optimizer, layers, histogram)
        else:
            log = StepLog(prefix, optimizer, {}, only_audit=True)
        log.values |= {f"audit/{name}": figure for name, figure in audit.items()}
        self._logs[index] = log

    def take(self) -> list[StepLog]:
        """What was noted since the last call, completed by what can be told once the parameters have moved."""
        logs, self._logs = list(self._logs.values()), {}
        for log in logs:
            log.after_step()
        return logs

    def write(self, trainer: pl.Trainer, logs: list[StepLog], step: int) -> None:
        """Writes to every logger of the trainer and to its ``callback_metrics``."""
        record = {key: number for log in logs for key, number in log.numbers().items()}
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and not all(abs(record.get(f"{log.prefix}/trace", 0.0)) < float("inf") for log in logs):
            return  # the loss scale was too large: the scaler skips this step, and there is nothing to report
        # Not self.log: that reaches a logger only on the trainer's own log_every_n_steps.
        for logger in trainer.loggers:
            logger.log_metrics(record, step=step)
        trainer.callback_metrics.update({key: torch.tensor(number) for key, number in record.items()})
        if trainer.is_global_zero:
            for log in logs:
                if log.counts is not None:
                    write_histogram(trainer.loggers, f"{log.prefix}/histogram", log.counts, step)


def add_decrease(log: StepLog, trainer: pl.Trainer, outputs: dict[str, Any], after: Tensor | None) -> None:
    """Adds the actual fall of the batch's loss, and its ratio to the predicted one.

    Args:
        log: the step's log.
        trainer: the trainer.
        outputs: what ``training_step`` returned, with the loss before the step.
        after: the loss after the step; None adds nothing.
    """
    if after is None:
        return
    decrease = trainer.strategy.reduce(outputs["loss"].detach().float() - after, reduce_op="mean")
    log.values["actual_decrease"] = decrease
    if "predicted_decrease" in log.values:
        log.values["gain_ratio"] = decrease / log.values["predicted_decrease"]

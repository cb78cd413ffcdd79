"""Histograms of ``log10 |h|`` to the loggers that have a place for them.

- TensorBoard: a histogram, ``curvature/histogram``.
- Weights & Biases: a ``wandb.Histogram`` under the same key.
- MLflow, which has no histograms: an artifact for each logged step, ``curvature/histogram/step_00000100.json``, with
  the bins' edges and their counts.
"""

from collections.abc import Iterable
from importlib import import_module
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hesscale_lightning.metrics.distribution import BINS, HIGHEST, LOWEST


def takes_histograms(logger: Logger) -> bool:
    """Whether there is a place for histograms in what a logger writes to."""
    if isinstance(logger, (MLFlowLogger, WandbLogger)):
        return True
    return hasattr(getattr(logger, "experiment", None), "add_histogram_raw")  # TensorBoard's writer


def warn_without_histograms(trainer: pl.Trainer) -> None:
    """Warns that histograms were asked for and no logger takes them."""
    if trainer.is_global_zero and not any(map(takes_histograms, trainer.loggers)):
        rank_zero_warn(
            "HesScaleCallback found histogram=True and no logger that has histograms. Add a TensorBoardLogger, "
            "a WandbLogger or an MLFlowLogger."
        )


def write_histogram(loggers: Iterable[Logger], key: str, counts: Tensor, step: int) -> None:
    """Writes a histogram of ``log10 |h|`` to every logger that takes it.

    Args:
        loggers: the trainer's loggers.
        key: its name, such as ``curvature/histogram``.
        counts: how many entries each bin has, of shape (72,): a quarter of a power of ten, from 1e-12 to 1e6.
        step: the optimizer step.
    """
    numbers = [int(count) for count in counts.tolist()]
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1, dtype=torch.float64).tolist()
    for logger in filter(takes_histograms, loggers):
        if isinstance(logger, WandbLogger):
            wandb: Any = import_module("wandb")
            logger.log_metrics({key: wandb.Histogram(np_histogram=(numbers, edges))}, step=step)
        elif isinstance(logger, MLFlowLogger):
            content = {"step": step, "log10_edges": edges, "counts": numbers}
            logger.experiment.log_dict(logger.run_id, content, f"{key}/step_{step:08d}.json")
        else:
            writer: Any = logger.experiment  # type: ignore[attr-defined]
            _to_tensorboard(writer, key, numbers, edges, step)


def _to_tensorboard(writer: Any, key: str, counts: list[int], edges: list[float], step: int) -> None:
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    writer.add_histogram_raw(
        key,
        min=LOWEST,
        max=HIGHEST,
        num=sum(counts),
        sum=sum(n * m for n, m in zip(counts, middles, strict=True)),
        sum_squares=sum(n * m * m for n, m in zip(counts, middles, strict=True)),
        bucket_limits=edges[1:],
        bucket_counts=counts,
        global_step=step,
    )

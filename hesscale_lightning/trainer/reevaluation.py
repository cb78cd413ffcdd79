"""Evaluates a batch's loss once more, after the step, so that nobody can tell: the actual decrease of the loss."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from hesscale_lightning.trainer.audit import unchanged_buffers


class Reevaluation:
    """The loss of a batch after the step, with the random numbers (dropout) that the step itself has seen."""

    def __init__(self) -> None:
        self._random: dict[str, Tensor] = {}

    def before_forward(self, device: torch.device) -> None:
        """Notes the state of the random numbers."""
        self._random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            self._random["cuda"] = torch.cuda.get_rng_state(device)

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor | None:
        """Runs ``training_step`` again; None if it returns no loss."""
        with ExitStack() as stack:
            stack.enter_context(isolate_rng())
            torch.set_rng_state(self._random["cpu"])
            if "cuda" in self._random:
                torch.cuda.set_rng_state(self._random["cuda"], pl_module.device)
            stack.enter_context(unchanged_buffers(pl_module))
            stack.enter_context(unchanged_metrics(pl_module))
            stack.enter_context(muted(pl_module))
            stack.enter_context(torch.no_grad())
            stack.enter_context(trainer.precision_plugin.train_step_context())
            output = asked_for_step(pl_module, batch, batch_idx)
        loss = output.get("loss") if isinstance(output, dict) else output
        return loss.detach().float() if isinstance(loss, Tensor) else None


def asked_for_step(pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Any:
    """What ``training_step`` returns; as in Lightning's loop, it need not take the batch's index."""
    step = pl_module.training_step
    taken = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return step(batch, batch_idx) if taken else step(batch)


@contextmanager
def muted(pl_module: pl.LightningModule) -> Iterator[None]:
    """Makes the module's ``log`` and ``log_dict`` do nothing."""
    names = ("log", "log_dict")
    saved = {name: pl_module.__dict__[name] for name in names if name in pl_module.__dict__}
    for name in names:
        pl_module.__dict__[name] = _do_nothing
    try:
        yield
    finally:
        for name in names:
            del pl_module.__dict__[name]
        pl_module.__dict__.update(saved)


@contextmanager
def unchanged_metrics(pl_module: pl.LightningModule) -> Iterator[None]:
    """Puts the states of the module's metrics back as they were."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    saved = [
        {
            **{k: list(v) if isinstance(v, list) else v.detach().clone() for k, v in metric.metric_state.items()},
            "_update_count": metric._update_count,
            "_computed": metric._computed,
        }
        for metric in metrics
    ]
    try:
        yield
    finally:
        for metric, state in zip(metrics, saved, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass

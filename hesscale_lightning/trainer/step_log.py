"""What is logged of an optimizer's step: noted before it, completed after it, read from the device once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hesscale_lightning.metrics import (
    STATISTICS,
    effective_learning_rate,
    layer_shares,
    log_histogram,
    mean_abs,
    predicted_decrease,
)
from hesscale_lightning.optim.sharded import layout, local
from hesscale_lightning.trainer import split_statistics


@dataclass
class StepLog:
    """One optimizer's step.

    Attributes:
        prefix: what its keys begin with, ``curvature`` or ``curvature/optimizer_1``.
        optimizer: the optimizer.
        values: scalars by the rest of their keys, still on the device.
        counts: the diagonal's histogram, if asked for.
        only_audit: whether nothing but the audit is logged of this step.
    """

    prefix: str
    optimizer: Optimizer
    values: dict[str, Tensor]
    counts: Tensor | None = None
    only_audit: bool = False
    _parameters: list[list[Tensor]] = field(default_factory=list)
    _before: list[Tensor] = field(default_factory=list)
    _gradients: list[Tensor] = field(default_factory=list)
    _diagonals: list[Tensor] = field(default_factory=list)
    _places: list[Any] = field(default_factory=list)  # over what each vector above is split between processes

    def after_step(self) -> None:
        """Adds what can be told once the parameters have moved."""
        if self._parameters:
            steps = [_flat(ps) - before for ps, before in zip(self._parameters, self._before, strict=True)]
            if any(self._places):
                self.values |= split_statistics.step_statistics(steps, self._gradients, self._diagonals, self._places)
            else:
                self.values["effective_lr"] = effective_learning_rate(steps, self._gradients)
                self.values["predicted_decrease"] = predicted_decrease(self._gradients, self._diagonals, steps)
        if self.only_audit:
            return
        statistics: Mapping[str, Tensor] = getattr(self.optimizer, "stats", {})
        self.values |= {key: value for key, value in statistics.items() if key.split("/")[0] == "scale"}

    def numbers(self) -> dict[str, float]:
        """All scalars by their full keys, in one transfer from the device."""
        values = list(self.values.values())
        if not values:
            return {}
        numbers = torch.stack([v.to(values[0].device, torch.float64) for v in values]).tolist()
        return {f"{self.prefix}/{key}": number for key, number in zip(self.values, numbers, strict=True)}


def note_step(prefix: str, optimizer: Optimizer, layers: Mapping[int, str] | None, histogram: bool) -> StepLog:
    """Notes what is known before an optimizer's step.

    Args:
        prefix: what the keys begin with.
        optimizer: the optimizer that is about to step; at least one of its parameters has a diagonal.
        layers: names of layers by the ``id`` of their parameters, to log each layer; None logs none.
        histogram: whether to count the entries by size.
    """
    log = StepLog(prefix, optimizer, {})
    batches: dict[Any, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if getattr(p, "hess_diag", None) is not None and p.grad is not None:
                batches.setdefault((p.device, p.dtype, layout(p)), []).append(p)
    # One vector of everything: few operations, and clipping, the step and zero_grad change none of it.
    log._parameters = list(batches.values())
    log._places = [place for _, _, place in batches]
    log._before = [_flat(ps) for ps in log._parameters]
    log._gradients = [_flat([p.grad for p in ps if p.grad is not None]) for ps in log._parameters]
    log._diagonals = [_flat([p.hess_diag for p in ps]) for ps in log._parameters]  # type: ignore[attr-defined]
    grouped: dict[str, list[Tensor]] = {}
    if layers is not None:
        for p in (p for ps in log._parameters for p in ps):
            grouped.setdefault(layers.get(id(p), "unnamed"), []).append(p)
    if any(log._places):
        log.values = split_statistics.diagonal_statistics(log._diagonals, log._places)
        if grouped:
            log.values |= split_statistics.layer_statistics(
                {name: [(local(p.hess_diag), layout(p)) for p in ps] for name, ps in grouped.items()}  # type: ignore[attr-defined]
            )
        if histogram:
            log.counts = split_statistics.histogram(log._diagonals, log._places)
        return log
    log.values = {name: statistic(log._diagonals) for name, statistic in STATISTICS.items()}
    if grouped:
        diagonals = {name: [p.hess_diag for p in ps] for name, ps in grouped.items()}  # type: ignore[attr-defined]
        log.values |= {f"share/{name}": share for name, share in layer_shares(diagonals).items()}
        log.values |= {f"mean_abs/{name}": mean_abs(hs) for name, hs in diagonals.items()}
    if histogram:
        log.counts = log_histogram(log._diagonals)
    return log


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([local(t.detach()).reshape(-1) for t in tensors])


def layer_names(module: nn.Module) -> dict[int, str]:
    """The name of the layer to which each parameter belongs, by the parameter's ``id``."""
    names = {}
    for name, p in module.named_parameters():
        layer = name.replace("_orig_mod.", "").rpartition(".")[0]
        names[id(p)] = layer or name
    return names

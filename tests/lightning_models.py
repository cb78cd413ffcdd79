"""Small models and data that the Lightning tests share."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hesscale_lightning import AdaHesScale

FEATURES, CLASSES = 6, 3


def make_net(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers).to(dtype)


def make_batches(count: int, size: int = 4, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, size, FEATURES, generator=generator, dtype=dtype)
    y = torch.randint(CLASSES, (count, size), generator=generator)
    return list(zip(x, y, strict=True))


def make_loader(batches: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    """A loader that yields exactly these batches, in order."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=len(batches[0][0]))


class ResumableLoader:
    """Goes on at the batch where it was, as a resumed epoch needs it."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.position, self.start = batches, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        for index in range(start, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


class Classifier(pl.LightningModule):
    """Cross-entropy on a small tanh network, with whatever optimizer the test asks for."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer] = AdaHesScale) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Recorder(pl.Callback):
    """Copies every parameter's diagonal just before each optimizer step."""

    def __init__(self) -> None:
        self.diagonals: list[list[Tensor | None]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = [getattr(p, "hess_diag", None) for p in parameters]
        self.diagonals.append([None if h is None else h.clone() for h in found])


class ListLogger(Logger):
    """Keeps what is logged in a list."""

    name = "list"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.append((step, metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def curvature(self) -> dict[int, dict[str, float]]:
        return {step: record for step, record in self.records if any(key.startswith("curvature/") for key in record)}


def make_trainer(*callbacks: pl.Callback, steps: int | None = None, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    if steps is not None:
        quiet["max_steps"] = steps
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(
    model: pl.LightningModule, batches: list[tuple[Tensor, Tensor]], *callbacks: pl.Callback, **options: Any
) -> Any:
    """Train on the batches in order; returns the recorder of the diagonals and the trainer."""
    recorder = Recorder()
    trainer = make_trainer(*callbacks, recorder, **options)
    trainer.fit(model, make_loader(batches))
    return recorder, trainer

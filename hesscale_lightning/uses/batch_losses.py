"""Losses of batches, whatever they come from: a model with a loss function, or a LightningModule with its data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class BatchLosses(Protocol):
    """What computes the loss of a batch."""

    model: nn.Module
    loader: Iterable[Any]

    def loss(self, batch: Any, index: int) -> Tensor:
        """The loss of a batch, with its graph."""

    def context(self) -> AbstractContextManager[Any]:
        """What stands around the whole pass."""


class LossFunction:
    """``loss_fn(model(x), y)`` for batches ``(x, y)``, or ``step(model, batch)`` for any."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor] | None,
        step: Callable[[nn.Module, Any], Tensor] | None,
        loader: Iterable[Any],
    ) -> None:
        self.model = model
        self.loader = loader
        self._loss_fn = loss_fn
        self._step = step
        self._device = next((p.device for p in model.parameters()), None)

    def context(self) -> AbstractContextManager[Any]:
        """Nothing stands around the pass."""
        return nullcontext()

    def loss(self, batch: Any, index: int) -> Tensor:
        """The loss of a batch, moved to the model's device."""
        batch = moved(batch, self._device)
        if self._step is not None:
            found = self._step(self.model, batch)
        else:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TypeError(
                    f"Found a batch that is {described(batch)}, expected a pair (x, y) for loss_fn(model(x), y): give "
                    "step=lambda model, batch: ... , which returns the loss, in place of loss_fn."
                )
            assert self._loss_fn is not None
            found = self._loss_fn(self.model(batch[0]), batch[1])
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise TypeError(f"Found a loss that is {described(found)}, expected a tensor with one element.")
        return found


class TrainingStep:
    """``training_step`` of a LightningModule, which logs nothing while it is asked."""

    def __init__(self, model: Any, data: Any) -> None:
        from lightning.pytorch import LightningDataModule

        if not model.automatic_optimization:
            raise ValueError(
                f"Found {type(model).__name__} with manual optimization, whose training_step updates the parameters; "
                "expected one that returns the loss. Give step=lambda model, batch: ... , which returns it."
            )
        self.model = model
        self._trainer = getattr(model, "_trainer", None)  # model.trainer raises where there is none
        own = data if isinstance(data, LightningDataModule) else None
        self._data = own if own is not None else getattr(self._trainer, "datamodule", None)
        if data is None or own is not None:
            source = model if data is None else data
            source.prepare_data()
            source.setup("fit")
            data = source.train_dataloader()
        self.loader = data

    def context(self) -> AbstractContextManager[Any]:
        """Keeps the module from logging."""
        from hesscale_lightning.trainer.reevaluation import muted

        return muted(self.model)

    def loss(self, batch: Any, index: int) -> Tensor:
        """The loss that ``training_step`` returns for a batch, after the hooks that move and transform batches."""
        from hesscale_lightning.trainer.reevaluation import asked_for_step

        batch = self._transferred(batch)
        plugin = getattr(self._trainer, "precision_plugin", None)
        with nullcontext() if plugin is None else plugin.train_step_context():
            output = asked_for_step(self.model, batch, index)
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise ValueError(f"Found {type(loss).__name__} from training_step, expected the loss as a tensor.")
        return loss

    def _transferred(self, batch: Any) -> Any:
        from lightning.pytorch.utilities.model_helpers import is_overridden

        def hook(name: str) -> Callable[..., Any]:
            owner = self._data if self._data is not None and is_overridden(name, self._data) else self.model
            return getattr(owner, name)  # type: ignore[no-any-return]

        batch = hook("on_before_batch_transfer")(batch, 0)
        batch = hook("transfer_batch_to_device")(batch, self.model.device, 0)
        return hook("on_after_batch_transfer")(batch, 0)


def batch_losses(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    data: Any,
    step: Callable[[nn.Module, Any], Tensor] | None,
) -> BatchLosses:
    """The source of losses that the arguments describe; raises TypeError where they fit none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Found a model of type {type(model).__name__}, expected a torch.nn.Module.")
    model = getattr(model, "module", model) if isinstance(model, _parallel()) else model
    if loss_fn is not None and step is not None:
        raise TypeError("Found both loss_fn and step, expected one of them.")
    if loss_fn is None and step is None:
        if not hasattr(model, "training_step"):
            raise TypeError(
                f"Found no loss_fn with a {type(model).__name__}, expected one: only a LightningModule brings its own, "
                "its training_step."
            )
        return TrainingStep(model, data)
    if not callable(loss_fn if step is None else step):
        raise TypeError(f"Found a loss that is {described(step or loss_fn)}, expected a function.")
    if hasattr(data, "train_dataloader"):
        data.prepare_data()
        data.setup("fit")
        data = data.train_dataloader()
    if not isinstance(data, Iterable):
        raise TypeError(f"Found data of type {type(data).__name__}, expected batches, such as a DataLoader's.")
    return LossFunction(model, loss_fn, step, data)


def _parallel() -> tuple[type, ...]:
    # A wrapper's backward would average gradients over processes, for each batch.
    return (nn.parallel.DistributedDataParallel, nn.DataParallel)


def moved(batch: Any, device: torch.device | None) -> Any:
    """A batch with its tensors on a device; what is no tensor stays as it is."""
    if device is None:
        return batch
    if isinstance(batch, Tensor) or (hasattr(batch, "to") and callable(batch.to)):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(part, device) for part in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(moved(part, device) for part in batch)
    if isinstance(batch, Mapping):
        return {name: moved(part, device) for name, part in batch.items()}
    return batch


def size_of(batch: Any) -> int:
    """How many samples are in a batch: the first dimension, which all its tensors must share."""
    sizes = set(_sizes(batch))
    if len(sizes) != 1:
        found = f"tensors of {sorted(sizes)} samples" if sizes else described(batch)
        raise ValueError(
            f"Found a batch of {found}, expected tensors with one common first dimension, the number of samples: give "
            "batch_size=lambda batch: ... , which returns it."
        )
    return sizes.pop()


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield len(batch)
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _sizes(part)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for part in batch:
            yield from _sizes(part)


def described(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"

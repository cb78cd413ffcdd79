"""A model that computes curvature on the side and is afterwards what it was."""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module, training: bool = False) -> Iterator[list[tuple[str, Tensor]]]:
    """Puts back all that computing curvature changes in a model, however it ends.

    Within, no parameter has a gradient or a diagonal, and hooks that wait for an accumulated gradient (an optimizer's
    step in backward) are off. Afterwards gradients, diagonals, those hooks, the mode of every module, all buffers, the
    generators of random numbers (torch's on all devices, Python's, numpy's) and the state of torchmetrics' metrics in
    the model are what they were.

    Args:
        model: The model.
        training: The mode that the model has within.

    Yields:
        The parameters that require grad, with their names.
    """
    every = list(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad, dict(p._post_accumulate_grad_hooks or {})) for p in every]
    diagonals = [(p, p.__dict__["hess_diag"]) for p in every if "hess_diag" in p.__dict__]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    with ExitStack() as stack:
        stack.callback(_put_back, every, modes, gradients, diagonals, buffers)
        stack.enter_context(_random_numbers_unchanged({p.device for p in every}))
        stack.enter_context(_metrics_unchanged(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        model.train(training)
        clear(every)
        for p in every:
            if p._post_accumulate_grad_hooks:
                p._post_accumulate_grad_hooks.clear()  # setting None would leave autograd's own reference to them
        yield [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def clear(parameters: Sequence[Tensor]) -> None:
    """Takes gradients and diagonals off parameters."""
    for p in parameters:
        p.grad = None
        p.__dict__.pop("hess_diag", None)


def _put_back(
    every: Sequence[Tensor],
    modes: Sequence[tuple[nn.Module, bool]],
    gradients: Sequence[tuple[Any, Tensor | None, dict[Any, Any]]],
    diagonals: Sequence[tuple[Tensor, Any]],
    buffers: Sequence[tuple[nn.Module, str, Tensor | None, Tensor | None]],
) -> None:
    clear(every)
    for p, grad, hooks in gradients:
        p.grad = grad
        if hooks:
            p._post_accumulate_grad_hooks.update(hooks)
    for p, h in diagonals:
        p.hess_diag = h  # type: ignore[attr-defined]
    for module, mode in modes:
        module.training = mode
    with torch.no_grad():
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer)
            if buffer is not None and value is not None and not torch.equal(buffer, value):
                buffer.copy_(value)


def global_random_states() -> list[Tensor]:
    """The states of Python's and numpy's generators, as tensors of integers, which load with ``weights_only``."""
    _, python, _ = random.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return [torch.tensor(python), torch.zeros(0, dtype=torch.int64)]
    _, keys, position, *_ = numpy.random.get_state()
    return [torch.tensor(python), torch.tensor([*keys.tolist(), int(position)])]


def set_global_random_states(python: Tensor, numbers: Tensor) -> None:
    """Sets what :func:`global_random_states` returned."""
    random.setstate((3, tuple(python.tolist()), None))
    numpy = sys.modules.get("numpy")
    if numpy is not None and len(numbers):
        *keys, position = numbers.tolist()
        numpy.random.set_state(("MT19937", keys, position))


@contextmanager
def _random_numbers_unchanged(places: set[torch.device]) -> Iterator[None]:
    devices = [place for place in places if place.type not in ("cpu", "meta")]
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    kind = {"device_type": devices[0].type} if devices else {}
    with torch.random.fork_rng(devices=devices, **kind):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def _metrics_unchanged(model: Any) -> Iterator[None]:
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is None or not any(isinstance(module, torchmetrics.Metric) for module in model.modules()):
        yield
        return
    from hesscale_lightning.trainer.reevaluation import unchanged_metrics

    with unchanged_metrics(model):
        yield

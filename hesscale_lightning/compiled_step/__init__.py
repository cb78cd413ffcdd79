"""A training step as one program: forward, backward, curvature, and AdaHesScale's update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hesscale_lightning.compiled_step.capture import CaptureError
from hesscale_lightning.compiled_step.guards import refuse_split
from hesscale_lightning.compiled_step.programs import Backend
from hesscale_lightning.compiled_step.step import OnFailure, Settings, ShortBatch, Step
from hesscale_lightning.curvature.engine import Method

__all__ = ["CaptureError", "Settings", "Step", "compile_step"]


def compile_step(
    module: nn.Module,
    loss_fn: Callable[..., Any] | None = None,
    *,
    method: Method | None = "hesscale",
    optimizer: Optimizer | None = None,
    max_grad_norm: float | None = None,
    keep_gradients: bool = False,
    backend: Backend = "inductor",
    on_failure: OnFailure = "eager",
    short_batch: ShortBatch = "eager",
    max_programs: int = 8,
    options: dict[str, Any] | None = None,
    silent: bool = False,
) -> Step:
    r"""Makes one program of a training step: forward, backward and curvature, and with an optimizer its update too.

    For a batch ``(x, *rest)`` and the loss ``L = loss_fn(module(x), *rest)``, ``step(x, *rest)`` returns ``L`` and adds
    to every parameter

        ``p.grad += dL/dp``,    ``p.hess_diag += h``

    with the diagonal ``h`` of :func:`hesscale_lightning.attach`: what ``attach(L); L.backward()`` would do, up to
    rounding. The first step with a batch of some shape captures all its operations and has Inductor compile them, which
    takes 5 to 60 s once, and 3 to 20 s in later processes, where Inductor's cache has them; all further steps run the
    program.

    There is one program for each combination of the batch's shapes, strides, dtypes and devices, its arguments that are
    no tensors, the modules that are in training mode, the parameters that require grad, ``step.method``, autocast and
    the optimizer's options. The learning rate may change at every step. Buffers are updated and dropout draws anew in
    every step. Python code of the module runs when a program is made and not again: a number or a tensor that it
    takes from elsewhere is what it was then, unless it is a parameter or a buffer, an argument of the step, or a tensor
    that is changed in place. After a change of anything else call ``step.clear()``.

    Attributes:
        method: As below; set it at any time, for example to None for steps without curvature.
        programs: How many programs there are.

    Args:
        module: The network. With ``loss_fn=None`` it maps the whole batch to the loss: ``L = module(*batch)``.
        loss_fn: Maps the module's output and the batch's further parts to the loss, a scalar, or to a tuple of the loss
            and further tensors, which the step then returns too, detached. A ``torch.nn.Module`` may have parameters.
        method: Curvature as for :func:`hesscale_lightning.attach`; None computes the gradient alone.
        optimizer: Makes ``step`` the whole of a training step: gradients are cleared before, and the parameters are
            updated. :class:`hesscale_lightning.AdaHesScale` becomes part of the program, unless it is ``capturable`` or
            has hooks on its step; other optimizers step eagerly.
        max_grad_norm: With an optimizer: clip the norm of its parameters' gradient before the update, as
            ``torch.nn.utils.clip_grad_norm_``.
        keep_gradients: With an optimizer: leave ``p.grad`` (clipped) and ``p.hess_diag`` of this step on its
            parameters. By default they are None afterwards, which saves memory and time.
        backend: ``"inductor"``, or ``"eager"``, which captures and runs the operations one after the other without
            compiling them: to find out what a program would do.
        on_failure: What happens to a step that cannot become a program, because it decides by the entries of tensors,
            for example, or there is no C++ compiler: ``"eager"`` warns once with the reason and runs it eagerly,
            ``"raise"`` raises it.
        short_batch: What happens to a batch that has fewer samples than one for which there is a program, as the last
            one of an epoch has: ``"eager"`` runs it eagerly, ``"compile"`` makes a program for it.
        max_programs: How many programs are kept. Further combinations run eagerly, with one warning.
        options: Inductor's options (``torch._inductor.list_options()``). The default writes the whole program in C++
            where all tensors are on the CPU, ``{"cpp_wrapper": True}``.
        silent: Do not tell on standard error that a program is being made.

    Returns:
        The step, to be called with a batch: tensors, numbers, strings, and nested tuples, lists and dicts of them.

    Raises:
        ValueError: An argument is out of its range; here or from ``step``, if the module's parameters are split between
            processes.
        CaptureError: From ``step``, with ``on_failure="raise"``: the step cannot become a program.
        UnsupportedOperationError: From ``step``: an operation between the loss and a parameter has no curvature rule.

    Example:
        >>> import torch
        >>> from hesscale_lightning import AdaHesScale, compile_step
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> optimizer = AdaHesScale(model.parameters())
        >>> step = compile_step(model, torch.nn.functional.cross_entropy, backend="eager", silent=True)
        >>> for _ in range(3):
        ...     x, y = torch.randn(32, 3), torch.randint(2, (32,))
        ...     optimizer.zero_grad()
        ...     loss = step(x, y)
        ...     optimizer.step()
        >>> step.programs
        1

    Reference: capturing through ``torch.fx.experimental.proxy_tensor.make_fx``, compiling by TorchInductor (Ansel and
    others, "PyTorch 2", ASPLOS 2024).
    """
    settings = Settings(backend, on_failure, short_batch, max_programs, options, silent)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    refuse_split(module)
    modules = [module, loss_fn] if isinstance(loss_fn, nn.Module) else [module]
    return Step(
        modules,
        _LossOf(module, loss_fn),
        method=method,
        optimizer=optimizer,
        max_grad_norm=max_grad_norm,
        keep_gradients=keep_gradients,
        settings=settings,
        name=f"the step of {type(module).__name__}",
    )


class _LossOf:
    """Maps a batch to its loss. An object, so that it can be pickled."""

    def __init__(self, module: nn.Module, loss_fn: Callable[..., Any] | None) -> None:
        self._module = module
        self._loss_fn = loss_fn

    def __call__(self, *batch: Any) -> Any:
        if self._loss_fn is None:
            return self._module(*batch)
        x, *rest = batch
        return self._loss_fn(self._module(x), *rest)

"""Compiled training steps for Lightning, in automatic optimization.

``training_step`` runs as a program that computes the loss, the gradient and, where HesScaleCallback wants it, the
curvature. What it returns is a loss like any other, whose ``backward()`` hands out what is computed already, so that
Lightning's accumulation, clipping, precision and hooks are as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.autograd.function import once_differentiable

from hesscale_lightning.compiled_step import CaptureError, Settings, Step
from hesscale_lightning.compiled_step.step import Computed


class CompiledStepMixin(pl.LightningModule):
    """Makes a LightningModule's ``training_step`` a program; put it before the module's class or LightningModule.

    The program is made for the first batch of each shape (:func:`hesscale_lightning.compile_step` says when, and what
    it cannot see). On steps for which HesScaleCallback computes the diagonal it contains curvature by the callback's
    method, on others, or without the callback, the gradient alone: two programs with ``every_n_steps`` above 1. The
    optimizer steps as ever. ``self.log`` and ``self.log_dict`` work, with numbers and tensors.

    These steps run eagerly: audited ones, validation, what has parameters without a curvature rule, and what cannot be
    captured, as a metric that is updated in ``training_step`` or a use of ``batch_idx``, with a warning that says why.

    Attributes:
        compile_step: Set it to False to run eagerly.
        compile_step_options: Arguments of :func:`hesscale_lightning.compile_step`: ``backend``, ``on_failure``,
            ``short_batch``, ``max_programs``, ``options`` and ``silent``.

    Raises:
        MisconfigurationException: In ``training_step``, with manual optimization or more than one process.

    Example:
        >>> import lightning
        >>> import torch
        >>> class Classifier(CompiledStepMixin, lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(4, 3)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return torch.nn.functional.cross_entropy(self.net(x), y)
    """

    compile_step: bool = True
    compile_step_options: ClassVar[dict[str, Any]] = {}
    _compiled: Step | None = None
    _running_plainly = False
    #: Whether the loss that ``training_step`` returned last brings its curvature with it.
    curvature_is_compiled = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = cls.training_step
        if plain is not pl.LightningModule.training_step and not hasattr(plain, "_without_program"):
            cls.training_step = _with_program(plain)  # type: ignore[method-assign]

    def _plain_step(self, batch: Any) -> tuple[Any, ...]:
        """``training_step`` as the program has it: the loss, what else it returns, and what it logs."""
        logged: list[tuple[Any, dict[str, Any]]] = []
        with _recorded_logging(self, logged):
            function: Any = type(self).training_step
            output = function._without_program(self, batch, *([_BatchIndex()] if function._takes_index else []))
        if isinstance(output, dict):
            return output["loss"], {k: v for k, v in output.items() if k != "loss"}, logged
        if output is None:
            raise CaptureError("training_step returned None, which skips a batch")
        return output, None, logged


class _BatchIndex:
    """Stands for ``batch_idx``, which is another at every step and cannot be part of a program."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise CaptureError("training_step uses batch_idx, which would be that of the first step in all")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __truediv__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __index__ = __float__ = _refuse
    __hash__ = __str__ = __repr__ = __format__ = _refuse


class _Delivery(torch.autograd.Function):
    """A loss whose gradients and diagonals are known."""

    @staticmethod
    def forward(ctx: Any, computed: Computed, *params: Tensor) -> Tensor:
        ctx.computed = computed
        return computed.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Both are linear in the factor by which the loss enters: a share of the accumulated batches, a loss scale."""
        computed, ctx.computed = ctx.computed, None
        grads, diagonals = computed.grads, computed.diagonals
        if not (factor.is_cpu and factor.item() == 1):
            grads = torch._foreach_mul(grads, factor)
            diagonals = torch._foreach_mul(diagonals, factor) if diagonals else []
        for p, h in zip(computed.curved, diagonals, strict=True):
            earlier = None if p.grad is None else getattr(p, "hess_diag", None)
            p.hess_diag = h if earlier is None else earlier + h
        return None, *grads


def _with_program(plain: Any) -> Any:
    """A ``training_step`` that runs as a program where it can."""

    @functools.wraps(plain)
    def training_step(self: CompiledStepMixin, *args: Any, **kwargs: Any) -> Any:
        self.curvature_is_compiled = False
        if self._running_plainly or not self.compile_step or not torch.is_grad_enabled() or not self.training:
            return plain(self, *args, **kwargs)
        _refuse_unsupported(self)
        callback = _callback_of(self)
        refreshing = callback is not None and callback.refreshing
        if refreshing and callback.needs_graph:
            return _plainly(self, plain, args, kwargs)
        if self._compiled is None:
            settings = Settings(**self.compile_step_options)
            name = f"{type(self).__name__}.training_step"
            self._compiled = Step([self], self._plain_step, method=None, settings=settings, name=name)
        self._compiled.method = callback.method if refreshing else None
        batch = args[0] if args else kwargs["batch"]
        self._running_plainly = True
        try:
            computed = self._compiled.compute(batch)
        finally:
            self._running_plainly = False
        if computed is None:
            return _plainly(self, plain, args, kwargs)
        self.curvature_is_compiled = refreshing
        outputs, logged = computed.others
        for values, options in logged:
            self.log_dict(values, **options) if isinstance(values, dict) else self.log(*values, **options)
        loss = _Delivery.apply(computed, *computed.params)
        return loss if outputs is None else {"loss": loss, **outputs}

    training_step._without_program = plain  # type: ignore[attr-defined]
    training_step._takes_index = plain.__code__.co_argcount > 2  # type: ignore[attr-defined]
    return training_step


def _plainly(module: CompiledStepMixin, plain: Any, args: Any, kwargs: Any) -> Any:
    module._running_plainly = True
    try:
        return plain(module, *args, **kwargs)
    finally:
        module._running_plainly = False


def _refuse_unsupported(module: CompiledStepMixin) -> None:
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(module).__name__} compiles its training step and optimizes manually. Set compile_step to False, or "
            "use hesscale_lightning.compile_step within training_step, which returns the loss and writes p.grad and "
            "p.hess_diag."
        )
    if module._trainer is not None and module._trainer.world_size > 1:
        raise MisconfigurationException(
            f"{type(module).__name__} compiles its training step, and the trainer has {module._trainer.world_size} "
            "processes, found more than 1: compiled steps are for one process. Set compile_step to False."
        )


def _callback_of(module: pl.LightningModule) -> Any:
    from hesscale_lightning.trainer.callback import HesScaleCallback

    callbacks: Any = [] if module._trainer is None else module._trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, HesScaleCallback)), None)


@contextmanager
def _recorded_logging(module: pl.LightningModule, logged: list[Any]) -> Iterator[None]:
    """Collects what the module logs instead of logging it."""

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged.append(((name, _value(name, value), *args), kwargs))

    def log_dict(dictionary: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise CaptureError("log_dict with positional options: name them")
        logged.append(({name: _value(name, value) for name, value in dictionary.items()}, kwargs))

    saved: dict[str, Any] = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    vars(module).update(log=log, log_dict=log_dict)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del vars(module)[name]
        vars(module).update(saved)


def _value(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (int, float)):
        return value
    raise CaptureError(
        f"training_step logs {name!r}, a {type(value).__name__}: only tensors and numbers can be compiled"
    )

"""Runs compiled code eagerly for the steps that need curvature: a compiled network is one opaque operation."""

from contextlib import ExitStack

import torch
from torch import nn


class EagerSteps:
    """Switches ``torch.compile``'s code off for a step, and back to what it was."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def begin(self) -> None:
        """From here on, compiled functions and modules run eagerly."""
        self.end()
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))

    def end(self) -> None:
        """Back to compiled code. Harmless without a :meth:`begin`."""
        self._stack.close()


def has_compiled_code(module: nn.Module) -> bool:
    """Whether a module, one of its children, or one of their methods and attributes was given to ``torch.compile``."""
    if getattr(module, "_compiler_ctx", None) is not None:  # a LightningModule that Lightning unwrapped
        return True
    for child in module.modules():
        if hasattr(child, "_orig_mod") or getattr(child, "_compiled_call_impl", None) is not None:
            return True
        members = [*vars(child).values(), *(value for cls in type(child).__mro__ for value in vars(cls).values())]
        if any(_is_compiled(value) for value in members):
            return True
    return False


def _is_compiled(value: object) -> bool:
    return callable(value) and not isinstance(value, type) and hasattr(value, "_torchdynamo_orig_callable")

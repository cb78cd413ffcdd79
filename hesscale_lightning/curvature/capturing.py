"""What the engine needs of tensors' memory and entries, and has to get in another way while a step is captured.

A step is captured (:mod:`hesscale_lightning.compiled_step`) on fake tensors, which have shapes and neither memory nor
entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")


def address_of(x: Tensor) -> Any:
    """Where a tensor's memory begins: two tensors that begin in the same place have equal addresses."""
    if type(x) is FakeTensor:
        return x.untyped_storage()._cdata, x.storage_offset()
    return x.data_ptr()


def entry_of(x: Tensor) -> float | None:
    """The entry of a tensor that has one; None if it will be known only when the captured step runs."""
    if not torch.compiler.is_compiling():
        return float(x)
    return None if type(x) is FakeTensor else on_real_tensors(float, x)


def on_real_tensors(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function that makes tensors of its own to look at them. No operation of it becomes part of a program."""
    if not torch.compiler.is_compiling():
        return function(*args, **kwargs)
    with _disable_current_modes():
        return function(*args, **kwargs)

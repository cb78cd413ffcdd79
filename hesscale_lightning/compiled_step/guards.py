"""What a program was made for, read off a module and a batch before every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hesscale_lightning.curvature.sharding import sharded_modules
from hesscale_lightning.curvature.tensor_parallel import is_distributed

Spec = Any  # how a batch is put together from its leaves
TENSORS = "tensors"  # the usual spec: the batch is a sequence of tensors


def refuse_split(root: nn.Module) -> None:
    """Raises ValueError if parameters are split between processes: a program would have one process's part of them."""
    for name, module in root.named_modules():
        if module in sharded_modules or any(is_distributed(p) for p in module._parameters.values()):
            raise ValueError(
                f"compile_step found parameters of {name or type(root).__name__!r} that are sharded between processes "
                "(fully_shard or tensor parallelism), expected whole ones: use attach(loss) before loss.backward()"
            )


class ModuleState:
    """A module's tensors, and what of it decides which operations a step consists of.

    Args:
        root: The module.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._hooks: list[Any] = []
        self._contents: list[Any] = []
        self._addresses: list[int] = []
        self._layout: tuple[Any, ...] = ()
        self._latest: list[int] | None = None
        self._number = 0
        self._numbers: dict[Any, int] = {}
        self.params: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.param_names: list[str] = []
        self._modules: list[nn.Module] = []
        self._read()

    def _read(self) -> None:
        refuse_split(self._root)
        modules = self._modules = list(self._root.modules())
        self._dicts = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._contents = [x for d in self._dicts for x in d.values()]
        named = list(self._root.named_parameters())
        self.param_names, self.params = [name for name, _ in named], [p for _, p in named]
        self.buffers = list(self._root.buffers())
        self._latest = None
        self._tensors = [*self.params, *self.buffers]
        self._measure([t.data_ptr() for t in self._tensors])

    def _measure(self, addresses: list[int]) -> None:
        self._addresses = addresses
        self._layout = tuple([(t.shape, t.stride(), t.dtype, t.device) for t in self._tensors])

    def changed(self) -> bool:
        """Whether parameters, buffers or modules have been exchanged since the last time; it reads them again then."""
        contents = [x for d in self._dicts for x in d.values()]
        known = self._contents
        if len(contents) == len(known):
            for a, b in zip(contents, known):  # noqa: B905 (checked)
                if a is not b:
                    break
            else:
                return False
        self._read()
        return True

    def key(self) -> int:
        """A number for the modules that train, the parameters that require grad or have hooks, and the layouts."""
        addresses = [t.data_ptr() for t in self._tensors]
        if addresses != self._addresses:
            self._measure(addresses)
            self._latest = None
        modes: list[int] = [m.training for m in self._modules]
        modes += [p.requires_grad for p in self.params]
        modes += [not p._backward_hooks for p in self.params]
        modes += [len(hooks) for hooks in self._hooks]
        if modes != self._latest:
            self._latest = modes
            self._number = self._numbers.setdefault((tuple(modes), self._layout), len(self._numbers))
        return self._number


def flatten(batch: tuple[Any, ...]) -> tuple[list[Any], Spec]:
    """A batch's leaves, and how to put them together again."""
    for part in batch:
        if type(part) is not Tensor:
            return tree_flatten(batch)
    return list(batch), TENSORS


def unflatten(leaves: Sequence[Any], spec: Spec) -> tuple[Any, ...]:
    """The batch."""
    batch: tuple[Any, ...] = tuple(leaves) if spec is TENSORS else tree_unflatten(leaves, spec)
    return batch


def batch_key(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What of a batch's leaves a program is made for: of tensors all but their entries, of the rest everything."""
    return tuple(
        [
            (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.__class__)
            if isinstance(x, Tensor)
            else (type(x), x)
            for x in leaves
        ]
    )


def surroundings(device_type: str) -> tuple[Any, ...]:
    """Settings of the process that decide which operations a step consists of."""
    return (
        torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


def is_short(leaves: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether a batch, by its key, is another one with fewer samples: all sizes but the first are equal."""
    fewer = False
    if len(leaves) != len(other):
        return False
    for a, b in zip(leaves, other, strict=True):
        if len(a) != len(b) or a[2:] != b[2:]:
            return False
        if len(a) == 2:
            if a != b:
                return False
            continue
        if len(a[0]) != len(b[0]) or a[0][1:] != b[0][1:]:
            return False
        if len(a[0]) and a[0][0] != b[0][0]:
            if a[0][0] > b[0][0]:
                return False
            fewer = True
    return fewer

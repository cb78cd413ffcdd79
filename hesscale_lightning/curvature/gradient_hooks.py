"""Hooks that change a gradient on its way: curvature goes past them, so they have to be noticed.

``z.register_hook(lambda g: g * 0)`` changes what backward hands on, and no node of the graph tells of it: the diagonal
would be that of the loss as if the hook were not there. Autograd does not show a node's hooks to Python. What it does
show is enough to tell in two stages:

1. Every hook that is registered from Python takes a number from one counter. If the counter has not moved since before
   the graph's oldest node was made, there are no hooks in the graph (:func:`suspected`). That is the ordinary step, and
   costs a microsecond.
2. Otherwise a :class:`Watch` compares during backward what each node gives with what the next one receives. Most hooks
   only look, and then nothing is different.

Hooks of leaves are no concern: they run after all curvature has been computed from gradients that they do not change.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hesscale_lightning.curvature.graph import AccumulateGrad, Node
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.tensor_parallel import is_distributed

#: What torch puts before and behind a module with full backward hooks: the identity, with these hooks on its results.
_IDENTITY = "BackwardHookFunctionBackward"

_age = methodcaller("_sequence_nr")  # autograd numbers nodes as they are made; leaves have the highest number
_one = torch.ones((), requires_grad=True)


class Registrations:
    """Tells when a hook was registered last, by the numbers of the nodes made before and after."""

    def __init__(self) -> None:
        self._seen = 0  # of the counter; hooks that were there before this package was imported count as new
        self._latest = -1  # the number of a node made after the latest registration was noticed

    def suspected(self, nodes: Iterable[Node]) -> bool:
        """Whether there may be hooks on what these nodes compute.

        Args:
            nodes: All nodes between the loss and the wanted tensors.
        """
        self.note()
        return bool(min(map(_age, nodes)) <= self._latest)

    def note(self) -> None:
        """Takes note of the registrations so far, none of which can be of hooks in graphs that are yet to be made."""
        if RemovableHandle.next_id != self._seen:
            self._seen = RemovableHandle.next_id
            with torch.enable_grad():
                self._latest = _age((_one * 1).grad_fn)

    def ours(self, count: int) -> None:
        """Takes ``count`` registrations since the last question for this package's own."""
        self._seen += count


_registrations = Registrations()
suspected = _registrations.suspected
note_registrations = _registrations.note
ours = _registrations.ours


class Watch:
    """Compares, in the backward pass that follows, what each node gives with what the next one receives.

    What it cannot see is a hook on a node's results (``z.grad_fn.register_hook``), as it gets them after that hook;
    those of modules' full backward hooks it does see.

    Attributes:
        changed: Names of the nodes before which a hook changed the gradient, in the order of backward.
        registered: How many hooks it has registered, for :func:`ours`.
    """

    def __init__(self, loss: Tensor) -> None:
        self.changed: list[str] = []
        if loss._backward_hooks:
            self.changed.append(loss.grad_fn.name())  # type: ignore[union-attr]
        self._given: dict[tuple[Node, int], list[tuple[Tensor, int]]] = {}
        self._handles: list[Any] = []
        root = loss.grad_fn
        assert root is not None
        seen: set[Node] = {root}
        stack = [root]
        while stack:
            node = stack.pop()
            # Not methods of this object: the graph would own it, and it the graph's nodes.
            self._handles.append(
                node.register_hook(partial(_gives, self._given, self.changed, node.name(), node.next_functions))
            )
            if node is not root:
                self._handles.append(node.register_prehook(partial(_receives, self._given, self.changed, node)))
            for child, _ in node.next_functions:
                if child is not None and type(child) is not AccumulateGrad and child not in seen:
                    seen.add(child)
                    stack.append(child)
        self.registered = len(self._handles)

    def __del__(self) -> None:
        # What is given and not received, because backward failed, would keep the graph's nodes, and they it.
        self.remove()

    def remove(self) -> None:
        """Takes the hooks off again; what was noticed stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._given.clear()


def _gives(
    given: dict[tuple[Node, int], list[tuple[Tensor, int]]],
    changed: list[str],
    name: str,
    following: Any,
    results: tuple[Tensor | None, ...],
    received: tuple[Tensor | None, ...],
) -> None:
    if name == _IDENTITY:
        for before, after in zip(received, results, strict=False):
            if before is not None and (after is None or not _same(before, after)):
                changed.append(name)
                break
    for (child, output), g in zip(following, results, strict=False):
        if g is not None and child is not None and type(child) is not AccumulateGrad:
            given.setdefault((child, output), []).append((g, g._version))


def _receives(
    given: dict[tuple[Node, int], list[tuple[Tensor, int]]],
    changed: list[str],
    node: Node,
    received: tuple[Tensor | None, ...],
) -> None:
    for output, g in enumerate(received):
        parts = given.pop((node, output), None)
        if parts is None or g is None:
            different = (parts is None) != (g is None)
        elif len(parts) == 1:
            part, version = parts[0]
            different = part._version != version or not _same(part, g)
        else:
            different = any(part._version != version for part, version in parts) or not _same(_sum(parts), g)
        if different:
            changed.append(node.name())


def _sum(parts: list[tuple[Tensor, int]]) -> Tensor:
    total = parts[0][0]
    for part, _ in parts[1:]:  # in the order in which autograd adds them up
        total = total + part
    return total


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if is_distributed(a) and is_distributed(b):  # two wrappers without memory of their own
        parts = a.placements == b.placements
        return _same(a.to_local(), b.to_local()) if parts else _same(a.full_tensor(), b.full_tensor())
    if a.shape != b.shape:  # torch itself sums a gradient to the shape of what it belongs to
        if a.dim() < b.dim() or a.numel() < b.numel():
            return False
        a = a.sum_to_size(b.shape)
    if a.layout is torch.strided is b.layout and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return bool(a.numel() == 0 or a.data_ptr() != 0)
    rtol = 2e-2 if a.dtype in HALF or b.dtype in HALF else 1e-5
    alike: bool = torch.allclose(a, b.to(a.dtype), rtol=rtol, atol=0, equal_nan=True)
    return alike

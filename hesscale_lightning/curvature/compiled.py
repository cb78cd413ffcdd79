"""A pass that runs a program: backward delivers the gradients that it takes, and it goes on as they come."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.attachment import Attachment, on_gate
from hesscale_lightning.curvature.graph import Node
from hesscale_lightning.curvature.interpreted import InterpretedPass
from hesscale_lightning.curvature.program import Program
from hesscale_lightning.curvature.structure import Structure

_AWAITED: Any = object()  # stands for a gradient that backward has not delivered yet


class CompiledPass(Attachment):
    """A pass that runs a program.

    Args:
        device_type: Of the loss.
        program: What to run.
        structure: Of the graph.
        nodes: The graph's nodes by position.
        saved: The program's inputs.
        instead: Called if only some nodes will run: arms a pass that runs rules, and returns it.
    """

    def __init__(
        self,
        device_type: str,
        program: Program,
        structure: Structure,
        nodes: Sequence[Node],
        saved: list[Any],
        instead: Callable[[], InterpretedPass | None],
    ) -> None:
        super().__init__(device_type)
        self._program = program
        self._leaves = [(position, nodes[position]) for position in structure.leaves]
        self._nodes: Sequence[Node] = nodes
        # Nothing happens above the first gradient that is needed, so where backward cannot pass it by, it begins there.
        first = program.gradients[0] if program.gradients else -1
        self._gate = first if 0 <= first <= structure.narrow else 0
        self._grads: list[Any] = [_AWAITED] * len(program.gradients)
        self._arrived: dict[int, Tensor] = {}
        self._running: Any = program.run(saved, self._grads, self._arrived)
        self._need: int | None = 0
        self._taken = 0
        self._instead: Any = instead
        self._substitute: InterpretedPass | None = None

    # Below autograd nothing is recorded, as under no_grad, and every operation takes one dispatch less.
    _without_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", torch.no_grad)

    def arm(self) -> None:
        """Puts the hooks on the graph."""
        ref, nodes, program = weakref.ref(self), self._nodes, self._program
        store = self._grads.__setitem__
        handles = []
        if not program.gradients or program.gradients[0] != self._gate:
            handles.append(nodes[self._gate].register_prehook(partial(on_gate, ref)))
        for k, (position, sweeps) in enumerate(zip(program.gradients, program.sweeps)):  # noqa: B905 (made together)
            if position == self._gate:
                hook: Callable[..., None] = partial(_on_gate, ref, k, sweeps)
            else:  # a hook that stores runs without a Python frame
                hook = partial(_on_sweep, ref, k) if sweeps else partial(store, k)
            handles.append(nodes[position].register_prehook(hook))
        self._handles = handles

    def _let_go(self) -> None:
        self._running = None
        self._grads[:] = [None] * len(self._grads)  # in place: the hooks share it
        self._arrived = {}
        self._nodes = ()
        self._instead = None
        if self._substitute is not None:
            self._substitute.remove()
            self._substitute = None

    def _only_some(self, grads: tuple[Tensor | None, ...]) -> None:
        """The program computes all or nothing: the rules are run instead."""
        self._substitute = self._instead()
        self._running = None
        if self._substitute is not None:
            self._substitute.ride(self._gate, grads)

    def _advance(self) -> None:
        """Runs the program until it needs a gradient that has not come yet."""
        grads, program, running = self._grads, self._program, self._running
        need, taken = self._need, self._taken
        while need is not None:
            for k in range(taken, need):
                g = grads[k]
                if g is _AWAITED:
                    return
                if (g is not None and g[0] is None) or len(g) > 1:
                    grads[k] = _without_gaps(g, self._nodes[program.gradients[k]])
            self._taken = taken = need
            self._need = need = next(running, None)

    def _complete(self) -> None:
        if self._substitute is not None:
            self._write(self._substitute.arrived())
            return
        self._advance()
        if self._need is not None:
            raise RuntimeError(
                "backward did not run all operations that it was to run: this is a bug, please report it"
            )
        arrived: dict[int, Any] = self._arrived
        if len(arrived) < len(self._leaves):  # to some comes none
            arrived = {cell: arrived.get(cell) for cell, _ in self._leaves}
        self._write(arrived, self._program.own)


def _without_gaps(grads: tuple[Tensor | None, ...], node: Node) -> tuple[Tensor, ...]:
    """Gradients of which none is missing, which stands for zeros."""
    return tuple(
        [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if g is None else g
            for g, meta in zip(grads, node._input_metadata, strict=True)
        ]
    )


def _on_gate(ref: weakref.ref[CompiledPass], k: int, sweeps: bool, grads: tuple[Tensor | None, ...]) -> None:
    """The hook that fires first, where it also brings a gradient."""
    on_gate(ref, grads)
    attachment = ref()
    if attachment is not None and attachment._started and not attachment._spent:
        if sweeps:
            _on_sweep(ref, k, grads)
        else:
            attachment._grads[k] = grads


def _on_sweep(ref: weakref.ref[CompiledPass], k: int, grads: tuple[Tensor | None, ...]) -> None:
    """The hook of a gradient with which the program goes on."""
    attachment = ref()
    if attachment is None or attachment._spent:
        return
    attachment._grads[k] = grads
    if not attachment._started or attachment._running is None or not attachment._lock.acquire(blocking=False):
        return  # another device's thread is at it; it, or the end, will go on
    try:
        attachment._guarded(attachment._advance)
    finally:
        attachment._lock.release()

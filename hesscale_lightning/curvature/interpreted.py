"""A pass in which each rule is run as backward meets its operation: for structures that are met for the first time.

A hook before each node's own backward runs the step that ends there, while what the node has saved is still at hand.
By then all that uses the node's output has run, so the curvature there is complete. The second time that a structure
is met the same is done on symbols, which are recorded, and at the end the program is written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup

from hesscale_lightning.curvature.attachment import Attachment, on_gate, together, will_execute
from hesscale_lightning.curvature.graph import Node
from hesscale_lightning.curvature.plan import Plan, Step
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.program import Program
from hesscale_lightning.curvature.recorded_operation import Recording
from hesscale_lightning.curvature.values import ZERO, Symbol, Value


class InterpretedPass(Attachment):
    """A pass that runs rules.

    Args:
        device_type: Of the loss.
        plan: What to do.
        nodes: The graph's nodes by position.
        inner: By cell, node and tensor of each wanted tensor that is no leaf.
        recording: Where to take the program down, if it is to be.
    """

    def __init__(
        self,
        device_type: str,
        plan: Plan,
        nodes: Sequence[Node],
        inner: Mapping[int, tuple[Node, Tensor]],
        recording: Recording | None = None,
    ) -> None:
        super().__init__(device_type)
        self.plan = plan
        self._steps = plan.steps
        self._nodes: Sequence[Node] = nodes
        self._cells: list[Value] = [ZERO] * plan.cells
        self._leaves = [(cell, nodes[cell]) for cell in plan.leaves]
        self._inner = inner
        self._left_out: dict[int, Value] = {}  # gradients, by cell, that composites account for already
        self._recording = recording
        self._recorded: Callable[[Mapping[int, int]], tuple[Program, Sequence[Any]]] | None = None
        self._waiting = len(plan.steps)
        self._group = GraphExecGroup()
        # An operation may take part in two steps: in a composite, and on its own.
        self._last = {id(op): k for k, step in enumerate(plan.steps) for op in step.operations}

    def when_recorded(self, write: Callable[[Mapping[int, int]], tuple[Program, Sequence[Any]]]) -> None:
        """Has ``write`` called with each leaf's slot, by cell, when the pass is complete and all was taken down.

        It returns the program, and the names of its inputs in their order.
        """
        self._recorded = write

    def arm(self) -> None:
        """Puts the hooks on the graph."""
        ref = weakref.ref(self)
        handles = [self._nodes[0].register_prehook(partial(on_gate, ref))]
        handles += [
            self._nodes[step.cell].register_prehook(partial(_on_step, ref, k)) for k, step in enumerate(self._steps)
        ]
        self._handles = handles

    def _let_go(self) -> None:
        self.plan = self.plan.nothing()
        self._steps = []
        self._nodes = ()
        self._cells = []
        self._left_out = {}
        self._last = {}
        self._recording = self._recorded = None

    def ride(self, gate: int, grads: tuple[Tensor | None, ...]) -> None:
        """Begins within a pass that has just begun, at the node at ``gate``, above which there is nothing to do."""
        self._leaves = [leaf for leaf in self._leaves if will_execute(leaf[1])]
        self._started = True
        ref = weakref.ref(self)
        self._handles = [
            self._nodes[step.cell].register_prehook(partial(_on_step, ref, k))
            for k, step in enumerate(self._steps)
            if step.cell > gate
        ]
        for k, step in enumerate(self._steps):
            if step.cell == gate:
                self._guarded(together, self._group, self._run, k, grads)

    def _only_some(self, grads: tuple[Tensor | None, ...]) -> None:
        self._recorded = None

    def _run(self, k: int, grads: tuple[Tensor | None, ...]) -> None:
        step = self._steps[k]
        self._waiting -= 1
        g, h = self._gradient(step, grads), self._curvature(step)
        arriving = (g, h) if step.outputs is None else (*g, *h)
        if all(part is ZERO for part in arriving) and not step.rule.source:
            return
        try:
            if self._recording is None:
                results = step.carry(step.operations, g, h)
            else:
                with torch._C._EnableTorchFunction():  # by which functions of torch reach a symbol's recorder
                    results = step.carry(step.operations, g, h)
        except Exception as error:
            error.add_note(f"while carrying curvature through {step.rule.name}")
            raise
        for op in step.operations:
            if self._last[id(op)] == k:
                op.release()
        if not isinstance(results, (tuple, list)):
            results = (results,)
        if len(results) != len(step.targets):
            raise RuntimeError(
                f"the rule for {step.rule.name} returned {len(results)} curvatures for {len(step.targets)} inputs; it "
                "must return one (or None) for each entry of node.next_functions"
            )
        cells, left_out = self._cells, self._left_out
        for target, result, turned in zip(step.targets, results, step.turned, strict=True):
            if result is None or result is ZERO or result is False or target == -1:
                continue
            if turned:
                result = result.t()
            if target >= 0:
                cells[target] = cells[target] + result
            else:
                left_out[-2 - target] = left_out.get(-2 - target, ZERO) + result

    def _gradient(self, step: Step, grads: tuple[Tensor | None, ...]) -> Value:
        several = step.outputs is not None
        if not step.curved or step.inside:
            return (ZERO,) * len(grads) if several else ZERO
        recording = self._recording
        parts: list[Value] = []
        for output, g in enumerate(grads if several else grads[:1]):
            if g is None:
                parts.append(ZERO)
                if recording is not None and recording.is_used(step.cell, output):
                    self._recorded = None  # zeros this time, and perhaps not the next
            elif recording is not None:
                parts.append(recording.gradient(step.cell, output, g))
            else:
                parts.append(g.float() if g.dtype in HALF else g)
        if several:
            return tuple(parts)
        if step.cell in self._left_out:
            return parts[0] - self._left_out.pop(step.cell)
        return parts[0]

    def _curvature(self, step: Step) -> Value:
        cells, inner = self._cells, self._inner
        if step.outputs is None:
            h = cells[step.cell]
            if step.cell not in inner:
                cells[step.cell] = ZERO
            return h
        several = tuple([cells[cell] for cell in step.outputs])
        for cell in step.outputs:
            if cell not in inner:
                cells[cell] = ZERO
        return several

    def arrived(self) -> list[Tensor | None]:
        """The curvature in each cell; None: zero."""
        return [None if h is ZERO else h.value if isinstance(h, Symbol) else h for h in self._cells]

    def _complete(self) -> None:
        if self._recorded is None or self._waiting:
            self._write(self.arrived())
            return
        cells = self._cells
        program, saved = self._recorded({c: h.slot for c, _ in self._leaves if isinstance(h := cells[c], Symbol)})
        kept = None if self._recording is None else self._recording.recorder.kept
        if kept is None:
            self._write(self.arrived())
            return
        # What the program computes differs by rounding: the first step takes it too, so that a run that is resumed
        # equals one that was not interrupted.
        arrived: dict[int, Any] = dict.fromkeys(range(len(cells)))
        cells.clear()
        by_node: dict[int, dict[int, Tensor]] = {position: {} for position in program.gradients}
        for name, g in kept.items():
            if isinstance(name, tuple) and name[0] == "g" and name[1] in by_node:
                by_node[name[1]][name[2]] = g
        grads = list(by_node.values())
        for _ in program.run([kept.get(name) for name in saved], grads, arrived):
            pass
        self._write(arrived, program.own)


def _on_step(ref: weakref.ref[InterpretedPass], k: int, grads: tuple[Tensor | None, ...]) -> None:
    """The hook of every step."""
    attachment = ref()
    if attachment is None or attachment._spent or not attachment._started:
        return
    with attachment._lock:
        attachment._guarded(together, attachment._group, attachment._run, k, grads)

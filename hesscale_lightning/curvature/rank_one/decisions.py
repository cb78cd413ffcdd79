"""Where the curvature of a loss is carried in two parts: decided once for all graphs of one structure and size.

From the loss downwards every tensor is in one of these states: no curvature arrives; it has a plain diagonal; its
Hessian is known, because it is diagonal or a softmax's; or it is split into a rank-one part in every sample and a
remainder. A known Hessian is split at the operation that would mix its entries, most often the last linear layer. The
split ends where samples mix, and where a tensor is met by several parts, or by a part and other curvature: there the
operation above takes the whole, ``d + c g^2``, and all below is plain HesScale.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Any, Literal, NamedTuple

import torch

from hesscale_lightning.curvature.composite import Composite
from hesscale_lightning.curvature.graph import AccumulateGrad, Node
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.plan import Plan, Step
from hesscale_lightning.curvature.rank_one import layout, per_sample, steps
from hesscale_lightning.curvature.rank_one.steps import Use


class State(NamedTuple):
    """What is known of the curvature at a tensor, where it is not a plain diagonal.

    Attributes:
        part: Number of the rank-one part that rides on the gradient, beside the remainder; None: none.
        inner: How many neighbours belong to a sample.
        kind: Whether the remainder is diagonal, a softmax's (both are known as a whole), or an estimate.
        head: Number of the softmax.
    """

    part: int | None
    inner: int
    kind: Literal["diagonal", "softmax", "estimate"]
    head: int | None = None


class Note(NamedTuple):
    """What is to be said of one step: whether the split begins, ends, or is ``"approximate"`` there, and why."""

    step: int
    what: Literal["begins", "ends", "approximate"]
    why: str


class Recipe(NamedTuple):
    """What is done differently at each step, for all graphs of one structure and size.

    Attributes:
        uses: For each step, how it meets the rank-one part, or None where all is as for HesScale.
        samples: For each rank-one part, how many samples it has.
        heads: How many softmaxes there are.
        notes: Where the split begins, and where and why it ends or is less than exact, in the order of backward.
    """

    uses: list[Use | None]
    samples: list[int]
    heads: int
    notes: list[Note]


ZERO: Any = "no curvature arrives"
PLAIN: Any = "a plain diagonal"
DIAGONAL = State(None, 0, "diagonal")
_UNSEEN: Any = None

#: Views by registration that add up overlapping entries.
_SUMMING = frozenset({"Col2ImBackward0"})


def _merged(a: Any, b: Any) -> Any:
    """The state of a tensor with two uses."""
    if a is _UNSEEN or a == b:
        return b
    if ZERO in (a, b):
        a, b = (b, a) if a is ZERO else (a, b)
        return a if a == DIAGONAL else PLAIN  # c needs all of the gradient to be this loss's
    return PLAIN


def _reachable(plan: Plan) -> list[int]:
    """For each cell a bit set of itself and all cells that it leads to."""
    below = [1 << cell for cell in range(plan.cells)]
    for step in reversed(plan.steps):
        leads = 0
        for target in step.targets:
            if target >= 0:
                leads |= below[target]
        for cell in step.outputs or [step.cell]:
            below[cell] |= leads
    return below


def make_recipe(plan: Plan, nodes: Sequence[Node], outside: Container[int]) -> Recipe:
    """Decides for one graph.

    Args:
        plan: What is done with it without.
        nodes: Its nodes by position.
        outside: Cells whose curvature is wanted itself.
    """
    return _Decisions(plan, nodes, outside).recipe()


class _Decisions:
    def __init__(self, plan: Plan, nodes: Sequence[Node], outside: Container[int]) -> None:
        self._plan, self._nodes = plan, nodes
        self._outside = outside
        self._states: list[Any] = [_UNSEEN] * plan.cells
        self._states[0] = ZERO
        self._samples: list[int] = []
        self._heads = 0
        self._below = _reachable(plan)
        self._picked: set[int] = set()  # cells of tensors used only by an operation that picks one entry of each row
        self._notes: list[Note] = []
        self._users: dict[int, list[int]] = {}  # by leaf, the steps that take the whole to it

    def recipe(self) -> Recipe:
        met = [self._visit(step) for step in self._plan.steps]
        uses = [
            self._settled(k, step, use, proposed)
            for k, (step, (use, proposed)) in enumerate(zip(self._plan.steps, met, strict=True))
        ]
        for users in self._users.values():
            for k in users[1:]:
                self._note(k, "approximate", "a parameter is used by several operations: each use is squared by itself")
        return Recipe(uses, self._samples, self._heads, sorted(self._notes))

    # -- first: the states, from the loss downwards

    def _visit(self, step: Step) -> tuple[Use | None, list[Any]]:
        use, proposed = self._met(step)
        picks = step.rule.name == "NllLossBackward0" or (
            step.composite is None and steps.picks_one(step.operations[-1])
        )
        for target in step.targets:
            if target >= 0:
                (self._picked.add if picks and self._states[target] is _UNSEEN else self._picked.discard)(target)
        for target, state in zip(step.targets, proposed, strict=False):
            if target >= 0:
                if isinstance(state, State) and self._ends_at(target):
                    state = PLAIN
                self._states[target] = _merged(self._states[target], state)
        return use, proposed

    def _ends_at(self, cell: int) -> bool:
        """Leaves and wanted tensors take the whole."""
        return cell in self._outside or (cell < self._plan.size and type(self._nodes[cell]) is AccumulateGrad)

    def _met(self, step: Step) -> tuple[Use | None, list[Any]]:
        """How a step meets the rank-one part, and the state that it proposes for each input."""
        state = self._state_of_outputs(step)
        if not (state is ZERO or isinstance(state, State)):
            return None, [PLAIN] * len(step.targets)
        if step.composite is not None:
            return self._met_by_composite(step, step.composite, state)
        op = step.operations[-1]
        return self._begun(step, op) if state is ZERO else self._continued(step, op, state)

    def _state_of_outputs(self, step: Step) -> Any:
        if step.outputs is None:
            return self._states[step.cell]
        states = [s for cell in step.outputs if (s := self._states[cell]) is not _UNSEEN]
        first = states[0] if states else _UNSEEN
        return first if all(s == first for s in states) else PLAIN

    def _begun(self, step: Step, op: Operation) -> tuple[Use | None, list[Any]]:
        """No curvature arrives; perhaps it is made here."""
        rule, count = step.rule, len(step.targets)
        if not step.curved:
            return None, [ZERO] * count
        if rule.name == "LogSoftmaxBackward0" and steps.is_along_last(op):
            return self._softmax(step, op, None)
        return None, [DIAGONAL if layout.is_entrywise(rule) and not self._meet(step) else PLAIN] * count

    def _meet(self, step: Step) -> bool:
        """Whether paths from two inputs meet below, so that the Hessian of both together is not diagonal."""
        seen = 0
        for target in step.targets:
            if target >= 0:
                if seen & self._below[target]:
                    return True
                seen |= self._below[target]
        return False

    def _softmax(self, step: Step, op: Operation, part: int | None) -> tuple[Use | None, list[Any]]:
        """Log-softmax along the last dimension; what arrives is a rank-one part and nothing beside it, if anything."""
        width = op.output_shape()[-1]
        head, self._heads = self._heads, self._heads + 1
        kind: Any = "picked softmax" if step.cell in self._picked else "softmax"
        return Use(kind, [True], part, [width], None, head), [State(part, width, "softmax", head)]

    def _continued(self, step: Step, op: Operation, state: State) -> tuple[Use | None, list[Any]]:
        rule, count = step.rule, len(step.targets)
        if state.kind == "softmax" and rule.name in layout.ORDER_KEEPING and True not in step.turned:
            return None, [state] * count
        entrywise = layout.is_entrywise(rule) and (not rule.reduces or op.output_shape() == op.input_shape(0))
        copies = rule.view and rule.name not in _SUMMING
        if state == DIAGONAL and ((entrywise and not self._meet(step)) or (copies and not steps.picks_one(op))):
            return None, [DIAGONAL] * count
        if rule.name == "LogSoftmaxBackward0" and steps.is_along_last(op) and self._is_picked(state, op.output_shape()):
            return self._softmax(step, op, state.part)
        return self._split(step, op, state, copies or (entrywise and not self._meet(step)))

    def _is_picked(self, state: State, shape: torch.Size) -> bool:
        """Whether curvature arrives in one entry of each row, so that it is all in the rank-one part."""
        return (
            state.part is not None
            and state.kind == "diagonal"
            and shape[-1:] == (state.inner,)
            and self._samples[state.part] * state.inner == shape.numel()
        )

    def _split(self, step: Step, op: Operation, state: State, keeps: bool) -> tuple[Use | None, list[Any]]:
        """The curvature is split already, or is to be split here."""
        shape, linear = op.output_shape(), steps.is_linear(op)
        part, inner, made, head = state.part, state.inner, None, state.head
        known = state.kind == "diagonal" or (state.kind == "softmax" and shape[-1:] == (inner,))
        if known and not (keeps and part is not None) and step.outputs is None and shape.numel():
            rows = shape.numel() // inner if state.kind == "softmax" else shape[0] if linear else shape.numel()
            samples = rows if part is None else self._samples[part]
            if samples == rows and (part is None or inner * samples == shape.numel()):
                inner, made = shape.numel() // samples, len(self._samples)
                self._samples.append(samples)
        below = part if made is None else made
        if below is None:
            return None, [PLAIN] * len(step.targets)
        kind: Any = "diagonal" if state.kind == "diagonal" and (keeps or inner == 1) else "estimate"
        proposed = []
        for i, target in enumerate(step.targets):
            # Of a linear layer only the rows take the remainder: a weight made of others gets the whole.
            goes_on = target >= 0 and (not linear or i == len(step.targets) - 2)
            found = layout.inner_of_input(op, step.rule, i, self._samples[below], inner) if goes_on else None
            proposed.append(PLAIN if found is None else State(below, found, kind))
        outputs = 1 if step.outputs is None else len(step.outputs)
        use = Use("linear" if linear else "any", [False] * len(step.targets), part, [inner] * outputs, made, head)
        return self._of_several(step, op, use), proposed

    def _of_several(self, step: Step, op: Operation, use: Use) -> Use:
        """Takes note of a weight that a sample uses several times."""
        part, shape = use.part, op.output_shape()
        if part is None or use.made is not None:
            return use
        samples = self._samples[part]
        if use.kind == "linear" and shape[0] > samples and step.needs[-1]:
            inputs = math.prod(op.input_shape(len(step.needs) - 1)) // shape[1]
            if per_sample.pays(samples, shape[0] // samples, shape[1], inputs):
                return use._replace(several=True)
        elif steps.is_convolution(op) and shape[0] == samples and step.needs[1]:
            inputs = math.prod(op.input_shape(1)) // shape[1]
            if per_sample.pays(samples, math.prod(shape[2:]), shape[1], inputs):
                return use._replace(kind="convolution", several=True)
        return use

    def _met_by_composite(self, step: Step, composite: Composite, state: Any) -> tuple[Use | None, list[Any]]:
        plain = [PLAIN] * len(step.targets)
        if not composite.rowwise and not composite.shared and (state is ZERO or state == DIAGONAL):
            return None, plain if self._meet(step) else [DIAGONAL] * len(plain)
        if composite.rowwise and steps.is_log_softmax(composite, step.operations):
            op = step.operations[-1]
            if state is ZERO or self._is_picked(state, op.output_shape()):
                return self._softmax(step, op, None if state is ZERO else state.part)
        if state is ZERO or state.part is None:
            return None, plain
        proposed = plain
        if not composite.rowwise and not composite.shared:
            proposed = [self._through_composite(step, composite, source, state) for source in range(len(plain))]
        return Use("any", [False] * len(plain), state.part, [state.inner]), proposed

    def _through_composite(self, step: Step, composite: Composite, source: int, state: State) -> Any:
        """Entry by entry as a whole; only a source of the output's shape is known to have the samples' rows."""
        shape = step.operations[-1].output_shape()
        for member, op in zip(composite.members, step.operations, strict=True):
            for i, entry in enumerate(member.wiring):
                if entry == ~source and op.input_shape(i) != shape:
                    return PLAIN
        return State(state.part, state.inner, "estimate" if self._meet(step) else state.kind)

    # -- second: what it means for each step, now that every tensor's state is known

    def _settled(self, k: int, step: Step, use: Use | None, proposed: list[Any]) -> Use | None:
        if use is None:
            if self._state_of_outputs(step) is ZERO and PLAIN in proposed:
                self._note(k, "ends", "the Hessian that is made here is neither diagonal nor a softmax's")
            return None
        kept = [
            target >= 0 and isinstance(state, State) and self._states[target] == state
            for target, state in zip(step.targets, proposed, strict=True)
        ]
        taken = [keep or target == -1 for keep, target in zip(kept, step.targets, strict=True)]
        self._describe(k, step, use, proposed, kept)
        if not any(kept):
            if use.part is None:
                return None  # what arrives is whole
            use = use._replace(made=None, head=None, kind="any" if "softmax" in use.kind else use.kind)
        elif "softmax" not in use.kind and use.made is None and all(taken):
            return None  # the remainder goes on by the ordinary rule
        return use._replace(kept=taken)

    def _describe(self, k: int, step: Step, use: Use, proposed: list[Any], kept: list[bool]) -> None:
        if use.made is not None and any(kept):
            self._note(k, "begins", "")
        for i, target in enumerate(step.targets):
            if kept[i] or target < 0:
                continue
            if target < self._plan.size and type(self._nodes[target]) is AccumulateGrad:
                if use.part is not None:
                    self._users.setdefault(target, []).append(k)
                    if not use.several and self._is_used_several_times(step, use.part, target):
                        self._note(k, "approximate", "uses of a parameter within a sample are squared one by one")
            elif not isinstance(proposed[i], State):
                self._note(k, "ends", "samples may mix here")
            elif target in self._outside:
                self._note(k, "ends", "the curvature of its input is wanted as a whole")
            else:
                self._note(k, "ends", "its input is used elsewhere too, and not with the same rank-one part")

    def _is_used_several_times(self, step: Step, part: int, leaf: int) -> bool:
        """Whether a sample has more outputs than a weight for elements, or more rows than a matrix takes."""
        shape = step.operations[-1].output_shape()
        numbers: int = self._nodes[leaf].variable.numel()
        of_sample = shape.numel() // max(self._samples[part], 1)
        if step.rule.is_bilinear(step.operations[-1]) and shape:
            return of_sample > (shape[1] if len(shape) > 1 else 1)
        return of_sample > numbers

    def _note(self, k: int, what: Literal["begins", "ends", "approximate"], why: str) -> None:
        self._notes.append(Note(k, what, why))

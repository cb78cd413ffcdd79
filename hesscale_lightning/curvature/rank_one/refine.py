"""Where the curvature of a loss is carried in two parts, decided for one graph when it is armed.

From the loss downwards every tensor is in one of these states: no curvature arrives; it has a plain diagonal; its
Hessian is known, because it is diagonal or a softmax's; or it is split into a rank-one part in every sample and a
remainder. A known Hessian is split at the operation that would mix its entries, most often the last linear layer. The
split ends where samples mix, and where a tensor is met by several parts, or by a part and other curvature: there the
operation above takes the whole, ``d + c g^2``, and all below is plain HesScale.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from hesscale_lightning.curvature.composite import Composite
from hesscale_lightning.curvature.graph import AccumulateGrad, Node
from hesscale_lightning.curvature.plan import Plan, Step
from hesscale_lightning.curvature.rank_one import layout, steps
from hesscale_lightning.curvature.rank_one.parts import RankOne, SoftmaxHead
from hesscale_lightning.curvature.rank_one.steps import Use
from hesscale_lightning.curvature.registry import Formula, Operation, Rule


class State(NamedTuple):
    """What is known of the curvature at a tensor, where it is not a plain diagonal.

    Attributes:
        part: The rank-one part that rides on the gradient, beside the remainder; None: none.
        inner: How many neighbours belong to a sample.
        kind: Whether the remainder is all there is, ``"diagonal"``; a softmax's, ``"softmax"``; or an estimate.
        head: The softmax.
    """

    part: RankOne | None
    inner: int
    kind: Literal["diagonal", "softmax", "estimate"]
    head: SoftmaxHead | None = None


ZERO: Any = "no curvature arrives"
PLAIN: Any = "a plain diagonal"
DIAGONAL = State(None, 0, "diagonal")
_UNSEEN: Any = None


def _merged(a: Any, b: Any) -> Any:
    """The state of a tensor with two uses."""
    if a is _UNSEEN or a == b:
        return b
    if ZERO in (a, b):
        a, b = (b, a) if a is ZERO else (a, b)
        return a if a is PLAIN or a == DIAGONAL else PLAIN  # c needs all of the gradient to be this loss's
    return PLAIN


class Change(NamedTuple):
    """What is done differently at a step. The formulas take gradient and curvature.

    Attributes:
        of_operation: From an operation and its rule to the formula in place of the ordinary one.
        of_composite: From a composite's formula to the one in its place.
    """

    of_operation: Callable[[Operation, Rule], Formula]
    of_composite: Callable[[Formula], Formula]


class Refinement:
    """The changes to each step of a plan, for one graph.

    Args:
        plan: The plan.
        nodes: The graph's nodes by position.
        following: Their ``next_functions``.
        outside: Cells whose curvature is wanted itself.

    Attributes:
        changes: For each step, the change or None.
        notes: Where the split begins, and where and why it ends, by step.
    """

    def __init__(self, plan: Plan, nodes: Sequence[Node], following: Sequence[Any], outside: Container[int]) -> None:
        self._plan, self._nodes, self._following = plan, nodes, following
        self._outside = outside
        self._states: list[Any] = [_UNSEEN] * plan.cells
        self._uses: list[Use | None] = []
        self._proposed: list[list[Any]] = []
        self.notes: list[tuple[int, str]] = []
        self._states[0] = ZERO
        for step in plan.steps:
            self._visit(step)
        self.changes = [self._change(k, step) for k, step in enumerate(plan.steps)]

    # -- first pass: states, from the loss downwards

    def _visit(self, step: Step) -> None:
        use, proposed = self._met(step)
        self._uses.append(use)
        self._proposed.append(proposed)
        for target, state in zip(step.targets, proposed, strict=False):
            if target >= 0:
                if state is not ZERO and state is not PLAIN and self._ends_at(target, state):
                    state = PLAIN
                self._states[target] = _merged(self._states[target], state)

    def _ends_at(self, cell: int, state: State) -> bool:
        """Leaves and wanted tensors take the whole."""
        if cell in self._outside:
            return True
        return cell < self._plan.size and type(self._nodes[cell]) is AccumulateGrad

    def _met(self, step: Step) -> tuple[Use | None, list[Any]]:
        """How a step meets the rank-one part, and the state that it proposes for each input."""
        count = len(step.targets)
        state = self._state_of_outputs(step)
        if state is PLAIN or state is _UNSEEN:
            return None, [PLAIN] * count
        if step.composite is not None:
            return self._met_by_composite(step, step.composite, state)
        op = self._operation(step)
        if state is ZERO:
            return self._begun(step, op)
        return self._continued(step, op, state)

    def _state_of_outputs(self, step: Step) -> Any:
        if step.outputs is None:
            return self._states[step.cell]
        states = [s for cell in step.outputs if (s := self._states[cell]) is not _UNSEEN]
        first = states[0] if states else _UNSEEN
        return first if all(s == first for s in states) else PLAIN

    def _operation(self, step: Step) -> Operation:
        node, following = self._nodes[step.cell], self._following[step.cell]
        return Operation(node, following, step.needs, step.transposed, "hesscale", step.rule.curved)

    def _begun(self, step: Step, op: Operation) -> tuple[Use | None, list[Any]]:
        """No curvature arrives; perhaps it is made here."""
        rule, count = step.rule, len(step.targets)
        if not rule.curved:
            return None, [ZERO] * count
        if rule.name == "LogSoftmaxBackward0" and not step.turns:
            return self._begun_by_softmax(step, op)
        op.transposed = list(op.transposed)
        rule.build(op)
        if not op.curved:
            return None, [ZERO] * count
        return None, [DIAGONAL if layout.is_entrywise(rule) else PLAIN] * count

    def _begun_by_softmax(self, step: Step, op: Operation) -> tuple[Use | None, list[Any]]:
        shape = op.output_shape()
        rank = len(shape)
        dim = layout.signed(op.node._saved_dim) % max(rank, 1)
        if not rank or shape[dim + 1 :].numel() != 1 or not shape.numel():
            return None, [PLAIN]
        head = SoftmaxHead()
        state = State(None, 0, "softmax", head)
        return Use([True], None, [0], None, head), [state]

    def _continued(self, step: Step, op: Operation, state: State) -> tuple[Use | None, list[Any]]:
        rule, count = step.rule, len(step.targets)
        whole = not rule.reduces or op.output_shape() == op.input_shape(0)
        if state == DIAGONAL and whole and (rule.view or layout.is_entrywise(rule)):
            return None, [DIAGONAL] * count
        if state.kind == "softmax" and rule.name in layout.ORDER_KEEPING and not step.turns:
            return None, [state] * count
        return self._split(step, op, state)

    def _split(self, step: Step, op: Operation, state: State) -> tuple[Use | None, list[Any]]:
        """The curvature is split already, or is to be split here."""
        rule, count = step.rule, len(step.targets)
        linear = steps.is_linear(op)
        shape = op.output_shape()
        part, inner, made = state.part, state.inner, None
        if not shape.numel():
            return None, [PLAIN] * count
        entrywise = rule.view or layout.is_entrywise(rule)
        if state.kind != "estimate" and not (entrywise and state.kind == "diagonal" and part is not None):
            if part is None:
                samples = shape[0] if linear else shape.numel()
                if state.kind == "softmax":
                    samples = shape.numel() // shape[-1]
                inner = shape.numel() // samples
            else:
                samples = part.samples
            rows = shape[:1].numel() if linear else samples
            if step.outputs is None and rows == samples and inner * samples == shape.numel():
                made = RankOne(samples)
        below = made or part
        if below is None:
            return None, [PLAIN] * count
        kind: Any = "estimate"
        if state.kind == "diagonal" and (entrywise or inner == 1):
            kind = "diagonal"
        proposed: list[Any] = []
        for i, target in enumerate(step.targets):
            found = None
            if target >= 0:
                found = layout.inner_of_input(op, rule, i, below.samples, inner)
            proposed.append(PLAIN if found is None else State(below, found, kind))
        outputs = 1 if step.outputs is None else len(step.outputs)
        return Use([False] * count, part, [inner] * outputs, made, state.head), proposed

    def _met_by_composite(self, step: Step, composite: Composite, state: Any) -> tuple[Use | None, list[Any]]:
        count = len(step.targets)
        plain = [PLAIN] * count
        if not composite.rowwise and not composite.shared and (state is ZERO or state == DIAGONAL):
            return None, [DIAGONAL] * count
        if state is ZERO or state.part is None:
            return None, plain
        return Use([False] * count, state.part, [state.inner]), plain

    # -- second pass: what it means for each step

    def _change(self, k: int, step: Step) -> Change | None:
        use, proposed = self._uses[k], self._proposed[k]
        if use is None:
            return None
        states = self._states
        kept = [
            target >= 0 and isinstance(state, State) and states[target] == state
            for target, state in zip(step.targets, proposed, strict=True)
        ]
        if isinstance(proposed[0], State) and proposed[0].kind == "softmax":
            return self._softmax_change(use) if kept[0] else None
        if not any(kept):
            if use.part is None:
                return None  # what arrives is whole
            use = use._replace(made=None, head=None)
        elif use.made is None and all(keep or target == -1 for keep, target in zip(kept, step.targets, strict=True)):
            return None  # the remainder goes on by the ordinary rule
        use = use._replace(kept=[keep or target == -1 for keep, target in zip(kept, step.targets, strict=True)])
        return Change(partial(_built, use), lambda formula: steps.any_operation(formula, True, use))

    def _softmax_change(self, use: Use) -> Change:
        head = use.head
        assert head is not None

        def build(op: Operation, _: Rule) -> Formula:
            return steps.log_softmax(op.node._saved_result, layout.signed(op.node._saved_dim), head)

        return Change(build, lambda formula: formula)


def _built(use: Use, op: Operation, rule: Rule) -> Formula:
    if steps.is_linear(op):
        return steps.linear(op, use)
    formula = rule.build(op)
    return steps.any_operation(formula, op.curved, use)

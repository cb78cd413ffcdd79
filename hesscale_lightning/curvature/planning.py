"""Makes the plan for a graph, by passes.

Each operation becomes a step by its rule. Passes then change steps: those in which paths meet are joined with others
(:mod:`.composite`), for ``hesscale_rank1`` some are replaced (:mod:`.rank_one`), Gauss-Newton marks those that take no
gradient, and what cannot do anything is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hesscale_lightning.curvature.complex_numbers import leads_out, refuse_complex
from hesscale_lightning.curvature.composite import Joiner
from hesscale_lightning.curvature.composite_formula import carry_of
from hesscale_lightning.curvature.graph import AccumulateGrad, Node, Trace
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.plan import Carry, Output, Plan, Step
from hesscale_lightning.curvature.rank_one import refine
from hesscale_lightning.curvature.registry import Rule, find_rule, no_rule

_scalar = torch.ones((), requires_grad=True)
MulBackward: Any = type((_scalar * 0.5).grad_fn)
del _scalar

#: Nodes whose backward runs another backward inside, over parameters that no edge leads to.
_HIDING = ("CheckpointFunctionBackward",)


def refuse_hidden_parameters(root: Node, found: Trace) -> None:
    """Raises if some node may hide parameters: they would get a gradient and, without a word, no diagonal."""
    for node in found.edges:
        if type(node).__name__ in _HIDING:
            raise no_rule(root, node)


def refuse_freed_graph(found: Trace) -> None:
    """Raises torch's error if backward has passed and freed what the nodes had saved; one node tells for all."""
    for node in found.edges:
        for name in dir(type(node)):
            if name.startswith("_raw_saved_") and getattr(node, name.replace("_raw", "", 1), None) is not None:
                return


def make_plan(
    root: Node,
    found: Trace,
    goals: Sequence[Output],
    method: str,
    make_operation: Callable[[int, list[bool], list[bool]], Operation],
    condition: Callable[[int, str, Any], None] = lambda *_: None,
) -> Plan:
    """Plans for a graph.

    Args:
        root: Where it begins; for error messages.
        found: The traced graph, which leads to at least one wanted tensor.
        goals: Wanted outputs of nodes, for tensors that are no leaves.
        method: As for ``attach``.
        make_operation: Makes the operation at a position, from which inputs are needed and which are transposed.
        condition: Told of what is decided by numbers: position, expression, value.

    Raises:
        UnsupportedOperationError: An operation has no rule, or its rule refuses this use.
        TypeError: A parameter is complex.
    """
    nodes = found.nodes
    for position, node in enumerate(nodes):
        if type(node) is AccumulateGrad:
            condition(position, "{w}.dtype", node.variable.dtype)
            if node.variable.is_complex():
                raise TypeError(f"complex parameters are not supported, got one of dtype {node.variable.dtype}")
    refuse_complex(root, nodes)
    rules = [None if type(node) is AccumulateGrad else _rule_for(root, node) for node in nodes]
    for position, node in enumerate(nodes):
        if leads_out(node):
            condition(position, "takes_complex({n})", False)
    leaves = [position for position, rule in enumerate(rules) if rule is None]
    zero = _terms_of_weight_zero(found, condition)
    whole = found
    if zero:
        found = _without_terms(found, zero)
    index, edges = found.index, found.edges

    def needs_of(position: int) -> list[bool]:
        return [index[child] >= 0 for child, _, _ in edges[nodes[position]]]

    operations: dict[int, Operation] = {}

    def operation_at(position: int) -> Operation:
        known = operations.get(position)
        if known is None:
            flips = [flip for _, _, flip in edges[nodes[position]]]
            known = operations[position] = make_operation(position, needs_of(position), flips)
        return known

    inside = _inside_network(found, rules) if method == "hesscale_gn" else [False] * len(nodes)
    plan = Plan([], leaves, len(nodes), {})

    def cell_of(position: int, output: int) -> int:
        if output == 0 or position < 0:
            return position
        return plan.beyond.setdefault((position, output), plan.size + len(plan.beyond))

    joiner = Joiner(found, rules, inside, {node for node, _ in goals}, operation_at)
    absorbed: set[int] = set()
    for position, (node, rule) in enumerate(zip(nodes, rules, strict=True)):
        if rule is None or index[node] < 0:
            continue
        op = operation_at(position)
        if rule.check is not None:
            rule.check(op)
        if rule.prepare is not None:
            op.prepared = rule.prepare(Operation(node, node.next_functions, op.needs, op.transposed, method))
            plan.prepared.append(op)
        if position in absorbed:
            continue
        inputs, needs = edges[node], op.needs
        composite = joiner.ending_in(position) if rule.partials is not None and needs.count(True) > 1 else None
        curved = rule.makes_curvature(op)
        members, carry = [op], _single(rule)
        if composite is not None:
            absorbed |= composite.private
            inputs, curved = composite.sources, True
            members = [operation_at(member.position) for member in composite.members]
            carry = carry_of(composite)
        outputs = None
        if rule.multi_output:
            outputs = [cell_of(position, k) for k in range(len(node._input_metadata))]
        elif any(owner == position for owner, _ in plan.beyond):
            raise no_rule(root, node, "its rule covers the first output only, and another output is used here")
        targets = [cell_of(index[child], output) for child, output, _ in inputs]
        turned = [flip for _, _, flip in inputs]
        if composite is not None:
            targets += [-2 - composite.members[place].position for place in composite.shared]
            turned += [False] * len(composite.shared)
        plan.steps.append(
            Step(position, rule, members, composite, carry, curved, needs, turned, targets, outputs, inside[position])
        )
    for node, output in goals:
        if whole.index.get(node, -1) >= 0:
            cell_of(whole.index[node], output)
    if method == "hesscale_rank1":
        refine(plan, nodes, set(cells_of_goals(plan, found, goals).values()))
    plan.steps = _that_do_something(plan.steps, plan.cells)
    if any(step.rule.source for step in plan.steps):
        plan.steps = _that_are_needed(plan, set(cells_of_goals(plan, found, goals).values()))
    return plan


def cells_of_goals(plan: Plan, found: Trace, goals: Sequence[Output]) -> dict[Output, int]:
    """The cells of wanted tensors that are no leaves."""
    cells: dict[Output, int] = {}
    for node, output in goals:
        position = found.index.get(node, -1)
        if position >= 0:
            cells[(node, output)] = position if output == 0 else plan.beyond[(position, output)]
    return cells


def _single(rule: Rule) -> Carry:
    carry = rule.carry

    def run(operations: Sequence[Operation], g: Any, h: Any) -> Any:
        return carry(operations[0], g, h)

    return run


def _that_do_something(steps: list[Step], cells: int) -> list[Step]:
    """Without those at which no curvature can arrive and none is made, and without gradients left out where none is."""
    arrives = [False] * cells
    kept = []
    for step in steps:
        here = step.outputs if step.outputs is not None else [step.cell]
        if not (step.curved or step.rule.source or any(arrives[cell] for cell in here)):
            continue
        kept.append(step)
        for target in step.targets:
            if target >= 0:
                arrives[target] = True
    takes_gradient = {step.cell for step in kept if step.curved}
    return [
        step._replace(targets=[t if t > -2 or -2 - t in takes_gradient else -1 for t in step.targets]) for step in kept
    ]


def _that_are_needed(plan: Plan, goals: set[int]) -> list[Step]:
    """Without those whose curvature goes nowhere but to sources, which bring their own."""
    needed = goals | set(plan.leaves)
    kept: list[Step] = []
    for step in reversed(plan.steps):
        targets = [target if target < -1 or target in needed else -1 for target in step.targets]
        if not any(target >= 0 for target in targets):
            continue
        kept.append(step._replace(targets=targets))
        if not step.rule.source:
            needed.update([step.cell] if step.outputs is None else step.outputs)
    return kept[::-1]


def weight_of(node: Node) -> float | None:
    """The number by which ``node`` multiplies a term of the loss; None if it does something else."""
    if type(node) is not MulBackward or node._input_metadata[0].shape:
        return None
    number = node._saved_other
    if number is None or not number.is_cpu or number.dim() or number.requires_grad:
        return None
    return float(number)


def has_weight_zero(node: Node) -> bool:
    """Whether a node multiplies a term of the loss by the number zero."""
    return weight_of(node) == 0


def _terms_of_weight_zero(found: Trace, condition: Callable[[int, str, Any], None]) -> set[int]:
    zero = set()
    for position, node in enumerate(found.nodes):
        weight = weight_of(node)
        if weight is not None:
            condition(position, "has_weight_zero({n})", weight == 0)
            if weight == 0:
                zero.add(position)
    return zero


def _without_terms(found: Trace, dropped: set[int]) -> Trace:
    """The trace without what leads to the loss by the ``dropped`` nodes alone; positions stay, and so do all leaves.

    Libraries write ``loss + 0.0 * entropy`` where a bonus is switched off: neither gradient nor curvature comes from
    there, and the leaves that only the term reaches have a diagonal of zeros.
    """
    reached = [False] * len(found.nodes)
    reached[0] = 0 not in dropped
    for position, node in enumerate(found.nodes):
        if reached[position]:
            for child, _, _ in found.edges[node]:
                below = found.index[child]
                if below >= 0 and below not in dropped:
                    reached[below] = True
    index = {node: position if position >= 0 and reached[position] else -1 for node, position in found.index.items()}
    edges = {node: inputs if index[node] >= 0 else [] for node, inputs in found.edges.items()}
    return Trace(found.nodes, index, edges, found.leaves)


def _rule_for(root: Node, node: Node) -> Rule:
    rule = find_rule(node)
    if rule is None:
        raise no_rule(root, node)
    return rule


def _inside_network(found: Trace, rules: list[Rule | None]) -> list[bool]:
    """For each node, whether a parameterised operation, or a source, lies between it and the loss."""
    nodes, index, edges = found.nodes, found.index, found.edges
    below = [[index[child] for child, _, _ in edges[node] if index[child] >= 0] for node in nodes]
    parameter = [False] * len(nodes)  # a wanted leaf, or views and casts of one
    for position in reversed(range(len(nodes))):
        rule = rules[position]
        parameter[position] = rule is None or (rule.view and any(parameter[child] for child in below[position]))
    inside = [False] * len(nodes)
    for position, rule in enumerate(rules):
        if rule is None:
            continue
        ends = rule.source or (not rule.view and any(parameter[child] for child in below[position]))
        if inside[position] or ends:
            for child in below[position]:
                inside[child] = True
    return inside

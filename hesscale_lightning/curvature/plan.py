"""What to do with the graphs of one structure: found once, used at every step of a training loop.

A :class:`Plan` holds positions, flags and rules, and neither nodes nor tensors, so that keeping it keeps nothing else
alive.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch

from hesscale_lightning.curvature.complex_numbers import refuse_complex, takes_complex, ways_out
from hesscale_lightning.curvature.composite import Composite, Joiner
from hesscale_lightning.curvature.graph import AccumulateGrad, Node, Route, Trace, follow, route_of
from hesscale_lightning.curvature.registry import Rule, find_rule, no_rule, on_registration

Output = tuple[Node, int]  # a node and the number of one of its outputs


class Step(NamedTuple):
    """One operation, or one composite, that curvature is carried through.

    Attributes:
        cell: Its position in the order of backward; the cell of that number holds the curvature of its first output.
        rule: The rule of its node.
        composite: What it is joined with, or None.
        needs: For each input, whether it is wanted.
        transposed: For each input, whether it is the transpose of the tensor that receives the curvature.
        turns: Whether any input is.
        targets: For each input, the cell that its curvature is added to; -1 if not wanted; ``-2 - cell`` for a part of
            the gradient that is to be left out at another step.
        outputs: The cells of all its outputs, for a rule of several.
        inside: Whether a parameterised operation lies between it and the loss, where that matters.
    """

    cell: int
    rule: Rule
    composite: Composite | None
    needs: list[bool]
    transposed: list[bool]
    turns: bool
    targets: list[int]
    outputs: list[int] | None
    inside: bool


class Plan(NamedTuple):
    """How curvature is carried through the graphs of one structure.

    Attributes:
        route: How to find the nodes; None if they cannot be told by their types.
        steps: In the order of backward.
        leaves: Cells of the wanted leaves.
        size: How many wanted nodes there are, and so cells of first outputs.
        cells: How many cells there are.
        beyond: Cells of outputs after the first, by position of the node and number of the output.
        narrow: The last step up to which backward passes one node at a time.
        declined: Positions of operations that were not joined because they do not work along the last dimension, which
            another graph of the same structure may do.
        weights: For every multiplication of a term of the loss by a number: its position, and whether the number is 0.
        ways_out: Positions of the operations that take complex numbers in other graphs of this structure, not to be planned for.
        recipes: What ``hesscale_rank1`` does differently, for graphs of different sizes; see :mod:`..rank_one`.
    """

    route: Route | None
    steps: list[Step]
    leaves: list[int]
    size: int
    cells: int
    beyond: dict[tuple[int, int], int]
    narrow: int
    declined: list[int]
    weights: list[tuple[int, bool]]
    ways_out: list[int]
    recipes: list[Any]


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


def make_plan(root: Node, found: Trace, goals: list[Output], method: str) -> Plan:
    """Plans for the structure of ``found``.

    Args:
        root: Where it begins; for error messages.
        found: The traced graph, which leads to at least one wanted tensor.
        goals: Wanted outputs of nodes, for tensors that are no leaves.
        method: As for ``attach``.

    Raises:
        UnsupportedOperationError: An operation has no rule.
        TypeError: A parameter is complex.
    """
    nodes = found.nodes
    refuse_complex(root, nodes)
    rules = [None if type(node) is AccumulateGrad else _rule_for(root, node) for node in nodes]
    weights = _weights(found)
    whole = found
    if any(zero for _, zero in weights):
        found = _without_terms(found, {position for position, zero in weights if zero})
    index, edges = found.index, found.edges
    inside = _inside_network(found, rules) if method == "hesscale_gn" else [False] * len(nodes)
    joiner = Joiner(found, rules, inside, {node for node, _ in goals})
    beyond: dict[tuple[int, int], int] = {}
    size = len(nodes)

    def cell_of(position: int, output: int) -> int:
        return position if output == 0 or position < 0 else beyond.setdefault((position, output), size + len(beyond))

    steps: list[Step] = []
    leaves: list[int] = []
    absorbed: set[int] = set()
    narrow = -1
    for position, (node, rule) in enumerate(zip(nodes, rules, strict=True)):
        if rule is None:
            if node.variable.is_complex():
                raise TypeError(f"complex parameters are not supported, got one of dtype {node.variable.dtype}")
            leaves.append(position)
            continue
        if position in absorbed or index[node] < 0:
            continue
        inputs = edges[node]
        needs = [index[child] >= 0 for child, _, _ in inputs]
        composite = joiner.ending_in(position) if rule.partials is not None and needs.count(True) > 1 else None
        if composite is not None:
            absorbed |= composite.private
            inputs = composite.sources
        targets = [cell_of(index[child], output) for child, output, _ in inputs]
        outputs = None
        if rule.multi_output:
            outputs = [cell_of(position, k) for k in range(len(node._input_metadata))]
        elif any(owner == position for owner, _ in beyond):
            raise no_rule(root, node, "its rule covers the first output only, and another output is used here")
        flips = [flip for _, _, flip in inputs]
        steps.append(Step(position, rule, composite, needs, flips, True in flips, targets, outputs, inside[position]))
        if len(steps) == narrow + 2 and (narrow < 0 or _single(steps[narrow])):
            narrow += 1
    for node, output in goals:
        if whole.index.get(node, -1) >= 0:
            cell_of(whole.index[node], output)
    steps = _with_shared_gradients(steps)
    return Plan(
        route_of(whole) if not goals else None,
        steps,
        leaves,
        size,
        size + len(beyond),
        beyond,
        narrow,
        sorted(joiner.declined),
        weights,
        ways_out(nodes),
        [],
    )


def weight_of(node: Node) -> float | None:
    """The number by which ``node`` multiplies a term of the loss; None if it does something else."""
    if type(node) is not MulBackward or node._input_metadata[0].shape:
        return None
    number = node._saved_other
    if number is None or not number.is_cpu or number.dim() or number.requires_grad:
        return None
    return float(number)


def _weights(found: Trace) -> list[tuple[int, bool]]:
    found_weights = [(position, weight_of(node)) for position, node in enumerate(found.nodes)]
    return [(position, weight == 0) for position, weight in found_weights if weight is not None]


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


def _with_shared_gradients(steps: list[Step]) -> list[Step]:
    """Lets each composite send gradients to those of its shared members that a step of their own takes them from."""
    takes_gradient = {step.cell for step in steps if step.composite is not None or step.rule.curved}
    complete = []
    for step in steps:
        if step.composite is not None and step.composite.shared:
            members = step.composite.members
            shared = [place for place in step.composite.shared if members[place].position in takes_gradient]
            step = step._replace(
                composite=step.composite._replace(shared=shared),
                targets=step.targets + [-2 - members[place].position for place in shared],
                transposed=step.transposed + [False] * len(shared),
            )
        complete.append(step)
    return complete


def _single(step: Step) -> bool:
    return sum(cell >= 0 for cell in step.targets) == 1


def _rule_for(root: Node, node: Node) -> Rule:
    rule = find_rule(node)
    if rule is None:
        raise no_rule(root, node)
    return rule


def _inside_network(found: Trace, rules: list[Rule | None]) -> list[bool]:
    """For each node, whether a parameterised operation lies between it and the loss."""
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
        if inside[position] or (not rule.view and any(parameter[child] for child in below[position])):
            for child in below[position]:
                inside[child] = True
    return inside


class PlanCache:
    """Plans of the structures met lately, by what can be told of a graph before walking it."""

    def __init__(self, per_key: int = 4, keys: int = 64) -> None:
        self._plans: dict[Any, list[Plan]] = {}
        self._per_key = per_key
        self._keys = keys
        on_registration(self.clear)

    def clear(self) -> None:
        """Forgets everything."""
        self._plans.clear()

    def matching(
        self, key: Any, root: Node, leaves: Container[int] | None
    ) -> Iterator[tuple[Plan, list[Node], list[Any]]]:
        """Plans for graphs of this structure, with this graph's nodes by position and their ``next_functions``."""
        plans = self._plans.get(key, ())
        for i, plan in enumerate(plans):
            found = follow(plan.route, root, leaves) if plan.route is not None else None
            if found is not None:
                if any(takes_complex(found[1][position]) for position in plan.ways_out):
                    continue  # to plan for it is an error
                if i:  # the next graph is likely to be of the same kind
                    self._plans[key] = [plan, *plans[:i], *plans[i + 1 :]]
                yield plan, *found

    def add(self, key: Any, plan: Plan) -> None:
        """Keeps a plan if its graph can be recognised again."""
        if plan.route is None:
            return
        if key not in self._plans and len(self._plans) >= self._keys:
            self._plans.pop(next(iter(self._plans)))
        plans = self._plans.setdefault(key, [])
        plans.insert(0, plan)
        del plans[self._per_key :]

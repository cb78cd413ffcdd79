"""What is done with a graph: the steps that carry curvature down it.

A step says how it carries curvature by a function of its operations, ``g`` and ``h``; what runs steps knows nothing of
what made them, which is :mod:`.planning`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hesscale_lightning.curvature.composite import Composite
from hesscale_lightning.curvature.graph import Node
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import Rule

Output = tuple[Node, int]  # a node and the number of one of its outputs
Carry = Callable[[Sequence[Operation], Any, Any], Any]


class Step(NamedTuple):
    """One operation, or several joined ones, that curvature is carried through.

    Attributes:
        cell: Position of the operation at whose output g and h arrive; the cell of that number holds h.
        rule: The rule of its node.
        operations: What it carries through; the last one ends it.
        composite: What joins them, if they are several.
        carry: From the operations, g and h to the curvature for each target.
        curved: Whether it takes the gradient.
        needs: For each input, whether it is wanted.
        turned: For each target, whether it is the transpose of the tensor that receives the curvature.
        targets: For each result, the cell that it is added to; -1 if not wanted; ``-2 - cell`` for a part of the
            gradient that is to be left out at another step.
        outputs: The cells of all its outputs, for a rule of several.
        inside: Whether a parameterised operation lies between it and the loss, where that matters.
    """

    cell: int
    rule: Rule
    operations: list[Operation]
    composite: Composite | None
    carry: Carry
    curved: bool
    needs: list[bool]
    turned: list[bool]
    targets: list[int]
    outputs: list[int] | None
    inside: bool


@dataclass(slots=True)
class Plan:
    """How curvature is carried through a graph.

    Attributes:
        steps: In an order in which backward may run.
        leaves: Cells of the wanted leaves.
        size: How many wanted nodes there are, and so cells of first outputs.
        beyond: Cells of outputs after the first, by position of the node and number of the output.
        prepared: Operations whose rules prepare something, whether or not they have a step in the end.
        notes: What ``hesscale_rank1`` has to say, with the name of the operation that it says it of.
    """

    steps: list[Step]
    leaves: list[int]
    size: int
    beyond: dict[tuple[int, int], int]
    prepared: list[Operation] = field(default_factory=list)
    notes: list[tuple[str, Any]] = field(default_factory=list)

    def nothing(self) -> Plan:
        """A plan for nothing, which holds no operations."""
        return Plan([], [], 0, {})

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return self.size + len(self.beyond)

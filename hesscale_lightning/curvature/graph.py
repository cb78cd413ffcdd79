"""The part of an autograd graph that leads from a loss to the wanted tensors, in the order in which backward meets it.

This module knows nodes, edges and leaves, and nothing of calculus: which operation a node stands for, and what its
curvature is, is the registry's and the rules' business. Only ``next_functions``, ``name()`` and, for leaves,
``variable`` are read here, so that walking a graph unpacks no saved tensor.

Walking is most of the fixed cost of a step on a small network, and a training loop builds the same graph at every
step: see :mod:`.structure` for how the next one is recognised.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hesscale_lightning.curvature import deep_graphs

Node = Any  # torch.autograd.graph.Node is an abstract base that its own instances do not satisfy for a type checker

#: The node that an input came from, which of that node's outputs it is, and whether it was transposed in between: every
#: matrix of a linear layer passes a TBackward0, and a mark on the edge is cheaper than a step of its own.
Edge = tuple[Node, int, bool]

_leaf = torch.empty((1, 1), requires_grad=True)
TBackward: Any = type(_leaf.t().grad_fn)
AccumulateGrad: Any = type(_leaf.t().grad_fn.next_functions[0][0])  # type: ignore[union-attr]
del _leaf


@dataclass(slots=True)
class Trace:
    """The wanted part of a graph.

    Attributes:
        nodes: Every node on a path from the root to a wanted tensor, the leaves' ``AccumulateGrad`` included, each
            before all nodes that it leads to, which is an order in which backward may run. The root comes first.
        index: Position of each of these nodes in ``nodes``; -1 for a visited node that leads to no wanted tensor.
        edges: Where the inputs of every visited node came from, in the order of ``next_functions``; none for leaves.
        leaves: How many wanted leaves were found.
    """

    nodes: list[Node]
    index: dict[Node | None, int]
    edges: dict[Node, list[Edge]]
    leaves: int


def trace(root: Node, leaves: Container[int] | None, inner: Iterable[tuple[Node, int]] = ()) -> Trace:
    """Visits the graph below ``root`` once and keeps what leads to a wanted tensor.

    Args:
        root: The node to start from, ``loss.grad_fn``.
        leaves: ``id`` of every wanted leaf tensor; None wants every leaf that requires grad.
        inner: ``(tensor.grad_fn, tensor.output_nr)`` of every wanted tensor that is not a leaf.
    """
    deep_graphs.release()
    goals = {node for node, _ in inner}
    finished: list[Node] = []  # each after all that it leads to
    index: dict[Node | None, int] = {None: -1}
    edges: dict[Node, list[Edge]] = {}
    found = 0
    stack = [root]
    while stack:
        node = stack[-1]
        if node in edges:
            stack.pop()
            if node not in index:
                if node in goals or any(index[child] >= 0 for child, _, _ in edges[node]):
                    index[node] = len(finished)
                    finished.append(node)
                else:
                    index[node] = -1
            continue
        edges[node] = following = []
        for child, output in node.next_functions:
            transposed = False
            while type(child) is TBackward and child not in goals:
                child, output = child.next_functions[0]
                transposed = not transposed
            following.append((child, output, transposed))
            if child in index or child in edges:
                continue
            if type(child) is not AccumulateGrad:
                stack.append(child)
                continue
            edges[child] = []
            if leaves is None or id(child.variable) in leaves:
                index[child] = len(finished)
                finished.append(child)
                found += 1
            else:
                index[child] = -1
    deep_graphs.keep(root, edges)
    last = len(finished) - 1
    for node, position in index.items():
        if position >= 0:
            index[node] = last - position
    return Trace(finished[::-1], index, edges, found)


def path(root: Node, target: Node) -> list[Node]:
    """A shortest path from ``root`` to ``target``, both included: what an error message shows."""
    parents: dict[Node, Node | None] = {root: None}
    queue = [root]
    for node in queue:
        if node is target:
            break
        for child, _ in node.next_functions:
            if child is not None and child not in parents:
                parents[child] = node
                queue.append(child)
    found: list[Node] = []
    step: Node | None = target
    while step is not None:
        found.append(step)
        step = parents[step]
    return found[::-1]

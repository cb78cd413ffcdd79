"""Graphs of tens of thousands of operations in a row can be walked from Python and still be dropped.

Autograd frees a chain of nodes in a loop, except for nodes that have been seen from Python: such a node belongs to its
Python object, and freeing it frees the next one within, some 170 bytes of stack further down. At 50,000 nodes the stack
of a main thread is at its end, and the interpreter with it, when the loss is dropped, long after the walk.

So references to nodes at every few hundred steps of the way down are kept here, where freeing has to stop. Once
nothing else owns such a node it is let go in turn, which frees the piece up to the next. That is done when the next
graph is walked: until then what lies below stays in memory, after a backward pass the nodes without what they saved.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any

Node = Any

#: Graphs of fewer nodes are left alone: they need less than 2 MiB of stack.
DEEP = 10_000
#: Length of a piece.
_PIECE = 500
#: References to a node that nothing but ``_kept`` owns: that, a variable, and the call that counts.
_ALONE = 3

_kept: dict[Node, None] = {}  # of each graph in the order of backward
_lock = threading.Lock()


def keep(root: Node, edges: Mapping[Node, Iterable[Any]]) -> None:
    """Makes a graph safe to be dropped, if it is deep.

    Args:
        root: Where it begins.
        edges: Every node that has been seen, with its inputs as tuples that begin with the node they came from.
    """
    if len(edges) < DEEP:
        return
    depth = dict.fromkeys(edges, 0)
    for node in _order(root, edges):
        below = depth[node] + 1
        for child, *_ in edges[node]:
            if child is not None:
                depth[child] = max(depth[child], below)
    # A node is kept if an edge leads to it from another piece, so that no way through the graph passes by.
    entries = {
        child
        for node, inputs in edges.items()
        for child, *_ in inputs
        if child is not None and edges[child] and depth[child] // _PIECE > depth[node] // _PIECE
    }
    with _lock:
        _kept.update(dict.fromkeys(sorted(entries, key=depth.__getitem__)))


def release() -> None:
    """Lets go of the pieces of graphs that have been dropped."""
    if not _kept or not _lock.acquire(blocking=False):
        return
    try:
        nodes = list(reversed(_kept))
        while nodes:  # from the loss down, as each piece owns the next
            node = nodes.pop()
            if sys.getrefcount(node) == _ALONE:
                del _kept[node]
    finally:
        _lock.release()


def _order(root: Node, edges: Mapping[Node, Iterable[Any]]) -> list[Node]:
    """The nodes, each before all that it leads to."""
    waiting = dict.fromkeys(edges, 0)
    for inputs in edges.values():
        for child, *_ in inputs:
            if child is not None:
                waiting[child] += 1
    order = [root]
    for node in order:
        for child, *_ in edges[node]:
            if child is not None:
                waiting[child] -= 1
                if not waiting[child]:
                    order.append(child)
    return order

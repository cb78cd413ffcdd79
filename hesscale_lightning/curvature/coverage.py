"""What curvature meets on its way through a loss: exact, approximate and why, or unsupported.

Every rule equals its operation's local formula. What can be lost beside the off-diagonal entries that HesScale always
drops is the cross term where two paths from one tensor meet in an operation: ``2 (dy/da) (dy/db) h + 2 (d2y/da db) g``
for paths that arrive as ``a`` and ``b``. The report names these places. Elementwise operations do not appear among
them where they were joined, because a composite keeps the cross term.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hesscale_lightning.curvature.complex_numbers import complex_output
from hesscale_lightning.curvature.composite import Joiner
from hesscale_lightning.curvature.engine import Method, root_of, tell_freed_graph, wanted_tensors
from hesscale_lightning.curvature.graph import AccumulateGrad, Node, Trace, trace
from hesscale_lightning.curvature.plan import Output
from hesscale_lightning.curvature.planning import make_plan
from hesscale_lightning.curvature.registry import Operation, UnsupportedOperationError, find_rule, no_rule
from hesscale_lightning.curvature.sharding import stand_ins
from hesscale_lightning.curvature.tensor_parallel import refusals

Status = Literal["exact", "approximate", "unsupported"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation on the way from the loss to the parameters.

    Attributes:
        operation: The autograd node's name; for joined operations the one in which the paths meet.
        status: ``"exact"``, ``"approximate"`` or ``"unsupported"``.
        reason: Why it is not exact, or what was joined to make it so.
    """

    operation: str
    status: Status
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Refined:
    """What becomes of the rank-one part of the output's Hessian at one operation.

    Attributes:
        operation: The autograd node's name.
        status: ``"begins"``, ``"ends"`` or ``"approximate"``.
        reason: Why it ends or is approximate.
    """

    operation: str
    status: Literal["begins", "ends", "approximate"]
    reason: str = ""


@dataclass(frozen=True)
class CoverageReport:
    """Every operation between a loss and the wanted parameters; prints as a table.

    Attributes:
        entries: In the order of backward.
        unreached: How many of the wanted tensors the loss does not lead to.
        refinement: For ``method="hesscale_rank1"``, in the order of backward: where the rank-one part begins to ride on
            the gradient, where and why it ends and plain HesScale goes on, and where it is approximate.
    """

    entries: tuple[Entry, ...]
    unreached: int = 0
    refinement: tuple[Refined, ...] | None = None

    @property
    def supported(self) -> bool:
        """Whether ``attach`` accepts the loss."""
        return not self.unsupported

    @property
    def exact(self) -> tuple[Entry, ...]:
        """The operations that pass on exactly what HesScale promises."""
        return tuple(entry for entry in self.entries if entry.status == "exact")

    @property
    def approximate(self) -> tuple[Entry, ...]:
        """The operations in which a cross term between meeting paths is dropped."""
        return tuple(entry for entry in self.entries if entry.status == "approximate")

    @property
    def unsupported(self) -> tuple[Entry, ...]:
        """The operations that curvature cannot pass."""
        return tuple(entry for entry in self.entries if entry.status == "unsupported")

    def __str__(self) -> str:
        order = {"unsupported": 0, "approximate": 1, "exact": 2}
        lines = _table(self.entries, order)
        lines.append(
            f"{len(self.exact)} exact, {len(self.approximate)} approximate, {len(self.unsupported)} unsupported"
            + (f"; {self.unreached} of the wanted tensors are not reached" if self.unreached else "")
        )
        lines.append("exact: passes on all that arrives; what mixing operations make off the diagonal is dropped")
        if self.refinement is not None:
            lines += ["", "rank-one part along the gradient:"]
            lines += _table(self.refinement, {"begins": 0, "approximate": 1, "ends": 2})
            if not any(entry.status == "begins" for entry in self.refinement):
                lines.append("it begins nowhere: this is plain HesScale")
        return "\n".join(lines)


def _table(entries: Iterable[Entry | Refined], order: dict[str, int]) -> list[str]:
    rows = [("status", "operation", "times", "why")]
    counts = Counter((e.status, e.operation, e.reason) for e in entries)
    for (status, operation, reason), count in sorted(counts.items(), key=lambda item: (order[item[0][0]], item[0][1:])):
        rows.append((status, operation, str(count), reason))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    ]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]


def coverage(loss: Tensor, params: Iterable[Tensor] | None = None, *, method: Method = "hesscale") -> CoverageReport:
    """Reports on every operation between ``loss`` and ``params``, without running backward.

    Args:
        loss: As for :func:`~hesscale_lightning.curvature.attach`; its graph is left as it was.
        params: The tensors that are to receive a diagonal; None takes every leaf that requires grad.
        method: As for ``attach``. With ``"hesscale_rank1"`` the report also says how far that refinement reaches; the
            rest is HesScale's for every method.

    Returns:
        The report. ``print`` it, or ask it for ``unsupported``, ``approximate`` and ``exact``.

    Raises:
        ValueError, TypeError: As ``attach``, except that an unsupported operation is reported and not raised.
        RuntimeError: The graph was freed by an earlier backward.

    Example:
        >>> import torch
        >>> x, w = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
        >>> hidden = x @ w
        >>> print(coverage((hidden + torch.tanh(hidden @ w)).square().mean()))
        status       operation      times  why
        -----------------------------------------------------------------------------------------------------------
        approximate  AddBackward0   1      paths from MmBackward0 meet here: their cross term is dropped
        approximate  MmBackward0    1      paths from a leaf of shape (3, 3) meet here: their cross term is dropped
        exact        MeanBackward0  1
        exact        MmBackward0    1
        exact        PowBackward0   1
        exact        TanhBackward0  1
        4 exact, 2 approximate, 0 unsupported
        exact: passes on all that arrives; what mixing operations make off the diagonal is dropped
    """
    root = root_of(loss, method)
    leaves, inner = wanted_tensors(None if params is None else stand_ins(params))
    found = trace(root, leaves, inner)
    missing = 0 if leaves is None else len(leaves) - found.leaves - sum(found.index.get(n, -1) >= 0 for n, _ in inner)
    if found.index[root] < 0:
        return CoverageReport((), missing)
    try:
        return _report(root, found, inner, missing, method)
    except RuntimeError as error:
        tell_freed_graph(error)
        raise


def _report(root: Node, found: Trace, inner: dict[Output, Tensor], missing: int, method: Method) -> CoverageReport:
    with torch.no_grad():
        entries = tuple(_entries(root, found, {node for node, _ in inner}))
        refinement = None
        if method == "hesscale_rank1" and not any(entry.status == "unsupported" for entry in entries):
            refinement = _refinement(root, found, inner)
        return CoverageReport(entries, missing, refinement)


def supported_params(loss: Tensor, params: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Splits ``params`` into those that curvature can reach completely, and those behind an unsupported operation.

    A parameter that is also reached another way still belongs to the latter: its diagonal would lack a part.

    Args:
        loss: As for :func:`~hesscale_lightning.curvature.attach`.
        params: Leaf tensors.
    """
    params = list(params)
    root = root_of(loss, "hesscale")
    there = stand_ins(params)
    found = trace(root, {id(p) for p in there})
    split = refusals(found)
    behind: set[int] = set()
    blocked = [False] * len(found.nodes)
    for position, node in enumerate(found.nodes):
        if type(node) is AccumulateGrad:
            if blocked[position]:
                behind.add(id(node.variable))
            continue
        if not blocked[position]:
            blocked[position] = node in split or _refusal(root, node, _operation(node, found)) is not None
        if blocked[position]:
            for child, _, _ in found.edges[node]:
                if found.index[child] >= 0:
                    blocked[found.index[child]] = True
    pairs = list(zip(params, there, strict=True))
    return [p for p, q in pairs if id(q) not in behind], [p for p, q in pairs if id(q) in behind]


def _refinement(root: Node, found: Trace, inner: dict[Output, Tensor]) -> tuple[Refined, ...]:
    plan = make_plan(root, found, list(inner), "hesscale_rank1", lambda k, *_: _operation(found.nodes[k], found))
    return tuple(Refined(name, note.what, note.why) for name, note in plan.notes)


def _operation(node: Node, found: Trace) -> Operation:
    needs = [found.index[child] >= 0 for child, _, _ in found.edges[node]]
    flips = [flip for _, _, flip in found.edges[node]]
    return Operation(node, node.next_functions, needs, flips, "hesscale")


def _refusal(root: Node, node: Node, operation: Operation) -> str | None:
    """Why curvature cannot pass ``node``, or None."""
    rule = find_rule(node)
    if rule is None:
        return str(no_rule(root, node)).split("What to do: ")[1]
    complex_numbers = complex_output(node)
    if complex_numbers is not None:
        return complex_numbers
    try:
        rule.attach(operation)
    except UnsupportedOperationError as error:
        return str(error)
    return None


def _entries(root: Node, found: Trace, outside: set[Node]) -> list[Entry]:
    nodes, index, edges = found.nodes, found.index, found.edges
    rules = [None if type(node) is AccumulateGrad else find_rule(node) for node in nodes]
    operations = [_operation(node, found) for node in nodes]
    joiner = Joiner(found, rules, [False] * len(nodes), outside, operations.__getitem__)
    places, below = _reachable(found)
    others = {child for inputs in edges.values() for child, output, _ in inputs if output}  # used beyond the first
    curved = [False] * len(nodes)  # whether curvature other than zero can arrive at a node
    absorbed: set[int] = set()
    entries: list[Entry] = []
    split = refusals(found)
    for position, (node, rule) in enumerate(zip(nodes, rules, strict=True)):
        if type(node) is AccumulateGrad:
            continue
        inputs = [edge for edge in edges[node] if index[edge[0]] >= 0]
        refusal = split.get(node) or _refusal(root, node, operations[position])
        if refusal is None and rule is not None and node in others and not rule.multi_output:
            refusal = "its rule covers the first output only, and another output is used here"
        composite = None
        if rule is not None and refusal is None and position not in absorbed and rule.partials and len(inputs) > 1:
            composite = joiner.ending_in(position)
            if composite is not None:
                absorbed |= composite.private
                inputs = composite.sources
        makes_curvature = mixes = True
        if rule is not None and refusal is None:
            operation = operations[position]
            makes_curvature = rule.makes_curvature(operation) or rule.source or composite is not None
            mixes = makes_curvature or rule.is_bilinear(operation)
            if rule.partials is not None and composite is None:
                mixes = any(i != j for i, j in rule.partials(operation)[1])
        arrives = curved[position]
        for child, _, _ in inputs:
            curved[index[child]] = curved[index[child]] or arrives or makes_curvature
        if position in absorbed and composite is None:
            continue
        if refusal is not None:
            entries.append(Entry(node.name(), "unsupported", refusal))
            continue
        where = [index[child] for child, _, _ in inputs if index[child] >= 0]
        meeting = _meeting(where, places, below) if mixes or arrives else None
        if meeting is not None:
            entries.append(
                Entry(
                    node.name(),
                    "approximate",
                    f"paths from {_describe(nodes[meeting])} meet here: their cross term is dropped",
                )
            )
        elif rule is not None and rule.approximate:
            entries.append(Entry(node.name(), "approximate", rule.approximate))
        elif composite is not None:
            joined = ", ".join(sorted({nodes[m.position].name().removesuffix("Backward0") for m in composite.members}))
            entries.append(Entry(node.name(), "exact", f"joined: {joined}"))
        else:
            entries.append(Entry(node.name(), "exact"))
    return entries


def _reachable(found: Trace) -> tuple[list[int], list[int]]:
    """Where paths can meet, and for each node a bit set of which of these places it is or leads to.

    Paths that meet come to their first common node by two edges, so that others need no bit: with a bit for every node
    the sets of a deep graph would be gigabytes.
    """
    arriving = [0] * len(found.nodes)
    inputs = [
        [found.index[child] for child, _, _ in found.edges[node] if found.index[child] >= 0] for node in found.nodes
    ]
    for positions in inputs:
        for position in positions:
            arriving[position] += 1
    places = [position for position, edges in enumerate(arriving) if edges > 1]
    below = [0] * len(found.nodes)
    for bit, position in enumerate(places):
        below[position] = 1 << bit
    for position in reversed(range(len(found.nodes))):
        for child in inputs[position]:
            below[position] |= below[child]
    return places, below


def _meeting(inputs: list[int], places: list[int], below: list[int]) -> int | None:
    """The first node that two inputs have in common."""
    seen = common = 0
    for position in inputs:
        common |= seen & below[position]
        seen |= below[position]
    if not common:
        return None
    return places[(common & -common).bit_length() - 1]


def _describe(node: Node) -> str:
    if type(node) is AccumulateGrad:
        return f"a leaf of shape {tuple(node.variable.shape)}"
    return str(node.name())

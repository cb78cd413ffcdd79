"""Which operations are carried together because paths from one tensor meet in them.

Carrying curvature down each of two meeting paths by itself would lose the cross term. So, visiting the graph from the
loss downwards, an elementwise operation (see :mod:`.elementwise`) with two wanted inputs may end a *composite*:

1. It takes in the operations below that are elementwise or along the last dimension (see :mod:`.rows`), as long as
   nothing outside the composite uses their result and no ``t()`` lies in between. If two paths meet in what was taken
   in, what lies on the way to a meeting is joined, down to the one tensor where all paths have met if there is one.
2. If no paths meet there, they may meet below operations whose results others use as well. Elementwise operations of
   that kind are then joined too, but only those on the way to a meeting. If paths do meet but leave several sources,
   paths from two of these may still meet below such operations, as in the log-probability of an action that a critic
   judges too; then what lies on the way there is joined as well.
3. A composite that mixes the entries of a row leaves a Hessian at its sources that is not diagonal. That does not
   matter above a linear layer, where HesScale approximates anyway, but it does above another mixing operation: an
   entropy stands on normalised logits, and these on the network's output. So the composite reaches on through that
   operation, and through elementwise ones before it, whether others use their results or not.

Members whose results others use are *shared*: they are carried on their own as well, with the curvature that the others
bring and with their part of the gradient, which is the whole less what the composite sends there.

What a composite computes is :mod:`.composite_formula`'s business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hesscale_lightning.curvature import rows
from hesscale_lightning.curvature.graph import Edge, Node, Trace
from hesscale_lightning.curvature.registry import Operation, PartialsRule, Rule

_MOST_MEMBERS = 64  # a composite is meant to be a head or a norm, not a network


class Member(NamedTuple):
    """An operation in a composite: its position, needs, and where each input comes from.

    ``wiring`` holds for each input the place of another member, ``~s`` for source ``s``, or None for what is not
    wanted. An elementwise operation has ``partials``, one along the last dimension has none. ``flat`` says that its
    output has lost the last dimension.
    """

    position: int
    partials: PartialsRule | None
    needs: list[bool]
    wiring: list[int | None]
    flat: bool
    row: rows.RowOperation | None = None


class Composite(NamedTuple):
    """Operations joined into one, as positions in a trace: structure only.

    Attributes:
        members: The operations, inputs before outputs; the last is the meeting point.
        sources: Where the paths start: edges into nodes outside.
        private: Positions of the members that need not be carried on their own as well.
        shared: Places of the members that do.
        flat_sources: For each source, whether it has no entries along the last dimension.
    """

    members: list[Member]
    sources: list[Edge]
    private: set[int]
    shared: list[int]
    flat_sources: list[bool]

    @property
    def rowwise(self) -> bool:
        """Whether some member works along the last dimension."""
        return any(member.partials is None for member in self.members)


class Joiner:
    """Finds the composites of one graph.

    Args:
        found: The traced graph.
        rules: The rule of each node; None for leaves.
        inside: Whether each node lies inside the network: Gauss-Newton keeps or drops a composite's second derivative
            as a whole.
        outside: Nodes that must be carried on their own, because their outputs are wanted.
        operation: The operation at a position.
    """

    def __init__(
        self,
        found: Trace,
        rules: Sequence[Rule | None],
        inside: Sequence[bool],
        outside: set[Node],
        operation: Callable[[int], Operation],
    ) -> None:
        self._found = found
        self._rules = rules
        self._inside = inside
        self._outside = outside
        self._operation = operation
        self._edges_below: dict[int, list[Edge]] = {}
        self._rows: dict[int, rows.RowOperation | None] = {}
        self._consumers: list[list[int]] = []
        self._not_plain: set[int] = set()  # whose other outputs are used, or whose transpose is
        self._below = [
            [index for child, _, _ in found.edges[node] if (index := found.index[child]) >= 0] for node in found.nodes
        ]

    def ending_in(self, position: int) -> Composite | None:
        """The composite in which paths meet at the node at ``position``, or None."""
        rule = self._rules[position]
        below = self._below[position]
        if rule is None or rule.partials is None or len(below) < 2:
            return None
        if len(set(below)) == len(below) and not any(self._joins(child, position) for child in below):
            return None
        if not self._consumers:
            self._consumers = [[] for _ in self._below]
            for user, children in enumerate(self._below):
                for child in children:
                    self._consumers[child].append(user)
            for inputs in self._found.edges.values():
                self._not_plain |= {self._found.index[child] for child, output, flip in inputs if output or flip}
        if not rule.reduces:
            taken = self._meeting(position, self._joins)
            wider = self._widened(taken, position, self._joins)
            for members in (wider, taken) if len(wider) > len(taken) else (taken,):
                if any(self._is_row(member) for member in members):
                    composite = self._described(self._through_mixing(members, position), position)
                    if composite is not None:
                        return composite
        taken = self._meeting(position, self._is_elementwise)
        taken = self._widened(taken, position, self._is_elementwise) or self._meeting_of_shared(position)
        return self._described(taken, position) if taken else None

    # -- what may be joined

    def _joins(self, position: int, end: int) -> bool:
        return self._is_elementwise(position, end) or (self._is_eligible(position, end) and self._is_row(position))

    def _is_elementwise(self, position: int, end: int) -> bool:
        rule = self._rules[position]
        return self._is_eligible(position, end) and rule is not None and rule.partials is not None and not rule.reduces

    def _is_eligible(self, position: int, end: int) -> bool:
        if self._rules[position] is None or self._found.nodes[position] in self._outside:
            return False
        return self._inside[position] == self._inside[end]

    def _is_row(self, position: int) -> bool:
        return self._row(position) is not None

    def _row(self, position: int) -> rows.RowOperation | None:
        if position not in self._rows:
            rule = self._rules[position]
            row_rule = None if rule is None else rows.find_row_rule(rule.name)
            self._rows[position] = None if row_rule is None else row_rule(self._operation(position))
        return self._rows[position]

    def _mixes(self, position: int) -> bool:
        row = self._row(position)
        return row is not None and row.mixes

    # -- how far a composite reaches

    def _meeting(self, position: int, joins: Callable[[int, int], bool]) -> list[int]:
        """Positions of a composite's private members, the meeting point first; empty if no paths meet."""
        nodes, edges = self._found.nodes, self._found.edges
        taken = {position}
        candidates = set(self._below[position])
        while candidates and len(taken) < _MOST_MEMBERS:
            current = min(candidates)  # all that uses it comes before it, and has been decided
            candidates.remove(current)
            if (
                all(user in taken for user in self._consumers[current])
                and self._is_plain(current)
                and joins(current, position)
            ):
                taken.add(current)
                candidates |= set(self._below[current])
        # Down to the one tensor where all paths have met; else all of it.
        ordered = sorted(taken)
        open_ends: set[Edge] = set()
        met = False
        for k, member in enumerate(ordered):
            open_ends -= {edge for edge in open_ends if self._found.index[edge[0]] == member}
            for edge in edges[nodes[member]]:
                if self._found.index[edge[0]] >= 0:
                    met = met or edge in open_ends
                    open_ends.add(edge)
            if met and len(open_ends) == 1:
                return self._on_the_way(ordered[: k + 1])
        return self._on_the_way(ordered) if met else []

    def _widened(self, taken: list[int], end: int, joins: Callable[[int, int], bool]) -> list[int]:
        """``taken``, and what lies between its sources and a tensor in which paths from two of them meet, and so on."""
        wider = self._wider(taken, end, joins)
        while len(wider) > len(taken):
            taken, wider = wider, self._wider(wider, end, joins)
        return taken

    def _wider(self, taken: list[int], end: int, joins: Callable[[int, int], bool]) -> list[int]:
        index, wanted_below = self._found.index, self._wanted_below
        sources = {edge for member in taken for edge in wanted_below(member) if index[edge[0]] not in taken}
        if len(sources) < 2:
            return taken
        reached: Counter[Edge] = Counter()  # from how many of the sources
        passed: set[int] = set()
        for source in sources:
            seen = [source]
            for edge in seen:
                position = index[edge[0]]
                if position in passed or (self._is_plain(position) and joins(position, end)):
                    passed.add(position)
                    seen += [below for below in wanted_below(position) if below not in seen]
                if len(seen) > _MOST_MEMBERS:
                    return taken
            reached.update(seen)
        between: set[int] = set()
        for position in sorted(passed, reverse=True):
            if any(reached[edge] > 1 or index[edge[0]] in between for edge in wanted_below(position)):
                between.add(position)
        if not between:
            return taken
        members = self._on_the_way([*taken, *(between - {*taken})])
        return members if len(members) <= _MOST_MEMBERS else taken

    def _wanted_below(self, position: int) -> list[Edge]:
        """Where the inputs of the operation come from that lead to wanted tensors, each once."""
        known = self._edges_below.get(position)
        if known is None:
            index = self._found.index
            edges = self._found.edges[self._found.nodes[position]]
            known = list(dict.fromkeys([edge for edge in edges if index[edge[0]] >= 0]))
            self._edges_below[position] = known
        return known

    def _meeting_of_shared(self, position: int) -> list[int]:
        """As :meth:`_meeting`, of elementwise operations whose results others may use; only those on the way."""
        taken = [position]
        for current in taken:
            for child in self._below[current]:
                if child in taken or not self._is_elementwise(child, position) or not self._is_plain(child):
                    continue
                if len(taken) == _MOST_MEMBERS:
                    return []
                taken.append(child)
        return self._on_the_way(taken)

    def _on_the_way(self, taken: Sequence[int]) -> list[int]:
        """Those of ``taken`` below which paths meet in some tensor; the others pass curvature on without loss."""
        nodes, index, edges = self._found.nodes, self._found.index, self._found.edges
        uses = Counter(edge for member in taken for edge in edges[nodes[member]] if index[edge[0]] >= 0)
        leads: set[int] = set()
        for member in sorted(taken, reverse=True):
            if any(uses[edge] > 1 or index[edge[0]] in leads for edge in edges[nodes[member]]):
                leads.add(member)
        return sorted(leads)

    def _is_plain(self, position: int) -> bool:
        """Whether the node's first output is used as it is, and no other."""
        return position not in self._not_plain

    def _through_mixing(self, taken: list[int], end: int) -> list[int]:
        """``taken``, and the mixing operations that its sources come from."""
        members = set(taken)
        waiting = {child for member in members for child in self._below[member]} - members
        while waiting and len(members) < _MOST_MEMBERS:
            chain_below = self._mixing_below(waiting.pop(), end)
            members |= chain_below
            waiting |= {child for member in chain_below for child in self._below[member]} - members
        return sorted(members)

    def _mixing_below(self, position: int, end: int) -> set[int]:
        """The operations from ``position`` down to and including the next mixing one; none if there is none."""
        passed: set[int] = set()
        while self._joins(position, end) and self._is_plain(position):
            passed.add(position)
            if self._mixes(position):
                return passed
            below = self._below[position]
            if len(below) > 1:
                composite = self.ending_in(position)
                if composite is None or not composite.rowwise:
                    return set()
                return passed | {member.position for member in composite.members}
            position = below[0]
        return set()

    # -- its description

    def _described(self, taken: list[int], end: int) -> Composite | None:
        nodes, index, edges = self._found.nodes, self._found.index, self._found.edges
        members = taken[::-1]
        place = {member: k for k, member in enumerate(members)}
        sources: dict[Edge, int] = {}
        flat_sources: list[bool | None] = []
        described: list[Member] = []
        widths: set[int] = set()
        rowwise = False
        for position in members:
            rule = self._rules[position]
            assert rule is not None
            wiring: list[int | None] = []
            for edge in edges[nodes[position]]:
                below = index[edge[0]]
                if below < 0:
                    wiring.append(None)
                elif below in place:
                    wiring.append(place[below])
                else:
                    if edge not in sources:
                        sources[edge] = len(sources)
                        flat_sources.append(None)
                    wiring.append(~sources[edge])
            operation = self._operation(position)
            row = None if rule.partials is not None else self._row(position)
            inner = {described[entry].flat for entry in wiring if entry is not None and entry >= 0}
            if len(inner) > 1:
                return None  # a tensor with a last dimension beside one without: they would not line up
            takes_flat = True in inner if row is None else row.flat is False and not row.mixes  # only unsqueeze does
            if inner - {takes_flat}:
                return None  # a reduction over another dimension than the rows'
            for entry in wiring:
                if entry is not None and entry < 0:
                    if flat_sources[~entry] not in (None, takes_flat):
                        return None  # ``x * x.sum(-1)``: one tensor with and without its rows
                    flat_sources[~entry] = takes_flat
            flat = takes_flat if row is None or row.flat is None else row.flat
            described.append(Member(position, rule.partials, [e is not None for e in wiring], wiring, flat, row))
            if row is not None:
                rowwise = True
                widths |= rows.lengths(operation.input_shape(0), takes_flat)
            widths |= rows.lengths(operation.output_shape(), flat)
        if rowwise and len(widths) > 1:
            return None  # rows of two lengths, as where a sum over rows is expanded again
        private = {end}
        for position in taken[1:]:
            if all(user in private for user in self._consumers[position]):
                private.add(position)
        shared = [place[position] for position in taken if position not in private]
        return Composite(described, list(sources), private, shared, [bool(flat) for flat in flat_sources])

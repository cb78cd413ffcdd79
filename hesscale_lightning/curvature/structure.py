"""Graphs of one structure: how the next one is recognised, and what was made for it.

A training loop builds the same graph at every step. When a structure comes for the second time, its program is written
down, and with it one straight-line function that goes the same way through the next graph, compares as it goes, reads
the tensors that the program takes, and collects what the program's text depends on beside: shapes, dtypes and numbers,
the graph's *signature*. What is kept are positions, flags, rules and code, and neither nodes nor tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hesscale_lightning.curvature.complex_numbers import takes_complex
from hesscale_lightning.curvature.graph import AccumulateGrad, Node, TBackward, Trace
from hesscale_lightning.curvature.operation import as_number
from hesscale_lightning.curvature.planning import has_weight_zero
from hesscale_lightning.curvature.program import Program
from hesscale_lightning.curvature.recorded_operation import Ask, hashable, input_meta, input_shape
from hesscale_lightning.curvature.registry import on_registration

#: Signatures for which a structure keeps what was made.
_MOST_VARIANTS = 64
#: Nodes of the largest graph for which code is written; compiling takes some 20 microseconds for each.
MOST_NODES = 5000


def slots_of(found: Trace) -> dict[Node, int]:
    """A number for every visited node: the position of those that lead to a wanted tensor, higher ones for others."""
    slots: dict[Node, int] = {}
    free = len(found.nodes)
    for node in found.edges:
        position = found.index[node]
        if position < 0:
            position, free = free, free + 1
        slots[node] = position
    return slots


def kind_of(node: Node) -> Any:
    """What tells a node's operation: its type, or its name where several operations share a type."""
    kind, name = type(node), node.name()
    return kind if kind.__name__ == name or kind is AccumulateGrad else (kind, name)


def fingerprint(found: Trace, slots: Mapping[Node, int]) -> Any:
    """Equal for graphs of the same structure."""
    return tuple(
        [
            (
                slots[node],
                kind_of(node),
                tuple([None if child is None else (slots[child], output, flip) for child, output, flip in inputs]),
            )
            for node, inputs in found.edges.items()
        ]
    )


class Variant:
    """What was made for one signature.

    Attributes:
        visits: How often it was met before there was a program.
        program: The program, once there is one.
        used: Whether the program was run for another graph than that which it was written for.
    """

    __slots__ = ("program", "used", "visits")

    def __init__(self) -> None:
        self.visits = 0
        self.used = False
        self.program: Program | None = None


#: A graph that was recognised: its nodes by position, what the programs take from it, and its signature.
Met = tuple[tuple[Node, ...], list[Any], tuple[Any, ...]]


class Structure:
    """What is kept of the graphs of one structure.

    Attributes:
        visits: How often it was met before its code was written.
        match: ``match(root, wanted)`` returns what was met, or None for a graph of another structure.
        fetches: What the programs take from a graph, by name, in that order.
        conditions: What makes up the signature, beside shapes and dtypes of what is fetched.
        leaves: Positions of the wanted leaves.
        narrow: The last position up to which backward passes one node at a time.
        follower: The structure that was met after this one.
    """

    def __init__(self) -> None:
        self.visits = 0
        self.match: Callable[..., Met | None] | None = None
        self.fetches: dict[Any, tuple[Ask, str]] = {}
        self.conditions: dict[Ask, None] = {}
        self.leaves: list[int] = []
        self.narrow = 0
        self.follower: Structure | None = None
        self.source = ""
        self._prepares: dict[int, Any] = {}
        self._variants: OrderedDict[Any, Variant] = OrderedDict()

    def variant(self, signature: Any) -> Variant:
        """What was made for a signature."""
        variant = self._variants.get(signature)
        if variant is None:
            variant = self._variants[signature] = Variant()
            if len(self._variants) > _MOST_VARIANTS:
                self._variants.popitem(last=False)
        return variant

    def signature(self, facts: Mapping[Any, tuple[Any, ...]]) -> tuple[Any, ...] | None:
        """The signature of a graph of which so much is known; None if that is not enough."""
        columns = self._columns()
        if any(column not in facts for column in columns):
            return None
        return tuple([value for column in columns for value in facts[column]])

    def facts(self, signature: tuple[Any, ...]) -> dict[Any, tuple[Any, ...]]:
        """What a signature says, by what it was asked for."""
        values = iter(signature)
        widths = {key: 1 if how == "number" else 2 for key, (_, how) in self.fetches.items()}
        return {column: tuple([next(values) for _ in range(widths.get(column, 1))]) for column in self._columns()}

    def _columns(self) -> list[Any]:
        """What the signature consists of: names of fetched tensors, with shape and dtype, and conditions."""
        return [*[key for key, (_, how) in self.fetches.items() if how != "object"], *self.conditions]

    def forget(self) -> None:
        """Drops all that was made."""
        self.conditions, self.fetches, self.match = {}, {}, None
        self._prepares.clear()
        self._variants.clear()

    def learn(self, conditions: Mapping[Ask, Any], fetches: Mapping[Any, tuple[Ask, str]]) -> bool:
        """Adds to what is asked of a graph. True: there was something new, and what was made before is dropped."""
        news = [ask for ask in conditions if ask not in self.conditions]
        more = [key for key in fetches if key not in self.fetches]
        if not news and not more:
            return False
        self.conditions.update(dict.fromkeys(news))
        self.fetches.update({key: fetches[key] for key in more})
        self._variants.clear()
        return True

    def write(self, found: Trace, slots: Mapping[Node, int], wants_all: bool, prepares: Mapping[int, Any]) -> None:
        """Writes ``match`` for graphs like ``found``."""
        self.leaves = [slots[n] for n in found.nodes if type(n) is AccumulateGrad]
        self.narrow = _narrow(found)
        writer = _MatchWriter(found, slots, wants_all)
        # What is asked for other graphs of this structure may be of operations that this one's plan leaves out.
        self._prepares.update(prepares)
        self.source, namespace = writer.written(list(self.conditions), list(self.fetches.values()), self._prepares)
        exec(self.source, namespace)  # made of slots and of names that nodes have
        self.match = namespace["match"]


def _narrow(found: Trace) -> int:
    """The last position up to which every node leads to one other node only."""
    position = 0
    while True:
        children = {child for child, _, _ in found.edges[found.nodes[position]] if child is not None}
        if len(children) != 1 or found.index[children.pop()] != position + 1:
            return position
        position += 1


class StructureCache:
    """Structures that were met lately.

    Attributes:
        patience: How many programs may be written at first sight without being run again. Where structures keep
            changing no more are, until a structure is met for the second time.
        unused: How many have been.
    """

    def __init__(self, most: int = 256, patience: int = 4) -> None:
        self._most = most
        self.patience = patience
        self.unused = 0
        self._known: OrderedDict[Any, Structure] = OrderedDict()
        self._latest: dict[Any, Structure] = {}
        on_registration(self.clear)

    def clear(self) -> None:
        """Forgets everything."""
        self._known.clear()
        self._latest.clear()
        self.unused = 0

    def recognised(self, key: Any, root: Node, wanted: Any) -> tuple[Structure, Met] | None:
        """The structure of a graph if it is the one that was met last, or the one that followed that the last time.

        Args:
            key: What can be told of a graph before walking it.
            root: Of the graph.
            wanted: By ``id``, or None.
        """
        latest = self._latest.get(key)
        if latest is None:
            return None
        for structure in (latest.follower, latest):
            if structure is not None and structure.match is not None:
                met = structure.match(root, wanted)
                if met is not None:
                    self._came(key, structure)
                    return structure, met
        return None

    def known(self, key: Any, mark: Any) -> Structure:
        """The structure with this fingerprint."""
        structure = self._known.get((key, mark))
        if structure is None:
            structure = self._known[(key, mark)] = Structure()
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end((key, mark))
        self._came(key, structure)
        return structure

    def _came(self, key: Any, structure: Structure) -> None:
        latest = self._latest.get(key)
        if latest is not structure or (latest.follower is not None and latest.follower is not structure):
            if latest is not None:
                latest.follower = structure
            self._latest[key] = structure


class _MatchWriter:
    def __init__(self, found: Trace, slots: Mapping[Node, int], wants_all: bool) -> None:
        self._found, self._slots = found, slots
        self._wants_all = wants_all
        self._count = 0

    def _fresh(self, letter: str) -> str:
        self._count += 1
        return f"{letter}{self._count}"

    def written(
        self, conditions: Sequence[Ask], fetches: Sequence[tuple[Ask, str]], prepares: Mapping[int, Any]
    ) -> tuple[str, dict[str, Any]]:
        """The source of ``match`` and what it runs in."""
        lines: list[str] = []
        names: list[str] = []  # whose types are compared
        types: list[Any] = []
        kinds: list[tuple[str, str]] = []  # and whose names, where a type does not tell
        same: list[tuple[str, str]] = []  # what must be one object, or one number
        root, *_ = self._found.edges
        seen = {root}
        self._expect("n0", root, names, types, kinds)
        for node in self._found.edges:
            if type(node) is AccumulateGrad:
                continue
            parts: list[str] = []
            after: list[str] = []
            for child, output in node.next_functions:
                if child is None:
                    nothing = self._fresh("e")
                    same.append((nothing, "None"))
                    parts.append(f"({nothing}, _)")
                    continue
                turned: list[str] = []
                while child not in self._slots:
                    turned.append(self._fresh("t"))
                    same.append((self._fresh("o"), str(output)))
                    parts_or_after = after if len(turned) > 1 else parts
                    pattern = f"({turned[-1]}, {same[-1][0]})"
                    parts_or_after.append(f"({pattern},) = {turned[-2]}.next_functions" if len(turned) > 1 else pattern)
                    child, output = child.next_functions[0]
                names += turned
                types += [TBackward] * len(turned)
                target = f"n{self._slots[child]}"
                if child in seen:
                    name = self._fresh("r")
                    same.append((name, target))
                else:
                    name = target
                    seen.add(child)
                    self._expect(target, child, names, types, kinds)
                same.append((self._fresh("o"), str(output)))
                pattern = f"({name}, {same[-1][0]})"
                if turned:
                    after.append(f"({pattern},) = {turned[-1]}.next_functions")
                else:
                    parts.append(pattern)
            unpacked = f"({', '.join(parts)},)" if parts else "[]"
            lines.append(f"{unpacked} = n{self._slots[node]}.next_functions")
            lines += after
        outputs = [pair for pair in same if pair[1].isdigit() or pair[1] == "None"]
        objects = [pair for pair in same if pair not in outputs]
        lines.append(f"if ({''.join(f'type({n}), ' for n in names)}) != TYPES: return None")
        if outputs:
            left, right = "".join(f"{a}, " for a, _ in outputs), "".join(f"{b}, " for _, b in outputs)
            lines.append(f"if ({left}) != ({right}): return None")
        lines += [f"if {a} is not {b}: return None" for a, b in objects]
        lines += [f"if {n}.name() != {name!r}: return None" for n, name in kinds]
        slots = sorted(self._slots.values())
        lines.append(f"if len({{{', '.join(f'n{s}' for s in slots)}}}) != {len(slots)}: return None")
        namespace: dict[str, Any] = {
            "TYPES": tuple(types),
            "input_shape": input_shape,
            "input_meta": input_meta,
            "hashable": hashable,
            "has_weight_zero": has_weight_zero,
            "as_number": as_number,
            "takes_complex": takes_complex,
        }
        lines += self._leaves()
        lines += self._collected(conditions, fetches, prepares, namespace)
        wanted = "".join(f"n{k}, " for k in range(len(self._found.nodes)))
        lines.append(f"return ({wanted}), saved, signature")
        body = "\n        ".join(lines)
        source = (
            "def match(n0, wanted):\n"
            f"    try:\n        {body}\n"
            "    except (ValueError, AttributeError, IndexError, TypeError):\n"
            "        return None\n"
        )
        return source, namespace

    def _expect(self, name: str, node: Node, names: list[str], types: list[Any], kinds: list[tuple[str, str]]) -> None:
        names.append(name)
        types.append(type(node))
        kind = kind_of(node)
        if isinstance(kind, tuple):
            kinds.append((name, kind[1]))

    def _leaves(self) -> list[str]:
        lines = []
        wanted = len(self._found.nodes)
        for node, slot in self._slots.items():
            if type(node) is AccumulateGrad:
                lines.append(f"w{slot} = n{slot}.variable")
                if not self._wants_all:
                    lines.append(f"if id(w{slot}) {'not in' if slot < wanted else 'in'} wanted: return None")
        return lines

    def _collected(
        self,
        conditions: Sequence[Ask],
        fetches: Sequence[tuple[Ask, str]],
        prepares: Mapping[int, Any],
        namespace: dict[str, Any],
    ) -> list[str]:
        lines = []
        for position, prepare in prepares.items():
            namespace[f"prepare{position}"] = prepare
            lines.append(f"p{position} = prepare{position}(n{position})")
        values, signed = [], []
        for k, (ask, how) in enumerate(fetches):
            text = _asked(ask)
            if how == "number":
                text = f"as_number({text})"
            lines.append(f"s{k} = {text}")
            values.append(f"s{k}")
            if how == "number":
                signed.append(f"s{k} is None")
            elif how != "object":
                signed.append(f"s{k} is not None and s{k}.shape, s{k} is not None and s{k}.dtype")
        texts = [_asked(a) for a in conditions]
        for position in dict.fromkeys(a.position for a in conditions if "{n}._input_metadata" in a.expression):
            lines.append(f"i{position} = n{position}._input_metadata")
            texts = [text.replace(f"n{position}._input_metadata", f"i{position}") for text in texts]
        signed += texts
        lines.append(f"saved = [{', '.join(values)}]")
        lines.append(f"signature = ({''.join(part + ', ' for part in signed)})")
        return lines


def _asked(ask: Ask) -> str:
    k = ask.position
    return ask.expression.format(n=f"n{k}", w=f"w{k}", p=f"p{k}")

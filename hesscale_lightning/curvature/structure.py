"""Graphs of one structure: how the next one is recognised, and what was made for it.

A training loop builds the same graph at every step. When a structure comes for the second time, its program is written
down, and with it one straight-line function that goes the same way through the next graph, compares as it goes, reads
the tensors that the program takes, and collects what the program's text depends on beside: shapes, dtypes and numbers,
the graph's *signature*. What is kept are positions, flags, rules and code, and neither nodes nor tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, itemgetter
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
        prepares: By position, what rules prepare from a node, as far as it is asked for.
        leaves: Positions of the wanted leaves.
        narrow: The last position up to which backward passes one node at a time.
        follower: The structure that was met after this one.
    """

    def __init__(self) -> None:
        self.visits = 0
        self.match: Callable[..., Met | None] | None = None
        self.fetches: dict[Any, tuple[Ask, str]] = {}
        self.conditions: dict[Ask, None] = {}
        self.prepares: dict[int, Callable[[Node], Any]] = {}
        self.leaves: list[int] = []
        self.narrow = 0
        self.follower: Structure | None = None
        self.source = ""
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
        if any(asked not in facts for asked, _ in columns):
            return None
        return tuple([facts[asked][i] for asked, i in columns])

    def facts(self, signature: tuple[Any, ...]) -> dict[Any, tuple[Any, ...]]:
        """What a signature says, by what it was asked for."""
        facts: dict[Any, tuple[Any, ...]] = {}
        for (asked, _), value in zip(self._columns(), signature, strict=True):
            facts[asked] = (*facts.get(asked, ()), value)
        return facts

    def _columns(self) -> list[tuple[Any, int]]:
        """What the signature consists of, in its order: parts of what is known of a fetched tensor or a condition."""
        tensors = [key for key, (_, how) in self.fetches.items() if how in _TENSORS]
        numbers = [key for key, (_, how) in self.fetches.items() if how == "number"]
        conditions = [ask for group in _alike(self.conditions).values() for ask in group]
        return [(key, i) for i in (0, 1) for key in tensors] + [(key, 0) for key in [*numbers, *conditions]]

    def forget(self) -> None:
        """Drops all that was made."""
        self.conditions, self.fetches, self.prepares, self.match = {}, {}, {}, None
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

    def write(self, found: Trace, slots: Mapping[Node, int], wants_all: bool) -> None:
        """Writes ``match`` for graphs like ``found``."""
        self.leaves = [slots[n] for n in found.nodes if type(n) is AccumulateGrad]
        self.narrow = _narrow(found)
        writer = _MatchWriter(found, slots, wants_all)
        self.source, namespace = writer.written(list(self.conditions), list(self.fetches.values()), self.prepares)
        exec(self.source, namespace)  # made of slots and of names that nodes have
        self.match = namespace["match"]


#: Kinds of what is fetched of which shape and dtype belong to the signature.
_TENSORS = ("tensor", "leaf")


def _alike(asks: Iterable[Ask]) -> dict[str, list[Ask]]:
    """By expression."""
    groups: dict[str, list[Ask]] = {}
    for ask in asks:
        groups.setdefault(ask.expression, []).append(ask)
    return groups


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
        outputs: list[tuple[str, str]] = []
        objects: list[tuple[str, str]] = []
        for pair in same:
            (outputs if pair[1].isdigit() or pair[1] == "None" else objects).append(pair)
        if len(names) < _MANY:
            lines.append(f"if {_tuple(f'type({name})' for name in names)} != TYPES: return None")
        else:
            lines.append(f"if (*map(type, {_tuple(names)}),) != TYPES: return None")
        if outputs:
            lines.append(f"if {_tuple(a for a, _ in outputs)} != {_tuple(b for _, b in outputs)}: return None")
        alike = [f"{a} is {b}" for a, b in objects] + [f"{n}.name() == {name!r}" for n, name in kinds]
        if alike:  # in one expression, which takes less time to compile
            lines.append(f"if not ({' and '.join(alike)}): return None")
        slots = sorted(self._slots.values())
        lines.append(f"if len({{{', '.join(f'n{s}' for s in slots)}}}) != {len(slots)}: return None")
        namespace: dict[str, Any] = {
            "TYPES": tuple(types),
            "INPUTS": attrgetter("_input_metadata"),
            "FIRST": itemgetter(0),
            "SHAPE": attrgetter("shape"),
            "DTYPE": attrgetter("dtype"),
            "EACH_SHAPE": repeat("shape"),
            "EACH_DTYPE": repeat("dtype"),
            "EACH_FALSE": repeat(False),
            "input_shape": input_shape,
            "input_meta": input_meta,
            "hashable": hashable,
            "has_weight_zero": has_weight_zero,
            "as_number": as_number,
            "takes_complex": takes_complex,
        }
        lines += self._leaves()
        lines += self._collected(conditions, fetches, prepares, namespace)
        wanted = _tuple(f"n{k}" for k in range(len(self._found.nodes)))
        lines.append(f"return {wanted}, saved, signature")
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
        tensors, numbers, plain = [], [], []
        for k, (ask, how) in enumerate(fetches):
            if how == "number":
                lines.append(f"s{k} = as_number({_asked(ask)})")
                numbers.append(f"s{k} is None")
            elif ask.expression.removeprefix("{n}.").isidentifier():
                plain.append(Ask(k, ask.expression))
            else:
                lines.append(f"s{k} = {_asked(ask)}")
            if how in _TENSORS:
                tensors.append(f"s{k}")
        for expression, places in _alike(plain).items():
            at = [fetches[place.position][0].position for place in places]
            lines.append(self._each([f"s{place.position}" for place in places], expression, at, namespace))
        signed = []
        # Of each tensor the shape and the dtype; False where nothing was saved.
        if len(tensors) < _MANY:
            signed += [f"{s} is not None and {s}.{what}" for what in ("shape", "dtype") for s in tensors]
        else:
            lines.append(f"tensors = {_tuple(tensors)}")
            signed += [f"*map(getattr, tensors, EACH_{what}, EACH_FALSE)" for what in ("SHAPE", "DTYPE")]
        signed += numbers
        groups = _alike(conditions)
        described = sorted({ask.position for e, asks in groups.items() for ask in asks if e in _OF_FIRST})
        if len(described) < _MANY:  # fetched once for all that is asked of it
            lines += [f"i{k} = n{k}._input_metadata[0]" for k in described]
        else:
            inputs = f"map(FIRST, map(INPUTS, {_tuple(f'n{k}' for k in described)}))"
            lines.append(f"{_tuple(f'i{k}' for k in described)} = {inputs}")
        for expression, asks in groups.items():
            if expression in _OF_FIRST and len(described) < _MANY:
                short = expression.replace("{n}._input_metadata[0]", "{i}")
                signed += [short.format(i=f"i{ask.position}") for ask in asks]
            elif expression in _OF_FIRST:
                each = _tuple(f"i{ask.position}" for ask in asks)
                signed.append(_OF_FIRST[expression].format(each))
            else:
                signed += [_asked(ask) for ask in asks]
        lines.append(f"saved = [{', '.join(f's{k}' for k in range(len(fetches)))}]")
        lines.append(f"signature = {_tuple(signed)}")
        return lines

    def _each(self, names: Sequence[str], expression: str, at: Sequence[int], namespace: dict[str, Any]) -> str:
        """An assignment of what nodes have saved; of many nodes in one, which takes less time to compile."""
        if len(names) < _MANY:
            return "; ".join(f"{name} = {_asked(Ask(k, expression))}" for name, k in zip(names, at, strict=True))
        name = expression.removeprefix("{n}.")
        getter = f"GET_{name}"
        namespace[getter] = attrgetter(name)
        return f"{_tuple(names)} = map({getter}, {_tuple(f'n{k}' for k in at)})"


#: Of so many nodes or tensors the same is read in one expression: a little slower for few, and sooner compiled.
_MANY = 24

#: What is asked of what is known of a node's first output, for many nodes.
_OF_FIRST = {
    "tuple({n}._input_metadata[0].shape)": "*map(tuple, map(SHAPE, {0}))",
    "{n}._input_metadata[0].dtype": "*map(DTYPE, {0})",
}


def _tuple(parts: Iterable[str]) -> str:
    """Source of a tuple."""
    return f"({''.join(f'{part}, ' for part in parts)})"


def _asked(ask: Ask) -> str:
    k = ask.position
    return ask.expression.format(n=f"n{k}", w=f"w{k}", p=f"p{k}")

"""An operation whose rule is being written down: what it is asked for becomes an input of the program, or a condition.

Tensors are inputs. Shapes, dtypes and numbers, on which a rule may branch, are conditions under which the program may
be used again. Both are named by an expression in the nodes of a graph, so that the same can be asked of another graph
of the same structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from hesscale_lightning.curvature.capturing import address_of
from hesscale_lightning.curvature.graph import AccumulateGrad, Edge, Node
from hesscale_lightning.curvature.operation import Operation, as_number, carried, saved_by, signed
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.recorder import Recorder
from hesscale_lightning.curvature.values import ZERO, Symbol, Value


class Ask(NamedTuple):
    """Something that can be asked of a graph: an expression in ``{n}``, the node at a position.

    Attributes:
        position: Of the node.
        expression: Python source.
    """

    position: int
    expression: str


def saved_name(node: Node, name: str | int) -> str:
    """The expression for what a node has saved under a name."""
    if isinstance(name, int):
        return f"{{n}}.saved_tensors[{name}]"
    saved = f"_saved_{name}"
    return f"{{n}}.{saved if hasattr(type(node), saved) else name}"


class Recording:
    """What the rules of one pass ask for.

    Attributes:
        recorder: What they compute.
        conditions: Values on which they may have branched, by what was asked.
        fetches: What is read from the graph when it is attached, by input of the program.
        preparing: By position of each operation that was asked for what its rule has prepared, the arguments with which
            to make the operation again.
    """

    def __init__(self, nodes: Sequence[Node], edges: Mapping[Node, Sequence[Edge]], slots: Mapping[Any, int]) -> None:
        self.recorder = Recorder()
        self.conditions: dict[Ask, Any] = {}
        self.fetches: dict[Any, tuple[Ask, str]] = {}
        self.preparing: dict[int, tuple[list[bool], list[bool], str]] = {}  # not the operation, which owns this object
        self.nodes, self.edges, self.slots = nodes, edges, slots
        self._tensors: dict[Any, Tensor] = {}
        self.read: dict[Any, Value] = {}  # a checkpointed block hands out a tensor once
        self._used: set[tuple[Node, int]] | None = None

    def condition(self, position: int, expression: str, value: Any) -> None:
        """Takes note of a value that the program depends on."""
        if isinstance(value, list):
            expression = f"hashable({expression})"
        self.conditions[Ask(position, expression)] = hashable(value)

    def is_used(self, position: int, output: int) -> bool:
        """Whether anything uses an output of a node, so that a gradient can arrive there."""
        if self._used is None:
            self._used = {(child, number) for inputs in self.edges.values() for child, number, _ in inputs}
            self._used.add((self.nodes[0], 0))
        return (self.nodes[position], output) in self._used

    def facts(self) -> dict[Any, Any]:
        """What the program depends on, by what was asked: shape and dtype of tensors, other values."""
        facts: dict[Any, Any] = {ask: (value,) for ask, value in self.conditions.items()}
        for key, (_, how) in self.fetches.items():
            line = self.recorder.line_of_input(key)
            if how != "object":
                facts[key] = (False,) if how == "number" else (line.shape, line.dtype)
        return facts

    def gradient(self, position: int, output: int, g: Tensor) -> Symbol:
        """The gradient at an output, in float32 or better."""
        key = ("g", position, output)
        if not self.recorder.has_input(key):
            self.condition(position, f"tuple({{n}}._input_metadata[{output}].shape)", g.shape)
            self.condition(position, f"{{n}}._input_metadata[{output}].dtype", g.dtype)
        symbol = self.recorder.input(key, g)
        return self._raised(symbol)

    def tensor(self, position: int, name: str | int, place: Any = None) -> Value:
        """A saved tensor.

        Args:
            position: Of the node that saved it.
            name: Under which name.
            place: The edge whose value it is, if it is one, so that what several nodes saved is read once.
        """
        key = (position, str(name))
        if key in self.read:
            return self.read[key]
        node = self.nodes[position]
        x = saved_by(node, name)
        expression = saved_name(node, name)
        if x is None:
            self.read[key] = None
            self.condition(position, f"{expression} is None", True)
            return None
        return self._of(position, name, x, place)

    def _of(self, position: int, name: str | int, x: Any, place: Any) -> Value:
        node, key = self.nodes[position], (position, str(name))
        if not isinstance(x, Tensor):
            raise TypeError(f"{node.name()} has saved a {type(x).__name__} as {name!r}: ask for it by op.number")
        made = self.read[key] = self._raised(self.fetched(key, Ask(position, saved_name(node, name)), x, place))
        return made

    def fetched(self, key: Any, ask: Ask, x: Tensor, place: Any = None) -> Symbol:
        """A tensor that is read from the graph when it is attached."""
        turned = False
        if place is not None and place[0] is not None:
            child, output, turned = place
            shared = ("value", self.slots[child], output)
            known = self._tensors.get(shared)
            if known is None:
                if type(child) is AccumulateGrad:
                    leaf = child.variable
                    if _same(leaf.detach(), x.t() if turned else x):
                        self._tensors[shared] = x = leaf.detach()
                        self.fetches[shared] = Ask(self.slots[child], "{w}"), "leaf"
                        symbol = self.recorder.input(shared, x)
                        return symbol.t() if turned else symbol
                elif not turned:
                    key, self._tensors[shared] = shared, x
            elif _same(known, x.t() if turned else x):
                symbol = self.recorder.input(shared, known)
                return symbol.t() if turned else symbol
        self.fetches.setdefault(key, (ask, "tensor"))
        return self.recorder.input(key, x.detach() if x.requires_grad else x)

    def operand(self, position: int, name: str, place: Any) -> Value:
        """A saved tensor, or a number."""
        key = (position, name)
        if key in self.read:
            return self.read[key]
        x = saved_by(self.nodes[position], name)
        expression = saved_name(self.nodes[position], name)
        if not isinstance(x, Tensor):
            self.condition(position, expression, x)
            return x
        number = as_number(x)
        if number is not None:
            self.fetches.setdefault((*key, "number"), (Ask(position, expression), "number"))
            self.read[key] = self.recorder.input((*key, "number"), number)
            return self.read[key]
        return self._of(position, name, x, place)

    def node(self, position: int) -> Symbol:
        """The node itself, to be called."""
        key = ("node", position)
        self.fetches.setdefault(key, (Ask(position, "{n}"), "object"))
        return self.recorder.input(key, self.nodes[position])

    def prepared(self, position: int, made: Any) -> Any:
        """What a rule has prepared: numbers are conditions, anything else is an input as it is; or a tuple of these."""
        if type(made) is tuple and not _is_plain(made):
            return tuple([self._prepared(position, f"{{p}}[{i}]", part) for i, part in enumerate(made)])
        return self._prepared(position, "{p}", made)

    def _prepared(self, position: int, expression: str, made: Any) -> Any:
        if _is_plain(made):
            self.condition(position, expression, made)
            return made
        key = ("prepared", position, expression)
        self.fetches.setdefault(key, (Ask(position, expression), "object"))
        return self.recorder.input(key, made)

    def _raised(self, symbol: Symbol) -> Symbol:
        return symbol.float() if symbol.dtype in HALF else symbol


class RecordedOperation(Operation):
    """An :class:`Operation` that answers with symbols, and takes note of what it was asked."""

    __slots__ = ("_made", "_recording", "position")

    def __init__(
        self, recording: Recording, position: int, following: Any, needs: list[bool], flips: list[bool], method: str
    ) -> None:
        self._made: Any = None
        self._recording = recording
        super().__init__(recording.nodes[position], following, needs, flips, method)
        self.position = position

    @property
    def prepared(self) -> Any:
        """As for an :class:`Operation`."""
        self._recording.preparing[self.position] = self.needs, self.transposed, self.method
        return self._recording.prepared(self.position, self._made)

    @prepared.setter
    def prepared(self, value: Any) -> None:
        self._made = value

    @override
    def tensor(self, name: str | int) -> Value:
        return self._recording.tensor(self.position, name)

    @override
    def input(self, i: int, name: str | int) -> Value:
        edges = self._recording.edges[self.node]
        return self._recording.tensor(self.position, name, edges[i] if i < len(edges) else None)

    @override
    def output(self, name: str | int) -> Value:
        return self._recording.tensor(self.position, name, (self.node, 0, False))

    @override
    def tensors(self, name: str) -> tuple[Value, ...]:
        read = self._recording.read
        made: list[Value] = []
        if (self.position, name) in read:
            return tuple(read[self.position, name])
        saved = saved_by(self.node, name)
        expression = saved_name(self.node, name)
        self._recording.condition(self.position, f"len({expression})", len(saved))
        for k, x in enumerate(saved):
            entry = f"{expression}[{k}]"
            if x is None:
                self._recording.condition(self.position, f"{entry} is None", True)
                made.append(None)
            else:
                made.append(self._recording.fetched((self.position, name, k), Ask(self.position, entry), x))
        read[self.position, name] = made
        return tuple(made)

    @override
    def operand(self, name: str, i: int | None = None) -> Value:
        edges = self._recording.edges[self.node]
        x = self._recording.operand(self.position, name, None if i is None or i >= len(edges) else edges[i])
        if isinstance(x, Symbol) and not x.is_number and not x.is_floating_point():
            return x.to(carried(self.output_dtype()))
        return x

    @override
    def number(self, name: str) -> Any:
        value = saved_by(self.node, name)
        if isinstance(value, Tensor):
            raise TypeError(f"{self.name} has saved a tensor as {name!r}: ask for it by op.tensor or op.operand")
        self._recording.condition(self.position, saved_name(self.node, name), value)
        return signed(value)

    @override
    def backward(self, *h: Value) -> Value:
        given = [None if x is ZERO else x for x in h]
        return self._recording.recorder.call(_call_node, (self._recording.node(self.position), *given), {}, opaque=True)

    @override
    def input_shape(self, i: int) -> torch.Size:
        shape = super().input_shape(i)
        recording = self._recording
        child, output = self._following[i]
        slot = recording.slots.get(child)
        if slot is None:
            recording.condition(self.position, f"input_shape({{n}}, {i})", shape)
        elif type(child) is AccumulateGrad:
            recording.condition(slot, "{w}.shape", shape)
        else:
            recording.condition(slot, f"tuple({{n}}._input_metadata[{output}].shape)", shape)
        return shape

    @override
    def input_meta(self, i: int) -> tuple[torch.dtype, torch.device]:
        meta = super().input_meta(i)
        self._of_input(i, "device", meta[1])
        self._of_input(i, "dtype", meta[0])
        return meta

    @override
    def input_dtype(self, i: int) -> torch.dtype:
        self._of_input(i, "dtype", super().input_meta(i)[0])
        return super().input_dtype(i)

    def _of_input(self, i: int, what: str, value: Any) -> None:
        recording = self._recording
        child, output = self._following[i]
        slot = recording.slots.get(child)
        if slot is None:
            recording.condition(self.position, f"input_meta({{n}}, {i}).{what}", value)
        else:
            of = "{w}" if type(child) is AccumulateGrad else f"{{n}}._input_metadata[{output}]"
            recording.condition(slot, f"{of}.{what}", value)

    @override
    def output_shape(self, i: int = 0) -> torch.Size:
        shape = super().output_shape(i)
        self._recording.condition(self.position, f"tuple({{n}}._input_metadata[{i}].shape)", shape)
        return shape

    @override
    def output_dtype(self, i: int = 0) -> torch.dtype:
        dtype = super().output_dtype(i)
        self._recording.condition(self.position, f"{{n}}._input_metadata[{i}].dtype", dtype)
        return dtype


def _call_node(node: Node, *h: Tensor | None) -> Any:
    return node(*h)


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype is b.dtype
        and a.stride() == b.stride()
        and a.device == b.device
        and address_of(a) == address_of(b)
    )


def hashable(value: Any) -> Any:
    """Lists as tuples."""
    return tuple([hashable(v) for v in value]) if isinstance(value, list) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def input_shape(node: Node, i: int) -> torch.Size:
    """The condition of :meth:`Operation.input_shape`."""
    child, output = node.next_functions[i]
    shape = child.variable.shape if type(child) is AccumulateGrad else child._input_metadata[output].shape
    return torch.Size(shape)


def input_meta(node: Node, i: int) -> Any:
    """What knows dtype and device of an input, for the conditions of :meth:`Operation.input_meta`."""
    child, output = node.next_functions[i]
    return child.variable if type(child) is AccumulateGrad else child._input_metadata[output]

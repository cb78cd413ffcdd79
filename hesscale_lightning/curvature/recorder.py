"""Writes a program down while it runs: every operation on a :class:`~.values.Symbol` is done, and becomes a line.

Equal expressions become one line, because they are recognised when they are asked for again.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hesscale_lightning.curvature.values import ZERO, Symbol

OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "**": operator.pow,
    "@": operator.matmul, "&": operator.and_, "|": operator.or_, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "[]": operator.getitem,
    "mT": operator.attrgetter("mT"), "T": operator.attrgetter("T"), "H": operator.attrgetter("H"),
    "mH": operator.attrgetter("mH"), "bitwise_not": operator.invert, "item": operator.getitem,
}  # fmt: skip

#: Operations whose result is always new memory, and never a view of an operand.
FRESH = frozenset({"+", "-", "*", "/", "**", "@", ".sum", ".mean", ".exp", ".mm", ".bmm", ".reciprocal", ".where"})


#: Bytes of inputs that are kept to run a program at once that has just been written.
_MOST_KEPT = 2**26


class Line(NamedTuple):
    """One step of a program.

    Attributes:
        kind: An operator, ``.method``, ``call`` with the function as the first argument, ``item`` for one of several
            results, or ``input``.
        arguments: Nested tuples of :class:`Slot` and constants.
        keywords: Pairs of a name and an argument.
        shape: Of the result; None: it is no tensor.
        dtype: Likewise.
        fresh: Whether the result is new memory.
    """

    kind: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    shape: torch.Size | None
    dtype: torch.dtype | None
    fresh: bool


class Slot(NamedTuple):
    """A value by its number; a class of its own, so that it differs from a constant."""

    number: int


class Constant:
    """A constant that cannot be compared, by identity: a tensor, a function, a slice."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Recorder:
    """Records what is asked of its symbols."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._known: dict[Any, int] = {}
        self._symbols: dict[int, weakref.ref[Symbol]] = {}
        self._inputs: dict[Any, int] = {}
        self._kept: dict[Any, Any] | None = {}  # values of the inputs, as long as they are small
        self._bytes = 0

    def input(self, key: Any, value: Any) -> Symbol:
        """What the program receives, by a name of the caller's; the same symbol for the same name."""
        slot = self._inputs.get(key)
        if slot is None:
            symbol = self._new(Line("input", (key,), (), *_facts(value), False), value)
            self._inputs[key] = symbol.slot
            self._keep(key, value)
            return symbol
        known = self._alive(slot)
        if known is None:
            known = self._symbol(slot, value)
        return known

    def _keep(self, key: Any, value: Any) -> None:
        if self._kept is None:
            return
        self._kept[key] = value
        if isinstance(value, Tensor):
            self._bytes += value.numel() * value.element_size()
            if self._bytes > _MOST_KEPT:
                self._kept = None

    @property
    def kept(self) -> dict[Any, Any] | None:
        """The values of all inputs by name; None: they were too large to be kept."""
        return self._kept

    def has_input(self, key: Any) -> bool:
        """Whether :meth:`input` was called with this name."""
        return key in self._inputs

    def line_of_input(self, key: Any) -> Line:
        """The line of an input."""
        return self.lines[self._inputs[key]]

    # -- algebra, with what is simpler than an operation

    def sum(self, a: Symbol, b: Any) -> Any:
        """``a + b``."""
        if type(b) is not Symbol and _is(b, 0):
            return a
        return self.record("+", (a, b))

    def product(self, a: Symbol, b: Any) -> Any:
        """``a * b``; numbers come last, and are gathered."""
        if type(b) is Symbol:
            if a is b and self.lines[a.slot].kind == ".t":  # so that it is the square that others use
                inner = self._transposed(a)
                return self.record("*", (inner, inner)).t()
            if (a.is_number and not b.is_number) or (a.slot > b.slot and a.is_number is b.is_number):
                a, b = b, a
            return self.record("*", (a, b))
        if _is(b, 1):
            return a
        if isinstance(b, (int, float)):
            line = self.lines[a.slot]
            if line.kind == "*" and isinstance(line.arguments[1], (int, float)):
                without = self._alive(line.arguments[0].number)
                if without is not None:
                    return self.product(without, line.arguments[1] * b)
        return self.record("*", (a, b))

    def power(self, a: Symbol, exponent: Any) -> Any:
        """``a ** exponent``."""
        if type(exponent) is int or (type(exponent) is float and exponent.is_integer()):
            if exponent == 1:
                return a
            if 2 <= exponent <= 5:
                result = a
                for _ in range(int(exponent) - 1):
                    result = self.product(result, a)
                return result
        return self.record("**", (a, exponent))

    # -- recording

    def method(self, name: str, symbol: Symbol, *args: Any, **kwargs: Any) -> Any:
        """A method of a tensor."""
        if name == "t" and self.lines[symbol.slot].kind == ".t":
            return self._transposed(symbol)
        if name == "sum_to_size":
            return self._summed(symbol, args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
        return self.record("." + name, (symbol, *args), kwargs)

    def _summed(self, symbol: Symbol, shape: Sequence[int]) -> Any:
        """``x.sum_to_size(shape)``, as nothing or as a sum."""
        extra = symbol.dim() - len(shape)
        dims = [d for d in range(symbol.dim()) if d < extra or (shape[d - extra] == 1 and symbol.shape[d] != 1)]
        if not dims:
            return symbol
        if all(d < extra for d in dims):
            return self.record(".sum", (symbol, tuple(dims)))
        total = self.record(".sum", (symbol, tuple(dims)), {"keepdim": True})
        return self.record(".view", (total, tuple(shape))) if extra else total

    def _transposed(self, symbol: Symbol) -> Symbol:
        """What ``symbol`` is the transpose of."""
        slot = self.lines[symbol.slot].arguments[0].number
        inner = self._alive(slot)
        if inner is None:
            inner = self._symbol(slot, symbol.value.t())
        return inner

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], opaque: bool = False) -> Any:
        """A function of tensors."""
        return self.record("call", (function, *args), kwargs, unpack=opaque)

    def record(
        self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, unpack: bool = True
    ) -> Any:
        """Does an operation and records it, the first time that it is asked for."""
        arguments = tuple([self._argument(a) for a in args])
        keywords = tuple([(k, self._argument(a)) for k, a in kwargs.items()]) if kwargs else ()
        key = (kind, *[_with_type(a) for a in arguments], keywords)
        slot = self._known.get(key)
        if slot is not None:
            known = self._alive(slot)
            if known is not None:
                return self._results(known)
        values = [_value(a) for a in args]
        named = {k: _value(a) for k, a in kwargs.items()} if kwargs else {}
        if kind == "call":
            function = values[0]
            result = function(*values[1:], **named)
        elif kind[0] == ".":
            result = getattr(values[0], kind[1:])(*values[1:], **named)
        else:
            result = OPERATORS[kind](*values)
        if slot is None:
            fresh = kind in FRESH or (kind == "call" and _makes_new(args[0]))
            symbol = self._new(Line(kind, arguments, keywords, *_facts(result), fresh), result)
            self._known[key] = symbol.slot
        else:
            symbol = self._symbol(slot, result)
        return self._results(symbol)

    def _results(self, symbol: Symbol) -> Any:
        value = symbol.value
        if isinstance(value, (tuple, list)):
            return tuple([ZERO if v is None else self._item(symbol, k, v) for k, v in enumerate(value)])
        return ZERO if value is None else symbol

    def _item(self, symbol: Symbol, k: int, value: Any) -> Symbol:
        key = ("item", symbol.slot, k)
        slot = self._known.get(key)
        if slot is None:
            fresh = self.lines[symbol.slot].fresh
            made = self._new(Line("item", (Slot(symbol.slot), k), (), *_facts(value), fresh), value)
            self._known[key] = made.slot
            return made
        alive = self._alive(slot)
        if alive is None:
            alive = self._symbol(slot, value)
        return alive

    def _new(self, line: Line, value: Any) -> Symbol:
        self.lines.append(line)
        return self._symbol(len(self.lines) - 1, value)

    def _symbol(self, slot: int, value: Any) -> Symbol:
        symbol = Symbol(self, slot, value)
        self._symbols[slot] = weakref.ref(symbol)
        return symbol

    def _alive(self, slot: int) -> Symbol | None:
        """The symbol of this number, if somebody still has it."""
        reference = self._symbols.get(slot)
        return None if reference is None else reference()

    def _argument(self, argument: Any) -> Any:
        kind = type(argument)
        if kind is Symbol:
            return Slot(argument.slot)
        if argument is None or kind in _PLAIN:
            return argument
        if isinstance(argument, (tuple, list)):
            return tuple([self._argument(a) for a in argument])
        if argument is ZERO:
            raise TypeError("a formula passed a g or h that is zero to an operation that is not linear in it")
        return Constant(argument)


_PLAIN = frozenset({int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format})


def _is(x: Any, number: int) -> bool:
    return isinstance(x, (int, float)) and x == number


def _with_type(argument: Any) -> Any:
    """Apart from ``1 == 1.0 == True``."""
    return (type(argument), argument) if isinstance(argument, (int, float)) else argument


def _facts(value: Any) -> tuple[torch.Size | None, torch.dtype | None]:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else (None, None)


def _value(argument: Any) -> Any:
    kind = type(argument)
    if kind is Symbol:
        return argument.value
    if kind is tuple or kind is list:
        return kind([_value(a) for a in argument])
    return argument


_makes_new_known: dict[Any, bool] = {}


def _makes_new(function: Any) -> bool:
    """Whether a function's results are always new memory, by what torch says of its operators."""
    if not isinstance(function, torch._ops.OpOverload):
        return function in _NEW
    known = _makes_new_known.get(function)
    if known is None:
        known = all(r.alias_info is None for r in function._schema.returns)
        _makes_new_known[function] = known
    return known


_NEW = frozenset({torch.exp, torch.where, torch.sigmoid, torch.tanh, torch.erf})

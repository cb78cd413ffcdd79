"""What a formula computes on: tensors, symbols that stand for them in a program, and zero.

A rule's text is run as it stands on tensors, and, once a structure of graphs comes again, on symbols, which write the
same text down as a program. In both, curvature that is exactly zero and a second derivative that is dropped are
:data:`ZERO`, which disappears from sums and takes products with it, so that no formula has to ask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

#: A tensor, a symbol, a number or ZERO: formulas are written without regard to which.
Value = Any

_LINEAR = frozenset({
    "bmm", "clone", "contiguous", "cumsum", "diagonal", "expand", "flatten", "flip", "gather", "index_select",
    "masked_fill", "matmul", "mean", "mm", "movedim", "mv", "narrow", "permute", "repeat", "reshape", "roll", "select",
    "squeeze", "square", "sum", "sum_to_size", "t", "to", "transpose", "tril", "triu", "type_as", "unbind", "unflatten",
    "unsqueeze", "view", "where",
})  # fmt: skip


class Zero:
    """Exactly zero, of any shape: ``0 + x = x``, ``0 x = 0``, and what is linear takes it to itself."""

    __slots__ = ()

    def _zero(self, *_: Any, **__: Any) -> Zero:
        return self

    __mul__ = __rmul__ = __matmul__ = __rmatmul__ = __truediv__ = __neg__ = __pow__ = __getitem__ = _zero

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __rsub__ = __add__

    def __sub__(self, other: Any) -> Any:
        return -other

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name in _LINEAR:
            return self._zero
        if name in ("mT", "T"):
            return self
        raise AttributeError(
            f"a formula asked for .{name} of a curvature or gradient that is zero: test `is ZERO` first"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(
            f"a formula passed a curvature or gradient that is zero to {getattr(function, '__name__', function)}: "
            "test `is ZERO` first, or wrap the call in @opaque, which passes None instead"
        )

    def __repr__(self) -> str:
        return "ZERO"


ZERO = Zero()


class Symbol:
    """A tensor, or a number, in a program that is being written down while it runs for the first time.

    What is asked of it is asked of its value, and recorded. It must not be changed in place, and its entries cannot be
    looked at, because the program would keep what was decided for other tensors as well; shapes and dtypes can, because
    a program is kept for graphs that agree in these.

    Attributes:
        recorder: What writes the program down.
        slot: Its number there.
        value: What it is at this step.
    """

    __slots__ = ("__weakref__", "recorder", "slot", "value")

    def __init__(self, recorder: Any, slot: int, value: Any) -> None:
        self.recorder = recorder
        self.slot = slot
        self.value = value

    @property
    def is_number(self) -> bool:
        """Whether it is a number and not a tensor."""
        return not isinstance(self.value, Tensor)

    def __add__(self, other: Any) -> Any:
        return self if other is ZERO else self.recorder.sum(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self if other is ZERO else self.recorder.record("-", (self, other))

    def __rsub__(self, other: Any) -> Any:
        return self.recorder.record("-", (other, self))

    def __mul__(self, other: Any) -> Any:
        return ZERO if other is ZERO else self.recorder.product(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self.recorder.record("/", (self, other))

    def __rtruediv__(self, other: Any) -> Any:
        return self.recorder.record("/", (other, self))

    def __pow__(self, exponent: Any) -> Any:
        return self.recorder.power(self, exponent)

    def __rpow__(self, base: Any) -> Any:
        return self.recorder.record("**", (base, self))

    def __matmul__(self, other: Any) -> Any:
        return ZERO if other is ZERO else self.recorder.record("@", (self, other))

    def __rmatmul__(self, other: Any) -> Any:
        return self.recorder.record("@", (other, self))

    def __neg__(self) -> Any:
        return self.recorder.product(self, -1)

    def square(self) -> Any:
        """``x * x``."""
        return self.recorder.product(self, self)

    def __invert__(self) -> Any:
        return self.recorder.record("bitwise_not", (self,))

    def __and__(self, other: Any) -> Any:
        return self.recorder.record("&", (self, other))

    def __or__(self, other: Any) -> Any:
        return self.recorder.record("|", (self, other))

    def __lt__(self, other: Any) -> Any:
        return self.recorder.record("<", (self, other))

    def __le__(self, other: Any) -> Any:
        return self.recorder.record("<=", (self, other))

    def __gt__(self, other: Any) -> Any:
        return self.recorder.record(">", (self, other))

    def __ge__(self, other: Any) -> Any:
        return self.recorder.record(">=", (self, other))

    def __eq__(self, other: object) -> Any:
        return self.recorder.record("==", (self, other))

    def __ne__(self, other: object) -> Any:
        return self.recorder.record("!=", (self, other))

    __hash__ = object.__hash__

    def __getitem__(self, index: Any) -> Any:
        return self.recorder.record("[]", (self, index))

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Any:
        return iter(self.recorder.record(".unbind", (self,)))

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return getattr(self.value, name)
        if name in _VIEWS:
            return self.recorder.record(name, (self,))
        if name in _LOOKS or (name.endswith("_") and not name.endswith("__")):
            raise TypeError(
                f"a rule asked for .{name} of a tensor: it must not change a tensor in place or decide by its values; "
                "put what must into a function decorated with @opaque"
            )
        if not hasattr(Tensor, name):
            raise AttributeError(f"tensors have no attribute {name!r}")
        return functools.partial(self.recorder.method, name, self)

    def __bool__(self) -> bool:
        if self.is_number:
            return bool(self.value)
        raise TypeError(
            "a rule decided by a tensor's values: it must not, or put it into a function decorated with @opaque"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return recorder_of((args, kwargs)).call(function, args, kwargs or {})


_FACTS = frozenset({"device", "dim", "dtype", "is_floating_point", "ndim", "numel", "shape", "size"})
_VIEWS = frozenset({"H", "T", "mH", "mT"})
_LOOKS = frozenset({"allclose", "any", "all", "data", "data_ptr", "equal", "item", "nonzero", "numpy", "tolist"})


def recorder_of(argument: Any) -> Any:
    """The recorder of some symbol among nested arguments, or None."""
    if type(argument) is Symbol:
        return argument.recorder
    if isinstance(argument, (tuple, list)):
        for part in argument:
            recorder = recorder_of(part)
            if recorder is not None:
                return recorder
    elif isinstance(argument, dict):
        return recorder_of(tuple(argument.values()))
    return None


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a plain function of tensors one instruction of a formula.

    For what cannot be written as an expression: loops, in-place work on tensors of its own, decisions by values. It is
    called with tensors (None for zero), numbers and tuples of these, must not change its arguments, and returns a
    tensor, or a tuple of tensors and Nones (zero).
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = recorder_of(args) or recorder_of(kwargs)
        if recorder is not None:
            return recorder.call(
                function, tuple([_packed(a) for a in args]), {k: _packed(a) for k, a in kwargs.items()}, opaque=True
            )
        return _unpacked(function(*[_packed(a) for a in args], **{k: _packed(a) for k, a in kwargs.items()}))

    return call


def _packed(argument: Any) -> Any:
    if type(argument) is tuple:
        return tuple([_packed(a) for a in argument])
    return None if argument is ZERO else argument


def _unpacked(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return tuple([ZERO if r is None else r for r in result])
    return ZERO if result is None else result

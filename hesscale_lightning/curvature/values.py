"""What a formula computes on: tensors, symbols that stand for them in a program, and zero.

A rule's text is run as it stands on tensors, and, once a structure of graphs comes again, on symbols, which write the
same text down as a program. In both, curvature that is exactly zero and a second derivative that is dropped are
:data:`ZERO`, which disappears from sums and takes products with it, so that no formula has to ask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a plain function of tensors one instruction of a formula.

    For what cannot be written as an expression: loops, in-place work on tensors of its own, decisions by values. It is
    called with tensors (None for zero), numbers and tuples of these, must not change its arguments, and returns a
    tensor, or a tuple of tensors and Nones (zero).
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
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

"""Operations along the last dimension, joined where paths meet: softmax and log-softmax by hand, entropies, norms.

In ``x - logsumexp(x)`` or ``x * rsqrt(mean(x^2))`` every output of a row depends on every input of that row, so the
paths that meet cannot be joined entry by entry. But the derivatives keep a simple form. For any tensor ``v`` in
between, with entries ``v_j`` in the row of ``x_k``,

    dv_j / dx_k = delta_jk a_k + sum_m b^m_j c^m_k        and        d2v_j / dx_k^2   alike,

a diagonal plus a few products. Elementwise functions scale the rows and multiply such sums; a reduction over the row
turns them into one product with ``b = 1``. So the derivatives of the whole are carried forward from each source at
linear cost, and the rule for the composite, ``h_x = sum_j h_j (dv_j/dx)^2 + g_j d2v_j/dx^2``, is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.values import ZERO, Symbol, Value

#: What the algebra of derivatives works on: tensors, symbols and numbers.
Factor = Value


def is_number(x: Factor) -> bool:
    """Whether ``x`` is a number and not a tensor."""
    return x.is_number if isinstance(x, Symbol) else not isinstance(x, Tensor)


def last(x: Factor) -> int:
    """Size of the last dimension; 1 for a number."""
    if is_number(x) or not x.dim():
        return 1
    return int(x.shape[-1]) or 1


class Terms(NamedTuple):
    """``delta_jk a_k + sum_m b^m_j c^m_k``: ``diagonal`` is a (None: 0), ``products`` the pairs (b, c).

    The last dimension of a and c runs over k, that of b over j; where it is 1, or for a number, all entries are alike.
    """

    diagonal: Factor | None
    products: tuple[tuple[Factor, Factor], ...]


class Taylor(NamedTuple):
    """First and second derivatives of a tensor by one source; the second may be left out."""

    first: Terms
    second: Terms


class RowOperation(NamedTuple):
    """How an operation along the last dimension carries derivatives.

    Attributes:
        apply: From its input's derivatives to its output's.
        flat: Whether the output has lost the last dimension; None: as the input.
        mixes: Whether an output depends on several inputs.
    """

    apply: Callable[..., Taylor]
    flat: bool | None
    mixes: bool


#: Returns None for a use that is not along the last dimension.
RowRule = Callable[[Operation], RowOperation | None]
_row_rules: dict[str, RowRule] = {}


def row_wise(*names: str) -> Callable[[RowRule], RowRule]:
    """Registers what an operation along the last dimension does to derivatives, beside its ordinary rule."""

    def register(rule: RowRule) -> RowRule:
        _row_rules.update(dict.fromkeys(names, rule))
        return rule

    return register


def find_row_rule(name: str) -> RowRule | None:
    """The row rule of a node's name, or None."""
    return _row_rules.get(name)


# -- the algebra of such sums ---------------------------------------------------------------------------------------
# Small rows are the rule (an action space), so what counts is the number of operations: numbers are kept as numbers,
# and products with the same b become one.

NOTHING = Terms(None, ())


def _product(a: Factor, b: Factor) -> Factor:
    if isinstance(a, float) and a == 1.0:
        return b
    return a if isinstance(b, float) and b == 1.0 else a * b


def _sum(a: Factor | None, b: Factor) -> Factor:
    return b if a is None else a + b


def _merged(products: Iterable[tuple[Factor, Factor]]) -> tuple[tuple[Factor, Factor], ...]:
    """One product for each b; a number as b goes into c."""
    merged: dict[int, tuple[Factor, Factor]] = {}
    for b, c in products:
        if is_number(b):
            b, c = 1.0, _product(b, c)
        key = 0 if isinstance(b, float) else id(b)
        merged[key] = (b, merged[key][1] + c) if key in merged else (b, c)
    return tuple(merged.values())


def plus(*terms: Terms) -> Terms:
    """Sum."""
    diagonal: Factor | None = None
    for term in terms:
        if term.diagonal is not None:
            diagonal = _sum(diagonal, term.diagonal)
    return Terms(diagonal, _merged(product for term in terms for product in term.products))


def scaled(terms: Terms, factor: Factor) -> Terms:
    """Row ``j`` times ``factor_j``."""
    diagonal = None if terms.diagonal is None else _product(terms.diagonal, factor)
    return Terms(diagonal, _merged((_product(b, factor), c) for b, c in terms.products))


def times(p: Terms, q: Terms) -> Terms:
    """Entry by entry."""
    diagonal: Factor | None = None
    if p.diagonal is not None and q.diagonal is not None:
        diagonal = _product(p.diagonal, q.diagonal)
    for left, right in ((p, q),) if p is q else ((p, q), (q, p)):
        if left.diagonal is not None and right.products:
            along: Factor | None = None
            for b, c in right.products:
                along = _sum(along, _product(b, c))
            assert along is not None
            crossed = _product(left.diagonal, along)
            diagonal = _sum(diagonal, 2.0 * crossed if p is q else crossed)
    if p is q:
        pairs = [
            (_product(b, e), _product(c, f) if i == j else 2.0 * _product(c, f))
            for i, (b, c) in enumerate(p.products)
            for j, (e, f) in enumerate(p.products[: i + 1])
        ]
    else:
        pairs = [(_product(b, e), _product(c, f)) for b, c in p.products for e, f in q.products]
    return Terms(diagonal, _merged(pairs))


def summed(terms: Terms, width: int, weights: Factor = 1.0) -> Terms:
    """``sum_j weights_j (...)``, alike for all ``j``."""
    total: Factor | None = None if terms.diagonal is None else _product(terms.diagonal, weights)
    for b, c in terms.products:
        total = _sum(total, _product(_row_sum(_product(b, weights), width), c))
    return NOTHING if total is None else Terms(None, ((1.0, total),))


def _row_sum(x: Factor, width: int) -> Factor:
    if not is_number(x) and last(x) == width > 1:
        return x.sum(-1, keepdim=True)
    return x * float(width)


def composed(
    first: Sequence[Factor | None], second: Mapping[tuple[int, int], Factor], inputs: Sequence[Taylor | None]
) -> Taylor:
    """An elementwise function of several tensors, by its partials."""
    once = [scaled(u.first, f) for f, u in zip(first, inputs, strict=False) if u is not None and f is not None]
    twice = [scaled(u.second, f) for f, u in zip(first, inputs, strict=False) if u is not None and f is not None]
    for (i, j), f in second.items():
        u, v = inputs[i], inputs[j]
        if u is not None and v is not None:
            twice.append(scaled(times(u.first, v.first), f if i == j else 2.0 * f))
    return Taylor(plus(*once), plus(*twice))


def through_logsumexp(u: Taylor, p: Factor, width: int) -> Taylor:
    """``L = log sum_j exp u_j`` with ``p = softmax(u)``: ``L' = sum p u'``, ``L'' = sum p (u'' + u'^2) - L'^2``."""
    first = summed(u.first, width, p)
    curve = plus(summed(u.second, width, p), summed(times(u.first, u.first), width, p))
    return Taylor(first, plus(curve, scaled(times(first, first), -1.0)))


def through_log_softmax(u: Taylor, p: Factor, width: int) -> Taylor:
    """``w = u - L``."""
    total = through_logsumexp(u, p, width)
    return Taylor(plus(u.first, scaled(total.first, -1.0)), plus(u.second, scaled(total.second, -1.0)))


def through_softmax(u: Taylor, p: Factor, width: int) -> Taylor:
    """``p = exp(w)``: ``p' = p w'``, ``p'' = p (w'' + w'^2)``."""
    w = through_log_softmax(u, p, width)
    return Taylor(scaled(w.first, p), scaled(plus(w.second, times(w.first, w.first)), p))


def source(whole_row: bool) -> Taylor:
    """The derivatives of a source by itself, which has a row of its own or one entry for all of it."""
    return Taylor(Terms(1.0, ()) if whole_row else Terms(None, ((1.0, 1.0),)), NOTHING)


def curvature(taylor: Taylor, g: Value, h: Value) -> Value:
    """``sum_j h_j (dv_j/dx_k)^2 + g_j d2v_j/dx_k^2``."""
    passed = ZERO if h is ZERO else pulled(times(taylor.first, taylor.first), h)
    return passed if g is ZERO else passed + pulled(taylor.second, g)


def pulled(terms: Terms, weights: Value) -> Value:
    """``sum_j weights_j (...)`` by ``k``."""
    total: Factor | None = None if terms.diagonal is None else _product(terms.diagonal, weights)
    for b, c in terms.products:
        product = weights if is_number(b) else _product(b, weights)
        along = product.sum(-1, keepdim=True) if last(product) > 1 else product
        total = _sum(total, _product(_product(b, along) if is_number(b) else along, c))
    return ZERO if total is None else total


def lengths(shape: Sequence[int], flat: bool) -> set[int]:
    """The length of a tensor's rows, unless there is one entry for each row."""
    return set() if flat or not shape or shape[-1] == 1 else {shape[-1]}

"""Picking and placing entries against dense derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hesscale_lightning.curvature import backward, coverage
from tests.curvature.oracle import Case, check, with_constants

aten = torch.ops.aten
ROWS = torch.tensor([0, 2, 2])
COLUMNS = torch.tensor([1, 0, 1])
DISTINCT = torch.tensor([2, 0])
MASK = torch.tensor([[True, False, True, False], [False, False, True, True], [False, True, False, False]])
PLACES = torch.tensor(
    [[0, 2, 2, 1], [0, 1, 0, 1]]
)  # of a (2, 4) source in a (3, 4) tensor, along dimension 0; one twice
ONCE = torch.tensor([[0, 2, 2, 1], [1, 1, 0, 0]])
REACHED = torch.tensor([[True, False, True], [True, True, False]])
FAR = torch.tensor([[2, 7, 2], [0, 2, -9]])  # beyond a dimension of 3 where not reached
TIES = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 0.0, 0.0, 2.0], [3.0, 1.0, 3.0, 3.0]])


PICKS = [
    Case("rows", lambda x: x[ROWS], [(3, 4)], ["IndexBackward0"]),
    Case("columns", lambda x: x[:, COLUMNS], [(3, 4)], ["IndexBackward0"]),
    Case("rows and columns", lambda x: x[ROWS, COLUMNS], [(3, 4)], ["IndexBackward0"]),
    Case("outer and inner", lambda x: x[ROWS, :, COLUMNS], [(3, 2, 4)], ["IndexBackward0"]),
    Case("by a mask", lambda x: x[MASK], [(3, 4)], ["IndexBackward0"]),
    Case("by a mask and an index", lambda x: x[MASK[0, :3], 1], [(3, 4)], ["IndexBackward0"]),
    Case("none", lambda x: x[ROWS[:0]], [(3, 4)], ["IndexBackward0"]),
    Case("unsafe index", lambda x: aten._unsafe_index(x, [None, COLUMNS]), [(3, 4)], ["UnsafeIndexBackward0"]),
    Case(
        "unsafe index by a mask",
        lambda x: aten._unsafe_masked_index(x, REACHED, [FAR, COLUMNS], 0.5),
        [(3, 4)],
        ["UnsafeMaskedIndexBackward0"],
        reference=lambda x: torch.where(REACHED, x[FAR.clamp(0, 2), COLUMNS], 0.5),
    ),
    Case(
        "unsafe index by a mask, one dimension whole",
        lambda x: aten._unsafe_masked_index(x, REACHED[0], [None, COLUMNS], 0.5),
        [(3, 4)],
        ["UnsafeMaskedIndexBackward0"],
        reference=lambda x: torch.where(REACHED[0], x[:, COLUMNS], 0.5),
    ),
    Case("index select", lambda x: x.index_select(-1, ROWS), [(3, 4)], ["IndexSelectBackward0"]),
    Case("index select of a number", lambda x: x.index_select(0, torch.tensor([0])), [()], ["IndexSelectBackward0"]),
    Case(
        "repeat interleave",
        lambda x: x.repeat_interleave(torch.tensor([2, 0, 1]), 0),
        [(3, 4)],
        ["IndexSelectBackward0"],
    ),
    Case("gather", lambda x: x.gather(0, PLACES), [(3, 4)], ["GatherBackward0"]),
    Case("gather of one action", lambda x: x.gather(-1, ROWS[:, None]), [(3, 4)], ["GatherBackward0"]),
    Case("gather, sparse", lambda x: x.gather(0, PLACES, sparse_grad=True), [(3, 4)], ["GatherBackward0"]),
    Case("take along dim", lambda x: x.take_along_dim(PLACES[:, :1], 0), [(3, 4)], ["GatherBackward0"]),
    Case("take", lambda x: x.take(torch.tensor([[1, 1], [5, -1]])), [(3, 4)], ["TakeBackward0"]),
    Case("masked select", lambda x: x.masked_select(MASK), [(3, 4)], ["MaskedSelectBackward0"]),
    Case("masked select, broadcast mask", lambda x: x.masked_select(MASK[0]), [(3, 4)], ["MaskedSelectBackward0"]),
    Case("masked select, broadcast input", lambda x: x.masked_select(MASK), [(4,)], ["MaskedSelectBackward0"]),
    Case("where", lambda a, b: torch.where(MASK, a, b), [(3, 4), (3, 4)], ["WhereBackward0"]),
    Case("where, broadcast", lambda a, b: torch.where(MASK[0], a, b), [(3, 1), ()], ["WhereBackward0"]),
    Case("where or a number", lambda a: torch.where(MASK, a, 2.0), [(3, 4)], ["WhereBackward0"]),
    Case("where not a number", lambda b: torch.where(MASK, 2.0, b), [(3, 4)], ["WhereBackward0"]),
]


def put_in(x: Tensor, values: Tensor) -> Tensor:
    y = x.clone()
    y[DISTINCT, 1:3] = values
    return y


def fill_in(x: Tensor, value: Tensor) -> Tensor:
    y = x.clone()
    y[DISTINCT] = value
    return y


ZEROS = torch.tensor([[2.0, 0.0, 3.0, 0.5], [-1.0, 1.5, 0.0, 2.0], [0.0, 0.7, 0.0, 0.0]])
FACTORS = torch.tensor([[3.0, 0.0, 0.0, 2.0], [-2.0, 0.0, 0.5, 0.0]])
ROW_FACTORS = torch.tensor([[3.0, 0.0, 0.0, 2.0], [-2.0, 0.0, 0.5, 0.0], [0.0, 0.0, 2.0, 0.0]])


def product(places: Tensor, include_self: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of what goes to one place, factor by factor, which torch differentiates twice also at zeros."""

    def operation(x: Tensor, source: Tensor) -> Tensor:
        factors = {(i, j): [x[i, j]] if include_self else [] for i in range(3) for j in range(4)}
        for k, row in enumerate(places.tolist()):
            for j, i in enumerate(row):
                factors[i, j].append(source[k, j])
        return torch.stack([math.prod(f[1:], start=f[0]) if f else x[at] for at, f in factors.items()]).view(3, 4)

    return operation


def scatter_reduce(reduce: str, include_self: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, source: x.scatter_reduce(0, PLACES, source, reduce, include_self=include_self)


def index_reduce(reduce: str, include_self: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, source: x.index_reduce(0, ROWS, source, reduce, include_self=include_self)


PLACEMENTS = [
    Case("index put", lambda x, v: x.index_put((DISTINCT,), v), [(3, 4), (2, 4)], ["IndexPutBackward0"]),
    Case("index put, broadcast", lambda x, v: x.index_put((DISTINCT,), v), [(3, 4), ()], ["IndexPutBackward0"]),
    Case("index put by a mask", lambda x, v: x.index_put((MASK,), v), [(3, 4), (5,)], ["IndexPutBackward0"]),
    Case(
        "index put, accumulated",
        lambda x, v: x.index_put((ROWS, COLUMNS), v, accumulate=True),
        [(3, 4), (3,)],
        ["IndexPutBackward0"],
    ),
    Case("setitem with rows", fill_in, [(3, 4), (2, 4)], ["IndexPutBackward0"]),
    Case("setitem with one row", fill_in, [(3, 4), (1, 4)], ["IndexPutBackward0"]),
    Case("setitem with a part of rows", put_in, [(3, 4), (2, 2)], ["torch::autograd::CopySlices"]),
    Case(
        "unsafe index put",
        lambda x, v: aten._unsafe_index_put(x, [DISTINCT], v),
        [(3, 4), (2, 4)],
        ["UnsafeIndexPutBackward0"],
    ),
    Case(
        "index put in place",
        lambda x, v: aten._index_put_impl_(x.clone(), [ROWS], v, True),
        [(3, 4), (3, 4)],
        ["IndexPutImplBackward0"],
    ),
    Case("index add", lambda x, s: x.index_add(0, ROWS, s), [(3, 4), (3, 4)], ["IndexAddBackward0"]),
    Case("index add, scaled", lambda x, s: x.index_add(-1, ROWS, s, alpha=3), [(2, 4), (2, 3)], ["IndexAddBackward0"]),
    Case("index add to a number", lambda x, s: x.index_add(0, ROWS[:1], s), [(), ()], ["IndexAddBackward0"]),
    Case("index copy", lambda x, s: x.index_copy(0, DISTINCT, s), [(3, 4), (2, 4)], ["IndexCopyBackward0"]),
    Case("index fill", lambda x: x.index_fill(-1, ROWS, 2.0), [(3, 4)], ["IndexFillBackward0"]),
    Case("index fill with a tensor", lambda x, v: x.index_fill(0, ROWS, v), [(3, 4), ()], ["IndexFillBackward1"]),
    Case("scatter", lambda x, s: x.scatter(0, ONCE, s), [(3, 4), (2, 4)], ["ScatterBackward0"]),
    Case("scatter a number", lambda x: x.scatter(0, PLACES, 2.0), [(3, 4)], ["ScatterBackward1"]),
    Case("scatter add", lambda x, s: x.scatter_add(0, PLACES, s), [(3, 4), (2, 4)], ["ScatterAddBackward0"]),
    Case("put", lambda x, s: x.put(torch.tensor([1, 5]), s), [(3, 4), (2,)], ["PutBackward0"]),
    Case(
        "put, accumulated",
        lambda x, s: x.put(torch.tensor([1, 5, 1]), s, accumulate=True),
        [(3, 4), (3,)],
        ["PutBackward0"],
    ),
    Case(
        "index under a mask",
        lambda x: aten._unsafe_masked_index(x, torch.tensor([True, False, True]), [ROWS], 0.5),
        [(3,)],
        ["UnsafeMaskedIndexBackward0"],
    ),
    Case(
        "index put under a mask",
        lambda x, v: aten._unsafe_masked_index_put_accumulate(x, torch.tensor([True, True, True]), [ROWS], v),
        [(3,), (3,)],
        ["UnsafeMaskedIndexPutAccumulateBackward0"],
    ),
    Case(
        "masked scatter over a broadcast tensor",
        lambda x, s: x.masked_scatter(MASK, s),
        [(4,), (7,)],
        ["MaskedScatterBackward0"],
    ),
    Case("masked scatter", lambda x, s: x.masked_scatter(MASK, s), [(3, 4), (7,)], ["MaskedScatterBackward0"]),
    *[
        Case(
            f"scatter {reduce}, {'self' if own else 'no self'}{', ties' if x is TIES else ''}",
            scatter_reduce(reduce, own),
            [x, TIES[1:] if x is TIES else (2, 4)],
            ["ScatterReduceBackward0"],
        )
        for reduce in ("sum", "mean", "prod", "amax", "amin")
        for own in (True, False)
        for x in ((3, 4), TIES)
    ],
    *[
        Case(
            f"index reduce {reduce}, {'self' if own else 'no self'}{', ties' if x is TIES else ''}",
            index_reduce(reduce, own),
            [x, TIES if x is TIES else (3, 4)],
            ["IndexReduceBackward0"],
        )
        for reduce in ("mean", "prod", "amax", "amin")
        for own in (True, False)
        for x in ((3, 4), TIES)
    ],
    *[
        Case(
            f"{operation.__name__} prod, {'self' if own else 'no self'}{'' if type(x) is tuple else ', zeros'}",
            operation("prod", own),
            [x, source if type(x) is tuple else zeros],
            [node],
            reference=product(places, own),
        )
        for operation, node, places, source, zeros in (
            (scatter_reduce, "ScatterReduceBackward0", PLACES, (2, 4), FACTORS),
            (index_reduce, "IndexReduceBackward0", ROWS[:, None].expand(3, 4), (3, 4), ROW_FACTORS),
        )
        for own in (True, False)
        for x in ((3, 4), ZEROS, ZEROS * 0)
    ],
    Case(
        "product of numbers", lambda x, s: x.scatter_reduce(0, ROWS[0], s, "prod"), [(), ()], ["ScatterReduceBackward0"]
    ),
    Case(
        "unsafe put by a mask",
        lambda x, v: aten._unsafe_masked_index_put_accumulate(x, REACHED, [FAR, COLUMNS], v),
        [(3, 4), (2, 3)],
        ["UnsafeMaskedIndexPutAccumulateBackward0"],
        reference=lambda x, v: x.index_put((FAR.clamp(0, 2), COLUMNS), v * REACHED, accumulate=True),
    ),
    Case(
        "masked scatter, broadcast input",
        lambda x, s: x.masked_scatter(MASK, s),
        [(4,), (5,)],
        ["MaskedScatterBackward0"],
    ),
    Case(
        "masked scatter, broadcast mask",
        lambda x, s: x.masked_scatter(MASK[0], s),
        [(3, 4), (6,)],
        ["MaskedScatterBackward0"],
    ),
    Case(
        "masked scatter into a number", lambda x, s: x.masked_scatter(MASK, s), [(), (5,)], ["MaskedScatterBackward0"]
    ),
]


@pytest.mark.parametrize("case", [*PICKS, *PLACEMENTS], ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


def test_product_of_one_tensor_with_itself_is_reported_as_approximate() -> None:
    w = torch.randn(3, 4, requires_grad=True)
    for reduce, expected in (("prod", "approximate"), ("sum", "exact"), ("mean", "exact"), ("amax", "exact")):
        report = coverage(w.scatter_reduce(0, PLACES, w[:2], reduce).sum())
        assert [e.status for e in report.entries if e.operation == "ScatterReduceBackward0"] == [expected]


def test_where_of_mixed_precision_gives_each_input_its_own() -> None:
    w = torch.tensor([[1.0, 2.0]], requires_grad=True)
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    backward(torch.where(torch.tensor([True, False]), w @ torch.eye(2), x).pow(3).sum())
    torch.testing.assert_close(w.hess_diag, torch.tensor([[6.0, 0.0]]))
    torch.testing.assert_close(x.hess_diag, torch.tensor([[0.0, 24.0]], dtype=torch.float64))


@pytest.mark.parametrize("case", with_constants(PLACEMENTS), ids=lambda case: case.name)
def test_rule_with_constant_operands(case: Case) -> None:
    check(case)

"""Picking entries by value against dense derivatives, ties included."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.curvature.oracle import Case, check

TIES = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 0.0, 0.0, 2.0], [3.0, 1.0, 3.0, 3.0]])

CASES = [
    Case("max along dim", lambda x: x.max(-1)[0], [(3, 4)], ["MaxBackward0"]),
    Case("max along dim, kept", lambda x: x.max(0, keepdim=True)[0], [(3, 4)], ["MaxBackward0"]),
    Case("max along dim, ties", lambda x: x.max(1)[0], [TIES], ["MaxBackward0"]),
    Case("max of a number", lambda x: x.max(0)[0], [()], ["MaxBackward0"]),
    Case("min along dim", lambda x: x.min(0)[0], [(3, 4)], ["MinBackward0"]),
    Case("median along dim", lambda x: x.median(1)[0], [(3, 4)], ["MedianBackward1"]),
    Case("nanmedian along dim", lambda x: x.nanmedian(1)[0], [(3, 4)], ["NanmedianBackward1"]),
    Case("mode", lambda x: x.mode(1)[0], [TIES], ["ModeBackward0"]),
    Case("kthvalue", lambda x: x.kthvalue(2, 0)[0], [(3, 4)], ["KthvalueBackward0"]),
    Case("topk", lambda x: x.topk(2, 0)[0], [(3, 4)], ["TopkBackward0"]),
    Case("topk, ties", lambda x: x.topk(2)[0], [TIES], ["TopkBackward0"]),
    Case("sort", lambda x: x.sort(0)[0], [(3, 4)], ["SortBackward0"]),
    Case("sort of a number", lambda x: x.sort()[0], [()], ["SortBackward0"]),
    Case("sort, stable", lambda x: x.sort(stable=True, descending=True)[0], [TIES], ["SortBackward1"]),
    Case("cummax", lambda x: x.cummax(1)[0], [(3, 4)], ["CummaxBackward0"]),
    Case("cummax, ties", lambda x: x.cummax(0)[0], [TIES], ["CummaxBackward0"]),
    Case("cummin", lambda x: x.cummin(-1)[0], [(3, 4)], ["CumminBackward0"]),
    Case("max", lambda x: x.max(), [(3, 4)], ["MaxBackward1"]),
    Case("max, ties", lambda x: x.max(), [TIES], ["MaxBackward1"]),
    Case("min", lambda x: x.min(), [(3, 4)], ["MinBackward1"]),
    Case("min, ties", lambda x: x.min(), [TIES], ["MinBackward1"]),
    Case("median", lambda x: x.median(), [(3, 4)], ["MedianBackward0"]),
    Case("median, ties", lambda x: x.median(), [TIES], ["MedianBackward0"]),
    Case("nanmedian", lambda x: x.nanmedian(), [(3, 4)], ["NanmedianBackward0"]),
    Case("amax", lambda x: x.amax((0, -1)), [(3, 2, 4)], ["AmaxBackward0"]),
    Case("amax, ties", lambda x: x.amax(1), [TIES], ["AmaxBackward0"]),
    Case("amax, kept", lambda x: x.amax(1, keepdim=True), [TIES], ["AmaxBackward0"]),
    Case("amax of all", lambda x: x.amax(), [TIES], ["AmaxBackward0"]),
    Case("amin", lambda x: x.amin(-2), [(3, 2, 4)], ["AminBackward0"]),
    Case("amin, ties", lambda x: x.amin(1), [TIES], ["AminBackward0"]),
    Case("aminmax", lambda x: x.aminmax(dim=-1), [(3, 4)], ["AminmaxBackward0"]),
    Case("aminmax, ties, kept", lambda x: x.aminmax(dim=0, keepdim=True), [TIES], ["AminmaxBackward0"]),
    Case("aminmax of all", lambda x: x.aminmax(), [TIES], ["AminmaxBackward0"]),
    Case("the min of aminmax", lambda x: x.aminmax(dim=1).min, [TIES], ["AminmaxBackward0"]),
    Case("the max of aminmax", lambda x: x.aminmax(dim=1).max, [TIES], ["AminmaxBackward0"]),
    *[
        Case(f"{name} of a number, {settings}", partial(getattr(torch, name), **settings), [()], [node])
        for name, node in (("amax", "AmaxBackward0"), ("amin", "AminBackward0"), ("aminmax", "AminmaxBackward0"))
        for settings in ({}, {"dim": 0}, {"dim": -1}, {"dim": 0, "keepdim": True}, {"keepdim": True})
    ],
    *[
        Case(f"{name}, all kept", partial(getattr(torch, name), keepdim=True), [TIES], [node])
        for name, node in (("amax", "AmaxBackward0"), ("amin", "AminBackward0"), ("aminmax", "AminmaxBackward0"))
    ],
    *[
        Case(f"{name} of a number, dim {dim}", lambda x, pick=pick, dim=dim: pick(x, dim)[0], [()])
        for name, pick in (
            ("max", torch.max),
            ("min", torch.min),
            ("median", torch.median),
            ("nanmedian", torch.nanmedian),
            ("mode", torch.mode),
            ("cummax", torch.cummax),
            ("cummin", torch.cummin),
            ("sort", torch.sort),
            ("kthvalue", lambda x, dim: x.kthvalue(1, dim)),
            ("topk", lambda x, dim: x.topk(1, dim)),
        )
        for dim in (0, -1)
    ],
    Case("max of one number", lambda x: x.max(), [()], ["MaxBackward1"]),
    Case("min of one number", lambda x: x.min(), [()], ["MinBackward1"]),
    Case("median of one number", lambda x: x.median(), [()], ["MedianBackward0"]),
    Case(
        "masked amax of a number", lambda x: torch.masked.amax(x, 0, mask=torch.tensor(True)), [()], ["AmaxBackward0"]
    ),
    Case("amax of one along a dimension of one", lambda x: x.amax((-1, 0), True), [(1, 3, 1)], ["AmaxBackward0"]),
    Case("quantile", lambda x: x.quantile(0.3), [(3, 4)], ["GatherBackward0"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)

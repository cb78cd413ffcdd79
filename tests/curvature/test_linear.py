"""Matrix products against dense derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.curvature.oracle import Case, check

CASES = [
    Case("mm", torch.mm, [(3, 4), (4, 2)], ["MmBackward0"]),
    Case("mm transposed weight", lambda x, w: x @ w.t(), [(3, 4), (2, 4)], ["MmBackward0", "TBackward0"]),
    Case("addmm", torch.addmm, [(2,), (3, 4), (4, 2)], ["AddmmBackward0"]),
    Case("addmm matrix", torch.addmm, [(3, 2), (3, 4), (4, 2)], ["AddmmBackward0"]),
    Case("addmm scalars", lambda c, a, b: torch.addmm(c, a, b, alpha=0.5, beta=3.0), [(3, 1), (3, 4), (4, 2)], ["AddmmBackward0"]),
    Case("linear", F.linear, [(3, 4), (2, 4), (2,)], ["AddmmBackward0", "TBackward0"]),
    Case("linear without bias", F.linear, [(3, 4), (2, 4)], ["MmBackward0", "TBackward0"]),
    Case("linear on one vector", F.linear, [(4,), (2, 4), (2,)]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)

"""The diagonal at the output of every network is exact, in each algorithm's real losses on real minibatches."""

from __future__ import annotations

import pytest

from tests.sb3.cases import CASES, Case
from tests.sb3.exactness import TOLERANCE, inexact, output_errors


def marked(case: Case) -> object:
    reason = inexact(case)
    return pytest.param(case, marks=pytest.mark.xfail(reason=reason, strict=True)) if reason else case


@pytest.mark.parametrize("case", [marked(case) for case in CASES], ids=str)
def test_diagonal_at_every_output_is_exact(case: Case) -> None:
    errors = output_errors(case)
    assert "value_net" in errors or "q0" in errors or "q_net" in errors or "quantile_net" in errors
    assert len(errors) > 1 or case.algorithm.__name__ in ("DQN", "QRDQN", "TRPO"), "the actor's output was not compared"
    assert max(errors.values()) < TOLERANCE, errors

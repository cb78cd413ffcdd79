"""The diagonal at the output of every network is exact, in each algorithm's real losses on real minibatches."""

from __future__ import annotations

import pytest

from tests.sb3.cases import CASES, Case
from tests.sb3.exactness import TOLERANCE, inexact, output_errors

CRITICS = {"value_net", "q_net", "quantile_net", "q0"}
ONLY_CRITIC = ("DQN", "QRDQN", "TRPO")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_diagonal_at_every_output_is_exact(case: Case) -> None:
    errors = output_errors(case)
    assert not CRITICS.isdisjoint(errors)
    assert case.algorithm.__name__ in ONLY_CRITIC or not {"action_net", "mu"}.isdisjoint(errors)
    exact = {name: error for name, error in errors.items() if name != "log_std" or not inexact(case)}
    assert max(exact.values()) < TOLERANCE, errors


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.xfail(reason=reason, strict=True))
        for case in CASES
        if (reason := inexact(case))
    ],
    ids=str,
)
def test_diagonal_of_a_standard_deviation_beyond_the_output_is_exact(case: Case) -> None:
    assert output_errors(case)["log_std"] < TOLERANCE

"""The curvature statistics agree with numpy, add up over updates and processes, and never wait for the device."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hesscale_lightning.metrics import (
    STATISTICS,
    CurvatureMaxAbs,
    CurvatureMeanAbs,
    CurvatureNegativeFraction,
    CurvatureTrace,
)

REFERENCES = {
    "trace": np.sum,
    "mean_abs": lambda h: np.abs(h).mean(),
    "max_abs": lambda h: np.abs(h).max(),
    "negative_fraction": lambda h: (h < 0).mean(),
}
METRICS = {
    "trace": CurvatureTrace,
    "mean_abs": CurvatureMeanAbs,
    "max_abs": CurvatureMaxAbs,
    "negative_fraction": CurvatureNegativeFraction,
}


def make_diagonals(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (3,), (2, 3, 2), ()]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def entries(diagonals: list[Tensor]) -> np.ndarray:
    return np.concatenate([h.double().reshape(-1).numpy() for h in diagonals])


def test_there_is_a_class_for_every_statistic():
    assert METRICS.keys() == STATISTICS.keys() == REFERENCES.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STATISTICS)
@given(seed=st.integers(0, 1000))
def test_each_statistic_equals_numpys(name, dtype, seed):
    diagonals = make_diagonals(seed, dtype)
    result = STATISTICS[name](diagonals)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.item() == pytest.approx(REFERENCES[name](entries(diagonals)), rel=1e-5, abs=1e-5)


def test_a_half_precision_trace_does_not_overflow():
    assert STATISTICS["trace"]([torch.full((100,), 6e4, dtype=torch.float16)]).item() == pytest.approx(6e6, rel=1e-3)


@pytest.mark.parametrize("diagonals", [[], [torch.empty(0)]])
@pytest.mark.parametrize("name", STATISTICS)
def test_no_diagonal_at_all_is_an_error_that_says_where_they_come_from(name, diagonals):
    with pytest.raises(ValueError, match=r"Found no diagonal.*attach"):
        STATISTICS[name](diagonals)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_generator_of_diagonals_is_enough(name):
    assert STATISTICS[name](h for h in make_diagonals(0)) == STATISTICS[name](make_diagonals(0))


@pytest.mark.parametrize("name", STATISTICS)
def test_no_statistic_waits_for_the_device(name):
    class NoTransfers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in func.name(), "read a number back from the device"
            return func(*args, **(kwargs or {}))

    metric = METRICS[name]()
    with NoTransfers():
        STATISTICS[name](make_diagonals(0))
        metric.update(make_diagonals(0))


def expected_over_updates(name: str, updates: list[list[Tensor]]) -> float:
    if name == "trace":
        return float(np.mean([entries(update).sum() for update in updates]))
    return float(REFERENCES[name](np.concatenate([entries(update) for update in updates])))


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_covers_all_updates_and_forgets_them_on_reset(name):
    metric = METRICS[name]()
    updates = [make_diagonals(0), make_diagonals(1)[:2], make_diagonals(2)]
    for update in updates:
        metric.update(update)
    assert metric.compute().item() == pytest.approx(expected_over_updates(name, updates), rel=1e-5)
    metric.reset()
    metric.update(updates[1])
    assert metric.compute().item() == pytest.approx(expected_over_updates(name, updates[1:2]), rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_the_states_of_two_processes_add_up(name):
    first, second = METRICS[name](), METRICS[name]()
    updates = [make_diagonals(0), make_diagonals(1)[:2], make_diagonals(2)]
    first.update(updates[0])
    second.update(updates[1])
    second.update(updates[2])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(expected_over_updates(name, updates), rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_survives_pickling_with_its_state(name):
    metric = METRICS[name]()
    metric.update(make_diagonals(0))
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_draws_itself(name):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = METRICS[name]()
    values = [metric(make_diagonals(seed)) for seed in range(3)]
    figure, axis = metric.plot(values)
    assert len(axis.lines[0].get_ydata()) == 3
    pyplot.close(figure)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("given", "found"), [(torch.nn.Parameter(torch.ones(2, 3)), r"parameter of shape \(2, 3\)"), (None, "None")]
)
def test_weights_and_diagonals_that_were_taken_are_refused_and_count_nothing(name, given, found):
    metric = METRICS[name]()
    metric.update([torch.ones(2)])
    before = metric.compute()
    with pytest.raises(TypeError, match=rf"Found a? ?{found} at position 1, expected a diagonal"):
        metric.update([torch.full((2,), 3.0), given])
    metric._computed = None
    assert torch.equal(metric.compute(), before)

"""The metrics of layers, steps and audits agree with numpy, add up over updates and processes, and draw themselves."""

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from hesscale_lightning import metrics as m

SHAPES = [(3, 4), (3,), (2, 3, 2)]
NAMES = ["first", "second", "third"]


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def flat(tensors: list[Tensor]) -> np.ndarray:
    return np.concatenate([t.double().reshape(-1).numpy() for t in tensors])


def by_layer(seed: int) -> dict[str, list[Tensor]]:
    return {name: [h] for name, h in zip(NAMES, draw(seed), strict=True)}


def numpy_shares(seeds: list[int]) -> dict[str, float]:
    sums = {name: sum(np.abs(flat(by_layer(seed)[name])).sum() for seed in seeds) for name in NAMES}
    return {name: value / sum(sums.values()) for name, value in sums.items()}


def numpy_histogram(seeds: list[int]) -> np.ndarray:
    logs = np.log10(np.abs(np.concatenate([flat(draw(seed)) for seed in seeds])))
    return np.histogram(np.clip(logs, -1.999, 0.999), bins=6, range=(-2, 1))[0].astype(float)


def numpy_rate(seeds: list[int]) -> float:
    return sum(np.abs(flat(draw(s))).sum() for s in seeds) / sum(np.abs(flat(draw(s + 100))).sum() for s in seeds)


def numpy_decrease(seeds: list[int]) -> dict[str, float]:
    predicted, actual = np.mean([s + 1.0 for s in seeds]), np.mean([s + 0.5 for s in seeds])
    return {"predicted_decrease": predicted, "actual_decrease": actual, "gain_ratio": actual / predicted}


def numpy_error(seeds: list[int]) -> dict[str, float]:
    h, e = (np.concatenate([flat(draw(s + shift)) for s in seeds]) for shift in (0, 100))
    cosine = (h * e).sum() / np.sqrt((h**2).sum() * (e**2).sum())
    return {"relative_l1": np.abs(h - e).sum() / np.abs(e).sum(), "cosine": cosine}


class Case(NamedTuple):
    make: Callable[[], Any]
    update: Callable[[Any, int], None]
    expected: Callable[[list[int]], Any]


CASES = {
    "layer shares": Case(lambda: m.CurvatureLayerShares(NAMES), lambda x, s: x.update(by_layer(s)), numpy_shares),
    "histogram": Case(lambda: m.CurvatureHistogram(-2, 1, 6), lambda x, s: x.update(draw(s)), numpy_histogram),
    "learning rate": Case(m.EffectiveLearningRate, lambda x, s: x.update(draw(s), draw(s + 100)), numpy_rate),
    "loss decrease": Case(
        m.LossDecrease, lambda x, s: x.update(torch.tensor(s + 1.0), torch.tensor(s + 0.5)), numpy_decrease
    ),
    "step-size scale": Case(
        m.StepSizeScale,
        lambda x, s: x.update(torch.tensor(1 / (1 + s))),
        lambda seeds: {
            "scale": np.mean([1 / (1 + s) for s in seeds]),
            "shortened": np.mean([s > 0 for s in seeds]),
        },
    ),
    "audit error": Case(m.CurvatureAuditError, lambda x, s: x.update(draw(s), draw(s + 100)), numpy_error),
}


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-5)
    else:
        assert found.numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_metric_covers_all_updates_and_forgets_them_on_reset(case):
    metric = case.make()
    for seed in (0, 1, 2):
        case.update(metric, seed)
    assert_close(metric.compute(), case.expected([0, 1, 2]))
    metric.reset()
    case.update(metric, 1)
    assert_close(metric.compute(), case.expected([1]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_states_of_two_processes_add_up(case):
    first, second = case.make(), case.make()
    case.update(first, 0)
    case.update(second, 1)
    case.update(second, 2)
    first.merge_state(second)
    assert_close(first.compute(), case.expected([0, 1, 2]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_metric_survives_pickling_with_its_state(case):
    metric = case.make()
    case.update(metric, 0)
    assert_close(pickle.loads(pickle.dumps(metric)).compute(), case.expected([0]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_metric_draws_itself(case):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = case.make()
    case.update(metric, 0)
    figure, axis = metric.plot()
    assert axis is not None
    assert figure.axes
    pyplot.close("all")


def test_the_functions_are_the_metrics_of_one_update():
    assert_close(m.layer_shares(by_layer(0)), numpy_shares([0]))
    assert_close(m.log_histogram(draw(0), -2, 1, 6), numpy_histogram([0]))
    assert_close(m.effective_learning_rate(draw(0), draw(100)), numpy_rate([0]))
    assert m.relative_l1_error(draw(0), draw(100)).item() == pytest.approx(numpy_error([0])["relative_l1"], rel=1e-5)
    assert m.cosine_similarity(draw(0), draw(100)).item() == pytest.approx(numpy_error([0])["cosine"], rel=1e-5)


def test_the_predicted_decrease_is_exact_for_a_quadratic_loss():
    g, h, u = (flat(draw(seed)) for seed in (0, 1, 2))
    expected = -((g * u).sum() + (h * u * u).sum() / 2)
    assert m.predicted_decrease(draw(0), draw(1), draw(2)).item() == pytest.approx(expected, rel=1e-5)


def test_the_histogram_counts_every_entry_also_zeros_and_infinities():
    entries = torch.tensor([0.0, 1e-30, 1e30, float("inf"), float("nan"), 1.0])
    counts = m.log_histogram([entries], -3, 3, 6)
    assert counts.sum() == 6
    assert counts[0] == 2
    assert counts[-1] == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m.layer_shares({}), "Found no layer"),
        (lambda: m.CurvatureLayerShares(["a"]).update({"b": draw(0)}), r"layers \['b'\], expected some of \['a'\]"),
        (lambda: m.log_histogram(draw(0), 1, 1), "lowest=1"),
        (lambda: m.effective_learning_rate(draw(0), draw(0)[:2]), "expected one of each for every parameter"),
        (lambda: m.predicted_decrease(draw(0), [h.flatten() for h in draw(0)], draw(0)), "diagonals of shapes"),
        (lambda: m.relative_l1_error([], []), "Found no diagonals"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

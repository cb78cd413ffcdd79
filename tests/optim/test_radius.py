"""Radii that are measured: the region is what was promised, whatever the diagonal thinks."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hesscale_lightning.optim import AdaHesScale, CalibratedRadius, StepSizeScaling
from hesscale_lightning.optim.radius import CALIBRATION_KEY, TOO_FAR, TRIAL


class Problem:
    """A quadratic in 20 parameters that act together: the diagonal knows a twentieth of the curvature along a step."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.params = [
            torch.nn.Parameter(torch.zeros(12, dtype=dtype)),
            torch.nn.Parameter(torch.zeros(8, dtype=dtype)),
        ]
        self.before = torch.zeros((), dtype=dtype)
        self.target = 5.0
        self.moves: list[float] = []

    def output(self) -> Tensor:
        return self.params[0].sum() + self.params[1].sum()

    def deliver(self) -> None:
        self.before = self.output().detach()
        for p in self.params:
            p.grad = torch.full_like(p, float(self.before) - self.target)
            p.hess_diag = torch.ones_like(p)  # type: ignore[attr-defined]

    def moved(self) -> float:
        return float((self.output().detach() - self.before) ** 2 / 2)

    def measure(self) -> float:
        self.moves.append(self.moved())
        return self.moves[-1]


def adahesscale(problem: Problem, delta: float, radius: CalibratedRadius, **options: Any) -> AdaHesScale:
    return AdaHesScale(problem.params, delta=delta, radius=radius, max_update=None, **options)


def scaled_sgd(problem: Problem, delta: float, radius: CalibratedRadius, **options: Any) -> StepSizeScaling:
    return StepSizeScaling(torch.optim.SGD(problem.params, lr=1.0), delta, radius=radius, **options)


OPTIMIZERS: dict[str, Callable[..., Any]] = {"adahesscale": adahesscale, "step size scaling": scaled_sgd}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_steps_move_as_far_as_the_radius_says(make: Any) -> None:
    problem = Problem()
    optimizer = make(problem, 1e-3, CalibratedRadius(problem.measure))
    for step in range(40):
        problem.deliver()
        optimizer.step()
        assert problem.moved() == pytest.approx(1e-3, rel=1e-6), step
    assert optimizer.stats["calibration"] == pytest.approx(20)
    assert len(problem.moves) == 20 + 5  # the first 20 steps, and then every fourth


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_as_long_as_nothing_is_measured_steps_are_trials(make: Any) -> None:
    problem = Problem()
    found: list[float | None] = [None]
    optimizer = make(problem, 1e-3, CalibratedRadius(lambda: found[0]))
    for _ in range(3):
        problem.deliver()
        optimizer.step()
        assert problem.moved() == pytest.approx(20e-3 * TRIAL**2)  # the diagonal thinks that it is a twentieth
        assert math.isnan(optimizer.stats["calibration"])
    problem.deliver()
    found[0] = 20e-3 * TRIAL**2
    optimizer.step()
    assert problem.moved() == pytest.approx(1e-3)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_a_measured_step_never_exceeds_the_region_by_much(make: Any) -> None:
    """The curvature jumps by a factor of 100: the step that shows it is shortened, and the next one fits."""
    problem = Problem()
    weight = 1.0
    optimizer = make(problem, 1e-3, CalibratedRadius(lambda: weight * problem.moved(), every=1))
    for _ in range(10):
        problem.deliver()
        optimizer.step()
    weight = 100.0
    for _ in range(3):
        problem.deliver()
        optimizer.step()
        assert weight * problem.moved() <= 1e-3 * (1 + 1e-6)
    weight = 100.0 * TOO_FAR * 0.9  # a little is left to the average
    problem.deliver()
    optimizer.step()
    assert 1e-3 < weight * problem.moved() < TOO_FAR * 1e-3


def test_the_learning_rate_is_the_fraction_of_the_step_that_fits() -> None:
    moves = {}
    for lr, full in ((None, 1.0), (1.0, 1.0), (0.5, 1.0), (3e-4, 3e-4)):
        problem = Problem()
        optimizer = adahesscale(problem, 1e-3, CalibratedRadius(problem.measure, full_rate=full), lr=lr)
        for _ in range(3):
            problem.deliver()
            optimizer.step()
        moves[lr] = problem.moved()
    assert moves[None] == moves[1.0] == moves[3e-4] == pytest.approx(1e-3)
    assert moves[0.5] == pytest.approx(1e-3 / 4)


def test_weight_decay_is_no_part_of_what_is_measured() -> None:
    """A decay that moves farther than the region allows would take all of it, and the calibration would never end."""
    problem, other = Problem(), Problem()
    decayed = adahesscale(problem, 1e-6, CalibratedRadius(problem.measure), weight_decay=0.1)
    plain = adahesscale(other, 1e-6, CalibratedRadius(other.measure))
    for p in problem.params:
        p.data.fill_(2.0)
    for _ in range(40):
        before = [p.detach().clone() for p in problem.params]
        for p, value in zip(other.params, before, strict=True):
            p.data.copy_(value)
        problem.deliver()
        other.deliver()
        decayed.step()
        plain.step()
        for p, q, value in zip(problem.params, other.params, before, strict=True):
            torch.testing.assert_close(p.detach(), q.detach() - 0.1 * value, rtol=1e-12, atol=1e-12)
    assert decayed.stats["calibration"] == pytest.approx(20)


def test_a_step_that_fits_is_left_alone() -> None:
    problem, plain = Problem(), Problem()
    measured = adahesscale(problem, 1e12, CalibratedRadius(problem.measure))
    other = AdaHesScale(plain.params, lr=1.0, delta=None, max_update=None)
    for _ in range(3):
        problem.deliver()
        plain.deliver()
        measured.step()
        other.step()
    for a, b in zip(problem.params, plain.params, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_delta_may_be_a_multiple_of_something_that_changes(make: Any) -> None:
    """Of the loss, say: known when the step is made, averaged, and of no effect before it is known."""
    problem = Problem()
    loss = math.nan
    optimizer = make(problem, 0.1, CalibratedRadius(problem.measure, unit=lambda: loss, unit_decay=0.5))
    problem.deliver()
    optimizer.step()
    far = problem.moved()
    assert far > 1
    for p in problem.params:
        p.data.zero_()
    average, weight = 0.0, 0.0
    for loss in (0.04, 0.02, 0.01):
        average, weight = average / 2 + loss / 2, weight / 2 + 0.5
        problem.deliver()
        optimizer.step()
        assert problem.moved() == pytest.approx(0.1 * average / weight, rel=1e-6)


@pytest.mark.parametrize("denominator", ["rms", "abs", "sqrt_abs"])
def test_with_noise_the_length_is_how_well_gradients_agree(denominator: Any) -> None:
    """Oracle: the radius times |m| / rms |g|, written out; and gradients a thousand times as large change nothing."""
    moves: dict[float, list[float]] = {}
    for size in (1.0, 1000.0):
        generator = torch.Generator().manual_seed(0)
        problem = Problem()
        radius = CalibratedRadius(problem.measure, noise_decay=0.8, every=1)
        optimizer = adahesscale(problem, 1e-3, radius, denominator=denominator)
        average, squares, weight = torch.zeros(20).double(), 0.0, 0.0
        for step in range(1, 30):
            problem.deliver()
            g = torch.full((20,), size).double() * torch.randn((), generator=generator).double()
            problem.params[0].grad, problem.params[1].grad = g[:12].clone(), g[12:].clone()
            optimizer.step()
            average = 0.9 * average + 0.1 * g
            squares, weight = 0.8 * squares + 0.2 * float(g @ g), 0.8 * weight + 0.2
            signal = min(1.0, float(average.norm()) / (1 - 0.9**step) / math.sqrt(squares / weight))
            moves.setdefault(size, []).append(problem.moved())
            assert problem.moved() == pytest.approx(1e-3 * signal**2, rel=1e-6), step
    assert moves[1.0] == pytest.approx(moves[1000.0], rel=1e-6)
    assert min(moves[1.0]) < 0.1 * max(moves[1.0])


def test_noise_is_compared_as_it_was_before_clipping() -> None:
    """Clipping to a norm leaves the length of every step as it was, as far as gradients agree before it as after."""
    found = []
    for bound in (math.inf, 1e-3):
        problem = Problem()
        optimizer = adahesscale(problem, 1e-3, CalibratedRadius(problem.measure, noise_decay=0.9))
        for _ in range(5):
            problem.params[0].grad = problem.params[1].grad = None
            problem.before = problem.output().detach()
            ((problem.output() - 5.0) ** 2 / 2).backward()
            for p in problem.params:
                p.hess_diag = torch.ones_like(p)  # type: ignore[attr-defined]
            torch.nn.utils.clip_grad_norm_(problem.params, bound)
            optimizer.step()
        found.append(problem.moved())
    assert found[0] == pytest.approx(found[1], rel=1e-3)  # the weights of batches differ


def test_the_radius_is_compared_with_noise_by_adahesscale_alone() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match=r"noise_decay=0\.9 needs the average of the gradient"):
        scaled_sgd(problem, 1e-3, CalibratedRadius(problem.measure, noise_decay=0.9))


@pytest.mark.parametrize("useless", [0.0, -1.0, math.nan, None])
def test_measures_that_say_nothing_change_nothing(useless: float | None) -> None:
    problem = Problem()
    found: list[float | None] = [None]
    optimizer = adahesscale(problem, 1e-3, CalibratedRadius(lambda: found[0], every=1))
    for value in (20e-3 * TRIAL**2, useless):
        found[0] = value
        problem.deliver()
        optimizer.step()
    assert optimizer.stats["calibration"] == pytest.approx(20)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_a_trial_too_short_to_be_measured_is_followed_by_a_longer_one(make: Any) -> None:
    problem = Problem()
    optimizer = make(problem, 1e-3, CalibratedRadius(lambda: problem.moved() if problem.moved() > 1e-4 else 0.0))
    moves = []
    for _ in range(3):
        problem.deliver()
        optimizer.step()
        moves.append(problem.moved())
    assert moves == pytest.approx([20e-3 * TRIAL**2, 1e-3, 1e-3])  # the second trial is seen, and completed


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_of_a_step_that_went_infinitely_far_a_hundredth_is_left(make: Any) -> None:
    problem = Problem()
    infinite = [False, False, True, False]
    measure = lambda: math.inf if infinite.pop(0) else problem.moved()  # noqa: E731
    optimizer = make(problem, 1e-3, CalibratedRadius(measure, every=1))
    for _ in range(3):
        problem.deliver()
        optimizer.step()
    assert problem.moved() == pytest.approx(1e-3 * TRIAL**2)
    problem.deliver()
    optimizer.step()
    assert problem.moved() == pytest.approx(1e-3 * TRIAL**2)  # and so far the next goes


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize(
    ("saved", "own", "text"),
    [
        ("nats", "outputs", "saved in nats, and this optimizer takes it in outputs"),
        ("nats", None, "saved in nats, and this optimizer takes it in units of the loss"),
        (None, "nats", "saved in units of the loss, and this optimizer takes it in nats"),
    ],
)
def test_a_state_with_delta_in_other_units_is_not_loaded(
    make: Any, saved: str | None, own: str | None, text: str
) -> None:
    problem, other = Problem(), Problem()

    def made(problem: Problem, name: str | None) -> Any:
        radius = None if name is None else CalibratedRadius(problem.measure, name=name)
        return make(problem, 1e-3, radius)

    optimizer, later = made(problem, saved), made(other, own)
    problem.deliver()
    optimizer.step()
    before = later.state_dict()["param_groups"]
    with pytest.raises(ValueError, match=text):
        later.load_state_dict(optimizer.state_dict())
    assert later.state_dict()["param_groups"] == before
    made(other, saved).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"measure": lambda: torch.ones(2)}, r"measure must return .*, got a tensor of shape \(2,\)"),
        ({"measure": lambda: "far"}, "measure must return .*, got str"),
        ({"unit": lambda: None}, "unit must return .*, got NoneType"),
    ],
)
def test_what_is_no_number_is_refused(given: dict[str, Any], text: str) -> None:
    problem = Problem()
    optimizer = adahesscale(problem, 1e-3, CalibratedRadius(**{"measure": lambda: 1.0, **given}))
    problem.deliver()
    with pytest.raises(TypeError, match=text):
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_a_run_goes_on_from_its_state_bit_for_bit(make: Any) -> None:
    """The calibration and the average unit are state; the functions are the new optimizer's own."""
    first = Problem()
    options = {"noise_decay": 0.9} if make is adahesscale else {}
    optimizer = make(first, 1e-3, CalibratedRadius(first.measure, unit=lambda: 2.0, **options))
    for _ in range(7):
        first.deliver()
        optimizer.step()
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    second = Problem()
    resumed = make(second, 1e-3, CalibratedRadius(second.measure, unit=lambda: 2.0, **options))
    for mine, other in zip(second.params, first.params, strict=True):
        mine.data.copy_(other.data)
    resumed.load_state_dict(saved)
    for _ in range(30):
        for problem, which in ((first, optimizer), (second, resumed)):
            problem.deliver()
            which.step()
    assert torch.equal(first.params[0], second.params[0])
    assert optimizer.param_groups[0][CALIBRATION_KEY] == resumed.param_groups[0][CALIBRATION_KEY]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_a_state_without_calibration_starts_anew(make: Any) -> None:
    """As an optimizer without a radius writes it, or an earlier version."""
    problem = Problem()
    optimizer = make(problem, 1e-3, CalibratedRadius(problem.measure, unit=lambda: 2.0))
    problem.deliver()
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group[CALIBRATION_KEY]
        group.pop("damping", None)
    optimizer.load_state_dict(saved)
    for _ in range(3):
        problem.deliver()
        optimizer.step()
        assert problem.moved() == pytest.approx(2e-3, rel=1e-6)
    assert optimizer.param_groups[0][CALIBRATION_KEY][0] == 3


def test_what_was_pickled_before_there_were_radii_can_be_used() -> None:
    problem = Problem()
    optimizer = StepSizeScaling(torch.optim.SGD(problem.params, lr=1.0), 1e-3)
    state = optimizer.__getstate__()
    for name in ("damping", "radius", "_regions"):
        del state[name]
    restored = StepSizeScaling.__new__(StepSizeScaling)
    restored.__setstate__(state)
    problem.deliver()
    restored.step()
    assert problem.moved() == pytest.approx(20e-3, rel=1e-6)
    assert restored.radii == [None]


def test_a_group_s_own_delta_outlives_the_state_of_the_wrapped_optimizer() -> None:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": params[:1], "scaling_delta": 0.5}, {"params": params[1:]}]
    optimizer = StepSizeScaling(torch.optim.SGD(groups, lr=1.0), 0.1)
    optimizer.load_state_dict(torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}]).state_dict())
    assert [group["scaling_delta"] for group in optimizer.param_groups] == [0.5, 0.1]


@pytest.mark.parametrize(("radius", "error"), [(3.0, TypeError), (CalibratedRadius(lambda: 1.0), ValueError)])
def test_a_group_that_is_refused_is_not_added(radius: Any, error: type[Exception]) -> None:
    param, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizers = [AdaHesScale([param]), StepSizeScaling(torch.optim.SGD([param]))]
    for optimizer, key in zip(optimizers, ("", "scaling_"), strict=True):
        with pytest.raises(error):
            optimizer.add_param_group({"params": [other], f"{key}radius": radius, f"{key}delta": None})
        param.grad, param.hess_diag = torch.ones(2), torch.ones(2)  # type: ignore[attr-defined]
        optimizer.step()
        assert len(optimizer.param_groups) == len(optimizer.radii) == 1


def test_the_state_dict_holds_no_functions() -> None:
    problem = Problem()
    optimizer = adahesscale(problem, 1e-3, CalibratedRadius(lambda: 1.0))
    assert "radius" not in optimizer.state_dict()["param_groups"][0]
    scaling = scaled_sgd(Problem(), 1e-3, CalibratedRadius(lambda: 1.0))
    assert "scaling_radius" not in scaling.state_dict()["param_groups"][0]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_measure_too(make: Any, duplicate: Any) -> None:
    problem = Problem()
    both = duplicate((problem, make(problem, 1e-3, CalibratedRadius(problem.measure))))
    for _ in range(3):
        both[0].deliver()
        both[1].step()
        assert both[0].moved() == pytest.approx(1e-3, rel=1e-6)


def test_groups_have_their_own() -> None:
    left, right = Problem(), Problem()
    groups = [
        {"params": left.params, "radius": CalibratedRadius(left.measure), "delta": 1e-3},
        {"params": right.params, "radius": None, "delta": 1e-3, "lr": 1.0},
    ]
    optimizer = AdaHesScale(groups, lr=1.0, max_update=None)
    for _ in range(3):
        left.deliver()
        right.deliver()
        optimizer.step()
    assert left.moved() == pytest.approx(1e-3, rel=1e-6)
    assert right.moved() == pytest.approx(20e-3, rel=1e-6)
    assert [name for name in optimizer.stats if name.startswith("calibration")] == ["calibration/0"]


@pytest.mark.parametrize("denominator", ["rms", "abs"])
def test_damping_of_step_size_scaling(denominator: Any) -> None:
    """D is the average curvature and a fraction of its mean (of the root of the mean square)."""
    a, b = torch.nn.Parameter(torch.zeros(2).double()), torch.nn.Parameter(torch.zeros(3).double())
    optimizer = StepSizeScaling(torch.optim.SGD([a, b], lr=1.0), 1e-3, denominator=denominator, damping=0.5)
    a.grad, b.grad = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 0.5, -1.0]).double()
    h = torch.tensor([1.0, 4.0, 0.0, -2.0, 0.1]).double()
    a.hess_diag, b.hess_diag = h[:2].clone(), h[2:].clone()  # type: ignore[attr-defined]
    u = torch.cat([a.grad, b.grad])
    optimizer.step()
    mean = h.square().mean().sqrt() if denominator == "rms" else h.abs().mean()
    along = ((h.abs() + 0.5 * mean) * u * u).sum()
    torch.testing.assert_close(torch.cat([a, b]).detach(), -u * (2e-3 / along).sqrt())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"measure": 3.0}, TypeError, "measure must be a function"),
        ({"unit": 0.0}, ValueError, "unit must be > 0 or a function, got 0.0"),
        ({"full_rate": 0.0}, ValueError, "full_rate must be > 0, got 0.0"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"warmup": -1}, ValueError, "warmup must be >= 0, got -1"),
        ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
        ({"noise_decay": 1.0}, ValueError, r"noise_decay must be in \[0, 1\), got 1.0"),
        ({"unit_decay": -0.1}, ValueError, r"unit_decay must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        CalibratedRadius(**{"measure": lambda: 1.0, **arguments})


def test_bad_use() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    radius = CalibratedRadius(lambda: 1.0)
    with pytest.raises(TypeError, match="radius must be a CalibratedRadius or None, got float"):
        AdaHesScale([param], radius=1e-3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="delta is None, but radius says"):
        AdaHesScale([param], delta=None, radius=radius)
    with pytest.raises(ValueError, match="cannot be capturable"):
        AdaHesScale([param], radius=radius, capturable=True)
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        AdaHesScale([param], damping=-1)
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        StepSizeScaling(torch.optim.SGD([param]), damping=-1)

"""Trust regions whose radius is measured in something else than the quadratic model's own units.

A diagonal knows the curvature along each parameter and nothing of how parameters act together: along a step in which
many of them agree, ``sum D u^2 / 2`` can be a hundredth of the change that the step makes. What the step has changed
can be measured, though, by one evaluation after it, and the ratio of the two changes slowly. A
:class:`CalibratedRadius` measures now and then, and gives the region that its size promises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CALIBRATION_KEY = "radius_calibration"
TOO_FAR = 4.0  # times its radius, from which on a measured step is shortened
TRIAL = 0.01  # length of the first step, as long as nothing has been measured
_OF_LOSS = "units of the loss"
_LONGER = 10.0  # times, is the next trial after one that was too short to be measured


class Calibration(NamedTuple):
    """What is known of a group's radius. It is kept in the group as a plain tuple, which loads with ``weights_only``.

    Attributes:
        steps: Steps made.
        logs: Sum of ``log(measured / predicted)``.
        weight: The sum of its weights.
        units: Sum of the unit.
        unit_weight: The sum of its weights.
        squares: Sum of the squared norm of the gradient.
        square_weight: The sum of its weights.
        unseen: Trials that were too short to change what is measured.
    """

    steps: int = 0
    logs: Any = 0.0
    weight: Any = 0.0
    units: Any = 0.0
    unit_weight: Any = 0.0
    squares: Any = 0.0
    square_weight: Any = 0.0
    unseen: int = 0

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Calibration:
        """That of a group; of one without, or from an earlier version, what it lacks is unknown."""
        return cls(*group.get(CALIBRATION_KEY, ()))

    @property
    def factor(self) -> float | None:
        """How many times more steps change than the model predicts, ``c``; None before the first measure."""
        return math.exp(self.logs / self.weight) if self.weight else None

    @property
    def unit(self) -> float | None:
        """The average of what the unit was; None before it was known."""
        return self.units / self.unit_weight if self.unit_weight else None

    @property
    def trial(self) -> float:
        """The part that a step takes of what the diagonal thinks, as long as nothing is known."""
        return min(1.0, TRIAL * _LONGER**self.unseen)


class CalibratedRadius:
    r"""What ``delta`` is measured in: a change that a function measures, such as a KL divergence in nats.

    With the model's prediction :math:`q(u) = \frac12 \sum_i D_i u_i^2` of what an update :math:`u` changes, the step is

    .. math::

        s\,\gamma\,u, \qquad s = \min\left(1, \sqrt{\frac{\text{delta} \cdot \text{unit}}{c\; q(u)}}\right), \qquad
        \log c = \mathrm{EMA}\left(\log \frac{\text{measured}}{\text{predicted}}\right)

    so that a step changes what is measured by ``delta * unit`` at most, to the accuracy of the calibration :math:`c`.
    The learning rate, as a multiple :math:`\gamma` of ``full_rate``, is the fraction that is taken of the step that
    fits. With ``noise_decay`` no unit of the loss is left in the length either: the proposal gives the direction alone,
    and how far the step goes in the region is how well gradients agree over time,

    .. math::

        s = \sqrt{\frac{\text{delta} \cdot \text{unit}}{c\; q(u)}}\; r, \qquad
        r = \min\left(1, \frac{\lVert \hat m \rVert}{\sqrt{\mathrm{EMA}\,\lVert g \rVert^2}}\right)

    with the average gradient :math:`\hat m`: all of the region where they are the same at every step, and about
    :math:`\sqrt{(1 - \beta_1) / (1 + \beta_1)}` of it, 0.23, where they are noise.

    Steps are measured when they are made. The first is a hundredth of what the diagonal thinks, is measured, and
    then completed; after one that was too short to be measured, as low precision makes it, the next is ten times as
    long. One that has gone more than four times too far is shortened, and :math:`c` starts anew from it; of one that
    has gone infinitely far a hundredth is left.

    Args:
        measure: Called without arguments after a step, under ``no_grad``; returns how far the step has gone, which must
            be quadratic in small steps, as a KL divergence or a mean squared change of outputs is. None, or a number
            that is not positive and finite, is not taken into account. It should compare on the data of the step. With
            several processes it has to return the same number in each, as ``unit`` has, or their parameters part.
        unit: What ``delta`` is a multiple of; a function is asked at every step, and what it returns averaged
            exponentially (default: 1.0).
        name: What it measures, such as "nats". It is written with the optimizer's state, and a state whose ``delta`` is
            in other units is not loaded (default: "measured").
        full_rate: The learning rate at which all of the step that fits is taken (default: 1.0).
        every: Measure every so many steps (default: 4).
        warmup: Measure at each of so many first steps (default: 20).
        decay: Of the average of the calibration (default: 0.9).
        unit_decay: Of the average of the unit, if it is a function (default: 0.99).
        noise_decay: Of the average of the gradient's squared norm, which the proposal is compared to; None: it is not,
            and :math:`s` is at most 1 (default: None). For AdaHesScale alone: other optimizers' steps have no units, or
            are meant to have them.

    Raises:
        TypeError: If ``measure`` cannot be called.
        ValueError: If another argument is out of its range.

    Example:
        The radius is the mean squared change of a linear model's outputs, at most 0.01, however large the rate:

        >>> import torch
        >>> from hesscale_lightning.optim import AdaHesScale, CalibratedRadius
        >>> x, weight = torch.ones(1, 100), torch.nn.Parameter(torch.zeros(100))
        >>> before = (x @ weight).detach()
        >>> radius = CalibratedRadius(lambda: (x @ weight - before).square().mean())
        >>> optimizer = AdaHesScale([weight], delta=0.01, radius=radius)
        >>> (x @ weight - 3).square().sum().backward()
        >>> weight.hess_diag = torch.full((100,), 2.0)
        >>> optimizer.step()
        >>> print(f"{(x @ weight - before).square().mean():.4f}")  # the diagonal alone would have said a hundredth
        0.0100
    """

    def __init__(
        self,
        measure: Callable[[], float | Tensor | None],
        *,
        unit: float | Callable[[], float | Tensor] = 1.0,
        name: str = "measured",
        full_rate: float = 1.0,
        every: int = 4,
        warmup: int = 20,
        decay: float = 0.9,
        unit_decay: float = 0.99,
        noise_decay: float | None = None,
    ) -> None:
        if not callable(measure):
            raise TypeError(
                "measure must be a function that returns how far the latest step has gone, got "
                f"{type(measure).__name__}; a radius in units of the quadratic model is a number, delta"
            )
        if not callable(unit) and not unit > 0:
            raise ValueError(f"unit must be > 0 or a function, got {unit}")
        if not full_rate > 0:
            raise ValueError(f"full_rate must be > 0, got {full_rate}")
        if not every >= 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not warmup >= 0:
            raise ValueError(f"warmup must be >= 0, got {warmup}")
        for which, value in (("decay", decay), ("unit_decay", unit_decay), ("noise_decay", noise_decay)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{which} must be in [0, 1), got {value}")
        self.measure = measure
        self.unit = unit
        self.name = name
        self.full_rate = full_rate
        self.every = every
        self.warmup = warmup
        self.decay = decay
        self.unit_decay = unit_decay
        self.noise_decay = noise_decay

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from one, is measured."""
        return step <= self.warmup or step % self.every == 0


class Made(NamedTuple):
    """A step that was made.

    Attributes:
        predicted: ``sum D u^2 / 2`` of it.
        scale: The part ``s`` that was taken of the proposal.
        signal: The part ``r`` of the region that it was to take.
    """

    predicted: float | Tensor
    scale: float | Tensor
    signal: float | Tensor = 1.0


class Regions:
    """The trust regions of all param groups of one optimizer: what each is measured in, and its calibration.

    Calibrations live in the param groups, so that they are part of the optimizer's state; the radii, which hold
    functions, do not.

    Args:
        key: The group's option that is its ``delta``.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.radii: list[CalibratedRadius | None] = []

    def check(self, options: Mapping[str, Any], radius: CalibratedRadius | None) -> None:
        """Raises if a group with these options cannot have that radius."""
        if radius is None:
            return
        if not isinstance(radius, CalibratedRadius):
            raise TypeError(
                f"radius must be a CalibratedRadius or None, got {type(radius).__name__}; a radius in units of "
                f"the quadratic model is a number, {self.key}"
            )
        if options.get(self.key) is None:
            raise ValueError(f"{self.key} is None, but radius says what it is measured in: give it a number")
        if options.get("capturable", False):
            raise ValueError("a radius that is measured reads its measure on the host: it cannot be capturable")
        if radius.noise_decay is not None and self.key != "delta":
            raise ValueError(
                f"noise_decay={radius.noise_decay} needs the average of the gradient, which AdaHesScale has and the "
                "optimizer that StepSizeScaling scales may not have: leave it None"
            )

    def add_group(self, group: dict[str, Any], radius: CalibratedRadius | None) -> None:
        """One more group, with what its ``delta`` is measured in (None: the quadratic model's own units)."""
        self.check(group, radius)
        if radius is not None:
            group.setdefault(CALIBRATION_KEY, tuple(Calibration()))
            group[self._units_key] = radius.name
        self.radii.append(radius)

    @property
    def _units_key(self) -> str:
        return f"{self.key}_in"

    def check_saved(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raises if a state dict's param groups have their ``delta`` in other units than these regions."""
        for index, (saved, radius) in enumerate(zip(groups, self.radii, strict=False)):
            if self.key not in saved or (CALIBRATION_KEY in saved and self._units_key not in saved and radius):
                continue  # of another optimizer, or of an earlier version, which did not say
            theirs, ours = saved.get(self._units_key, _OF_LOSS), _OF_LOSS if radius is None else radius.name
            if theirs != ours:
                raise ValueError(
                    f"{self.key}={saved[self.key]} of param group {index} was saved in {theirs}, and this optimizer "
                    f"takes it in {ours}: make it with the radius that was trained with, or load the network's "
                    "parameters alone"
                )

    def limit(self, index: int, group: dict[str, Any]) -> float | None:
        """The largest ``sum D u^2 / 2`` of one group's next update; None for no limit. To be asked once per step."""
        delta: float | None = group[self.key]
        radius = self.radii[index]
        if radius is None or delta is None:
            return delta
        known = Calibration.of(group)
        if callable(radius.unit):
            unit = _number("unit", radius.unit())
            if _is_useful(unit):
                units, weight = _averaged(radius.unit_decay, unit, 1.0, known.units, known.unit_weight)
                known = known._replace(units=units, unit_weight=weight)
                group[CALIBRATION_KEY] = tuple(known)
        allowed = self._allowed(radius, group)
        return allowed * (known.trial**2 if known.factor is None else 1 / known.factor)

    def compares_noise(self, index: int) -> bool:
        """Whether the length of a group's steps follows from how well its gradients agree."""
        radius = self.radii[index]
        return radius is not None and radius.noise_decay is not None

    def signal(self, index: int, group: dict[str, Any], average: Any, square: Any, clipping: Any) -> Any:
        """The part ``r`` of the region that the next step takes, where :meth:`compares_noise`. To be asked once.

        Args:
            index: The group's.
            group: It.
            average: Squared norm of the average gradient, corrected for its start and for clipping.
            square: That of the step's own gradient, as it was clipped.
            clipping: The factor of the clipping.
        """
        radius: Any = self.radii[index]
        known = self._known(index, group)
        sums = _averaged(radius.noise_decay, square, clipping * clipping, known.squares, known.square_weight)
        self._learn(index, group, known._replace(squares=sums[0], square_weight=sums[1]))
        return _ratio(average * sums[1], sums[0])

    def _known(self, index: int, group: dict[str, Any]) -> Calibration:
        return Calibration.of(group)

    def _learn(self, index: int, group: dict[str, Any], known: Calibration) -> None:
        group[CALIBRATION_KEY] = tuple(known)

    def _allowed(self, radius: CalibratedRadius, group: dict[str, Any]) -> float:
        """``delta * unit``; infinite as long as nothing is known of the unit."""
        unit = Calibration.of(group).unit if callable(radius.unit) else radius.unit
        return math.inf if unit is None else float(group[self.key] * unit)

    def measure_next(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the next step will be measured."""
        return any(
            radius is not None and radius.is_due(Calibration.of(group).steps + 1)
            for group, radius in zip(groups, self.radii, strict=True)
        )

    def know_all(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all that is measured is calibrated, and its unit known."""
        for group, radius in zip(groups, self.radii, strict=True):
            if radius is not None:
                known = Calibration.of(group)
                if known.factor is None or (callable(radius.unit) and known.unit is None):
                    return False
        return True

    def observe(
        self, groups: Sequence[dict[str, Any]], made: Callable[[int], Made | None], rates: Sequence[float]
    ) -> dict[int, float]:
        """Measures the step that was just made, where it is time.

        Args:
            groups: The param groups.
            made: From a group's index to what its step was; None where nothing moved.
            rates: The learning rate of each group.

        Returns:
            Factors, by group's index, for steps that have gone too far, or were a trial.
        """
        factors: dict[int, float] = {}
        for index, (group, radius) in enumerate(zip(groups, self.radii, strict=True)):
            step = None if radius is None else made(index)
            if radius is None or step is None:
                continue
            known = Calibration.of(group)
            known = known._replace(steps=known.steps + 1)
            if radius.is_due(known.steps):
                found = radius.measure()
                model, measured = float(step.predicted), math.nan if found is None else _number("measure", found)
                if _is_useful(measured) and _is_useful(model):
                    ratio = math.log(measured / model)
                    logs, weight = _averaged(radius.decay, ratio, 1.0, known.logs, known.weight)
                    allowed = self._allowed(radius, group) * (rates[index] * float(step.signal)) ** 2
                    if known.weight == 0 and allowed > 0:  # a trial
                        longest = math.inf if radius.noise_decay is not None else 1 / float(step.scale)
                        factors[index] = min(math.sqrt(allowed / measured), longest)
                    elif measured > TOO_FAR * allowed > 0:  # an infinite one is never exceeded
                        factors[index] = math.sqrt(allowed / measured)
                        logs = max(logs, weight * ratio)
                    known = known._replace(logs=logs, weight=weight)
                elif measured == 0 and known.weight == 0 and _is_useful(model):
                    known = known._replace(unseen=known.unseen + 1)
                elif measured == math.inf:
                    factors[index] = TRIAL
                    known = known._replace(logs=known.logs - 2 * known.weight * math.log(TRIAL))
            group[CALIBRATION_KEY] = tuple(known)
        return factors


def calibration(group: Mapping[str, Any]) -> float | None:
    """How many times more a group's steps change than the model predicts, ``c``; None before the first measure."""
    return Calibration.of(group).factor


def average_unit(group: Mapping[str, Any]) -> float | None:
    """The average of what a group's unit was; None before it was known."""
    return Calibration.of(group).unit


def _averaged(decay: float, value: Any, weight: Any, total: Any, weights: Any) -> tuple[Any, Any]:
    """The two sums of an exponential average, and one more value."""
    return decay * total + (1 - decay) * value, decay * weights + (1 - decay) * weight


def _ratio(signal: Any, noise: Any) -> Any:
    """``min(1, sqrt(signal / noise))``, and 1 where there is neither."""
    if isinstance(noise, Tensor) or isinstance(signal, Tensor):
        ratio: Tensor = torch.as_tensor(signal / noise)
        return ratio.sqrt().clamp(max=1.0).nan_to_num(nan=1.0)
    return min(1.0, math.sqrt(signal / noise)) if noise > 0 and math.isfinite(signal) else 1.0


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}"
    else:
        try:
            return float(value)
        except (TypeError, ValueError):
            got = type(value).__name__
    raise TypeError(f"{name} must return a number, or a tensor with one element, got {got}")


def _is_useful(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def host_rate(rate: float | Tensor) -> float:
    """A learning rate on the host."""
    return float(rate.item()) if isinstance(rate, torch.Tensor) else rate

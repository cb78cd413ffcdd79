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
# steps; sums of log(measured / predicted) and of its weights; sums of the unit and of its weights
UNCALIBRATED = (0, 0.0, 0.0, 0.0, 0.0)
TOO_FAR = 4.0  # times its radius, from which on a measured step is shortened
TRIAL = 0.01  # length of the first step, as long as nothing has been measured


class CalibratedRadius:
    r"""What ``delta`` is measured in: a change that a function measures, such as a KL divergence in nats.

    With the model's prediction :math:`q(u) = \frac12 \sum_i D_i u_i^2` of what an update :math:`u` changes, the step is

    .. math::

        s\,\gamma\,u, \qquad s = \min\left(1, \sqrt{\frac{\text{delta} \cdot \text{unit}}{c\; q(u)}}\right), \qquad
        \log c = \mathrm{EMA}\left(\log \frac{\text{measured}}{\text{predicted}}\right)

    so that a step changes what is measured by ``delta * unit`` at most, to the accuracy of the calibration :math:`c`.
    The learning rate, as a multiple :math:`\gamma` of ``full_rate``, is the fraction that is taken of the step that
    fits. Steps are measured when they are made. The first is a hundredth of what the diagonal thinks, is measured, and
    then completed; one that has gone more than four times too far is shortened, and :math:`c` starts anew from it.

    Args:
        measure: Called without arguments after a step, under ``no_grad``; returns how far the step has gone, which must
            be quadratic in small steps, as a KL divergence or a mean squared change of outputs is. None, or a number
            that is not positive and finite, is not taken into account. It should compare on the data of the step. With
            several processes it has to return the same number in each, as ``unit`` has, or their parameters part.
        unit: What ``delta`` is a multiple of; a function is asked at every step, and what it returns averaged
            exponentially (default: 1.0).
        full_rate: The learning rate at which all of the step that fits is taken (default: 1.0).
        every: Measure every so many steps (default: 4).
        warmup: Measure at each of so many first steps (default: 20).
        decay: Of the average of the calibration (default: 0.9).
        unit_decay: Of the average of the unit, if it is a function (default: 0.99).

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
        full_rate: float = 1.0,
        every: int = 4,
        warmup: int = 20,
        decay: float = 0.9,
        unit_decay: float = 0.99,
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
        for name, value in (("decay", decay), ("unit_decay", unit_decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        self.measure = measure
        self.unit = unit
        self.full_rate = full_rate
        self.every = every
        self.warmup = warmup
        self.decay = decay
        self.unit_decay = unit_decay

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from one, is measured."""
        return step <= self.warmup or step % self.every == 0


class Made(NamedTuple):
    """A step that was made: ``sum D u^2 / 2`` of it, and the part ``s`` that was taken of the proposal."""

    predicted: float | Tensor
    scale: float | Tensor


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

    def add_group(self, group: dict[str, Any], radius: CalibratedRadius | None) -> None:
        """One more group, with what its ``delta`` is measured in (None: the quadratic model's own units)."""
        self.check(group, radius)
        if radius is not None:
            group.setdefault(CALIBRATION_KEY, UNCALIBRATED)
        self.radii.append(radius)

    def limit(self, index: int, group: dict[str, Any]) -> float | None:
        """The largest ``sum D u^2 / 2`` of one group's next update; None for no limit. To be asked once per step."""
        delta: float | None = group[self.key]
        radius = self.radii[index]
        if radius is None or delta is None:
            return delta
        if callable(radius.unit):
            unit = _number("unit", radius.unit())
            if _is_useful(unit):
                steps, logs, weight, units, unit_weight = group.get(CALIBRATION_KEY, UNCALIBRATED)
                units = radius.unit_decay * units + (1 - radius.unit_decay) * unit
                unit_weight = radius.unit_decay * unit_weight + (1 - radius.unit_decay)
                group[CALIBRATION_KEY] = (steps, logs, weight, units, unit_weight)
        known = calibration(group)
        return self._allowed(radius, group) * (TRIAL**2 if known is None else 1 / known)

    def _allowed(self, radius: CalibratedRadius, group: dict[str, Any]) -> float:
        """``delta * unit``; infinite as long as nothing is known of the unit."""
        unit = average_unit(group) if callable(radius.unit) else radius.unit
        return math.inf if unit is None else float(group[self.key] * unit)

    def measure_next(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the next step will be measured."""
        return any(
            radius is not None and radius.is_due(group.get(CALIBRATION_KEY, UNCALIBRATED)[0] + 1)
            for group, radius in zip(groups, self.radii, strict=True)
        )

    def know_all(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all that is measured is calibrated, and its unit known."""
        for group, radius in zip(groups, self.radii, strict=True):
            if radius is not None:
                unknown_unit = callable(radius.unit) and average_unit(group) is None
                if calibration(group) is None or unknown_unit:
                    return False
        return True

    def observe(
        self, groups: Sequence[dict[str, Any]], made: Callable[[int], Made], rates: Sequence[float]
    ) -> dict[int, float]:
        """Measures the step that was just made, where it is time.

        Args:
            groups: The param groups.
            made: From a group's index to what its step was.
            rates: The learning rate of each group.

        Returns:
            Factors, by group's index, for steps that have gone too far, or were a trial.
        """
        factors: dict[int, float] = {}
        for index, (group, radius) in enumerate(zip(groups, self.radii, strict=True)):
            if radius is None:
                continue
            steps, logs, weight, *units = group.get(CALIBRATION_KEY, UNCALIBRATED)
            steps += 1
            if radius.is_due(steps):
                step, found = made(index), radius.measure()
                model, measured = float(step.predicted), math.nan if found is None else _number("measure", found)
                if _is_useful(measured) and _is_useful(model):
                    ratio = math.log(measured / model)
                    trial = weight == 0
                    logs = radius.decay * logs + (1 - radius.decay) * ratio
                    weight = radius.decay * weight + (1 - radius.decay)
                    allowed = self._allowed(radius, group) * rates[index] ** 2
                    if trial and allowed > 0:
                        factors[index] = min(math.sqrt(allowed / measured), 1 / float(step.scale))
                    elif measured > TOO_FAR * allowed > 0:  # an infinite one is never exceeded
                        factors[index] = math.sqrt(allowed / measured)
                        logs = max(logs, weight * ratio)
            group[CALIBRATION_KEY] = (steps, logs, weight, *units)
        return factors


def calibration(group: Mapping[str, Any]) -> float | None:
    """How many times more a group's steps change than the model predicts, ``c``; None before the first measure."""
    _, logs, weight, _, _ = group.get(CALIBRATION_KEY, UNCALIBRATED)
    return math.exp(logs / weight) if weight else None


def average_unit(group: Mapping[str, Any]) -> float | None:
    """The average of what a group's unit was; None before it was known."""
    *_, units, weight = group.get(CALIBRATION_KEY, UNCALIBRATED)
    return units / weight if weight else None


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

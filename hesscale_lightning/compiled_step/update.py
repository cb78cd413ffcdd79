"""AdaHesScale's update as part of a program.

The optimizer's own code is captured: a stand-in for it, with the program's tensors for parameters and state, makes the
step. What changes from step to step and is a number on the host (the learning rate, counts of steps, the averages of
clipping factors) enters as one small tensor; what does not, the options, is in the program and in its key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim import Optimizer

from hesscale_lightning.compiled_step.capture import CaptureError
from hesscale_lightning.optim import AdaHesScale
from hesscale_lightning.optim.clipping_weights import CLIPPING_KEY, clipping_weights
from hesscale_lightning.optim.gradient_rescaling import GroupScale
from hesscale_lightning.optim.hyperparameters import learning_rate
from hesscale_lightning.optim.normalized_update import Batch, mean_curvature
from hesscale_lightning.optim.parameter_state import new_state
from hesscale_lightning.optim.radius import CALIBRATION_KEY, Calibration, Regions
from hesscale_lightning.optim.step_record import StepRecord

_CHANGING = frozenset({"lr", "lr_scale", "differentiable"})  # the last one is torch's, and comes with a loaded state
# Numbers on the host for each param group: the learning rate, four sums of clipping factors, and of a measured radius
# the calibration and the sums that its average unit and the gradient's average squared norm are made of.
_PER_GROUP = 10
_TOLD = 9  # numbers that a program returns for each param group, without the sums of clipping factors


def can_be_captured(optimizer: Optimizer | None) -> bool:
    """Whether an optimizer's update can be part of a program. Hooks on its step need a step to be called on."""
    return (
        type(optimizer) is AdaHesScale
        and all(
            getattr(hook, "may_be_skipped", False)
            for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
            for hook in hooks.values()
        )
        and not any(group["capturable"] for group in optimizer.param_groups)
        and not any(
            radius is not None and group["weight_decay"]
            for group, radius in zip(optimizer.param_groups, optimizer.radii, strict=True)
        )
    )


def is_measured(optimizer: Optimizer | None) -> bool:
    """Whether the optimizer measures its next step, on what the loss is computed from."""
    if optimizer is None or not any(getattr(optimizer, "radii", ())):
        return False
    # One that steps by itself may ask at every step what was evaluated for the loss.
    return not can_be_captured(optimizer) or optimizer._regions.measure_next(optimizer.param_groups)  # type: ignore[attr-defined]


def can_measure(optimizer: Any) -> bool:
    """Whether an update in a program may be measured after it: not if it is a trial, or the unit is yet unknown."""
    return can_be_captured(optimizer) and optimizer._regions.know_all(optimizer.param_groups)


class _CapturedRegions(Regions):
    """The trust regions in a program, in which what they know of earlier steps are tensors.

    Args:
        regions: The optimizer's.
        known: By param group, the calibration and the sums of the two averages.
    """

    def __init__(self, regions: Regions, known: list[list[Tensor]]) -> None:
        super().__init__(regions.key)
        self.radii = regions.radii
        self.factors = [values[0] for values in known]
        self.known = [Calibration(0, 0.0, 0.0, v[1], v[2], v[3], v[4]) for v in known]

    def limit(self, index: int, group: dict[str, Any]) -> Any:
        """As a scalar tensor where the radius is measured."""
        radius, delta = self.radii[index], group[self.key]
        if radius is None:
            return delta
        known = self.known[index]
        if not callable(radius.unit):
            return delta * radius.unit / self.factors[index]
        unit = radius.unit()
        if type(unit) is not FakeTensor:
            raise CaptureError(
                "the unit of the optimizer's radius is a number on the host, which a program cannot ask for at every "
                "step: return a tensor that is computed in the step"
            )
        units, weight = known.units, known.unit_weight
        unit = unit.to(units)
        useful = (unit > 0) & unit.isfinite()
        units = (radius.unit_decay * units + (1 - radius.unit_decay) * unit).where(useful, units)
        weight = (radius.unit_decay * weight + (1 - radius.unit_decay)).where(useful, weight)
        self._learn(index, group, known._replace(units=units, unit_weight=weight))
        return delta * units / weight / self.factors[index]

    def _known(self, index: int, group: dict[str, Any]) -> Calibration:
        return self.known[index]

    def _learn(self, index: int, group: dict[str, Any], known: Calibration) -> None:
        self.known[index] = known


class Update:
    """One optimizer's update of the parameters that require grad, which must all receive one.

    Args:
        optimizer: The optimizer.
        params: The step's parameters, of which it updates those that it holds.
    """

    def __init__(self, optimizer: AdaHesScale, params: Sequence[Tensor]) -> None:
        position = {id(p): k for k, p in enumerate(params)}
        self.optimizer = optimizer
        #: By param group, the positions of its parameters among the step's.
        self.members = [
            [position[id(p)] for p in group["params"] if id(p) in position and p.requires_grad]
            for group in optimizer.param_groups
        ]
        #: The same in one list.
        self.order = [k for members in self.members for k in members]
        self._options = [name for name in optimizer.defaults if name not in _CHANGING]
        #: By param group, the positions of those that tell by which factor gradients were clipped.
        self._probed = [
            [position[id(probe.param)] for probe in probes if id(probe.param) in position]
            for probes in optimizer._rescaling._probes
        ]
        self._states: list[dict[str, Tensor]] = []
        self._params = params
        self._one = torch.ones(())
        self._groups = _groups(optimizer)

    # -- on the host

    def belongs_to(self, optimizer: Optimizer) -> bool:
        """Whether it is the update of this optimizer and of the param groups that it has now."""
        return optimizer is self.optimizer and self._groups == _groups(optimizer)

    @property
    def held(self) -> set[int]:
        """Positions of the parameters that are updated."""
        return set(self.order)

    def options(self) -> tuple[Any, ...]:
        """What the program is made for."""
        names = self._options
        groups, radii = self.optimizer.param_groups, self.optimizer.radii
        measured = [None if r is None else (id(r), r.full_rate, r.unit_decay, r.noise_decay) for r in radii]
        return tuple(
            [
                (*[tuple(value) if isinstance(value := group[name], list) else value for name in names], radius)
                for group, radius in zip(groups, measured, strict=True)
            ]
        )

    def prepare(self) -> tuple[list[Tensor], Tensor, tuple[int, ...]]:
        """Looks up what the next step begins with.

        Returns:
            The averages of all parameters, which are inputs of the program and are changed by it; the numbers on the
            host, of shape [10 groups + 2 pairs of counts], float64; for each parameter the pair of counts that is its.
        """
        state, params = self.optimizer.state, self._params
        states = [state[params[k]] for k in self.order]
        if not all(states):
            for k in self.order:
                if not state[params[k]]:
                    state[params[k]] = new_state(params[k], capturable=False)
            states = [state[params[k]] for k in self.order]
        self._states = states
        values: list[Any] = []
        for group in self.optimizer.param_groups:
            values.append(learning_rate(group))
            values += group[CLIPPING_KEY]
            known = Calibration.of(group)
            values += [known.factor or 1.0, *known[3:7]]
        pairs: dict[tuple[float, float], int] = {}
        count_of = tuple([pairs.setdefault((s["step"].item(), s["hess_step"].item()), len(pairs)) for s in states])
        for counts in pairs:
            values += counts
        averages = [s[name] for s in states for name in ("exp_avg", "exp_avg_hess")]
        return averages, torch.tensor(values, dtype=torch.float64), count_of

    def finish(
        self,
        results: Sequence[Tensor],
        records: Sequence[StepRecord],
        *,
        refreshing: bool,
        clipping: bool,
        measured: bool,
    ) -> None:
        """Counts the step, and notes what it did.

        Args:
            results: What :meth:`captured` returned.
            records: The same.
            refreshing: Whether there were diagonals.
            clipping: Whether there was a bound on the gradient's norm.
            measured: Whether the optimizer is to measure the step.
        """
        optimizer = self.optimizer
        names = ("step", "hess_step") if refreshing else ("step",)
        torch._foreach_add_([s[name] for s in self._states for name in names], self._one, alpha=1.0)
        width = _TOLD + (4 if clipping else 0)
        for k, group in enumerate(optimizer.param_groups):
            if clipping:
                group[CLIPPING_KEY] = tuple([x.item() for x in results[width * k + _TOLD : width * (k + 1)]])
            else:
                clipping_weights(group, 1.0, refreshing=refreshing)
            if optimizer.radii[k] is not None:
                known = Calibration.of(group)
                sums = [x.item() for x in results[width * k + 5 : width * k + _TOLD]]
                counted = (known.steps + (not measured), *known[1:3], *sums, *known[7:])
                group[CALIBRATION_KEY] = counted
        latest = _Records(self, results, records, width)
        if measured:
            optimizer._latest = list(latest)
            with torch.no_grad():
                optimizer._calibrate()
        else:
            optimizer._latest = latest  # type: ignore[assignment]
        optimizer.awaits_diagonals = False
        optimizer._opt_called = True  # type: ignore[attr-defined]  # asked by learning rate schedules

    # -- in the program

    def captured(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        diagonals: Sequence[Tensor | None],
        averages: Sequence[Tensor],
        numbers: Tensor,
        count_of: Sequence[int],
        factor: Tensor | None,
    ) -> tuple[list[Tensor], list[StepRecord]]:
        """The update on the program's tensors: changes parameters and averages in place.

        Args:
            params: All the step's parameters.
            grads: Their gradients, clipped already.
            diagonals: Their diagonals, None in a step without.
            averages: See :meth:`prepare`.
            numbers: See :meth:`prepare`.
            count_of: See :meth:`prepare`.
            factor: What the gradients have been multiplied by to clip them; None without ``max_grad_norm``.

        Returns:
            For each group the step's size, the trust region's factor, the clipping factor, ``sum D u^2``, the part of
            the region, the sums of the two averages, and if there is clipping the four new sums of factors; and the
            groups' records as far as every step has the same.
        """
        refreshing = any(h is not None for h in diagonals)
        missing = [k for k in self.order if grads[k] is None or (refreshing and diagonals[k] is None)]
        if missing:
            raise CaptureError(
                f"{len(missing)} of the optimizer's parameters receive no gradient from this loss, so that their "
                "counts of steps would differ from the others'"
            )
        each = list(numbers.unbind())
        counts = each[_PER_GROUP * len(self.members) :]
        device = params[0].device
        state: Any = defaultdict(dict)
        place = 0
        results: list[Tensor] = []
        records: list[StepRecord] = []
        stand_in = AdaHesScale.__new__(AdaHesScale)
        of_groups = [
            [x.to(device) for x in each[_PER_GROUP * g : _PER_GROUP * (g + 1)]] for g in range(len(self.members))
        ]
        regions = _CapturedRegions(self.optimizer._regions, [values[5:] for values in of_groups])
        stand_in.__dict__.update(state=state, _buffers={}, _regions=regions, param_groups=[])
        for g, (group, members) in enumerate(zip(self.optimizer.param_groups, self.members, strict=True)):
            lr, *sums = of_groups[g][:5]
            options = {**group, "lr": lr, "lr_scale": 1.0, "capturable": True, "foreach": False}
            options[CLIPPING_KEY] = tuple(sums)
            stand_in.param_groups.append(options)
            found: Any = []
            for k in members:
                count = count_of[place]
                state[params[k]] = {
                    "step": counts[2 * count].to(device).clone(),
                    "hess_step": counts[2 * count + 1].to(device).clone(),
                    "exp_avg": averages[2 * place],
                    "exp_avg_hess": averages[2 * place + 1],
                }
                found.append((params[k], grads[k], diagonals[k]))
                place += 1
            clipping: float | Tensor = 1.0
            if factor is not None:  # as far as the parameters tell of it that the optimizer looks at
                told_by = [grads[k] for k in self._probed[g]]
                telling = sum((grad != 0).sum() for grad in told_by if grad is not None)
                clipping = factor.where(torch.as_tensor(telling, device=device) > 0, 1.0)
            record = stand_in._update_group(g, GroupScale(clipping, 1.0), found)
            rule = record.rule._replace(clipping=(1.0, 1.0), floor=0.0)
            records.append(
                replace(record, batches=(), rule=rule, size=1.0, scale=1.0, along=0.0, clipping=1.0, signal=1.0)
            )
            told = [record.size, record.scale, record.clipping, record.along, record.signal, *regions.known[g][3:7]]
            if factor is not None:
                told += options[CLIPPING_KEY]
            results += [torch.as_tensor(x, dtype=torch.float64, device=device).clone() for x in told]
        return results, records


def _groups(optimizer: Optimizer) -> list[tuple[int, list[bool]]]:
    return [(id(group), [p.requires_grad for p in group["params"]]) for group in optimizer.param_groups]


class _Records:
    """The records of the latest step, made when they are asked for."""

    def __init__(self, update: Update, results: Sequence[Tensor], records: Sequence[StepRecord], width: int) -> None:
        self._update = update
        self._results = results
        self._records = records
        self._width = width

    def __iter__(self) -> Iterator[StepRecord]:
        update, place = self._update, 0
        groups = zip(update.optimizer.param_groups, update.members, self._records, strict=True)
        for g, (group, members, record) in enumerate(groups):
            first = self._width * g
            size, scale, clipping, along, signal = (x.item() for x in self._results[first : first + 5])
            batches = _batches([update._params[k] for k in members], update._states[place : place + len(members)])
            place += len(members)
            grad_sum, grad_weight, hess_sum, hess_weight = group[CLIPPING_KEY]
            weights = grad_sum / grad_weight, hess_sum / hess_weight if hess_weight else 1.0
            rule = record.rule._replace(clipping=weights)
            if group["damping"]:
                rule = rule._replace(floor=group["damping"] * mean_curvature(batches, rule))
            record = replace(record, batches=batches, rule=rule, size=size, scale=scale)
            yield replace(record, along=along, clipping=clipping, signal=signal)


def _batches(params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]) -> list[Batch]:
    batches: dict[Any, Batch] = {}
    for p, s in zip(params, states, strict=True):
        counts = (s["step"].item(), s["hess_step"].item())
        batch = batches.setdefault((p.device, p.dtype, counts), Batch(counts=counts))
        batch.params.append(p)
        batch.holders.append(p)
        batch.grad_averages.append(s["exp_avg"])
        batch.curvature_averages.append(s["exp_avg_hess"])
    return list(batches.values())


def clip(grads: Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor]:
    """Gradients clipped as by :func:`torch.nn.utils.clip_grad_norm_`, and the factor of it.

    The factor is 1 where it is no number, as in :mod:`hesscale_lightning.optim.gradient_rescaling`.
    """
    total = torch.nn.utils.get_total_norm(list(grads))
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    told = factor.where(factor.isfinite() & (factor > 0), 1.0)
    return [g * factor.to(g.dtype) for g in grads], told

"""AdaHesScale: Adam's update with HesScale's curvature in place of the squared gradient."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from hesscale_lightning.optim.clipping_weights import CLIPPING_KEY, NO_CLIPPING, clipping_weights
from hesscale_lightning.optim.curvature_average import Denominator, refresh_averages
from hesscale_lightning.optim.diagonals import clear_diagonals, missing_diagonal_error, peek_diagonal
from hesscale_lightning.optim.gradient_rescaling import GradientRescaling, GroupScale
from hesscale_lightning.optim.hyperparameters import check_options, learning_rate, use_foreach
from hesscale_lightning.optim.normalized_update import (
    Batch,
    UpdateRule,
    average_norm_square,
    mean_curvature,
    normalized_update,
)
from hesscale_lightning.optim.parameter_state import new_state, restored
from hesscale_lightning.optim.radius import CalibratedRadius, Made, Regions, calibration, host_rate
from hesscale_lightning.optim.sharded import (
    check_placements,
    is_distributed,
    is_trial,
    layout,
    local,
    place_gradients,
    refuse_radius,
    total,
)
from hesscale_lightning.optim.step_record import StepRecord, describe
from hesscale_lightning.optim.tensor_lists import add_one, beside, multiply, never_compiled, norm_square, subtract
from hesscale_lightning.optim.trust_region import flatten_statistics, trust_region_scale


def _check_kind(state_dict: StateDict) -> None:
    """Raises if it is not the state of this kind of optimizer."""
    for state in state_dict["state"].values():
        if state and "exp_avg_hess" not in state:
            raise ValueError(
                f"AdaHesScale cannot go on from the state of another optimizer: it needs exp_avg_hess, found "
                f"{', '.join(sorted(map(str, state)))}. Load the network's parameters alone, and let the averages "
                "start anew"
            )
    for index, group in enumerate(state_dict["param_groups"]):
        # Another optimizer that has not stepped yet has no state to be known by, only its options.
        if not {"max_update", "delta"} & set(group):
            options = ", ".join(sorted(str(key) for key in group if key != "params"))
            raise ValueError(
                f"AdaHesScale cannot go on from the state of another optimizer: param group {index} has the options "
                f"{options}, expected max_update and delta among them. Load the network's parameters alone, and let "
                "the averages start anew"
            )


@dataclass(slots=True)
class _Averaging(Batch):
    """A batch and what its running averages move towards in this step."""

    grads: list[Tensor] = field(default_factory=list)
    refreshed: list[Tensor] = field(default_factory=list)
    diagonals: list[Tensor] = field(default_factory=list)


_Gathered = list[tuple[Tensor, Tensor, Tensor | None]]  # parameter, gradient, new diagonal


class AdaHesScale(Optimizer):
    r"""Adam with the running average of curvature, in place of the squared gradient, in the denominator.

    With the gradient :math:`g_t` and the Hessian diagonal :math:`h_t` of step t, and n the number of steps so far that
    brought a new diagonal:

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_n &= \beta_2 v_{n-1} + (1 - \beta_2)\, h_t^2 \\
        D_n &= \sqrt{v_n / (1 - \beta_2^n)} \\
        u_t &= \mathrm{clamp}\left(\frac{m_t / (1 - \beta_1^t)}{D_n + \epsilon},
               -\text{max\_update}, \text{max\_update}\right) \\
        s_t &= \min\left(1, \sqrt{\frac{2\,\text{delta}}{\gamma^2 \sum_i (D_n + \epsilon)_i u_{t,i}^2}}\right) \\
        \theta_t &= (1 - \gamma \lambda)\, \theta_{t-1} - s_t \gamma u_t

    where :math:`\gamma` is ``lr * lr_scale`` and :math:`\lambda` the weight decay; ``damping`` adds its multiple of the
    group's mean curvature to :math:`D_n`, and a ``radius`` measures ``delta`` in other units (see
    :class:`CalibratedRadius`). The sum runs over one param group, so networks whose curvature differs, such as an actor
    and a critic, belong in groups of their own. Unlike Adam's, the update has units: it is a damped Newton step, and
    ``lr`` is the fraction of it that is taken.

    **Diagonals.** A diagonal is read from ``param.hess_diag``, where :func:`hesscale_lightning.attach` leaves it beside
    ``param.grad``. ``step`` *takes* it: afterwards ``param.hess_diag`` is None, so it cannot enter the average twice,
    also if only ``model.zero_grad()`` is called. ``zero_grad`` of this class drops diagonals that were not taken. In a
    step without new diagonals (curvature every k steps) the running average stands as it is and does not decay.

    **Gradient clipping** multiplies :math:`g` and not :math:`h`, and would shorten every step by its factor. The factor
    :math:`c_t` is found by comparing, on two small parameters per group, the gradient's norm at the step with the one
    that backward delivered. It then becomes the weight of the batch in both averages, which are divided by the averages
    of :math:`c_t` and :math:`c_t^2`: clipping weakens unusual batches against others, which is its purpose, and changes
    neither the size of steps nor the units of ``delta``. ``clip_grad_norm_`` and a division of the gradients by the
    number of accumulated batches are covered; where gradients do not share one factor (``clip_grad_value_``) nothing is
    done.

    **Loss scaling.** A :class:`torch.amp.GradScaler` unscales gradients only. When it calls ``step``, the factor
    between backward and step is applied to the diagonals instead, which includes clipping: ``delta`` is then in units
    of the loss as clipping rescales it. Code that unscales or reduces diagonals itself calls :meth:`record_gradients`
    afterwards, in every step.

    Attributes:
        awaits_diagonals: True from ``zero_grad`` to ``step``. Code that attaches for several optimizers reads here
            which of them the next backward pass is for.

    Args:
        params: parameters, named parameters, or param groups; every option below can be set per group.
        lr: learning rate (default: 1e-2, or with a ``radius`` 1.0, all of the step that fits). A tensor is read on the
            host unless ``capturable``.
        betas: decay rates of the averages of gradient and curvature (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8). Larger values damp the step where curvature is small.
        weight_decay: decoupled weight decay, as in AdamW (default: 0.0).
        denominator: "rms" divides by the root of the average of :math:`h^2`, as in the paper; "abs" by the average of
            :math:`|h|`; "sqrt_abs" by the root of the average of :math:`|h|` (default: "rms"). The trust region's D is
            the average of :math:`|h|` in the last case.
        max_update: bound of every entry of the normalised update :math:`u`, before the learning rate; None for no bound
            (default: 10.0). It guards against units that are active in few samples, whose curvature is nearly 0.
        delta: radius of the trust region in units of the loss; None for none (default: 1e-4). It keeps training stable
            at learning rates far too high.
        radius: what ``delta`` is measured in, if it is not the quadratic model's own units; None: it is
            (default: None). It is not part of the state dict, the calibration is. Weight decay is not measured.
        damping: relative damping; this fraction of the group's mean curvature (of the root of the mean square for
            "rms") is added to the curvature D, for "sqrt_abs" under the root (default: 0.0).
        lr_scale: multiplies ``lr``. It is an option of its own so that a group keeps its factor when a scheduler or
            Stable-Baselines3 overwrites ``lr`` (default: 1.0).
        compensate_clipping: take clipping factors for weights of the batches, instead of letting them shorten the step
            (default: True).
        maximize: maximise the objective (default: False).
        foreach: use multi-tensor kernels; None uses them unless a parameter is of a tensor subclass (default: None).
        capturable: keep step counters on the parameters' device and never read them on the host, as graph capture
            needs (default: False).

    Raises:
        ValueError: if a hyperparameter is out of its range.
        RuntimeError: in ``step``, if a parameter has a gradient and has never had a diagonal, or its gradient is
        sparse.

    Example:
        >>> import torch
        >>> from hesscale_lightning.optim import AdaHesScale
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> curvature = torch.tensor([1.0, 100.0])
        >>> optimizer = AdaHesScale([weight], lr=0.5, delta=None)
        >>> loss = (curvature * weight**2).sum() / 2
        >>> loss.backward()  # with hesscale_lightning.attach(loss) before it, the next line is not needed
        >>> weight.hess_diag = curvature
        >>> optimizer.step()
        >>> print(weight.detach())  # half of the Newton step, whatever the curvature
        tensor([ 0.5000, -1.0000])

    Reference: Elsayed, Farrahi, Dangel, Mahmood, `Revisiting Scalable Hessian Diagonal Approximations for Applications
    in Reinforcement Learning <https://arxiv.org/abs/2406.03276>`_, ICML 2024. The authors' AdaHesScale has neither
    ``max_update`` nor ``delta``: pass None for both to get theirs.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        denominator: Denominator = "rms",
        max_update: float | None = 10.0,
        delta: float | None = 1e-4,
        radius: CalibratedRadius | None = None,
        damping: float = 0.0,
        lr_scale: float = 1.0,
        compensate_clipping: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        if lr is None:
            lr = 1e-2 if radius is None else 1.0
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "denominator": denominator,
            "max_update": max_update,
            "delta": delta,
            "damping": damping,
            "lr_scale": lr_scale,
            "compensate_clipping": compensate_clipping,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
        }
        check_options(defaults)
        self._rescaling = GradientRescaling()
        self._regions = Regions("delta")
        self._radius = radius
        self._latest: list[StepRecord] = []
        self._buffers: dict[Tensor, Tensor] = {}
        self._on_trial = False  # whether the state is that of a trial step, which nothing has been loaded into
        self.awaits_diagonals = True
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; options it does not set are the optimizer's defaults."""
        options = {**self.defaults, **param_group}
        check_options(options)
        self._regions.check(options, param_group.get("radius", self._radius))
        radius = param_group.pop("radius", self._radius)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if radius is not None:
            refuse_radius(group["params"])
        group.setdefault(CLIPPING_KEY, NO_CLIPPING)
        self._regions.add_group(group, radius)
        self._rescaling.add_group(group)

    @property
    def radii(self) -> list[CalibratedRadius | None]:
        """What each group's ``delta`` is measured in. Entries may be exchanged."""
        return self._regions.radii

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_regions": self._regions, "_radius": self._radius}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group.setdefault(CLIPPING_KEY, NO_CLIPPING)
        # Hooks, and what was noted from the latest step, are not part of a copy or checkpoint.
        self._rescaling = GradientRescaling(self.param_groups)
        self.__dict__.setdefault("_radius", None)
        if "_regions" not in self.__dict__:
            self._regions = Regions("delta")
        self._regions.radii += [None] * (len(self.param_groups) - len(self._regions.radii))
        self._latest = []
        self._buffers = {}
        self._on_trial = False
        self.awaits_diagonals = True

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the optimizer's state.

        Unlike torch's own optimizers it keeps float32 averages of half-precision parameters at full precision.

        Raises:
            ValueError: if it is the state of another kind of optimizer, or its ``delta`` is measured in something else.
                Nothing is loaded then.
        """
        loaded: StateDict = {}
        # Registered last, so it sees the dictionary as all other hooks have left it.
        handle = self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(self._own_state(final)))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
            for param, key in zip(group["params"], saved["params"], strict=True):
                for name, value in loaded["state"].get(key, {}).items():
                    self.state[param][name] = restored(value, name, param, capturable=group["capturable"])
                if param in self.state and self.state[param].get("step") == 0:  # saved before the first step
                    del self.state[param]
        self._on_trial = False

    def _own_state(self, state_dict: StateDict) -> StateDict:
        _check_kind(state_dict)
        self._regions.check_saved(state_dict["param_groups"])
        return state_dict

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients and drop the diagonals of all optimized parameters."""
        super().zero_grad(set_to_none)
        clear_diagonals(self.param_groups)
        self.awaits_diagonals = True

    def record_gradients(self) -> None:
        """Declare that gradients and diagonals, as they are now, belong to the same loss.

        To be called in every step by code that unscales or reduces the diagonals itself (a callback that divides them
        by a loss scale or averages them over processes), after gradients were unscaled and reduced too and before they
        are clipped. What multiplies the gradients after this call is taken for clipping.
        """
        self._rescaling.record()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # The question that a GradScaler asks right before it calls step is the only sign that there is a loss scale.
        self._rescaling.scaler_asked = True
        return False

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters.

        Args:
            closure: reevaluates the model, calls backward with curvature attached, and returns the loss.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            RuntimeError: if a parameter has a gradient and has never had a diagonal, or a sparse gradient. Nothing is
                updated then.
            ValueError: if a diagonal's shape is not its parameter's.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._on_trial:
            self.state.clear()
            self._on_trial = False
        if not self.state and is_trial(self.param_groups):
            self._make_state()
            return loss
        gathered = [self._gather(index) for index in range(len(self.param_groups))]
        self._latest = [
            self._update_group(index, scale, found)
            for index, (scale, found) in enumerate(zip(self._rescaling.take(), gathered, strict=True))
        ]
        if any(self._regions.radii):
            self._calibrate()
            self._decay_what_was_measured()
        self.awaits_diagonals = False
        return loss

    @never_compiled
    def _make_state(self) -> None:
        """The state of a trial step, for a checkpoint to be loaded into; the first real step begins anew."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param] = new_state(param, capturable=group["capturable"])
        self._on_trial = True

    @never_compiled
    def _gather(self, group_index: int) -> _Gathered:
        """Collect and check one group's gradients and diagonals, changing nothing."""
        group = self.param_groups[group_index]
        place_gradients(group["params"])
        found: _Gathered = []
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError("AdaHesScale does not support sparse gradients")
            diagonal = peek_diagonal(param)
            check_placements(param, "grad", grad)
            if diagonal is None and not self.state.get(param):
                raise missing_diagonal_error("AdaHesScale", group_index, index, group)
            found.append((param, grad, diagonal))
        return found

    def _update_group(self, index: int, grad_scale: GroupScale, found: _Gathered) -> StepRecord:
        group = self.param_groups[index]
        beta1, beta2 = group["betas"]
        if not found:  # nothing is learned from a step in which nothing moves
            rule = UpdateRule(beta1, beta2, group["eps"], group["denominator"], group["max_update"], False)
            return StepRecord([], rule, 0.0, 1.0, 0.0, grad_scale.clipping, False, group["maximize"])
        delta, measured = self._regions.limit(index, group), self._regions.radii[index] is not None
        clipping = grad_scale.clipping if group["compensate_clipping"] else 1.0
        weights = clipping_weights(group, clipping, refreshing=any(h is not None for _, _, h in found))
        rule = UpdateRule(
            beta1, beta2, group["eps"], group["denominator"], group["max_update"], delta is not None, weights
        )
        lr = self._rate(index)
        foreach = use_foreach(group["foreach"], (local(param) for param, _, _ in found))

        batches = self._average(group, found, clipping * beside(grad_scale.unscaling, clipping), foreach)
        if group["damping"] and batches:
            rule = rule._replace(floor=group["damping"] * mean_curvature(batches, rule))
        updates = [normalized_update(batch, rule, foreach=foreach, buffers=self._buffers) for batch in batches]
        scale: float | Tensor = 1.0
        along: float | Tensor = 0.0
        signal: float | Tensor = 1.0
        if delta is not None and updates:
            parts = [total(u.curvature_along, b.where) for u, b in zip(updates, batches, strict=True)]
            along = parts[0]
            for part in parts[1:]:
                along = along + beside(part, along)
            if self._regions.compares_noise(index):
                average, square = average_norm_square(batches, rule), norm_square([grad for _, grad, _ in found])
                signal = self._regions.signal(index, group, average, square, clipping)
                scale = trust_region_scale(delta, along, longest=math.inf) * signal
            else:
                scale = trust_region_scale(delta, along if measured else along * lr * lr)
        for batch, update in zip(batches, updates, strict=True):
            if group["weight_decay"] != 0 and not measured:
                multiply(batch.params, 1 - lr * group["weight_decay"], foreach=foreach)
            subtract(batch.params, update.directions, lr * scale * update.gain, foreach=foreach)
        size, maximize = lr * scale, group["maximize"]
        return StepRecord(batches, rule, size, scale, along, grad_scale.clipping, foreach, maximize, signal)

    def _rate(self, index: int) -> float | Tensor:
        radius = self._regions.radii[index]
        rate = learning_rate(self.param_groups[index])
        return rate if radius is None else rate / radius.full_rate

    @never_compiled
    def _calibrate(self) -> None:
        """Measure how far the step went; take back what was much too far, complete what was a trial."""
        latest = self._latest
        rates = [host_rate(self._rate(index)) for index in range(len(latest))]

        def made(index: int) -> Made | None:
            record = latest[index]
            if not record.batches:
                return None
            return Made(record.along * record.size * record.size / 2, record.scale, record.signal)

        for index, factor in self._regions.observe(self.param_groups, made, rates).items():
            record = latest[index]
            for batch in record.batches:
                update = normalized_update(batch, record.rule, foreach=record.foreach)
                back = beside(record.size, batch.params[0]) * (factor - 1) * update.gain
                subtract(batch.params, update.directions, back, foreach=record.foreach)
            record.size, record.scale = record.size * factor, record.scale * factor

    @never_compiled
    def _decay_what_was_measured(self) -> None:
        """Weight decay of groups with a radius, which is that of the update alone: it comes after the measure."""
        for index, (group, record) in enumerate(zip(self.param_groups, self._latest, strict=True)):
            if self._regions.radii[index] is None or group["weight_decay"] == 0:
                continue
            decay = host_rate(self._rate(index)) * group["weight_decay"]
            for batch in record.batches:
                update = normalized_update(batch, record.rule, foreach=record.foreach)
                back = beside(record.size, batch.params[0]) * decay * update.gain
                multiply(batch.params, 1 - decay, foreach=record.foreach)
                subtract(batch.params, update.directions, back, foreach=record.foreach)  # as decay of what was before

    def _average(
        self, group: dict[str, Any], found: _Gathered, hess_factor: float | Tensor, foreach: bool
    ) -> list[_Averaging]:
        """Count the step, move the running averages, consume the diagonals, and sort the tensors into batches."""
        on_device = group["capturable"] or torch.compiler.is_compiling()
        for param, _, _ in found:
            if not self.state[param]:
                self.state[param] = new_state(param, capturable=group["capturable"])
        states = [self.state[param] for param, _, _ in found]
        counters = [state["step"] for state in states]
        add_one(
            counters + [state["hess_step"] for state, (_, _, h) in zip(states, found, strict=True) if h is not None]
        )

        batches: dict[Any, _Averaging] = {}
        for state, (param, grad, diagonal) in zip(states, found, strict=True):
            counts = None if on_device else (state["step"].item(), state["hess_step"].item())
            where = layout(param)
            key = (param.device, param.dtype, counts, where)
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = _Averaging(counts=counts, where=where)
            m, v = state["exp_avg"], state["exp_avg_hess"]
            batch.holders.append(param)
            if is_distributed(param):
                m, v, grad = local(m), local(v), local(grad)
                diagonal = None if diagonal is None else local(diagonal)
                batch.params.append(local(param))
            else:
                batch.params.append(param)
            batch.grad_averages.append(m)
            batch.curvature_averages.append(v)
            if on_device:
                batch.steps.append(state["step"])
                batch.refreshes.append(state["hess_step"])
            batch.grads.append(grad if grad.dtype == m.dtype else grad.to(m.dtype))
            if diagonal is not None:
                batch.refreshed.append(v)
                batch.diagonals.append(diagonal)
                param.hess_diag = None  # type: ignore[attr-defined]
        beta1, beta2 = group["betas"]
        for batch in batches.values():
            grads = [-grad for grad in batch.grads] if group["maximize"] else batch.grads
            if foreach:
                torch._foreach_lerp_(batch.grad_averages, grads, 1 - beta1)
            else:
                for average, grad in zip(batch.grad_averages, grads, strict=True):
                    average.lerp_(grad, 1 - beta1)
            factor = beside(hess_factor, batch.params[0])
            refresh_averages(batch.refreshed, batch.diagonals, beta2, group["denominator"], factor, foreach=foreach)
            # The record of the latest step refers to the batch and must not keep these alive.
            batch.grads, batch.refreshed, batch.diagonals = [], [], []
        return list(batches.values())

    @property
    def stats(self) -> dict[str, Tensor]:
        """Scalar tensors that describe the latest step; empty before the first.

        Computed when read, from the averages and from the gradients as they are then: read it before they are cleared.
        With several param groups every name is followed by ``/`` and the group's index.

        - ``scale``: the trust region's factor, 1 where it did not bind.
        - ``clipping``: the factor by which gradients had been multiplied since backward, apart from a loss scale.
        - ``mean_abs_update``: mean absolute change of a parameter, without weight decay.
        - ``predicted_decrease``: fall of the quadratic model along the step, ``-(sum(g u) + sum(D u^2) / 2)``; left out
          if gradients are gone. With ``maximize`` it is the predicted rise.
        - ``calibration``: with a ``radius``, how many times more a step changes than the diagonal predicts.
        """
        described = [describe(record) for record in self._latest]
        for statistics, group, radius in zip(described, self.param_groups, self.radii, strict=False):
            if radius is not None:
                statistics["calibration"] = calibration(group) or math.nan
        return flatten_statistics(described)

"""Step-size scaling: a trust region from the Hessian diagonal around any optimizer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from hesscale_lightning.optim.adahesscale import AdaHesScale
from hesscale_lightning.optim.curvature_average import Denominator, refresh_averages
from hesscale_lightning.optim.diagonals import clear_diagonals, missing_diagonal_error, peek_diagonal
from hesscale_lightning.optim.gradient_rescaling import GradientRescaling, GroupScale
from hesscale_lightning.optim.hyperparameters import check_denominator, use_foreach
from hesscale_lightning.optim.parameter_state import state_dtype
from hesscale_lightning.optim.radius import CalibratedRadius, Made, Regions, calibration
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
from hesscale_lightning.optim.tensor_lists import add_one, beside, inner_product, large_on_cpu, sum_of_scalars
from hesscale_lightning.optim.trust_region import (
    flatten_statistics,
    mean_abs,
    predicted_decrease,
    trust_region_scale,
)

_STATE_KEY = "step_size_scaling"
_PREFIX = "step_size_scaling_"  # of the averages' names in a parameter's own state


class _GroupStep(NamedTuple):
    """What the latest step did to one param group; ``back`` holds old minus proposed parameters.

    ``curvature_along`` is of the proposal, ``scale`` what was taken of it.
    """

    params: list[Tensor]
    back: list[Tensor]
    scale: float | Tensor
    curvature_along: float | Tensor
    grad_scale: GroupScale
    maximize: bool


class StepSizeScaling(Optimizer):
    r"""Shorten an optimizer's step where the quadratic model says that it is too long.

    The wrapped optimizer proposes a step :math:`u`. With :math:`D` the running average of curvature (see
    ``denominator``), every param group takes

    .. math::

        \theta \leftarrow \theta + u \min\left(1, \sqrt{2\delta / \sum_i D_i u_i^2}\right)

    so that the second-order term of no group's step exceeds ``delta``, in units of the loss. Groups have their own
    regions: put networks whose curvature differs, such as an actor and a critic, into groups of their own. A step
    that fits is left as it is, bit for bit.

    It is an optimizer itself, to be passed to learning-rate schedulers, a ``GradScaler`` or Lightning in place of the
    wrapped one, with which it shares ``param_groups`` and ``state``. Its ``state_dict`` is the wrapped optimizer's with
    one more entry, so either can load the other's checkpoint. Weight decay counts as part of the step.

    Attributes:
        awaits_diagonals: see :class:`AdaHesScale`.

    Args:
        optimizer: the optimizer to wrap. Not LBFGS, which moves several times within a step, and not
            :class:`AdaHesScale`, which has ``delta`` itself.
        delta: radius of the trust region (default: 1e-4). A group's own radius is its ``scaling_delta``.
        beta: decay rate of the curvature average, which counts only steps with a new diagonal (default: 0.999).
        denominator: how the average is formed, "rms" (root of the average square) or "abs" (average absolute value)
            (default: "rms").
        damping: this fraction of the group's mean curvature (of the root of the mean square for "rms") is added to D
            (default: 0.0).
        radius: what ``delta`` is measured in, if it is not the quadratic model's own units; a group's own is its
            ``scaling_radius`` (default: None). The region is that of the step that the wrapped optimizer proposes, with
            its learning rate.

    Raises:
        TypeError: if ``optimizer`` cannot be wrapped.
        ValueError: if a hyperparameter is out of its range.
        RuntimeError: in ``step``, if a parameter has a gradient and has never had a diagonal.

    Example:
        >>> import torch
        >>> from hesscale_lightning.optim import StepSizeScaling
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = StepSizeScaling(torch.optim.SGD([weight], lr=100.0), delta=0.5)
        >>> loss = (2 * weight**2).sum()
        >>> loss.backward()  # with hesscale_lightning.attach(loss) before it, the next line is not needed
        >>> weight.hess_diag = torch.tensor([4.0])
        >>> optimizer.step()
        >>> print(f"{weight.item():.2f}, {optimizer.stats['scale'].item():.5f}")
        0.50, 0.00125

    The use of HesScale for step-size scaling is from Elsayed, Farrahi, Dangel, Mahmood, `Revisiting Scalable Hessian
    Diagonal Approximations for Applications in Reinforcement Learning <https://arxiv.org/abs/2406.03276>`_, ICML 2024.
    """

    optimizer: Optimizer
    delta: float
    beta: float
    denominator: str
    damping: float
    radius: CalibratedRadius | None
    curvature: dict[Tensor, dict[str, Tensor]]
    _regions: Regions

    def __init__(
        self,
        optimizer: Optimizer,
        delta: float = 1e-4,
        *,
        beta: float = 0.999,
        denominator: Denominator = "rms",
        damping: float = 0.0,
        radius: CalibratedRadius | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, AdaHesScale):
            raise TypeError("AdaHesScale has a trust region of its own: pass delta to it instead of wrapping it")
        if isinstance(optimizer, StepSizeScaling):
            raise TypeError("the optimizer is a StepSizeScaling already: set its delta instead")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("LBFGS moves the parameters several times in one step, which cannot be scaled as one step")
        if not delta > 0:
            raise ValueError(f"delta must be > 0, got {delta}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {beta}")
        if not damping >= 0:
            raise ValueError(f"damping must be >= 0, got {damping}")
        check_denominator(denominator)
        # Not Optimizer.__init__, which would make param groups of its own: this object is a view of another's.
        self.__setstate__(
            {
                "optimizer": optimizer,
                "delta": delta,
                "beta": beta,
                "denominator": denominator,
                "damping": damping,
                "radius": radius,
                "curvature": {},
                "_regions": Regions("scaling_delta"),
            }
        )

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's param groups, the very objects."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state. The curvature averages are in ``curvature``, by parameter."""
        return self.optimizer.state

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "delta", "beta", "denominator", "damping", "radius", "curvature", "_regions")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            {"damping": 0.0, "radius": None, "_regions": Regions("scaling_delta")}
        )  # unknown to old ones
        self.__dict__.update(state)  # first, because param_groups and defaults look into the wrapped optimizer
        super().__setstate__(state)
        # Hooks registered here on the state dict belong to the state dict that is written.
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            name = f"_optimizer_{kind}_hooks"
            setattr(self, name, getattr(self.optimizer, name))
        self._buffers: dict[Tensor, Tensor] = {}
        self._on_trial = False  # whether the averages are those of a trial step, which nothing has been loaded into
        self.awaits_diagonals = True
        self._reset_groups()

    def _reset_groups(self) -> None:
        self._latest: list[_GroupStep] = []
        self._rescaling = GradientRescaling(self.param_groups)
        for index, group in enumerate(self.param_groups):
            group.setdefault("scaling_delta", self.delta)
            radius = group.pop("scaling_radius", self.radius)  # it holds a function: no part of the state
            if radius is not None:
                refuse_radius(group["params"])
            if index >= len(self.radii):
                self._regions.add_group(group, radius)

    @property
    def radii(self) -> list[CalibratedRadius | None]:
        """What each group's ``scaling_delta`` is measured in. Entries may be exchanged."""
        return self._regions.radii

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the wrapped optimizer; it may set its own ``scaling_delta``."""
        options = {**self.defaults, "scaling_delta": self.delta, **param_group}
        self._regions.check(options, param_group.get("scaling_radius", self.radius))
        self.optimizer.add_param_group(param_group)
        self._reset_groups()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients and drop the diagonals of all optimized parameters."""
        self.optimizer.zero_grad(set_to_none)
        clear_diagonals(self.param_groups)
        self.awaits_diagonals = True

    def record_gradients(self) -> None:
        """Declare that gradients and diagonals, as they are now, belong to the same loss.

        See :meth:`AdaHesScale.record_gradients`.
        """
        self._rescaling.record()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A GradScaler's question; see AdaHesScale.
        self._rescaling.scaler_asked = True
        return False

    def state_dict(self) -> StateDict:
        """The wrapped optimizer's state dict with the curvature averages as entry ``step_size_scaling``.

        Where parameters are DTensors, the averages are in each parameter's state, as ``step_size_scaling_hess_step``
        and ``step_size_scaling_exp_avg_hess``: ``torch.distributed.checkpoint`` saves nothing else.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        averages = {index: dict(self.curvature[p]) for index, p in enumerate(params) if p in self.curvature}
        written = self.optimizer.state_dict()
        if not any(is_distributed(param) for param in params):
            return {**written, _STATE_KEY: averages}
        states = dict(written["state"])
        for index, average in averages.items():
            states[index] = {**states.get(index, {}), **{_PREFIX + name: value for name, value in average.items()}}
        return {**written, "state": states}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class, or one of the wrapped optimizer, with which the averages start anew.

        Raises:
            ValueError: if its ``scaling_delta`` is measured in something else. Nothing is loaded then.
        """
        self._regions.check_saved(state_dict["param_groups"])
        deltas = [group["scaling_delta"] for group in self.param_groups]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        averages = {keys.index(key): saved for key, saved in _averages_within(state_dict["state"]).items()}
        averages |= state_dict.get(_STATE_KEY, {})
        states = {
            key: {name: value for name, value in state.items() if not str(name).startswith(_PREFIX)}
            for key, state in state_dict["state"].items()
        }
        own = {k: v for k, v in state_dict.items() if k != _STATE_KEY}
        self.optimizer.load_state_dict(
            {**own, "state": {k: v for k, v in states.items() if v or not state_dict["state"][k]}}
        )
        for group, delta in zip(self.param_groups, deltas, strict=True):
            group.setdefault("scaling_delta", delta)
        params = [param for group in self.param_groups for param in group["params"]]
        self.curvature.clear()
        for index, saved in averages.items():
            if saved["hess_step"] == 0:  # saved before the first diagonal
                continue
            param = params[index]
            self.curvature[param] = {
                "hess_step": saved["hess_step"].detach().clone(),
                "exp_avg_hess": saved["exp_avg_hess"].detach().to(param.device, state_dtype(param), copy=True),
            }
        self._on_trial = False
        self._reset_groups()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Let the wrapped optimizer step, then pull the parameters back into the trust region.

        Args:
            closure: reevaluates the model, calls backward with curvature attached, and returns the loss; evaluated
            once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._on_trial:
            self.curvature.clear()
            self._on_trial = False
        if not self.curvature and is_trial(self.param_groups):
            self.optimizer.step()
            self._make_averages()
            return loss
        moving = [self._gather(index) for index in range(len(self.param_groups))]
        grad_scales = self._rescaling.take()
        for params in moving:
            self._remember(params)
        self.optimizer.step()
        self._latest = [
            self._scale_group(index, params, grad_scale)
            for index, (params, grad_scale) in enumerate(zip(moving, grad_scales, strict=True))
        ]
        if any(self.radii):
            self._calibrate()
        self.awaits_diagonals = False
        return loss

    def _make_averages(self) -> None:
        """Those of a trial step, for a checkpoint to be loaded into; the first real step begins anew."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.curvature[param] = _new_average(param)
        self._on_trial = True

    def _calibrate(self) -> None:
        """Measure how far the step went; take back what was much too far, complete what was a trial."""
        latest = self._latest

        def made(index: int) -> Made:
            step = latest[index]
            return Made(step.curvature_along * step.scale * step.scale / 2, step.scale)

        rates = [1.0] * len(latest)  # they are in the proposals
        for index, factor in self._regions.observe(self.param_groups, made, rates).items():
            step = latest[index]
            _pull_back(step.params, step.back, step.scale * (1 - factor))
            latest[index] = step._replace(scale=step.scale * factor)

    def _gather(self, group_index: int) -> list[Tensor]:
        """The parameters of one group that will move, each with a diagonal or an average; nothing changes."""
        group = self.param_groups[group_index]
        place_gradients(group["params"])
        moving = []
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            check_placements(param, "grad", param.grad)
            if peek_diagonal(param) is None and param not in self.curvature:
                raise missing_diagonal_error("StepSizeScaling", group_index, index, group)
            moving.append(param)
        return moving

    def _remember(self, params: list[Tensor]) -> None:
        """Copy the parameters as they are before the step."""
        for param in params:
            if param not in self._buffers:
                self._buffers[param] = torch.empty_like(local(param), dtype=state_dtype(param))
        if params:
            torch._foreach_copy_([self._buffers[param] for param in params], [local(p) for p in params])

    def _scale_group(self, index: int, params: list[Tensor], grad_scale: GroupScale) -> _GroupStep:
        group = self.param_groups[index]
        back = [self._buffers[param] for param in params]
        along: float | Tensor = 0.0
        squares: float | Tensor = 0.0
        curvature: float | Tensor = 0.0
        batches = _by_device_and_dtype(params)
        for batch in batches:
            self._refresh(batch, grad_scale.unscaling)
            steps = [self._buffers[param] for param in batch]
            where = layout(batch[0])
            if use_foreach(None, batch):
                torch._foreach_sub_(steps, batch)
            else:
                for step, param in zip(steps, batch, strict=True):
                    step.sub_(local(param))
            part = total(self._curvature_along(batch, steps), where)
            along = beside(along, part) + beside(part, along)
            if self.damping:
                square = total(sum_of_scalars([inner_product(step, step) for step in steps]), where)
                squares = beside(squares, square) + beside(square, squares)
                part = total(self._sum_of_averages(batch), where)
                curvature = beside(curvature, part) + beside(part, curvature)
        if self.damping and batches:
            mean = curvature / max(sum(param.numel() for param in params), 1)
            along = along + self.damping * (mean**0.5 if self.denominator == "rms" else mean) * squares
        limit = self._regions.limit(index, group)
        assert limit is not None
        scale = trust_region_scale(limit, along)
        if isinstance(scale, Tensor) or scale < 1:
            _pull_back(params, back, 1 - scale)  # exactly the proposal where the scale is 1
        return _GroupStep(params, back, scale, along, grad_scale, bool(group.get("maximize", False)))

    def _refresh(self, params: list[Tensor], unscaling: float | Tensor) -> None:
        """Move the averages of parameters of one device and dtype, and consume their diagonals."""
        states, diagonals = [], []
        for param in params:
            diagonal = peek_diagonal(param)
            if diagonal is None:
                continue
            if param not in self.curvature:
                self.curvature[param] = _new_average(param)
            states.append(self.curvature[param])
            diagonals.append(diagonal)
            param.hess_diag = None  # type: ignore[attr-defined]
        add_one([state["hess_step"] for state in states])
        refresh_averages(
            [local(state["exp_avg_hess"]) for state in states],
            [local(diagonal) for diagonal in diagonals],
            self.beta,
            self.denominator,
            beside(unscaling, params[0]),
            foreach=use_foreach(None, params),
        )

    def _sum_of_averages(self, params: list[Tensor]) -> float | Tensor:
        """The sum of the running averages, with their bias corrected, over parameters of one device and dtype."""
        states = [self.curvature[param] for param in params]
        return sum_of_scalars(
            [local(state["exp_avg_hess"]).sum() / (1 - self.beta ** state["hess_step"].item()) for state in states]
        )

    def _curvature_along(self, params: list[Tensor], steps: list[Tensor]) -> float | Tensor:
        """``sum D u^2`` over parameters of one device and dtype."""
        states = [self.curvature[param] for param in params]
        units = [1 - self.beta ** state["hess_step"].item() for state in states]
        averages = [local(state["exp_avg_hess"]) for state in states]
        rooted = self.denominator == "rms"
        if rooted:
            units = [unit**0.5 for unit in units]
        if use_foreach(None, params) and not large_on_cpu(averages):
            products = torch._foreach_sqrt(averages) if rooted else torch._foreach_abs(averages)
            torch._foreach_mul_(products, steps)
            torch._foreach_mul_(products, steps)
            terms = list(torch._foreach_norm(products, 1))
        else:
            terms = [
                inner_product((average.sqrt() if rooted else average.clone()).mul_(step), step)
                for average, step in zip(averages, steps, strict=True)
            ]
        return sum_of_scalars([term / unit for term, unit in zip(terms, units, strict=True)])

    @property
    def stats(self) -> dict[str, Tensor]:
        """Scalar tensors that describe the latest step, named as in :attr:`AdaHesScale.stats`."""
        described = [_describe(latest) for latest in self._latest]
        for statistics, group, radius in zip(described, self.param_groups, self.radii, strict=False):
            if radius is not None:
                statistics["calibration"] = calibration(group) or math.nan
        return flatten_statistics(described)


def _new_average(param: Tensor) -> dict[str, Tensor]:
    average = torch.zeros_like(param, dtype=state_dtype(param), memory_format=torch.preserve_format)
    return {"hess_step": torch.zeros(()), "exp_avg_hess": average}


def _averages_within(states: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Tensor]]:
    """The curvature averages that stand in parameters' own states."""
    found = {
        key: {name[len(_PREFIX) :]: value for name, value in state.items() if str(name).startswith(_PREFIX)}
        for key, state in states.items()
    }
    return {key: average for key, average in found.items() if average}


def _pull_back(params: list[Tensor], back: list[Tensor], fraction: float | Tensor) -> None:
    """Undo a fraction of a step."""
    for param, step in zip(params, back, strict=True):
        rest = beside(fraction, param)
        part = local(param)
        part.add_(step * rest) if isinstance(rest, Tensor) else part.add_(step, alpha=rest)


def _by_device_and_dtype(params: list[Tensor]) -> list[list[Tensor]]:
    batches: dict[Any, list[Tensor]] = {}
    for param in params:
        batches.setdefault((param.device, param.dtype, layout(param)), []).append(param)
    return list(batches.values())


@torch.no_grad()
def _describe(latest: _GroupStep) -> dict[str, Any]:
    statistics: dict[str, Any] = {"scale": latest.scale, "clipping": latest.grad_scale.clipping}
    if latest.params:
        places = [layout(param) for param in latest.params]
        steps = [step * -latest.scale for step in latest.back]
        statistics["mean_abs_update"] = mean_abs(steps, places)
        along = latest.curvature_along * latest.scale * latest.scale
        sign = -1 if latest.maximize else 1
        grads = [None if param.grad is None else local(param.grad) * sign for param in latest.params]
        decrease = predicted_decrease(grads, steps, along, latest.grad_scale.clipping, places)
        if decrease is not None:
            statistics["predicted_decrease"] = decrease
    return statistics

"""How far the diagonal at a network's output is from double backward's, in the losses of real train() calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from hesscale_lightning.curvature import attach, exact_hess_diag
from sb3_integration.loss_seam import LossSeam, optimizers_of
from tests.sb3.cases import Case

TOLERANCE = 1e-6


_SUMMED = (
    "gSDE with one standard deviation per feature: log_std is not at the output but below a matrix that mixes actions"
)
_TWICE = "gSDE: log_std is not at the output, and the noise of its sample meets its variance beyond a matrix product"


def inexact(case: Case) -> str | None:
    """Why the diagonal of ``log_std`` is not exact; None if it is. All other outputs are exact in every case."""
    if str(case) == "PPO-Box-gSDE-one-std-per-feature":
        return _SUMMED
    on_its_own_sample = case.algorithm.__name__ in ("SAC", "TQC", "CrossQ")
    return _TWICE if on_its_own_sample and case.setting.startswith("gSDE") else None


_measured: dict[str, dict[str, float]] = {}


def output_errors(case: Case) -> dict[str, float]:
    """The relative error of the diagonal at each output, the largest over the first losses of a short run in float64.

    An error is the largest over all entries, relative to the largest exact entry. A case is measured once.
    """
    if str(case) not in _measured:
        _measured[str(case)] = _measure(case)
    return _measured[str(case)]


def _measure(case: Case) -> dict[str, float]:
    # With radius="kl" the actor's diagonal is not the loss's.
    model = case.build(policy_options={"radius": "loss"})
    in_double(model)
    comparison = Comparison(model.policy)
    with default_dtype(torch.float64):
        model.learn(case.timesteps)
    return comparison.errors


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_double(model: Any) -> None:
    """Casts the networks, data of the buffers, and observations, which Stable-Baselines3 keeps in float32."""
    model.policy.double()
    buffer = model.rollout_buffer if hasattr(model, "rollout_buffer") else model.replay_buffer
    buffer.to_torch = lambda array, copy=True: torch.tensor(array, dtype=torch.float64)
    for module in model.policy.modules():
        if isinstance(module, (BaseFeaturesExtractor, nn.LSTM)):
            module.register_forward_pre_hook(lambda _, args: _double(args))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, Mapping):
        return {key: _double(part) for key, part in value.items()}
    return tuple(map(_double, value))


def outputs_of(policy: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """What a policy's networks put out: last linear layers, before any squashing, and free standard deviations."""
    found: dict[str, Any] = {}
    actor = getattr(policy, "actor", None)
    for name, owner in {"action_net": policy, "value_net": policy, "mu": actor, "log_std": actor}.items():
        found[name] = getattr(owner, name, None)
    found["log_std"] = getattr(policy, "log_std", found["log_std"])
    for name in ("q_net", "quantile_net"):
        found[name] = getattr(policy, name, None)
    if actor is not None:
        found.update({f"q{k}": network for k, network in enumerate(policy.critic.q_networks)})
    return {
        name: output if isinstance(output, nn.Parameter) else [m for m in output.modules() if type(m) is nn.Linear][-1]
        for name, output in found.items()
        if output is not None
    }


class Comparison:
    """Stands in the policy's seam, and compares the diagonals at the outputs before the optimizer takes them.

    Args:
        policy: A policy of sb3_integration.
        losses: How many losses to compare; double backward takes its time.
    """

    def __init__(self, policy: Any, losses: int = 6) -> None:
        self.errors: dict[str, float] = {}
        self._losses = losses
        self._seam: LossSeam = policy.seam
        self._outputs: dict[str, Tensor] = {}
        self._exact: dict[str, Tensor] = {}
        self._armed: Any = None
        for name, output in outputs_of(policy).items():
            if isinstance(output, nn.Module):
                output.register_forward_hook(lambda _, __, result, name=name: self._note(name, result))
            else:
                self._outputs[name] = output
        policy.seam.attach = self.attach

    def _note(self, name: str, result: Tensor) -> None:
        if result.requires_grad:
            self._outputs[name] = result

    def attach(self, loss: Tensor) -> Any:
        """As the seam's own, also for the outputs."""
        if self._losses == 0:
            return LossSeam.attach(self._seam, loss)
        self._losses -= 1
        waiting = [o for o in optimizers_of(self._seam.policy) if getattr(o, "awaits_diagonals", False)]
        reached = torch.autograd.grad(loss, list(self._outputs.values()), retain_graph=True, allow_unused=True)
        outputs = {n: o for (n, o), g in zip(self._outputs.items(), reached, strict=True) if g is not None}
        exact = exact_hess_diag(loss, outputs.values())
        params = [p for o in waiting for group in o.param_groups for p in group["params"]]
        self._exact = dict(zip(outputs, exact, strict=True))
        self._armed = attach(loss, {*params, *outputs.values()}, method=self._seam.method)
        return self

    def remove(self) -> None:
        """Called when backward has ended."""
        for name, exact in self._exact.items():
            h = self._outputs[name].hess_diag
            assert h.dtype is torch.float64
            scale = exact.abs().max().item()
            error = (h - exact).abs().max().item()
            if error:
                error = error / scale if scale else float("inf")
            self.errors[name] = max(self.errors.get(name, 0.0), error)
        self._armed.remove()

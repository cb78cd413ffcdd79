"""Find the factor by which gradients were multiplied between backward and step.

``torch.nn.utils.clip_grad_norm_`` and ``GradScaler.unscale_`` multiply every gradient by one factor and know nothing of
the Hessian diagonal, so a step g/h would silently shrink by that factor.

The factor is found from a fingerprint. Hooks on two small parameters of each param group note the norm of the gradient
that backward delivered (the accumulated one, so several backward passes are no special case); ``step`` compares it with
the norm it finds. The factor is believed only if it is the same on every parameter that tells something, and only for
the very tensor that was noted; in doubt it is 1, which leaves everything as it is.

What to do with it depends on what it is. A *clipping* factor weakens a batch against other batches; the diagonal is
still that of the loss. A *loss scale* is in the diagonal too and has to leave it. Norms cannot tell the two apart, but
a ``GradScaler`` asks an optimizer for ``_step_supports_amp_scaling`` before it steps, and that question is noted.
"""

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hesscale_lightning.optim.parameter_state import state_dtype
from hesscale_lightning.optim.sharded import is_distributed
from hesscale_lightning.optim.tensor_lists import never_compiled

PROBES_PER_GROUP = 2
_AGREEMENT = 1e-3  # largest relative difference at which two probes still tell the same factor


class GroupScale(NamedTuple):
    """How one param group's gradients were rescaled since backward.

    Attributes:
        clipping: factor that reached the gradients and is none of the diagonals' business.
        unscaling: factor by which the diagonals still have to be multiplied, as the gradients were.
    """

    clipping: float | Tensor
    unscaling: float | Tensor


class GradientRescaling:
    """Watches the gradients of all param groups of one optimizer.

    Args:
        param_groups: the groups to watch at first.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]] = ()) -> None:
        self._probes = [place_probes(group["params"]) for group in param_groups]
        self.scaler_asked = False  # a GradScaler is about to call step

    def add_group(self, group: dict[str, Any]) -> None:
        """Watch one more group."""
        self._probes.append(place_probes(group["params"]))

    def record(self) -> None:
        """Note all gradients as they are now, and that the diagonals belong to them as they are."""
        for probes in self._probes:
            for probe in probes:
                probe.note(recorded=True)

    @never_compiled
    def take(self) -> list[GroupScale]:
        """The factors of each group since backward or :meth:`record`; they can be taken once."""
        scaled, self.scaler_asked = self.scaler_asked, False
        scales = []
        for probes in self._probes:
            recorded = any(probe.recorded for probe in probes)
            factor = gradient_factor(probes)
            scales.append(GroupScale(1.0, factor) if scaled and not recorded else GroupScale(factor, 1.0))
        return scales


class GradientProbe:
    """Remembers one parameter's gradient norm as backward delivered it.

    The hook on the parameter refers to the probe weakly and is removed with it, so an optimizer that is dropped leaves
    nothing behind on the model.

    Args:
        param: a leaf that requires grad.
    """

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.grad: Tensor | None = None
        self.norm: Tensor | None = None
        self.recorded = False
        probe = weakref.ref(self)

        def note(_: Tensor) -> None:
            alive = probe()
            if alive is not None:
                alive.note()

        handle = param.register_post_accumulate_grad_hook(note)
        weakref.finalize(self, handle.remove)

    def note(self, recorded: bool = False) -> None:
        """Note the gradient as it is now, either because backward delivered it or because it was ``recorded``."""
        grad = self.param.grad
        self.grad = self.norm = None
        self.recorded = recorded
        if grad is not None and not grad.is_sparse:
            self.grad, self.norm = grad, _norm(grad)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The norms (noted, now), or None if the gradient at hand is not the tensor that was noted; drops the note."""
        grad, norm = self.grad, self.norm
        self.grad = self.norm = None
        self.recorded = False
        if grad is None or norm is None or self.param.grad is not grad:
            return None
        return norm, _norm(grad)


def _norm(grad: Tensor) -> Tensor:
    if grad.requires_grad:  # backward(create_graph=True)
        grad = grad.detach()
    dtype = state_dtype(grad)
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=None if dtype == grad.dtype else dtype)
    # Of a DTensor it is the norm of this process's part until it is gathered, another number in every process.
    return norm.full_tensor() if is_distributed(norm) else norm  # type: ignore[attr-defined]


def place_probes(params: Sequence[Tensor]) -> list[GradientProbe]:
    """Probes on the smallest trainable parameters: their norms cost least, and any uniform factor shows there."""
    trainable = [p for p in params if p.requires_grad and p.is_leaf and p.numel() > 0]
    return [GradientProbe(p) for p in sorted(trainable, key=Tensor.numel)[:PROBES_PER_GROUP]]


def gradient_factor(probes: Iterable[GradientProbe]) -> float | Tensor:
    """The common factor of all gradients since they were noted, or 1 if the probes know none or disagree.

    Returns:
        A float where the gradients lie on the CPU, else a scalar tensor on their device, so that nothing waits.
    """
    pairs = [pair for probe in probes if (pair := probe.take()) is not None]
    if not pairs:
        return 1.0
    if pairs[0][0].is_cpu:
        return _factor_on_host([(noted.item(), now.item()) for noted, now in pairs])
    return _factor_on_device(pairs)


def _factor_on_host(norms: list[tuple[float, float]]) -> float:
    factors = [now / noted for noted, now in norms if noted > 0 and math.isfinite(noted)]
    factors = [factor for factor in factors if factor > 0 and math.isfinite(factor)]
    if not factors or max(factors) - min(factors) > _AGREEMENT * max(factors):
        return 1.0
    return factors[0]


def _factor_on_device(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    device = pairs[0][0].device
    noted = torch.stack([pair[0].to(device, torch.float32) for pair in pairs])
    now = torch.stack([pair[1].to(device, torch.float32) for pair in pairs])
    factors = now / noted
    telling = (noted > 0) & (factors > 0) & factors.isfinite() & noted.isfinite()
    largest = factors.where(telling, 0.0).max()
    smallest = factors.where(telling, torch.inf).min()
    agreed = telling.any() & (largest - smallest <= _AGREEMENT * largest)
    return largest.where(agreed, 1.0)

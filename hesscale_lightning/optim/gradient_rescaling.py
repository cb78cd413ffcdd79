"""Find the factor by which gradients were multiplied between backward and step.

``torch.nn.utils.clip_grad_norm_`` and ``GradScaler.unscale_`` multiply every gradient by one factor and know nothing of
the Hessian diagonal. The step g/h would silently shrink by that factor. Both quantities are linear in the loss, so the
consistent treatment is to multiply the diagonal by the same factor, as if the loss itself had been rescaled.

The factor is found from a fingerprint. Hooks on two small parameters of each param group note the norm of the gradient
that backward delivered (the accumulated one, so several backward passes are no special case); ``step`` compares it with
the norm it finds. The factor is believed only if it is the same on every parameter that tells something, and only for
the very tensor that was noted; in doubt it is 1, which leaves the diagonal alone.
"""

import math
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hesscale_lightning.optim.diagonals import state_dtype

PROBES_PER_GROUP = 2
_AGREEMENT = 1e-3  # largest relative difference at which two probes still tell the same factor


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
        probe = weakref.ref(self)

        def note(_: Tensor) -> None:
            alive = probe()
            if alive is not None:
                alive.note()

        handle = param.register_post_accumulate_grad_hook(note)
        weakref.finalize(self, handle.remove)

    def note(self) -> None:
        """Note the gradient as it is now."""
        grad = self.param.grad
        if grad is None or grad.is_sparse:
            self.grad = self.norm = None
            return
        self.grad = grad
        self.norm = _norm(grad)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The norms (noted, now), or None if the gradient at hand is not the tensor that was noted; drops the note."""
        grad, norm = self.grad, self.norm
        self.grad = self.norm = None
        if grad is None or norm is None or self.param.grad is not grad:
            return None
        return norm, _norm(grad)


def _norm(grad: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(grad.detach(), dtype=state_dtype(grad))
    return norm


def place_probes(params: Sequence[Tensor]) -> list[GradientProbe]:
    """Probes on the smallest trainable parameters: their norms cost least, and any uniform factor shows there."""
    trainable = [p for p in params if p.requires_grad and p.is_leaf and p.numel() > 0]
    return [GradientProbe(p) for p in sorted(trainable, key=Tensor.numel)[:PROBES_PER_GROUP]]


def gradient_rescaling(probes: Iterable[GradientProbe]) -> float | Tensor:
    """The common factor of all gradients since backward, or 1 if the probes know none or disagree.

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

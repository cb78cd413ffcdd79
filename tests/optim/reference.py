"""The optimizers' equations, written as plainly as possible in float64: the oracle of the tests."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Params = list[torch.nn.Parameter]


@dataclass
class ReferenceAdaHesScale:
    """One param group, one call per step; a diagonal of None leaves the average as it is."""

    params: list[Tensor]
    options: dict[str, Any]
    m: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    grad_weight: float = 0.0
    hess_weight: list[float] = field(default_factory=list)
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.params = [p.detach().double().clone() for p in self.params]
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.hess_weight = [0.0] * len(self.params)

    def step(self, grads: list[Tensor], diagonals: list[Tensor | None], clipping: float = 1.0) -> None:
        o = self.options
        beta1, beta2 = o.get("betas", (0.9, 0.999))
        eps, denominator = o.get("eps", 1e-8), o.get("denominator", "rms")
        max_update, delta = o.get("max_update", 10.0), o.get("delta", 1e-4)
        damping = o.get("damping", 0.0)
        lr = float(o.get("lr", 1e-2)) * o.get("lr_scale", 1.0)
        self.grad_weight = beta1 * self.grad_weight + (1 - beta1) * clipping
        updates, curvatures = [], []
        for i, h in enumerate(diagonals):
            if h is not None:
                h = h.double() * clipping
                weight = clipping**2 if denominator == "rms" else clipping
                self.hess_weight[i] = beta2 * self.hess_weight[i] + (1 - beta2) * weight
                self.v[i] = beta2 * self.v[i] + (1 - beta2) * (h**2 if denominator == "rms" else h.abs())
        averages = torch.cat([(v / w).flatten() for v, w in zip(self.v, self.hess_weight, strict=True)])
        mean = averages.mean().sqrt() if denominator == "rms" else averages.mean()
        for i, g in enumerate(grads):
            g = -g.double() if o.get("maximize", False) else g.double()
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            # without clipping the sums of weights are the bias corrections, 1 - beta^t
            m_hat = self.m[i] / self.grad_weight
            v_hat = self.v[i] / self.hess_weight[i]
            if denominator == "sqrt_abs":
                divisor = (v_hat + damping * mean).sqrt() + eps
            else:
                divisor = (v_hat if denominator == "abs" else v_hat.sqrt()) + damping * mean + eps
            u = m_hat / divisor
            updates.append(u if max_update is None else u.clamp(-max_update, max_update))
            curvatures.append(divisor**2 if denominator == "sqrt_abs" else divisor)
        along = sum((d * (lr * u) ** 2).sum().item() for d, u in zip(curvatures, updates, strict=True))
        self.scale = 1.0 if delta is None else min(1.0, math.sqrt(2 * delta / along))
        for i, u in enumerate(updates):
            decayed = (1 - lr * o.get("weight_decay", 0.0)) * self.params[i]
            self.params[i] = decayed - self.scale * lr * u


SHAPES = [(5, 4), (5,), (3, 5), (3,), (2, 3, 2, 2), ()]


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0, shapes: list[Any] = SHAPES) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def random_like(params: Params, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]


def deliver(params: Params, grads: list[Tensor], diagonals: list[Tensor] | None) -> None:
    """Put gradients and diagonals where a backward pass with curvature leaves them."""
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        param.grad = grad.clone()
        if diagonals is not None:
            param.hess_diag = diagonals[index].clone()  # type: ignore[attr-defined]


def quadratic_backward(params: Params, curvature: float = 2.0, scale: float = 1.0) -> Tensor:
    """Backward of ``scale * sum(curvature / 2 * p^2)`` with its diagonal added up in hess_diag, as the engine does."""
    loss = scale * sum(((curvature / 2) * p.float() ** 2).sum() for p in params)
    assert isinstance(loss, Tensor)
    loss.backward()
    for p in params:
        h = torch.full(p.shape, scale * curvature, dtype=torch.promote_types(p.dtype, torch.float32))
        old = getattr(p, "hess_diag", None)
        p.hess_diag = h if old is None else old + h  # type: ignore[attr-defined]
    return loss

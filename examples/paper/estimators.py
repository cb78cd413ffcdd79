"""Estimates of the Hessian's diagonal beside HesScale's, and the exact diagonal, for classifiers of few layers.

All of them are for the mean cross-entropy over a batch, and take many batches at once: inputs of shape
(batches, size, ...), classes of shape (batches, size). Each returns one tensor of shape (batches, *parameter.shape) for
each parameter, in the order of ``model.parameters()``.

In a sequence of layers a weight meets the network only in ``z[t] = W u[t] + b`` (t: the positions of a convolution; a
linear layer has one). So derivatives at the layers' outputs z are enough, which makes even the exact diagonal cheap:

    exact   d2L/dW_ij^2 = sum_ts u_tj u_sj (d2L / dz_ti dz_si)
    GGN     sum_k (sum_t u_tj (J_k)_ti)^2 with J_k = (dlogits/dz)^T s_k, where sum_k s_k s_k^T is the loss's Hessian in
            the logits (exact), or has it as its mean (Monte Carlo: gradients for classes drawn from the prediction)
    K-FAC   (mean_n sum_t u_tj^2) (mean_nt sum_k (J_k)_ti^2)

Sources: Dangel, Kunstner, Hennig, "BackPACK: Packing more into backprop", ICLR 2020 (GGN); Martens and Grosse,
"Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, and Grosse and Martens, "A
Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016; Hutchinson's estimate as in Yao et al.,
"AdaHessian: An Adaptive Second Order Optimizer for Machine Learning", AAAI 2021.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from hesscale_lightning.curvature import attach
from hesscale_lightning.curvature.engine import METHODS

Diagonals = list[Tensor]
Estimator = Callable[[nn.Sequential, Tensor, Tensor, torch.Generator], Diagonals]


@dataclass(frozen=True)
class Layer:
    """One use of a weight: inputs u of shape (batches, size, positions, inputs) and the layer's output z."""

    u: Tensor
    z: Tensor

    def at_positions(self, signals: Tensor) -> Tensor:
        """Bring signals of shape (count, *z.shape) to (count, batches, size, positions, outputs)."""
        count = len(signals)
        return signals.reshape(count, *self.u.shape[:2], self.z.shape[1], -1).transpose(-1, -2)


def forward(model: nn.Sequential, x: Tensor) -> tuple[Tensor, list[Layer]]:
    """Logits of shape (batches * size, classes), and what every layer with parameters did."""
    batches, size = x.shape[:2]
    out, layers = x.flatten(0, 1), []
    for module in model:
        if isinstance(module, nn.Conv2d):
            u = F.unfold(out.detach(), module.kernel_size, module.dilation, module.padding, module.stride).mT
        else:
            u = out.detach().unsqueeze(1)
        out = module(out)
        if isinstance(module, nn.Linear | nn.Conv2d):
            layers.append(Layer(u.view(batches, size, *u.shape[1:]), out))
        elif [*module.parameters()]:
            raise TypeError(f"Found a {type(module).__name__}, expected parameters in Linear and Conv2d layers only.")
    return out, layers


def per_parameter(model: nn.Sequential, weights: Diagonals, biases: Diagonals) -> Diagonals:
    """Weight and bias of each layer in turn, in their parameters' shapes."""
    both = [part for pair in zip(weights, biases, strict=True) for part in pair]
    return [part.reshape(-1, *p.shape) for part, p in zip(both, model.parameters(), strict=True)]


def exact(model: nn.Sequential, x: Tensor, y: Tensor, generator: torch.Generator) -> Diagonals:
    """The exact diagonal, from each sample's dense Hessian at every layer's output."""
    logits, layers = forward(model, x)
    zs = [layer.z for layer in layers]
    gradients = torch.autograd.grad(F.cross_entropy(logits, y.flatten(), reduction="sum"), zs, create_graph=True)
    weights, biases = [], []
    for layer, gradient in zip(layers, gradients, strict=True):
        entries = gradient[0].numel()
        rows = torch.eye(entries, dtype=x.dtype).view(entries, 1, *gradient.shape[1:]).expand(-1, *gradient.shape)
        (hessian,) = torch.autograd.grad(gradient, layer.z, rows, retain_graph=True, is_grads_batched=True)
        # (outputs, positions, samples, outputs, positions) -> (batches, size, outputs, positions, positions)
        shape = (gradient.shape[1], -1, len(gradient), gradient.shape[1], layer.u.shape[2])
        blocks = hessian.reshape(shape).diagonal(dim1=0, dim2=3).permute(1, 3, 0, 2)
        blocks = blocks.reshape(*layer.u.shape[:2], *blocks.shape[1:])
        weights.append(torch.einsum("bnots,bnti,bnsi->boi", blocks, layer.u, layer.u) / x.shape[1])
        biases.append(blocks.sum((-1, -2)).mean(1))
    return per_parameter(model, weights, biases)


def signals_of_ggn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """``s_k = sqrt(p_k) (e_k - p)`` of shape (classes, samples, classes): ``sum_k s_k s_k^T = diag(p) - p p^T``."""
    p = logits.detach().softmax(1)
    return (torch.eye(p.shape[1], dtype=p.dtype)[:, None] - p) * p.sqrt().T[:, :, None]


def signals_by_sampling(count: int, logits: Tensor, generator: torch.Generator) -> Tensor:
    """``(p - e_c) / sqrt(count)`` of shape (count, samples, classes), for classes c drawn from p."""
    p = logits.detach().softmax(1)
    drawn = torch.multinomial(p, count, replacement=True, generator=generator).T
    return (p - F.one_hot(drawn, p.shape[1])) / count**0.5


Signals = Callable[[Tensor, torch.Generator], Tensor]


def backpropagated(logits: Tensor, layers: list[Layer], signals: Tensor) -> list[Tensor]:
    """Signals at every layer's output, of shape (count, batches, size, positions, outputs)."""
    zs = [layer.z for layer in layers]
    if len(signals) == 1:  # without the overhead of vmap
        found = [g.unsqueeze(0) for g in torch.autograd.grad(logits, zs, signals[0], retain_graph=True)]
    else:
        found = torch.autograd.grad(logits, zs, signals, retain_graph=True, is_grads_batched=True)
    return [layer.at_positions(signal) for layer, signal in zip(layers, found, strict=True)]


def ggn_of(model: nn.Sequential, logits: Tensor, layers: list[Layer], signals: Tensor) -> Diagonals:
    """Diagonal of the generalized Gauss-Newton matrix, or its Monte Carlo estimate, from signals at the logits."""
    weights, biases = [], []
    for layer, v in zip(layers, backpropagated(logits, layers, signals), strict=True):
        size = layer.u.shape[1]
        if layer.u.shape[2] == 1:  # (v u)^2 = v^2 u^2
            squares = v.square().sum(0).squeeze(2)
            weights.append(squares.mT @ layer.u.squeeze(2).square() / size)
            biases.append(squares.mean(1))
        else:
            by_sample = (torch.einsum("bnto,bnti->bnoi", one, layer.u).square() for one in v)
            weights.append(sum(by_sample).mean(1))  # type: ignore[union-attr]
            biases.append(v.sum(3).square().sum(0).mean(1))
    return per_parameter(model, weights, biases)


def kfac_of(model: nn.Sequential, logits: Tensor, layers: list[Layer], signals: Tensor) -> Diagonals:
    """Diagonal of K-FAC's Kronecker product; the bias belongs to a constant input of one."""
    weights, biases = [], []
    for layer, v in zip(layers, backpropagated(logits, layers, signals), strict=True):
        positions = layer.u.shape[2]
        outputs = v.square().sum((0, 3)).mean(1) / positions
        inputs = layer.u.square().sum(2).mean(1)
        weights.append(outputs[:, :, None] * inputs[:, None])
        biases.append(outputs * positions)
    return per_parameter(model, weights, biases)


def by_signals(
    diagonal_of: Callable[..., Diagonals],
    signals: Signals,
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
) -> Diagonals:
    """An estimate that needs the logits and signals there, but no labels."""
    logits, layers = forward(model, x)
    return diagonal_of(model, logits, layers, signals(logits, generator))


def squared_gradient(model: nn.Sequential, x: Tensor, y: Tensor, generator: torch.Generator) -> Diagonals:
    """The square of the batch's mean gradient, Adam's stand-in for curvature."""
    logits, layers = forward(model, x)
    gradients = torch.autograd.grad(F.cross_entropy(logits, y.flatten(), reduction="sum"), [one.z for one in layers])
    weights, biases = [], []
    for layer, gradient in zip(layers, gradients, strict=True):
        (v,) = layer.at_positions(gradient.unsqueeze(0))
        weights.append((torch.einsum("bnto,bnti->boi", v, layer.u) / x.shape[1]).square())
        biases.append(v.sum(2).mean(1).square())
    return per_parameter(model, weights, biases)


def hutchinson(probes: int, model: nn.Sequential, x: Tensor, y: Tensor, generator: torch.Generator) -> Diagonals:
    """Mean of ``v * (H v)`` over vectors v of random signs: unbiased, one Hessian-vector product each."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], inputs: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (inputs,)), classes)

    def product(signs: dict[str, Tensor], inputs: Tensor, classes: Tensor) -> dict[str, Tensor]:
        gradient = partial(grad(loss), inputs=inputs, classes=classes)
        return jvp(lambda values: gradient(values), (params,), (signs,))[1]

    total: dict[str, Any] = dict.fromkeys(params, 0.0)
    for _ in range(probes):
        signs = {name: random_signs(p, len(x), generator) for name, p in params.items()}
        for name, found in vmap(product)(signs, x, y).items():
            total[name] = total[name] + signs[name] * found
    return [total[name] / probes for name in params]


def random_signs(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    bits = torch.randint(2, (count, *like.shape), generator=generator)
    return (2 * bits - 1).to(like)


def zero(model: nn.Sequential, x: Tensor, y: Tensor, generator: torch.Generator) -> Diagonals:
    """No curvature at all: its relative error is 1."""
    return [p.new_zeros(len(x), *p.shape) for p in model.parameters()]


def recursion(method: Any, model: nn.Sequential, x: Tensor, y: Tensor, generator: torch.Generator) -> Diagonals:
    """This package's engine, one backward pass for each batch."""
    params = [*model.parameters()]
    found: list[list[Tensor]] = []
    for inputs, classes in zip(x, y, strict=True):
        model.zero_grad()
        loss = F.cross_entropy(model(inputs), classes)
        attach(loss, params, method=method)
        loss.backward()
        found.append([p.hess_diag for p in params])  # type: ignore[attr-defined]
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def sampled(diagonal_of: Callable[..., Diagonals], count: int) -> Estimator:
    return partial(by_signals, diagonal_of, partial(signals_by_sampling, count))


# What the engine's methods are called in tables and figures.
RECURSIONS = {
    "HesScale": "hesscale",
    "HesScale, rank one": "hesscale_rank1",
    "HesScaleGN": "hesscale_gn",
    "BL89": "bl89",
}
RECURSIONS = {name: method for name, method in RECURSIONS.items() if method in METHODS}
ESTIMATORS: dict[str, Estimator] = {
    **{name: partial(recursion, method) for name, method in RECURSIONS.items()},
    "GGN, exact": partial(by_signals, ggn_of, signals_of_ggn),
    "GGN, 1 sample": sampled(ggn_of, 1),
    "GGN, 50 samples": sampled(ggn_of, 50),
    "K-FAC, 1 sample": sampled(kfac_of, 1),
    "K-FAC, 50 samples": sampled(kfac_of, 50),
    "Hutchinson, 1 probe": partial(hutchinson, 1),
    "Hutchinson, 50 probes": partial(hutchinson, 50),
    "squared gradient": squared_gradient,
    "zero": zero,
}

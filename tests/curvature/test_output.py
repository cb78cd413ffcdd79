"""The diagonal at the network's output is exact: real heads and losses against double backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Categorical, Independent, Laplace, Normal, StudentT

from hesscale_lightning.curvature import backward, coverage, exact_hess_diag

B, K = 5, 4
generator = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


ACTION = torch.tensor([0, 3, 1, 2, 3])
ADVANTAGE = randn(B)
SAMPLE = randn(B, K)
NOISE = randn(B, K)
OLD = randn(B) - 1.5
MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
TARGET = randn(B, K)


def clipped_surrogate(log_prob: Tensor) -> Tensor:
    """PPO's loss, with ratios on both sides of the clipping range."""
    ratio = torch.exp(log_prob - OLD)
    return -torch.min(ratio * ADVANTAGE, ratio.clamp(0.8, 1.2) * ADVANTAGE).mean()


def ppo(distribution: torch.distributions.Distribution, action: Tensor, entropy: float = 0.3) -> Tensor:
    return clipped_surrogate(distribution.log_prob(action)) - entropy * distribution.entropy().mean()


def masked_categorical(z: Tensor, fill: bool = False) -> Tensor:
    """As sb3-contrib's MaskableCategorical computes it from normalised logits."""
    logits = z.masked_fill(~MASK, -1e8) if fill else torch.where(MASK, z, torch.tensor(-1e8, dtype=z.dtype))
    distribution = Categorical(logits=logits)
    p_log_p = distribution.logits * distribution.probs
    entropy = -torch.where(MASK, p_log_p, torch.tensor(0.0, dtype=z.dtype)).sum(-1)
    return clipped_surrogate(distribution.log_prob(ACTION)) - 0.3 * entropy.mean()


def squashed(mean: Tensor, log_std: Tensor, critic: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """SAC's actor: the log-probability of its own reparameterised sample, squashed, and what a critic says of it."""
    std = log_std.clamp(-20, 2).exp()
    distribution = Normal(mean, std)
    u = mean + std * NOISE
    action = torch.tanh(u)
    log_prob = distribution.log_prob(u).sum(1) - torch.log(1 - action**2 + 1e-6).sum(1)
    return (0.2 * log_prob).mean() if critic is None else (0.2 * log_prob - critic(action)).mean()


def generalised(mean: Tensor, log_std: Tensor) -> Tensor:
    """The same, as Stable-Baselines3's state-dependent exploration computes it: from the squashed action."""
    noise = NOISE * log_std.exp().detach()
    action = torch.tanh(mean + noise)
    kept = action.clamp(-1 + 1e-15, 1 - 1e-15)
    u = 0.5 * (kept.log1p() - (-kept).log1p())
    log_prob = Normal(mean, (log_std.exp() ** 2 + 1e-6).sqrt()).log_prob(u).sum(1)
    return (0.2 * (log_prob - torch.log(1 - torch.tanh(u) ** 2 + 1e-6).sum(1)) - piecewise_linear(action)).mean()


def piecewise_linear(action: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(action, TARGET[:, :K])), SAMPLE[:1, :1].expand(1, B)).squeeze(1)


def hand_softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def hand_log_softmax(z: Tensor) -> Tensor:
    return z - torch.log(torch.exp(z).sum(-1, keepdim=True))


def hand_layer_norm(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, keepdim=True, unbiased=False) + 1e-5) * gamma + beta


def hand_rms_norm(z: Tensor, gamma: Tensor) -> Tensor:
    return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-5) * gamma


def entrywise(y: Tensor) -> Tensor:
    """A loss with curvature of its own and no off-diagonal entries."""
    return ((y - TARGET) ** 2 * 0.7).sum() + torch.sin(y).sum()


@dataclass(frozen=True)
class Head:
    """What follows a network's outputs of these shapes."""

    name: str
    loss: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...] = ((B, K),)


HEADS = [
    Head("categorical log-prob under exp(ratio)", lambda z: clipped_surrogate(Categorical(logits=z).log_prob(ACTION))),
    Head("categorical entropy", lambda z: Categorical(logits=z).entropy().mean()),
    Head("categorical PPO with entropy", lambda z: ppo(Categorical(logits=z), ACTION)),
    Head("A2C with entropy", lambda z: -(Categorical(logits=z).log_prob(ACTION) * ADVANTAGE).mean() + 0.1 * (
        -Categorical(logits=z).entropy()).mean()),
    Head("per-sample loss with entropy", lambda z: (
        lambda d: -(d.log_prob(ACTION) * ADVANTAGE + 0.1 * d.entropy()).mean())(Categorical(logits=z))),
    Head("categorical by probabilities", lambda z: ppo(Categorical(probs=z.softmax(-1)), ACTION)),
    Head("masked categorical", masked_categorical),
    Head("masked categorical, normalised twice", lambda z: masked_categorical(Categorical(logits=z).logits)),
    Head("masked by filling, normalised twice", lambda z: masked_categorical(Categorical(logits=z).logits, fill=True)),
    Head("entropy of log_softmax", lambda z: -(z.log_softmax(-1).exp() * z.log_softmax(-1)).sum(-1).mean()),
    Head("entropy of softmax by hand", lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()),
    Head("discrete SAC", lambda z: (z.softmax(-1) * (0.2 * z.log_softmax(-1) - TARGET)).sum(-1).mean()),
    Head("bernoulli entropy", lambda z: Bernoulli(logits=z).entropy().mean()),
    Head("bernoulli PPO", lambda z: ppo(Independent(Bernoulli(logits=z), 1), (SAMPLE > 0).double())),
    Head("gaussian PPO, state-dependent sigma", lambda m, s: ppo(Independent(Normal(m, s.exp()), 1), SAMPLE), ((B, K),
    (B, K))), Head("gaussian PPO, one sigma", lambda m, s: ppo(
        Independent(Normal(m, torch.ones_like(m) * s.exp()), 1), SAMPLE), ((B, K), (K,))),
    Head("gaussian with softplus sigma", lambda m, s: ppo(Independent(Normal(m, F.softplus(s) + 0.1), 1), SAMPLE), ((B,
    K), (B, K))), Head("gaussian nll", lambda m, s: F.gaussian_nll_loss(m, TARGET, s.exp()), ((B, K), (B, K))),
    Head("squashed gaussian of its own sample", squashed, ((B, K), (B, K))),
    Head("squashed gaussian under a critic", lambda m, s: squashed(m, s, piecewise_linear), ((B, K), (B, K))),
    Head("state-dependent exploration", generalised, ((B, K), (B, K))),
    Head("laplace", lambda m, s: ppo(Independent(Laplace(m, s.exp()), 1), SAMPLE), ((B, K), (B, K))),
    Head("student t", lambda d, m, s: clipped_surrogate(
        StudentT(d.exp() + 1, m, s.exp()).log_prob(SAMPLE[:, 0])), ((B,), (B,), (B,))),
    Head("beta", lambda a, b: clipped_surrogate(Beta(a.exp() + 1, b.exp() + 1).log_prob(SAMPLE[:, 0].sigmoid())),
    ((B,), (B,))), Head("x * x", lambda z: entrywise(z * z)),
    Head("x * sigmoid(x)", lambda z: entrywise(z * torch.sigmoid(z))),
    Head("softmax by hand", lambda z: entrywise(hand_softmax(z))),
    Head("log-softmax by hand", lambda z: entrywise(hand_log_softmax(z))),
    Head("layer norm by hand", lambda z, g, b: entrywise(hand_layer_norm(z, g, b)), ((B, K), (K,), (K,))),
    Head("rms norm by hand", lambda z, g: entrywise(hand_rms_norm(z, g)), ((B, K), (K,))),
    Head("F.rms_norm", lambda z, g: entrywise(F.rms_norm(z, (K,), g)), ((B, K), (K,))),
    Head("normalised by its std", lambda z: entrywise(z / z.std(-1, keepdim=True))),
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_diagonal_at_the_output_is_exact(head: Head) -> None:
    torch.manual_seed(1)
    outputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in head.shapes]
    exact = exact_hess_diag(head.loss(*outputs), outputs)
    backward(head.loss(*outputs), outputs)
    for output, expected in zip(outputs, exact, strict=True):
        scale = float(expected.abs().max())
        error = float((output.hess_diag - expected).abs().max())
        assert error <= 1e-8 * max(scale, 1e-3), (
            f"error {error:.2e} at scale {scale:.2e}\n{coverage(head.loss(*outputs))}"
        )

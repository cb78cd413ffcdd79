"""A small instance of every family of models that people train, each with the default loss of its kind.

Importing this builds nothing. ``MODELS`` is for every test that wants real networks::

    module, loss = model.build()
    loss(module).backward()

``build`` seeds torch's generator, and the loss has its data inside, so that all is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.curvature import convolutional_models as convolutional
from tests.curvature import expert_models as experts
from tests.curvature import recurrent_models as recurrent
from tests.curvature import transformer_models as transformers
from tests.curvature.tasks import Built, classification, mean_squared_error


@dataclass(frozen=True)
class Model:
    """A model family.

    Attributes:
        name: What pytest prints.
        make: Makes the module, its data and its loss.
    """

    name: str
    make: Callable[[], Built]

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        """The module, and its loss as a function of the module: the same numbers every time and in every dtype."""
        torch.manual_seed(0)
        module, data, loss = self.make()
        data = tuple(x.to(dtype) if x.is_floating_point() else x for x in data)
        return module.to(dtype), lambda m: loss(m, *data)


class Perceptron(nn.Module):
    """In-place operations on views, and a parameter of which two views are used."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(4, 6) * 0.4)
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (w.contiguous() for w in self.shared.split(3, 1))
        y = (x @ a).clone()
        y[:, 0] = x[:, 0] * self.scale[0]
        y[:, 1:].add_(self.scale[1:])
        y.view(-1)[::2].mul_(0.5)
        y.sigmoid_()
        windows = y.as_strided((len(x), 2, 2), (3, 1, 1))
        return windows.flatten(1) @ b


def in_place() -> Built:
    return Perceptron(), (torch.randn(3, 4), torch.randn(3, 3)), mean_squared_error


class Words(nn.Module):
    """Bags of embeddings of every mode, weighted words among them, joined by a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(7, 3)
        self.sum = nn.EmbeddingBag(7, 3, mode="sum", padding_idx=0)
        self.max = nn.EmbeddingBag(7, 3, mode="max")
        self.weights = nn.Embedding(7, 1)
        self.bilinear = nn.Bilinear(3, 6, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        total = self.sum(tokens, per_sample_weights=self.weights(tokens).squeeze(-1))
        return self.head(self.bilinear(self.mean(tokens), torch.cat([total, self.max(tokens)], -1)).relu())


def words() -> Built:
    data = torch.randint(7, (4, 5)), torch.tensor([0, 2, 1, 2])
    return Words(), data, lambda m, tokens, y: F.multi_margin_loss(m(tokens), y, p=2)


def weight_norm() -> Built:
    """The fused form along the first dimension and the composed one along another."""
    layers = [parametrizations.weight_norm(nn.Conv1d(2, 3, 3)), nn.Softplus(), nn.Flatten()]
    layers += [
        parametrizations.weight_norm(nn.Linear(12, 4)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(4, 3), dim=1),
    ]
    return classification(nn.Sequential(*layers), 3, 2, 6)


def spectral_norm() -> Built:
    layers = [parametrizations.spectral_norm(nn.Conv2d(1, 3, 3)), nn.LeakyReLU(0.2), nn.Flatten()]
    module = nn.Sequential(*layers, parametrizations.spectral_norm(nn.Linear(12, 1)))
    data = torch.randn(4, 1, 4, 4), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    return module, data, lambda m, x, sign: F.soft_margin_loss(m(x), sign)


class Twins(nn.Module):
    """One network for several inputs, compared by distances and angles."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def twins() -> Built:
    data = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4), torch.tensor([1.0, -1.0, 1.0])

    def loss(m: Any, a: Tensor, b: Tensor, c: Tensor, sign: Tensor) -> Tensor:
        u, v, w = m(a), m(b), m(c)
        contrast = F.cross_entropy(F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).t() / 0.5, torch.arange(3))
        return (
            F.triplet_margin_loss(u, v, w) + F.cosine_embedding_loss(u, v, sign) + torch.cdist(u, w).mean() + contrast
        )

    return Twins(), data, loss


class Variational(nn.Module):
    """Encoder to a Gaussian, a reparameterised sample, decoder to bits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(2, 5)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def variational() -> Built:
    def loss(m: Any, x: Tensor, noise: Tensor) -> Tensor:
        logits, mean, log_variance = m(x, noise)
        divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
        return (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + divergence) / len(x)

    return Variational(), (torch.rand(3, 5), torch.randn(3, 2)), loss


class Heads(nn.Module):
    """A head for each kind of likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.heads(torch.sin(self.body(x))).unbind(-1))


def likelihoods() -> Built:
    data = torch.randn(4, 3), torch.randn(4), torch.tensor([0.0, 2.0, 1.0, 3.0])

    def loss(m: Any, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
        mean, scale, rate = m(x)
        return F.gaussian_nll_loss(mean, y, F.softplus(scale) + 0.1) + F.poisson_nll_loss(rate, counts, full=True)

    return Heads(), data, loss


def speech() -> Built:
    """Convolutions over time, and the loss over all alignments."""
    module = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1))
    data = torch.randn(2, 3, 8), torch.tensor([[1, 2, 2], [3, 1, 0]])

    def loss(m: Any, x: Tensor, labels: Tensor) -> Tensor:
        return F.ctc_loss(m(x).permute(2, 0, 1).log_softmax(-1), labels, (8, 6), (3, 2))

    return module, data, loss


MODELS = [
    Model("residual network", convolutional.residual),
    Model("depthwise separable, squeeze and excite", convolutional.depthwise_separable),
    Model("densely connected", convolutional.dense),
    Model("inception", convolutional.inception),
    Model("U-Net", convolutional.unet),
    Model("normalisation layers", convolutional.normalisations),
    Model("vision transformer", transformers.vision_transformer),
    Model("shifted windows", transformers.window_transformer),
    Model("GPT", transformers.gpt),
    Model("Llama", transformers.llama),
    Model("BERT", transformers.bert),
    Model("T5", transformers.t5),
    Model("mixture of experts", experts.mixture_of_experts),
    Model("grouped experts", experts.grouped_experts),
    Model("MultiheadAttention", transformers.multihead_attention),
    Model("RNN", recurrent.recurrent(nn.RNN, num_layers=2, nonlinearity="relu")),
    Model("GRU, bidirectional", recurrent.recurrent(nn.GRU, bidirectional=True)),
    Model(
        "LSTM, stacked and bidirectional", recurrent.recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.1)
    ),
    Model("GRU, packed", recurrent.recurrent(nn.GRU, packed=True, num_layers=2)),
    Model("LSTM, packed and bidirectional", recurrent.recurrent(nn.LSTM, packed=True, bidirectional=True)),
    Model("cells", recurrent.cells),
    Model("selective state space", recurrent.state_space),
    Model("gated linear recurrence", recurrent.linear_recurrence),
    Model("in-place operations and views", in_place),
    Model("bags of words, bilinear", words),
    Model("weight_norm", weight_norm),
    Model("spectral_norm", spectral_norm),
    Model("twins", twins),
    Model("variational autoencoder", variational),
    Model("likelihoods", likelihoods),
    Model("speech", speech),
]

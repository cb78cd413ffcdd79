"""The small networks, and one loss, of the example configs. Any other ``nn.Module`` does as well."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with an activation between them.

    Args:
        sizes: width of the input, of each hidden layer and of the output; at least two.
        activation: class of the activation, for example ``torch.nn.ReLU``.

    Raises:
        ValueError: if there are fewer than two sizes.

    Example:
        >>> MLP([64, 32, 10])
        MLP(
          (0): Linear(in_features=64, out_features=32, bias=True)
          (1): Tanh()
          (2): Linear(in_features=32, out_features=10, bias=True)
        )
    """

    def __init__(self, sizes: Sequence[int], activation: type[nn.Module] = nn.Tanh) -> None:
        if len(sizes) < 2:
            raise ValueError(f"Found sizes={list(sizes)}, expected at least two: those of the input and the output.")
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])


class ConvNet(nn.Sequential):
    """3 x 3 convolutions, each with an activation and 2 x 2 max-pooling, then a mean over pixels and a linear layer.

    Args:
        in_channels: channels of the input image.
        channels: channels after each convolution; every one halves the image.
        out_features: width of the output.
        activation: class of the activation, for example ``torch.nn.ReLU``.

    Example:
        >>> import torch
        >>> ConvNet(1, [16, 32], 10)(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self, in_channels: int, channels: Sequence[int], out_features: int, activation: type[nn.Module] = nn.Tanh
    ) -> None:
        layers: list[nn.Module] = []
        widths = [in_channels, *channels]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), activation(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], out_features))


class GRUClassifier(nn.Module):
    """A gated recurrent unit that reads a sequence, and a linear layer on its last state.

    Args:
        in_features: width of each element of the sequence.
        hidden: width of the state.
        out_features: width of the output.
        stride: how many neighbouring elements are read at once, to make long sequences shorter.

    Example:
        >>> GRUClassifier(1, 16, 10, stride=4)(torch.zeros(8, 40, 1)).shape
        torch.Size([8, 10])
    """

    def __init__(self, in_features: int, hidden: int, out_features: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.recurrent = nn.GRU(in_features * stride, hidden, batch_first=True)
        self.head = nn.Linear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences of shape (batch, length, in_features) to outputs of shape (batch, out_features)."""
        batch, length, width = x.shape
        states, _ = self.recurrent(x.reshape(batch, length // self.stride, width * self.stride))
        out: Tensor = self.head(states[:, -1])
        return out


class VisionTransformer(nn.Module):
    """Square patches as tokens with learned positions, transformer layers, and a linear layer on the tokens' mean.

    Args:
        image_size: height and width of the image.
        patch_size: height and width of a patch; must divide the image's.
        in_channels: channels of the image.
        width: width of a token.
        depth: number of transformer layers.
        heads: attention heads; must divide the width.
        out_features: width of the output.
        dropout: share of activations that are dropped.

    Raises:
        ValueError: if patches do not tile the image.

    Example:
        >>> VisionTransformer(8, 2, 1, width=16, depth=1, heads=2, out_features=10)(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with a mean in place of the class token.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        in_channels: int,
        width: int,
        depth: int,
        heads: int,
        out_features: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"Found patch_size={patch_size} for image_size={image_size}, expected a divisor of the image's size."
            )
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2, width) * 0.02)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 2 * width, dropout, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape (batch, channels, size, size) to outputs of shape (batch, out_features)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        out: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return out


class GaussianNLL(nn.Module):
    r"""Negative log-likelihood of a normal distribution whose mean and log-variance the network predicts.

    With the prediction :math:`(\mu, s)`: the batch's mean of :math:`\frac12 (s + (y - \mu)^2 e^{-s})`, without the
    constant :math:`\frac12 \log 2\pi`.

    Example:
        >>> GaussianNLL()(torch.tensor([[1.0, 0.0]]), torch.tensor([3.0]))
        tensor(2.)
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Map predictions of shape (batch, 2) and targets of shape (batch,) to the mean loss."""
        mean, log_variance = prediction.unbind(1)
        return (0.5 * (log_variance + (target - mean).square() * torch.exp(-log_variance))).mean()

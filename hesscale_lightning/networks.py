"""The small networks of the example configs. Any other ``nn.Module`` does as well."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


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

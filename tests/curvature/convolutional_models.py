"""Small convolutional networks; see :mod:`tests.curvature.models`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.tasks import Built, classification


class Residual(nn.Module):
    """A block of ResNet, with the shortcut that changes the width."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        self.shortcut = nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)), inplace=True)
        y = self.norms[1](self.second(y))
        y += self.norms[2](self.shortcut(x))
        return F.relu(y, inplace=True)


def residual() -> Built:
    stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(True), nn.MaxPool2d(2))
    body = nn.Sequential(Residual(3, 3, 1), Residual(3, 4, 2))
    return classification(nn.Sequential(stem, body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), 3, 2, 8, 8)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze and excite, projection: MobileNet and EfficientNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 2 * width
        self.expand = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, 2, 1), nn.SiLU(), nn.Conv2d(2, inner, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.squeeze(y))


def depthwise_separable() -> Built:
    layers = [nn.Conv2d(2, 3, 3, 2, 1), InvertedResidual(3), InvertedResidual(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return classification(nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(3, 3)), 3, 2, 6, 6)


class Dense(nn.Module):
    """Every layer sees all that came before it."""

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1, bias=False))
            for w in range(width, width + growth * layers, growth)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def dense() -> Built:
    body = nn.Sequential(Dense(2, 2, 3), nn.Conv2d(8, 4, 1), nn.AvgPool2d(2), nn.ELU(), nn.Flatten(), nn.Linear(36, 3))
    return classification(body, 2, 2, 6, 6)


class Inception(nn.Module):
    """Branches of different kernels, side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, 2, 1)
        self.tall_and_wide = nn.Sequential(
            nn.Conv2d(width, 2, (1, 3), padding=(0, 1)), nn.Conv2d(2, 2, (3, 1), padding="same")
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(width, 2, 1))
        self.averaged = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([self.one(x), self.tall_and_wide(x), self.pooled(x), self.averaged(x)], 1))


def inception() -> Built:
    body = nn.Sequential(Inception(2), nn.LocalResponseNorm(3), Inception(7), nn.AdaptiveMaxPool2d(2), nn.Flatten())
    return classification(nn.Sequential(body, nn.Linear(28, 3), nn.LogSoftmax(1)), 2, 2, 5, 5)


class UNet(nn.Module):
    """Down, up by a transposed convolution and by interpolation, skip connections, paddings of every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
                nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
                nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"),
            ]
        )
        self.transposed = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.middle = nn.Conv2d(6, 2, 3, padding=1)
        self.last = nn.Conv2d(6, 2, 1)
        self.norm = nn.GroupNorm(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.down[0](x), 0.1)
        b = F.leaky_relu(self.down[1](F.max_pool2d(a, 2)), 0.1)
        c = F.leaky_relu(self.down[2](F.avg_pool2d(b, 2)), 0.1)
        d = F.gelu(self.norm(self.middle(torch.cat([self.transposed(c), b], 1))))
        smooth = F.interpolate(d, scale_factor=2, mode="bilinear", align_corners=False)
        coarse = F.interpolate(d, size=a.shape[-2:], mode="nearest")
        return self.last(F.pad(torch.cat([smooth, coarse, a], 1), (1, 1, 1, 1), value=0.5))[..., 1:-1, 1:-1]


def unet() -> Built:
    data = torch.randn(2, 1, 8, 8), torch.randint(2, (2, 8, 8))
    return UNet(), data, lambda m, x, y: F.cross_entropy(m(x), y)


def normalisations() -> Built:
    module = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.Tanh(),
        nn.Conv1d(4, 4, 3, dilation=2), nn.GroupNorm(2, 4), nn.SiLU(),
        nn.Conv1d(4, 4, 3, groups=2), nn.BatchNorm1d(4), nn.Mish(), nn.LayerNorm([4, 4]), nn.Flatten(),
        nn.Linear(16, 4), nn.RMSNorm(4), nn.PReLU(), nn.Linear(4, 1),
    )  # fmt: skip
    data = torch.randn(3, 2, 12), torch.randn(3, 1)
    return module, data, lambda m, x, y: F.smooth_l1_loss(m(x), y)

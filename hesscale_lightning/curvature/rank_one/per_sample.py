"""Curvature of a weight that a sample uses several times: ``sum_b c_b G_b^2`` with the gradient ``G_b`` of each sample.

The positions of a sequence or an image add up in a sample's gradient before it is squared, so this is more than a rule
for squares can do. It takes one matrix product for each sample, as large together as the weight's gradient itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hesscale_lightning.curvature.values import Value, opaque

_convolution_backward = torch.ops.aten.convolution_backward.default

#: Most numbers in the gradients of all samples, for each number in the layer's input and output. The gradients are
#: written once and read twice, so they must be outweighed by the products that they are sums of.
_MOST_NUMBERS = 4

#: Most numbers in the gradients of a kernel that are computed at once on the CPU: few enough for its cache.
_MOST_AT_ONCE = 2**19


def pays(samples: int, positions: int, outputs: int, inputs: int) -> bool:
    """Whether the samples' gradients are small beside the layer's input and output.

    Args:
        samples: How many samples there are.
        positions: How often each uses the weight.
        outputs: How many outputs a position has.
        inputs: How many inputs it has.
    """
    return outputs * inputs <= _MOST_NUMBERS * positions * (outputs + inputs) and samples > 0


def by_sample(x: Value, samples: int, inner: int) -> Value:
    """The rows of a matrix by sample: ``(samples, positions, columns)``.

    Args:
        x: Rows by columns.
        samples: How many samples there are.
        inner: How many neighbours in row-major order belong together.
    """
    rows, columns = x.shape
    together = inner // columns
    if together * samples == rows:
        return x.reshape(samples, together, columns)
    return x.reshape(-1, samples, together, columns).transpose(0, 1).reshape(samples, -1, columns)


def of_weight(c: Value, g: Value, a: Value) -> Value:
    """``sum_b c_b (sum_t g_bt a_bt^T)^2``, outputs by inputs.

    Args:
        c: A column, an entry for each sample.
        g: Gradients, samples by positions by outputs.
        a: Inputs, samples by positions by inputs.
    """
    gradients = (g.mT @ a).square()
    return (c.mT @ gradients.reshape(len(c), -1)).view(g.shape[2], a.shape[2])


def of_bias(c: Value, g: Value, dim: int = 1) -> Value:
    """``sum_b c_b (sum_t g_bt)^2``; arguments as for :func:`of_weight`, with the positions along ``dim``."""
    return (c.mT @ g.sum(dim).square()).view(-1)


@opaque
def of_kernel(
    c: Tensor,
    g: Tensor,
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """As :func:`of_weight`, for the kernel of a convolution over one or two dimensions.

    Args:
        c: A column, an entry for each sample.
        g: The gradient at the output.
        x: The input.
        kernel: Its shape.
        stride: One number for each dimension.
        padding: Likewise.
        dilation: Likewise.
    """
    if x.device.type != "cpu":
        gradients = _by_patches(g, x, kernel[2:], stride, padding, dilation)
        return c.mT.mm(gradients.square_()).view(kernel)
    at_once = max(1, _MOST_AT_ONCE // math.prod(kernel))
    total = x.new_zeros(1, math.prod(kernel))
    for start in range(0, len(x), at_once):
        some = slice(start, start + at_once)
        gradients = _by_groups(g[some], x[some], kernel, stride, padding, dilation)
        total.addmm_(c[some].mT, gradients.square_())
    return total.view(kernel)


def _by_groups(
    g: Tensor, x: Tensor, kernel: tuple[int, ...], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """The kernel's gradient in each sample, a row each: samples are groups of channels of one convolution.

    On the CPU its backward is several times faster than products of matrices, for which the input is unfolded.
    """
    samples, outputs = g.shape[:2]
    kernels = x.new_empty(samples * outputs, *kernel[1:])
    g, x = (t.reshape(1, -1, *t.shape[2:]) for t in (g, x))
    settings = stride, padding, dilation, False, (0,) * len(stride), samples
    gradient: Tensor = _convolution_backward(g, x, kernels, None, *settings, (False, True, False))[1]
    return gradient.reshape(samples, -1)


def _by_patches(
    g: Tensor, x: Tensor, size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """The same by one batched product with the unfolded input."""
    if len(size) == 1:
        x, size = x.unsqueeze(2), (1, *size)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    patches = F.unfold(x, size, dilation=dilation, padding=padding, stride=stride)
    return g.flatten(2).bmm(patches.mT).flatten(1)

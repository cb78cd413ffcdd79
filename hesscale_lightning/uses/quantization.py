r"""What rounding a layer's weights costs, by the diagonal: :math:`\frac12 \sum h (w - Q(w))^2`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_BITS = 16


def quantized(weight: Tensor, bits: int) -> Tensor:
    r"""A tensor rounded to a symmetric grid of ``2^bits - 1`` values, evenly spaced over its range.

    .. math:: Q(w) = s \operatorname{round}(w / s), \qquad s = \max |w| \big/ (2^{\text{bits} - 1} - 1)

    Args:
        weight: The tensor, of any shape.
        bits: How many bits a value has, from 2 to 16.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        ValueError: If ``bits`` is out of range.

    Example:
        >>> quantized(torch.tensor([1.0, -0.6, 0.2]), 2)
        tensor([ 1., -1.,  0.])
    """
    check_bits([bits])
    if not weight.numel():
        return weight.clone()
    exact = weight if weight.dtype == torch.float64 else weight.float()  # a grid in half precision would be rounded too
    scale = exact.abs().max() / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, (exact / scale).round() * scale, exact).to(weight.dtype)


def quantization_cost(weights: Mapping[str, Tensor], diagonals: Mapping[str, Tensor], bits: int) -> dict[str, float]:
    r"""By how much the loss grows when one tensor of weights is rounded, by the quadratic model without a gradient.

    .. math:: \Delta L \approx \tfrac12 \sum_i h_i (w_i - Q(w_i))^2

    It ranks layers by how many bits they need, of a trained network, whose gradient is small.

    Args:
        weights: Tensors by name.
        diagonals: The Hessian's diagonal of each, of its shape, as :func:`hesscale_lightning.hess_diag_over` gives it.
        bits: How many bits a value has, from 2 to 16.

    Returns:
        The cost of each tensor in units of the loss, by name.

    Raises:
        TypeError: If the tensors are not given by name.
        ValueError: If ``bits`` is out of range, or a diagonal is missing or of another shape.

    Example:
        >>> w = torch.tensor([1.0, -0.6, 0.2])
        >>> cost = quantization_cost({"w": w}, {"w": torch.tensor([1.0, 2.0, 5.0])}, bits=2)
        >>> round(cost["w"], 6)  # (2 * 0.4 ** 2 + 5 * 0.2 ** 2) / 2
        0.26
    """
    check_bits([bits])
    pair: tuple[Any, Any] = weights, diagonals
    for given in pair:
        if not isinstance(given, Mapping):
            found = f"Found a {type(given).__name__}, expected tensors by name"
            raise TypeError(f"{found}, such as dict(model.named_parameters()).")
    result = {}
    for name, weight in weights.items():
        h = diagonals.get(name)
        if h is None or h.shape != weight.shape:
            found = "none" if h is None else f"one of shape {tuple(h.shape)}"
            raise ValueError(f"Found {found} for {name}, expected a diagonal of shape {tuple(weight.shape)}.")
        exact = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
        result[name] = (h.to(exact.dtype) * (exact - quantized(exact, bits)).square()).sum().item() / 2
    return result


def check_bits(bits: Iterable[int]) -> None:
    """Raises ValueError for numbers of bits that are out of range."""
    for number in bits:
        if not 2 <= number <= MOST_BITS or number != int(number):
            raise ValueError(f"Found {number} bits, expected 2 to {MOST_BITS}, a whole number.")


def parse_bits(text: str | Sequence[int]) -> list[int]:
    """Numbers of bits from text such as ``8,4``; raises ValueError for anything else."""
    try:
        bits = [int(part) for part in (text.split(",") if isinstance(text, str) else text)]
    except ValueError:
        raise ValueError(f"Found quantize={text!r}, expected numbers of bits, such as 8,4.") from None
    check_bits(bits)
    return bits

"""Small operations on scalars and lists of tensors that avoid both host synchronisation and needless overhead."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_SMALL = 1 << 16  # entries; below, a kernel's call costs more than its work


def never_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable`` without its cost when nothing is being compiled, which is seconds when it is made."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            disabled: Callable[P, R] = torch.compiler.disable(function)
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def large_on_cpu(tensors: list[Tensor]) -> bool:
    """Whether memory rather than the number of calls decides how long an operation on these tensors takes."""
    return tensors[0].is_cpu and sum(tensor.numel() for tensor in tensors) > _SMALL


def as_operand(value: float | Tensor, like: Tensor) -> Any:
    """A number in the form that multi-tensor kernels take fastest: on the CPU they would wrap it once per tensor."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return _on_cpu(value, like.dtype) if like.is_cpu and not torch.compiler.is_compiling() else value


@lru_cache(maxsize=64)
def _on_cpu(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")


def as_host_number(scalar: Tensor) -> float | Tensor:
    """A scalar tensor as a float where reading it costs nothing (CPU, eager mode), else itself."""
    return float(scalar.item()) if scalar.is_cpu and not torch.compiler.is_compiling() else scalar


def sum_of_scalars(scalars: list[Tensor] | tuple[Tensor, ...]) -> float | Tensor:
    """The sum of scalar tensors of one device, by the same rule: a float on the CPU, else a scalar tensor."""
    if not scalars:
        return 0.0
    if scalars[0].is_cpu and not torch.compiler.is_compiling():
        return float(sum(scalar.item() for scalar in scalars))
    return torch.stack(list(scalars)).sum()


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products of all entries of two tensors of one shape and layout."""
    return torch.dot(a.reshape(-1), b.reshape(-1))


def norm_square(tensors: list[Tensor]) -> float | Tensor:
    """Sum of the squares of all entries, as a float on the CPU, else a scalar tensor on the first one's device."""
    if not tensors:
        return 0.0
    if torch.compiler.is_compiling() or any(tensor.device != tensors[0].device for tensor in tensors):
        norms = [torch.linalg.vector_norm(tensor).to(tensors[0].device) for tensor in tensors]
    else:
        norms = list(torch._foreach_norm(tensors))
    return sum_of_scalars([norm * norm for norm in norms])


def beside(value: float | Tensor, other: float | Tensor) -> float | Tensor:
    """A scalar, moved to the device of another tensor if both are tensors."""
    return value.to(other.device) if isinstance(value, Tensor) and isinstance(other, Tensor) else value


def add_one(counts: list[Tensor]) -> None:
    """Increment scalar counters in place."""
    if counts and counts[0].is_cpu and not torch.compiler.is_compiling():
        torch._foreach_add_(
            counts, _on_cpu(1.0, torch.float32), alpha=1.0
        )  # wraps the number once instead of once per tensor
    elif counts:
        torch._foreach_add_(counts, 1.0)


def multiply(tensors: list[Tensor], factor: float | Tensor, *, foreach: bool) -> None:
    """Multiply all tensors by one factor, in place."""
    operand: Any = beside(factor, tensors[0])
    if foreach:
        torch._foreach_mul_(tensors, operand)
    else:
        for tensor in tensors:
            tensor.mul_(operand)


def subtract(tensors: list[Tensor], directions: list[Tensor], size: float | Tensor, *, foreach: bool) -> None:
    """``tensors -= size * directions``, in place; overwrites the directions if the size is a tensor."""
    if isinstance(size, Tensor):
        multiply(directions, size, foreach=foreach)
        size = 1.0
    if foreach:
        torch._foreach_add_(tensors, directions, alpha=-size)
    else:
        for tensor, direction in zip(tensors, directions, strict=True):
            tensor.add_(direction, alpha=-size)

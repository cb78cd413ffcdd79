"""One use of an operation in a graph, as a rule sees it: its saved tensors and numbers by name, and its shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.capturing import entry_of
from hesscale_lightning.curvature.graph import AccumulateGrad, Node
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.values import ZERO, Value


class UnsupportedOperationError(NotImplementedError):
    """A loss contains an operation through which no registered rule carries curvature."""


def signed(number: Any) -> Any:
    """A number as it was saved: nodes show negative ones as 64 bits without sign; of lists, every entry."""
    if type(number) is int:
        return number - 2**64 if number >= 2**63 else number
    if isinstance(number, (list, tuple)):
        return tuple([signed(n) for n in number])
    return number


def carried(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which curvature of a tensor of ``dtype`` is carried: float32 or better."""
    return torch.float32 if dtype in HALF else dtype


class Operation:
    """One use of an operation.

    What a rule asks for by name is what the autograd node has saved: ``op.tensor("weight")`` is ``node._saved_weight``,
    and ``op.number("dim")`` is ``node._saved_dim``. For a ``torch.autograd.Function`` the node is its context:
    ``op.tensor(0)`` is ``ctx.saved_tensors[0]``, and other names are the attributes that forward has set.

    Attributes:
        name: The node's name.
        needs: For every input, whether it leads to a wanted tensor. A rule may return anything for the others.
        transposed: For every input, whether it is the transpose of the tensor that receives the curvature.
        method: ``"hesscale"``, ``"hesscale_gn"``, ``"hesscale_rank1"`` or ``"bl89"``.
        prepared: What the rule's ``prepare`` has returned for this use.
    """

    __slots__ = ("_following", "_saved", "method", "name", "needs", "node", "prepared", "transposed")

    def __init__(self, node: Node, following: Any, needs: list[bool], transposed: list[bool], method: str) -> None:
        self.node = node
        self.name: str = node.name()
        self._following = following
        self._saved: dict[str | int, Any] = {}
        self.needs = needs
        self.transposed = transposed
        self.method = method
        self.prepared: Any = None

    # -- what the node has saved

    def need(self, i: int) -> bool:
        """Whether input ``i`` leads to a wanted tensor."""
        return i < len(self.needs) and self.needs[i]

    def tensor(self, name: str | int) -> Value:
        """A saved tensor, floating ones in float32 or better; None where the node has not saved it."""
        x = self._get(name)
        return x.float() if x is not None and x.dtype in HALF else x

    def input(self, i: int, name: str | int) -> Value:
        """:meth:`tensor`, where it is the value of input ``i``: so that it is the same one for other operations."""
        return self.tensor(name)

    def output(self, name: str | int) -> Value:
        """:meth:`tensor`, where it is the value of the first output."""
        return self.tensor(name)

    def tensors(self, name: str) -> tuple[Value, ...]:
        """A saved list of tensors, or of tensors and Nones, as they are."""
        return tuple(self._get(name))

    def operand(self, name: str, i: int | None = None) -> Value:
        """:meth:`tensor`, or a number where one was saved, which torch may keep as a tensor on the CPU.

        Args:
            name: What the node calls it.
            i: The input that it is the value of, if it is one.
        """
        x = self._get(name)
        if not isinstance(x, Tensor):
            return x
        number = as_number(x)
        if number is not None:
            return number
        if not x.is_floating_point():  # one over a tensor of integers would be in single precision
            return x.to(carried(self.output_dtype()))
        return x.float() if x.dtype in HALF else x

    def number(self, name: str) -> Any:
        """A saved number, flag, text, or tuple of numbers, on which the formula may branch; negative ones are so."""
        return signed(self._get(name))

    def saves_tensor(self, name: str) -> bool:
        """Whether what the node has saved under this name is a tensor."""
        return isinstance(self._get(name), Tensor)

    def has(self, name: str) -> bool:
        """Whether nodes of this kind save something of this name."""
        return hasattr(type(self.node), f"_saved_{name}")

    def backward(self, *h: Value) -> Value:
        """What the autograd node does to a gradient: ``J^T h``. Only for nodes that have saved sizes and no tensor."""
        return self.node(*[None if x is ZERO else x for x in h])

    # -- what is known of inputs and outputs

    def input_shape(self, i: int) -> torch.Size:
        """Shape of input ``i``: what a curvature must be summed to where the forward pass broadcast."""
        child, output = self._following[i]
        if type(child) is AccumulateGrad:
            shape: torch.Size = child.variable.shape
            return shape
        return torch.Size(child._input_metadata[output].shape)

    def input_meta(self, i: int) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of input ``i``."""
        child, output = self._following[i]
        meta = child.variable if type(child) is AccumulateGrad else child._input_metadata[output]
        return meta.dtype, meta.device

    def input_dtype(self, i: int) -> torch.dtype:
        """The dtype in which curvature of input ``i`` is carried: its own, or float32 if that is half precision."""
        return carried(Operation.input_meta(self, i)[0])

    def output_shape(self, i: int = 0) -> torch.Size:
        """Shape of output ``i``."""
        return torch.Size(self.node._input_metadata[i].shape)

    def output_dtype(self, i: int = 0) -> torch.dtype:
        """Dtype of output ``i``."""
        dtype: torch.dtype = self.node._input_metadata[i].dtype
        return dtype

    def outputs(self) -> int:
        """How many outputs there are."""
        return len(self.node._input_metadata)

    def unsupported(self, why: str) -> UnsupportedOperationError:
        """The error to raise when the operation is known but this use of it is not supported."""
        return UnsupportedOperationError(f"{self.name}: {why}")

    def _get(self, name: str | int) -> Any:
        """What the node has saved, read once: a checkpointed block hands out a tensor once."""
        saved = self._saved
        if name not in saved:
            saved[name] = saved_by(self.node, name)
        return saved[name]

    def release(self) -> None:
        """Lets go of what was read."""
        self._saved = {}


def as_number(x: Tensor | None) -> float | None:
    """The number that torch has kept as a tensor; None if it is none, or zero, by which Python does not divide."""
    if x is None or x.dim() or x.device.type != "cpu" or x.requires_grad:
        return None
    return entry_of(x) or None


def saved_by(node: Node, name: str | int) -> Any:
    """What a node has saved under a name; a ``torch.autograd.Function``'s attribute or, by number, saved tensor."""
    if isinstance(name, int):
        return node.saved_tensors[name]
    saved = f"_saved_{name}"
    return getattr(node, saved) if hasattr(type(node), saved) else getattr(node, name)

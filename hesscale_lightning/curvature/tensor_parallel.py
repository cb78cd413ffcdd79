"""Tensor parallelism: the part of a graph in which tensors are DTensors, spread over processes.

A graph enters that part by ``DTensor.from_local`` (or at a parameter that is a DTensor) and leaves it by ``to_local``.
Inside, rules compute on DTensors as they do on tensors: a DTensor stands for the whole tensor, and torch communicates
where an operation needs more than a process has. So curvature is right there if each operation of a rule has a
sharding of its own in torch; rules that make plain tensors on the way cannot be used, and what has not been compared
with one process is refused when attaching.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from hesscale_lightning.curvature.graph import AccumulateGrad, Node, Trace, path
from hesscale_lightning.curvature.operation import UnsupportedOperationError
from hesscale_lightning.curvature.precision import HALF

_PLAIN = (Tensor, nn.Parameter)
_ENTERS, _LEAVES = "_FromTorchTensorBackward", "_ToTorchTensorBackward"

#: Operations on DTensors that have been compared with one process, in ``tests/distributed/tensor_parallel_cases.py``.
PROVEN = frozenset({
    _ENTERS, _LEAVES, "RedistributeBackward", "RegisterPostBackwardFunctionBackward",
    "AddmmBackward0", "MmBackward0", "BmmBackward0", "ViewBackward0", "UnsafeViewBackward0",
    "TransposeBackward0", "PermuteBackward0", "CloneBackward0", "ToCopyBackward0",
    "AddBackward0", "AddBackward1", "SubBackward0", "MulBackward0", "DivBackward0", "NegBackward0",
    "TanhBackward0", "ReluBackward0", "GeluBackward0", "SiluBackward0", "SigmoidBackward0",
    "EmbeddingBackward0", "NativeLayerNormBackward0", "PowBackward0", "MeanBackward1", "RsqrtBackward0",
})  # fmt: skip


_ADVICE = (
    "let the module before it return local tensors (use_local_output=True), or run it outside of the part that is "
    "split by tensor parallelism"
)


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor; without the import where there can be none."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_distributed_loss(loss: Any) -> None:
    """Raises for a DTensor: sums over its parts would be taken for sums over the whole."""
    if is_distributed(loss):
        raise RuntimeError(
            f"the loss is a DTensor with placements {loss.placements}, expected an ordinary tensor: end the model with "
            "local outputs (output_layouts=Replicate(), use_local_output=True; without loss_parallel)"
        )


def operations_on_dtensors(found: Trace) -> set[Node]:
    """The nodes of a traced graph that work on DTensors, as far as they lead to a wanted tensor."""
    stack = [node for node in found.nodes if type(node).__name__ == _LEAVES]
    inside: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in inside or type(node) is AccumulateGrad:
            continue
        inside.add(node)
        if type(node).__name__ != _ENTERS:
            stack += [child for child, _, _ in found.edges[node] if found.index.get(child, -1) >= 0]
    return inside


def is_split(root: Node, found: Trace, method: str) -> bool:
    """Whether some tensors of a graph are DTensors; refuses what curvature cannot do with them.

    Raises:
        ValueError: For ``hesscale_rank1``.
        UnsupportedOperationError: An operation on DTensors that has not been compared with one process.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return False
    inside = operations_on_dtensors(found)
    if not inside:
        return False
    if method == "hesscale_rank1":
        raise ValueError(
            "method 'hesscale_rank1' is not supported with tensor parallelism: the rank-one part is a product over all "
            "entries of a sample, of which a process has some. Use 'hesscale', 'hesscale_gn' or 'bl89'"
        )
    for node in found.nodes:
        if node in inside and node.name() not in PROVEN:
            way = " -> ".join(step.name() for step in path(root, node))
            raise UnsupportedOperationError(
                f"{node.name()} works on DTensors here, for which curvature has not been proven. Path from the loss: "
                f"{way}. What to do: {_ADVICE}."
            )
    return True


def refusals(found: Trace) -> dict[Node, str]:
    """By node, what to do about those operations on DTensors at which :func:`is_split` would raise."""
    if "torch.distributed.tensor" not in sys.modules:
        return {}
    return {node: _ADVICE for node in operations_on_dtensors(found) if node.name() not in PROVEN}


def laid_out_like(tensor: Any, h: Any) -> Tensor:
    """A copy of a DTensor's curvature (None: zeros) with its placements, in its dtype or float32."""
    dtype = torch.float32 if tensor.dtype in HALF else tensor.dtype
    if h is None:
        return torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
    if not is_distributed(h) or h.shape != tensor.shape:
        found = f"a DTensor of shape {tuple(h.shape)}" if is_distributed(h) else "a plain tensor"
        raise RuntimeError(
            f"curvature arrived as {found} at a DTensor of shape {tuple(tensor.shape)}: a rule on the way does not "
            "work on DTensors"
        )
    # Placements that stand for sums are summed here.
    placed = h.redistribute(placements=tensor.placements).to(dtype)
    return torch.empty_like(tensor, dtype=dtype, requires_grad=False).copy_(placed)

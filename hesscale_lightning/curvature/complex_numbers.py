"""Complex tensors are refused: curvature is carried through real ones only.

By a complex tensor every entry of the loss has second derivatives by real part, by imaginary part and by both, and no
rule carries three numbers. Some rules would run on complex numbers all the same, and give a wrong diagonal.

"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hesscale_lightning.curvature.graph import AccumulateGrad, Node, path
from hesscale_lightning.curvature.operation import UnsupportedOperationError

_ADVICE = (
    "curvature is carried through real tensors only: compute with real and imaginary part as two real tensors, or take "
    "the parameters behind it out of params"
)


#: Nodes with a rule that make real numbers of complex ones. Between a real parameter and a real loss complex numbers
#: have to pass one of them, so that a graph like one that was planned for need be looked at in these places only.
_LEADING_OUT = frozenset({
    "AbsBackward0", "AngleBackward0", "CumprodBackward0", "CumsumBackward0", "DistBackward0", "LinalgSlogdetBackward0",
    "LinalgVectorNormBackward0", "MeanBackward0", "MeanBackward1", "NormBackward0", "NormBackward1", "NormBackward2",
    "NormBackward3", "ProdBackward0", "ProdBackward1", "StdBackward0", "StdMeanBackward0", "SumBackward0",
    "SumBackward1", "ToCopyBackward0", "VarBackward0", "VarMeanBackward0", "torch::autograd::CopyBackwards",
})  # fmt: skip


def leads_out(node: Node) -> bool:
    """Whether a node may make real numbers of complex ones; a user's ``torch.autograd.Function`` may do anything."""
    return node.name() in _LEADING_OUT or isinstance(node, torch.autograd.function.FunctionCtx)


def takes_complex(node: Node) -> bool:
    """Whether an input of a node is complex."""
    for child, output in node.next_functions:
        if child is not None and type(child) is not AccumulateGrad and child._input_metadata[output].dtype.is_complex:
            return True
    return False


def complex_output(node: Node) -> str | None:
    """Why curvature cannot pass ``node`` if one of its outputs is complex, or None."""
    if type(node) is AccumulateGrad:
        return None  # what is wanted of a leaf is for the plan to say
    if any(meta.dtype.is_complex for meta in node._input_metadata):
        return f"{node.name()} computes a complex tensor; {_ADVICE}"
    return None


def refuse_complex(root: Node, nodes: Iterable[Node]) -> None:
    """Raises if a complex tensor lies between the loss and the wanted tensors.

    A complex tensor that depends on a real parameter is the output of some node on the way to it, so that looking at
    the outputs of ``nodes`` is enough. Complex leaves are refused where leaves are planned for.

    Args:
        root: Where the graph begins; for the message.
        nodes: All that lead from it to a wanted tensor, in the order of backward.
    """
    for node in nodes:
        why = complex_output(node)
        if why is not None:
            way = " -> ".join(step.name() for step in path(root, node))
            raise UnsupportedOperationError(f"{why}. Path from the loss: {way}.")

"""Identities that frameworks put into a graph: around distributed modules, and where modules have backward hooks.

Those of tensor parallelism change how a tensor is spread over processes, and not the tensor: its curvature is spread as
its gradient would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import ZERO, Value


@register_rule(
    "_DDPSinkBackward", "BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward", multi_output=True
)
def identity(op: Operation, h: Sequence[Value]) -> Sequence[Value]:
    """The identity around a module's inputs or outputs; what comes before these is the framework's own."""
    return (*[ZERO] * (len(op.needs) - op.outputs()), *h)


@register_rule("_ToTorchTensorBackward", view=True)
def to_local(op: Operation, h: Value) -> Value:
    """A DTensor's part in this process, as the curvature of the whole."""
    from torch.distributed.tensor import DTensor

    spec = op.node.dtensor_spec
    placements = op.node.grad_placements or _whole(spec.placements)
    meta = spec.tensor_meta
    return DTensor.from_local(h, spec.mesh, placements, run_check=False, shape=meta.shape, stride=meta.stride)


@register_rule("_FromTorchTensorBackward", view=True)
def from_local(op: Operation, h: Value) -> Value:
    """This process's part of a DTensor."""
    placements = op.node.grad_placements or _whole(op.node.forward_input_placements)
    return h.redistribute(placements=placements).to_local()


@register_rule("RedistributeBackward", view=True)
def redistribute(op: Operation, h: Value) -> Value:
    """A DTensor, spread over processes in another way."""
    return h.redistribute(placements=_whole(op.node.current_spec.placements))


def _whole(placements: Sequence[Any]) -> tuple[Any, ...]:
    """Placements in which nothing is left to be summed: what the summands have in common is their sum's curvature."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if placement.is_partial() else placement for placement in placements)

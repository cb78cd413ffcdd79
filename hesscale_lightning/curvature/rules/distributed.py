"""Nodes that distributed training adds to a graph."""

from __future__ import annotations

from torch import Tensor

from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule


@register_rule("_DDPSinkBackward", multi_output=True)
def ddp_sink(op: Operation) -> Formula:
    """DistributedDataParallel's identity around a module's outputs; what comes before the outputs is its own."""
    own = len(op.needs) - len(op.node._input_metadata)

    def formula(h: tuple[Tensor | None, ...]) -> Diagonals:
        return (*[None] * own, *h)

    return formula

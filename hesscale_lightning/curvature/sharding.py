"""Parameters that are spread over processes: FSDP2's ``fully_shard``; DTensors in a graph are refused.

In the graph of a loss the leaves are whole parameters that exist while a group of modules runs; what the optimizer
holds are their shards, DTensors. For one backward pass the groups in the graph are gathered and held (:class:`Held`):
curvature reads whole parameters as late as at the end of backward, and FSDP2 frees them earlier. Then every whole
diagonal is averaged over the processes as gradients are, ``h = mean_r h_r``, and each process keeps its shard.

All private names of torch on which this depends are used in this module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.nn.modules.module import register_module_forward_pre_hook

from hesscale_lightning.curvature.graph import AccumulateGrad, Node, trace
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.tensor_parallel import is_distributed

#: Modules under ``fully_shard``, empty in a process that has none: what an ordinary step asks.
sharded_modules = _module_state_mapping


def hold(root: Node, wanted: dict[int, Tensor] | None, method: str) -> tuple[Held | None, dict[int, Tensor] | None]:
    """Gathers the sharded modules in a graph, after everything that can be refused was.

    Args:
        root: Where the graph begins.
        wanted: The wanted tensors by id; None wants all leaves.
        method: As for ``attach``.

    Returns:
        What holds them, None if there are none in this graph, and the tensors that stand in the graph for the wanted
        ones.
    """
    states = _states()
    by_whole = {
        id(part._unsharded_param): (part, group, state)
        for state in states
        for group in state._fsdp_param_groups
        for part in group.fsdp_params
        if hasattr(part, "_unsharded_param")
    }
    if wanted is not None:
        by_shard = {id(part.sharded_param): part._unsharded_param for part, _, _ in by_whole.values()}
        wholes = [by_shard.get(key, tensor) for key, tensor in wanted.items()]
        wanted = {id(whole): whole for whole in wholes}
    nodes = trace(root, None).nodes
    variables = [node.variable for node in nodes if type(node) is AccumulateGrad]
    parts = {id(v): by_whole[id(v)] for v in variables if id(v) in by_whole}
    if wanted is not None and any(is_distributed(t) or key in by_whole for key, t in wanted.items()):
        reached = wanted.keys() & {id(v) for v in variables}
        if not reached:
            raise RuntimeError(
                f"none of the {len(wanted)} parameters is in the graph of this loss: expected parameters of the model "
                "that computed it. Pass list(model.parameters()), of the model after fully_shard"
            )
    if not parts:
        return None, wanted
    if method == "hesscale_rank1":
        raise ValueError(
            "method 'hesscale_rank1' is not supported with fully_shard, expected 'hesscale', 'hesscale_gn' or 'bl89'"
        )
    reached_models = {id(state._state_ctx) for _, _, state in parts.values()}
    trained = {id(state._state_ctx) for part, _, state in by_whole.values() if part.sharded_param.requires_grad}
    groups = [
        group
        for state in states
        if id(state._state_ctx) in reached_models or id(state._state_ctx) not in trained  # frozen ones have no leaves
        for group in state._fsdp_param_groups
        if all(hasattr(part, "_unsharded_param") for part in group.fsdp_params)
    ]
    for group in groups:
        factor = getattr(group, "gradient_divide_factor", None)
        if factor is not None:
            raise RuntimeError(
                f"set_gradient_divide_factor({factor}) is set on a sharded module, and diagonals are averaged over the "
                "processes: remove it, and scale the loss instead"
            )
    held = Held({key: part for key, (part, _, _) in parts.items()}, groups)
    try:
        with no_recomputation():
            _refuse_recomputed(nodes)
    except BaseException:
        held.release()
        raise
    return held, wanted


def _states() -> list[Any]:
    """Of the sharded modules, in the order in which they were sharded, which is that of all processes."""
    states = {id(state): state for ref in sharded_modules.values() if (state := ref()) is not None}
    return [state for state in states.values() if hasattr(state, "_fsdp_param_groups")]


def _refuse_recomputed(nodes: Sequence[Node]) -> None:
    """Has every checkpointed block run once, which :func:`no_recomputation` refuses where that takes a sharded one."""
    frames: set[int] = set()
    for node in nodes:
        for name in dir(type(node)):
            saved = getattr(node, name, None) if name.startswith("_raw_saved_") else None
            hook = getattr(saved, "unpack_hook", None)
            if hook is None or not hook.__qualname__.startswith("_checkpoint_hook."):
                continue
            for frame in (cell.cell_contents for cell in hook.__closure__):
                if hasattr(frame, "is_recomputed") and id(frame) not in frames:
                    frames.add(id(frame))
                    getattr(node, name.replace("_raw", "", 1))
                    frame.recomputed.clear()
                    frame.is_recomputed.clear()


@contextmanager
def no_recomputation() -> Iterator[None]:
    """Refuses that a sharded module runs again, as it does when the saved tensors of a checkpointed one are read."""

    def refuse(module: nn.Module, _: Any) -> None:
        if module in sharded_modules:
            raise RuntimeError(
                f"a module under fully_shard ({type(module).__name__}) is checkpointed, and would be run again while "
                "its group is gathered: put the checkpoint inside the sharded module, around its parts"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


class Held:
    """Groups of whole parameters that stay gathered until a backward pass has ended.

    Args:
        parts: By the ``id`` of a whole parameter, FSDP2's record of it.
        groups: All that the graph may refer to, those of frozen parameters as well.
    """

    def __init__(self, parts: dict[int, Any], groups: list[Any]) -> None:
        self._parts = parts
        self._groups = groups
        self._frees: list[bool] = []  # whether FSDP2 frees each group in backward, once that has begun
        self._arrived: list[tuple[Any, Tensor, Tensor | None, bool]] = []
        self._gather()

    def _gather(self) -> None:
        for group in self._groups:
            group.unshard()
            group.wait_for_unshard()

    def begin(self) -> None:
        """Gathers again what another forward or backward pass has freed since, and keeps it from being freed."""
        self._gather()
        self._frees = [group.reshard_after_backward for group in self._groups]
        for group in self._groups:
            group.reshard_after_backward = False

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Hands the groups back to FSDP2, which frees those that have yet to pass backward's end itself."""
        state = sys.modules["torch.distributed.fsdp._fully_shard._fsdp_common"].TrainingState
        for group, frees in zip(self._groups, self._frees, strict=False):
            group.reshard_after_backward = frees
        for group in self._groups:
            if group.reshard_after_backward and group._training_state != state.PRE_BACKWARD:
                group.reshard()
        self._groups = []

    def fresh(self, leaf: Tensor) -> bool:
        """Whether the gradient of a leaf starts anew."""
        if id(leaf) not in self._parts:
            return leaf.grad is None
        part = self._parts[id(leaf)]
        return part.sharded_param.grad is None and leaf.grad is None and part.unsharded_accumulated_grad is None

    def takes(self, leaf: Tensor, h: Tensor | None, fresh: bool) -> bool:
        """Keeps what arrived at a whole parameter for :meth:`scatter`; False for any other leaf."""
        if id(leaf) not in self._parts:
            return False
        if h is not None and h.shape != leaf.shape:
            raise RuntimeError(f"curvature of shape {tuple(h.shape)} arrived at a tensor of shape {tuple(leaf.shape)}")
        self._arrived.append((self._parts[id(leaf)], leaf, h, fresh))
        return True

    def scatter(self) -> None:
        """Averages what arrived over the processes, and adds each process's part to its shard's ``hess_diag``."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        for part, leaf, h, fresh in self._arrived:
            shard = part.sharded_param
            dtype = torch.float32 if shard.dtype in HALF else shard.dtype
            whole: Any = h
            if is_distributed(leaf):  # inside tensor parallelism: this process's part of the columns or rows
                whole = None if h is None else h.redistribute(placements=leaf.placements)
                shape = leaf.to_local().shape
                whole = None if whole is None else whole.to_local()
            else:
                shape = leaf.shape
            whole = torch.zeros(shape, dtype=dtype, device=leaf.device) if whole is None else whole.to(dtype)
            mesh = part.mesh_info.mesh
            spread = DTensor.from_local(whole.contiguous(), mesh, [Partial("avg")] * mesh.ndim, run_check=False)
            placements = [Replicate()] * (mesh.ndim - 1) + [part.fsdp_placement]
            mine = spread.redistribute(placements=placements).to_local()
            mine = DTensor.from_local(
                mine, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
            )
            earlier = None if fresh else getattr(shard, "hess_diag", None)
            shard.hess_diag = mine if earlier is None else earlier + mine
        self._arrived = []

"""Parameters that FSDP2's ``fully_shard`` spreads over processes.

In the graph of a loss the leaves are whole parameters that exist while a group of modules runs; what the optimizer
holds are their shards, DTensors. For one backward pass the groups in the graph are gathered and held (:class:`Held`):
curvature reads whole parameters as late as at the end of backward, and FSDP2 frees them earlier. Then every whole
diagonal is averaged over the processes as gradients are, ``h = mean_r h_r``, and each process keeps its shard
(:mod:`.held_groups`).

What is read of FSDP2 that is not public is listed in :mod:`.sharding_names`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from hesscale_lightning.curvature.graph import AccumulateGrad, Node, trace
from hesscale_lightning.curvature.held_groups import Held, missing_members
from hesscale_lightning.curvature.sharding_names import check_group, groups_of, no_states, sharded_module_states
from hesscale_lightning.curvature.tensor_parallel import is_distributed


class _Unknown(dict[Any, Any]):
    """Stands for the sharded modules where torch does not tell: there may be some as soon as there are DTensors."""

    def __bool__(self) -> bool:
        return "torch.distributed.tensor" in sys.modules


_states_of_modules = sharded_module_states()
#: Modules under ``fully_shard``, empty in a process that has none: what an ordinary step asks.
sharded_modules: MutableMapping[Any, Any] = _Unknown() if _states_of_modules is None else _states_of_modules

#: What FSDP2 puts before a module: its backward frees the module's parameters and reduces their gradients.
BARRIER = "RegisterPostBackwardFunctionBackward"


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
    if type(sharded_modules) is _Unknown:
        _refuse_unknown(root, wanted)
        return None, wanted
    states = _states()
    records = [(part, group, state) for state in states for group in groups_of(state) for part in group.fsdp_params]
    by_whole = {
        id(part._unsharded_param): (part, group, state)
        for part, group, state in records
        if hasattr(part, "_unsharded_param")
    }
    asked = wanted
    if wanted is not None:
        wanted = {id(whole): whole for whole in stand_ins(wanted.values())}
    nodes = trace(root, None).nodes
    variables = [node.variable for node in nodes if type(node) is AccumulateGrad]
    parts = {id(v): by_whole[id(v)] for v in variables if id(v) in by_whole}
    if wanted is not None and (parts or any(is_distributed(t) or key in by_whole for key, t in wanted.items())):
        reached = wanted.keys() & {id(v) for v in variables}
        if not reached and not any(t.grad_fn is not None for t in wanted.values()):
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
    models = {id(state._state_ctx) for _, _, state in parts.values()}
    groups = [group for state in states if id(state._state_ctx) in models for group in groups_of(state)]
    _refuse_scaled(groups)
    members = [
        (part, group)
        for part, group, state in records
        if id(state._state_ctx) in models
        and part.sharded_param.requires_grad
        and (asked is None or not asked.keys().isdisjoint((id(part.sharded_param), id(_whole(part)))))
    ]
    elsewhere = missing_members(members, parts)
    # Of frozen modules no leaf tells; those that gradients pass have their group in the graph.
    passed = {id(group): group for node in nodes if (group := _group_at(node)) is not None}
    groups += [group for key, group in passed.items() if key not in set(map(id, groups))]
    held = Held(members, elsewhere, [group for group in groups if all(map(_whole_is_known, group.fsdp_params))])
    try:
        with no_recomputation():
            _refuse_recomputed(nodes)
    except BaseException:
        held.release()
        raise
    return held, wanted


def stand_ins(params: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that stand in a graph for some parameters: for shards whole parameters, the others for themselves."""
    params = list(params)
    if not sharded_modules or not any(map(is_distributed, params)):
        return params
    by_shard = {
        id(part.sharded_param): part._unsharded_param
        for state in _states()
        for group in groups_of(state)
        for part in group.fsdp_params
        if hasattr(part, "_unsharded_param")
    }
    return [by_shard.get(id(p), p) for p in params]


def _refuse_scaled(groups: Sequence[Any]) -> None:
    for group in groups:
        factor = getattr(group, "gradient_divide_factor", None)
        if factor is not None:
            raise RuntimeError(
                f"set_gradient_divide_factor({factor}) is set on a sharded module, and diagonals are averaged over the "
                "processes: remove it, and scale the loss instead"
            )


def _refuse_unknown(root: Node, wanted: dict[int, Tensor] | None) -> None:
    """Raises where a graph may have sharded modules and this torch does not tell which they are."""
    nodes = trace(root, None).nodes
    leaves = {id(node.variable) for node in nodes if type(node) is AccumulateGrad}
    shards = [t for key, t in (wanted or {}).items() if is_distributed(t) and key not in leaves]
    if shards or any(type(node).__name__ == BARRIER for node in nodes):
        raise no_states()


def _whole(part: Any) -> Any:
    return getattr(part, "_unsharded_param", None)


def _whole_is_known(part: Any) -> bool:
    return hasattr(part, "_unsharded_param")


def _group_at(node: Node) -> Any:
    """The group of the module before which FSDP2 has put a node."""
    return getattr(node, "param_group", None) if type(node).__name__ == BARRIER else None


def _states() -> list[Any]:
    """Of the sharded modules, in the order in which they were sharded, which is that of all processes."""
    states = {id(state): state for ref in sharded_modules.values() if (state := ref()) is not None}
    # By name, so that nothing is imported; replicate's state is one of these as well.
    found = [s for s in states.values() if any(base.__name__ == "FSDPState" for base in type(s).__mro__)]
    for state in found:
        for group in groups_of(state):
            check_group(group)
    return found


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

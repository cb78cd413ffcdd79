"""The names of torch that are not part of its public interface, looked up in one place.

What every pass needs is looked up when the package is imported, what ``fully_shard`` needs when a graph with sharded
modules is attached: a torch without those trains everything else.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.utils.checkpoint


def lookup(root: Any, path: str, purpose: str) -> Any:
    """A name of torch.

    Args:
        root: The module that it begins at.
        path: The rest, with dots.
        purpose: What it is needed for; for the message.

    Raises:
        ImportError: This torch does not have it.
    """
    found = root
    for part in path.split("."):
        if not hasattr(found, part):
            raise ImportError(missing(f"{getattr(root, '__name__', type(root).__name__)}.{path}", purpose))
        found = getattr(found, part)
    return found


def missing(name: str, purpose: str) -> str:
    """The message for a name that this torch does not have."""
    return (
        f"hesscale_lightning needs {name} for {purpose}, which torch {torch.__version__} does not have: it is not part "
        "of torch's public interface. Install the torch that this version was tested with (constraints.txt), or a "
        "newer hesscale_lightning"
    )


_PASSES = "computing curvature during backward"
will_execute: Callable[[Any], bool] = lookup(torch, "_C._will_engine_execute_node", _PASSES)
current_group: Callable[[], Any] = lookup(torch, "_C._get_graph_exec_group", _PASSES)
set_group: Callable[[Any], None] = lookup(torch, "_C._set_graph_exec_group", _PASSES)
keeps_graph: Callable[[], bool] = lookup(torch, "_C._autograd._get_current_graph_task_keep_graph", _PASSES)
current_task: Callable[[], int] = lookup(torch, "_C._current_graph_task_id", _PASSES)
EnableTorchFunction: Any = lookup(torch, "_C._EnableTorchFunction", _PASSES)
queue_callback: Callable[[Callable[[], None]], None] = lookup(
    torch.autograd.Variable, "_execution_engine.queue_callback", _PASSES
)
GraphExecGroup: Any = lookup(torch.utils.checkpoint, "GraphExecGroup", _PASSES)
#: Below autograd nothing is recorded, as under no_grad, and every operation takes one dispatch less.
BelowAutograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", torch.no_grad)

_SHARDING = "modules under fully_shard"
#: What is read of FSDP2's group of parameters, and of its record of a parameter.
_OF_GROUP = (
    "all_reduce_grads",
    "fsdp_params",
    "mesh_info",
    "reduce_grads",
    "reshard",
    "reshard_after_backward",
    "unshard",
    "wait_for_unshard",
    "_training_state",
)
_OF_PARAMETER = ("_orig_size", "fsdp_placement", "sharded_param", "unsharded_accumulated_grad")
_known: set[type] = set()


def sharded_module_states() -> MutableMapping[Any, Any] | None:
    """The modules under ``fully_shard`` with a reference to the state of each; None if this torch does not tell."""
    try:
        from torch.distributed._composable_state import _module_state_mapping as states
    except ImportError:
        return None
    return states


def check_group(group: Any) -> None:
    """Raises ImportError if FSDP2's groups do not have what is read of them."""
    if type(group) in _known:
        return
    for name in _OF_GROUP:
        lookup(group, name, _SHARDING)
    for part in group.fsdp_params[:1]:
        for name in _OF_PARAMETER:
            lookup(part, name, _SHARDING)
    _known.add(type(group))


def groups_of(state: Any) -> Any:
    """The groups of parameters of one sharded module."""
    return lookup(state, "_fsdp_param_groups", _SHARDING)


def no_states() -> ImportError:
    """The error for sharded modules where this torch does not tell which they are."""
    return ImportError(missing("torch.distributed._composable_state._module_state_mapping", _SHARDING))

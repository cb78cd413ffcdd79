"""What is read of FSDP2 that is not part of torch's public interface, looked up where it is used.

A torch without these names trains everything that is not under ``fully_shard``; what every pass needs is in
``hesscale_lightning._torch_names`` and looked up when the package is imported.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from hesscale_lightning._torch_names import SUPPORTED

#: What is read of FSDP2's group of parameters, and of its record of a parameter.
_OF_GROUP = (
    "all_reduce_grads",
    "device",
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
    """Raises ImportError if FSDP2's groups and records do not have what is read of them."""
    if type(group) in _known:
        return
    for holder, names in [(group, _OF_GROUP), *[(part, _OF_PARAMETER) for part in group.fsdp_params[:1]]]:
        for name in names:
            if not hasattr(holder, name):
                raise _lacking(f"{type(holder).__name__}.{name}")
    _known.add(type(group))


def groups_of(state: Any) -> Any:
    """The groups of parameters of one sharded module."""
    if not hasattr(state, "_fsdp_param_groups"):
        raise _lacking(f"{type(state).__name__}._fsdp_param_groups")
    return state._fsdp_param_groups


def no_states() -> ImportError:
    """The error for sharded modules where this torch does not tell which they are."""
    return _lacking("torch.distributed._composable_state._module_state_mapping")


def _lacking(name: str) -> ImportError:
    return ImportError(
        f"hesscale_lightning needs {name} for modules under fully_shard, which the installed torch {torch.__version__} "
        f"does not have. Its test suite passes on torch {SUPPORTED[0]} to {SUPPORTED[1]}: install one of these, or "
        "train with DDP"
    )

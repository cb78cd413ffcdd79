"""The names of torch that are not public and without which the package does not work, in one table.

The engine reads autograd's internals, which torch may rename in any release. They are looked up when the package is
imported, so that a torch that has changed is named at once, and not by an AttributeError in the middle of a backward
pass. ``tests/test_torch_names.py`` reads the sources and fails where one uses a name that is not in the table.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch

from hesscale_lightning._version import __version__

#: The oldest and the newest release that `make matrix` runs the test suite on.
SUPPORTED = ("2.13", "2.14")

#: Looked up when the package is imported.
NAMES = (
    # one backward pass: which nodes will run, when it ends, whether the graph stays, checkpoints
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._current_graph_task_id",
    "torch._C._get_graph_exec_group",
    "torch._C._set_graph_exec_group",
    "torch._C._will_engine_execute_node",
    "torch.autograd.Variable._execution_engine",
    # what autograd and tensors know of themselves
    "torch._C._functions.AccumulateGrad._input_metadata",
    "torch.Tensor._backward_hooks",
    "torch.Tensor._cdata",
    "torch.Tensor._post_accumulate_grad_hooks",
    "torch.Tensor._version",
    "torch.UntypedStorage._cdata",
    # modes
    "torch._C.DisableTorchFunctionSubclass",
    "torch._C._DisableAutocast",
    "torch._C._EnableTorchFunction",
    "torch._C._set_grad_enabled",
    "torch.utils._python_dispatch._disable_current_modes",
    # capturing a step
    "torch._ops.OpOverload",
    "torch._subclasses.FakeTensor",
    "torch._subclasses.FakeTensorMode",
    "torch.compiler._is_compiling_flag",
    "torch.distributions.Distribution._validate_args",
    "torch.utils._pytree.tree_flatten",
    "torch.utils._pytree.tree_map_only",
    "torch.utils._pytree.tree_unflatten",
    # operations
    "torch.ops.aten._adaptive_avg_pool2d_backward.default",
    "torch.ops.aten._adaptive_avg_pool3d_backward.default",
    "torch.ops.aten._ctc_loss_backward",
    "torch.ops.aten._embedding_bag_backward.default",
    "torch.ops.aten._embedding_bag_per_sample_weights_backward.default",
    "torch.ops.aten._pack_padded_sequence_backward.default",
    "torch.ops.aten._safe_softmax.default",
    "torch.ops.aten._unsafe_masked_index.default",
    "torch.ops.aten._unsafe_masked_index_put_accumulate.default",
    "torch.ops.aten._upsample_bicubic2d_aa.default",
    "torch.ops.aten._upsample_bilinear2d_aa.default",
    # lists of tensors
    "torch._foreach_abs",
    "torch._foreach_add",
    "torch._foreach_add_",
    "torch._foreach_addcmul_",
    "torch._foreach_clamp_max_",
    "torch._foreach_clamp_min_",
    "torch._foreach_copy_",
    "torch._foreach_div",
    "torch._foreach_lerp_",
    "torch._foreach_mul",
    "torch._foreach_mul_",
    "torch._foreach_norm",
    "torch._foreach_sqrt",
    "torch._foreach_sqrt_",
    "torch._foreach_sub_",
)

#: Looked up when a step is first compiled: Inductor is slow to import.
INDUCTOR = (
    "torch._inductor.compile_fx.compile_fx",
    "torch._inductor.compile_fx.compile_fx_inner",
    "torch._inductor.config.cpp.cxx",
)


def missing(names: Iterable[str]) -> list[str]:
    """Those of the dotted names that the installed torch does not have."""
    return [name for name in names if not _exists(name)]


def require(names: Iterable[str]) -> None:
    """Raises one error that says which names are missing, from which torch, and which releases have them.

    Raises:
        ImportError: The installed torch lacks one of the names.

    Example:
        >>> require(["torch.nn.Linear", "torch._C._no_such_name"])
        Traceback (most recent call last):
        ImportError: hesscale_lightning ... needs torch._C._no_such_name, which the installed torch ... does not have...
    """
    lacking = missing(names)
    if lacking:
        oldest, newest = SUPPORTED
        major, minor = newest.split(".")
        fitting = f"torch>={oldest},<{major}.{int(minor) + 1}"
        raise ImportError(
            f"hesscale_lightning {__version__} needs {', '.join(lacking)}, which the installed torch "
            f"{torch.__version__} does not have. It is tested on torch {oldest} to {newest}: install one of "
            f"these (pip install '{fitting}'), or a hesscale_lightning made for your torch"
        )


def _exists(name: str) -> bool:
    found: Any = torch
    parts = name.split(".")
    for k, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = import_module(".".join(parts[:k]))
            except ImportError:
                return False
    return True


require(NAMES)

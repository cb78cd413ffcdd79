"""Reads the files that policies save, without running what a stranger may have put into one.

A saved policy holds weights, and what the policy is built from: spaces, numbers, and classes such as the optimizer's.
It is a pickle, and a pickle may call anything. So only what is listed here is called: spaces of Gymnasium, arrays and
generators of NumPy, activations and optimizers of PyTorch, extractors and schedules of Stable-Baselines3, AdaHesScale.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3.common import torch_layers, utils
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch import nn

from hesscale_lightning.optim import AdaHesScale, StepSizeScaling


def read_policy(path: Any, device: torch.device, trusted: bool) -> dict[str, Any]:
    """What a policy's ``save`` has written.

    Args:
        path: A file's path, or a file open for reading.
        device: Where to put the tensors.
        trusted: Call whatever the file names.

    Raises:
        ValueError: The file names something that is not listed, holds no policy, or cannot be read.
    """
    expected = "expected a file that a policy's save() has written"
    with torch.serialization.safe_globals(_listed()):
        try:
            saved = torch.load(path, map_location=device, weights_only=not trusted)
        except pickle.UnpicklingError as error:
            foreign = _foreign(path)
            if not foreign:
                raise ValueError(f"Found {path}, which cannot be read: {error}; {expected}") from error
            raise ValueError(
                f"Found {path} with {', '.join(foreign)}, and loading would run that code; {expected}, with classes of "
                "PyTorch, Gymnasium, Stable-Baselines3 and this package alone. If classes of your own are named, allow "
                "them by torch.serialization.add_safe_globals([...]); if you trust whoever made the file, pass "
                "trusted=True"
            ) from error
        except (EOFError, RuntimeError) as error:
            raise ValueError(f"Found {path}, which torch.load cannot read; {expected}") from error
    if not isinstance(saved, dict) or not {"data", "state_dict"} <= saved.keys():
        found = (
            f"a dict of {', '.join(map(str, saved)) or 'nothing'}" if isinstance(saved, dict) else type(saved).__name__
        )
        raise ValueError(f"Found {path} with {found}, without data and state_dict; {expected}")
    return saved


def _foreign(path: Any) -> list[str]:
    """The names in a file that are not listed."""
    if hasattr(path, "seek"):
        path.seek(0)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, ValueError):  # not in the format that torch.save writes
        return []


def _dummy_schedule(owner: Any, name: str) -> Callable[[float], float]:
    """In place of ``getattr``, by which a pickle names the schedule that Stable-Baselines3's policies save."""
    if owner is not BasePolicy or name != "_dummy_schedule":
        raise pickle.UnpicklingError(f"Found getattr({owner!r}, {name!r}) in a saved policy, which is not read")
    return BasePolicy._dummy_schedule


def _listed() -> list[Any]:
    """What a saved policy may name; pairs give the name under which a pickle calls something."""
    bits = np.random.PCG64(0)  # of a space that was seeded
    made_by = [x.__reduce__()[0] for x in (np.zeros(1), np.float32(0), np.random.Generator(bits), bits, bits.seed_seq)]
    kinds = ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
    spaces = [getattr(gymnasium.spaces, name) for name in gymnasium.spaces.__all__]
    return [
        *(space for space in spaces if isinstance(space, type)),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
        np.random.PCG64,
        np.random.SeedSequence,
        *made_by,
        *(c for c in vars(nn.modules.activation).values() if isinstance(c, type) and issubclass(c, nn.Module)),
        *(c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)),
        RMSpropTFLike,
        AdaHesScale,
        StepSizeScaling,
        functools.partial,
        torch_layers.FlattenExtractor,
        torch_layers.NatureCNN,
        torch_layers.CombinedExtractor,
        utils.ConstantSchedule,
        utils.FloatSchedule,
        utils.LinearSchedule,
        BasePolicy,
        (_dummy_schedule, "builtins.getattr"),
    ]

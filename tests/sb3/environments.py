"""Tiny environments: random observations that the seed decides, and a reward that depends on observation and action."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

OBSERVATIONS = {
    "vector": spaces.Box(-1, 1, (3,), np.float32),
    "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),  # the smallest size that NatureCNN takes
    "dict": spaces.Dict({"position": spaces.Box(-1, 1, (3,), np.float32), "colour": spaces.Discrete(3)}),
}
ACTIONS = {
    "Discrete": spaces.Discrete(3),
    "Box": spaces.Box(-1, 1, (2,), np.float32),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(3),
}


class Noise(gym.Env):
    """Shows noise for a few steps; every third reward is a penalty that only some actions avoid.

    Args:
        actions: A key of ``ACTIONS``.
        observations: A key of ``OBSERVATIONS``.
        length: Steps of an episode.
    """

    def __init__(self, actions: str, observations: str = "vector", length: int = 7) -> None:
        # Spaces have random states of their own, which environments must not share.
        self.action_space = deepcopy(ACTIONS[actions])
        self.observation_space = deepcopy(OBSERVATIONS[observations])
        self.length = length
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        reward = float(np.cos(np.sum(action) + self.steps)) - (self.steps % 3 == 0)
        ended = self.steps >= self.length
        return self.observation_space.sample(), reward, ended, False, {}

    def action_masks(self) -> np.ndarray:
        """For MaskablePPO: the first choice is forbidden in every other step."""
        space = self.action_space
        sizes = {
            spaces.Discrete: lambda: [space.n],
            spaces.MultiDiscrete: lambda: space.nvec,
            spaces.MultiBinary: lambda: [2] * space.n,
        }[type(space)]()
        masks = [np.ones(size, dtype=bool) for size in sizes]
        masks[0][0] = self.steps % 2 == 0
        return np.concatenate(masks)

"""Stable-Baselines3's algorithms with compiled updates: the same but for ``train()``."""

from sb3_integration.compiled_algorithms.off_policy import CompiledDDPG, CompiledDQN, CompiledSAC, CompiledTD3
from sb3_integration.compiled_algorithms.on_policy import CompiledA2C, CompiledPPO

__all__ = ["CompiledA2C", "CompiledDDPG", "CompiledDQN", "CompiledPPO", "CompiledSAC", "CompiledTD3"]

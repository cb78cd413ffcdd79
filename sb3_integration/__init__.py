"""HesScale for Stable-Baselines3: pass another policy class, and AdaHesScale drives the algorithm.

from stable_baselines3 import PPO
from sb3_integration import HesScaleActorCriticPolicy

PPO(HesScaleActorCriticPolicy, "CartPole-v1").learn(50_000)
"""

from sb3_integration.callback import HesScaleLoggingCallback
from sb3_integration.compiled_algorithms import (
    CompiledA2C,
    CompiledDDPG,
    CompiledDQN,
    CompiledPPO,
    CompiledSAC,
    CompiledTD3,
)
from sb3_integration.policies import (
    HesScaleActionValueMixin,
    HesScaleActorCriticCnnPolicy,
    HesScaleActorCriticMixin,
    HesScaleActorCriticPolicy,
    HesScaleDQNCnnPolicy,
    HesScaleDQNMultiInputPolicy,
    HesScaleDQNPolicy,
    HesScaleMultiInputActorCriticPolicy,
    HesScaleSACCnnPolicy,
    HesScaleSACMultiInputPolicy,
    HesScaleSACPolicy,
    HesScaleTD3CnnPolicy,
    HesScaleTD3MultiInputPolicy,
    HesScaleTD3Policy,
    HesScaleValueMixin,
)

__all__ = [
    "CompiledA2C",
    "CompiledDDPG",
    "CompiledDQN",
    "CompiledPPO",
    "CompiledSAC",
    "CompiledTD3",
    "HesScaleActionValueMixin",
    "HesScaleActorCriticCnnPolicy",
    "HesScaleActorCriticMixin",
    "HesScaleActorCriticPolicy",
    "HesScaleDQNCnnPolicy",
    "HesScaleDQNMultiInputPolicy",
    "HesScaleDQNPolicy",
    "HesScaleLoggingCallback",
    "HesScaleMultiInputActorCriticPolicy",
    "HesScaleSACCnnPolicy",
    "HesScaleSACMultiInputPolicy",
    "HesScaleSACPolicy",
    "HesScaleTD3CnnPolicy",
    "HesScaleTD3MultiInputPolicy",
    "HesScaleTD3Policy",
    "HesScaleValueMixin",
]

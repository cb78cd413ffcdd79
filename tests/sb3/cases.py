"""The table that the tests of this folder share: every algorithm with the spaces, policies and options it can have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import sb3_integration as ours
from sb3_integration import contrib
from tests.sb3.environments import Noise

ON_POLICY = {"n_steps": 8, "gamma": 0.9}
MINIBATCHES = {**ON_POLICY, "batch_size": 8, "n_epochs": 2}
OFF_POLICY = {"learning_starts": 8, "batch_size": 8, "buffer_size": 64, "train_freq": 4, "gradient_steps": 2}
TINY = {"net_arch": [8]}


@dataclass(frozen=True)
class Case:
    """One algorithm in one setting.

    Attributes:
        algorithm: The algorithm's class, which stays as it is.
        policy: The policy's class.
        plain: The name or the class of the policy of Stable-Baselines3 that it stands for.
        actions: A key of ``environments.ACTIONS``.
        setting: What is special; empty for the algorithm's plain use.
        observations: A key of ``environments.OBSERVATIONS``.
        environments: How many environments run at once.
        normalize: Whether they are wrapped in VecNormalize.
        options: Arguments of the algorithm.
        policy_options: ``policy_kwargs``.
        still: Prefixes of the names of parameters that the optimizer never moves.
        timesteps: Length of the run; at least two calls of ``train()``.
    """

    algorithm: type[BaseAlgorithm]
    policy: type
    plain: str | type
    actions: str
    setting: str = ""
    observations: str = "vector"
    environments: int = 2
    normalize: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    still: tuple[str, ...] = ()
    timesteps: int = 32

    def __str__(self) -> str:
        return " ".join(filter(None, [self.algorithm.__name__, self.actions, self.setting])).replace(" ", "-")

    def environment(self) -> Any:
        made = make_vec_env(partial(Noise, self.actions, self.observations), n_envs=self.environments, seed=0)
        return VecNormalize(made) if self.normalize else made

    def build(self, policy: Any = None, policy_options: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """The algorithm, ready to learn; ``policy`` replaces the class, the others add to the case's options."""
        arguments = {"device": "cpu", "seed": 0, **DEFAULTS[self.algorithm], **self.options, **options}
        policy_kwargs = {**TINY, **self.policy_options, **(policy_options or {})}
        with warnings.catch_warnings():  # the truncated minibatch of one is what some cases are for
            warnings.filterwarnings("ignore", "You have specified a mini-batch size")
            return self.algorithm(policy or self.policy, self.environment(), policy_kwargs=policy_kwargs, **arguments)


DEFAULTS: dict[type, dict[str, Any]] = {
    PPO: MINIBATCHES, A2C: ON_POLICY, MaskablePPO: MINIBATCHES, RecurrentPPO: MINIBATCHES,
    TRPO: {**ON_POLICY, "batch_size": 8, "n_critic_updates": 2},
    DQN: OFF_POLICY, QRDQN: OFF_POLICY, SAC: OFF_POLICY, TQC: OFF_POLICY, CrossQ: OFF_POLICY,
    TD3: OFF_POLICY, DDPG: OFF_POLICY,
}  # fmt: skip

_mlp = (ours.HesScaleActorCriticPolicy, "MlpPolicy")
_cnn = (ours.HesScaleActorCriticCnnPolicy, "CnnPolicy")
_multi = (ours.HesScaleMultiInputActorCriticPolicy, "MultiInputPolicy")
_lstm = {"lstm_hidden_size": 4, "net_arch": [4]}
_small_cnn = {"features_extractor_kwargs": {"features_dim": 8}, "net_arch": []}
_sde = {"use_sde": True}
_entropy = {"ent_coef": 0.1}


def _actor_critic() -> list[Case]:
    cases = []
    for algorithm in (PPO, A2C):
        add: Callable[..., None] = lambda *args, algorithm=algorithm, **kw: cases.append(Case(algorithm, *args, **kw))  # noqa: E731
        for actions in ("Discrete", "Box", "MultiDiscrete", "MultiBinary"):
            add(*_mlp, actions)
            add(*_mlp, actions, "entropy bonus", options=_entropy)
        add(*_mlp, "Box", "gSDE", options={**_sde, **_entropy})
        add(*_mlp, "Box", "gSDE squashed", options={**_sde, **_entropy}, policy_options={"squash_output": True})
        add(*_mlp, "Box", "gSDE expln", options=_sde, policy_options={"use_expln": True})
        add(*_mlp, "Box", "gSDE one std per feature", options=_sde, policy_options={"full_std": False})
        add(*_mlp, "Box", "separate extractors", policy_options={"share_features_extractor": False})
        add(*_mlp, "Box", "VecNormalize", normalize=True)
        add(*_mlp, "Discrete", "one environment", environments=1)
        add(*_cnn, "Discrete", "NatureCNN", observations="image", policy_options=_small_cnn, timesteps=16)
        add(*_cnn, "Box", "NatureCNN twice", observations="image", timesteps=16,
            policy_options={**_small_cnn, "share_features_extractor": False})  # fmt: skip
        add(*_multi, "Discrete", "dict observations", observations="dict")
    return cases


CASES: list[Case] = [
    *_actor_critic(),
    Case(PPO, *_mlp, "Box", "value clipping", options={"clip_range_vf": 0.1}),
    Case(PPO, *_mlp, "Box", "target_kl", options={"target_kl": 1e-4, "n_epochs": 10}),
    *[Case(PPO, *_mlp, actions, setting, options=options, environments=1, timesteps=18)
      for actions in ("Discrete", "Box")
      for setting, options in (("minibatches of one", {"n_steps": 4, "batch_size": 1, "normalize_advantage": False}),
                               ("last minibatch of one", {"n_steps": 9}))],
    Case(DQN, ours.HesScaleDQNPolicy, "MlpPolicy", "Discrete"),
    Case(DQN, ours.HesScaleDQNPolicy, "MlpPolicy", "Discrete", "VecNormalize", normalize=True),
    Case(DQN, ours.HesScaleDQNPolicy, "MlpPolicy", "Discrete", "n-step returns", options={"n_steps": 3}),
    Case(DQN, ours.HesScaleDQNCnnPolicy, "CnnPolicy", "Discrete", "NatureCNN", observations="image",
         policy_options=_small_cnn, timesteps=16),
    Case(DQN, ours.HesScaleDQNMultiInputPolicy, "MultiInputPolicy", "Discrete", "dict observations",
         observations="dict"),
    Case(SAC, ours.HesScaleSACPolicy, "MlpPolicy", "Box"),
    Case(SAC, ours.HesScaleSACPolicy, "MlpPolicy", "Box", "fixed entropy coefficient", options={"ent_coef": 0.2}),
    Case(SAC, ours.HesScaleSACPolicy, "MlpPolicy", "Box", "gSDE", options=_sde),
    Case(SAC, ours.HesScaleSACPolicy, "MlpPolicy", "Box", "gSDE expln", options=_sde,
         policy_options={"use_expln": True}),
    Case(SAC, ours.HesScaleSACPolicy, "MlpPolicy", "Box", "one critic", policy_options={"n_critics": 1}),
    Case(SAC, ours.HesScaleSACCnnPolicy, "CnnPolicy", "Box", "NatureCNN", observations="image",
         policy_options={**_small_cnn, "net_arch": [4]}, timesteps=16),
    Case(SAC, ours.HesScaleSACCnnPolicy, "CnnPolicy", "Box", "shared NatureCNN", observations="image", timesteps=16,
         policy_options={**_small_cnn, "net_arch": [4], "share_features_extractor": True}),
    Case(SAC, ours.HesScaleSACMultiInputPolicy, "MultiInputPolicy", "Box", "dict observations", observations="dict"),
    Case(TD3, ours.HesScaleTD3Policy, "MlpPolicy", "Box"),
    Case(TD3, ours.HesScaleTD3CnnPolicy, "CnnPolicy", "Box", "NatureCNN", observations="image", timesteps=16,
         policy_options={**_small_cnn, "net_arch": [4]}),
    Case(TD3, ours.HesScaleTD3MultiInputPolicy, "MultiInputPolicy", "Box", "dict observations", observations="dict"),
    Case(DDPG, ours.HesScaleTD3Policy, "MlpPolicy", "Box"),
    Case(QRDQN, contrib.HesScaleQRDQNPolicy, "MlpPolicy", "Discrete", policy_options={"n_quantiles": 4}),
    Case(QRDQN, contrib.HesScaleQRDQNCnnPolicy, "CnnPolicy", "Discrete", "NatureCNN", observations="image",
         policy_options={**_small_cnn, "n_quantiles": 4}, timesteps=16),
    Case(QRDQN, contrib.HesScaleQRDQNMultiInputPolicy, "MultiInputPolicy", "Discrete", "dict observations",
         observations="dict", policy_options={"n_quantiles": 4}),
    Case(TQC, contrib.HesScaleTQCPolicy, "MlpPolicy", "Box", policy_options={"n_quantiles": 5}),
    Case(TQC, contrib.HesScaleTQCPolicy, "MlpPolicy", "Box", "gSDE", options=_sde, policy_options={"n_quantiles": 5}),
    Case(TQC, contrib.HesScaleTQCCnnPolicy, "CnnPolicy", "Box", "NatureCNN", observations="image", timesteps=16,
         policy_options={**_small_cnn, "net_arch": [4], "n_quantiles": 5}),
    Case(TQC, contrib.HesScaleTQCMultiInputPolicy, "MultiInputPolicy", "Box", "dict observations", observations="dict",
         policy_options={"n_quantiles": 5}),
    Case(CrossQ, contrib.HesScaleCrossQPolicy, "MlpPolicy", "Box"),
    Case(CrossQ, contrib.HesScaleCrossQPolicy, "MlpPolicy", "Box", "past the warm-up of its renormalisation",
         policy_options={"renorm_warmup_steps": 2}),
    Case(CrossQ, contrib.HesScaleCrossQPolicy, "MlpPolicy", "Box", "gSDE", options=_sde),
    *[Case(MaskablePPO, contrib.HesScaleMaskableActorCriticPolicy, "MlpPolicy", actions, setting, options=options)
      for actions in ("Discrete", "MultiDiscrete", "MultiBinary")
      for setting, options in (("", {}), ("entropy bonus", _entropy))],
    Case(MaskablePPO, contrib.HesScaleMaskableActorCriticCnnPolicy, "CnnPolicy", "Discrete", "NatureCNN",
         observations="image", policy_options=_small_cnn, timesteps=16),
    Case(MaskablePPO, contrib.HesScaleMaskableMultiInputActorCriticPolicy, "MultiInputPolicy", "Discrete",
         "dict observations", observations="dict"),
    *[Case(RecurrentPPO, contrib.HesScaleRecurrentActorCriticPolicy, "MlpLstmPolicy", actions, options=_entropy,
           policy_options=_lstm)
      for actions in ("Discrete", "Box", "MultiDiscrete")],  # with MultiBinary sb3-contrib 2.9's own policy fails
    Case(RecurrentPPO, contrib.HesScaleRecurrentActorCriticPolicy, "MlpLstmPolicy", "Box", "shared LSTM",
         policy_options={**_lstm, "shared_lstm": True, "enable_critic_lstm": False}),
    Case(RecurrentPPO, contrib.HesScaleRecurrentActorCriticPolicy, "MlpLstmPolicy", "Box", "critic without LSTM",
         policy_options={**_lstm, "enable_critic_lstm": False}),
    Case(RecurrentPPO, contrib.HesScaleRecurrentActorCriticPolicy, "MlpLstmPolicy", "Box", "two layers",
         policy_options={**_lstm, "n_lstm_layers": 2}),
    Case(RecurrentPPO, contrib.HesScaleRecurrentActorCriticCnnPolicy, "CnnLstmPolicy", "Discrete", "NatureCNN",
         observations="image", policy_options={**_small_cnn, **_lstm}, timesteps=16),
    Case(RecurrentPPO, contrib.HesScaleRecurrentMultiInputActorCriticPolicy, "MultiInputLstmPolicy", "Discrete",
         "dict observations", observations="dict", policy_options=_lstm),
    *[Case(TRPO, contrib.HesScaleTRPOPolicy, "MlpPolicy", actions,
           still=("action_net", "mlp_extractor.policy_net", "log_std"))
      for actions in ("Discrete", "Box", "MultiDiscrete", "MultiBinary")],
    Case(TRPO, contrib.HesScaleTRPOCnnPolicy, "CnnPolicy", "Discrete", "NatureCNN", observations="image",
         policy_options=_small_cnn, still=("action_net", "features_extractor"), timesteps=32),
    Case(TRPO, contrib.HesScaleTRPOCnnPolicy, "CnnPolicy", "Discrete", "NatureCNN twice", observations="image",
         policy_options={**_small_cnn, "share_features_extractor": False}, still=("action_net", "features_extractor"),
         timesteps=32),
    Case(TRPO, contrib.HesScaleTRPOMultiInputPolicy, "MultiInputPolicy", "Discrete", "dict observations",
         observations="dict", still=("action_net", "mlp_extractor.policy_net")),
]  # fmt: skip


def named(name: str) -> Case:
    """The case of that name, as pytest prints it."""
    (found,) = [case for case in CASES if str(case) == name]
    return found

"""Trains a Stable-Baselines3 algorithm with AdaHesScale, and with its own optimizer; draws the learning curves.

    python examples/reinforcement_learning/train.py
    python examples/reinforcement_learning/train.py --algorithm SAC --environment Pendulum-v1 --steps 5000
    python examples/reinforcement_learning/train.py --policy_kwargs.critic_optimizer_kwargs.lr_scale 3

The algorithm is used as it comes: what differs between the two runs is the policy class that is passed to it, and with
`--compiled true` that AdaHesScale's run has its updates compiled. Options are documented in `Arguments`; `--help` lists
them. `make demo-rl` runs this with `--compiled true --required_return 475`.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.results_plotter import load_results, ts2xy

import sb3_integration as hesscale

ALGORITHMS: dict[str, tuple[Any, Any, Any]] = {  # the algorithm, the same with compiled updates, and our policy
    "PPO": (PPO, hesscale.CompiledPPO, hesscale.HesScaleActorCriticPolicy),
    "A2C": (A2C, hesscale.CompiledA2C, hesscale.HesScaleActorCriticPolicy),
    "DQN": (DQN, hesscale.CompiledDQN, hesscale.HesScaleDQNPolicy),
    "SAC": (SAC, hesscale.CompiledSAC, hesscale.HesScaleSACPolicy),
    "TD3": (TD3, hesscale.CompiledTD3, hesscale.HesScaleTD3Policy),
    "DDPG": (DDPG, hesscale.CompiledDDPG, hesscale.HesScaleTD3Policy),
}
COLORS = {"AdaHesScale": "#2563eb", "Stable-Baselines3's own": "#ea7317"}


@dataclass
class Arguments:
    """What to train.

    Attributes:
        algorithm: Which of Stable-Baselines3's algorithms.
        environment: Name of a gymnasium environment with vector observations.
        steps: Steps in the environment, for each run.
        seed: Of everything.
        learning_rate: The algorithm's ``learning_rate`` in both runs; None for its default.
        environments: How many environments run side by side.
        algorithm_kwargs: More arguments of the algorithm, in both runs.
        policy_kwargs: ``policy_kwargs`` of the run with AdaHesScale.
        compiled: Compile the updates of the run with AdaHesScale, which takes some seconds before the first.
        plain: Also train with Stable-Baselines3's own policy.
        evaluation_episodes: Episodes of the evaluation at the end, without exploration.
        required_return: Exit with an error if AdaHesScale's mean return there is lower.
        output: Folder for the picture, the models, and the CSV logs.
    """

    algorithm: Literal["PPO", "A2C", "DQN", "SAC", "TD3", "DDPG"] = "PPO"
    environment: str = "CartPole-v1"
    steps: int = 50_000
    seed: int = 0
    learning_rate: float | None = None
    environments: int = 8
    algorithm_kwargs: dict[str, Any] = field(default_factory=dict)
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    plain: bool = True
    evaluation_episodes: int = 20
    required_return: float | None = None
    output: Path = Path("outputs/reinforcement_learning")


@dataclass
class Outcome:
    """What came of one run: the return of every episode by the steps so far, and the final evaluation."""

    name: str
    steps: np.ndarray
    returns: np.ndarray
    mean_return: float
    spread: float
    seconds: float


def train(name: str, policy: Any, policy_kwargs: dict[str, Any], args: Arguments) -> Outcome:
    plain, compiled, _ = ALGORITHMS[args.algorithm]
    algorithm: Any = compiled if args.compiled and name == "AdaHesScale" else plain
    folder = args.output / f"{args.algorithm}_{args.environment}" / name.split()[0].strip("'s").lower()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.monitor.csv"):
        old.unlink()
    env = make_vec_env(args.environment, n_envs=args.environments, seed=args.seed, monitor_dir=str(folder))
    kwargs = dict(args.algorithm_kwargs)
    if args.algorithm == "PPO":  # as much data for each update as with one environment
        kwargs.setdefault("n_steps", max(2, 2048 // args.environments))
    if args.learning_rate is not None:
        kwargs["learning_rate"] = args.learning_rate
    model: BaseAlgorithm = algorithm(policy, env, seed=args.seed, device="cpu", policy_kwargs=policy_kwargs, **kwargs)
    callbacks = CallbackList([hesscale.HesScaleLoggingCallback()] if name == "AdaHesScale" else [])
    how = ", compiled updates" if algorithm is compiled else ""
    print(f"{args.algorithm} on {args.environment} with {name}: {args.steps:,} steps{how}", flush=True)
    start = time.perf_counter()
    model.learn(args.steps, callback=callbacks, progress_bar=sys.stdout.isatty())
    seconds = time.perf_counter() - start
    model.save(folder / "model")
    steps, returns = ts2xy(load_results(str(folder)), "timesteps")
    test_env = make_vec_env(args.environment, n_envs=min(8, args.evaluation_episodes), seed=args.seed + 1000)
    mean, spread = evaluate_policy(model, test_env, n_eval_episodes=args.evaluation_episodes)
    assert isinstance(mean, float)
    assert isinstance(spread, float)
    print(
        f"  mean return of {args.evaluation_episodes} episodes: {mean:.1f} +- {spread:.1f}, {seconds:.0f} s", flush=True
    )
    return Outcome(name, steps, returns, mean, spread, seconds)


def draw(outcomes: list[Outcome], args: Arguments, picture: Path) -> None:
    """Every episode as a dot, the mean of the last 20 as a line."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for outcome in outcomes:
        color = COLORS[outcome.name]
        axes.plot(outcome.steps, outcome.returns, ".", color=color, alpha=0.25, markersize=4, markeredgewidth=0)
        window = min(20, max(1, len(outcome.returns)))
        smooth = np.convolve(outcome.returns, np.ones(window) / window, mode="valid")
        label = f"{outcome.name}: {outcome.mean_return:.0f} at the end"
        axes.plot(outcome.steps[window - 1 :], smooth, color=color, linewidth=2, label=label)
    axes.set_xlabel("steps in the environment")
    axes.set_ylabel("return of an episode")
    axes.set_title(f"{args.algorithm} on {args.environment}, mean of 20 episodes", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def main(args: Arguments) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore", category=UserWarning)
    outcomes = [train("AdaHesScale", ALGORITHMS[args.algorithm][2], args.policy_kwargs, args)]
    if args.plain:
        outcomes.append(train("Stable-Baselines3's own", "MlpPolicy", {}, args))
    picture = args.output / f"{args.algorithm}_{args.environment}.png"
    draw(outcomes, args, picture)
    print(f"learning curves: {picture}")
    if args.required_return is not None and outcomes[0].mean_return < args.required_return:
        print(
            f"AdaHesScale's mean return {outcomes[0].mean_return:.1f} is below {args.required_return}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(jsonargparse.auto_cli(Arguments, as_positional=False)))

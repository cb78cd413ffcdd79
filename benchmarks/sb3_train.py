"""Cost of the policies of sb3_integration: `train()` and `learn()` over the same with Stable-Baselines3's own policy.

    python -m benchmarks.sb3_train [--seconds 8] [--only PPO] [--json FILE] [--write docs/reinforcement_learning.md]

For each algorithm three models, with the same networks and hyperparameters, train in turns in one process and one
thread: Stable-Baselines3's policy with Adam, the HesScale policy with Adam, which shows the tag alone, and the HesScale
policy with its default, AdaHesScale. `train()` runs over and over on data collected once.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_integration as policies
from benchmarks.timing import ratios, write_table


@dataclass(frozen=True)
class Case:
    """One row: an algorithm on an environment, and the ratio to reach."""

    algorithm: type[BaseAlgorithm]
    policy: Any
    environment: str
    target: float
    kwargs: dict[str, Any] = field(default_factory=dict)
    train: Callable[[Any], None] = lambda model: model.train()
    collect: int = 0


def _a2c_train(model: Any) -> None:
    for _ in range(50):
        model.train()


DQN_KWARGS: dict[str, Any] = {"learning_starts": 500, "train_freq": 10_000}
OFF_POLICY_KWARGS: dict[str, Any] = {**DQN_KWARGS, "batch_size": 256}
CASES = [
    Case(PPO, policies.HesScaleActorCriticPolicy, "CartPole-v1", 1.6, {"n_epochs": 1}, collect=2048),
    Case(PPO, policies.HesScaleActorCriticPolicy, "CartPole-v1", 1.6, {"n_epochs": 1, "ent_coef": 0.01}, collect=2048),
    Case(PPO, policies.HesScaleActorCriticPolicy, "Pendulum-v1", 1.6, {"n_epochs": 1}, collect=2048),
    Case(A2C, policies.HesScaleActorCriticPolicy, "CartPole-v1", 1.6, train=_a2c_train, collect=5),
    Case(A2C, policies.HesScaleActorCriticPolicy, "Pendulum-v1", 1.6, train=_a2c_train, collect=5),
    Case(
        DQN, policies.HesScaleDQNPolicy, "CartPole-v1", 1.6, DQN_KWARGS, lambda model: model.train(50, 32), collect=1000
    ),
    Case(
        SAC,
        policies.HesScaleSACPolicy,
        "Pendulum-v1",
        1.7,
        OFF_POLICY_KWARGS,
        lambda model: model.train(10, 256),
        collect=1000,
    ),
    Case(
        TD3,
        policies.HesScaleTD3Policy,
        "Pendulum-v1",
        1.7,
        OFF_POLICY_KWARGS,
        lambda model: model.train(10, 256),
        collect=1000,
    ),
]
TAG_TARGET = 1.08
LEARN_TARGET = 1.35


def models(case: Case) -> list[Any]:
    """Plain Stable-Baselines3, the tag alone, and AdaHesScale; each with its data collected."""
    adam = {"optimizer_class": torch.optim.Adam}  # named, because A2C would take RMSprop
    built = []
    for policy, policy_kwargs in (("MlpPolicy", adam), (case.policy, adam), (case.policy, {})):
        model = case.algorithm(
            policy, case.environment, seed=0, device="cpu", policy_kwargs=policy_kwargs, **case.kwargs
        )
        built.append(model.learn(case.collect))
    return built


def bench_train(case: Case, seconds: float) -> dict[str, Any]:
    plain, tagged, hesscale = ratios([lambda m=m: case.train(m) for m in models(case)], seconds, warm_up=1)
    bonus = " with entropy bonus" if "ent_coef" in case.kwargs else ""
    return {
        "what": f"{case.algorithm.__name__} on {case.environment}{bonus}: `train()`",
        "plain_ms": plain.baseline_us / 1000,
        "tag": str(tagged),
        "hesscale": str(hesscale),
        "target": case.target,
    }


def bench_learn(algorithm: type[BaseAlgorithm], steps: int, seconds: float) -> dict[str, Any]:
    case = Case(algorithm, policies.HesScaleActorCriticPolicy, "CartPole-v1", LEARN_TARGET, collect=steps)
    variants = [lambda m=m: m.learn(steps, reset_num_timesteps=False) for m in models(case)]
    plain, tagged, hesscale = ratios(variants, seconds, warm_up=1)
    return {
        "what": f"{algorithm.__name__} on CartPole-v1: `learn()`",
        "plain_ms": plain.baseline_us / 1000,
        "tag": str(tagged),
        "hesscale": str(hesscale),
        "target": LEARN_TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long to measure each row")
    parser.add_argument("--only", help="measure only the rows whose name contains this")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--write", type=Path, help="also replace the table in this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print("Time over Stable-Baselines3's own policy; median (quartiles) of interleaved rounds, one thread.\n")
    lines = [f"| what | plain | tag alone (to reach {TAG_TARGET}) | AdaHesScale | to reach |", "|---|---|---|---|---|"]
    print("\n".join(lines))
    results = []
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"{c.algorithm.__name__} {c.environment} train", lambda c=c: bench_train(c, args.seconds)) for c in CASES
    ]
    jobs += [
        ("PPO CartPole-v1 learn", lambda: bench_learn(PPO, 2048, 4 * args.seconds)),
        ("A2C CartPole-v1 learn", lambda: bench_learn(A2C, 500, 2 * args.seconds)),
    ]
    for name, job in jobs:
        if args.only and args.only not in name:
            continue
        row = job()
        results.append(row)
        lines.append(
            f"| {row['what']} | {row['plain_ms']:.1f} ms | {row['tag']} | {row['hesscale']} | {row['target']:.2f} |"
        )
        print(lines[-1], flush=True)
    if args.write:
        write_table(args.write, "sb3_train", "\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

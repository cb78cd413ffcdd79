"""What a trust region is worth in reinforcement learning: algorithms of Stable-Baselines3 against tuned rivals.

    python examples/reinforcement_learning/study.py                        # everything; called again, it resumes
    python examples/reinforcement_learning/study.py --minutes 60 --workers 1
    python examples/reinforcement_learning/study.py --stage off_policy     # DQN, SAC and TD3
    python examples/reinforcement_learning/study.py --report true          # the page from the stored results

Every run is Stable-Baselines3's own algorithm with its own settings; PPO and A2C, whose radius is in nats, have 8
environments in parallel, PPO rollouts of 2048 steps in all, and VecNormalize. Tasks and seeds are disjoint from those
on which settings were chosen (`--stage development`: CartPole, InvertedPendulum and Reacher, seeds 0 to 4). Finished
runs are appended to a file at once, the most telling ones first: every method on every task with one seed, then with
the next. Set OMP_NUM_THREADS=1: the networks are small.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from hesscale_lightning import AdaHesScale, StepSizeScaling
from sb3_integration import HesScaleActorCriticPolicy, HesScaleDQNPolicy, HesScaleSACPolicy, HesScaleTD3Policy
from sb3_integration.policy_radius import kl_divergence, parameters_of

RESULTS = Path("examples/reinforcement_learning/results")
ALGORITHMS: dict[str, Any] = {"PPO": PPO, "A2C": A2C}
OFF_POLICY: dict[str, Any] = {"DQN": DQN, "SAC": SAC, "TD3": TD3}
SETTINGS: dict[str, dict[str, Any]] = {"PPO": {"n_steps": 256}}
ENVIRONMENTS = 8  # in parallel
BINS = 20  # points of a learning curve
DEVELOPMENT = {"CartPole-v1": 40_000, "InvertedPendulum-v5": 40_000, "Reacher-v5": 40_000}
TASKS = dict.fromkeys(["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5", "Acrobot-v1"], 150_000)
DEVELOPMENT_SEEDS, SEEDS = range(5), range(100, 110)
UNTRAINED, UNTRAINED_STEPS = "untrained", 20_000
OFF_POLICY_TASKS = {
    "DQN": {"CartPole-v1": 50_000, "Acrobot-v1": 50_000},
    "SAC": {"Pendulum-v1": 10_000, "Reacher-v5": 10_000},
    "TD3": {"Pendulum-v1": 10_000, "Reacher-v5": 10_000},
}
OFF_POLICY_SEEDS = range(300, 305)
RATE = {"PPO": 3e-4, "A2C": 7e-4, "DQN": 1e-4, "SAC": 3e-4, "TD3": 1e-3}  # Stable-Baselines3's
FACTORS = (0.1, 10.0, 100.0, 1000.0)  # times that rate, for robustness; 1 is in the main comparison
ROBUSTNESS = dict.fromkeys(["CartPole-v1", "Reacher-v5", "Acrobot-v1"], 50_000)
ROBUSTNESS_SEEDS = range(200, 203)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        algorithm: Its name in Stable-Baselines3.
        environment: Name of a gymnasium environment.
        method: A key of `methods()`.
        factor: What Stable-Baselines3's learning rate is multiplied by; 1 leaves the method's own.
        seed: Of everything.
        steps: Steps in the environments, all together.
    """

    algorithm: str
    environment: str
    method: str
    factor: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Method:
    """A policy and a learning rate.

    Attributes:
        lr: The algorithm's ``learning_rate``; None for Stable-Baselines3's default.
        policy: The policy class, or Stable-Baselines3's name for it.
        policy_kwargs: Its options.
        target_kl: Where the learning rate adapts to a KL divergence per update of the policy: which.
    """

    lr: float | None = None
    policy: Any = HesScaleActorCriticPolicy
    policy_kwargs: dict[str, Any] | None = None
    target_kl: float | None = None


# Radii of actor and critic, decay of the curvature's average: each alone from the first, then what was promising.
VARIANTS: dict[str, list[tuple[float, float, float]]] = {
    "PPO": [
        (3e-4, 1e-3, 0.999),
        (3e-4, 1e-3, 0.99),
        (3e-4, 3e-3, 0.999),
        (3e-4, 1e-2, 0.999),
        (1e-3, 1e-3, 0.999),
        (1e-4, 1e-3, 0.999),
    ],
    "A2C": [
        (3e-4, 1e-2, 0.999),
        (3e-4, 1e-2, 0.99),
        (3e-4, 3e-3, 0.999),
        (3e-4, 3e-2, 0.999),
        (1e-3, 1e-2, 0.999),
        (1e-4, 1e-2, 0.999),
        (3e-4, 3e-2, 0.99),
        (1e-4, 3e-2, 0.999),
        (3e-4, 1e-1, 0.999),
        (3e-4, 1e-1, 0.99),
    ],
}


def scaled_adam(params: Any, lr: float, **kwargs: Any) -> StepSizeScaling:
    return StepSizeScaling(torch.optim.Adam(params, lr=lr, eps=1e-5, **kwargs), denominator="abs", damping=0.01)


ADAM = {"optimizer_class": torch.optim.Adam, "optimizer_kwargs": {"eps": 1e-5}}  # eps as PPO's own
PAPER = {"max_update": None, "delta": None, "lr_scale": 1.0}


def methods(algorithm: str) -> dict[str, Method]:
    """Ours first, then its rivals, the most telling ones first."""
    if algorithm in OFF_POLICY:
        policy = {"DQN": HesScaleDQNPolicy, "SAC": HesScaleSACPolicy, "TD3": HesScaleTD3Policy}[algorithm]
        rates = [RATE[algorithm], 1e-3 if RATE[algorithm] < 1e-3 else 3e-4]
        rivals = {f"adam {rate:.0e}".replace("e-0", "e-"): Method(rate, policy="MlpPolicy") for rate in rates}
        return {"adahesscale": Method(policy=policy), **rivals}
    adam = partial(Method, policy="MlpPolicy", policy_kwargs=ADAM)
    return {
        "nats": Method(),
        **({"rmsprop": Method(policy="MlpPolicy"), UNTRAINED: adam(0.0)} if algorithm == "A2C" else {}),
        "adam 3e-4": adam(3e-4),
        "adam 1e-3": adam(1e-3),
        "adam 3e-3": adam(3e-3),
        "adam, adaptive": adam(RATE[algorithm], target_kl={"PPO": 0.01, "A2C": 1e-3}[algorithm]),
        "adam's direction in nats": Method(1.0, policy_kwargs={"optimizer_class": scaled_adam, "radius": "kl"}),
        "radius of the loss": Method(policy_kwargs={"radius": "loss"}),
        "paper's adahesscale": Method(
            policy_kwargs={
                "radius": "loss",
                "method": "hesscale",
                "optimizer_class": AdaHesScale,
                "optimizer_kwargs": PAPER,
            }
        ),
    }


def variants(algorithm: str) -> dict[str, Method]:
    """The settings of ours that were tried on the development tasks, each written out."""
    found = {}
    for actor, critic, beta2 in VARIANTS.get(algorithm, []):
        options = {"betas": (0.9, beta2)}
        found[f"actor {actor:g}, critic {critic:g}, beta2 {beta2:g}"] = Method(
            policy_kwargs={
                "actor_optimizer_kwargs": {"delta": actor, **options},
                "critic_optimizer_kwargs": {"delta": critic, **options},
            }
        )
    return found


class Returns(BaseCallback):
    """Collects (steps so far, undiscounted return) of every episode that ends."""

    def __init__(self) -> None:
        super().__init__()
        self.episodes: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.episodes.append((self.num_timesteps, float(info["episode"]["r"])))
        return True


class AdaptiveRate(BaseCallback):
    """Halves or doubles the learning rate where an update moved the policy by over or under half of a target.

    The KL divergence is of the policy after the whole update from that before, on the observations of the rollout.

    Args:
        target: In nats.
    """

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target
        self.before: tuple[torch.Tensor, Any] | None = None

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        observations = model.rollout_buffer.observations
        flat = torch.as_tensor(observations.reshape(-1, *observations.shape[2:]), device=model.device)
        self.before = flat.clone(), self._distribution(flat)

    def _on_rollout_start(self) -> None:
        if self.before is None:
            return
        observations, before = self.before
        divergence = float(kl_divergence(before, self._distribution(observations)))
        factor = 0.5 if divergence > 2 * self.target else 2.0 if divergence < self.target / 2 else 1.0
        model: Any = self.model
        rate = min(max(model.lr_schedule(1.0) * factor, 1e-6), 1e-1)
        model.lr_schedule = partial(_constant, rate)

    def _distribution(self, observations: torch.Tensor) -> Any:
        model: Any = self.model
        with torch.no_grad():
            return parameters_of(model.policy.get_distribution(observations))

    def _on_step(self) -> bool:
        return True


def _constant(rate: float, _: float) -> float:
    return rate


def learning_curve(episodes: Sequence[tuple[int, float]], steps: int) -> list[float | None]:
    """Mean return of the episodes that end within each of BINS equal parts of the budget; None where none does."""
    edges = np.linspace(0, steps, BINS + 1)
    curve: list[float | None] = []
    for low, high in pairwise(edges):
        inside = [r for t, r in episodes if low < t <= high]
        curve.append(statistics.mean(inside) if inside else None)
    return curve


def train(run: Run) -> dict[str, Any]:
    """Trains once and returns the learning curve and the time it took."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    method = {**methods(run.algorithm), **variants(run.algorithm)}[run.method]
    rate = RATE[run.algorithm] if method.lr is None else method.lr
    env: VecEnv
    if run.algorithm in OFF_POLICY:
        env = make_vec_env(run.environment, seed=run.seed)
    else:
        env = VecNormalize(make_vec_env(run.environment, n_envs=ENVIRONMENTS, seed=run.seed))
    model = {**ALGORITHMS, **OFF_POLICY}[run.algorithm](
        method.policy,
        env,
        learning_rate=rate * run.factor,
        seed=run.seed,
        device="cpu",
        policy_kwargs=method.policy_kwargs,
        **SETTINGS.get(run.algorithm, {}),
    )
    returns = Returns()
    callbacks: list[BaseCallback] = [returns]
    if method.target_kl is not None:
        callbacks.append(AdaptiveRate(method.target_kl))
    begin, failure = time.perf_counter(), None
    try:
        model.learn(run.steps, callback=CallbackList(callbacks))
    except ValueError as error:  # distributions refuse parameters that are not numbers
        if all(torch.isfinite(param).all() for param in model.policy.parameters()):
            raise
        failure = str(error).splitlines()[0]
    env.close()
    return {
        "curve": learning_curve(returns.episodes, run.steps),
        "seconds": time.perf_counter() - begin,
        "failure": failure,
    }


def planned(stage: str) -> Iterator[Run]:
    """All runs of a stage, the most telling ones first."""
    if stage == "off_policy":
        for seed in OFF_POLICY_SEEDS:
            for k in range(3):
                for algorithm, lengths in OFF_POLICY_TASKS.items():
                    for environment, steps in lengths.items():
                        yield Run(algorithm, environment, list(methods(algorithm))[k], 1.0, seed, steps)
        return
    tasks, seeds, factors = {
        "development": (DEVELOPMENT, DEVELOPMENT_SEEDS, (1.0,)),
        "main": (TASKS, SEEDS, (1.0,)),
        "robustness": (ROBUSTNESS, ROBUSTNESS_SEEDS, (1.0, *FACTORS)),
    }[stage]
    for seed in seeds:
        for k in range(99):
            for algorithm in ALGORITHMS:
                names = list(variants(algorithm) if stage == "development" else methods(algorithm))
                if stage == "robustness":
                    names = ["nats", "adam 3e-4" if algorithm == "PPO" else "rmsprop"]
                if k >= len(names):
                    continue
                for factor in factors:
                    for environment, steps in tasks.items():
                        length = UNTRAINED_STEPS if names[k] == UNTRAINED else steps
                        yield Run(algorithm, environment, names[k], factor, seed, length)


def finished(path: Path) -> dict[Run, dict[str, Any]]:
    """What is in the file of results. A line that was cut off when the study was stopped is left out."""
    found = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[Run(**line["run"])] = line["found"]
    return found


@dataclass
class Arguments:
    """Options of the command line.

    Attributes:
        stage: "main", "robustness", "off_policy", or "development", on which settings were chosen.
        results: The folder of finished runs, a file for each stage.
        workers: Runs at a time.
        minutes: Begin no run after so many minutes.
        only: Only methods of these names.
        algorithms: Only these algorithms.
        seeds: Only so many seeds.
        report: Run nothing; write the page.
    """

    stage: str = "main"
    results: Path = RESULTS
    workers: int = 2
    minutes: float = 1e9
    only: list[str] | None = None
    algorithms: list[str] | None = None
    seeds: int = 1000
    report: bool = False


def main() -> None:
    """Runs what is missing."""
    arguments = jsonargparse.auto_cli(Arguments)
    if arguments.report:
        from study_report import write

        write(arguments.results)
        return
    results = arguments.results / f"{arguments.stage}.jsonl"
    done = finished(results)
    seeds = {"main": SEEDS, "robustness": ROBUSTNESS_SEEDS, "development": DEVELOPMENT_SEEDS}
    first = seeds.get(arguments.stage, OFF_POLICY_SEEDS)[0]
    missing = [
        run
        for run in planned(arguments.stage)
        if run not in done
        and (arguments.only is None or run.method in arguments.only)
        and (arguments.algorithms is None or run.algorithm in arguments.algorithms)
        and run.seed < first + arguments.seeds
    ]
    results.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool, results.open("a") as file:
        if file.tell() and not results.read_text().endswith("\n"):
            file.write("\n")  # a line that was cut off
        running: dict[Future[dict[str, Any]], Run] = {}
        while missing or running:
            late = time.monotonic() - begin > 60 * arguments.minutes
            while missing and not late and len(running) < arguments.workers:
                run = missing.pop(0)
                running[pool.submit(train, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, found = running.pop(future), future.result()
                file.write(json.dumps({"run": asdict(run), "found": found}) + "\n")
                file.flush()
                last = [x for x in found["curve"][-4:] if x is not None]
                print(
                    f"{run.algorithm} {run.environment} {run.method} x{run.factor:g} seed {run.seed}: "
                    f"{statistics.mean(last) if last else float('nan'):.1f} in {found['seconds']:.0f} s; "
                    f"{len(missing)} more",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""Does it learn? AdaHesScale with the shipped defaults against Adam, in PPO and A2C on three environments.

    python examples/reinforcement_learning/compare.py                 # everything; called again, it resumes
    python examples/reinforcement_learning/compare.py --quick true    # two seeds, a tenth of the steps, into outputs/
    python examples/reinforcement_learning/compare.py --report true   # tables and pictures from the stored results

Three questions, each with five seeds, the same budget of environment steps and VecNormalize, as in the paper:

1. Adam at four learning rates, of which the best is chosen afterwards, in its favour; AdaHesScale at its default alone.
2. A learning rate 10 and 100 times too large, for Adam from its best one: with and without step-size scaling.
3. The same for AdaHesScale from its default: with its trust region and without.

Finished runs are appended to a file at once. Set OMP_NUM_THREADS=1: the networks are small. Options are documented in
`Arguments`; `--help` lists them.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tqdm import tqdm

from hesscale_lightning import StepSizeScaling
from sb3_integration import HesScaleActorCriticPolicy

RESULTS = Path("examples/reinforcement_learning/results/compare.jsonl")
PAGE = Path("docs/reinforcement_learning.md")
BEGIN, END = "<!-- generated: comparison -->", "<!-- end -->"
CURVES, ROBUSTNESS = "reinforcement_learning_curves.png", "reinforcement_learning_robustness.png"
ALGORITHMS: dict[str, Any] = {"PPO": PPO, "A2C": A2C}
# As in Stable-Baselines3 but for parallel environments and PPO's larger minibatches, which shorten the study.
SETTINGS: dict[str, dict[str, Any]] = {
    "PPO": {"n_steps": 128, "batch_size": 256},
    "A2C": {},
}
# Pendulum's rewards are dense and its episodes never end early: RL Zoo's discount for it.
DISCOUNT = {"Pendulum-v1": 0.9}
ENVIRONMENTS = 8  # in parallel
LEARNING_RATE = {"PPO": 3e-4, "A2C": 7e-4}  # Stable-Baselines3's defaults
STEPS = {"CartPole-v1": 20_000, "InvertedPendulum-v5": 20_000, "Pendulum-v1": 40_000}
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BINS = 20  # points of a learning curve


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        algorithm: "PPO" or "A2C".
        environment: Name of a gymnasium environment.
        optimizer: "adam", "adam + scaling", "adahesscale" or "adahesscale without scaling".
        lr: The algorithm's ``learning_rate``.
        seed: Of everything.
        steps: Steps in the environments, all together.
    """

    algorithm: str
    environment: str
    optimizer: str
    lr: float
    seed: int
    steps: int


def scaled_adam(params: Any, lr: float, **kwargs: Any) -> StepSizeScaling:
    return StepSizeScaling(torch.optim.Adam(params, lr=lr, eps=1e-5, **kwargs))


POLICY_KWARGS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer_class": torch.optim.Adam, "optimizer_kwargs": {"eps": 1e-5}},
    "adam + scaling": {"optimizer_class": scaled_adam},
    "adahesscale": {},
    "adahesscale without scaling": {
        "actor_optimizer_kwargs": {"delta": None},
        "critic_optimizer_kwargs": {"delta": None},
    },
}


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


def learning_curve(episodes: Sequence[tuple[int, float]], steps: int) -> list[float | None]:
    """Mean return of the episodes that end within each of BINS equal parts of the budget; None where none does."""
    edges = np.linspace(0, steps, BINS + 1)
    curve: list[float | None] = []
    for low, high in pairwise(edges):
        inside = [r for t, r in episodes if low < t <= high]
        curve.append(statistics.mean(inside) if inside else None)
    return curve


def train(run: Run, policy_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trains once and returns the learning curve, the mean return over the last fifth of the budget, and the time."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    env = VecNormalize(make_vec_env(run.environment, n_envs=ENVIRONMENTS, seed=run.seed))
    model = ALGORITHMS[run.algorithm](
        HesScaleActorCriticPolicy,
        env,
        learning_rate=run.lr,
        seed=run.seed,
        device="cpu",
        gamma=DISCOUNT.get(run.environment, 0.99),
        policy_kwargs=dict(POLICY_KWARGS[run.optimizer] if policy_kwargs is None else policy_kwargs),
        **SETTINGS[run.algorithm],
    )
    returns = Returns()
    start = time.perf_counter()
    broken = ""
    try:
        model.learn(run.steps, callback=returns)
    except ValueError as error:  # torch refuses a distribution of NaN
        if all(bool(param.isfinite().all()) for param in model.policy.parameters()):
            raise  # that was something else
        broken = str(error).splitlines()[0]
    seconds = time.perf_counter() - start
    env.close()
    curve = learning_curve(returns.episodes, run.steps)
    last = [r for t, r in returns.episodes if t > 0.8 * run.steps]
    worst = min((r for _, r in returns.episodes), default=0.0)
    # A run that broke has no last fifth; it counts as its worst episode.
    score = worst if broken or not last else statistics.mean(last)
    return {**asdict(run), "score": score, "curve": curve, "seconds": round(seconds, 2), "broken": broken}


# -- what to run


@dataclass
class Arguments:
    """What to compare.

    Attributes:
        algorithms: Of "PPO" and "A2C".
        environments: Names of environments, of those in STEPS.
        seeds: How many seeds, from 0.
        quick: Two seeds and a tenth of the steps, with results and pictures in outputs/.
        report: Run nothing; write tables and pictures from the stored results.
        workers: How many runs at once.
    """

    algorithms: list[str] | None = None
    environments: list[str] | None = None
    seeds: int = 5
    quick: bool = False
    report: bool = False
    workers: int = 2


@dataclass(frozen=True)
class Study:
    """The grid of runs, and where its results are kept."""

    pairs: list[tuple[str, str]]
    seeds: int
    shorter: int
    results: Path
    pictures: Path

    def run(self, pair: tuple[str, str], optimizer: str, lr: float, seed: int) -> Run:
        return Run(*pair, optimizer, lr, seed, STEPS[pair[1]] // self.shorter)

    def first_stage(self) -> list[Run]:
        """Adam at all rates, AdaHesScale at the algorithm's default."""
        return [
            self.run(pair, optimizer, lr, seed)
            for seed in range(self.seeds)
            for pair in self.pairs
            for optimizer, lr in [*(("adam", lr) for lr in ADAM_RATES), ("adahesscale", LEARNING_RATE[pair[0]])]
        ]

    def second_stage(self, results: dict[Run, dict[str, Any]]) -> list[Run]:
        """Everything with learning rates 10 and 100 times too large, which needs Adam's best one."""
        return [
            self.run(pair, optimizer, lr * factor, seed)
            for seed in range(self.seeds)
            for pair in self.pairs
            for lr, optimizers in (
                (self.best_rate(pair, results), ("adam", "adam + scaling")),
                (LEARNING_RATE[pair[0]], ("adahesscale", "adahesscale without scaling")),
            )
            for optimizer in optimizers
            for factor in (10, 100)
        ]

    def best_rate(self, pair: tuple[str, str], results: dict[Run, dict[str, Any]]) -> float:
        """Adam's learning rate with the highest mean score."""
        return max(ADAM_RATES, key=lambda lr: statistics.mean(self.scores(pair, "adam", lr, results)))

    def leader(
        self, pair: tuple[str, str], factor: int, optimizers: Sequence[str], results: dict[Run, dict[str, Any]]
    ) -> str:
        """Which of some optimizers has the highest mean score at ``factor`` times its base learning rate."""
        base = {"adam": self.best_rate(pair, results), "adahesscale": LEARNING_RATE[pair[0]]}

        def mean(optimizer: str) -> float:
            scores = self.scores(pair, optimizer, base[optimizer.split()[0]] * factor, results)
            return statistics.mean(scores) if scores else -math.inf

        return max(optimizers, key=mean)

    def scores(self, pair: tuple[str, str], optimizer: str, lr: float, results: dict[Run, Any]) -> list[float]:
        runs = [self.run(pair, optimizer, lr, seed) for seed in range(self.seeds)]
        return [results[run]["score"] for run in runs if run in results]


def load(path: Path) -> dict[Run, dict[str, Any]]:
    """The finished runs. A line that was cut off when the study was stopped is left out, and its run repeated."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[Run(*(row[name] for name in Run.__dataclass_fields__))] = row
    return results


def complete(study: Study, runs: Iterable[Run], workers: int) -> dict[Run, dict[str, Any]]:
    """Carries out the runs that are missing, appends each to the file when it ends, and returns all results."""
    results = load(study.results)
    missing = [run for run in dict.fromkeys(runs) if run not in results]
    if missing:
        study.results.parent.mkdir(parents=True, exist_ok=True)
        with study.results.open("a") as file:
            if file.tell() and not study.results.read_text().endswith("\n"):
                file.write("\n")  # a line that was cut off when the study was stopped
            for row in tqdm(_carried_out(missing, workers), total=len(missing), unit="run"):
                file.write(json.dumps(row) + "\n")
                file.flush()
    return load(study.results)


def _carried_out(runs: Sequence[Run], workers: int) -> Iterator[dict[str, Any]]:
    """The results of runs as they end."""
    if workers == 1:
        yield from map(train, runs)
        return
    # Fresh processes: a fork of one in which torch has run its threads may never come back.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, run) for run in runs]):
            yield future.result()


# -- what came out


def summary(scores: Sequence[float]) -> str:
    if not scores:
        return "not run"
    return f"{statistics.mean(scores):.0f} ({min(scores):.0f} to {max(scores):.0f})"


def tables(study: Study, results: dict[Run, dict[str, Any]]) -> str:
    rows = [
        f"Mean return of the episodes in the last fifth of the budget, mean of {study.seeds} seeds (lowest, highest).",
        "",
        "| algorithm | environment | steps | Adam, best of four rates | AdaHesScale, default |",
        "|---|---|---|---|---|",
    ]
    for algorithm, environment in study.pairs:
        pair = (algorithm, environment)
        best, default = study.best_rate(pair, results), LEARNING_RATE[algorithm]
        adam = summary(study.scores(pair, "adam", best, results))
        ours = summary(study.scores(pair, "adahesscale", default, results))
        steps = STEPS[environment] // study.shorter
        rows.append(f"| {algorithm} | {environment} | {steps:,} | {adam} at {best:g} | {ours} |")
    higher = [pair for pair in study.pairs if study.leader(pair, 1, ("adam", "adahesscale"), results) == "adahesscale"]
    rows += ["", f"AdaHesScale at its default has the higher mean on {_listed(higher)} of {len(study.pairs)}."]
    rows += [
        "",
        "The same with the learning rate, Adam's best and AdaHesScale's default, 10 and 100 times too large:",
        "",
        "| algorithm | environment | factor | Adam | Adam + scaling | AdaHesScale without scaling | AdaHesScale |",
        "|---|---|---|---|---|---|---|",
    ]
    for algorithm, environment in study.pairs:
        pair = (algorithm, environment)
        best, default = study.best_rate(pair, results), LEARNING_RATE[algorithm]
        for factor in (10, 100):
            cells = [
                summary(study.scores(pair, optimizer, lr * factor, results))
                for optimizer, lr in (
                    ("adam", best),
                    ("adam + scaling", best),
                    ("adahesscale without scaling", default),
                    ("adahesscale", default),
                )
            ]
            rows.append(f"| {algorithm} | {environment} | {factor} | {' | '.join(cells)} |")
    for factor in (10, 100):
        leaders = {pair: study.leader(pair, factor, tuple(POLICY_KWARGS), results) for pair in study.pairs}
        counts = [
            f"{optimizer} on {_listed(led)}"
            for optimizer in POLICY_KWARGS
            if (led := [pair for pair, leader in leaders.items() if leader == optimizer])
        ]
        rows += ["", f"At {factor} times the rate the highest mean is that of {'; '.join(counts)}."]
    broken = sum(bool(row["broken"]) for row in results.values())
    hours = sum(row["seconds"] for row in results.values()) / 3600
    rows += [
        "",
        f"{len(results)} runs, of which {broken} broke down with parameters that were not numbers; {hours:.1f} hours.",
    ]
    return "\n".join(rows)


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    names = ", ".join(f"{algorithm} {environment}" for algorithm, environment in pairs)
    return f"{len(pairs)} ({names})" if pairs else "none"


COLORS = {
    "Adam, best rate": "#ea7317",
    "AdaHesScale, default": "#2563eb",
    "Adam": "#ea7317",
    "Adam + scaling": "#f2b880",
    "AdaHesScale": "#2563eb",
    "AdaHesScale without scaling": "#9bb8f0",
}


def draw_curves(study: Study, results: dict[Run, dict[str, Any]], picture: Path) -> None:
    """Mean learning curves with 95 % bootstrap intervals over seeds."""
    figure, grid = _grid(study)
    for pair, axes in grid:
        best, default = study.best_rate(pair, results), LEARNING_RATE[pair[0]]
        steps = STEPS[pair[1]] // study.shorter
        points = [
            {"steps": steps * (k + 1) / BINS, "return": value, "optimizer": name}
            for name, optimizer, lr in (
                ("Adam, best rate", "adam", best),
                ("AdaHesScale, default", "adahesscale", default),
            )
            for seed in range(study.seeds)
            if (run := study.run(pair, optimizer, lr, seed)) in results
            for k, value in enumerate(results[run]["curve"])
            if value is not None
        ]
        sns.lineplot(
            pd.DataFrame(points), x="steps", y="return", hue="optimizer", palette=COLORS, errorbar=("ci", 95), ax=axes
        )
        _finish(axes, f"{pair[0]}, {pair[1]}", "steps in the environments", "return of an episode")
    _save(figure, grid, picture)


def draw_robustness(study: Study, results: dict[Run, dict[str, Any]], picture: Path) -> None:
    """Final return by how far the learning rate is too large; every seed a dot."""
    figure, grid = _grid(study)
    for pair, axes in grid:
        best, default = study.best_rate(pair, results), LEARNING_RATE[pair[0]]
        points = [
            {"factor": factor, "return": score, "optimizer": name}
            for name, optimizer, lr in (
                ("Adam", "adam", best),
                ("Adam + scaling", "adam + scaling", best),
                ("AdaHesScale without scaling", "adahesscale without scaling", default),
                ("AdaHesScale", "adahesscale", default),
            )
            for factor in (1, 10, 100)
            for score in study.scores(pair, optimizer, lr * factor, results)
        ]
        data = pd.DataFrame(points)
        sns.lineplot(data, x="factor", y="return", hue="optimizer", palette=COLORS, errorbar=None, marker="o", ax=axes)
        sns.stripplot(
            data, x="factor", y="return", hue="optimizer", palette=COLORS, ax=axes, size=3, alpha=0.5, legend=False,
            native_scale=True, log_scale=(True, False),
        )  # fmt: skip
        axes.set_xticks([1, 10, 100], ["1", "10", "100"])
        axes.minorticks_off()
        _finish(axes, f"{pair[0]}, {pair[1]}", "learning rate, times its base", "return at the end")
    _save(figure, grid, picture)


def _grid(study: Study) -> tuple[Any, list[tuple[tuple[str, str], Any]]]:
    algorithms = list(dict.fromkeys(algorithm for algorithm, _ in study.pairs))
    environments = list(dict.fromkeys(environment for _, environment in study.pairs))
    shape = len(algorithms), len(environments)
    figure, axes = plt.subplots(*shape, figsize=(3.6 * shape[1], 2.7 * shape[0]), layout="constrained", squeeze=False)
    return figure, [((a, e), axes[i, j]) for i, a in enumerate(algorithms) for j, e in enumerate(environments)]


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, grid: list[tuple[Any, Any]], picture: Path) -> None:
    handles, labels = grid[0][1].get_legend_handles_labels()
    for _, axes in grid:
        axes.get_legend().remove()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def write_page(text: str, page: Path) -> None:
    """Replaces what is between the markers."""
    before, rest = page.read_text().split(BEGIN + "\n")
    page.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END, 1)[1])


def main(args: Arguments) -> None:
    pairs = [(a, e) for a in args.algorithms or ALGORITHMS for e in args.environments or STEPS]
    if args.quick:
        study = Study(pairs, 2, 10, Path("outputs/compare.jsonl"), Path("outputs"))
    else:
        study = Study(pairs, args.seeds, 1, RESULTS, Path("docs"))
    if args.report:
        results = load(study.results)
    else:
        results = complete(study, study.first_stage(), args.workers)
        results = complete(study, study.second_stage(results), args.workers)
    report = tables(study, results)
    print(report)
    draw_curves(study, results, study.pictures / CURVES)
    draw_robustness(study, results, study.pictures / ROBUSTNESS)
    if not args.quick and pairs == [(a, e) for a in ALGORITHMS for e in STEPS]:
        write_page(report, PAGE)


if __name__ == "__main__":
    main(jsonargparse.auto_cli(Arguments, as_positional=False))

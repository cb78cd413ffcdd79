"""The page of the study: tables and pictures from the stored runs. Called by `study.py --report true`.

Scores are normalised per algorithm and task: 0 is the untrained policy, 1 Adam at its best rate of that task, in
hindsight. Aggregates are interquartile means over all runs of all tasks, with 95 % intervals of a bootstrap that is
stratified by task, and probabilities of improvement, both as Agarwal and others, Deep Reinforcement Learning at the
Edge of the Statistical Precipice, NeurIPS 2021, propose.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean
from study import (
    BINS,
    FACTORS,
    OFF_POLICY_SEEDS,
    OFF_POLICY_TASKS,
    RATE,
    ROBUSTNESS,
    SEEDS,
    TASKS,
    Run,
    finished,
    methods,
)

PAGE = Path("docs/reinforcement_learning.md")
CURVES, PROFILES = "reinforcement_learning_curves.png", "reinforcement_learning_profiles.png"
RATES = ("adam 3e-4", "adam 1e-3", "adam 3e-3")
TUNED = "adam, tuned per task"
RESAMPLES = 2000
FEWEST = 3  # seeds for an interval
PRELIMINARY = " (**preliminary**: the study is under way, and says little with so few)"
LAST = 4  # bins of a curve whose mean is the final return

Array = NDArray[np.float64]
Scores = dict[str, Array]  # by task, a number per seed
Found = Mapping[Run, Mapping[str, Any]]


def filled(curve: Sequence[float | None]) -> list[float]:
    """Bins in which no episode ended take the return of the one before, the first ones that of the first."""
    known = [x for x in curve if x is not None]
    if not known:
        return [math.nan] * len(curve)
    made, last = [], known[0]
    for x in curve:
        last = last if x is None else x
        made.append(last)
    return made


class Study:
    """The runs of the main comparison, of one algorithm.

    Args:
        found: All runs.
        algorithm: "PPO" or "A2C".
        furthest: Only the methods with as many seeds as the one that has the most, so that all of these count. Else all
            methods, on the seeds that they have in common.
    """

    def __init__(self, found: Found, algorithm: str, *, furthest: bool = False) -> None:
        self.algorithm = algorithm
        self.curves: dict[tuple[str, str], dict[int, Array]] = {}
        self.untrained: dict[str, float] = {}
        untrained: dict[str, list[float]] = {}
        for run, result in found.items():
            if run.environment not in TASKS or run.factor != 1:
                continue
            curve = np.array(filled(result["curve"]))
            if run.method == "untrained":
                untrained.setdefault(run.environment, []).append(float(curve.mean()))
            elif run.algorithm == algorithm and run.steps == TASKS[run.environment]:
                self.curves.setdefault((run.method, run.environment), {})[run.seed] = curve
        self.untrained = {task: statistics.mean(values) for task, values in untrained.items()}
        complete = [m for m in methods(algorithm) if all((m, task) in self.curves for task in TASKS)]
        self.methods = [m for m in complete if m != "untrained"]
        self.under_way = False
        if furthest and self.methods:
            ready = {m: len(set.intersection(*(set(self.curves[m, task]) for task in TASKS))) for m in self.methods}
            self.under_way = min(ready.values()) < max(ready.values())
            self.methods = [m for m in self.methods if ready[m] == max(ready.values())]
        of_each = [set(self.curves[m, task]) for m in self.methods for task in TASKS]
        self.seeds = sorted(set.intersection(*of_each)) if of_each else []
        self.methods = self.methods if self.seeds else []
        for m in self.methods:  # the same for all
            for task in TASKS:
                self.curves[m, task] = {seed: self.curves[m, task][seed] for seed in self.seeds}
        self.best_rate = {}
        rates = [m for m in RATES if m in self.methods]
        for task in TASKS:
            if rates:
                self.best_rate[task] = max(rates, key=lambda m: float(self.raw(m, task, auc).mean()))
                self.curves[TUNED, task] = self.curves[self.best_rate[task], task]
        if rates:
            self.methods.insert(1, TUNED)

    def raw(self, method: str, task: str, score: Callable[[Array], float]) -> Array:
        """The scores of one method on one task, as returns, by seed."""
        return np.array([score(curve) for _, curve in sorted(self.curves[method, task].items())])

    def scores(self, method: str, score: Callable[[Array], float]) -> Scores:
        """Normalised scores of one method."""
        made = {}
        for task in TASKS:
            low = self.untrained[task]
            one = self.raw(TUNED, task, score).mean()
            made[task] = (self.raw(method, task, score) - low) / (one - low)
        return made

    def collapses(self, method: str) -> int:
        """Runs whose final return is below half of their own best, both above the untrained policy's."""
        count = 0
        for task in TASKS:
            for curve in self.curves[method, task].values():
                windows = np.convolve(curve, np.ones(LAST) / LAST, "valid") - self.untrained[task]
                count += bool(windows[-1] < windows.max() / 2)
        return count

    def runs(self, method: str) -> int:
        """How many there are."""
        return sum(len(self.curves[method, task]) for task in TASKS)


def auc(curve: Array) -> float:
    """Mean over the whole curve."""
    return float(curve.mean())


def final(curve: Array) -> float:
    """Mean over its last fifth."""
    return float(curve[-LAST:].mean())


def interquartile_mean(scores: Scores) -> float:
    """Mean of the middle half of all runs."""
    return float(trim_mean(np.concatenate(list(scores.values())), 0.25))


def improvement(ours: Scores, theirs: Scores) -> float:
    """Probability that a run of ours is better than one of theirs on the same task, the mean over tasks."""
    chances = []
    for task in ours:
        x, y = ours[task][:, None], theirs[task][None, :]
        chances.append(float((x > y).mean() + 0.5 * (x == y).mean()))
    return statistics.mean(chances)


def interval(statistic: Callable[..., float], *scores: Scores) -> tuple[float, float]:
    """95 % interval of a bootstrap that draws seeds anew within every task."""
    generator = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        drawn = [{t: x[generator.integers(len(x), size=len(x))] for t, x in one.items()} for one in scores]
        values.append(statistic(*drawn))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def cell(statistic: Callable[..., float], *scores: Scores) -> str:
    """A figure with its interval, where there are seeds enough for one."""
    if min(len(x) for one in scores for x in one.values()) < FEWEST:
        return f"{statistic(*scores):.2f}"
    low, high = interval(statistic, *scores)
    return f"{statistic(*scores):.2f} [{low:.2f}, {high:.2f}]"


def tables(found: Found) -> str:
    """The section between the markers."""
    lines: list[str] = []
    for algorithm in ("PPO", "A2C"):
        study = Study(found, algorithm, furthest=True)
        lines += table(study)
        if study.under_way:
            lines += table(Study(found, algorithm))
    return "\n".join(lines + robustness(found) + off_policy(found)) + "\n"


def off_policy(found: Found) -> list[str]:
    """Final returns of algorithms with replay, on the seeds that all methods have."""
    rows, fewest = [], len(OFF_POLICY_SEEDS)
    for algorithm, tasks in OFF_POLICY_TASKS.items():
        for task, steps in tasks.items():
            of_method: dict[str, dict[int, float]] = {method: {} for method in methods(algorithm)}
            for run, result in found.items():
                if (run.algorithm, run.environment, run.steps) == (algorithm, task, steps):
                    of_method[run.method][run.seed] = final(np.array(filled(result["curve"])))
            seeds = sorted(set.intersection(*(set(values) for values in of_method.values())))
            if len(seeds) < 2:
                continue
            fewest = min(fewest, len(seeds))
            cells = []
            for method, values in of_method.items():
                kept = [values[seed] for seed in seeds]
                name = "" if method == "adahesscale" else f"{method}: "
                cells.append(f"{name}{statistics.mean(kept):.0f} ({min(kept):.0f} to {max(kept):.0f})")
            rows.append(f"| {algorithm} | {task} | {steps:,} | {len(seeds)} | " + " | ".join(cells) + " |")
    if not rows:
        return []
    state = "" if fewest == len(OFF_POLICY_SEEDS) else PRELIMINARY
    return [
        "",
        "Algorithms with replay, with Stable-Baselines3's own settings, final returns, mean (worst to best run)"
        f"{state}:",
        "",
        "| algorithm | task | steps | seeds | AdaHesScale, the policy's defaults | Adam, Stable-Baselines3's rate | "
        "Adam, another rate |",
        "|---" * 7 + "|",
        *rows,
    ]


def table(study: Study) -> list[str]:
    """The comparison for one algorithm; nothing as long as there is too little for one."""
    if TUNED not in study.methods or "nats" not in study.methods or not study.untrained:
        return []
    ours = {score: study.scores("nats", score) for score in (auc, final)}
    lines = [
        f"**{study.algorithm}**, {len(TASKS)} tasks, {len(study.seeds)} of {len(SEEDS)} seeds, "
        f"{TASKS['Hopper-v5']:,} steps{'' if len(study.seeds) == len(SEEDS) else PRELIMINARY}:",
        "",
        "| method | AUC, IQM | final, IQM | better than it in AUC | collapses |",
        "|---|---|---|---|---|",
    ]
    for method in study.methods:
        scores = {score: study.scores(method, score) for score in (auc, final)}
        better = "" if method == "nats" else cell(improvement, ours[auc], scores[auc])
        lines.append(
            f"| {label(method)} | {cell(interquartile_mean, scores[auc])} | "
            f"{cell(interquartile_mean, scores[final])} | {better} | "
            f"{study.collapses(method)} of {study.runs(method)} |"
        )
    lines += ["", "Final returns, mean of the seeds (Adam's best rate in AUC in hindsight is in bold):", ""]
    shown = [m for m in study.methods if m != TUNED]
    lines += ["| task | untrained | " + " | ".join(label(m) for m in shown) + " |", "|---" * (2 + len(shown)) + "|"]
    for task in TASKS:
        cells = []
        for method in shown:
            text = f"{study.raw(method, task, final).mean():.0f}"
            cells.append(f"**{text}**" if method == study.best_rate[task] else text)
        lines.append(f"| {task} | {study.untrained[task]:.0f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def label(method: str) -> str:
    """As the page calls it."""
    return {"nats": "**radius in nats (default)**"}.get(method, method)


def robustness(found: Found) -> list[str]:
    """Final return by the factor on the learning rate."""
    factors = sorted({1.0, *FACTORS})
    rows = []
    kept: dict[str, list[bool]] = {}
    for algorithm in ("PPO", "A2C"):
        for task, steps in ROBUSTNESS.items():
            for method in ("nats", "adam 3e-4" if algorithm == "PPO" else "rmsprop"):
                means = []
                for factor in factors:
                    values = [
                        final(np.array(filled(result["curve"])))
                        for run, result in found.items()
                        if (run.algorithm, run.environment, run.method, run.factor, run.steps)
                        == (algorithm, task, method, factor, steps)
                    ]
                    means.append(statistics.mean(values) if values else math.nan)
                if any(math.isnan(x) for x in means):
                    continue
                rows.append(
                    f"| {algorithm} | {task} | {label(method)} | " + " | ".join(f"{x:.0f}" for x in means) + " |"
                )
                threshold = 0.9 * max(means) if max(means) > 0 else max(means) / 0.9
                kept.setdefault(method, []).append(min(means) >= threshold)
    if not rows:
        return []
    verdict = "; ".join(
        f"{label(method)} stays within 10 % of its best on {sum(values)} of {len(values)}"
        for method, values in kept.items()
    )
    head = " | ".join(f"x {factor:g}" for factor in factors)
    return [
        f"Final returns when Stable-Baselines3's learning rate ({RATE['PPO']:g} for PPO, {RATE['A2C']:g} for A2C) is "
        "multiplied:",
        "",
        f"| algorithm | task | method | {head} |",
        "|---" * (3 + len(factors)) + "|",
        *rows,
        "",
        f"From a tenth to a thousand times the rate: {verdict}.",
    ]


def draw(found: Found, folder: Path) -> None:
    """Learning curves and performance profiles."""
    shown = {
        "nats": "radius in nats",
        TUNED: "Adam, tuned per task",
        "adam 3e-4": "Adam 3e-4",
        "adam, adaptive": "Adam, KL-adaptive",
    }
    studies = [Study(found, algorithm, furthest=True) for algorithm in ("PPO", "A2C")]
    studies = [s for s in studies if TUNED in s.methods and "nats" in s.methods and s.untrained]
    figure, axes = plt.subplots(len(studies), len(TASKS), figsize=(3.2 * len(TASKS), 2.7 * len(studies)), squeeze=False)
    for row, study in zip(axes, studies, strict=True):
        for axis, (task, steps) in zip(row, TASKS.items(), strict=True):
            x = (np.arange(BINS) + 0.5) * steps / BINS / 1000
            for method, name in shown.items():
                if method not in study.methods:
                    continue
                curves = np.array(list(study.curves[method, task].values()))
                mean, spread = curves.mean(0), curves.std(0) / math.sqrt(len(curves))
                (line,) = axis.plot(x, mean, label=name, linewidth=2.2 if method == "nats" else 1.2)
                axis.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
            axis.set_title(f"{study.algorithm} {task}", fontsize=9)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel("return", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("thousand steps", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(folder / CURVES, dpi=110)
    plt.close(figure)
    figure, axes = plt.subplots(1, len(studies), figsize=(5 * len(studies), 3.4), squeeze=False)
    for axis, study in zip(axes[0], studies, strict=True):
        grid = np.linspace(0, 2, 101)
        for method, name in shown.items():
            if method not in study.methods:
                continue
            values = list(study.scores(method, auc).values())
            share = np.mean([[(v > tau).mean() for tau in grid] for v in values], 0)
            axis.plot(grid, share, label=name, linewidth=2.2 if method == "nats" else 1.2)
        axis.set_title(study.algorithm, fontsize=9)
        axis.set_xlabel("normalised AUC above which", fontsize=8)
        axis.set_ylabel("this share of runs lies", fontsize=8)
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(folder / PROFILES, dpi=110)
    plt.close(figure)


def write(results: Path, page: Path = PAGE) -> None:
    """Writes the section and the pictures."""
    found: dict[Run, dict[str, Any]] = {}
    for stage in ("main", "robustness", "off_policy"):
        found |= finished(results / f"{stage}.jsonl")
    begin, end = "<!-- generated: study -->\n", "<!-- end -->"
    before, rest = page.read_text().split(begin)
    page.write_text(before + begin + tables(found) + end + rest.split(end, 1)[1])
    draw(found, page.parent)

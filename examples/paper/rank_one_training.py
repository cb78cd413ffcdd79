"""Does AdaHesScale train better with the closer diagonal, HesScale with the rank-one part?

    python examples/paper/rank_one_training.py --write docs/approximation.md  # everything; called again, it resumes
    python examples/paper/rank_one_training.py --quick                        # fewer seeds, into outputs/
    python examples/paper/rank_one_training.py --report                       # only print, from the results

Six tasks (digits and MNIST-1D; tanh MLP, ReLU MLP, CNN), twenty seeds, AdaHesScale as it comes, at its default learning
rate and at the best of three. Both diagonals start from the same weights and see the same batches under one seed. They
are compared after the same number of steps, and when the time of HesScale's run is spent; for that the time of a step
is measured with the two taking turns.
"""

import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from journal import Journal, arguments, environment, rounded, save, settle, table, write_block
from optimization import TASKS, Data, accuracy, load, training_loss
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hesscale_lightning import attach
from hesscale_lightning.optim import AdaHesScale

RESULTS = "examples/paper/results/rank_one_training.json"
STEPS, BATCH = 200, 64
RATES = (3e-3, 1e-2, 3e-2)
DEFAULT = 1e-2
POINTS = tuple(range(130, STEPS + 1, 10))  # steps at which the loss is measured
METHODS = ("hesscale", "hesscale_rank1")
QUANTILE = 2.093  # of Student's t: 95 % for twenty seeds
BUDGETS = {"steps": "equal steps", "time": "equal time"}


def update(model: nn.Module, optimizer: torch.optim.Optimizer, method: Any, x: Tensor, y: Tensor) -> None:
    """One step of training."""
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    attach(loss, method=method)
    loss.backward()
    optimizer.step()


def measure_ratio(task: str, data: Data, rounds: int) -> float:
    """Time of a step with the second method over one with the first: the median of rounds in which both take turns."""
    batches = data.batches(20, BATCH, seed=0)
    entrants = []
    for method in METHODS:
        torch.manual_seed(0)
        model = TASKS[task][2]()
        entrants.append((method, model, AdaHesScale(model.parameters())))
    found = []
    for _ in range(rounds + 1):
        times = []
        for method, model, optimizer in entrants:
            start = time.thread_time()
            for index in batches:
                update(model, optimizer, method, data.x[index], data.y[index])
            times.append(time.thread_time() - start)
        found.append(times[1] / times[0])
    return statistics.median(found[1:])  # the first warms up


Key = tuple[str, str, float, int]  # task, method, learning rate, seed


def train(key: Key, data: Data) -> list[list[float]]:
    """Train once; returns training losses (infinite where they are not finite) and test accuracies at POINTS."""
    task, method, lr, seed = key
    torch.manual_seed(seed)
    model = TASKS[task][2]()
    optimizer = AdaHesScale(model.parameters(), lr=lr)
    losses, accuracies = [], []
    for step, index in enumerate(data.batches(STEPS, BATCH, seed), start=1):
        update(model, optimizer, method, data.x[index], data.y[index])
        if step in POINTS:
            loss = training_loss(model, data)
            losses.append(loss if math.isfinite(loss) else math.inf)
            accuracies.append(accuracy(model, data))
    return [losses, accuracies]


def run(seeds: int, folder: Path) -> dict[str, Any]:
    """Run what is not done yet, and return the results of the study."""
    torch.set_num_threads(1)
    journal = Journal(folder / "runs.jsonl", {"steps": STEPS, "batch": BATCH, "points": [*POINTS]})
    data = {task: load(task) for task in TASKS}
    ratios = {task: measure_ratio(task, data[task], 5 if seeds < 20 else 20) for task in TASKS}
    keys: list[Key] = [
        (task, method, lr, seed) for seed, task, method, lr in product(range(seeds), TASKS, METHODS, RATES)
    ]
    for key in tqdm(keys, desc="runs", unit="run", smoothing=0.02, mininterval=1):
        if key not in journal.runs:
            start = time.perf_counter()
            found = train(key, data[key[0]])
            journal.note([*key], {"found": found, "seconds": time.perf_counter() - start})
    runs: dict[str, dict[str, list[Any]]] = {}
    for task, method, lr, seed in keys:
        found = rounded(journal.runs[task, method, lr, seed]["found"])
        runs.setdefault(task, {}).setdefault(name_of(method, lr), []).append(found)
    return {
        "steps": STEPS,
        "batch": BATCH,
        "seeds": seeds,
        "environment": environment(),
        "minutes": rounded(sum(journal.runs[key]["seconds"] for key in keys) / 60),
        "ratios": rounded(ratios),
        "runs": runs,
    }


def name_of(method: str, lr: float) -> str:
    return f"{method}, {lr:g}"


def at(results: dict[str, Any], task: str, method: str, lr: float, budget: str) -> tuple[list[float], list[float]]:
    """Training loss and test accuracy of every seed when the budget is spent, at the nearest of POINTS."""
    fits = STEPS if budget == "steps" or method == METHODS[0] else STEPS / results["ratios"][task]
    place = min(range(len(POINTS)), key=lambda k: abs(POINTS[k] - fits))
    found = results["runs"][task][name_of(method, lr)]
    return [seed[0][place] for seed in found], [seed[1][place] for seed in found]


def best_rate(results: dict[str, Any], task: str, method: str, budget: str) -> float:
    """The learning rate with the lowest mean training loss."""
    return min(RATES, key=lambda lr: statistics.fmean(at(results, task, method, lr, budget)[0]))


@dataclass(frozen=True)
class Comparison:
    """Both methods on one task, HesScale first: mean losses and accuracies, and the ratio of the losses by seed."""

    rates: list[float]
    losses: list[float]
    accuracies: list[float]
    ratio: float
    low: float
    high: float
    lower: int  # seeds with which the second has the lower loss


def compare(results: dict[str, Any], task: str, budget: str, tuned: bool) -> Comparison:
    """Seed by seed: the geometric mean of the ratio, with its 95 % interval by Student's t."""
    rates = [best_rate(results, task, method, budget) if tuned else DEFAULT for method in METHODS]
    found = [at(results, task, method, lr, budget) for method, lr in zip(METHODS, rates, strict=True)]
    logs = [math.log(new / old) for old, new in zip(found[0][0], found[1][0], strict=True)]
    mean = statistics.fmean(logs)
    half = QUANTILE * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return Comparison(
        rates,
        [statistics.fmean(losses) for losses, _ in found],
        [statistics.fmean(accuracies) for _, accuracies in found],
        math.exp(mean),
        math.exp(mean - half) if math.isfinite(half) else 0.0,
        math.exp(mean + half) if math.isfinite(half) else math.inf,
        sum(log < 0 for log in logs),
    )


def conclusions(results: dict[str, Any]) -> str:
    """The page's block: what follows, and a table for each choice of the learning rate."""
    machine = results["environment"]
    head = (
        f"{len(results['runs'])} tasks, {results['seeds']} seeds, {results['steps']} steps of {results['batch']} "
        f"samples, learning rates {', '.join(f'{lr:g}' for lr in RATES)}; {results['minutes']:.0f} minutes (one "
        f"thread, torch {machine['torch']}, {machine['machine']}). Ratios are the rank-one method's training loss over "
        "HesScale's with the same seed: geometric mean (95 % interval), and the number of seeds with which it is lower."
    )
    parts = [head, findings(results)]
    for tuned in (False, True):
        parts += ["At the best learning rate of each:" if tuned else f"At the default, {DEFAULT:g}:"]
        parts += [comparison(results, tuned)]
    return "\n\n".join(parts)


def comparison(results: dict[str, Any], tuned: bool) -> str:
    rows = []
    for task in results["runs"]:
        by_budget = [compare(results, task, budget, tuned) for budget in BUDGETS]
        steps = by_budget[0]
        rows.append(
            [task]
            + [f"{loss:.3g} ({lr:g})" for loss, lr in zip(steps.losses, steps.rates, strict=True)]
            + [f"{one.ratio:.2f} ({one.low:.2f}-{one.high:.2f}), {one.lower}" for one in by_budget]
            + [" / ".join(f"{100 * value:.1f}" for value in steps.accuracies), f"{results['ratios'][task]:.2f}"]
        )
    losses = ["loss with HesScale (lr)", "loss with the rank-one part (lr)"]
    budgets = [f"ratio, {title}" for title in BUDGETS.values()]
    return table(["task", *losses, *budgets, "test accuracy, %, both", "time of a step, ratio"], rows)


def findings(results: dict[str, Any]) -> str:
    lines = []
    for tuned, (budget, title) in product((False, True), BUDGETS.items()):
        found = {task: compare(results, task, budget, tuned) for task in results["runs"]}
        better = [task for task, one in found.items() if one.high < 1]
        worse = [task for task, one in found.items() if one.low > 1]
        overall = math.exp(statistics.fmean(math.log(one.ratio) for one in found.values()))
        chosen = "At the best learning rate of each" if tuned else f"At learning rate {DEFAULT:g}"
        lines.append(
            f"{chosen} and {title}, the rank-one part lowers the loss on {named(better)}, raises it on {named(worse)}, "
            f"and leaves the interval around 1 on {len(found) - len(better) - len(worse)}; over all tasks the ratio is "
            f"{overall:.2f}."
        )
    return "\n".join(f"- {line}" for line in lines)


def named(tasks: Iterable[str]) -> str:
    found = list(tasks)
    return f"{len(found)} ({'; '.join(found)})" if found else "none"


def main(given: list[str] | None = None) -> None:
    """Run, save and print."""
    parser = arguments(__doc__, "outputs/rank_one_training")
    parser.add_argument("--seeds", type=int, help="how many seeds (20, with --quick 2)")
    options = settle(parser.parse_args(given), RESULTS, "outputs/rank_one_training.png")
    if not options.report:
        save(run(options.seeds or (2 if options.quick else 20), options.folder), options.results)
    results = json.loads(options.results.read_text())
    text = conclusions(results)
    if options.write:
        write_block(options.write, "rank one", text)
    else:
        print(text)
    print(options.results)


if __name__ == "__main__":
    main()

"""The evidence behind the optimizers' defaults: AdaHesScale and others over six tasks and all learning rates.

    python examples/paper/optimization.py                # the whole study; called again, it resumes
    python examples/paper/optimization.py --quick true   # a smaller grid, in minutes, into outputs/
    python examples/paper/optimization.py --report true  # tables and picture from the results in the repository

Every run trains from scratch and is measured twice: after the same number of steps for all optimizers, and after the
number of steps that fit into the time of Adam's run. For that the cost of a step is measured first, the optimizers
taking turns. Finished runs are appended to a file at once, so nothing is lost when the study is stopped.

AdaHessian is the implementation of pytorch_optimizer: `pip install pytorch_optimizer`, or leave it out with
`--optimizers`. Set OMP_NUM_THREADS=1: the networks are small, and more threads only wait for each other.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hesscale_lightning import attach
from hesscale_lightning.data import DigitsDataModule, MNIST1DDataModule
from hesscale_lightning.networks import MLP
from hesscale_lightning.optim import AdaHesScale, StepSizeScaling

RESULTS = Path("examples/paper/results/optimization.json")
DOCUMENT = Path("docs/optimization.md")
PICTURE = Path("docs/optimization.png")
BEGIN, END = "<!-- generated: optimization -->", "<!-- end of generated -->"
POINTS = 8  # measured points of a loss curve
ACCURACY_MARGIN = 0.01
BUDGETS = {"time": "equal time", "steps": "equal steps"}


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 12, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(160, 10),
    )


def conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


# Task: data set, shape of its samples, network.
TASKS: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    "digits, tanh MLP": ("digits", "flat", partial(MLP, [64, 64, 64, 10], nn.Tanh)),
    "digits, ReLU MLP": ("digits", "flat", partial(MLP, [64, 64, 64, 10], nn.ReLU)),
    "digits, CNN": ("digits", "image", conv2d),
    "mnist1d, tanh MLP": ("mnist1d", "flat", partial(MLP, [40, 64, 64, 10], nn.Tanh)),
    "mnist1d, ReLU MLP": ("mnist1d", "flat", partial(MLP, [40, 64, 64, 10], nn.ReLU)),
    "mnist1d, CNN": ("mnist1d", "channel", conv1d),
}


class Method:
    """How one optimizer takes a training step, with every option but the learning rate as it comes."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.optimizer = self.build([*model.parameters()], lr)
        self.steps = 0

    def build(self, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.backward(loss)
        self.update()
        self.steps += 1


class Adam(Method):
    def build(self, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=lr)


class SGD(Method):
    def build(self, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, momentum=0.9)


class Curved(Method):
    """AdaHesScale as it comes."""

    every = 1
    method: Literal["hesscale", "hesscale_gn"] = "hesscale"
    options: dict[str, Any] = {}  # noqa: RUF012

    def build(self, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        return AdaHesScale(params, lr=lr, **self.options)

    def backward(self, loss: Tensor) -> None:
        if self.steps % self.every == 0:
            attach(loss, method=self.method)
        loss.backward()


class CurvedEvery10(Curved):
    every = 10


class CurvedGN(Curved):
    method = "hesscale_gn"


class CurvedUnscaled(Curved):
    options = {"delta": None}  # noqa: RUF012


class AdamScaled(Curved):
    """Adam in the trust region of AdaHesScale: the control that tells what the trust region does by itself."""

    def build(self, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        return StepSizeScaling(torch.optim.Adam(params, lr=lr))


class AdaHessian(Method):
    """pytorch_optimizer's AdaHessian with one Rademacher probe and eps, power and kernel averages of its authors' code.

    Source: Yao et al., "AdaHessian: An Adaptive Second Order Optimizer for Machine Learning", AAAI 2021.
    """

    def build(self, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        try:
            from pytorch_optimizer import AdaHessian as Published
        except ImportError as error:
            raise ImportError("AdaHessian needs: pip install pytorch_optimizer") from error
        self.params = params
        return Published(params, lr=lr, eps=1e-4, hessian_power=1.0)

    def backward(self, loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, self.params, create_graph=True)
        probes = [torch.randint_like(p, high=2).mul_(2).sub_(1) for p in self.params]
        products = torch.autograd.grad(grads, self.params, probes)
        self.diagonals = [
            v.abs().mean(dim=tuple(range(2, v.ndim)), keepdim=True).expand_as(v) if v.ndim > 2 else v.abs()
            for v in products
        ]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.detach()

    def update(self) -> None:
        self.optimizer.step(hessian=self.diagonals)  # type: ignore[call-overload]


REFERENCE = "Adam"
METHODS: dict[str, type[Method]] = {
    "AdaHesScale": Curved,
    "AdaHesScale, h every 10 steps": CurvedEvery10,
    "AdaHesScaleGN": CurvedGN,
    "AdaHesScale, delta=None": CurvedUnscaled,
    "Adam": Adam,
    "Adam in StepSizeScaling": AdamScaled,
    "SGD, momentum 0.9": SGD,
    "AdaHessian": AdaHessian,
}


@dataclass(frozen=True)
class Settings:
    """What to run.

    Args:
        steps: training steps at which all optimizers are compared.
        batch_size: samples in a batch.
        seeds: seeds of the initial weights and of the order of the samples; one run each.
        lrs: learning rates; the same for all optimizers.
        tasks: names of the tasks.
        optimizers: names of the optimizers; Adam must be among them, since its time is the budget.
        timing_rounds: rounds of 20 steps in which the cost of a step is measured.
        folder: where finished runs are kept until the study is complete.
        results: the study's results, as JSON; None for ``results.json`` in ``folder``.
        document: the document whose marked part the tables replace; None for ``optimization.md`` in ``folder``.
        picture: the picture; None for ``optimization.png`` in ``folder``.
        quick: take fewer steps, seeds and learning rates, and leave the repository's results and document alone.
        report: run nothing, only write table and picture from the results.
    """

    steps: int = 400
    batch_size: int = 64
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    lrs: list[float] = field(default_factory=lambda: [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    optimizers: list[str] = field(default_factory=lambda: list(METHODS))
    timing_rounds: int = 15
    folder: Path = Path("outputs/optimization")
    results: Path | None = RESULTS
    document: Path | None = DOCUMENT
    picture: Path | None = PICTURE
    quick: bool = False
    report: bool = False


def resolved(settings: Settings) -> Settings:
    """The settings with ``quick`` applied and every path given.

    Raises:
        ValueError: if a task or an optimizer is unknown, or Adam is missing.
    """
    for found, known in ((settings.tasks, TASKS), (settings.optimizers, METHODS)):
        for name in found:
            if name not in known:
                raise ValueError(f"Found {name!r}, expected one of {', '.join(map(repr, known))}.")
    if REFERENCE not in settings.optimizers:
        raise ValueError(f"Found optimizers={settings.optimizers}, expected {REFERENCE!r} among them.")
    if settings.quick:
        folder = settings.folder.with_name(settings.folder.name + "_quick")
        settings = replace(
            settings, steps=120, seeds=settings.seeds[:2], lrs=settings.lrs[2::2], timing_rounds=5, folder=folder
        )
        settings = replace(settings, results=None, document=None, picture=None)
    return replace(
        settings,
        results=settings.results or settings.folder / "results.json",
        document=settings.document or settings.folder / DOCUMENT.name,
        picture=settings.picture or settings.folder / PICTURE.name,
    )


Key = tuple[str, str, float, int]  # task, optimizer, learning rate, seed


@dataclass(frozen=True)
class Data:
    """Training and test samples of one task."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, steps: int, size: int, seed: int) -> Tensor:
        """Indices of shape (steps, size): one pass over all samples in random order after the other."""
        generator = torch.Generator().manual_seed(seed)
        passes = math.ceil(steps * size / len(self.x))
        order = torch.cat([torch.randperm(len(self.x), generator=generator) for _ in range(passes)])
        return order[: steps * size].view(steps, size)


def load(name: str) -> Data:
    """Load a task's data; the split is the same for all seeds."""
    source, shape, _ = TASKS[name]
    kind: Any = DigitsDataModule if source == "digits" else MNIST1DDataModule
    module = kind(shape=shape)
    module.setup()
    return Data(*module.train_set.tensors, *module.test_set.tensors)


def measure_costs(name: str, data: Data, settings: Settings) -> dict[str, float]:
    """Measure the milliseconds of a training step of every optimizer on one task, the optimizers taking turns.

    It is the thread's own time: wall-clock time on an idle machine, and on a busy one without the waiting.
    """
    steps = 20
    batches = data.batches(steps, settings.batch_size, seed=0)
    entrants: dict[str, tuple[nn.Module, Method]] = {}
    for optimizer in settings.optimizers:
        torch.manual_seed(0)
        model = TASKS[name][2]()
        entrants[optimizer] = (model, METHODS[optimizer](model, 1e-3))
    times: dict[str, list[float]] = {optimizer: [] for optimizer in entrants}
    for _ in range(settings.timing_rounds + 1):
        for optimizer, (model, method) in entrants.items():
            start = time.thread_time()
            for index in batches:
                method.step(cross_entropy(model(data.x[index]), data.y[index]))
            times[optimizer].append(1000 * (time.thread_time() - start) / steps)
    return {optimizer: statistics.median(found[1:]) for optimizer, found in times.items()}  # the first warms up


def train(key: Key, data: Data, settings: Settings, costs: dict[str, float]) -> dict[str, Any]:
    """Train once.

    Returns:
        ``initial``: training loss before the first step; ``worst``: largest loss of a batch; ``curve``: training loss
        at POINTS equal distances up to ``settings.steps``; ``time`` and ``steps``: training loss and test accuracy when
        Adam's time is spent, and after ``settings.steps``. A loss is None where it is, or once was, not finite.
    """
    task, optimizer, lr, seed = key
    torch.manual_seed(seed)
    model = TASKS[task][2]()
    method = METHODS[optimizer](model, lr)
    in_time = max(1, int(settings.steps * costs[REFERENCE] / costs[optimizer]))
    total = max(in_time, settings.steps)
    points = {round(settings.steps * k / POINTS) for k in range(1, POINTS + 1)}
    losses: dict[int, float | None] = dict.fromkeys({*points, in_time, settings.steps})
    accuracies = dict.fromkeys({in_time, settings.steps}, 0.0)
    initial = training_loss(model, data)
    worst = initial
    start = time.perf_counter()
    finite = True
    for step, index in enumerate(data.batches(total, settings.batch_size, seed), start=1):
        loss = cross_entropy(model(data.x[index]), data.y[index])
        value = loss.item()
        if not math.isfinite(value):
            finite = False
            break
        worst = max(worst, value)
        method.step(loss)
        if step in losses:
            value = training_loss(model, data)
            if not math.isfinite(value):
                finite = False
                break
            losses[step] = value
        if step in accuracies:
            accuracies[step] = accuracy(model, data)
    return {
        "initial": initial,
        "worst": worst if finite else None,
        "curve": [losses[point] for point in sorted(points)],
        "time": [losses[in_time], accuracies[in_time]],
        "steps": [losses[settings.steps], accuracies[settings.steps]],
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def training_loss(model: nn.Module, data: Data) -> float:
    return float(cross_entropy(model(data.x), data.y))


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    right = model(data.test_x).argmax(1) == data.test_y
    return float(right.float().mean())


def run(settings: Settings) -> dict[str, Any]:
    """Run what is not done yet, and return the results of the study.

    Raises:
        ValueError: if ``settings.folder`` holds runs of other settings.
    """
    torch.set_num_threads(1)
    settings.folder.mkdir(parents=True, exist_ok=True)
    journal = settings.folder / "runs.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    identity = {name: asdict(settings)[name] for name in ("steps", "batch_size", "timing_rounds", "optimizers")}
    costs: dict[str, dict[str, float]] = {line["task"]: line["costs"] for line in lines if "costs" in line}
    done: dict[Key, dict[str, Any]] = {tuple(line["run"]): line["found"] for line in lines if "run" in line}
    for found in (line["settings"] for line in lines if "settings" in line):
        if found != identity:
            raise ValueError(
                f"{journal} holds runs with {found}, expected {identity}: give another --folder, or delete it."
            )

    with journal.open("a") as file:

        def note(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        if not lines:
            note(settings=identity)
        data = {task: load(task) for task in settings.tasks}
        for task in settings.tasks:
            if task not in costs:
                costs[task] = measure_costs(task, data[task], settings)
                note(task=task, costs=costs[task])
        # Seeds outermost: a study that is stopped early is complete for some seeds.
        keys: list[Key] = [
            (task, optimizer, lr, seed)
            for seed, task, optimizer, lr in product(settings.seeds, settings.tasks, settings.optimizers, settings.lrs)
        ]
        for key in tqdm(keys, desc="runs", unit="run", smoothing=0.02, mininterval=1):
            if key not in done:
                done[key] = train(key, data[key[0]], settings, costs[key[0]])
                note(run=key, found=done[key])
    return collect(settings, costs, {key: done[key] for key in keys})


def collect(settings: Settings, costs: dict[str, dict[str, float]], done: dict[Key, dict[str, Any]]) -> dict[str, Any]:
    """Bring the runs into the form in which they are kept: by task, optimizer and learning rate, one entry per seed."""
    runs: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for (task, optimizer, lr, _), found in done.items():
        kept = {name: rounded(value) for name, value in found.items() if name != "seconds"}
        runs.setdefault(task, {}).setdefault(optimizer, {}).setdefault(f"{lr:.0e}", []).append(kept)
    return {
        "settings": {
            name: asdict(settings)[name] for name in ("steps", "batch_size", "seeds", "lrs", "tasks", "optimizers")
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__.partition("+")[0],
            "machine": f"{platform.machine()}, 1 of {os.cpu_count()} cores",
        },
        "minutes": rounded(sum(found["seconds"] for found in done.values()) / 60),
        "milliseconds": rounded(costs),
        "runs": runs,
    }


def rounded(value: Any) -> Any:
    """Keep four significant digits of every number."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results as JSON, one line for each task, optimizer and learning rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in results.items() if name != "runs"}
    head = json.dumps(rest, indent=1).removesuffix("\n}")
    tasks = []
    for task, optimizers in results["runs"].items():
        rows = [
            f"   {json.dumps(name)}: {{\n"
            + ",\n".join(
                f"    {json.dumps(lr)}: {json.dumps(found, separators=(',', ':'))}" for lr, found in by_lr.items()
            )
            + "\n   }"
            for name, by_lr in optimizers.items()
        ]
        tasks.append(f"  {json.dumps(task)}: {{\n" + ",\n".join(rows) + "\n  }")
    path.write_text(head + ',\n "runs": {\n' + ",\n".join(tasks) + "\n }\n}\n")


@dataclass(frozen=True)
class Tuned:
    """One optimizer on one task, at the learning rate with the lowest mean training loss over the seeds."""

    lr: str
    losses: list[float]
    accuracies: list[float]
    flat: int  # learning rates with a mean loss within twice the lowest
    accurate: int  # learning rates with a mean test accuracy within ACCURACY_MARGIN of the highest


def losses(found: Iterable[dict[str, Any]], budget: str) -> list[float]:
    """Final training loss of every seed; infinite where it is not finite."""
    return [math.inf if run[budget][0] is None else run[budget][0] for run in found]


def means(results: dict[str, Any], task: str, optimizer: str, budget: str) -> dict[str, float]:
    """Mean final training loss at every learning rate."""
    by_lr = results["runs"][task][optimizer]
    return {lr: statistics.fmean(losses(found, budget)) for lr, found in by_lr.items()}


def tune(results: dict[str, Any], task: str, optimizer: str, budget: str) -> Tuned:
    mean = means(results, task, optimizer, budget)
    lr = min(mean, key=lambda rate: mean[rate])
    found = results["runs"][task][optimizer][lr]
    flat = sum(value <= 2 * mean[lr] for value in mean.values())
    by_lr = results["runs"][task][optimizer].values()
    accuracies = [statistics.fmean(run[budget][1] for run in seeds) for seeds in by_lr]
    accurate = sum(value >= max(accuracies) - ACCURACY_MARGIN for value in accuracies)
    return Tuned(lr, losses(found, budget), [run[budget][1] for run in found], flat, accurate)


def verdict(one: Tuned, other: Tuned) -> int:
    """1 if the first has the lower loss with every seed, -1 if the second has, else 0."""
    pairs = list(zip(one.losses, other.losses, strict=True))
    return all(a < b for a, b in pairs) - all(a > b for a, b in pairs)


@dataclass(frozen=True)
class Failures:
    """How many runs did not train, over all learning rates and seeds."""

    runs: int
    infinite: int  # a loss was not finite
    diverged: int  # the final training loss is above the initial one
    worst: float  # largest loss of a batch, over the initial training loss


def failures(results: dict[str, Any], optimizer: str) -> Failures:
    runs = [run for task in results["runs"].values() for found in task.get(optimizer, {}).values() for run in found]
    finite = [run for run in runs if run["worst"] is not None]
    diverged = sum(run["steps"][0] > run["initial"] for run in finite)
    worst = max((run["worst"] / run["initial"] for run in finite), default=math.inf)
    return Failures(len(runs), len(runs) - len(finite), diverged, worst)


def relative(results: dict[str, Any], optimizer: str, budget: str) -> dict[str, float]:
    """At every learning rate, the geometric mean over the tasks of the loss over that of Adam tuned on the task."""
    ratios: dict[str, list[float]] = {}
    for task in results["runs"]:
        best = statistics.fmean(tune(results, task, REFERENCE, budget).losses)
        for lr, loss in means(results, task, optimizer, budget).items():
            ratios.setdefault(lr, []).append(math.log(loss / best))
    return {lr: math.exp(statistics.fmean(found)) for lr, found in ratios.items()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], factor: float) -> str:
    """Mean and standard deviation, both times ``factor``, to three digits of the mean."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean = factor * statistics.fmean(values)
    deviation = factor * (statistics.stdev(values) if len(values) > 1 else 0.0)
    digits = min(3, max(0, 2 - math.floor(math.log10(max(mean, 1e-9)))))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def rate(lr: str) -> str:
    return f"{float(lr):g}"


def among(names: Sequence[str], results: dict[str, Any]) -> list[str]:
    return [name for name in names if name in results["settings"]["optimizers"]]


def listed(tasks: Sequence[str], total: int) -> str:
    if not tasks:
        return "on none"
    return "on all" if len(tasks) == total else f"on {len(tasks)} of {total} ({'; '.join(tasks)})"


def compare(results: dict[str, Any], one: str, other: str, budget: str) -> dict[int, list[str]]:
    """The tasks by verdict."""
    found: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for task in results["runs"]:
        found[verdict(tune(results, task, one, budget), tune(results, task, other, budget))].append(task)
    return found


def comparison(results: dict[str, Any], one: str, other: str, budget: str) -> str:
    found = compare(results, one, other, budget)
    total = len(results["runs"])
    pairs = [
        statistics.fmean(tune(results, task, one, budget).losses)
        / statistics.fmean(tune(results, task, other, budget).losses)
        for task in results["runs"]
    ]
    ratio = math.exp(statistics.fmean(map(math.log, pairs)))
    return (
        f"**{one}** against **{other}**: lower loss {listed(found[1], total)}, higher {listed(found[-1], total)}; "
        f"geometric mean of the ratio {ratio:.2f}"
    )


def conclusions(results: dict[str, Any]) -> str:
    """The marked part of the document."""
    settings, tasks = results["settings"], list(results["runs"])
    optimizers = settings["optimizers"]
    cost = results["milliseconds"]
    tuned = {key: tune(results, *key) for key in product(tasks, optimizers, BUDGETS)}
    runs = sum(failures(results, optimizer).runs for optimizer in optimizers)
    repeats = len(settings["lrs"]) * len(settings["seeds"]) * settings["steps"]
    idle = repeats * sum(cost[task][optimizer] for task in tasks for optimizer in optimizers) / 60_000

    def by_task(cell: Callable[[str, str], str]) -> str:
        return table(["optimizer", *tasks], ([name, *(cell(task, name) for task in tasks)] for name in optimizers))

    def loss(budget: str, task: str, optimizer: str) -> str:
        found = tuned[task, optimizer, budget]
        lowest = min(statistics.fmean(tuned[task, other, budget].losses) for other in optimizers)
        text = f"{spread(found.losses, 1000)} ({rate(found.lr)})"
        return f"**{text}**" if statistics.fmean(found.losses) == lowest else text

    def percent(budget: str, task: str, optimizer: str) -> str:
        return spread(tuned[task, optimizer, budget].accuracies, 100)

    parts = [
        f"{len(tasks)} tasks, {len(optimizers)} optimizers, {len(settings['lrs'])} learning rates from "
        f"{rate(min(settings['lrs']))} to {rate(max(settings['lrs']))}, {len(settings['seeds'])} seeds: {runs} runs of "
        f"{settings['steps']} steps of {settings['batch_size']} samples. They took {results['minutes']:.0f} minutes on "
        f"a busy machine; by the time of a step, an idle core needs {idle:.0f} "
        f"(one thread, torch {results['environment']['torch']}, {results['environment']['machine']}).",
        "## Conclusions",
        table(
            [
                "optimizer",
                "time of a step, Adam = 1",
                *(f"{title}: lower / even / higher loss than Adam" for title in BUDGETS.values()),
                "loss at the best shared learning rate, tuned Adam = 1",
                f"learning rates of {len(settings['lrs'])} within 2 × the best loss",
                f"within {100 * ACCURACY_MARGIN:g} point of the best accuracy",
                "runs not finite",
                "runs diverged",
                "worst batch, initial loss = 1",
            ],
            (summary(results, optimizer, tuned) for optimizer in optimizers),
        ),
        findings(results),
        *(f"## One learning rate for all tasks, {t}\n\n{untuned(results, b)}" for b, t in BUDGETS.items()),
        *(f"## Training loss in thousandths, {t}\n\n{by_task(partial(loss, b))}" for b, t in BUDGETS.items()),
        *(f"## Test accuracy in percent, {t}\n\n{by_task(partial(percent, b))}" for b, t in BUDGETS.items()),
        "## Learning rates within twice the optimizer's best loss, and within "
        f"{100 * ACCURACY_MARGIN:g} point of its best accuracy, equal time",
        by_task(lambda task, name: "{0.flat}, {0.accurate}".format(tuned[task, name, "time"])),
        "## Time of a training step in milliseconds",
        by_task(lambda task, name: f"{cost[task][name]:.2f}"),
    ]
    return "\n\n".join(parts)


def untuned(results: dict[str, Any], budget: str) -> str:
    """Table of the loss at every learning rate, over that of Adam tuned on each task."""
    rows = []
    for optimizer in results["settings"]["optimizers"]:
        ratios = [*relative(results, optimizer, budget).values()]
        cells = [f"{ratio:.3g}" if ratio < 1000 else "> 1000" for ratio in ratios]
        rows.append([optimizer, *(f"**{c}**" if r == min(ratios) else c for c, r in zip(cells, ratios, strict=True))])
    return table(["optimizer", *(f"{lr:g}" for lr in results["settings"]["lrs"])], rows)


def summary(results: dict[str, Any], optimizer: str, tuned: dict[tuple[str, str, str], Tuned]) -> list[str]:
    """An optimizer's row in the table of conclusions."""
    tasks = list(results["runs"])
    scores = ["", ""]
    if optimizer != REFERENCE:
        found = [compare(results, optimizer, REFERENCE, budget) for budget in BUDGETS]
        scores = [f"{len(by[1])} / {len(by[0])} / {len(by[-1])}" for by in found]
    ratios = relative(results, optimizer, "time")
    lr = min(ratios, key=lambda one: ratios[one])
    failed = failures(results, optimizer)
    at_time = [tuned[task, optimizer, "time"] for task in tasks]
    cost = results["milliseconds"]
    return [
        optimizer,
        f"{statistics.median(cost[task][optimizer] / cost[task][REFERENCE] for task in tasks):.2f}",
        *scores,
        f"{ratios[lr]:.2f} ({rate(lr)})" if math.isfinite(ratios[lr]) else "none",
        f"{statistics.fmean(found.flat for found in at_time):.1f}",
        f"{statistics.fmean(found.accurate for found in at_time):.1f}",
        str(failed.infinite),
        str(failed.diverged),
        f"{failed.worst:,.1f}" if failed.worst < 100 else f"{failed.worst:,.0f}",
    ]


def findings(results: dict[str, Any]) -> str:
    """What follows from the numbers, in sentences."""
    curved = among([name for name, method in METHODS.items() if issubclass(method, Curved)], results)
    defaults, control, bare = "AdaHesScale", "Adam in StepSizeScaling", "AdaHesScale, delta=None"
    lines = []
    for optimizer in among([defaults, "AdaHesScale, h every 10 steps", "AdaHesScaleGN"], results):
        failed = failures(results, optimizer)
        lines.append(
            f"Stability of **{optimizer}** over all learning rates: of {failed.runs} runs {failed.infinite} had a loss "
            f"that is not finite and {failed.diverged} ended above the initial loss."
        )
    rivals = [name for name in curved if name not in (control,)]
    for budget, title in BUDGETS.items():
        lines += [f"At {title}, {comparison(results, name, REFERENCE, budget)}." for name in rivals]
    if len(among([defaults, control, bare], results)) == 3:
        lines += [
            f"What the curvature in the denominator adds, with the same trust region on both sides, at equal steps: "
            f"{comparison(results, defaults, control, 'steps')}.",
            f"What the trust region costs at the best learning rate, at equal steps: "
            f"{comparison(results, defaults, bare, 'steps')}; {comparison(results, control, REFERENCE, 'steps')}.",
        ]
        width = {
            name: statistics.fmean(tune(results, task, name, "time").flat for task in results["runs"])
            for name in (defaults, bare, control, REFERENCE)
        }
        lines.append(
            "What the trust region does for the range of learning rates within twice the best loss, on average over "
            f"the tasks: from {width[bare]:.1f} to {width[defaults]:.1f} learning rates for AdaHesScale, from "
            f"{width[REFERENCE]:.1f} to {width[control]:.1f} for Adam."
        )
    return "\n".join(f"- {line}" for line in lines)


INK, MUTED = "#1a1a2e", "#8a8a9a"
STYLES: dict[str, dict[str, Any]] = {
    "AdaHesScale": {"color": "#2563eb", "linewidth": 2.2, "marker": "o"},
    "AdaHesScale, h every 10 steps": {"color": "#0d9488", "linewidth": 2.2, "marker": "s"},
    "AdaHesScaleGN": {"color": "#7c3aed", "linewidth": 1.4, "marker": "D"},
    "AdaHesScale, delta=None": {"color": "#2563eb", "linewidth": 1.4, "linestyle": (0, (4, 2))},
    "Adam": {"color": "#ea7317", "linewidth": 2.2, "linestyle": (0, (4, 2)), "marker": "o"},
    "Adam in StepSizeScaling": {"color": "#ea7317", "linewidth": 1.4},
    "SGD, momentum 0.9": {"color": "#8a8a9a", "linewidth": 1.4},
    "AdaHessian": {"color": "#be185d", "linewidth": 1.4},
}
SHADED = ("AdaHesScale, h every 10 steps", "Adam")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the final training loss at equal time over the learning rate, one panel for each task."""
    plt.rcParams.update({"font.size": 11, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK})
    settings, tasks = results["settings"], list(results["runs"])
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    height = 3.6 * rows + 1.4
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, height), sharex=True, squeeze=False)
    for task, axis in zip(tasks, axes.flat, strict=False):
        draw_task(results, task, axis)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    for row in axes:
        row[0].set_ylabel("training loss")
    figure.text(0.012, 1 - 0.33 / height, "Final training loss at equal time", fontsize=15, fontweight="bold")
    explanation = (
        f"cross-entropy when the time of {settings['steps']} steps of Adam is spent, mean of {len(settings['seeds'])} "
        "seeds; shaded: lowest to highest seed; dotted: before training; lines that leave the panel diverged"
    )
    figure.text(0.012, 1 - 0.58 / height, explanation, color=MUTED, fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.62 / height, 1, 1 - 0.7 / height), h_pad=1.6, w_pad=1.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_task(results: dict[str, Any], task: str, axis: Axes) -> None:
    runs, rates = results["runs"][task], results["settings"]["lrs"]
    initial = statistics.fmean(run["initial"] for found in runs[REFERENCE].values() for run in found)
    beyond = 100 * initial  # for losses that are not finite
    drawn = []
    for optimizer, style in STYLES.items():
        if optimizer not in runs:
            continue
        found = [[min(loss, beyond) for loss in losses(runs[optimizer][f"{lr:.0e}"], "time")] for lr in rates]
        mean = [statistics.fmean(seeds) for seeds in found]
        axis.plot(rates, mean, label=optimizer, markersize=4, **style)
        if optimizer in SHADED:
            lowest, highest = [min(seeds) for seeds in found], [max(seeds) for seeds in found]
            axis.fill_between(rates, lowest, highest, color=style["color"], alpha=0.12, linewidth=0)
        drawn += mean
    axis.axhline(initial, color=MUTED, linewidth=1.0, linestyle=":")
    axis.set(xscale="log", yscale="log", ylim=(min(drawn) / 1.4, 3 * initial))
    if min(drawn) > initial / 20:  # less than two decades: plain numbers instead of powers
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(task, loc="left", fontsize=12, fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.15)
    axis.tick_params(length=3)


def write_document(results: dict[str, Any], path: Path) -> None:
    """Put the tables between the document's marks, or into a new document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    after = rest.split(END, 1)[1]
    path.write_text(f"{before}{BEGIN}\n\n{conclusions(results)}\n\n{END}{after}")


def main(arguments: list[str] | None = None) -> None:
    settings = resolved(jsonargparse.auto_cli(Settings, args=arguments, as_positional=False))
    assert settings.results is not None
    assert settings.document is not None
    assert settings.picture is not None
    if not settings.report:
        save(run(settings), settings.results)
    results = json.loads(settings.results.read_text())
    write_document(results, settings.document)
    draw(results, settings.picture)
    print(f"{settings.results}\n{settings.document}\n{settings.picture}")


if __name__ == "__main__":
    main()

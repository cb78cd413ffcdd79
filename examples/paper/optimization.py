"""What curvature is worth in supervised training: AdaHesScale beside tuned rivals, each with warm-up and decay.

    python examples/paper/optimization.py            # the whole study; called again, it resumes
    python examples/paper/optimization.py --quick    # a smaller grid, in minutes, into outputs/
    python examples/paper/optimization.py --report   # page and picture from the results in the repository

Every optimizer is tuned on every task: on a grid of three learning rates per decade with three seeds, by the training
loss at the end. At its best rate it is then run with five fresh seeds, once for the same number of steps as all others,
once for as many as fit into the time of Adam's run, with the schedule of that length. The cost of a step is measured
first, the optimizers taking turns. Finished runs are appended to the results at once.

Schedule-Free AdamW is the implementation of its authors: `pip install schedulefree`, or leave it out with `--without`.
Set OMP_NUM_THREADS=1: the networks are small, and more threads only wait for each other.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from journal import Journal, arguments, settle, table, write_block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hesscale_lightning import attach
from hesscale_lightning.command_line.data import DigitsDataModule, MNIST1DDataModule
from hesscale_lightning.command_line.networks import MLP
from hesscale_lightning.optim import AdaHesScale, StepSizeScaling

REFERENCE = "Adam"
RATES = [10 ** (k / 3 - 4) for k in range(13)]  # 1e-4 to 1
TUNING_SEEDS, SEEDS = [0, 1, 2], [10, 11, 12, 13, 14]
STEPS, BATCH = 400, 64
WARMUP = 0.05  # of the steps; then half a cosine to zero
BAD_SCALES = 2.0  # inputs are multiplied by 10 to a uniform number of at most this size


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
SUFFIX = ", inputs badly scaled"
BADLY_SCALED = [name + SUFFIX for name in TASKS if "MLP" in name]
ALL_TASKS = [*TASKS, *BADLY_SCALED]


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


def load(name: str, tasks: Mapping[str, Any] = TASKS) -> Data:
    """Load a task's data; the split, and the scales of inputs, are the same for all seeds."""
    source, shape, _ = tasks[name.removesuffix(SUFFIX)]
    kind: Any = DigitsDataModule if source == "digits" else MNIST1DDataModule
    module = kind(shape=shape)
    module.setup()
    (x, y), (test_x, test_y) = module.train_set.tensors, module.test_set.tensors
    if name.endswith(SUFFIX):
        generator = torch.Generator().manual_seed(0)
        scales = 10 ** ((2 * torch.rand(x.shape[1:], generator=generator) - 1) * BAD_SCALES)
        x, test_x = x * scales, test_x * scales
    return Data(x, y, test_x, test_y)


def network(name: str) -> nn.Module:
    return TASKS[name.removesuffix(SUFFIX)][2]()


class Method:
    """How one optimizer takes a training step, with every option but the learning rate as it comes."""

    curvature_every = 0  # steps; 0 is never
    method = "hesscale"
    scheduled = True

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        self.optimizer = self.build([*model.parameters()], lr, steps)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps, self.done = steps, 0

    def build(self, params: list[Tensor], lr: float, steps: int) -> torch.optim.Optimizer:
        raise NotImplementedError

    def evaluating(self, yes: bool) -> None:
        """Called before and after an evaluation."""

    def step(self, loss: Tensor) -> None:
        if self.scheduled:
            factor = schedule(self.done / self.steps)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
        self.optimizer.zero_grad()
        if self.curvature_every and self.done % self.curvature_every == 0:
            attach(loss, method=self.method)  # type: ignore[arg-type]
        loss.backward()
        self.optimizer.step()
        self.done += 1


def schedule(progress: float) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if progress < WARMUP:
        return (progress + 1 / STEPS) / (WARMUP + 1 / STEPS)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


class Adam(Method):
    def build(self, params: list[Tensor], lr: float, steps: int) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=lr, fused=True)


class NAdam(Method):
    def build(self, params: list[Tensor], lr: float, steps: int) -> torch.optim.Optimizer:
        return torch.optim.NAdam(params, lr=lr, betas=(0.9, 0.95))


class SGD(Method):
    def build(self, params: list[Tensor], lr: float, steps: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=10 * lr, momentum=0.9, nesterov=True)  # its rates are larger by about that


class ScheduleFree(Method):
    scheduled = False

    def build(self, params: list[Tensor], lr: float, steps: int) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        optimizer: torch.optim.Optimizer = AdamWScheduleFree(params, lr=lr, warmup_steps=round(WARMUP * steps))
        optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    def evaluating(self, yes: bool) -> None:
        self.optimizer.eval() if yes else self.optimizer.train()  # type: ignore[attr-defined]


class Curved(Method):
    """AdaHesScale as it comes."""

    curvature_every = 1

    def build(self, params: list[Tensor], lr: float, steps: int) -> torch.optim.Optimizer:
        return AdaHesScale(params, lr=lr)


class CurvedEvery10(Curved):
    curvature_every = 10


class CurvedGN(Curved):
    method = "hesscale_gn"


class AdamScaled(Curved):
    """Adam in the trust region of AdaHesScale: the control that tells what the trust region does by itself."""

    def build(self, params: list[Tensor], lr: float, steps: int) -> torch.optim.Optimizer:
        return StepSizeScaling(torch.optim.Adam(params, lr=lr))


class ShapedNAdam(torch.optim.Optimizer):
    """NAdam's step, entry by entry over ``sqrt(h / mean(h) + 0.01)`` of mean one, per tensor.

    The best of 27 rules that were tried with curvature in them: it shapes a good step instead of replacing its size.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.95), decay: float = 0.7) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(
                        t=0, n=0, m=torch.zeros_like(p), v=torch.zeros_like(p), h=torch.zeros_like(p), shape=1.0
                    )
                state["t"] += 1
                if getattr(p, "hess_diag", None) is not None:
                    state["h"].lerp_(p.hess_diag.abs(), 1 - group["decay"])
                    shape = (state["h"] / (state["h"].mean() + 1e-30) + 0.01).rsqrt()
                    state["shape"] = shape / shape.mean()
                    p.hess_diag = None
                t, m, v, g = state["t"], state["m"], state["v"], p.grad
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                ahead = m * (beta1 / (1 - beta1 ** (t + 1))) + g * ((1 - beta1) / (1 - beta1**t))
                p.sub_(group["lr"] * state["shape"] * ahead / ((v / (1 - beta2**t)).sqrt() + 1e-8))


class Shaped(Curved):
    def build(self, params: list[Tensor], lr: float, steps: int) -> torch.optim.Optimizer:
        return ShapedNAdam(params, lr)


METHODS: dict[str, type[Method]] = {
    REFERENCE: Adam,
    "NAdam(0.9, 0.95)": NAdam,
    "SGD, Nesterov momentum": SGD,
    "Schedule-Free AdamW": ScheduleFree,
    "AdaHesScale": Curved,
    "AdaHesScaleGN": CurvedGN,
    "AdaHesScale, h every 10 steps": CurvedEvery10,
    "Adam in StepSizeScaling": AdamScaled,
    "NAdam shaped by curvature": Shaped,
}


def training_loss(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return cross_entropy(model(data.x), data.y).item()


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return (model(data.test_x).argmax(1) == data.test_y).float().mean().item()


def measure_costs(name: str, data: Data, names: list[str], rounds: int) -> dict[str, float]:
    """Milliseconds of the thread's own time that a training step takes, the optimizers taking turns."""
    steps = 20
    batches = data.batches(steps, BATCH, seed=0)
    entrants = {}
    for optimizer in names:
        torch.manual_seed(0)
        model = network(name)
        entrants[optimizer] = (model, METHODS[optimizer](model, 1e-4, 10**6))
    times: dict[str, list[float]] = {optimizer: [] for optimizer in entrants}
    for _ in range(rounds + 1):
        for optimizer, (model, method) in entrants.items():
            start = time.thread_time()
            for index in batches:
                method.step(cross_entropy(model(data.x[index]), data.y[index]))
            times[optimizer].append(1000 * (time.thread_time() - start) / steps)
    return {optimizer: statistics.median(found[1:]) for optimizer, found in times.items()}  # the first warms up


def train(task: str, optimizer: str, lr: float, seed: int, steps: int, data: Data) -> list[float | None]:
    """Train once: training loss before and after (None if it is, or a batch's once was, not finite), test accuracy."""
    torch.manual_seed(seed)
    model = network(task)
    method = METHODS[optimizer](model, lr, steps)
    initial, finite = training_loss(model, data), True
    for index in data.batches(steps, BATCH, seed):
        loss = cross_entropy(model(data.x[index]), data.y[index])
        if not math.isfinite(loss.item()):
            finite = False
            break
        method.step(loss)
    method.evaluating(True)
    final = training_loss(model, data)
    return [initial, final if finite and math.isfinite(final) else None, accuracy(model, data)]


class Study:
    """All runs, from a journal that holds the finished ones.

    Args:
        journal: Finished runs.
        names: Optimizers.
        quick: A coarser grid with fewer seeds and steps.
    """

    def __init__(self, journal: Journal, names: list[str], quick: bool) -> None:
        self.journal, self.names = journal, names
        self.rates = RATES[2::3] if quick else RATES
        self.tuning = TUNING_SEEDS[:1] if quick else TUNING_SEEDS
        self.seeds = SEEDS[:2] if quick else SEEDS
        self.steps = 100 if quick else STEPS
        self.tasks = ALL_TASKS[:1] + BADLY_SCALED[:1] if quick else ALL_TASKS

    def run(self) -> None:
        """Carries out what is missing."""
        for task in self.tasks:
            data = load(task)
            if ("costs", task) not in self.journal.runs:
                self.journal.note(["costs", task], measure_costs(task, data, self.names, 15))
            for run in tqdm([*self._tuning(task)], desc=task, unit="run"):
                self._train(run, data)
            for run in tqdm([*self._final(task)], desc=f"{task}, best rates", unit="run"):
                self._train(run, data)

    def _train(self, run: list[Any], data: Data) -> None:
        if tuple(run) not in self.journal.runs:
            _, task, optimizer, lr, seed, steps = run
            self.journal.note(run, train(task, optimizer, lr, seed, steps, data))

    def _tuning(self, task: str) -> Iterator[list[Any]]:
        for seed in self.tuning:
            for optimizer in self.names:
                for lr in self.rates:
                    yield ["tuning", task, optimizer, lr, seed, self.steps]

    def _final(self, task: str) -> Iterator[list[Any]]:
        for optimizer in self.names:
            for budget in ("steps", "time"):
                for seed in self.seeds:
                    lr = self.best_rate(task, optimizer)
                    yield [budget, task, optimizer, lr, seed, self.length(task, optimizer, budget)]

    def length(self, task: str, optimizer: str, budget: str) -> int:
        """How many steps a run has."""
        costs = self.journal.runs["costs", task]
        return self.steps if budget == "steps" else max(1, round(self.steps * costs[REFERENCE] / costs[optimizer]))

    def tuned(self, task: str, optimizer: str, lr: float) -> float:
        """Geometric mean over seeds of the training loss that a rate reached; infinite if a run was not finite."""
        found = [self.journal.runs["tuning", task, optimizer, lr, seed, self.steps][1] for seed in self.tuning]
        return math.inf if None in found else geometric(found)

    def best_rate(self, task: str, optimizer: str) -> float:
        """The rate with the lowest loss."""
        return min(self.rates, key=lambda lr: self.tuned(task, optimizer, lr))

    def losses(self, budget: str, task: str, optimizer: str) -> list[float]:
        """Training losses at the best rate, by seed."""
        return [math.inf if found[1] is None else found[1] for found in self._found(budget, task, optimizer)]

    def accuracies(self, budget: str, task: str, optimizer: str) -> list[float]:
        """Test accuracies at the best rate, by seed."""
        return [found[2] for found in self._found(budget, task, optimizer)]

    def _found(self, budget: str, task: str, optimizer: str) -> list[Any]:
        lr, steps = self.best_rate(task, optimizer), self.length(task, optimizer, budget)
        return [self.journal.runs[budget, task, optimizer, lr, seed, steps] for seed in self.seeds]


def geometric(values: list[float]) -> float:
    return math.exp(statistics.mean(math.log(max(x, 1e-12)) for x in values))


def verdict(ours: list[float], theirs: list[float]) -> int:
    """-1 where the loss is lower with every seed, 1 where it is higher, else 0."""
    pairs = list(zip(ours, theirs, strict=True))
    return -1 if all(a < b for a, b in pairs) else 1 if all(a > b for a, b in pairs) else 0


def rows(study: Study, tasks: list[str]) -> list[list[str]]:
    """A row per optimizer over some tasks."""
    made = []
    for name in study.names:
        cost = geometric(
            [study.journal.runs["costs", t][name] / study.journal.runs["costs", t][REFERENCE] for t in tasks]
        )
        row = [name, f"{cost:.2f}"]
        for budget in ("steps", "time"):
            ratios, counts = [], [0, 0, 0]
            for task in tasks:
                ours, theirs = study.losses(budget, task, name), study.losses("steps", task, REFERENCE)
                ratios.append(geometric(ours) / geometric(theirs))
                counts[verdict(ours, theirs) + 1] += 1
            row += [f"{geometric(ratios):.2f}", "" if name == REFERENCE else " / ".join(map(str, counts))]
        points = statistics.mean(statistics.mean(study.accuracies("steps", t, name)) for t in tasks)
        runs = [
            study.journal.runs["tuning", t, name, lr, s, study.steps]
            for t in tasks
            for lr in study.rates
            for s in study.tuning
        ]
        flat = statistics.mean(
            sum(study.tuned(t, name, lr) <= 2 * study.tuned(t, name, study.best_rate(t, name)) for lr in study.rates)
            for t in tasks
        )
        diverged = sum(end is None or end > start for start, end, _ in runs)
        made.append([*row, f"{100 * points:.1f}", f"{flat:.1f}", f"{diverged} of {len(runs)}"])
    return made


def sections(study: Study) -> str:
    """What stands between the page's marks."""
    head = [
        "optimizer", "time of a step, Adam = 1", "equal steps: loss, Adam = 1", "lower / even / higher",
        "equal time: loss, Adam = 1", "lower / even / higher", "test accuracy, %",
        f"rates of {len(study.rates)} within twice its best loss", "runs that diverged",
    ]  # fmt: skip
    ordinary = [task for task in study.tasks if not task.endswith(SUFFIX)]
    scaled = [task for task in study.tasks if task.endswith(SUFFIX)]
    lines = [
        f"## Ordinary tasks\n\n{len(ordinary)} tasks with standardised inputs.\n",
        table(head, rows(study, ordinary)),
    ]
    lines += [
        f"\n## Badly scaled inputs\n\n{len(scaled)} of these tasks with every input multiplied by a number between "
        f"{10**-BAD_SCALES:g} and {10**BAD_SCALES:g}. What standardised inputs give is in the last row.\n",
        table(head, [*rows(study, scaled), standardised(study, scaled)]),
    ]
    trained = sum(key[0] in ("tuning", "steps", "time") for key in study.journal.runs)
    lines.append(
        f"\n{trained} runs, of {study.steps} steps of {BATCH} samples at equal steps; rates {study.rates[0]:g} to "
        f"{study.rates[-1]:g} (ten times that for SGD); {len(study.tuning)} seeds for tuning, {len(study.seeds)} "
        "others reported."
    )
    return "\n".join(lines) + "\n"


def standardised(study: Study, scaled: list[str]) -> list[str]:
    """Adam on the same tasks with standardised inputs, over Adam with badly scaled ones."""
    ratios, points = [], []
    for task in scaled:
        base = task.removesuffix(SUFFIX)
        base = base if base in study.tasks else task
        ratios.append(
            geometric(study.losses("steps", base, REFERENCE)) / geometric(study.losses("steps", task, REFERENCE))
        )
        points.append(statistics.mean(study.accuracies("steps", base, REFERENCE)))
    return [
        "Adam, inputs standardised",
        "1.00",
        f"{geometric(ratios):.2f}",
        "",
        "",
        "",
        f"{100 * statistics.mean(points):.1f}",
        "",
        "",
    ]


def draw(study: Study, path: Path) -> None:
    """Training loss over the learning rate for every task."""
    columns = min(4, len(study.tasks))
    height = math.ceil(len(study.tasks) / columns)
    figure, axes = plt.subplots(height, columns, figsize=(3.4 * columns, 2.8 * height), squeeze=False)
    for axis in axes.flat[len(study.tasks) :]:
        axis.axis("off")
    for axis, task in zip(axes.flat, study.tasks, strict=False):
        for k, name in enumerate(study.names):
            losses = [min(study.tuned(task, name, lr), 1e3) for lr in study.rates]
            wide = 2.2 if name == "AdaHesScale" else 1.1
            axis.plot(study.rates, losses, label=name, linewidth=wide, color=f"C{k}")
        axis.set(xscale="log", yscale="log")
        axis.set_title(task.replace(SUFFIX, ",\ninputs badly scaled"), fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.22 / height))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs the study and writes the page."""
    parser = arguments(__doc__, "outputs/optimization")
    parser.add_argument("--without", nargs="*", default=[], choices=[n for n in METHODS if n != REFERENCE])
    args = settle(parser.parse_args(), "examples/paper/results/optimization.jsonl", "docs/optimization.png")
    names = [name for name in METHODS if name not in args.without]
    identity = {"steps": STEPS, "batch": BATCH, "quick": args.quick, "optimizers": names}
    journal = Journal(args.results, identity)
    study = Study(journal, names, args.quick)
    if not args.report:
        study.run()
    if args.write:
        write_block(args.write, "optimization", sections(study))
    draw(study, args.picture)


if __name__ == "__main__":
    main()

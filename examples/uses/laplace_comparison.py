"""Diagonal Laplace posteriors by HesScaleGN beside laplace-torch's own backends: calibration, time and memory.

    python examples/uses/laplace_comparison.py --write docs/uses.md  # everything; called again, it resumes
    python examples/uses/laplace_comparison.py --quick               # fewer seeds, into outputs/
    python examples/uses/laplace_comparison.py --report              # only tables and picture, from the results

A classifier of the digits and a regression on the diabetes data are trained. Each backend fits a diagonal posterior of
the last layer and of all layers, and the linearised network predicts the test samples. The prior's precision,
and the noise of the regression, maximise the marginal likelihood, or are those of a grid with the lowest loss on the
validation samples. Then the cost of one batch is measured over the number of classes. Needs laplace-torch:
`pip install 'hesscale_lightning[laplace]'`.
"""

import copy
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import laplace
import torch
from common import QUANTILES, interval, machine, train, verdict
from journal import Journal, arguments, environment, rounded, save, settle, table, write_block
from laplace.curvature import AsdlEF, AsdlGGN, BackPackGGN, CurvlinopsGGN
from optimization import Data
from pictures import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, plain, prepare
from pictures import save as save_picture
from torch import Tensor, nn
from torch.nn.functional import mse_loss, nll_loss
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error
from tqdm import tqdm

from benchmarks.timing import peak_bytes
from hesscale_lightning import DiabetesDataModule, DigitsDataModule, HesScaleGGN
from hesscale_lightning.command_line.networks import MLP

RESULTS = "examples/uses/results/laplace_comparison.json"
SEEDS, BATCH = 5, 64
STEPS = {"digits": 1000, "diabetes": 300}
CLASSES = (3, 10, 30, 100)
ROUNDS = 5
PRIORS = [10 ** (k / 4) for k in range(-8, 25)]  # 0.01 to 1e6
EXACT = "CurvlinopsGGN"
BACKENDS: dict[str, Any] = {
    "HesScaleGN": HesScaleGGN,
    "BackPackGGN": BackPackGGN,
    "AsdlGGN": AsdlGGN,
    "CurvlinopsGGN": CurvlinopsGGN,
    "AsdlEF": AsdlEF,
}
COLOURS = {
    "HesScaleGN": BLUE,
    "BackPackGGN": ORANGE,
    "AsdlGGN": GREEN,
    "CurvlinopsGGN": PURPLE,
    "AsdlEF": INK,
}
TASKS = {"digits": "classification", "diabetes": "regression"}
SUBSETS = {"last_layer": "last layer", "all": "all layers"}
MAP = "no posterior"


@dataclass(frozen=True)
class Split(Data):
    """Validation samples too."""

    val_x: Tensor
    val_y: Tensor


def load(task: str) -> Split:
    module: Any = DigitsDataModule() if task == "digits" else DiabetesDataModule()
    module.setup()
    (x, y), (test_x, test_y), (val_x, val_y) = (
        part.tensors for part in (module.train_set, module.test_set, module.val_set)
    )
    if task == "digits":
        return Split(x, y, test_x, test_y, val_x, val_y)
    return Split(x, y[:, None], test_x, test_y[:, None], val_x, val_y[:, None])


def network(task: str) -> nn.Module:
    return MLP([64, 64, 64, 10]) if task == "digits" else MLP([10, 50, 50, 1])


def loader(data: Data) -> DataLoader:
    return DataLoader(TensorDataset(data.x, data.y), batch_size=BATCH)


def posterior(model: nn.Module, likelihood: str, subset: str, backend: str) -> Any:
    return laplace.Laplace(
        copy.deepcopy(model), likelihood, subset_of_weights=subset, hessian_structure="diag", backend=BACKENDS[backend]
    )


def tune(fitted: Any, steps: int = 100) -> None:
    """Maximise the marginal likelihood by the prior's precision, and the noise of a regression."""
    prior = torch.zeros(1, requires_grad=True)
    noise = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([prior, noise], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        sigma = {"sigma_noise": noise.exp()} if fitted.likelihood == "regression" else {}
        (-fitted.log_marginal_likelihood(prior.exp(), **sigma)).backward()
        optimizer.step()


def scores(task: str, mean: Tensor, variance: Tensor, y: Tensor) -> dict[str, float]:
    """Negative log-likelihood; of a classification the calibration error, of a regression what an interval holds.

    Args:
        task: which.
        mean: the network's outputs, of shape (samples, outputs).
        variance: theirs, of the same shape; of a regression with that of the noise.
        y: the targets.
    """
    if TASKS[task] == "classification":
        prediction = (mean / (1 + math.pi / 8 * variance).sqrt()).softmax(1)  # the probit approximation
        return {
            "nll": nll_loss(prediction.clamp(min=1e-12).log(), y).item(),
            "calibration": multiclass_calibration_error(prediction, y, 10, n_bins=15).item(),
        }
    error = (mean - y).square()
    return {
        "nll": (0.5 * (error / variance + (2 * math.pi * variance).log())).mean().item(),
        "calibration": (error.sqrt() <= 1.96 * variance.sqrt()).float().mean().item(),
    }


@torch.no_grad()
def without(task: str, model: nn.Module, data: Split) -> dict[str, Any]:
    """The trained network alone; a regression's noise is that of the training samples."""
    mean = model(data.test_x)
    variance = torch.zeros_like(mean)
    if TASKS[task] == "regression":
        variance += (model(data.x) - data.y).var()
    found = scores(task, mean, variance, data.test_y)
    return {"marginal likelihood": found, "validation": found}


def jacobians(fitted: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs and the squares of their derivatives; those of laplace-torch, which all backends share."""
    backend = fitted.backend
    js, mean = backend.last_layer_jacobians(x) if backend.last_layer else backend.jacobians(x)
    return mean.detach(), js.detach().square()


def predicted(
    task: str,
    data: Split,
    derivatives: dict[str, tuple[Tensor, Tensor]],
    h: Tensor,
    noise: float,
    part: str,
    prior: float,
) -> dict[str, float]:
    """The scores of the linearised network under a diagonal posterior of precision ``h + prior``, or ``h / noise``."""
    mean, squares = derivatives[part]
    return scores(task, mean, squares @ (1 / (h / (noise or 1.0) + prior)) + noise, getattr(data, f"{part}_y"))


def run_one(key: tuple[str, str, int], data: Split, model: nn.Module) -> dict[str, Any]:
    """All backends on one trained network: their diagonals against the exact one, and their predictions."""
    task, subset, _ = key
    found: dict[str, Any] = {MAP: without(task, model, data)}
    diagonals: dict[str, Tensor] = {}
    derivatives: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        without_deviation = (model(data.x) - data.y).std().item() if TASKS[task] == "regression" else 0.0
    for backend in BACKENDS:
        fitted = posterior(model, TASKS[task], subset, backend)
        fitted.fit(loader(data))
        if not derivatives:  # of the first, HesScaleGGN, which leaves them to torch.func
            derivatives = {part: jacobians(fitted, getattr(data, f"{part}_x")) for part in ("val", "test")}
        diagonals[backend] = fitted.H.clone()
        tune(fitted)
        noise = float(fitted.sigma_noise) ** 2 if TASKS[task] == "regression" else 0.0
        judged = partial(predicted, task, data, derivatives, fitted.H)
        deviation = without_deviation if TASKS[task] == "regression" else 0.0
        noises = [(deviation * 10 ** (k / 20)) ** 2 for k in range(-8, 13)] if deviation else [0.0]
        losses = {(prior, other): judged(other, "val", prior)["nll"] for prior, other in product(PRIORS, noises)}
        best, best_noise = min(losses, key=lambda pair: losses[pair])
        found[backend] = {
            "marginal likelihood": judged(noise, "test", float(fitted.prior_precision)),
            "validation": judged(best_noise, "test", best),
            "priors": [float(fitted.prior_precision), best],
        }
    exact = diagonals[EXACT]
    for backend, h in diagonals.items():
        found[backend]["error"] = ((h - exact).abs().sum() / exact.abs().sum()).item()
        found[backend]["sum"] = (h.sum() / exact.sum()).item()
    return found


def one_batch(classes: int, backend: str | None) -> Callable[[], object]:
    """Fitting one batch of a network with that many outputs; None only computes the gradient."""
    torch.manual_seed(0)
    model = MLP([64, 64, 64, classes])
    x, y = torch.randn(16, 64), torch.randint(classes, (16,))
    if backend is None:

        def gradient() -> None:
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y, reduction="sum").backward()

        return gradient
    curvature = posterior(model, "classification", "all", backend)
    setattr(curvature.model, "output_size", classes)  # noqa: B010  # as fit() does
    return partial(curvature.backend.diag, x, y, N=16)


def cost(classes: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time and peak memory of one batch over those of the gradient; the backends take turns."""
    steps = {backend or "gradient": one_batch(classes, backend) for backend in (None, *BACKENDS)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(rounds + 1):
        for name, step in steps.items():
            gc.collect()
            start, count = time.thread_time(), 0
            while time.thread_time() - start < 0.02:
                step()
                count += 1
            if repeat:  # the first warms up
                times[name].append((time.thread_time() - start) / count)
    medians = {name: statistics.median(found) for name, found in times.items()}
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    return {
        name: {"time": medians[name] / medians["gradient"], "memory": memory[name] / memory["gradient"]}
        for name in BACKENDS
    } | {"gradient": {"time": 1000 * medians["gradient"], "memory": memory["gradient"] / 2**20}}


def run(seeds: int, classes: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """Run what is not done yet, and return the results."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    journal = Journal(
        folder / "runs.jsonl", {"steps": STEPS, "batch": BATCH, "backends": [*BACKENDS], "priors": PRIORS}
    )
    keys: list[tuple[str, str, int]] = list(product(TASKS, SUBSETS, range(seeds)))
    for key in tqdm(keys, desc="posteriors", unit="network"):
        if key in journal.runs:
            continue
        task, _, seed = key
        start = time.thread_time()
        torch.manual_seed(seed)
        data, model = load(task), network(task)
        loss = nn.functional.cross_entropy if task == "digits" else mse_loss
        train(model, data, STEPS[task], 3e-3, seed, loss)
        journal.note([*key], {"found": run_one(key, data, model), "seconds": time.thread_time() - start})
    for number in tqdm(classes, desc="cost", unit="network"):
        if number not in journal.runs:
            start = time.thread_time()
            journal.note(number, {"found": cost(number, ROUNDS), "seconds": time.thread_time() - start})
    runs: dict[str, dict[str, Any]] = {}
    for task, subset, seed in keys:
        runs.setdefault(f"{task}, {subset}", {})[str(seed)] = rounded(journal.runs[task, subset, seed]["found"])
    runs["cost"] = {str(number): rounded(journal.runs[number]["found"]) for number in classes}
    return {
        "seeds": seeds,
        "environment": environment(),
        "laplace-torch": metadata.version("laplace-torch"),
        "minutes": rounded(sum(journal.runs[key]["seconds"] for key in [*keys, *classes]) / 60),
        "runs": runs,
    }


def values(results: dict[str, Any], task: str, subset: str, name: str, *what: str) -> list[float]:
    """Of each seed."""
    found = [seed[name] for seed in results["runs"][f"{task}, {subset}"].values()]
    for key in what:
        found = [one[key] for one in found]
    return found


def tables(results: dict[str, Any]) -> str:
    head = (
        f"{results['seeds']} seeds; {results['minutes']:.1f} minutes of processor time "
        f"({machine(results['environment'])}). `error` is the relative L1 distance of the diagonal from the exact "
        "Gauss-Newton diagonal, `sum` its sum over that one's; negative log-likelihood (NLL) and expected calibration "
        "error (ECE, 15 bins) on the test samples, with the prior's precision by the marginal likelihood (ML) or "
        "by the validation samples, mean of the seeds with half of the 95 % interval."
    )
    parts = [head, findings(results)]
    for task, calibration in (("digits", "ECE"), ("diabetes", "inside the 95 % interval")):
        rows = []
        for subset, name in [("last_layer", MAP), *product(SUBSETS, BACKENDS)]:
            row = ["", name, "", ""]
            if name != MAP:
                sizes = [statistics.fmean(values(results, task, subset, name, what)) for what in ("error", "sum")]
                row = [SUBSETS[subset], name, *(f"{size:.2g}" for size in sizes)]
            for what, prior in product(("nll", "calibration"), ("marginal likelihood", "validation")):
                row.append(figure(values(results, task, subset, name, prior, what)))
            rows.append(row)
        columns = [f"{what}, {prior}" for what in ("NLL", calibration) for prior in ("ML", "validation")]
        title = f"{task.capitalize()}, a {TASKS[task]}:"
        parts.append(title + "\n\n" + table(["posterior of", "backend", "error", "sum", *columns], rows))
    costs = results["runs"]["cost"]
    rows = [
        [name, *(f"{costs[number][name][what]:.1f}" for what, number in product(("time", "memory"), costs))]
        for name in BACKENDS
    ]
    columns = [f"{what}, {number} classes" for what, number in product(("time", "memory"), costs)]
    parts.append(
        "Time and peak memory of one batch of 16 over those of the gradient alone (processor time, the backends taking "
        "turns, median of the rounds; torch's allocator), tanh MLP 64-64-64:\n\n" + table(["backend", *columns], rows)
    )
    return "\n\n".join(parts)


def figure(found: list[float]) -> str:
    mean, half = interval(found)
    return f"{mean:.4f}" + (f" ± {half:.4f}" if math.isfinite(half) else "")


def findings(results: dict[str, Any]) -> str:
    lines = []
    for task in TASKS:
        title = task.capitalize()
        last = max(values(results, task, "last_layer", "HesScaleGN", "error"))
        lines.append(f"{title}: in the last layer HesScaleGN is the exact diagonal up to rounding (error {last:.1g}).")
        for other, prior in product((EXACT, "AsdlEF"), ("marginal likelihood", "validation")):
            ours, theirs = (values(results, task, "all", name, prior, "nll") for name in ("HesScaleGN", other))
            differences = [a - b for a, b in zip(ours, theirs, strict=True)]
            lines.append(
                f"{title}, all layers, prior by {prior}: the NLL by HesScaleGN minus that by {other} is "
                f"{figure(differences)} ({verdict(differences)})."
            )
        for subset in SUBSETS:
            ours, theirs = (values(results, task, subset, name, "validation", "nll") for name in ("HesScaleGN", MAP))
            differences = [a - b for a, b in zip(ours, theirs, strict=True)]
            lines.append(
                f"{title}, {SUBSETS[subset]}, prior by validation: the NLL by HesScaleGN minus that without a "
                f"posterior is {figure(differences)} ({verdict(differences)})."
            )
    costs = results["runs"]["cost"]
    few, many = min(costs, key=int), max(costs, key=int)
    for what in ("time", "memory"):
        parts = [f"{name} {costs[few][name][what]:.1f} and {costs[many][name][what]:.1f}" for name in BACKENDS]
        lines.append(f"{what.capitalize()} over the gradient's, {few} and {many} classes: {'; '.join(parts)}.")
    return "\n".join(f"- {line}" for line in lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """NLL of both tasks by backend; time and memory over the number of classes."""
    import matplotlib.pyplot as plt

    prepare()
    picture, axes = plt.subplots(2, 2, figsize=(12.5, 9), layout="constrained")
    for axis, task in zip(axes[0], TASKS, strict=True):
        for offset, (subset, title) in zip((-0.12, 0.12), SUBSETS.items(), strict=True):
            points = [interval(values(results, task, subset, name, "validation", "nll")) for name in BACKENDS]
            axis.errorbar(
                [place + offset for place in range(len(BACKENDS))],
                [mean for mean, _ in points],
                [half if math.isfinite(half) else 0 for _, half in points],
                fmt="o" if subset == "all" else "s",
                color=BLUE if subset == "all" else ORANGE,
                label=title,
                capsize=3,
            )
        alone = interval(values(results, task, "all", MAP, "validation", "nll"))[0]
        axis.axhline(alone, color=MUTED, linewidth=1, linestyle=":", label=MAP)
        axis.set_xticks(range(len(BACKENDS)), list(BACKENDS), rotation=20, ha="right", fontsize=10)
        axis.set_ylabel("negative log-likelihood, test")
        axis.set_title(f"{task}, {TASKS[task]}; prior by validation", loc="left", fontweight="bold", fontsize=11)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.16 * (high - low))  # room for the legend
        axis.legend(frameon=False, fontsize=9.5, loc="upper center", ncols=3)
    numbers = [int(n) for n in results["runs"]["cost"]]
    for axis, what in zip(axes[1], ("time", "memory"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="number of classes", ylabel=f"{what} over that of the gradient")
        for name in BACKENDS:
            found = [results["runs"]["cost"][str(n)][name][what] for n in numbers]
            axis.plot(numbers, found, marker="^" if name == "AsdlEF" else "o", color=COLOURS[name], label=name)
        plain(axis.xaxis, numbers)
        plain(axis.yaxis, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
        title = {"time": "Time of one batch", "memory": "Peak memory of one batch"}[what]
        axis.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes[1][0].legend(frameon=False, fontsize=9.5)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    save_picture(picture, path)


def main(given: list[str] | None = None) -> None:
    """Run, save, draw and print."""
    parser = arguments(__doc__, "outputs/laplace_comparison")
    parser.add_argument("--seeds", type=int, choices=sorted(QUANTILES), help="how many seeds (5, with --quick 2)")
    options = settle(parser.parse_args(given), RESULTS, "docs/laplace.png")
    if not options.report:
        classes = CLASSES[:2] if options.quick else CLASSES
        save(run(options.seeds or (2 if options.quick else SEEDS), classes, options.folder), options.results)
    results = json.loads(options.results.read_text())
    draw(results, options.picture)
    text = tables(results)
    if options.write:
        write_block(options.write, "laplace", text)
    else:
        print(text)
    print(options.results)


if __name__ == "__main__":
    main()

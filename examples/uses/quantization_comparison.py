"""Does ``sum h (w - Q(w))^2 / 2`` rank layers by what quantizing them costs?

    python examples/uses/quantization_comparison.py --write docs/uses.md  # everything; called again, it resumes
    python examples/uses/quantization_comparison.py --quick               # fewer seeds, into outputs/
    python examples/uses/quantization_comparison.py --report              # only tables and picture, from the results

A network is trained. Then the weights of one layer at a time are rounded to some bits, and the training loss is
measured, in evaluation mode and over all samples. Spearman's rank correlation over the layers says how well an estimate
orders them. `Hutchinson` is the mean of z * Hz over random signs z, an unbiased estimate of the true diagonal, for
reference: each probe costs more than a pass of HesScale.
"""

import json
import time
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from common import evaluate, interval, machine, train, verdict
from journal import Journal, arguments, environment, rounded, save, settle, table, write_block
from optimization import Data, load
from pictures import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, prepare
from pictures import save as save_picture
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hesscale_lightning import hess_diag_over, quantization_cost, quantized
from hesscale_lightning.command_line.networks import MLP, VisionTransformer

RESULTS = "examples/uses/results/quantization_comparison.json"
SEEDS, STEPS, LR = 5, 1500, 3e-3
BITS = (8, 6, 4, 3, 2)


class DeepConvNet(nn.Sequential):
    """Six convolutions on sequences, each followed by batch norm."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        widths = [1, 8, 8, 16, 16, 24, 24]
        for k, (inputs, outputs) in enumerate(pairwise(widths)):
            layers += [
                nn.Conv1d(inputs, outputs, 3, stride=1 + k % 2, padding=1, bias=False),
                nn.BatchNorm1d(outputs),
                nn.ReLU(),
            ]
        super().__init__(*layers, nn.Flatten(), nn.Linear(24 * 5, 10))


TASKS: dict[str, Any] = {
    "digits, MLP of 8 layers": ("digits", "flat", partial(MLP, [64, 48, 48, 48, 48, 48, 48, 48, 10], nn.Tanh)),
    "mnist1d, CNN of 7 layers": ("mnist1d", "channel", DeepConvNet),
    "digits, transformer of 10 layers": (
        "digits",
        "image",
        partial(VisionTransformer, 8, 2, 1, width=24, depth=2, heads=2, out_features=10),
    ),
}
CHOSEN = tuple(TASKS)
DIAGONALS = {"HesScale": "hesscale", "HesScaleGN": "hesscale_gn", "rank one": "hesscale_rank1"}
PLAIN, GRADIENT, HUTCHINSON = "squared error", "rank one with gradient", "Hutchinson"
PROBES = 32
ESTIMATES = (*DIAGONALS, GRADIENT, HUTCHINSON, PLAIN)
COLOURS = {
    "HesScale": BLUE,
    "HesScaleGN": SKY,
    "rank one": PURPLE,
    GRADIENT: GREEN,
    HUTCHINSON: INK,
    PLAIN: ORANGE,
}


def layers_of(model: nn.Module) -> list[str]:
    """Names of the tensors of weights: those of two or more dimensions, in layers of their own."""
    return [name for name, p in model.named_parameters() if p.ndim > 1 and name != "positions"]


def gradient(model: nn.Module, data: Data) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(cross_entropy(model(data.x), data.y), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def hutchinson(model: nn.Module, data: Data, seed: int) -> dict[str, Tensor]:
    """The mean over some probes of ``z * Hz``."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention cannot be differentiated twice
        loss = cross_entropy(model(data.x), data.y)
        slope = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    for _ in range(PROBES):
        signs = [torch.randint(2, p.shape, generator=generator) * 2.0 - 1 for p in slope]
        products = torch.autograd.grad(slope, list(parameters.values()), signs, retain_graph=True)
        for name, z, hz in zip(parameters, signs, products, strict=True):
            found[name] += (z * hz).double() / PROBES
    return found


def measure(model: nn.Module, data: Data, seed: int) -> dict[str, Any]:
    """For each number of bits: by layer, the loss that is added, and every estimate of it."""
    names = layers_of(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}
    batches = list(zip(data.x.split(512), data.y.split(512), strict=True))
    diagonals = {
        name: hess_diag_over(model, cross_entropy, batches, method=method, dtype=torch.float64, progress_bar=False)
        for name, method in DIAGONALS.items()
    }
    diagonals[HUTCHINSON] = hutchinson(model, data, seed)
    slope = gradient(model, data)
    before = loss_of(model, data)
    found: dict[str, Any] = {}
    for bits in BITS:
        added = []
        for name in names:
            p = model.get_parameter(name)
            with torch.no_grad():
                p.copy_(quantized(weights[name], bits))
                added.append(loss_of(model, data) - before)
                p.copy_(weights[name])
        moves = {name: quantized(w, bits) - w for name, w in weights.items()}
        estimates = {name: quantization_cost(weights, diagonals[name], bits) for name in diagonals}
        estimates[GRADIENT] = {
            name: (slope[name] * move).sum().item() + estimates["rank one"][name] for name, move in moves.items()
        }
        estimates[PLAIN] = {name: move.square().sum().item() for name, move in moves.items()}
        found[str(bits)] = {"added": added, **{k: list(v.values()) for k, v in estimates.items()}}
    return {"layers": names, "bits": found, "quality": [*evaluate(model, data)]}


@torch.no_grad()
def loss_of(model: nn.Module, data: Data) -> float:
    """In float64, since differences are small."""
    return cross_entropy(model(data.x).double(), data.y).item()


def ranks(values: list[float]) -> Tensor:
    order = torch.tensor(values, dtype=torch.float64).argsort()
    found = torch.empty(len(values), dtype=torch.float64)
    found[order] = torch.arange(len(values), dtype=torch.float64)
    return found


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of ranks; values are real numbers, which are never alike."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def run(tasks: tuple[str, ...], seeds: int, folder: Path) -> dict[str, Any]:
    """Run what is not done yet, and return the results."""
    torch.set_num_threads(1)
    journal = Journal(folder / "runs.jsonl", {"steps": STEPS, "rate": LR, "bits": [*BITS], "probes": PROBES})
    keys = list(product(tasks, range(seeds)))
    for task, seed in tqdm(keys, desc="quantization", unit="network"):
        if (task, seed) in journal.runs:
            continue
        start = time.thread_time()
        torch.manual_seed(seed)
        data, model = load(task, TASKS), TASKS[task][2]()
        train(model, data, STEPS, LR, seed)
        found = measure(model, data, seed)
        journal.note([task, seed], {**found, "seconds": time.thread_time() - start})
    runs: dict[str, dict[str, Any]] = {}
    for task, seed in keys:
        kept = journal.runs[task, seed]
        runs.setdefault(task, {})[str(seed)] = rounded({k: v for k, v in kept.items() if k != "seconds"})
    return {
        "seeds": seeds,
        "bits": list(BITS),
        "environment": environment(),
        "minutes": rounded(sum(journal.runs[key]["seconds"] for key in keys) / 60),
        "runs": runs,
    }


def correlations(results: dict[str, Any], task: str, bits: int, estimate: str) -> list[float]:
    """Of each seed."""
    found = [seed["bits"][str(bits)] for seed in results["runs"][task].values()]
    return [spearman(seed["added"], seed[estimate]) for seed in found]


def tables(results: dict[str, Any]) -> str:
    head = (
        f"{len(results['runs'])} networks, {results['seeds']} seeds; {results['minutes']:.1f} minutes of processor "
        f"time ({machine(results['environment'])}). Spearman's rank correlation over layers between an estimate and "
        "the measured change of the loss, mean of the seeds; `squared error` is `sum (w - Q(w))^2`, without curvature."
    )
    rows = []
    for task, bits in product(results["runs"], results["bits"]):
        means = [f"{interval(correlations(results, task, bits, name))[0]:.2f}" for name in ESTIMATES]
        size = [
            sum(map(abs, seed["bits"][str(bits)]["added"])) / len(seed["layers"]) for seed in seeds_of(results, task)
        ]
        rows.append([task, f"{bits}", f"{sum(size) / len(size):.2g}", *means])
    columns = ["network", "bits", "mean change of the loss, absolute", *ESTIMATES]
    return "\n\n".join([head, findings(results), table(columns, rows)])


def seeds_of(results: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return list(results["runs"][task].values())


def findings(results: dict[str, Any]) -> str:
    lines = []
    points = list(product(results["runs"], results["bits"]))
    for name, other in product(("HesScale", "rank one"), (PLAIN, HUTCHINSON)):
        found: dict[str, list[str]] = {"higher": [], "lower": [], "undecided": []}
        for task, bits in points:
            pairs = zip(*(correlations(results, task, bits, one) for one in (name, other)), strict=True)
            found[verdict([a - b for a, b in pairs])].append(f"{task} at {bits} bits")
        lower = f" ({'; '.join(found['lower'])})" if 0 < len(found["lower"]) < 6 else ""
        lines.append(
            f"The correlation of {name} is higher than that of {other} at {len(found['higher'])} of {len(points)} "
            f"points, lower at {len(found['lower'])}{lower} (95 % interval of the paired difference)."
        )
    for name, bits in product(("HesScale", "rank one"), results["bits"]):
        values = [interval(correlations(results, task, bits, name))[0] for task in results["runs"]]
        lines.append(f"At {bits} bits the correlation of {name} is {min(values):.2f} to {max(values):.2f}.")
    return "\n".join(f"- {line}" for line in lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Above: measured over estimated change, by layer. Below: the rank correlations over bits."""
    import matplotlib.pyplot as plt

    prepare()
    tasks = list(results["runs"])
    figure, axes = plt.subplots(2, len(tasks), figsize=(4.6 * len(tasks), 8), squeeze=False, layout="constrained")
    shades = {8: SKY, 6: BLUE, 4: PURPLE, 3: ORANGE, 2: INK}
    for column, task in enumerate(tasks):
        above, below = axes[0][column], axes[1][column]
        drawn = []
        for bits in results["bits"]:
            pairs = [
                (estimate, added)
                for seed in seeds_of(results, task)
                for estimate, added in zip(*(seed["bits"][str(bits)][k] for k in ("rank one", "added")), strict=True)
                if estimate > 0 and added > 0
            ]
            drawn += [value for pair in pairs for value in pair]
            above.scatter(*zip(*pairs, strict=True), s=11, color=shades[bits], alpha=0.7, label=f"{bits} bits")
        ends = [min(drawn), max(drawn)]
        above.plot(ends, ends, color=MUTED, linewidth=0.9)
        above.set(xscale="log", yscale="log", xlabel="rank one: sum of h (w - Q(w))$^2$ / 2")
        above.set_title(task, loc="left", fontsize=11, fontweight="bold")
        for name in ESTIMATES:
            points = [interval(correlations(results, task, bits, name))[0] for bits in results["bits"]]
            style = "--" if name == PLAIN else "-"
            below.plot(range(len(points)), points, style, marker=".", color=COLOURS[name], label=name)
        below.set(xticks=range(len(results["bits"])), xticklabels=results["bits"], xlabel="bits", ylim=(-1.05, 1.05))
        below.axhline(0, color=MUTED, linewidth=0.7)
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("measured change of the loss (where it grows)")
    axes[1][0].set_ylabel("rank correlation over layers")
    axes[0][0].legend(frameon=False, loc="upper left", markerscale=1.6)
    axes[1][-1].legend(frameon=False, loc="lower center", fontsize=9, ncols=2, bbox_to_anchor=(0.5, 0.05))
    save_picture(figure, path)


def main(given: list[str] | None = None) -> None:
    """Run, save, draw and print."""
    parser = arguments(__doc__, "outputs/quantization_comparison")
    parser.add_argument("--seeds", type=int, help="how many seeds (5, with --quick 2)")
    options = settle(parser.parse_args(given), RESULTS, "docs/quantization.png")
    if not options.report:
        tasks = CHOSEN[:2] if options.quick else CHOSEN
        save(run(tasks, options.seeds or (2 if options.quick else SEEDS), options.folder), options.results)
    results = json.loads(options.results.read_text())
    draw(results, options.picture)
    text = tables(results)
    if options.write:
        write_block(options.write, "quantization", text)
    else:
        print(text)
    print(options.results)


if __name__ == "__main__":
    main()

"""What a step costs, in time and memory, as networks grow deeper and wider.

    python examples/paper/computational_cost.py --write docs/approximation.md  # everything; called again, it resumes
    python examples/paper/computational_cost.py --quick                        # the smaller networks, into outputs/
    python examples/paper/computational_cost.py --report                       # only draw, from the results

The paper's network: a tanh MLP 64-512-...-512-100 with 1 to 128 matrices of 512 x 512 and a batch of one sample, and
the same with a batch of 32; one hidden layer of 32 to 2,048 units; and a convolutional network. A step is forward,
backward and the estimate of the diagonal; with an optimizer also its update. All variants take turns, each compared
with the gradient (or with Adam's step) of its round, in one thread.

Weights are drawn so that activations and gradients keep their size from layer to layer (Glorot and Bengio, 2010): with
PyTorch's default, a hundred layers shrink curvature to denormal numbers, which processors are slow at.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cost_report import draw, tables
from estimators import RECURSIONS
from journal import Journal, arguments, environment, rounded, save, settle, write_block
from steps import Step, Steps, interleaved
from torch import Tensor, nn
from tqdm import tqdm

from hesscale_lightning.command_line.networks import MLP
from hesscale_lightning.optim import AdaHesScale

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.curvature import cnn
from benchmarks.timing import peak_bytes

RESULTS = "examples/paper/results/computational_cost.json"
PICTURE = "docs/computational_cost.png"
ESTIMATES = ["gradient", *RECURSIONS, "GGN, 1 sample", "GGN, exact", "Hutchinson, 1 probe"]
SECONDS, QUICK_SECONDS = 4.0, 1.0  # of timing for each table and network
GGN_LIMIT = 10_000_000  # classes x samples x units of all layers: the numbers that exact GGN holds at once


@dataclass(frozen=True)
class Workload:
    """A network and its batch; ``size`` is its place on the axis of its group."""

    group: str
    size: int
    widths: tuple[int, ...]
    batch: int

    def __str__(self) -> str:
        return f"{self.group}, {self.size}" if self.widths else self.group

    def build(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        torch.manual_seed(0)
        if not self.widths:
            return cnn(), torch.randn(self.batch, 3, 32, 32), torch.randint(10, (self.batch,))  # type: ignore[return-value]
        model = MLP(self.widths, nn.Tanh)
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.xavier_normal_(p)
        return model, torch.randn(self.batch, self.widths[0]), torch.randint(self.widths[-1], (self.batch,))

    def fits(self, estimate: str) -> bool:
        """Whether the exact GGN's backward pass for every class stays within the limit."""
        if estimate != "GGN, exact" or not self.widths:
            return True
        return sum(self.widths[1:]) * self.batch * self.widths[-1] <= GGN_LIMIT


DEEP = [
    Workload(f"depth, batch {batch}", matrices, (64, *[512] * (matrices + 1), 100), batch)
    for batch in (1, 32)
    for matrices in (1, 2, 4, 8, 16, 32, 64, 128)
]
WIDE = [Workload("width, batch 32", width, (64, width, 10), 32) for width in (32, 64, 128, 256, 512, 1024, 2048)]
CONVOLUTIONAL = [Workload("CNN 3x32x32, batch 32", 0, (), 32)]
WORKLOADS = [*DEEP, *WIDE, *CONVOLUTIONAL]


def optimizers(steps: Steps) -> dict[str, Step]:
    """Steps with their update, Adam's first; and the gradient alone, to tell what the update is of it.

    The updates with curvature are AdaHesScale's without clamp and trust region, whatever the estimate, and at last
    AdaHesScale's as it comes.
    """
    params = steps.params

    def both(step: Step, optimizer: torch.optim.Optimizer) -> None:
        step()
        optimizer.step()

    # The rate is tiny: the steps are repeated, and the network should not change.
    bare = partial(AdaHesScale, params, lr=1e-9, delta=None, max_update=None)
    named = steps.named()
    found: dict[str, tuple[Step, torch.optim.Optimizer]] = {
        "Adam": (named["gradient"], torch.optim.Adam(params, lr=1e-9))
    }
    found |= {f"{name}, bare update": (named[name], bare()) for name in [*RECURSIONS, "Hutchinson, 1 probe"]}
    found["AdaHesScale"] = (named["HesScale"], AdaHesScale(params, lr=1e-9))
    return {name: partial(both, *parts) for name, parts in found.items()} | {"gradient": named["gradient"]}


def measure(workload: Workload, seconds: float) -> dict[str, Any]:
    """Time and peak memory of every estimate over the gradient's, and time of every optimizer's step over Adam's."""
    start = time.perf_counter()
    steps = Steps(*workload.build())
    named = steps.named()
    estimates = {name: named[name] for name in ESTIMATES if workload.fits(name)}

    def from_nothing(step: Step) -> None:
        step()
        steps.clear()  # so that the next one does not begin by freeing what the last one kept

    memory = {name: peak_bytes(partial(from_nothing, step)) for name, step in estimates.items()}
    return {
        "parameters": sum(p.numel() for p in steps.params),
        "time": interleaved(estimates, seconds),
        "memory": {name: found / memory["gradient"] for name, found in memory.items()},
        "over Adam": interleaved(optimizers(steps), seconds),
        "seconds": time.perf_counter() - start,
        "load": os.getloadavg()[0],
    }


def run(quick: bool, folder: Path) -> dict[str, Any]:
    """Measure what is not done yet, and return the results of the study."""
    torch.set_num_threads(1)
    workloads = [one for one in WORKLOADS if one not in DEEP or one.size <= 16] if quick else WORKLOADS
    seconds = QUICK_SECONDS if quick else SECONDS
    journal = Journal(folder / "runs.jsonl", {"seconds": seconds, "estimates": ESTIMATES})
    for workload in tqdm(workloads, desc="networks", unit="network"):
        if str(workload) not in journal.runs:
            journal.note(str(workload), measure(workload, seconds))
    runs: dict[str, dict[str, Any]] = {}
    for workload in workloads:
        found = journal.runs[str(workload)]
        kept = {name: found[name] for name in ("parameters", "time", "memory", "over Adam")}
        runs.setdefault(workload.group, {})[str(workload.size)] = rounded(kept, 3)
    done = [journal.runs[str(workload)] for workload in workloads]
    return {
        "seconds": seconds,
        "minutes": rounded(sum(found["seconds"] for found in done) / 60),
        "load": rounded(statistics.fmean(found["load"] for found in done)),
        "environment": environment(),
        "runs": runs,
    }


def main(given: list[str] | None = None) -> None:
    """Run, save, draw and print."""
    options = settle(arguments(__doc__, "outputs/computational_cost").parse_args(given), RESULTS, PICTURE)
    if not options.report:
        save(run(options.quick, options.folder), options.results)
    results = json.loads(options.results.read_text())
    draw(results, options.picture)
    for name, text in tables(results).items():
        if options.write:
            write_block(options.write, name, text)
        else:
            print(text, end="\n\n")
    print(f"{options.results}\n{options.picture}")


if __name__ == "__main__":
    main()

"""Cost of HesScaleCallback: a training step in a real Trainer, over the same step with `attach` called by hand.

    python -m benchmarks.lightning_step [--seconds 20] [--json FILE]

Every variant is a Trainer of its own on the tiny tanh MLP 17-64-64-6, batch 64, one thread, that trains in a thread and
waits after every 50 steps until it is its turn again; what is timed are 50 steps, which hold one log. The baseline is a
module that calls `attach` in its `backward` and has no callback.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.timing import Ratio, ratios, write_table
from hesscale_lightning import AdaHesScale, HesScaleCallback, attach

STEPS = 50
TARGET = 1.05


class Network(pl.LightningModule):
    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = AdaHesScale) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise([17, 64, 64, 6])]
        self.net = nn.Sequential(*[module for pair in layers for module in pair][:-1])
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class AttachesItself(Network):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        attach(loss)
        loss.backward(*args, **kwargs)


class Turns(IterableDataset[tuple[Tensor, Tensor]]):
    """The same batch for ever; after every 50th it waits for its turn."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.randn(64, 17, generator=generator), torch.randint(6, (64,), generator=generator)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.over = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self.go.acquire()
            if self.over:
                return
            for _ in range(STEPS):
                yield self.batch
            self.done.release()


class Training:
    """A Trainer in a thread of its own; a call lets it train for 50 steps."""

    def __init__(self, module: pl.LightningModule, *callbacks: pl.Callback, folder: str) -> None:
        self.turns = Turns()
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=CSVLogger(folder),
            log_every_n_steps=STEPS,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        loader = DataLoader(self.turns, batch_size=None)
        self.thread = threading.Thread(target=trainer.fit, args=(module, loader), daemon=True)
        self.thread.start()

    def __call__(self) -> None:
        self.turns.go.release()
        while not self.turns.done.acquire(timeout=5):
            if not self.thread.is_alive():
                raise RuntimeError("the training of a variant has ended early; its error is above")

    def end(self) -> None:
        self.turns.over = True
        self.turns.go.release()
        self.thread.join()


def rows(seconds: float) -> Iterator[tuple[str, Ratio]]:
    """Variant, and the time of its step over the baseline's."""
    with tempfile.TemporaryDirectory() as folder:
        adam = torch.optim.Adam
        variants = {
            "attach by hand, AdaHesScale": Training(AttachesItself(), folder=folder),
            "callback": Training(Network(), HesScaleCallback(), folder=folder),
            "callback, every 10 steps": Training(Network(), HesScaleCallback(every_n_steps=10), folder=folder),
            "callback, layers and an audit every 500": Training(
                Network(), HesScaleCallback(per_layer=True, audit="exact", audit_every_n_steps=500), folder=folder
            ),
            "callback beside Adam, curvature of the logged steps only": Training(
                Network(adam), HesScaleCallback(every_n_steps=STEPS), folder=folder
            ),
            "Adam alone": Training(Network(adam), folder=folder),
        }
        yield from zip(variants, ratios(list(variants.values()), seconds, warm_up=3), strict=True)
        for training in variants.values():
            training.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--write", type=Path, help="also replace the table in this page, for example docs/lightning.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print("Time of a training step; median (quartiles) of interleaved rounds of 50 steps, one thread.\n")
    lines = ["| variant | step | over attach by hand | to reach |", "|---|---|---|---|"]
    results = []
    for name, ratio in rows(args.seconds):
        target = f"{TARGET:.2f}" if name == "callback" else ""
        lines.append(f"| {name} | {ratio.variant_us / STEPS / 1000:.3f} ms | {ratio} | {target} |")
        results.append({"variant": name, **vars(ratio)})
    print("\n".join(lines))
    if args.write:
        write_table(args.write, "lightning", "\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

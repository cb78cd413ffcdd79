"""What curvature costs on two gloo processes: bytes into collectives, and time per step.

python -m benchmarks.distributed --write docs/distributed.md
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hesscale_lightning import attach

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
WIDTH, BATCH, STEPS = 512, 64, 30
ACCUMULATING = "FSDP2, four passes, reduced in the last"


class Sent(TorchDispatchMode):
    """Counts the bytes that this process puts into collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            name = function._schema.name.split("::")[1]
            kind = "reduce" if "reduce" in name else "gather" if "gather" in name else ""
            # In place, c10d's base collectives take the output first; the functional ones have only an input.
            given = args[1] if name in ("_reduce_scatter_base_", "_allgather_base_") else args[0]
            for tensor in given if isinstance(given, (list, tuple)) else [given]:
                if kind and isinstance(tensor, Tensor):
                    self.bytes[kind] += tensor.numel() * tensor.element_size()
        return function(*args, **(kwargs or {}))


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 16))


def _sharded() -> nn.Module:
    network = _network()
    for layer in network[::2]:
        fully_shard(layer)
    return fully_shard(network)


def _step(model: Any, x: Tensor, y: Tensor, kind: str, curvature: bool) -> None:
    model.zero_grad()
    passes = 4 if kind == ACCUMULATING else 1
    for part in range(passes):
        if kind == ACCUMULATING:
            model.set_requires_gradient_sync(part == passes - 1)
        loss = cross_entropy(model(x), y)
        if curvature:
            attach(loss)
        loss.backward()
    if curvature and kind == "DDP":  # as HesScaleCallback does
        flat = torch.cat([p.hess_diag.reshape(-1) for p in model.parameters()])  # type: ignore[attr-defined]
        dist.all_reduce(flat)


def _work(rank: int, port: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(16, (BATCH,))
    models = {
        "DDP": DistributedDataParallel(_network()),
        "FSDP2": _sharded(),
        ACCUMULATING: _sharded(),
        "tensor parallel": parallelize_module(
            _network(),
            init_device_mesh("cpu", (2,)),
            {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(output_layouts=Replicate())},
        ),
    }
    times: dict[tuple[str, bool], list[float]] = {(kind, c): [] for kind in models for c in (False, True)}
    for turn in range(STEPS + 5):
        for kind, curvature in times:
            start = time.process_time()
            _step(models[kind], x, y, kind, curvature)
            if turn >= 5:
                times[kind, curvature].append(time.process_time() - start)
    sent = {}
    for kind, curvature in times:
        if kind != "DDP":  # its reducer is not called through Python
            with Sent() as counted:
                _step(models[kind], x, y, kind, curvature)
            sent[kind, curvature] = counted.bytes
    if rank == 0:
        results.put((sent, {key: median(value) for key, value in times.items()}))
    dist.barrier()  # leave together: a process that ends while another still talks to it is torn down
    dist.destroy_process_group()


def measure() -> list[str]:
    """Starts two processes and returns the lines of the tables."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_work, args=(port, results), nprocs=2)
    sent, times = results.get()
    lines = [
        "| Bytes into collectives per optimizer step | | gradient alone | with curvature | ratio |",
        "|---|---|---|---|---|",
    ]
    for kind in ("FSDP2", ACCUMULATING, "tensor parallel"):
        for collective in ("gather", "reduce"):
            before, after = sent[kind, False][collective], sent[kind, True][collective]
            if before or after:
                ratio = f"{after / before:.2f}" if before else ""
                lines.append(f"| {kind} | {collective} | {before} | {after} | {ratio} |")
    lines += ["", "| CPU time per optimizer step | gradient alone | with curvature | ratio |", "|---|---|---|---|"]
    for kind in ("DDP", "FSDP2", ACCUMULATING, "tensor parallel"):
        before, after = times[kind, False] * 1e3, times[kind, True] * 1e3
        lines.append(f"| {kind} | {before:.1f} ms | {after:.1f} ms | {after / before:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="page whose measured part is replaced")
    page = parser.parse_args().write
    lines = measure()
    print("\n".join(lines))
    if page is not None:
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}" + rest.split(END)[1])


if __name__ == "__main__":
    main()

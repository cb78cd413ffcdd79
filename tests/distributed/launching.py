"""Starting a table of cases in several processes, and running it in each."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Where the cases run: "cuda" takes one GPU for each process.
DEVICE = os.environ.get("HESSCALE_TEST_DEVICE", "cpu")
ROOT = Path(__file__).resolve().parents[2]


def launch(program: Path, *arguments: str, processes: int = 2) -> str:
    """Runs a program in several processes and returns what they print; fails if one of them does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *launcher, str(program), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
        # Rarely a process aborts when it ends and torch's threads are still there, after all it had to do: once more.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def outcomes(program: Path, *arguments: str, processes: int = 2) -> dict[str, str]:
    """What each case of a program printed: its largest relative error, or the exception."""
    printed = launch(program, *arguments, processes=processes)
    return dict(line.split("\t") for line in printed.splitlines() if "\t" in line)


def begin() -> None:
    """Joins the other processes."""
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo")


def run_cases(cases: Mapping[str, Callable[[], float]], chosen: str = "") -> None:
    """Runs those whose name contains ``chosen`` in every process; rank zero prints the worst outcome of all."""
    for name, case in cases.items():
        if chosen not in name:
            continue
        mine: float | str
        try:
            mine = case()
        except Exception as error:
            if chosen:
                raise
            mine = f"{type(error).__name__}: {error}".replace("\n", " ").replace("\t", " ")
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        failed = [f"process {rank}: {error}" for rank, error in enumerate(found) if isinstance(error, str)]
        if dist.get_rank() == 0:
            sys.stdout.write(f"{name}\t{'; '.join(failed) or format(max(found), '.1e')}\n")
            sys.stdout.flush()
    dist.barrier()  # leave together: a process that ends while another still talks to it is torn down
    dist.destroy_process_group()

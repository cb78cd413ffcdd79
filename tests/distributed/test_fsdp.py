"""FSDP2 on two gloo processes, started once for the whole table of cases in ``fsdp_cases.py``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.fsdp_cases import CASES

_BOUNDS = {"mixed precision": 0.1}  # bfloat16 has 8 bits
_HERE = Path(__file__).resolve()


def _launch(program, *arguments, processes=2):
    environment = {**os.environ, "PYTHONPATH": str(_HERE.parents[2]), "OMP_NUM_THREADS": "1"}
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        str(program),
        *arguments,
    ]
    done = subprocess.run(
        [sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outcomes():
    """What each case printed: its largest relative error, or the exception."""
    printed = _launch(_HERE.parent / "fsdp_cases.py")
    return dict(line.split("\t") for line in printed.splitlines() if "\t" in line)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_agree_with_one_on_the_global_batch(outcomes, name):
    try:
        error = float(outcomes[name])
    except ValueError:
        pytest.fail(outcomes[name])
    assert error < _BOUNDS.get(name, 1e-10)


def test_the_example_learns():
    losses = re.findall(r"loss ([\d.]+)", _launch(_HERE.parents[2] / "examples" / "fsdp.py"))
    assert float(losses[-1]) < 0.5 * float(losses[0])


def test_four_processes_on_a_hybrid_mesh():
    name, error = _launch(_HERE.parent / "fsdp_cases.py", "hybrid", processes=4).split("\t")
    assert name == "hybrid"
    assert float(error) < 1e-10

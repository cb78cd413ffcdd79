"""The diagonal over a data set on two gloo processes is that of one process with all the data."""

import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve()


def test_two_processes_have_the_diagonal_of_all_data():
    environment = {**os.environ, "PYTHONPATH": str(_HERE.parents[2]), "OMP_NUM_THREADS": "1"}
    program = _HERE.parent / "data_diagonal_cases.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    done = subprocess.run(
        [sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    errors = dict(line.split("\t") for line in done.stdout.splitlines() if "\t" in line)
    assert len(errors) == 2 * 2 * 2 * 5  # processes, reductions, dtypes, parameters
    assert {case: e for case, e in errors.items() if not float(e) < (1e-6 if "float32" in case else 1e-12)} == {}

"""Run by four processes: what needs two dimensions of a mesh, and what two processes have saved into a folder."""

import sys
from pathlib import Path

from tests.distributed import fsdp_cases, lightning_cases, tensor_parallel_cases
from tests.distributed.launching import begin, run_cases

CASES = {name: case for name, case in fsdp_cases.CASES.items() if name.startswith("hybrid")}
CASES |= tensor_parallel_cases.FOUR
CASES["trainer, fully_shard and tensor parallelism"] = lambda: lightning_cases.logged(
    lightning_cases.adahesscale(), shard=lightning_cases.both
)

if __name__ == "__main__":
    begin()
    run_cases(CASES | lightning_cases.handed_over("resume", Path(sys.argv[1])))

"""Several gloo processes against one on the global batch; each table of cases is started once."""

import re
from pathlib import Path

import pytest
import torch

from tests.distributed import fsdp_cases, lightning_cases, tensor_parallel_cases
from tests.distributed.launching import ROOT, launch, outcomes

_TABLES = {
    "fsdp": fsdp_cases.CASES,
    "lightning": lightning_cases.CASES,
    "tensor_parallel": tensor_parallel_cases.TWO,
}
_BOUNDS = {
    "casts on DTensors": 1e-5,  # single precision
    "mixed precision": 0.1,  # bfloat16 has 8 bits
    "measured decrease": 1e-4,  # a difference of losses in float32
}
_HERE = Path(__file__).resolve().parent
_found: dict[str, dict[str, str]] = {}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


def _check(outcome, bound=1e-10):
    try:
        error = float(outcome)
    except ValueError:
        pytest.fail(outcome)
    assert error < bound


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, cases in _TABLES.items() for name in cases])
def test_two_processes_agree_with_one_on_the_global_batch(table, name):
    if table not in _found:
        _found[table] = outcomes(_HERE / f"{table}_cases.py")
    _check(_found[table][name], _BOUNDS.get(name, 1e-10))


def test_four_processes_on_a_hybrid_mesh():
    found = outcomes(_HERE / "fsdp_cases.py", "hybrid", processes=4)
    assert list(found) == ["hybrid"]
    _check(found["hybrid"])


def test_four_processes_with_fully_shard_and_tensor_parallelism():
    found = outcomes(_HERE / "tensor_parallel_cases.py", processes=4)
    assert set(found) == set(tensor_parallel_cases.FOUR)
    for outcome in found.values():
        _check(outcome)


@pytest.mark.parametrize("processes", [1, 4])
def test_other_processes_go_on_with_what_two_have_saved(tmp_path_factory, processes):
    if "saved" not in _found:
        folder = tmp_path_factory.mktemp("saved")
        _found["saved"] = {"folder": str(folder), **outcomes(_HERE / "lightning_cases.py", "save", str(folder))}
    found = outcomes(_HERE / "lightning_cases.py", "resume", _found["saved"]["folder"], processes=processes)
    assert set(found) == set(lightning_cases.HANDED_OVER)
    for outcome in found.values():
        _check(outcome)


def test_the_example_learns():
    losses = re.findall(r"loss ([\d.]+)", launch(ROOT / "examples" / "fsdp.py"))
    assert float(losses[-1]) < 0.5 * float(losses[0])

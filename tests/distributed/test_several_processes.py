"""Several gloo processes against one on the global batch; each table of cases is started once."""

import re
from pathlib import Path

import pytest
import torch

from tests.distributed import data_diagonal_cases, four_cases, fsdp_cases, lightning_cases, tensor_parallel_cases
from tests.distributed.launching import DEVICE, ROOT, launch, outcomes

_TABLES = {
    "fsdp": fsdp_cases.CASES,
    "lightning": lightning_cases.CASES,
    "tensor_parallel": tensor_parallel_cases.TWO,
    "data_diagonal": data_diagonal_cases.CASES,
}
_BOUNDS = {
    "casts on DTensors": 1e-5,  # single precision
    **{name: 1e-6 for name in data_diagonal_cases.CASES if "float32" in name},
    "mixed precision": 0.1,  # bfloat16 has 8 bits
    "measured decrease": 1e-4,  # a difference of losses in float32
}
_HERE = Path(__file__).resolve().parent
_found: dict[str, dict[str, str]] = {}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


def _outcomes(program, *arguments, processes=2):
    if DEVICE == "cuda" and torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs, found {torch.cuda.device_count()}")
    return outcomes(_HERE / program, *arguments, processes=processes)


def _check(outcome, bound=1e-10):
    try:
        error = float(outcome)
    except ValueError:
        pytest.fail(outcome)
    assert error < bound


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, cases in _TABLES.items() for name in cases])
def test_two_processes_agree_with_one_on_the_global_batch(table, name):
    if table not in _found:
        _found[table] = _outcomes(f"{table}_cases.py")
    _check(_found[table][name], _BOUNDS.get(name, 1e-10))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with what two processes have saved after three steps."""
    folder = str(tmp_path_factory.mktemp("saved"))
    _outcomes("lightning_cases.py", "save", folder)
    return folder


def test_one_process_goes_on_with_what_two_have_saved(saved):
    found = _outcomes("lightning_cases.py", "resume", saved, processes=1)
    assert set(found) == set(lightning_cases.HANDED_OVER)
    for outcome in found.values():
        _check(outcome)


def test_four_processes_agree_with_one_and_go_on_with_what_two_have_saved(saved):
    found = _outcomes("four_cases.py", saved, processes=4)
    assert set(found) == {*four_cases.CASES, *lightning_cases.HANDED_OVER}
    for outcome in found.values():
        _check(outcome)


def test_the_example_learns():
    losses = re.findall(r"loss ([\d.]+)", launch(ROOT / "examples" / "fsdp.py"))
    assert float(losses[-1]) < 0.5 * float(losses[0])

"""Every rule is proven by a case of a table, and listed in the documentation."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from hesscale_lightning.curvature import registered_rules
from hesscale_lightning.curvature.operations import operations_table
from tests.curvature import model_reports

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))


def proven() -> set[str]:
    names: set[str] = set()
    for family in FAMILIES:
        module = importlib.import_module(f"tests.curvature.{family}")
        for attribute in vars(module).values():
            if isinstance(attribute, list):
                for case in attribute:
                    names.update(getattr(case, "nodes", ()))
    return names


def built_in() -> list[str]:
    return [
        name for name, rule in registered_rules().items() if rule.function.__module__.startswith("hesscale_lightning")
    ]


#: Nodes that no single process makes on the CPU, and what proves their rules instead.
ELSEWHERE = {
    "CtcLossBackward1": "the formula of CtcLossBackward0",
    "CudnnRnnBackward0": "refused: tests/curvature/test_recurrent.py",
    "MiopenRnnBackward0": "refused, as CudnnRnnBackward0 is",
    "GivenCurvatureBackward": "tests/curvature/test_sources.py",
    "BackwardHookFunctionBackward": "tests/curvature/test_engine.py, with a module's hook",
    "_DDPSinkBackward": "tests/test_callback.py, with two processes",
    "RegisterPostBackwardFunctionBackward": "tests/distributed, with two processes",
    "_ToTorchTensorBackward": "tests/distributed, with two processes",
    "_FromTorchTensorBackward": "tests/distributed, with two processes",
    "RedistributeBackward": "tests/distributed, with two processes",
}


@pytest.mark.parametrize("name", built_in())
def test_rule_is_proven_by_a_case(name: str) -> None:
    assert name in proven() | set(ELSEWHERE), (
        f"{name} has a rule and no case: add one that names it to its family's table"
    )


def test_documentation_lists_every_operation() -> None:
    page = Path(__file__).parents[2] / "docs" / "operations.md"
    assert operations_table() in page.read_text(), (
        "docs/operations.md is not up to date: run python -m hesscale_lightning.curvature.operations --write"
    )


def test_documentation_reports_on_every_model() -> None:
    assert model_reports.PAGE.read_text() == model_reports.page(), (
        "docs/models.md is not up to date: run python -m tests.curvature.model_reports"
    )

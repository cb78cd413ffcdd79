"""What the README tells a Lightning user to copy does what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "Trainer(" in block]


def test_the_readme_has_a_quick_start_for_lightning():
    assert any("HesScaleCallback" in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_quick_start_trains_and_logs_curvature(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "quick_start"}
    exec(compile(block, "README.md", "exec"), namespace)
    metrics = namespace["trainer"].callback_metrics
    assert namespace["trainer"].global_step > 0
    assert metrics["curvature/mean_abs"] > 0

"""What the README tells users to copy does what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EVERY_BLOCK = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
BLOCKS = [block for block in EVERY_BLOCK if "Trainer(" in block]


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


def test_the_lines_for_stable_baselines_train_with_the_optimizer():
    (block,) = [block for block in EVERY_BLOCK if "stable_baselines3" in block]
    namespace: dict = {}
    exec(compile(block.replace("50_000", "2048"), "README.md", "exec"), namespace)
    model = namespace["model"]
    assert model.num_timesteps == 2048
    assert type(model.policy.optimizer).__name__ == "AdaHesScale"
    assert model.policy.optimizer.state


def test_the_plain_loop_trains():
    (block,) = [block for block in EVERY_BLOCK if "for _ in range(10)" in block]
    namespace: dict = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert all(state["hess_step"] == 10 for state in namespace["optimizer"].state.values())


def test_figures_of_the_uses_are_those_of_their_page() -> None:
    readme, page = README.read_text(), (README.parent / "docs/uses.md").read_text()
    assert "at 36 of 63 points" in readme
    assert "weights, fine-tuned: HesScale is higher than magnitude at 36 of 63 points, lower at 0." in page
    assert "2.6 times a gradient" in readme
    assert "HesScaleGN 2.6 and 2.6;" in page

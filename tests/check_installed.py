"""Run by ``make dist`` in an environment that has the wheel and not the sources: what a user does with the package.

    python -P tests/check_installed.py README.md

from an empty folder. Runs README's Python blocks and the command line, and lets mypy look at a program that uses the
package: once as it should be, once with mistakes that it can only find if the package ships its types.
"""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

GOOD = """\
import torch
from hesscale_lightning import AdaHesScale, HesScaleCallback, StepSizeScaling, attach, coverage, exact_hess_diag
from sb3_integration import HesScaleActorCriticPolicy

model = torch.nn.Linear(3, 2)
optimizer = AdaHesScale(model.parameters(), lr=1e-2)
limited = StepSizeScaling(torch.optim.Adam(model.parameters()), 1e-4)
loss = model(torch.randn(4, 3)).square().mean()
attach(loss, list(model.parameters()), method="hesscale_gn")
loss.backward()
report: str = str(coverage(loss))
diagonals: list[torch.Tensor] = list(exact_hess_diag(loss, list(model.parameters())))
callback = HesScaleCallback(every_n_steps=2, audit="exact")
policy: type[HesScaleActorCriticPolicy] = HesScaleActorCriticPolicy
"""
#: lines that mypy must refuse
BAD = """\
from hesscale_lightning import AdaHesScale, HesScaleCallback, attach

attach("loss")
AdaHesScale(3)
HesScaleCallback(every_n_steps="2")
"""


def check_place() -> None:
    """The package comes from the environment, in the version that its metadata says."""
    import hesscale_lightning
    import sb3_integration

    for package in (hesscale_lightning, sb3_integration):
        place = Path(str(package.__file__))
        assert "site-packages" in place.parts, f"{package.__name__} comes from {place}, not from the environment"
    version = metadata.version("hesscale_lightning")
    assert hesscale_lightning.__version__ == version
    print(f"hesscale_lightning {version} from {place.parent.parent}")


def check_readme(readme: Path) -> None:
    """Every Python block of the page runs; the one that learns for long learns briefly."""
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(blocks) >= 3, f"{readme} has {len(blocks)} Python blocks"
    for k, block in enumerate(blocks):
        namespace: dict[str, object] = {"__name__": f"block_{k}"}
        exec(compile(block.replace("50_000", "2048"), f"{readme.name}, block {k}", "exec"), namespace)
    print(f"{len(blocks)} blocks of {readme.name} ran")


def check_command_line() -> None:
    """The console script is there and knows its commands."""
    shown = subprocess.run(
        [str(Path(sys.executable).parent / "hesscale"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in ("fit", "report"):
        assert command in shown, f"hesscale --help does not name {command}: {shown}"


def mypy(name: str, text: str) -> "subprocess.CompletedProcess[str]":
    """What mypy says of a file in this folder."""
    Path(name).write_text(text)
    return subprocess.run([sys.executable, "-m", "mypy", "--strict", name], capture_output=True, text=True, check=False)


def check_types() -> None:
    """The types that the package ships are a user's types."""
    good = mypy("good.py", GOOD)
    assert good.returncode == 0, f"mypy refuses a correct program:\n{good.stdout}{good.stderr}"
    bad = mypy("bad.py", BAD)
    found = {int(number) for number in re.findall(r"^bad.py:(\d+): error", bad.stdout, re.MULTILINE)}
    assert found == {3, 4, 5}, f"mypy should have refused lines 3, 4 and 5:\n{bad.stdout}{bad.stderr}"
    print("mypy accepts a correct program, and refuses three mistakes")


if __name__ == "__main__":
    check_place()
    check_readme(Path(sys.argv[1]))
    check_command_line()
    check_types()

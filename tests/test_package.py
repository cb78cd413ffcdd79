"""What an installed package promises: light imports, public names, types, and pins that are true."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hesscale_lightning

ROOT = Path(__file__).parent.parent
FRAMEWORKS = ("lightning", "pytorch_lightning", "torchmetrics", "jsonargparse", "stable_baselines3", "sklearn")
SLOW = ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp")  # parts of torch that take a second to import


@pytest.mark.parametrize("module", ["hesscale_lightning", "hesscale_lightning.curvature", "hesscale_lightning.optim"])
def test_a_torch_only_import_does_not_import_a_framework(module):
    code = (
        f"import sys, torch; before = set(sys.modules); import {module}; "
        f"print([name for name in {FRAMEWORKS + SLOW} if name in set(sys.modules) - before])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_can_be_imported_and_is_listed():
    for name in hesscale_lightning.__all__:
        assert getattr(hesscale_lightning, name) is not None
        assert name in dir(hesscale_lightning)
    assert set(hesscale_lightning._LAZY) < set(hesscale_lightning.__all__)
    assert list(hesscale_lightning.__all__) == sorted(hesscale_lightning.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'HessScale'"):
        hesscale_lightning.HessScale  # noqa: B018


def test_the_installed_version_is_the_packages_own():
    assert metadata.version("hesscale_lightning") == hesscale_lightning.__version__


@pytest.mark.parametrize("package", ["hesscale_lightning", "sb3_integration"])
def test_the_package_ships_its_types(package):
    assert (ROOT / package / "py.typed").is_file()
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert package_data[package] == ["py.typed"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_every_direct_dependency_is_pinned_inside_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, lines):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement.name


def test_the_pins_name_no_build_and_no_place():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"https?:|^-|\+|@", text, flags=re.MULTILINE)

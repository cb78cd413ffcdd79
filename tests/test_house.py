"""The rooms of the package: which way imports point, and that what has moved is found under its earlier path."""

import ast
import pickle
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hesscale_lightning
from hesscale_lightning._earlier_paths import EARLIER_PATHS
from hesscale_lightning.command_line.networks import MLP

PACKAGE = Path(hesscale_lightning.__file__).parent
ROOT = Path(__file__).parent.parent
# room -> rooms of ours that it may import, and third parties
ALLOWED = {
    "curvature": ({"_torch_names", "curvature"}, {"torch", "typing_extensions"}),
    "optim": ({"optim"}, {"torch"}),
    "compiled_step": ({"_torch_names", "compiled_step", "curvature", "optim"}, {"torch"}),
    "metrics": ({"metrics"}, {"torch", "torchmetrics", "matplotlib"}),
    "trainer": (
        {"trainer", "compiled_step", "curvature", "metrics", "optim"},
        {"torch", "torchmetrics", "lightning"},
    ),
    "uses": (
        {"uses", "trainer", "curvature", "metrics"},
        {"torch", "torchmetrics", "lightning", "matplotlib", "tqdm", "laplace"},
    ),
}
STANDARD = set(sys.stdlib_module_names)


def imports(source: str) -> set[str]:
    """Every module that some source imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "hesscale_lightning":
                found |= {f"hesscale_lightning.{alias.name}" for alias in node.names}
            else:
                found.add(str(node.module))
    return found


def forbidden(source: str, room: str) -> set[str]:
    ours, others = ALLOWED[room]
    wrong = set()
    for name in imports(source):
        top, _, rest = name.partition(".")
        allowed = rest.split(".")[0] in ours if top == "hesscale_lightning" else top in others | STANDARD
        if not allowed:
            wrong.add(name)
    return wrong


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(room):
    sources = sorted((PACKAGE / room).rglob("*.py"))
    assert sources
    assert {
        str(path.relative_to(PACKAGE)): wrong for path in sources if (wrong := forbidden(path.read_text(), room))
    } == {}


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("curvature", "from hesscale_lightning.optim import AdaHesScale"),
        ("curvature", "import lightning"),
        ("optim", "def f():\n    from hesscale_lightning import curvature"),
        ("optim", "from hesscale_lightning import attach"),
        ("compiled_step", "def f():\n    import lightning.pytorch as pl"),
        ("metrics", "from hesscale_lightning.trainer.step_log import StepLog"),
        ("trainer", "from hesscale_lightning.command_line import report"),
        ("trainer", "from hesscale_lightning.uses.data_diagonal import hess_diag_over"),
        ("uses", "from hesscale_lightning.command_line import report"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_noticed(room, source):
    assert forbidden(source, room)


def test_no_file_of_the_rooms_trainer_and_uses_is_over_300_lines():
    for path in [path for room in ("trainer", "uses") for path in (PACKAGE / room).glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path.name


def test_the_top_level_holds_no_module_but_the_packages_own():
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "_earlier_paths.py",
        "_torch_names.py",
        "_version.py",
    }


@pytest.mark.parametrize("earlier", EARLIER_PATHS)
def test_a_module_of_public_names_is_the_same_module_under_its_earlier_path(earlier):
    assert import_module(earlier) is import_module(EARLIER_PATHS[earlier])


def test_an_object_pickled_under_an_earlier_path_is_read():
    assert pickle.loads(b"chesscale_lightning.networks\nMLP\n.") is MLP


def test_every_path_that_the_page_on_architecture_names_exists():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:hesscale_lightning|sb3_integration|tests|docs|examples|benchmarks)/[\w./]*)`", page))
    assert len(named) > 30
    assert sorted(path for path in named if not (ROOT / path).exists()) == []
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms == {
        path.split("/")[1] for path in named if path.startswith("hesscale_lightning/") and path.count("/") > 1
    }

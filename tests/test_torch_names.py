"""The private names of torch that the package uses are in one table, and one that is missing is named at import."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from hesscale_lightning import __version__
from hesscale_lightning._torch_names import INDUCTOR, NAMES, SUPPORTED, missing

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for room in ("hesscale_lightning", "sb3_integration") for path in (ROOT / room).rglob("*.py"))
# FSDP's internals: read only where parameters are sharded, and looked up there.
ELSEWHERE = {"sharding.py", "sharding_names.py", "held_groups.py", "sharded.py"}
# Attributes with an underscore of what is not torch's: named tuples, torchmetrics, Lightning, Stable-Baselines3.
OTHERS = {"_replace", "_plot", "_computed", "_update_count", "_generate_state_key", "_trainer", "_vec_normalize_env"}
OTHERS |= {"_current_progress_remaining", "_update_learning_rate", "_parameters_to_prune"}
# Attributes that exist on objects only: a module's and an optimizer's hooks, an operation's schema and saved numbers.
ON_OBJECTS = {"_forward_hooks", "_forward_pre_hooks", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}
ON_OBJECTS |= {"_schema", "_saved_other"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.expr) -> str:
    """``torch._C.f`` of the expression; the empty string where it does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def used(tree: ast.AST) -> set[str]:
    """The private names of torch in a source: written out, imported, or below an alias of ``torch.ops.aten``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name.startswith("_aten."):
                name = f"torch.ops.{name[1:]}"
            if name.startswith("torch."):
                found.add(name)
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if any(map(private, name.split(".")))}


def defined(tree: ast.AST) -> set[str]:
    """Every name that a source gives to something of its own."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


TREES = {path: ast.parse(path.read_text()) for path in SOURCES if path.name not in ELSEWHERE}


def test_every_private_name_that_a_source_writes_out_is_in_the_table():
    table = {*NAMES, *INDUCTOR}
    outside = {
        name
        for tree in TREES.values()
        for name in used(tree)
        if not any(entry == name or entry.startswith(name + ".") for entry in table)
    }
    assert outside == set()


def attributes_of_torch() -> set[str]:
    """The private attributes of the kinds of object that the package gets from torch."""
    weight = torch.nn.Parameter(torch.ones(2))
    node = (weight * weight).sum().grad_fn
    operation = torch.ops.aten.add.Tensor
    modules, optimizer = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.optim.SGD([weight], lr=0.1)
    storage, distribution = weight.untyped_storage(), torch.distributions.Normal(0.0, 1.0)
    objects = [weight, node, operation, modules, optimizer, storage, distribution, torch.Size(), torch.Generator()]
    return {name for thing in objects for name in dir(thing) if private(name)}


def test_every_private_attribute_of_an_object_is_ours_or_in_the_table():
    ours = set().union(*map(defined, TREES.values()))
    known = ours | ON_OBJECTS | {part for name in (*NAMES, *INDUCTOR) for part in name.split(".")}
    attributes = {
        node.attr
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and private(node.attr)
    }
    assert {"_backward_hooks", "_version", "_forward_hooks"} <= attributes & attributes_of_torch()
    assert (attributes & attributes_of_torch()) - known == set()


def test_no_name_of_the_table_is_there_in_vain():
    sources = "\n".join(path.read_text() for path in TREES if path.name != "_torch_names.py")
    words = set(re.findall(r"\w+", sources))
    last = {name: name.removesuffix(".default").rpartition(".")[2] for name in (*NAMES, *INDUCTOR)}
    assert [name for name, word in last.items() if word not in words] == []


def test_the_reader_of_sources_finds_what_it_looks_for():
    source = "import torch\nfrom torch._a import b\n_aten = torch.ops.aten\n_aten._c.default(torch._C._d)\ntorch.add"
    assert used(ast.parse(source)) == {
        "torch._a.b",
        "torch.ops.aten._c",
        "torch.ops.aten._c.default",
        "torch._C",
        "torch._C._d",
    }


def test_the_installed_torch_has_every_name():
    assert missing((*NAMES, *INDUCTOR)) == []


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("hesscale_lightning", "torch._C._will_engine_execute_node"),
        ("hesscale_lightning.optim", "torch._foreach_norm"),
        ("sb3_integration", "torch._subclasses.FakeTensorMode"),
    ],
)
def test_a_missing_name_is_one_clear_message_at_import(package, name):
    holder, _, attribute = name.rpartition(".")
    code = (
        f"import torch, torch._subclasses; del {holder}.{attribute}\n"
        f"try:\n    import {package}\nexcept ImportError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert found.startswith(f"hesscale_lightning {__version__} needs {name}, which the installed torch ")
    assert f"torch {SUPPORTED[0]} to {SUPPORTED[1]}" in found
    assert found.count("\n") == 1


def test_the_oldest_supported_torch_is_the_lower_bound_of_the_package():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (found,) = (requirement for requirement in map(Requirement, dependencies) if requirement.name == "torch")
    assert f">={SUPPORTED[0]}" in str(found.specifier).split(",")

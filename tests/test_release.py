"""What a release says about itself in several places is the same everywhere."""

import ast
import re
import runpy
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import hesscale_lightning
from hesscale_lightning._torch_names import SUPPORTED

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def workflow(name: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


@pytest.fixture
def noxfile(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The noxfile's names, whether nox is installed or not."""

    class Anything(types.ModuleType):
        options = types.SimpleNamespace()
        Session = object

        @staticmethod
        def session(*args: Any, **kwargs: Any) -> Any:
            return lambda function: function

        parametrize = session

    monkeypatch.setitem(sys.modules, "nox", Anything("nox"))
    return runpy.run_path(str(ROOT / "noxfile.py"))


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def test_the_version_is_that_of_the_changelog_and_the_citation():
    text = (ROOT / "CHANGELOG.md").read_text()
    (version, date), *_ = re.findall(r"^## \[(\d[^\]]*)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert version == hesscale_lightning.__version__
    assert text.index("## [Unreleased]") < text.index(f"## [{version}]")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()


def test_the_lower_bound_of_torch_is_the_oldest_that_the_matrix_tests(noxfile):
    tested = noxfile["TORCH"]
    assert (minor(tested[0]), minor(tested[-1])) == SUPPORTED
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"torch>={SUPPORTED[0]},<3" in dependencies
    assert noxfile["PINNED"] in tested
    assert len({minor(version) for version in tested}) == len(tested)


def test_the_workflow_tests_the_same_matrix(noxfile):
    matrix = workflow("tests")["jobs"]["matrix"]["strategy"]["matrix"]
    assert matrix["torch"] == noxfile["TORCH"]
    assert matrix["python"] == noxfile["PYTHON"]


def test_every_python_of_the_matrix_is_one_that_the_package_admits(noxfile):
    requires = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    assert all(python in requires for python in noxfile["PYTHON"])
    assert "3.10" not in requires


def test_the_nightly_torch_is_tested_every_week():
    nightly = workflow("nightly")
    (entry,) = nightly[True]["schedule"]  # YAML reads `on` as True
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", entry["cron"])
    assert any("nox -s nightly" in step.get("run", "") for step in nightly["jobs"]["nightly"]["steps"])


def test_only_the_job_that_publishes_may_ask_for_a_token():
    release = workflow("release")
    assert release["permissions"] == {"contents": "read"}
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "permissions" not in release["jobs"]["build"]
    (publish,) = [s for s in release["jobs"]["publish"]["steps"] if "gh-action-pypi-publish" in s.get("uses", "")]
    assert publish["with"]["attestations"] is True
    assert "password" not in publish["with"]
    assert release["jobs"]["publish"]["needs"] == "build"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_reads_only_and_has_time_limits(path):
    content = yaml.safe_load(path.read_text())
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["timeout-minutes"] <= 90
    assert not re.search(r"https?://", path.read_text())


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.name)
def test_an_issue_form_asks_for_something(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in asked)
    assert len({field["id"] for field in asked}) == len(asked)
    assert any(field.get("validations", {}).get("required") for field in asked)


def test_security_names_every_place_that_reads_a_pickle():
    """A call of torch.load or pickle in the packages is a line of the table, with the same weights_only."""
    found, readers = {}, ("torch.load", "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads")
    for room in ("hesscale_lightning", "sb3_integration"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in readers:
                    settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    found[str(path.relative_to(ROOT))] = settings.get("weights_only")
    assert found == {
        "hesscale_lightning/command_line/cli.py": "True",
        "sb3_integration/saved_policies.py": "not trusted",
    }
    page = (ROOT / "SECURITY.md").read_text()
    assert all(f"`{path}`" in page for path in found)


def test_every_path_and_link_of_the_pages_at_the_top_exists():
    for page in ("CONTRIBUTING.md", "SECURITY.md"):
        text = (ROOT / page).read_text()
        links = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`([\w./]+/[\w.]+\.\w+|[\w.]+/[\w./]*/)`", text)
        assert links
        assert [link for link in links if not (ROOT / link).exists()] == [], page

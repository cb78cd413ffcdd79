"""The documentation site: it builds without a warning, its inside links lead somewhere, it shows every public name."""

import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import hesscale_lightning
import hesscale_lightning.metrics
import sb3_integration

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-E", "-d", tmp_path / "trees"]
    built = subprocess.run([*command, DOCS, tmp_path / "site"], capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    assert script("check_links").broken_links(tmp_path / "site") == []
    readme = (tmp_path / "site" / "readme.html").read_text()
    assert "How close it is" in readme  # the file at the root, not the line that stands for it
    assert "Bases:" in (tmp_path / "site" / "api" / "optimizers.html").read_text()


@pytest.mark.parametrize(
    ("link", "says"),
    [
        ('<a href="other.html#there">', None),
        ('<a href="other.html#nowhere">', "no such anchor"),
        ('<a href="#nowhere">', "no such anchor"),
        ('<a href="#here" id="here">', None),
        ('<a href="missing.html">', "no such file"),
        ('<img src="missing.png">', "no such file"),
        ('<a href="folder/">', None),
        ('<a href="https://example.org/missing.html">', None),
    ],
)
def test_a_link_that_leads_to_nothing_is_found(link, says, tmp_path):
    (tmp_path / "page.html").write_text(f"<p>{link}</p>")
    (tmp_path / "other.html").write_text('<h2 id="there">There</h2>')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("<p></p>")
    found = script("check_links").broken_links(tmp_path)
    assert [line.rpartition(": ")[2] for line in found] == ([] if says is None else [says])


def test_a_site_without_pages_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a built site"):
        script("check_links").broken_links(tmp_path)


@pytest.mark.parametrize(
    ("folder", "page", "link", "becomes"),
    [
        ("docs", "cost", "[table](../README.md#what-it-costs)", "[table](readme.md#what-it-costs)"),
        ("docs", "cost", "[file](../examples/fsdp.py)", "[file](../examples/fsdp.py)"),
        ("docs", "cost", "[results](../examples/paper/results)", "results (`examples/paper/results/`)"),
        ("docs", "cost", "[page](models.md), [here](#curvature)", "[page](models.md), [here](#curvature)"),
        (
            ".",
            "readme",
            "![picture](docs/demo.png) [changes](CHANGELOG.md)",
            "![picture](demo.png) [changes](changelog.md)",
        ),
        ("docs/api", "api/trainer", "[page](../lightning.md)", "[page](../lightning.md)"),
        ("docs", "cost", "```python\nmodel[:2](x)\n```", "```python\nmodel[:2](x)\n```"),
        ("docs", "cost", "`a[0](b)`", "`a[0](b)`"),
        ("docs", "cost", "[site](https://example.org/a.md)", "[site](https://example.org/a.md)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(folder, page, link, becomes):
    pytest.importorskip("sphinx")
    assert script("conf").links_of_site(link, ROOT / folder, page) == becomes


@pytest.mark.parametrize(
    "link", ["[gone](gone.md)", "![gone](gone.png)", "[gone](../gone.py)", "[gone](models.md#gone)"]
)
def test_a_page_that_links_to_nothing_cannot_be_built(link, tmp_path):
    pytest.importorskip("sphinx")
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "conf.py", tmp_path / "docs")
    (tmp_path / "docs" / "models.md").write_text("# Models\n")
    (tmp_path / "docs" / "index.md").write_text(f"# Index\n\n{link}\n\n```{{toctree}}\nmodels\n```\n")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-D", "html_static_path="]
    built = subprocess.run([*command, tmp_path / "docs", tmp_path / "site"], capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 1
    assert "index.md:3: WARNING" in built.stderr


def test_the_reference_shows_every_public_name():
    shown = set()
    for page in (DOCS / "api").glob("*.md"):
        module = ""
        for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)$", page.read_text(), re.MULTILINE):
            if kind == "currentmodule":
                module = name
            else:
                shown.add(f"{module}.{name}")
    public = {f"hesscale_lightning.{name}" for name in hesscale_lightning.__all__ if name != "__version__"}
    public |= {f"sb3_integration.{name}" for name in sb3_integration.__all__}
    public |= {
        f"hesscale_lightning.metrics.{name}"
        for name in hesscale_lightning.metrics.__all__
        if name != "STATISTICS" and name not in hesscale_lightning.__all__
    }
    assert public - shown == set()


def test_the_gallery_shows_every_picture():
    gallery = (DOCS / "gallery.md").read_text()
    assert [picture.name for picture in DOCS.glob("*.png") if f"({picture.name})" not in gallery] == []


def test_a_published_version_stays_when_another_is_added(tmp_path):
    publish = script("publish").publish
    built, site = tmp_path / "built", tmp_path / "site"
    built.mkdir()
    for version in ("0.9.0", "0.10.0", "main", "0.9.0"):
        (built / "index.html").write_text(version)
        publish(built, site, version)
    assert {name: (site / name / "index.html").read_text() for name in ("0.9.0", "0.10.0", "main")} == {
        "0.9.0": "0.9.0",
        "0.10.0": "0.10.0",
        "main": "main",
    }
    assert re.findall(r'href="([^/]*)/', (site / "index.html").read_text()) == ["0.10.0", "0.9.0", "main"]


@pytest.mark.parametrize("version", ["../elsewhere", "latest", ""])
def test_only_versions_are_published(version, tmp_path):
    (tmp_path / "index.html").write_text("")
    with pytest.raises(ValueError, match=re.escape(f"found the version {version!r}")):
        script("publish").publish(tmp_path, tmp_path / "site", version)
    with pytest.raises(FileNotFoundError, match="expected a built site"):
        script("publish").publish(tmp_path / "nothing", tmp_path / "site", "0.2.0")
    assert not (tmp_path / "site").exists()

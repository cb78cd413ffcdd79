"""The code in the documentation runs as it stands there."""

from __future__ import annotations

import gc
import json
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_the_page_runs(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": page.stem}
    gc.collect()  # a page counts garbage after one pass of its own; pictures that earlier tests drew take two
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_that_of_its_page_and_its_cells_run(path: Path) -> None:
    script = runpy.run_path(str(DOCS / "notebook.py"))
    page = path.with_suffix(".md")
    notebook = json.loads(path.read_text())
    assert notebook == script["notebook_of"](page.read_text()), f"run python docs/notebook.py docs/{page.name}"
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) == page.read_text().count("```python")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for source in code:
        exec(compile(source, path.name, "exec"), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS

"""Makes the notebook of a page: ``python docs/notebook.py docs/tour_lightning.md``.

Python blocks become code cells, all the rest Markdown cells. The page is what is edited; a test asserts that the
notebook is this page's, and runs its cells.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any


def notebook_of(page: str) -> dict[str, Any]:
    """The notebook (nbformat 4.5) of a page.

    Args:
        page: Markdown. Links to the notebook itself are left out.
    """
    page = re.sub(r"^.*\.ipynb\).*\n\n?", "", page, flags=re.MULTILINE)
    parts = re.split(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    cells: list[dict[str, Any]] = []
    for position, text in enumerate(parts):
        if not text.strip():
            continue
        cell: dict[str, Any] = {"id": f"cell-{len(cells)}", "metadata": {}}
        cell["source"] = text.strip("\n").splitlines(keepends=True)
        if position % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            cell["cell_type"] = "markdown"
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def write(page: Path) -> Path:
    """Writes the notebook beside its page."""
    path = page.with_suffix(".ipynb")
    path.write_text(json.dumps(notebook_of(page.read_text()), indent=1, ensure_ascii=False) + "\n")
    return path


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(write(Path(name)))  # noqa: T201

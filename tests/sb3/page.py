"""The parts of docs/reinforcement_learning.md that commands write, each between a pair of markers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "reinforcement_learning.md"


def on_page(name: str, page: Path = PAGE) -> str:
    """What the page has between the markers of a part."""
    found = re.search(f"<!-- generated: {name} -->\n(.*?)<!-- end -->", page.read_text(), flags=re.DOTALL)
    if found is None:
        raise ValueError(f"{page} has no text between <!-- generated: {name} --> and <!-- end -->")
    return found[1]


def write(name: str, make: Callable[[], str], description: str | None) -> None:
    """The command of a part: prints it, or replaces it in the page that ``--write`` names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="page whose table is replaced; without it the table is printed")
    page = parser.parse_args().write
    torch.set_num_threads(1)
    text = make()
    if page is None:
        print(text)  # noqa: T201
    else:
        start = f"<!-- generated: {name} -->\n"
        page.write_text(page.read_text().replace(f"{start}{on_page(name, page)}", f"{start}{text}"))

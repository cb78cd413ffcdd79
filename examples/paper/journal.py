"""What the long studies share: a journal of finished runs, results kept as JSON, and pages that quote them."""

import argparse
import json
import os
import platform
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch


class Journal:
    """Finished runs, each a line of JSON that is on the disk before the next one begins.

    Args:
        path: the file; one of an earlier call is continued.
        identity: what all runs have in common, so that no run of other settings is mixed in.

    Raises:
        ValueError: if the file holds runs of another identity.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for line in lines:
            if "identity" in line and line["identity"] != identity:
                raise ValueError(
                    f"{path} holds runs with {line['identity']}, expected {identity}: give another --folder, or "
                    "delete it."
                )
        self.runs: dict[Hashable, Any] = {_hashable(line["run"]): line["found"] for line in lines if "run" in line}
        if not lines:
            self._append(identity=identity)

    def note(self, run: Any, found: Any) -> None:
        """Keep what a run found."""
        self.runs[_hashable(run)] = found
        self._append(run=run, found=found)

    def _append(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _hashable(run: Any) -> Hashable:
    return tuple(run) if isinstance(run, list) else run


def arguments(description: str | None, folder: str) -> argparse.ArgumentParser:
    """The options that all studies have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes' worth of it, beside the full results")
    parser.add_argument("--report", action="store_true", help="run nothing, read the results that are there")
    parser.add_argument("--folder", type=Path, default=Path(folder), help="finished runs, from which a call resumes")
    parser.add_argument("--results", type=Path, help="the results, as JSON (with --quick: results.json in the folder)")
    parser.add_argument("--picture", type=Path, help="the picture (with --quick: picture.png in the folder)")
    parser.add_argument("--write", type=Path, help="also replace the tables in this page")
    return parser


def settle(options: argparse.Namespace, results: str, picture: str) -> argparse.Namespace:
    """Fill in the paths that were not given; a quick run never touches the full one's."""
    if options.quick:
        options.folder = options.folder.with_name(options.folder.name + "_quick")
    options.results = options.results or (options.folder / "results.json" if options.quick else Path(results))
    options.picture = options.picture or (options.folder / "picture.png" if options.quick else Path(picture))
    return options


def environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "machine": f"{platform.machine()}, 1 of {os.cpu_count()} cores",
    }


def rounded(value: Any, digits: int = 4) -> Any:
    """Keep four significant digits of every number."""
    if isinstance(value, dict):
        return {name: rounded(inner, digits) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner, digits) for inner in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def save(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON; ``runs``, a dictionary of dictionaries, gets one line for each inner entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in results.items() if name != "runs"}
    groups = []
    for name, runs in results["runs"].items():
        rows = [f"   {json.dumps(key)}: {json.dumps(found, separators=(',', ':'))}" for key, found in runs.items()]
        groups.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    head = json.dumps(rest, indent=1).removesuffix("\n}")
    path.write_text(head + ',\n "runs": {\n' + ",\n".join(groups) + "\n }\n}\n")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def block(page: Path, name: str) -> str:
    """What stands between the marks of ``name`` in a page."""
    return page.read_text().split(f"<!-- benchmark: {name} -->\n")[1].split("<!-- end -->")[0].strip()


def write_block(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of ``name`` in a page."""
    start, end = f"<!-- benchmark: {name} -->\n", "<!-- end -->"
    before, rest = page.read_text().split(start)
    page.write_text(before + start + "\n" + text + "\n\n" + end + rest.split(end, 1)[1])

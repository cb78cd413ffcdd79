"""The table of supported operations in the documentation, made from the registered rules.

python -m hesscale_lightning.curvature.operations [--write]
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from hesscale_lightning.curvature.registry import Rule, registered_rules

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
_START, _END = "<!-- generated: operations -->\n", "<!-- end -->"


def operations_table() -> str:
    """A Markdown table of every built-in rule: family, autograd nodes, what the rule says of itself."""
    families: dict[str, dict[str, list[str]]] = {}
    for name, rule in registered_rules().items():
        family, text = _describe(rule)
        if family:
            families.setdefault(family, {}).setdefault(text, []).append(
                name.removesuffix("Backward0").removesuffix("Backward")
            )
    lines = ["| family | operations (autograd nodes) | rule |", "|---|---|---|"]
    for family, rows in sorted(families.items()):
        for text, names in rows.items():
            lines.append(f"| {family} | {', '.join(names)} | {text} |")
    return "\n".join(lines) + "\n"


def _describe(rule: Rule) -> tuple[str, str]:
    source = rule.function
    module = source.__module__
    if not module.startswith("hesscale_lightning.curvature.rules."):
        return "", ""
    document = inspect.getdoc(source) or inspect.getdoc(sys.modules[module]) or ""
    text = " ".join(document.split("\n\n")[0].split()).replace("|", "\\|")
    return module.rsplit(".", 1)[1], text


def main() -> None:
    """Prints the table, or writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"replace the table in {PAGE.name}")
    if not parser.parse_args().write:
        sys.stdout.write(operations_table())
        return
    page = PAGE.read_text()
    before, rest = page.split(_START)
    PAGE.write_text(before + _START + operations_table() + _END + rest.split(_END)[1])


if __name__ == "__main__":
    main()

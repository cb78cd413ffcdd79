"""The table of the policies' defaults, for the documentation.

python -m tests.sb3.defaults_table --write docs/reinforcement_learning.md
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from sb3_integration import defaults

PAGE = Path(__file__).parents[2] / "docs" / "reinforcement_learning.md"
START, END = "<!-- generated: defaults -->", "<!-- end -->"
FAMILIES = {
    "PPO and its relatives, TRPO": defaults.PPO,
    "A2C": defaults.A2C,
    "DQN, QR-DQN": defaults.DQN,
    "SAC, TD3, DDPG, TQC, CrossQ": defaults.ACTOR_CRITIC_OFF_POLICY,
}


def table() -> str:
    """A row for every family of algorithms."""
    options = sorted({name for family in FAMILIES.values() for name in (*family.optimizer_kwargs, *family.critic)})
    lines = [f"| algorithms | method | {' | '.join(options)} |", "|---" * (2 + len(options)) + "|"]
    for name, family in FAMILIES.items():
        cells = []
        for option in options:
            value = f"{family.optimizer_kwargs[option]:g}" if option in family.optimizer_kwargs else "AdaHesScale's"
            if option in family.critic:
                value += f" (critic {family.critic[option]:g})"
            cells.append(value)
        lines.append(f"| {name} | {family.method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def on_page(page: Path = PAGE) -> str:
    """The table as the page has it."""
    found = re.search(f"{START}\n(.*?){END}", page.read_text(), flags=re.DOTALL)
    if found is None:
        raise ValueError(f"{page} has no text between {START} and {END}")
    return found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="page whose table is replaced; without it the table is printed")
    page = parser.parse_args().write
    if page is None:
        print(table())  # noqa: T201
    else:
        page.write_text(page.read_text().replace(f"{START}\n{on_page(page)}{END}", f"{START}\n{table()}{END}"))


if __name__ == "__main__":
    main()

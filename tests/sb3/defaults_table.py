"""The table of the policies' defaults, for the documentation.

python -m tests.sb3.defaults_table --write docs/reinforcement_learning.md
"""

from __future__ import annotations

from sb3_integration import defaults
from tests.sb3.page import write

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


if __name__ == "__main__":
    write("defaults", table, __doc__)

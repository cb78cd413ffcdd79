"""The table of the policies' defaults, for the documentation.

python -m tests.sb3.defaults_table --write docs/reinforcement_learning.md
"""

from __future__ import annotations

from typing import Any

from sb3_integration import defaults
from tests.sb3.page import write

FAMILIES = {
    'PPO and its relatives, radius="kl"': defaults.PPO_KL,
    'A2C, radius="kl"': defaults.A2C_KL,
    'PPO and its relatives, radius="loss"; TRPO': defaults.PPO,
    'A2C, radius="loss"': defaults.A2C,
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
            value = text(family.optimizer_kwargs[option]) if option in family.optimizer_kwargs else "AdaHesScale's"
            others = {"critic": family.critic, "shared": family.features}
            own = [f"{network} {text(found[option])}" for network, found in others.items() if option in found]
            cells.append(value + (f" ({', '.join(own)})" if own else ""))
        lines.append(f"| {name} | {family.method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text(value: Any) -> str:
    """Numbers in short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    write("defaults", table, __doc__)

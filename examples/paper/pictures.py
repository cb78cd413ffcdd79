"""What the studies' pictures share: colours, axes with plain numbers, and labels that find their place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

INK, MUTED = "#1a1a2e", "#77778a"
# Told apart by colour-blind readers (Okabe and Ito).
BLUE, SKY, ORANGE, GREEN, PURPLE = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#aa4499"


def prepare() -> None:
    plt.rcParams.update({"font.size": 11, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK})


def plain(axis: Any, ticks: list[float]) -> None:
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@dataclass(frozen=True)
class Label:
    """A text, the point that it belongs to, and another point that it must not cover."""

    text: str
    color: str
    point: tuple[float, float]
    other: tuple[float, float]


# By horizontal offset in points: alignment of the text, and where along it the line to the point begins.
SIDES = {
    0: ("center", 0.5),
    9: ("left", 0.1),
    -9: ("right", 0.9),
    40: ("left", 0.0),
    -40: ("right", 1.0),
    80: ("left", 0.0),
}
BESIDE = [(9, 0.0), (-9, 0.0)]
# Nearest first; what is not beside its point gets a line, which is best short and steep.
OFFSETS = BESIDE + sorted(
    ((dx, sign * 12.5 * level) for level in range(1, 13) for sign in (1, -1) for dx in SIDES),
    key=lambda offset: abs(offset[1]) + 0.7 * abs(offset[0]),
)


def place(labels: list[Label], axis: Axes) -> None:
    """Write each label as near to its point as it fits beside points, other labels, and the lines to them."""
    half = 5 * axis.figure.dpi / 72
    points = [axis.transData.transform(point) for label in labels for point in (label.point, label.other)]
    covered = [around(*point, half) for point in points]
    taken = [text.get_window_extent() for text in axis.texts]
    for label in labels:
        for offset in OFFSETS:
            note, boxes = write(label, offset, axis)
            inside = axis.bbox.x0 < boxes[0].x0 and boxes[0].x1 < axis.bbox.x1
            free = not any(box.overlaps(other) for box in boxes for other in taken)
            if inside and free and not any(boxes[0].overlaps(point) for point in covered):
                break
            note.remove()
        else:  # no room anywhere: beside the point is better than nowhere
            note, boxes = write(label, OFFSETS[0], axis)
        taken += boxes


def write(label: Label, offset: tuple[int, float], axis: Axes) -> tuple[Text, list[Bbox]]:
    """Write a label, with a line to its point if it is far; returns it, its box, and boxes along the line."""
    dx, dy = offset
    alignment, foot = SIDES[dx]
    line = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4, "color": label.color}
    far = abs(dy) > 15 or abs(dx) > 9
    note = axis.annotate(
        label.text,
        label.point,
        offset,
        textcoords="offset points",
        ha=alignment,
        va="center",
        color=label.color,
        fontsize=9.5,
        arrowprops=line | {"relpos": (foot, float(dy < 0))} if far else None,
    )
    note.update_positions(axis.figure.canvas.get_renderer())
    box = Text.get_window_extent(note)
    x, y = axis.transData.transform(label.point)
    to_x, to_y = box.x0 + foot * box.width, box.y1 if dy < 0 else box.y0
    shares = (0.4, 0.55, 0.7, 0.85) if far else ()
    return note, [box, *(around(x + share * (to_x - x), y + share * (to_y - y), 2) for share in shares)]


def around(x: float, y: float, reach: float) -> Bbox:
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)

"""Draw docs/gspn.png, the README's picture: the three-neighbour recurrence and the four directions it is run in.

python tools/make_figure.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]

INK, FAINT, INPUT = "#22303c", "#e6ebf0", "#5f8a58"
DONE, DONE_DARK = "#b9d3ea", "#2f6ea5"
NOW, NOW_FAINT = "#f2a65a", "#fadcbc"
DIRECTIONS = ("left_to_right", "right_to_left", "top_to_bottom", "bottom_to_top")
CELL = 0.86  # side of a drawn pixel, of a grid of unit pitch


def cell(axes: Axes, x: float, y: float, face: str, edge: str = "white", width: float = 1.0) -> None:
    """Draw the pixel centred on (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - CELL / 2, y - CELL / 2),
            CELL,
            CELL,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=face,
            edgecolor=edge,
            linewidth=width,
        )
    )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, width: float = 2.0) -> None:
    """Draw an arrow between two points."""
    style = "-|>,head_length=6,head_width=3.5"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle=style, color=color, linewidth=width, shrinkA=0, shrinkB=0, zorder=3)
    )


def recurrence(axes: Axes) -> None:
    """Draw one step: three neighbours of line i-1 and the pixel itself give the state at (i, j)."""
    columns, target, above = 7, 3, 1.9
    for x in range(columns):
        cell(axes, x, above + 1.15, DONE)
        if abs(x - target) > 1:
            cell(axes, x, above, DONE)
        if x != target:
            cell(axes, x, 0, NOW_FAINT)
    cell(axes, target, 0, NOW, INK, 1.6)
    for k, label, beside in ((-1, "$w_{-1}$", -1.2), (0, "$w_0$", 0.26), (1, "$w_{+1}$", 1.2)):
        x = target + k
        cell(axes, x, above, DONE_DARK)
        axes.text(x, above, ("$j-1$", "$j$", "$j+1$")[k + 1], color="white", ha="center", va="center", fontsize=12)
        arrow(axes, (x, above - CELL / 2 - 0.04), (target + 0.27 * k, CELL / 2 + 0.05), DONE_DARK)
        axes.text(target + beside, 1.13, label, color=DONE_DARK, ha="center", va="center", fontsize=13)
    axes.text(target, 0, "$h_{i,j}$", ha="center", va="center", fontsize=14, color=INK)
    axes.add_patch(Circle((target, -1.5), 0.42, facecolor=INPUT, edgecolor="none"))
    axes.text(target, -1.5, "$x_{i,j}$", color="white", ha="center", va="center", fontsize=13)
    arrow(axes, (target, -1.05), (target, -CELL / 2 - 0.06), INPUT)
    axes.text(target + 0.25, -0.78, r"$\lambda_{i,j}$", color=INPUT, ha="left", va="center", fontsize=13)
    for y, label in ((above + 1.15, "line $i-2$"), (above, "line $i-1$"), (0.0, "line $i$")):
        axes.text(-0.75, y, label, ha="right", va="center", fontsize=11, color=INK)
    equation = r"$h_{i,j}\;=\;\sum_{k\in\{-1,0,+1\}}\, w_k\,h_{i-1,\,j+k}\;+\;\lambda_{i,j}\,x_{i,j}$"
    axes.text(-2.3, -2.95, equation, ha="left", va="center", fontsize=14, color=INK)
    axes.text(columns - 0.5, -2.95, r"$y\;=\;\sum_d\, u_d\, h_d$", ha="right", va="center", fontsize=14, color=INK)
    axes.set_xlim(-2.45, columns - 0.4)
    axes.set_ylim(-3.6, above + 1.75)


def direction(axes: Axes, title: str, step: tuple[int, int]) -> None:
    """Draw an image of 6 x 6 pixels whose first three lines are done; `step` is the scan's direction in (x, y)."""
    size, current = 6, 3
    horizontal, sign = step[0] != 0, sum(step)
    for row in range(size):
        for column in range(size):
            along = column if horizontal else row
            line = along if sign > 0 else size - 1 - along
            cell(axes, column, row, DONE if line < current else NOW if line == current else FAINT)
    now = current if sign > 0 else size - 1 - current
    for position in (1, 2.5, 4):
        start, end = now - 2.6 * sign, now - 0.52 * sign
        if horizontal:
            arrow(axes, (start, position), (end, position), DONE_DARK)
        else:
            arrow(axes, (position, start), (position, end), DONE_DARK)
    axes.set_title(title, fontsize=11, color=INK, pad=4)
    axes.set_xlim(-0.6, size - 0.4)
    axes.set_ylim(size - 0.4, -0.6)  # rows count downwards


def legend(axes: Axes) -> None:
    """Say what the colours mean."""
    for x, face, text in ((0.5, DONE, "done"), (4.6, NOW, "line of this step"), (12.9, FAINT, "to come")):
        cell(axes, x, 0, face)
        axes.text(x + 0.8, -0.06, text, ha="left", va="center", fontsize=10, color=INK)
    axes.set_xlim(-0.6, 17.1)
    axes.set_ylim(-0.6, 0.6)


def draw(file: Path) -> None:
    """Write the picture."""
    with mpl.rc_context({"mathtext.fontset": "cm", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(10, 4.7), dpi=140, facecolor="white")
        left = figure.add_axes((0.0, 0.02, 0.56, 0.96))
        recurrence(left)
        panels = [figure.add_axes((0.58 + 0.205 * (i % 2), 0.545 - 0.435 * (i // 2), 0.19, 0.375)) for i in range(4)]
        steps = ((1, 0), (-1, 0), (0, 1), (0, -1))
        for axes, title, step in zip(panels, DIRECTIONS, steps, strict=True):
            direction(axes, title, step)
        key = figure.add_axes((0.575, 0.015, 0.415, 0.06))
        legend(key)
        for axes in (left, *panels, key):
            axes.set_aspect("equal")
            axes.axis("off")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "gspn.png")

"""The figure of the method: the two levels, with the losses and the schedule between them.

python docs/method_figure.py docs/method.svg

The shades of the two matrices are an illustration, not a measurement.
"""

import sys

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, MUTED, PAPER, EDGE = "#1c2127", "#5b6570", "#fefefe", "#c9d0d8"
BLUE, ORANGE, PURPLE = "#0067a6", "#c2570a", "#a8477f"
PALE_BLUE, PALE_ORANGE = "#e9f2f8", "#fbefe3"

# Five samples, four tasks: the fourth target label is wrong, and the last task does not help.
LOSSES = [[0.30, 0.35, 0.20, 0.62], [0.18, 0.25, 0.42, 0.66], [0.35, 0.20, 0.30, 0.58]]
LOSSES += [[0.95, 0.30, 0.22, 0.70], [0.25, 0.40, 0.32, 0.60]]
WEIGHTS = [[0.80, 0.55, 0.42, 0.08], [0.95, 0.62, 0.38, 0.10], [0.75, 0.68, 0.44, 0.07]]
WEIGHTS += [[0.05, 0.58, 0.46, 0.09], [0.88, 0.50, 0.48, 0.10]]
CELL = 0.36
TOP = 4.34  # of both matrices


def draw():
    figure = Figure(figsize=(11.4, 5.6))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 11.4), ylim=(0, 5.6))
    axes.axis("off")

    def box(x, y, width, height, edge, face=PAPER, line=1.5, corner=0.10, order=2):
        style = f"round,pad=0,rounding_size={corner}"
        patch = FancyBboxPatch((x, y), width, height, style, ec=edge, fc=face, lw=line)
        axes.add_patch(patch).set_zorder(order)

    def write(x, y, text, color=INK, size=10.5, **options):
        options = {"ha": "center", "va": "center", "linespacing": 1.35, **options}
        axes.text(x, y, text, color=color, fontsize=size, zorder=5, **options)

    def arrow(color, *points, dashed=False):
        """Straight pieces through ``points``, with a head at the last one."""
        style = {"lw": 1.8, "ls": (0, (3.5, 2.2)) if dashed else "-", "zorder": 3}
        axes.plot(*zip(*points[:-1], strict=True), color=color, solid_joinstyle="round", **style)
        head = "-|>,head_length=6,head_width=3.2"
        ends = {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 1}
        axes.add_patch(FancyArrowPatch(*points[-2:], arrowstyle=head, color=color, **ends, **style))

    def matrix(x, title, values, color):
        for i, row in enumerate(values):
            for k, value in enumerate(row):
                corner = (x + k * CELL, TOP - (i + 1) * CELL)
                axes.add_patch(Rectangle(corner, CELL, CELL, fc=PAPER, lw=0))
                axes.add_patch(Rectangle(corner, CELL, CELL, fc=color, alpha=value, lw=0))
                axes.add_patch(Rectangle(corner, CELL, CELL, fc="none", ec=EDGE, lw=0.8))
        height = len(values) * CELL
        target = Rectangle((x, TOP - height), CELL, height, fc="none", ec=INK, lw=1.7)
        axes.add_patch(target).set_zorder(4)
        write(x + 2 * CELL, TOP + 0.45, title, size=11, weight="bold")
        write(x + CELL / 2, TOP + 0.13, "target", MUTED, 8)
        write(x + 2.5 * CELL, TOP + 0.13, "auxiliary", MUTED, 8)

    box(0.03, 0.03, 11.34, 5.54, EDGE, PAPER, 1.0, 0.16, 0)
    box(0.20, 2.38, 11.0, 3.02, "none", PALE_BLUE, 0, 0.12, 1)
    box(0.20, 0.20, 11.0, 1.22, "none", PALE_ORANGE, 0, 0.12, 1)

    # The lower level, from left to right and back.
    middle = TOP - 2.5 * CELL
    write(0.40, 5.13, "Lower level: every step", BLUE, 11.5, ha="left", weight="bold")
    box(0.40, middle - 0.52, 1.50, 1.04, BLUE)
    write(1.15, middle, "training batch\n$B$ samples\nwith $K$ labels", size=9.8)
    box(2.45, 0.45, 1.35, 4.05, INK)
    write(3.125, 2.48, "task model\n" + r"$\theta$", size=11.5, weight="bold")
    matrix(4.75, r"losses $L$", LOSSES, PURPLE)
    matrix(6.95, r"schedule $W$", WEIGHTS, BLUE)
    write(6.57, middle, r"$\times$", size=17)
    box(9.15, middle - 0.55, 1.85, 1.10, BLUE)
    write(10.075, middle + 0.29, "scheduled loss", size=10.5, weight="bold")
    write(10.075, middle - 0.16, r"$\frac{1}{B}\,\sum_{i,k}\,W_{ik}\,L_{ik}$", size=13)
    arrow(BLUE, (1.90, middle), (2.45, middle))
    arrow(BLUE, (3.80, middle), (4.72, middle))
    arrow(BLUE, (6.95 + 4 * CELL, middle), (9.15, middle))
    arrow(BLUE, (10.075, middle + 0.55), (10.075, 5.10), (3.125, 5.10), (3.125, 4.50))
    write(6.57, 5.24, r"gradient step on $\theta$; $W$ is constant", BLUE, 10)
    for x in (4.64, 6.84):
        write(x, TOP - 3.5 * CELL, "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}", INK, 12)
    note = "\N{BLACK RIGHT-POINTING SMALL TRIANGLE} wrong target label:\nhigh loss, low weight"
    write(9.15, 2.65, note, MUTED, 9, ha="left")

    # The scheduler.
    box(5.10, 1.62, 2.94, 0.56, INK)
    write(6.57, 1.90, r"scheduler $\varphi$", size=11.5, weight="bold")
    arrow(MUTED, (3.80, 1.90), (5.10, 1.90), dashed=True)
    write(4.43, 2.07, r"features", MUTED, 9)
    arrow(MUTED, (4.75 + 2 * CELL, TOP - 5 * CELL), (4.75 + 2 * CELL, 2.18), dashed=True)
    arrow(BLUE, (6.95 + 2 * CELL, 2.18), (6.95 + 2 * CELL, TOP - 5 * CELL))

    # The upper level, from left to right and up.
    title = "Upper level:\nevery few steps"
    write(0.40, 1.73, title, ORANGE, 11.5, ha="left", weight="bold")
    box(0.40, 0.42, 1.50, 0.78, ORANGE)
    write(1.15, 0.81, "development set\nfew clean labels", size=9.8)
    arrow(ORANGE, (1.90, 0.81), (2.45, 0.81))
    arrow(ORANGE, (3.80, 0.81), (4.60, 0.81))
    box(4.60, 0.42, 1.95, 0.78, ORANGE)
    write(5.575, 0.81, "loss of the\ntarget task", size=10.5, weight="bold")
    arrow(ORANGE, (6.55, 0.81), (7.15, 0.81))
    box(7.15, 0.42, 3.85, 0.78, ORANGE)
    write(9.075, 0.98, "implicit gradient", size=10.5, weight="bold")
    write(9.075, 0.64, r"how $\theta$ would respond to $\varphi$", size=9.8)
    arrow(ORANGE, (9.075, 1.20), (9.075, 1.90), (8.04, 1.90))
    write(9.20, 1.64, r"step on $\varphi$", ORANGE, 10, ha="left")
    return figure


if __name__ == "__main__":
    same = {"metadata": {"Date": None}} if sys.argv[1].endswith(".svg") else {}  # no date
    with rc_context({"svg.hashsalt": "method", "mathtext.fontset": "dejavusans"}):
        draw().savefig(sys.argv[1], transparent=True, dpi=144, **same)

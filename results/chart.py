"""The chart of results/: the accuracy of every method, by data set and labels.

python results/chart.py results/digits_narrow results/tumours results/accuracy.svg

A folder holds the TABLE.csv of tables 2 to 4. Grey: baselines.
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from auxilearn.report.style import COLOURS, STYLE  # noqa: E402
from auxilearn.tables.protocol import BASELINE, rows  # noqa: E402

SETTINGS = {
    "supervised": "clean",
    "semi": "5 labels\nper class",
    "corrupted_0.4": "40 %\nredrawn",
    "corrupted_0.6": "60 %\nredrawn",
    "pair_0.4": "40 % to the\nnext class",
}
MARKED = {
    "single": ("ink", "x", "target task alone"),
    "joint": ("orange", "D", "JTDS"),
    "joint_stable": ("blue", "o", "JTDS, stable form"),
}


def accuracies(folder):
    """Mean test accuracies in per cent: a row per method, a column per setting."""
    paths = [*folder.glob("table?.csv"), *folder.glob("table?_pair.csv")]
    cells = pd.concat(map(pd.read_csv, paths))
    return cells.pivot(index="row", columns="setting", values="mean").reindex(columns=SETTINGS)


def draw(axes, means):
    places = range(len(SETTINGS))
    baselines = [row for row in means.index if rows()[row].kind == BASELINE]
    dash = {"color": "#8a949e", "ms": 13, "mew": 1.6}
    axes.plot(places, means.loc[baselines].T, "_", **dash)
    axes.plot([], [], "_", **dash, label=f"{len(baselines)} baselines")
    for row, (colour, marker, label) in MARKED.items():
        values = means.loc[row]
        axes.plot(places, values, marker, color=COLOURS[colour], ms=6.5, mew=1.6, label=label)
    axes.set_xticks(places, SETTINGS.values(), fontsize=8)
    axes.set_xlim(-0.5, len(SETTINGS) - 0.5)
    axes.grid(axis="x", visible=False)


def main(*arguments):
    *folders, path = map(Path, arguments)
    with rc_context({**STYLE, "svg.hashsalt": "accuracy"}):
        figure = Figure(figsize=(4.1 * len(folders), 3.6), layout="constrained")
        panels = figure.subplots(1, len(folders), squeeze=False)[0]
        for axes, folder in zip(panels, folders, strict=True):
            draw(axes, accuracies(folder))
            axes.set_title(folder.name.replace("_", ", "), loc="left", fontsize=10)
        panels[0].set_ylabel("test accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=2 * len(folders), fontsize=9
        )
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])

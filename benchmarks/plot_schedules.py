"""How schedules evolve in training: a figure of several runs, side by side.

  python benchmarks/plot_schedules.py --out schedules.png "JTDS=bird_record/noisy/released" \
      "stable form=bird_record/noisy/stable"

Four panels over the lower steps: the target's mean weight; the median target weight of wrong labels
as a share of that of right ones (runs with --corrupted 1); the norm of the hypergradient, filled
where it was clipped; validation accuracy.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from auxilearn.files import read_rows  # noqa: E402
from auxilearn.run.record import SCHEDULE_FILE  # noqa: E402

MEDIAN = 2  # of the five quantiles in schedule.jsonl


def of_kind(rows, kind):
    return [row for row in rows if row.get("kind") == kind]


def series(directory):
    """{panel: (lower steps, values)} of a run, and which hypergradients were clipped."""
    metrics = read_rows(Path(directory) / "metrics.jsonl")
    schedule = of_kind(read_rows(Path(directory) / SCHEDULE_FILE), "schedule")
    if not metrics or not schedule:
        raise SystemExit(
            f"error: {directory}: no metrics.jsonl and schedule.jsonl of a bilevel run"
        )
    upper, epochs = of_kind(metrics, "upper"), of_kind(metrics, "epoch")
    ratio = [
        row["target_weight"]["corrupted"][MEDIAN] / row["target_weight"]["clean"][MEDIAN]
        for row in schedule
        if "corrupted" in row["target_weight"]
    ]
    steps = [row["step"] for row in schedule]
    return {
        "weight": (steps, [row["mean_weight"][0] for row in schedule]),
        "ratio": (steps, ratio) if len(ratio) == len(steps) else ([], []),
        "norm": ([r["step"] for r in upper], [r["hypergradient_norm"] for r in upper]),
        "accuracy": ([r["step"] for r in epochs], [100 * r["valid_accuracy"] for r in epochs]),
    }, np.array([r["clipped"] for r in upper], dtype=bool)


PANELS = {
    "weight": "mean weight of the target task",
    "ratio": "wrong labels' weight / right labels' (medians)",
    "norm": "norm of the hypergradient",
    "accuracy": "validation accuracy (%)",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="LABEL=DIR")
    parser.add_argument("--out", required=True, help="image file: .png or .svg")
    args = parser.parse_args()
    try:
        import matplotlib
        from matplotlib.figure import Figure

        from auxilearn.report.style import COLOURS, MARKERS, SERIES, STYLE
    except ImportError:
        raise SystemExit(
            "error: needs matplotlib: pip install -r requirements-report.txt"
        ) from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = dict(zip(PANELS, figure.subplots(2, 2).flat, strict=True))
        for number, run in enumerate(args.runs):
            label, _, directory = run.partition("=")
            found, clipped = series(directory)
            colour = COLOURS[SERIES[number % len(SERIES)]]
            for panel, (steps, values) in found.items():
                if panel == "norm":
                    style = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "ms": 3}
                    steps, values = np.array(steps), np.array(values, dtype=float)
                    axes[panel].plot(steps[~clipped], values[~clipped], ls="", mfc="none", **style)
                    axes[panel].plot(steps[clipped], values[clipped], ls="", **style)
                else:
                    axes[panel].plot(steps, values, color=colour, label=label)
        for panel, title in PANELS.items():
            axes[panel].set_title(title)
            axes[panel].set_xlabel("lower step")
            if panel in ("weight", "norm"):
                axes[panel].set_yscale("log")
                axes[panel].yaxis.set_major_formatter("{x:g}")
        axes["ratio"].axhline(1, color=COLOURS["muted"], ls="--", lw=1)
        axes["accuracy"].legend()
        figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()

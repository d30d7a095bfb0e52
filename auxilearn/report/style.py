"""How the report's charts look: colours, type, scales, and the SVG that goes into a page.

Importing this module imports matplotlib.
"""

import re

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

# Every colour occurs once, so that a page can put variables of its own in their places. The six of
# the data are Okabe and Ito's, darkened until each stands out from white.
COLOURS = {
    "ink": "#1c2127",
    "muted": "#5b6570",
    "faint": "#dfe3e8",
    "paper": "#fefefe",
    "blue": "#0067a6",
    "orange": "#c2570a",
    "green": "#00805f",
    "purple": "#a8477f",
    "sky": "#3d95c9",
    "ochre": "#a47a00",
}
SERIES = ("blue", "orange", "green", "purple", "sky", "ochre")
MARKERS = ("o", "s", "^", "D", "v", "P")
SIZE = (4.7, 3.0)  # inches
POINTS = 1200  # most points of a scatter plot
STYLE = {
    "font.size": 9,
    "text.parse_math": False,  # names may hold dollar signs
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": COLOURS["paper"],
    "figure.facecolor": COLOURS["paper"],
    "grid.color": COLOURS["faint"],
    "grid.linewidth": 0.7,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "lines.linewidth": 1.6,
    "legend.facecolor": COLOURS["paper"],
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "legend.fontsize": 8.5,
    "legend.labelcolor": COLOURS["ink"],
    "svg.fonttype": "none",
    "svg.hashsalt": "schedule report",
}


def new_axes(x_label, y_label, size=SIZE):
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def logarithmic(axis, values, ratio=20):
    """A logarithmic ``axis`` (of axes) where positive ``values`` span more than ``ratio``."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) == 0 or values.min() <= 0 or values.max() < ratio * values.min():
        return
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    decades = np.log10(values.max() / values.min())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def thin(x, y, points=300):
    """At most ``points`` points: means over stretches of a long curve."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points + 1).astype(int)
    stretches = list(zip(edges[:-1], edges[1:], strict=True))
    return tuple(np.array([v[a:b].mean() for a, b in stretches]) for v in (x, y))


def column(rows, *names):
    """The steps of ``rows`` and their values of ``names``, as float arrays; None becomes NaN."""
    keys = ("step", *names)
    return [np.array([row.get(key) for row in rows], dtype=float) for key in keys]


def sample(n):
    """Places of at most ``POINTS`` of n samples, chosen at random, the same ones every time."""
    if n <= POINTS:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, POINTS, replace=False))


def for_page(svg, name, title):
    """``svg`` to stand inside HTML: as wide as there is room, the page's colours, own ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<title>.*?</title>", "", svg)
    for colour, code in COLOURS.items():
        svg = svg.replace(code, f"var(--{colour})")
    # Hundredths of a point are plenty for coordinates; the texts between tags stay as they are.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag.group()), svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    label = f'<svg role="img" aria-label="{title}" '
    return re.sub(r">\s+<", "><", svg.replace("<svg ", label, 1))


def curve(x, y, points=400):
    """A curve of at most ``points`` of its points, ends included."""
    keep = np.unique(np.linspace(0, len(x) - 1, points).round().astype(int))
    return x[keep], y[keep]


def unit_axes(axes):
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(0, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))

"""How charts look: colours, type, scales, and the SVG that goes into a page.

Importing this module imports matplotlib.
"""

import io
import re

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Every colour occurs once, so that the page can replace it by a variable. The six colours of data
# are Okabe and Ito's, darkened until each stands out from white.
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
SIZE = (4.7, 3.2)  # inches
DPI = 144  # of PNG files
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


def legend_below(figure, axes, columns=2):
    """A legend of ``axes`` outside them, so that it covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def logarithmic(axis, values, ratio=20):
    """Make ``axis`` (of axes) logarithmic if ``values`` are positive and span more than ``ratio``.

    Returns whether it is.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) == 0 or values.min() <= 0 or values.max() < ratio * values.min():
        return False
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    decades = np.log10(values.max() / values.min())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    return True


def thin(x, y, points=200):
    """At most ``points`` points: means over stretches of a long curve, without its NaN."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    stretches = np.array_split(np.arange(len(x)), min(points, len(x))) if len(x) else []
    return tuple(np.array([v[s].mean() for s in stretches]) for v in (x, y))


def printed(figure, title):
    """(PNG, SVG) of a ``figure``: bytes and text."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    figure.dpi = DPI
    picture, drawing = io.BytesIO(), io.StringIO()
    FigureCanvasAgg(figure).print_png(picture)
    figure.set_layout_engine("none")  # the layout is computed: once is enough
    FigureCanvasSVG(figure).print_svg(drawing, metadata={"Date": None, "Title": title})
    return picture.getvalue(), drawing.getvalue()


def for_page(svg, name, title):
    """``svg`` to stand inside HTML: as wide as its column, in the page's colours, with own ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>", "", svg, flags=re.DOTALL)
    for colour, code in COLOURS.items():
        svg = svg.replace(code, f"var(--{colour})")
    # Hundredths of a point are enough for coordinates; text between tags stays as it is.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag.group()), svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*pt"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*pt"', r"<svg\1", svg, count=1)
    label = f'<svg role="img" aria-label="{title}" '
    return re.sub(r">\s+<", "><", svg.replace("<svg ", label, 1))

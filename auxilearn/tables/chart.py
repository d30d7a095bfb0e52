"""A table as a chart: accuracy against the share of corrupted labels, or one line per method.

matplotlib is imported when something is drawn, so that tables can be had without it.
"""

import io
from pathlib import Path
from typing import NamedTuple

from auxilearn.errors import UserError, needs
from auxilearn.run.record import write_aside
from auxilearn.tables.protocol import (
    ABLATION,
    BASELINE,
    DATASETS,
    ROWS,
    SCHEDULE,
    SETTINGS,
    TABLES,
    TARGET_ONLY,
)
from auxilearn.tables.statistics import Cell, of_kind, runs, settings_of

DPI = 200
WIDTH = 7.2  # inches, about that of a page's text
SPREAD = 0.42  # part of the space between two rates over which the methods are spread
DOT_HEIGHT = 0.27  # inches per method
BASELINE_LINES = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MORE_MARKERS = ("<", "p", ">", "h", "*")  # beyond those of the report


def draw_table(table_name, results, dataset_name, out, data=None):
    """Write ``<table>.png`` and ``.svg`` into ``out``; returns their paths.

    Without a finished run there is nothing to draw: earlier charts are removed, none are written.
    The same results give the same bytes. ``data``: as in ``write_table``.

    Raises:
        UserError: matplotlib is missing, or a file cannot be written.
    """
    paths = [Path(out) / f"{table_name}.{suffix}" for suffix in ("png", "svg")]
    figure = table_figure(table_name, results, dataset_name, data)
    try:
        if figure is None:
            for path in paths:
                path.unlink(missing_ok=True)
            return []
        Path(out).mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, _printed(figure, table_name), strict=True):
            write_aside(path, lambda file, content=content: file.write(content))
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written ({error.strerror}); give another folder"
        ) from None
    return paths


def table_figure(table_name, results, dataset_name, data=None):
    """The figure, or None without a finished run. Ablations are left out.

    A cell of which runs are missing has a hollow marker. What shows a method has its key in its
    gid: ``mean:<row>``, ``spread:<row>`` (the standard deviations) and ``seeds:<row>``.
    """
    cells, settings = _cells(table_name, results)
    if not any(cell.n for cell in cells.values()):
        return None
    with needs("matplotlib", "the chart of a table", "requirements-tables.txt"):
        import matplotlib as mpl

        from auxilearn.report import style
    title = f"{TABLES[table_name].title}: {data or DATASETS[dataset_name].title}"
    if len(settings) == 1 < len(TABLES[table_name].settings):
        title += f", {SETTINGS[settings[0]].title}"
    with mpl.rc_context(style.STYLE):
        draw = _draw_methods if len(settings) == 1 else _draw_rates
        return draw(style, cells, settings, title)


def _cells(table_name, results):
    """({(row, setting): Cell}, settings) of the chart: rates ascending, 0 included if known."""
    known = runs(results)
    settings = settings_of(table_name, known)
    if len(settings) > 1:
        clean = [name for name, setting in SETTINGS.items() if setting.rate == 0]
        settings = [name for name in clean if any(s == name for _, s in known)] + [*settings]
        settings = sorted(dict.fromkeys(settings), key=lambda name: SETTINGS[name].rate)
    cells = {}
    for (row, setting), of_cell in known.items():
        if setting in settings and ROWS[row].kind != ABLATION:
            done = {s: r.test_accuracy for s, r in sorted(of_cell.items()) if r.state == "done"}
            cells[row, setting] = Cell(done, len(of_cell))
    return cells, settings


def _per_cent(value):
    return float("nan") if value is None else 100 * value


def _caption(cells):
    """What a mean and its bar are."""
    most = max(cell.wanted for cell in cells.values())
    return f"mean ± sample standard deviation over {most} seed{'s' if most > 1 else ''}"


def _hollow(cells):
    missing = any(0 < cell.n < cell.wanted for cell in cells.values())
    return "; hollow: runs are missing" if missing else ""


def _titled(style, figure, axes, title, caption):
    """Title and caption from the figure's left edge, however long the axes' labels are."""
    left = 0.012
    figure.suptitle(title, x=left, ha="left", fontsize=10.5, fontweight="bold")
    axes.set_title(" ", fontsize=8.5, pad=7)  # room for the caption
    axes.annotate(
        caption,
        (left, 1),
        xycoords=("figure fraction", "axes fraction"),
        xytext=(0, 8),
        textcoords="offset points",
        fontsize=8.5,
        color=style.COLOURS["muted"],
        va="bottom",
    ).set_in_layout(False)


# --------------------------------------------------------------------------------------------------
# Against the rate of corrupted labels
# --------------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    """How a method is drawn."""

    colour: str  # a key of COLOURS
    marker: str
    dashes: object
    strong: bool

    @property
    def size(self):
        return 5.5 if self.strong else 4.8


def looks(style):
    """{row: _Look}, the same in every chart. Schedules have strong colours and full lines."""
    looks = {}
    for row in ROWS:
        kind = ROWS[row].kind
        i = sum(ROWS[other].kind == kind for other in looks)
        if kind == SCHEDULE:
            colours = ("orange", "blue", "purple", "green")
            looks[row] = _Look(colours[i % 4], style.MARKERS[i % 6], "-", True)
        elif kind == BASELINE:
            colours, markers = (*style.SERIES[2:], "muted"), (*style.MARKERS[2:], *MORE_MARKERS)
            dashes = BASELINE_LINES[(i + i // len(colours)) % len(BASELINE_LINES)]
            looks[row] = _Look(colours[i % len(colours)], markers[i % len(markers)], dashes, False)
        elif kind == TARGET_ONLY:
            looks[row] = _Look("ink", "X", BASELINE_LINES[0], False)
    return looks


def _draw_rates(style, cells, settings, title):
    figure, axes = style.new_axes(
        "corrupted labels of the training set (%)", "test accuracy (%)", (WIDTH, 4.6)
    )
    rows = [row for row in ROWS if any(r == row and cell.n for (r, _), cell in cells.items())]
    rates = [100 * SETTINGS[setting].rate for setting in settings]
    width = SPREAD * min(b - a for a, b in zip(rates, rates[1:], strict=False))
    look = looks(style)
    ends = []
    for i, row in enumerate(rows):
        offset = width * (i / (len(rows) - 1) - 0.5) if len(rows) > 1 else 0.0
        x = [rate + offset for rate in rates]
        of_row = [cells.get((row, setting), Cell({}, 0)) for setting in settings]
        _draw_line(style, axes, x, of_row, row, look[row])
        last = max(k for k, cell in enumerate(of_row) if cell.n)
        ends.append((x[last], _per_cent(of_row[last].mean), row))
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.grid(axis="x", visible=False)
    axes.set_xlim(rates[0] - 0.75 * width, rates[-1] + 0.75 * width)
    clean = "; 0 %: Table 2, with its hyper-parameters" if rates[0] == 0 else ""
    _titled(style, figure, axes, title, _caption(cells) + clean + _hollow(cells))
    _label_ends(style, figure, axes, ends, look)
    return figure


def _draw_line(style, axes, x, cells, row, look):
    """A method's means and standard deviations at the places ``x``; a gap where there is none."""
    colour, over = style.COLOURS[look.colour], 3 + look.strong
    mean = [_per_cent(cell.mean) for cell in cells]
    sd = [_per_cent(cell.sd) for cell in cells]
    _, _, (bars,) = axes.errorbar(
        x, mean, sd, ls="none", ecolor=colour, elinewidth=1.2, zorder=over, alpha=0.8
    )
    bars.set_gid(f"spread:{row}")
    width, alpha = (2.0, 1) if look.strong else (1.0, 0.55)
    axes.plot(x, mean, color=colour, ls=look.dashes, lw=width, alpha=alpha, zorder=over - 0.5)
    points = {"ls": "none", "marker": look.marker, "ms": look.size, "color": colour}
    axes.plot(x, mean, **points, mew=0.8, gid=f"mean:{row}", zorder=over + 0.1)
    hollow = [k for k, cell in enumerate(cells) if 0 < cell.n < cell.wanted]
    axes.plot(
        [x[k] for k in hollow],
        [mean[k] for k in hollow],
        **points,
        mfc=style.COLOURS["paper"],
        gid=f"hollow:{row}",
        zorder=over + 0.2,
    )


def _label_ends(style, figure, axes, ends, look):
    """Names right of the lines' last points, moved apart where they would overlap."""
    size = 8.5
    figure.draw_without_rendering()  # so that the axes have their height
    low, high = axes.get_ylim()
    gap = (high - low) * 1.35 * size / (axes.bbox.height / figure.dpi * 72)
    axes.set_ylim(low, high)
    ends = sorted(ends, key=lambda end: end[1])
    places = _apart([end[1] for end in ends], gap, low + gap / 2, high - gap / 2)
    left, right = axes.get_xlim()
    unit = (right - left) / 100
    for (x, y, row), place in zip(ends, places, strict=True):
        colour, bend = style.COLOURS[look[row].colour], right + 3 * unit
        leader = {"color": colour, "lw": 0.6, "alpha": 0.55, "clip_on": False, "zorder": 1.5}
        axes.plot([x, right, bend], [y, y, place], **leader)
        key = {"marker": look[row].marker, "ms": look[row].size, "mew": 0.8, "color": colour}
        axes.plot([bend + 1.5 * unit], [place], ls="none", clip_on=False, **key)
        axes.text(
            bend + 3.2 * unit,
            place,
            ROWS[row].title,
            fontsize=size,
            va="center_baseline",
            color=colour,
            fontweight="bold" if look[row].strong else "normal",
        )


def _apart(wanted, gap, low, high):
    """Places in ``low`` .. ``high``, at least ``gap`` apart, near the ascending ``wanted`` ones.

    The least squares of the moves: isotonic regression of what is wanted, less the gaps.
    """
    blocks = []  # [sum, count], means ascending
    for i, value in enumerate(wanted):
        blocks.append([value - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    top = high - (len(wanted) - 1) * gap
    level = [min(max(total / count, low), top) for total, count in blocks for _ in range(count)]
    return [value + i * gap for i, value in enumerate(level)]


# --------------------------------------------------------------------------------------------------
# One setting
# --------------------------------------------------------------------------------------------------


def _draw_methods(style, cells, settings, title):
    (setting,) = settings
    rows = [row for row in ROWS if (row, setting) in cells]
    figure, axes = style.new_axes(
        "test accuracy (%)", "", (WIDTH, 1.1 + DOT_HEIGHT * (len(rows) + 1))
    )
    heights, height = {}, 0.0
    for before, row in zip([None, *rows], rows, strict=False):
        height += 1.0 + 0.45 * (before is not None and ROWS[before].kind != ROWS[row].kind)
        heights[row] = height
    for row in rows:
        _draw_method(style, axes, heights[row], row, cells[row, setting])
    axes.set_yticks([heights[row] for row in rows], [ROWS[row].title for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if ROWS[row].kind == SCHEDULE else "normal")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(height + 0.7, 0.3)
    caption = _caption(cells) + " (dots)"
    baselines = [
        cells[row, setting].mean
        for row in of_kind(rows, TARGET_ONLY, BASELINE)
        if cells[row, setting].complete
    ]
    if baselines:
        line = {"color": style.COLOURS["ink"], "lw": 1.0, "ls": (0, (4, 2)), "zorder": 2}
        axes.axvline(_per_cent(max(baselines)), **line, gid="baseline")
        caption += "; dashed: best baseline"
    _titled(style, figure, axes, title, caption + _hollow(cells))
    return figure


def _draw_method(style, axes, height, row, cell):
    strong = ROWS[row].kind == SCHEDULE
    colour = style.COLOURS["blue" if strong else "muted"]
    mean, sd = _per_cent(cell.mean), _per_cent(cell.sd)
    text = "no run" if cell.mean is None else f"{mean:.1f}"
    if cell.sd is not None:
        text += f" ± {sd:.1f}"
    if not cell.complete:
        text += f" ({cell.n} of {cell.wanted})"
    axes.annotate(
        text,
        (1, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(8, 0),
        va="center_baseline",
        textcoords="offset points",
        color=style.COLOURS["ink"],
        fontsize=8.5,
        fontweight="bold" if strong else "normal",
    )
    if cell.mean is None:
        return
    values = [100 * value for value in cell.values.values()]
    axes.plot(
        values,
        [height + 0.26] * len(values),
        ls="none",
        marker="o",
        ms=3.2,
        markeredgewidth=0,
        alpha=0.6,
        color=colour,
        gid=f"seeds:{row}",
        zorder=3,
    )
    if cell.sd is not None:
        axes.plot(
            [mean - sd, mean + sd],
            [height, height],
            color=colour,
            lw=2.2,
            solid_capstyle="butt",
            gid=f"spread:{row}",
            alpha=0.6,
            zorder=3,
        )
    axes.plot(
        [mean],
        [height],
        ls="none",
        marker="D",
        ms=6,
        color=colour,
        gid=f"mean:{row}",
        markerfacecolor=colour if cell.complete else style.COLOURS["paper"],
        zorder=4,
    )


def _printed(figure, title):
    """(PNG, SVG) as bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    from auxilearn.report.style import STYLE

    with mpl.rc_context(STYLE):
        picture, drawing = io.BytesIO(), io.StringIO()
        figure.dpi = DPI
        FigureCanvasAgg(figure).print_png(picture)
        figure.set_layout_engine("none")  # it has done its work: once is enough
        FigureCanvasSVG(figure).print_svg(drawing, metadata={"Date": None, "Title": title})
    return picture.getvalue(), drawing.getvalue().encode()

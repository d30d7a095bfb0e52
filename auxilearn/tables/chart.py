"""A table as a chart: its metric against the share of corrupted labels, or one line per method.

matplotlib is imported only to draw, so that tables need no matplotlib.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from auxilearn.errors import needs
from auxilearn.files import write_aside
from auxilearn.tables.protocol import ABLATION, BASELINE, SCHEDULE, SETTINGS, TABLES, rows
from auxilearn.tables.statistics import REQUIREMENTS

DPI = 200
WIDTH = 7.2  # inches, about that of a page's text
SPREAD = 8.4  # per cent of labels over which the methods of one rate are spread, at most
DOT_HEIGHT = 0.27  # inches per method
DASHES = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
TEXT = {"fontsize": 8.5, "va": "center_baseline"}


def draw_table(sheet, out_dir, clean=None):
    """Write ``<table>.png`` and ``.svg``; returns their paths, [] without a finished run.

    Args: ``sheet`` as for ``write_table``; ``clean``: ``Statistics`` of the table without corrupted
    labels, from which the curves of the corrupted ones begin. The same numbers give the same bytes.
    """
    paths = [Path(out_dir) / f"{sheet.stem}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        path.unlink(missing_ok=True)
    figure = table_figure(sheet, clean)
    if figure is None:
        return []
    import matplotlib as mpl

    from auxilearn.report.style import STYLE

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for path, metadata in zip(paths, ({}, {"Date": None}), strict=True):
            options = {"format": path.suffix[1:], "dpi": DPI, "metadata": metadata}
            write_aside(path, lambda file, options=options: figure.savefig(file, **options))
    return paths


def table_figure(sheet, clean=None):
    """The figure, or None without a finished run. Ablations are left out.

    A cell with missing runs has a hollow marker. Artists that show numbers have the row in their
    gid: ``mean:<row>``, ``spread:<row>`` (the standard deviations) and ``seeds:<row>``.
    """
    found = sheet.found
    names = [row for row in found.rows if rows()[row].kind != ABLATION]
    cells = found.cells[found.cells.index.isin(names, level="row")]
    if not cells.n.any():
        return None
    with needs("matplotlib", "the chart of a table", REQUIREMENTS):
        import matplotlib as mpl

        from auxilearn.report import style
    title, n, dots = sheet.title, len(found.seeds), len(found.settings) == 1
    caption = f"mean ± sample standard deviation over {n} seed{'s' * (n > 1)}" + " (dots)" * dots
    if (cells.n[~cells.complete] > 0).any():
        caption += "; hollow: runs are missing"
    with mpl.rc_context(style.STYLE):
        if not dots:
            figure, caption = _rates(style, found, names, cells, clean, caption)
        else:
            if len(TABLES[found.table].settings) > 1:
                title += f", {SETTINGS[found.settings[0]].title}"
            figure, caption = _methods(style, found, names, cells, caption)
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold")
        _caption(style, figure, caption)
    return figure


def _caption(style, figure, text):
    """From the figure's left edge, however long the labels of the axes are."""
    (axes,) = figure.axes
    axes.set_title(" ", fontsize=8.5, pad=7)  # room for it
    place = {"xycoords": ("figure fraction", "axes fraction"), "textcoords": "offset points"}
    colour = style.COLOURS["muted"]
    note = axes.annotate(text, (0.012, 1), xytext=(0, 8), fontsize=8.5, color=colour, **place)
    note.set_in_layout(False)


# --------------------------------------------------------------------------------------------------
# Against the rate of corrupted labels
# --------------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    colour: str  # a key of COLOURS
    marker: str
    dashes: object
    strong: bool


def looks(style):
    """{row: _Look}, the same in every chart. Schedules have strong colours and full lines."""
    found, count = {}, dict.fromkeys((SCHEDULE, BASELINE), 0)
    for row, (_, kind, *_) in rows().items():
        if kind not in count:
            found[row] = _Look("ink", "X", DASHES[0], False)
            continue
        i, strong = count[kind], kind == SCHEDULE
        count[kind] += 1
        colours = ("orange", "blue", "purple", "green") if strong else (*style.SERIES[2:], "muted")
        markers = style.MARKERS if strong else (*style.MARKERS[2:], "<", "p", ">", "h", "*")
        dashes = "-" if strong else DASHES[(i + i // len(colours)) % len(DASHES)]
        found[row] = _Look(colours[i % len(colours)], markers[i % len(markers)], dashes, strong)
    return found


def _rates(style, found, names, cells, clean, caption):
    import pandas as pd

    settings, factor = found.settings, found.metric.factor
    if clean is not None:
        (first,) = clean.settings
        settings = [first, *settings]
        cells = pd.concat([clean.cells, cells])
        caption += "; 0 %: Table 2, with its hyper-parameters"
    names = [row for row in names if cells.n[row].any()]
    label = "corrupted labels of the training set (%)"
    figure, axes = style.new_axes(label, f"test {found.metric.axis}", (WIDTH, 4.6))
    rates = np.array([100 * SETTINGS[setting].rate for setting in settings])
    width, look, ends = min(SPREAD, 0.42 * np.diff(rates).min()), looks(style), []
    for offset, row in zip(np.linspace(-width / 2, width / 2, len(names)), names, strict=True):
        x = rates + offset * (len(names) > 1)
        of_row = cells.reindex([(row, setting) for setting in settings])
        mean, sd = factor * of_row["mean"].to_numpy(), factor * of_row.sd.to_numpy()
        colour, marker, dashes, strong = look[row]
        colour, over = style.COLOURS[colour], 3 + strong
        bars = {"ecolor": colour, "elinewidth": 1.2, "zorder": over, "alpha": 0.8}
        axes.errorbar(x, mean, sd, ls="none", **bars)[2][0].set_gid(f"spread:{row}")
        line = {"lw": 2.0, "alpha": 1} if strong else {"lw": 1.0, "alpha": 0.55}
        axes.plot(x, mean, color=colour, ls=dashes, zorder=over - 0.5, **line)
        points = {"ls": "none", "marker": marker, "ms": 4.8 + 0.7 * strong, "color": colour}
        axes.plot(x, mean, **points, gid=f"mean:{row}", zorder=over + 0.1)
        few, paper = (of_row.n < of_row.wanted).to_numpy(), style.COLOURS["paper"]
        hollow = {**points, "mfc": paper, "gid": f"hollow:{row}", "zorder": over + 0.2}
        axes.plot(x[few], mean[few], **hollow)
        last = np.flatnonzero(~np.isnan(mean))[-1]
        ends.append((mean[last], x[last], rows()[row].title, points, strong))
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.grid(axis="x", visible=False)
    axes.set_xlim(rates[0] - 0.75 * width, rates[-1] + 0.75 * width)
    _label_ends(figure, axes, sorted(ends, key=lambda end: end[0]))
    return figure, caption


def _label_ends(figure, axes, ends):
    """Names right of the lines' last points, outside the axes, moved apart where they overlap."""
    figure.suptitle(" ", fontsize=10.5)
    axes.set_title(" ", fontsize=8.5, pad=7)
    figure.draw_without_rendering()  # so that the axes have their height
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = (high - low) * 1.35 * TEXT["fontsize"] / (axes.bbox.height / figure.dpi * 72)
    left, right = axes.get_xlim()
    unit = (right - left) / 100
    places = apart([end[0] for end in ends], gap, low + gap / 2, high - gap / 2)
    for (y, x, title, points, strong), place in zip(ends, places, strict=True):
        bend, colour = right + 3 * unit, points["color"]
        leader = {"color": colour, "lw": 0.6, "alpha": 0.55, "zorder": 1.5}
        axes.plot([x, right, bend], [y, y, place], clip_on=False, **leader)
        axes.plot([bend + 1.5 * unit], [place], clip_on=False, **points)
        weight = "bold" if strong else "normal"
        axes.text(bend + 3.2 * unit, place, title, color=colour, fontweight=weight, **TEXT)


def apart(wanted, gap, low, high):
    """Places in ``low`` .. ``high``, at least ``gap`` apart, near the ascending ``wanted`` ones."""
    gaps = gap * np.arange(len(wanted))
    free = np.asarray(wanted) - gaps  # ascending where nothing overlaps
    up, down = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    return np.clip((up + down) / 2, low, high - gaps[-1]) + gaps


# --------------------------------------------------------------------------------------------------
# One setting
# --------------------------------------------------------------------------------------------------


def _methods(style, found, names, cells, caption):
    (setting,), known = found.settings, rows()
    size = (WIDTH, 1.1 + DOT_HEIGHT * (len(names) + 1))
    figure, axes = style.new_axes(f"test {found.metric.axis}", "", size)
    kinds = [known[row].kind for row in names]
    steps = [1.0] + [1.0 + 0.45 * (a != b) for a, b in zip(kinds, kinds[1:], strict=False)]
    heights = np.cumsum(steps)
    for row, height in zip(names, heights, strict=True):
        _method(style, axes, height, row, cells.loc[(row, setting)], found)
    axes.set_yticks(heights, [known[row].title for row in names])
    for label, kind in zip(axes.get_yticklabels(), kinds, strict=True):
        label.set_fontweight("bold" if kind == SCHEDULE else "normal")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(heights[-1] + 0.7, 0.3)
    for mean in cells["mean"][cells.baseline]:
        line = {"color": style.COLOURS["ink"], "lw": 1.0, "ls": (0, (4, 2)), "zorder": 2}
        axes.axvline(found.metric.factor * mean, gid="baseline", **line)
        caption += "; dashed: best baseline"
    return figure, caption


def _method(style, axes, height, row, cell, found):
    factor, digits = found.metric.factor, found.decimals
    strong = rows()[row].kind == SCHEDULE
    colour = style.COLOURS["blue" if strong else "muted"]
    mean, sd = factor * cell["mean"], factor * cell.sd
    text = f"{mean:.{digits}f}" if cell.n else "no run"
    text += f" ± {sd:.{digits}f}" if cell.n > 1 else ""
    text += f" ({cell.n} of {cell.wanted})" if not cell.complete else ""
    right = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    weight = "bold" if strong else "normal"
    axes.annotate(text, (1, height), xytext=(8, 0), fontweight=weight, **right, **TEXT)
    if not cell.n:
        return
    dots = {"ls": "none", "marker": "o", "ms": 3.2, "mew": 0, "alpha": 0.6}
    values = factor * found.values[cell.name].dropna()
    axes.plot(values, [height + 0.26] * cell.n, color=colour, gid=f"seeds:{row}", **dots)
    if cell.n > 1:
        bar = {"lw": 2.2, "solid_capstyle": "butt", "alpha": 0.6, "gid": f"spread:{row}"}
        axes.plot([mean - sd, mean + sd], [height] * 2, color=colour, zorder=3, **bar)
    fill = colour if cell.complete else style.COLOURS["paper"]
    diamond = {"ls": "none", "marker": "D", "ms": 6, "mfc": fill, "gid": f"mean:{row}"}
    axes.plot([mean], [height], color=colour, zorder=4, **diamond)

"""The report as one HTML page that needs nothing beside itself: page.html filled in.

This module chooses what the page shows; page.html, page.css and page.js say how.
"""

import base64
import io
import math
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from auxilearn.report.brief import statements
from auxilearn.report.names import readable, worded

HERE = Path(__file__).parent
TABLE_ROWS = 1000  # of the sample table: the most suspicious of every ranking
TABLE_THUMBNAILS = 60  # of these rows with a picture
SHOWN = 12  # samples at each end of a contact sheet
BUDGET = 1000  # samples on contact sheets; thumbnails are about 2.5 KB each
FEATURES = 5  # of a sample that is a row, the first ones
HEIGHT = 96  # pixels of a thumbnail


def build_page(findings, charts, wanted):
    """The page, a string.

    Args: ``charts`` as ``draw_charts`` returns them; ``wanted`` numbers of tasks that get a contact
    sheet in any case.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"readable": readable}
    thumbnails = None if findings.evaluation is None else Thumbnails(findings.evaluation)
    labelled = findings.labels is not None
    return environment.get_template("page.html").render(
        run=findings.run,
        findings=findings,
        evaluation=findings.evaluation,
        statements=statements(findings),
        charts={name: Markup(svg) for name, svg in charts.items()},
        tasks=_task_rows(findings),
        strips=_strips(findings, thumbnails) if labelled else [],
        labels=_label_rows(findings, thumbnails) if labelled else [],
        sheets=_sheets(findings, thumbnails, wanted) if labelled else [],
        thumbnails=thumbnails.encoded if thumbnails else {},
        features=_feature_names(findings),
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        js=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )


class Thumbnails:
    """JPEG thumbnails of training images by place in the training set, each made once.

    Of rows there are none: their places are counted alone.
    """

    def __init__(self, evaluation):
        self.evaluation = evaluation
        self.places = set()
        self.encoded = {}  # {place: base64}

    def add(self, places):
        new = {*map(int, places)} - self.places
        self.places |= new
        for place in sorted(new) if self.evaluation.images else ():
            image = self.evaluation.images.load(self.evaluation.samples.positions[place])
            picture = Image.fromarray(image)
            picture.thumbnail((2 * HEIGHT, HEIGHT))
            data = io.BytesIO()
            picture.save(data, "JPEG", quality=74)
            self.encoded[place] = base64.b64encode(data.getvalue()).decode()


def _task_rows(findings):
    """The rows of the table of tasks: the target, then by mean weight. NaN becomes None."""
    if findings.tasks is None:
        return []
    tasks = findings.tasks.loc[[0, *findings.order]]
    longest = max(tasks.mean_weight.max(), 1e-30)
    tasks = tasks.assign(bar=(tasks.mean_weight / longest).clip(lower=0))
    return tasks.astype(object).where(tasks.notna(), None).to_dict("records")


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


def _card(findings, place, number, task=0):
    """What is said of a sample: its labels under a task, and a number."""
    evaluation = findings.evaluation
    kind, position = evaluation.tasks[task], evaluation.samples.positions[place]
    card = {"place": int(place), "number": number, "wrong": None}  # not known
    if evaluation.split.rows:
        card["id"] = evaluation.split.ids[position]
        card["features"] = _feature_values(evaluation.split.rows, position)
    if task == 0:
        sample = findings.labels.loc[place]
        given, predicted = sample.given_label, sample.prediction
        if "wrong" in sample:
            card |= {"wrong": bool(sample.wrong), "truth": worded(kind, sample.label)}
    else:
        given = evaluation.split.labels[position, task]
        predicted = evaluation.predicted(task)[place]
    return card | {"given": worded(kind, given), "predicted": worded(kind, predicted)}


def _feature_names(findings):
    """Those that are shown of a sample that is a row; none of images."""
    if findings.evaluation is None or not findings.evaluation.split.rows:
        return []
    return [feature["name"] for feature in findings.evaluation.split.rows.features[:FEATURES]]


def _feature_values(rows, position):
    """What the model sees of them, in words: numbers in their own unit, names of categories. ""
    stands for a missing value, and for a number that is exactly the mean, which is the same."""
    numbers, codes = iter(rows.numbers[position]), iter(rows.codes[position])
    values = []
    for feature in rows.features[:FEATURES]:
        if "mean" in feature:
            number = next(numbers)
            values.append(f"{number * feature['std'] + feature['mean']:.4g}" if number else "")
        else:
            values.append(["", *feature["values"]][next(codes)])
    return values


def _strips(findings, thumbnails):
    """The most suspicious samples by weight, by loss and by margin."""
    labels = findings.labels
    rankings = {"Highest target loss": labels.loss}
    if findings.weighted:
        rankings = {"Lowest target weight": -labels.weight} | rankings
    if findings.with_margins:
        rankings |= {"Lowest margin": -labels.margin}
    strips = []
    for title, score in rankings.items():
        ordered = labels.loc[score.sort_values(ascending=False, kind="stable").index]
        thumbnails.add(ordered.index[:TABLE_THUMBNAILS])
        cards = []
        for place, sample in ordered.iloc[:SHOWN].iterrows():
            number = f"loss {sample.loss:.2f}"
            if not math.isnan(sample.weight):
                number = f"weight {sample.weight:.3g}, {number}"
            if findings.with_margins:
                number += f", margin {sample.margin:.2f}"
            cards.append(_card(findings, place, number))
        counts = [c for c in (20, 50, 100) if c <= len(labels) // 2 and "wrong" in labels]
        found = [f"{int(ordered.wrong.iloc[:c].sum())} of the first {c}" for c in counts]
        strips.append({"title": title, "cards": cards, "found": ", ".join(found)})
    return strips


def _label_rows(findings, thumbnails):
    """Rows of the table of labels: the first of every ranking, in the list's order."""
    labels = findings.labels
    first = labels["rank"] <= TABLE_ROWS
    first |= labels.loss.rank(ascending=False) <= TABLE_ROWS
    if findings.weighted:
        first |= labels.weight.rank() <= TABLE_ROWS
    if findings.with_margins:
        first |= labels.margin.rank() <= TABLE_ROWS
    target = findings.evaluation.tasks[0]
    return [
        row._asdict()
        | {
            "given": worded(target, row.given_label),
            "predicted": worded(target, row.prediction),
            "truth": worded(target, row.label),
            "picture": row.Index in thumbnails.encoded,
        }
        for row in labels[first].itertuples()
    ]


def extremes(weights):
    """Places of the highest and of the lowest ``weights`` (n,), ``SHOWN`` each, the most extreme
    first; NaN is left out, and no place is in both."""
    places = np.flatnonzero(~np.isnan(weights))
    order = places[np.argsort(-weights[places], kind="stable")]
    count = min(SHOWN, len(order) // 2)
    return order[:count], order[len(order) - count :][::-1]


def _sheets(findings, thumbnails, wanted):
    """Contact sheets of the target, of the tasks ``wanted`` (numbers), then of the tasks of highest
    and lowest mean weight in turn, until the page's budget is used up."""
    if findings.tasks is None:
        return []
    order = findings.order.tolist()
    turns = [k for pair in zip(order, reversed(order), strict=True) for k in pair]
    sheets = {}
    for k in dict.fromkeys([0, *wanted, *turns]):
        weights = findings.evaluation.table.weights[:, k]
        ends = extremes(weights)
        new = {*map(int, np.concatenate(ends))} - thumbnails.places
        if len(thumbnails.places) + len(new) > BUDGET and k != 0 and k not in wanted:
            continue
        thumbnails.add(np.concatenate(ends))
        high, low = (
            [_card(findings, p, f"weight {weights[p]:.3g}", k) for p in places] for places in ends
        )
        sheets[k] = {"task": k, "high": high, "low": low}
    return [sheets[k] for k in [0, *order] if k in sheets]

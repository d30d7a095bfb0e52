"""The report as one HTML page that needs nothing beside itself."""

import json
from html import escape
from pathlib import Path

import numpy as np

from auxilearn.report import tables
from auxilearn.report.brief import statements
from auxilearn.report.findings import APART
from auxilearn.report.pictures import Thumbnails, class_name, contact_sheets, suspect_cards
from auxilearn.report.wording import readable
from auxilearn.run.history import SCHEDULE_FILE

HERE = Path(__file__).parent
TABLE_ROWS = 10_000  # most samples in the page's table
TABLE_THUMBNAILS = 60  # of the most suspicious, by weight and by loss each
MARKS = {"good": "✓", "note": "•", "caution": "!"}


def build_page(findings, charts, wanted=()):
    """The page, a string.

    Args: ``charts`` as ``draw_charts`` returns them; ``wanted`` numbers of tasks that get a contact
    sheet in any case.
    """
    thumbnails = None if findings.evaluation is None else Thumbnails(findings.evaluation)
    data = {}
    parts = [
        ("training", "Did it train?", _training(charts)),
        ("tasks", "Which tasks count?", _tasks(findings, charts)),
        ("samples", "Which samples count?", _samples(findings, charts, thumbnails, wanted, data)),
        ("labels", "Which labels are probably wrong?", _labels(findings, thumbnails, data)),
        ("truth", "Against the truth", _truth(findings, charts)),
        ("factors", "Where the weights come from", _factors(findings, charts)),
        ("files", "Files and definitions", _files(findings)),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{key}">{key.capitalize()}</a>' for key, _, _ in parts)
    sections = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(title)}'
        f"</h2>{content}</section>"
        for key, title, content in parts
    )
    data["thumbs"] = {} if thumbnails is None else thumbnails.for_page()
    name = escape(findings.run.directory.resolve().name)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>Schedule of {name}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{_read('page.css')}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#brief">Skip to the report</a>\n'
        f"<header>{_header(findings, name)}</header>\n"
        f'<nav aria-label="Sections"><div><a href="#brief">In brief</a>{links}'
        '<button id="theme" hidden>Dark page</button></div></nav>\n'
        f"<main>{_missing(findings)}{_brief(findings)}{sections}</main>\n"
        "<footer><p>Written by <code>inspect_schedule.py</code>.</p></footer>\n"
        f'<script type="application/json" id="data">{_json(data)}</script>\n'
        f"<script>\n{_read('page.js')}</script>\n</body>\n</html>\n"
    )


def _read(name):
    return (HERE / name).read_text(encoding="utf-8")


def _json(data):
    """JSON that may stand inside a <script>."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c")


def _header(findings, name):
    run = findings.run
    config, data = run.config, run.recorded["data"]
    facts = [f"method <b>{escape(config.method)}</b>: {escape(run.method.title)}"]
    if config.effective_corrupted_rate:
        facts.append(f"{config.effective_corrupted_rate:.0%} of the training labels redrawn")
    if config.labeled_per_class:
        facts.append(f"{config.labeled_per_class} labelled images per class")
    if data["trained_on"] in data["sets"]:
        facts.append(f"{data['sets'][data['trained_on']]:,} training images")
    facts.append(f"{data['classes']} classes, {(config.task_num or 1) - 1} auxiliary tasks")
    if findings.evaluation is not None:
        which = "best checkpoint"
        if findings.evaluation.before_fine_tuning:
            which += " before fine-tuning"
        facts.append(f"weights of the {which}, epoch {findings.evaluation.epoch}")
    return f'<h1>What the scheduler learned: {name}</h1><p class="facts">{"; ".join(facts)}.</p>'


def _missing(findings):
    if not findings.missing:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in findings.missing)
    title = "Not in this report"
    return f'<section class="missing" role="status"><h2>{title}</h2><ul>{items}</ul></section>'


def _brief(findings):
    items = "".join(
        f'<li class="{s.verdict}"><span class="mark" title="{s.verdict}" aria-label="{s.verdict}">'
        f"{MARKS[s.verdict]}</span><b>{s.topic}</b><span>{escape(s.text)}</span></li>"
        for s in statements(findings)
    )
    return (
        '<section id="brief" aria-labelledby="brief-title"><h2 id="brief-title">In brief</h2>'
        f'<ul class="brief">{items}</ul></section>'
    )


def _figure(charts, name, caption):
    """A chart with its caption; nothing where there is none."""
    if name not in charts:
        return ""
    return f'<figure id="chart-{name}">{charts[name][1]}<figcaption>{caption}</figcaption></figure>'


def _grid(*figures):
    present = [figure for figure in figures if figure]
    return f'<div class="charts">{"".join(present)}</div>' if present else ""


# --------------------------------------------------------------------------------------------------
# Sections
# --------------------------------------------------------------------------------------------------


def _training(charts):
    return _grid(
        _figure(
            charts,
            "losses",
            "Plain mean losses, without the schedule. Training losses are on the labels trained "
            "on, wrong ones included; the development set's labels are clean.",
        ),
        _figure(charts, "accuracy", "On the labels trained on, and on the validation set."),
        _figure(
            charts,
            "scheduled_loss",
            "What the lower level minimises. It may rise while the plain losses fall: the weights "
            "are free to grow.",
        ),
        _figure(
            charts,
            "hypergradient",
            "A point for each upper step. Beyond the bound, where there is one, only the direction "
            "counts.",
        ),
        _figure(
            charts,
            "residual",
            "What the solver left of the development gradient. Near 1: no use was made of "
            "curvature. Above 1: it diverges.",
        ),
    )


def _tasks(findings, charts):
    tasks = findings.tasks
    if tasks is None:
        return ""
    ranked = _figure(
        charts,
        "tasks_ranked",
        "Bars: mean weight over the training set. Lines: from the 5 % to the 95 % quantile over "
        "the samples."
        + (
            " The 20 highest and the 20 lowest; the table has all." if len(tasks.names) > 41 else ""
        ),
    )
    history = _figure(
        charts,
        "tasks_history",
        "Mean over the training batches between two upper steps. Thin: single tasks.",
    )
    ranking = _figure(charts, "tasks_ranking", "Named: the first and the last places at the end.")
    families = _figure(
        charts,
        "tasks_families",
        "A point for each attribute, a line for the family's mean; the number of attributes in "
        "brackets.",
    )
    information = _figure(
        charts,
        "information",
        "Mutual information of attribute and true class over the training images. A schedule that "
        "prefers what tells the classes apart rises from left to right.",
    )
    top, below = _columns(ranked, history + ranking), _columns(families, information)
    return top + below + _task_table(tasks)


def _columns(left, right):
    """A tall figure beside others."""
    if not left or not right:
        return _grid(left, right)
    return f'<div class="columns">{left}<div>{right}</div></div>'


def _task_table(tasks):
    columns = [
        ("rank", "ascending", True),
        ("task", "ascending", False),
        ("role", "ascending", False),
        ("mean weight", "descending", True),
        ("spread", "descending", True),
        ("task factor", "descending", True),
        ("mean loss", "ascending", True),
        ("share of loss", "descending", True),
        ("class information", "descending", True),
    ]
    values = {
        "spread": tasks.spread,
        "task factor": tasks.factor,
        "mean loss": tasks.loss,
        "share of loss": tasks.share,
        "class information": tasks.information,
    }
    kept = [
        column
        for column in columns
        if (column[0] != "role" or tasks.roles is not None)
        and (column[0] not in values or values[column[0]] is not None)
    ]
    head = "".join(
        f'<th scope="col"{" class=n" if number else ""} data-first="{first}"'
        f"{' aria-sort=ascending' if name == 'rank' else ''}>"
        f"<button disabled>{name}</button></th>"
        for name, first, number in kept
    )
    longest = max(tasks.mean.max(), 1e-30)
    rows = []
    for rank, k in enumerate([0, *tasks.order.tolist()]):
        name = "<b>target task</b>" if k == 0 else escape(readable(tasks.names[k]))
        role = "" if k == 0 or tasks.roles is None else escape(tasks.roles[k - 1])
        cells = {
            "rank": _cell("" if k == 0 else str(rank), rank),
            "task": f"<td>{name}</td>",
            "role": f"<td>{role}</td>",
            "mean weight": _cell(
                f'<span class="bar" style="width:{4 * max(0, tasks.mean[k]) / longest:.2f}rem">'
                f"</span>{tasks.mean[k]:.3f}",
                tasks.mean[k],
            ),
        }
        for name, column in values.items():
            if column is not None:
                value = column[k]
                text = f"{value:.1%}" if name == "share of loss" else f"{value:.3f}"
                cells[name] = _cell("" if np.isnan(value) else text, value)
        rows.append(f"<tr>{''.join(cells[name] for name, _, _ in kept)}</tr>")
    return (
        "<h3>All tasks</h3>"
        '<div class="controls" hidden><label>Filter <input type="search" id="task-filter" '
        'placeholder="such as bill"></label><span id="task-count" role="status"></span></div>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Table of all tasks">'
        f'<table id="task-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(text, value):
    value = "" if np.isnan(value) else f"{value:.6g}"
    return f'<td class="n" data-value="{value}">{text.replace("-0.000", "0.000")}</td>'


def _samples(findings, charts, thumbnails, wanted, data):
    if findings.target is None:
        chart = _figure(charts, "target_history", "Training batches between two upper steps.")
        return _grid(chart)
    grid = _grid(
        _figure(charts, "target_weights", "Training set, evaluation view of every image."),
        _figure(charts, "target_losses", "The same samples by their loss, the plain baseline."),
        _figure(
            charts,
            "weight_and_loss",
            "At most 1,200 samples, chosen at random. A schedule that distrusts labels the model "
            "cannot explain falls from left to right.",
        ),
        _figure(charts, "target_history", "Training batches between two upper steps."),
    )
    if findings.tasks is None:
        return grid
    sheets = contact_sheets(findings, thumbnails, wanted)
    data["sheets"] = {str(k): html for k, html in sheets.items()}
    names = findings.tasks.names
    options = "".join(
        f'<option value="{k}">{"target task" if k == 0 else escape(readable(names[k]))} '
        f"({findings.tasks.mean[k]:.2f})</option>"
        for k in sheets
    )
    note = ""
    if len(sheets) < len(names):
        note = (
            f"<p>{len(sheets)} of {len(names)} tasks have a contact sheet here; "
            "<code>--sheets NAME ...</code> asks for others.</p>"
        )
    return (
        f"{grid}<h3>Contact sheets</h3>"
        '<div class="controls" hidden><label>Task (mean weight) '
        f'<select id="sheet-task">{options}</select></label></div>{note}'
        f'<div id="sheet" aria-live="polite">{sheets[0]}</div>'
    )


def _labels(findings, thumbnails, data):
    target = findings.target
    if target is None:
        return ""
    strips = []
    titles = {"weight": "Lowest target weight", "loss": "Highest target loss"}
    ranked = [by for by in target.suspicion if by == "loss" or target.tells_samples_apart]
    for by in ranked:
        cards = suspect_cards(findings, thumbnails, by)
        strips.append(f"<div><h3>{titles[by]}</h3>{_found(findings, by)}{cards}</div>")
        thumbnails.add(target.place[target.order(by)[:TABLE_THUMBNAILS]])
    strips = f'<div class="pair">{"".join(strips)}</div>' if len(strips) == 2 else strips[0]
    return strips + _sample_table(findings, findings.ranking, data)


def _found(findings, by):
    """How many of the first suspects are wrong, where that is known."""
    target = findings.target
    if target.wrong is None:
        return ""
    order = target.order(by)
    parts = []
    for count in (20, 50, 100):
        if count <= len(order) // 2:
            parts.append(f"{target.wrong[order[:count]].sum()} of the first {count}")
    chance = f"{target.wrong.mean():.0%} would be by chance"
    return f"<p>Wrong: {', '.join(parts)} ({chance}).</p>" if parts else ""


def _sample_table(findings, by, data):
    target, evaluation = findings.target, findings.evaluation
    known = target.wrong is not None
    position = evaluation.samples.positions[target.place]
    order = target.order(by)[:TABLE_ROWS]
    ranks = {key: np.argsort(target.order(key)) + 1 for key in target.suspicion}
    suspected = target.suspected(by)
    columns = ["place", "id", "path", "given", "prediction", "label", "suspected", "loss"]
    columns += ["loss_rank"] + (["weight", "weight_rank"] if "weight" in ranks else [])
    rows = []
    for i in order.tolist():
        row = [
            int(target.place[i]),
            evaluation.split.image_ids[position[i]],
            evaluation.split.paths[position[i]],
            int(target.given[i]),
            int(target.prediction[i]),
            int(target.label[i]),
            int(suspected[i]),
            float(f"{target.loss[i]:.4g}"),
            int(ranks["loss"][i]),
        ]
        if "weight" in ranks:
            row += [float(f"{target.weight[i]:.4g}"), int(ranks["weight"][i])]
        rows.append(row)
    names = [class_name(name) for name in evaluation.split.class_names]
    data["samples"] = {"columns": columns, "rows": rows, "classes": names}
    shown = [("image", ""), ("id", "id"), ("given", "label given"), ("prediction", "predicted")]
    shown += [("truth", "truth")] if known else []
    if "weight" in ranks:
        shown += [("weight", "weight"), ("weight_rank", "rank by weight")]
    shown += [("loss", "loss"), ("loss_rank", "rank by loss"), ("suspected", "suspected")]
    numeric = {"weight", "weight_rank", "loss", "loss_rank"}
    first = {"loss": "descending", "suspected": "descending"}
    head = "".join(
        f'<th scope="col" data-key="{key}" data-first="{first.get(key, "ascending")}"'
        f"{' class=n' if key in numeric else ''}"
        f"{' aria-sort=ascending' if key == f'{by}_rank' else ''}>"
        + (f"<button disabled>{title}</button>" if title else '<span aria-label="image"></span>')
        + "</th>"
        for key, title in shown
    )
    only_wrong = ""
    if known:
        only_wrong = '<label><input type="checkbox" id="wrong-only">known to be wrong</label>'
    total = len(target.place)
    cut = f"The {len(rows):,} most suspicious of {total:,}. " if total > len(rows) else ""
    return (
        f"<h3>All labels, by {by}</h3>"
        f"<p>{cut}{_why_ranked(findings)} {_what_is_suspected(findings, by)}</p>"
        '<div class="controls samples" hidden>'
        '<label>Filter <input type="search" id="sample-filter" placeholder="id, file or class">'
        '</label><label><input type="checkbox" id="suspects-only">suspected only</label>'
        f"{only_wrong}</div>"
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Table of labels">'
        f'<table id="sample-table"><thead><tr>{head}</tr></thead><tbody></tbody></table></div>'
        '<div class="controls samples" hidden><button id="previous">Previous</button>'
        '<span id="sample-count" role="status"></span><button id="next">Next</button></div>'
        f"<noscript><p>The table needs JavaScript; {tables.SAMPLES_FILE} and {tables.LABELS_FILE} "
        "have the same.</p></noscript>"
    )


def _why_ranked(findings):
    """A sentence on what the labels are ranked by."""
    target, by = findings.target, findings.ranking
    if findings.rank_by != "auto" or target.weight is None:
        return f"Ranked by {by}."
    if not target.tells_samples_apart:
        return "Ranked by loss: the schedule does not tell samples apart."
    if target.are_alike:
        return "Ranked by loss: all target weights are within 10 % of each other."
    rule = f"rank correlation {target.falls_with_loss:.2f}; by weight from -0.5 down"
    if by == "weight":
        return f"Ranked by weight, which falls with the loss ({rule})."
    return f"Ranked by loss: the weights do not clearly fall with it ({rule})."


def _what_is_suspected(findings, by):
    target = findings.target
    names = {"weight": "target weights", "loss": "target losses"}[by]
    if target.groups[by][0] <= APART:
        return f"None is called suspected: the {names} do not fall into two groups."
    return (
        f"The {names} fall into two groups; suspected are those {target.suspected(by).sum():,} of "
        f"the {'lower' if by == 'weight' else 'higher'} one of which the model predicts another "
        "class."
    )


def _truth(findings, charts):
    grid = _grid(
        _figure(
            charts,
            "roc",
            "Samples taken for wrong from the most suspicious on: by low target weight, and by the "
            "plain baseline, high loss.",
        ),
        _figure(charts, "precision_recall", "The same samples: how many of those taken are wrong."),
    )
    roles = _figure(
        charts,
        "roles",
        "A point for each attribute, a line for the mean. The roles stand in order of what their "
        "attributes say about the class.",
    )
    if table := _role_table(findings):
        roles = (
            f'<h3>Telling the roles apart</h3><div class="columns">{roles}<div>{table}</div></div>'
        )
    return grid + _truth_table(findings) + roles


def _truth_table(findings):
    truth = findings.truth
    if not truth:
        return ""
    wrong = findings.target.wrong
    rows = "".join(
        f'<tr><td>{name}</td><td class="n">{area:.3f}</td><td class="n">{precision:.3f}</td></tr>'
        for name, (area, precision) in truth.items()
    )
    rows += f'<tr><td>chance</td><td class="n">0.500</td><td class="n">{wrong.mean():.3f}</td></tr>'
    note = ""
    if findings.target.factors:
        note = (
            "<p>The label enters this schedule by the loss factor alone, which rises or falls with "
            "the loss: it ranks as the loss does, or the other way round. What the feature factor "
            "adds is about the picture, not about its label.</p>"
        )
    return (
        "<h3>Ranking wrong labels</h3>"
        '<div class="scroll"><table><thead><tr><th scope="col">ranked by</th>'
        '<th scope="col" class="n">area under ROC</th>'
        f'<th scope="col" class="n">mean precision</th></tr></thead><tbody>{rows}</tbody></table>'
        f"</div>{note}"
    )


def _role_table(findings):
    if not findings.role_pairs:
        return ""
    pairs = findings.role_pairs
    role, weight, loss = findings.role_separation
    if len(pairs) > 1:
        pairs = [(role, "all others", weight, loss), *pairs]
    rows = "".join(
        f'<tr><td>{escape(role)} over {escape(other)}</td><td class="n">{weight:.0%}</td>'
        f'<td class="n">{loss:.0%}</td></tr>'
        for role, other, weight, loss in pairs
    )
    return (
        "<div><p>Of all pairs of attributes of two roles, the share in which the first has the "
        "higher mean weight; beside it the baseline, the lower mean loss. 50 % is chance.</p>"
        '<div class="scroll"><table><thead><tr><th scope="col">pair</th>'
        '<th scope="col" class="n">by weight</th><th scope="col" class="n">by loss</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div></div>"
    )


def _factors(findings, charts):
    grid = _grid(
        _figure(
            charts,
            "factors_spread",
            "How far each factor's logarithm goes along with that of the weight. Shares add up to "
            "100 %; a negative one works against the others.",
        ),
        _figure(
            charts, "factors_tasks", "Geometric means over the samples; the weight's is plain."
        ),
        _figure(
            charts,
            "factors_samples",
            "The two factors that differ from sample to sample, at most 1,200 samples.",
        ),
    )
    if not grid:
        return ""
    formula = (
        "<p>A weight is the product of a feature factor (what the picture shows), a loss factor "
        "(how the sample's loss compares under that task) and a task factor (the same for all "
        "samples).</p>"
    )
    return formula + grid


def _files(findings):
    described = {
        "figures/": "every chart as PNG and as SVG",
        tables.TASKS_FILE: "a row for each task",
        tables.SAMPLES_FILE: "a row for each training image: the data's label, the label trained "
        "on, target weight, loss, prediction; classes are numbers",
        tables.CLASSES_FILE: "the names of these numbers",
        tables.LABELS_FILE: "labels from the most to the least suspicious, in the columns of "
        "label-cleaning tools",
        tables.WEIGHTS_FILE: "all weights, samples by tasks: "
        f'<code>numpy.load("{tables.WEIGHTS_FILE}")["weights"]</code>',
        f"../{SCHEDULE_FILE}": "how the schedule moved during training",
    }
    have = {"figures/", f"../{SCHEDULE_FILE}"} if findings.run.schedule else {"figures/"}
    have |= {tables.TASKS_FILE} if findings.tasks is not None else set()
    if findings.evaluation is not None:
        have |= {tables.SAMPLES_FILE, tables.CLASSES_FILE, tables.LABELS_FILE}
        have |= {tables.WEIGHTS_FILE} if findings.tasks is not None else set()
    rows = "".join(
        f"<dt><code>{name}</code></dt><dd>{text}</dd>"
        for name, text in described.items()
        if name in have
    )
    meaning = {
        "joint": "W of the schedule's formula, losses standardised over the whole training set.",
        "joint_stable": "W of the schedule's formula, with standardised losses, centred features "
        "and mean weights of the whole training set.",
        "naive": "the sample's own learned weight.",
    }.get(
        findings.run.config.method,
        "the derivative of the scheduled loss by the sample's loss, times the number of samples: "
        "how much its gradient counts in a training step.",
    )
    definition = ""
    if findings.run.method.bilevel:
        definition = (
            "<h3>Definitions</h3><p>The weight of a sample under a task is "
            f"{meaning} All images are seen as in evaluation (centre crop, no augmentation), the "
            "model in evaluation mode.</p>"
        )
    return f"<dl>{rows}</dl>{definition}"

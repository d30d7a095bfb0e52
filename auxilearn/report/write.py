"""RUN_DIR/report: the page, its charts and its tables."""

import importlib
from pathlib import Path

from auxilearn.errors import UserError, needs
from auxilearn.files import write_aside
from auxilearn.report.run import BEST_FILE, evaluate_run, read_run

REQUIREMENTS = "requirements-report.txt"
PACKAGES = ("jinja2", "matplotlib", "pandas", "scipy", "sklearn")
PAGE_FILE, FIGURES, EVENTS = "index.html", "figures", "tensorboard"


def write_report(run_dir, out=None, *, rank_by="auto", sheets=(), tensorboard=False, **places):
    """Write the report of the run in ``run_dir`` to ``out``, by default its folder ``report``.

    Args: ``rank_by`` auto, margin, weight or loss orders labels (see ``rank_labels``); ``sheets``
    are names of tasks that get a contact sheet in any case; ``tensorboard`` writes events beside
    the page; ``places`` are as ``evaluate_run`` takes them.

    Returns (path of the page, ``Statement``s on it). Raises UserError: there is no run; or, after
    everything that can be shown has been written, the run has no schedule, or its data or
    checkpoint cannot be used (an earlier report with samples then stays as it was).
    """
    run = read_run(run_dir)
    for package in PACKAGES + ("tensorboard",) * tensorboard:
        with needs(package, "the report", REQUIREMENTS):
            importlib.import_module(package)
    from auxilearn.report.brief import statements
    from auxilearn.report.figures import draw_charts
    from auxilearn.report.findings import find
    from auxilearn.report.page import build_page
    from auxilearn.report.tables import OF_THE_SAMPLES, TABLE_FILES, write_tables

    out = Path(out) if out is not None else run.directory / "report"
    evaluation, missing, error = None, [], None
    if (run.directory / BEST_FILE).exists():
        try:
            evaluation = evaluate_run(run, **places)
        except UserError as problem:
            error = str(problem)
            if any((out / name).exists() for name in OF_THE_SAMPLES):
                raise UserError(f"{error}; the report in {out} stays as it was") from None
            missing.append(f"Weights of samples, tables and pictures: {error}.")
    else:
        missing.append("Weights of samples, tables and pictures: no epoch is completed yet.")
    if not run.method.bilevel:
        learns_none = f"method {run.config.method} ({run.method.title}) learns none"
        error = error or f"{run.directory} has no schedule to show: --{learns_none}"
        missing.append(f"A schedule: {learns_none}.")
    elif not run.schedule:
        missing.append(
            "How the schedule moved during training: there has been no upper step so far."
        )
    findings = find(run, evaluation, missing, rank_by)
    wanted = _task_numbers(findings, sheets)
    page = out / PAGE_FILE
    try:
        out.mkdir(exist_ok=True, parents=True)
        for name in (PAGE_FILE, *TABLE_FILES):  # of an earlier report, which may have had more
            (out / name).unlink(missing_ok=True)
        if tensorboard:
            from auxilearn.report.tensorboard import write_events

            write_events(run, out / EVENTS)
        charts = draw_charts(findings, out / FIGURES)
        write_tables(out, findings)
        html = build_page(findings, charts, wanted)
        write_aside(page, lambda file: file.write(html.encode()))
    except OSError as problem:
        raise UserError(
            f"{problem.filename or out} cannot be written ({problem.strerror}); --out names "
            "another folder"
        ) from None
    if error:
        raise UserError(f"{error}; what can still be shown is in {page}")
    return page, statements(findings)


def _task_numbers(findings, names):
    """The numbers of the tasks called ``names``."""
    known = list(findings.tasks.name) if findings.tasks is not None else list(names)
    for name in names:
        if name not in known:
            raise UserError(
                f"--sheets {name}: no such task; expected names as in tasks.csv, as {known[-1]}"
            )
    return [known.index(name) for name in names]

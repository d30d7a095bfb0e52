"""The report of a training run: what its task-data scheduler learned, as a page and as tables.

``python inspect_schedule.py RUN_DIR`` writes it. ``schedule_weights``, which computes the weights
for any model, scheduler and data, lives in ``auxilearn.weights``.
"""


def __getattr__(name):
    if name not in ("schedule_weights", "ScheduleTable"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from auxilearn import weights

    return getattr(weights, name)

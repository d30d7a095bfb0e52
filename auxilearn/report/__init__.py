"""The report of a training run: what its task-data scheduler learned, as a page and as tables.

``python inspect_schedule.py RUN_DIR`` writes it. ``schedule_weights``, which computes the weights
for any model, scheduler and data, lives in ``auxilearn.weights``.
"""

from auxilearn.weights import ScheduleTable, schedule_weights

__all__ = ["ScheduleTable", "schedule_weights"]

"""What a scheduler learned: the weights of samples and tasks, as a table and as a page.

``schedule_weights`` serves any model, scheduler and data. ``python inspect_schedule.py RUN_DIR``
writes the report of a training run.
"""

from auxilearn.weights import ScheduleTable, schedule_weights

__all__ = ["ScheduleTable", "schedule_weights"]

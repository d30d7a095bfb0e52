"""The report of a training run: what its task-data scheduler learned, as a page and as tables.

``python inspect_schedule.py RUN_DIR`` writes it.
"""

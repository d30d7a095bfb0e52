"""A run's metrics and schedule as TensorBoard events, while it trains or afterwards.

Tags: step/NAME, upper/NAME and epoch/NAME as in metrics.jsonl, schedule/TASK the mean weights,
target_weight/GROUP_QUANTILE. Importing this module imports tensorboard.
"""

from torch.utils.tensorboard import SummaryWriter

from auxilearn.run.history import QUANTILES


class Events:
    """Writes the rows of metrics.jsonl and schedule.jsonl, dicts, as scalars to ``directory``.

    ``after``: the lower step after which the run goes on; what was written of later ones, before an
    interruption, TensorBoard then leaves out.
    """

    def __init__(self, directory, after=0):
        self.writer = SummaryWriter(str(directory), purge_step=after + 1 if after else None)

    def metrics(self, row):
        for name, value in row.items():
            if name not in ("kind", "step") and isinstance(value, (int, float)):
                self.writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def schedule(self, names, row):
        """``names``: of the tasks."""
        for name, value in zip(names or (), row["mean_weight"], strict=False):
            self.writer.add_scalar(f"schedule/{name}", value, row["step"])
        for group, quantiles in row["target_weight"].items():
            for quantile, value in zip(QUANTILES, quantiles, strict=True):
                self.writer.add_scalar(f"target_weight/{group}_{quantile:.0%}", value, row["step"])

    def close(self):
        self.writer.close()


def write_events(run, directory):
    """Write all rows of a ``Run`` to ``directory``, in place of earlier events there."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    events = Events(directory)
    for rows in run.rows.values():
        for row in rows:
            events.metrics(row)
    for row in run.schedule:
        events.schedule(run.task_names, row)
    events.close()

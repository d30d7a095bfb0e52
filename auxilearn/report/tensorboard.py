"""A run's metrics and schedule as TensorBoard events. Importing this module imports tensorboard.

Tags: step/NAME, upper/NAME and epoch/NAME as in metrics.jsonl, schedule/TASK the mean weights,
target_weight/GROUP_QUANTILE.
"""

from torch.utils.tensorboard import SummaryWriter

from auxilearn.run.history import QUANTILES


def write_events(run, directory):
    """Write all rows of a ``Run`` to ``directory``, in place of earlier events there."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(directory)) as writer:
        for kind, rows in run.rows.items():
            for row in rows:
                for name, value in row.items():
                    if name != "step" and isinstance(value, (int, float)):
                        writer.add_scalar(f"{kind}/{name}", value, row["step"])
        for row in run.schedule:
            for name, value in zip(run.task_names, row["mean_weight"], strict=True):
                if value is not None:
                    writer.add_scalar(f"schedule/{name}", value, row["step"])
            for group, values in row["target_weight"].items():
                for quantile, value in zip(QUANTILES, values, strict=True):
                    tag = f"target_weight/{group}_{quantile:.0%}"
                    writer.add_scalar(tag, value, row["step"])

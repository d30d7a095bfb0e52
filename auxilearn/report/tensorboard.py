"""A run's metrics and schedule as TensorBoard events.

Importing this module imports tensorboard.
"""

from torch.utils.tensorboard import SummaryWriter

from auxilearn.report.history import QUANTILES


def write_events(run, directory):
    """Write the rows of a ``Run`` as scalars to ``directory``, in place of earlier events there.

    Tags: step/NAME, upper/NAME and epoch/NAME as in metrics.jsonl, schedule/TASK the mean weights,
    target_weight/GROUP_QUANTILE.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(directory))
    for kind, rows in run.rows.items():
        for row in rows:
            for name, value in row.items():
                if name not in ("kind", "step") and isinstance(value, (int, float)):
                    writer.add_scalar(f"{kind}/{name}", value, row["step"])
    for row in run.schedule:
        for name, value in zip(run.task_names or (), row["mean_weight"], strict=False):
            writer.add_scalar(f"schedule/{name}", value, row["step"])
        for group, quantiles in row["target_weight"].items():
            for quantile, value in zip(QUANTILES, quantiles, strict=True):
                writer.add_scalar(f"target_weight/{group}_{quantile:.0%}", value, row["step"])
    writer.close()

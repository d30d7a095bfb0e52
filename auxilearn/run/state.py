"""What a run carries from step to step: kept in checkpoints, put back to the same bits."""

import dataclasses
import math
import os
import shlex
import time
from pathlib import Path

import numpy as np
import torch

from auxilearn.errors import DivergenceError, UserError
from auxilearn.run.config import LOG_EVERY
from auxilearn.run.history import ScheduleHistory
from auxilearn.run.margins import Margins, mean_margins
from auxilearn.run.progress import Progress, named
from auxilearn.run.record import START_FILE

REPORT_SCRIPT = Path(__file__).parents[2] / "inspect_schedule.py"


class State:
    """The state of a ``Run`` that is recorded in ``record``.

    ``best``: where validation was best so far: phase, epoch, step, valid_accuracy (or valid_rmse)
    and the hash of the checkpoint; {} before the first epoch's end. ``history``: of the schedule,
    on the rank that writes, or None. ``margins``: of the training samples, this rank's share; None
    if the target is a real number.
    """

    def __init__(self, run, record):
        self.run, self.record = run, record
        self.progress = Progress(run, record)
        self.history = None
        self.margins = Margins.of_run(run)
        self.best = {}
        self._start = time.perf_counter()

    def read(self, upper_step_after=None):
        """Read what the last lower steps left on the device: nothing else of them is waited for.

        ``upper_step_after``: the lower step that an upper step is to follow; the schedule's row is
        written then. Raises DivergenceError: a lower step was not finite.
        """
        clock = time.perf_counter()
        window, history = self.progress.window, self.history
        if self.margins:
            self.margins.take()
        of_steps = window.waiting()
        of_schedule = history.waiting() if history and upper_step_after else []
        arrays = _on_host(of_steps + of_schedule)
        diverged = window.take(*(a.tolist() for a in arrays[: len(of_steps)]))
        window.lower_seconds += time.perf_counter() - clock  # a GPU works on the steps meanwhile
        if diverged:
            step, loss, norm = diverged
            reason = f"the scheduled training loss is {loss}"
            if math.isfinite(loss):
                reason = (
                    f"the lower level's gradient has norm {norm}, at a scheduled loss of {loss}"
                )
            reason += "; a smaller --main_lr may help"
            raise self.diverged(step, reason)
        if of_schedule:
            means = history.write(upper_step_after, arrays[len(of_steps) :])
            self.progress.check_schedule(upper_step_after, means)

    def save_and_stop(self, step, stop):
        """Save a checkpoint where one is due or a signal has asked to end, and end then.

        ``stop``: the loop's ``StopRequest``. Raises Interrupted.
        """
        plan, ranks, every = self.run.plan, self.run.ranks, self.run.config.save_every
        due = step % every == 0 if every else plan.epoch_ends(step)
        # Several ranks have to agree, and would wait for each other in every step.
        heard = ranks.size == 1 or due or step % LOG_EVERY == 0
        stopping = heard and ranks.total(stop.signal is not None)[0]
        if due or stopping:
            self.save(step)
        if stopping and step < plan.total_steps:
            raise stop.interrupted(
                f"stopped after step {step} of {plan.total_steps} as asked; continue with "
                f"--exp_name {self.run.config.exp_name} --resume 1"
            )

    def save(self, step):
        """Save all that the steps to come depend on. The batches follow from the step."""
        self.read()
        self._check_finite(step)
        fine_tuning = self.run.fine_tuning
        state = {
            "step": step,
            **self.run.bilevel.state_dict(),
            "fine_tuning": fine_tuning.lower.state_dict() if fine_tuning else None,
            "random": self.run.ranks.gathered(_random_state(self.run.device)),
            "best": self.best,
            "reported": self.progress.reported,
            "window": self.run.ranks.gathered(self.progress.window.state()),
            "history": self.history.state() if self.history else None,
            "margins": self._margins(),
            "seconds": time.perf_counter() - self._start,
        }
        self.record.save_checkpoint(step, state)
        self._write_margins(state["margins"])

    def _margins(self):
        """Every rank's state of them, or None."""
        return self.run.ranks.gathered(self.margins.state()) if self.margins else None

    def _write_margins(self, states):
        if states:
            self.record.save_margins(mean_margins(states))

    def restore(self):
        """Put back the last checkpoint, if there is one. Returns the number of steps done."""
        run = self.run
        state = self.record.load_checkpoint() if run.config.resume else None
        if run.plan.bilevel and run.ranks.first:  # after what was appended is cut back
            self.history = ScheduleHistory.of_run(self.record.directory, run)
        state = run.ranks.from_first(state)
        if state is None:
            return 0
        before, now = len(state["random"]), run.ranks.size
        if before != now:
            raise UserError(
                f"the run {run.config.exp_name} was trained by {before} process"
                f"{'es' * (before > 1)}, not by {now}: continue it with torchrun --nproc_per_node "
                f"{before}"
            )
        run.bilevel.load_state_dict(state)
        if run.fine_tuning:
            run.fine_tuning.lower.load_state_dict(state["fine_tuning"])
        _set_random_state(state["random"][run.ranks.rank], run.device)
        self.best = state["best"]
        self.progress.reported = state["reported"]
        self.progress.window.restore(state["window"][run.ranks.rank])
        if self.history:
            self.history.restore(state["history"], run.device)
        if self.margins:
            self.margins.restore(state["margins"][run.ranks.rank])
        self._start -= state["seconds"]
        return state["step"]

    @property
    def _valid(self):
        return f"valid_{self.run.metric.name}"

    def keep_if_best(self, step, value):
        """Keep the model and the scheduler if ``value``, of the metric in validation, is the best
        so far."""
        if self.best and not self.run.metric.better(value, self.best[self._valid]):
            return
        self._check_finite(step)
        plan, bilevel = self.run.plan, self.run.bilevel
        self.best = {
            "phase": plan.phase(step),
            "epoch": plan.epoch(step),
            "step": step,
            self._valid: value,
        }
        self.best["hash"] = self.record.save_best(
            {
                "model": bilevel.model.state_dict(),
                "scheduler": bilevel.scheduler.state_dict(),
                "config": dataclasses.asdict(self.run.config),
                "tasks": [dataclasses.asdict(task) for task in self.run.tasks],
                "features": self.run.split.rows and self.run.split.rows.features,
                **self.best,
            }
        )

    def load_best(self, fine_tuning=False):
        """Put back the best model and scheduler. ``fine_tuning``: which starts from them."""
        bilevel, ranks = self.run.bilevel, self.run.ranks
        if ranks.first:
            best = self.record.load_best(self.best["hash"], START_FILE if fine_tuning else None)
            bilevel.model.load_state_dict(best["model"])
            bilevel.scheduler.load_state_dict(best["scheduler"])
        parameters = [*bilevel.model.parameters(), *bilevel.scheduler.parameters()]
        ranks.same_as_first([*(p.data for p in parameters), *bilevel.model.buffers()])

    def _check_finite(self, step):
        """Raise DivergenceError if ``step`` itself took the model or scheduler out of the finite
        numbers: of its loss and its gradient nothing shows that. One read from the device."""
        parts = self.run.bilevel.model, self.run.bilevel.scheduler
        tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
        tensors = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
        largest = torch._foreach_norm(tensors, math.inf)
        if not torch.isfinite(torch.stack(largest)).all():
            raise self.diverged(step, "its update left parameters or buffers that are not finite")

    def diverged(self, step, reason):
        """The error that ends the run."""
        kept = "no epoch was completed"
        if self.best:
            kept = f"the best checkpoint, of {named(self.best)}, is kept"
        if self.record.directory:  # not on the ranks that write nothing
            kept += f" in {self.record.directory}"
        message = f"diverged at step {step}: {reason}; {kept}"
        self.record.log(message)
        return DivergenceError(message)

    def finish(self, test):
        """Write summary.json and say how it went. Returns the summary, a dict.

        ``test``: the metric's value on the test set.
        """
        config, best, metric = self.run.config, self.best, self.run.metric
        self._write_margins(self._margins())
        summary = {
            f"test_{metric.name}": test,
            self._valid: best[self._valid],
            "best_phase": best["phase"],
            "best_epoch": best["epoch"],
            "best_step": best["step"],
            "steps": self.run.plan.total_steps,
            "seconds": time.perf_counter() - self._start,
            "method": config.method,
            "setting": config.setting,
            "corrupted_rate": config.effective_corrupted_rate,
            "labeled_per_class": config.labeled_per_class,
            "seed": config.seed,
            "exp_name": config.exp_name,
            "fingerprint": self.run.split.fingerprint,
        }
        self.record.summarise(summary)
        value = metric.text(best[self._valid])
        self.progress.say(f"best validation {metric.words} {value} in {named(best)}")
        plugin = ["--plugin", config.plugin] if config.plugin else []
        command = ["python", os.path.relpath(REPORT_SCRIPT), str(self.record.directory), *plugin]
        self.progress.say(f"look at the schedule: {shlex.join(command)}")
        self.progress.say(f"test {metric.words}: {metric.text(test)}")
        return summary


def _on_host(tensors):
    """Float64 arrays of tensors on one device, by one read."""
    if not tensors:
        return []
    numbers = torch.cat([t.reshape(-1).double() for t in tensors]).cpu().numpy()
    ends = np.cumsum([t.numel() for t in tensors])[:-1]
    return [a.reshape(t.shape) for a, t in zip(np.split(numbers, ends), tensors, strict=True)]


def _random_state(device):
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "gpu": on_gpu}


def _set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["gpu"], device)

"""Train a task model and the scheduler of its losses, and test the model.

  python data_preprocess.py --data_root CUB_200_2011
  python train_bilevel.py --method joint --train_batch_size 64 --epochs 100

This script alternates lower-level task updates with upper-level implicit-gradient updates of the
scheduler (auxilearn.hypernet.MonoJoint unless --method says otherwise). It writes
RECORD_DIR/<full|semi|noisy>/EXP_NAME with config.json, metrics.jsonl, log.txt, best.pt and
summary.json, and ends with the test accuracy of the checkpoint that was best in validation.
"""

import dataclasses
import math
import os
import time
from pathlib import Path

import torch

from auxilearn.data.split import load_split
from auxilearn.errors import run_script
from auxilearn.randomness import derived_seed
from auxilearn.run.build import build
from auxilearn.run.config import LOG_EVERY, check, ineffective, parse, resolve, slow_device_warning
from auxilearn.run.history import ScheduleHistory
from auxilearn.run.processes import StopRequest, joined, machine_faults
from auxilearn.run.progress import Progress, named
from auxilearn.run.record import START_FILE, NoRecord, open_record


def train(config):
    """Run ``config`` from data to test accuracy. Returns the summary, a dict.

    Everything is checked and built before the run's directory is made, so bad input (UserError)
    leaves nothing behind. Raises DivergenceError where the numbers stop being finite, RunError
    where the disk is full or a worker process dies.
    """
    with machine_faults(config), joined(config.device) as ranks:
        if ranks.size > 1:
            config = dataclasses.replace(config, device=str(ranks.device))
        check(config)
        split = load_split(config.split_dir, config.data_root)
        run = build(resolve(config, split), split, ranks)
        record = open_record(run) if ranks.first else NoRecord()
        try:
            summary = ranks.from_first(record.finished())
            if summary is None:
                return Training(run, record).fit(ineffective(config))
            if ranks.first:
                print(f"{record.directory} was finished before")
                print(f"test accuracy: {summary['test_accuracy']:.4f}", flush=True)
            return summary
        finally:
            record.close()


class Training:
    """The loop. ``bilevel`` takes the two kinds of steps, ``plan`` says when."""

    def __init__(self, run, record):
        self.run, self.record = run, record
        self.config, self.plan, self.ranks = run.config, run.plan, run.ranks
        self.bilevel = run.bilevel
        self.model, self.scheduler = run.bilevel.model, run.bilevel.scheduler
        self.progress = Progress(run, record)
        self.history = None  # of the schedule
        if run.method.bilevel and self.ranks.first:
            self.history = ScheduleHistory.of_run(record.directory, run)
        self.valid = run.evaluation_batches("valid")
        self.best = {}  # where validation was best: phase, epoch, step, valid_accuracy, hash
        self.start = time.perf_counter()

    def fit(self, ineffective=()):
        """Alternate, validate, keep the best, test. Returns the summary, a dict."""
        state = self.record.load_checkpoint() if self.config.resume else None
        state = self.ranks.from_first(state)
        self.progress.start(ineffective, slow_device_warning(self.config))
        torch.manual_seed(derived_seed(self.config.seed, "training", self.ranks.rank))
        done = self._restore(state) if state else 0
        plan, window = self.plan, self.progress.window
        with StopRequest() as stop, self.progress.bar(done) as bar:
            batches = self.run.lower_batches(done)
            dev_batches = self.run.dev_batches_of_lower_steps(done)
            upper_batches = self.run.upper_batches(plan.upper_steps(done))
            self.model.train()
            for step in range(done + 1, plan.total_steps + 1):
                if step == plan.main_steps + 1:
                    self._start_fine_tuning()
                clock = time.perf_counter()
                batch, dev = next(batches), next(dev_batches)
                window.data_seconds += time.perf_counter() - clock
                self._lower_step(step, batch, dev)
                if step in (1, plan.total_steps) or step % LOG_EVERY == 0:
                    self.progress.step_row(step)
                if plan.upper_step_follows(step):
                    self._upper_step(step, upper_batches)
                bar.update()
                if plan.epoch_ends(step):
                    self._validate(step)
                stopping = self.ranks.total(stop.signal is not None)[0]
                every = self.config.save_every
                if stopping or (step % every == 0 if every else plan.epoch_ends(step)):
                    self._save(step)
                if stopping and step < plan.total_steps:
                    raise stop.interrupted(
                        f"stopped after step {step} of {plan.total_steps} as asked; continue with "
                        f"--exp_name {self.config.exp_name} --resume 1"
                    )
        return self._test(time.perf_counter() - self.start)

    def _lower_step(self, step, batch, dev_batches):
        clock = time.perf_counter()
        result = self.run.at(step).lower_step(batch, dev_batches)
        loss, norm = result.loss.item(), result.gradient_norm.item()
        if not math.isfinite(loss):
            raise self._diverged(step, f"the scheduled training loss is {loss}")
        if not math.isfinite(norm):
            raise self._diverged(
                step, f"the lower level's gradient has norm {norm}, at a scheduled loss of {loss}"
            )
        if self.history and step <= self.plan.main_steps:
            self.history.add(result)
        with torch.no_grad():
            logits = self.model.heads.target_logits(result.outputs.features)
        self.progress.window.add(loss, result.outputs, logits)
        self.progress.window.lower_seconds += time.perf_counter() - clock

    def _upper_step(self, step, batches):
        if self.history:
            self.progress.check_schedule(step, self.history.mean_weights())
            self.history.write(step)
        clock = time.perf_counter()
        result = self.bilevel.upper_step(*next(batches))
        if result.hypergradient_norm is None:
            raise self._diverged(
                step,
                f"the hypergradient is not finite (development loss {result.dev_loss:.4g}, "
                f"residual {result.solution.residual:.4g}); a smaller --neumann_alpha or --solver "
                "identity may help",
            )
        self.progress.upper_row(step, result, time.perf_counter() - clock)

    def _validate(self, step):
        clock = time.perf_counter()
        self.ranks.same_as_first(list(self.model.buffers()))  # batch norm's statistics differ
        accuracy = evaluate(self.model, self.valid, self.ranks)
        if math.isnan(accuracy):
            raise self._diverged(step, "predictions on the validation set are not finite")
        self.progress.epoch_row(step, accuracy, time.perf_counter() - clock)
        if accuracy > self.best.get("valid_accuracy", -1.0):
            self.best = {
                "phase": self.plan.phase(step),
                "epoch": self.plan.epoch(step),
                "step": step,
                "valid_accuracy": accuracy,
            }
            self.best["hash"] = self.record.save_best(
                {
                    "model": self.model.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "config": dataclasses.asdict(self.config),
                    **self.best,
                }
            )

    def _start_fine_tuning(self):
        passes = self.plan.passes
        self.progress.say(
            f"fine-tuning on the development set: {passes} pass{'es' * (passes > 1)}, from the "
            f"checkpoint of {named(self.best)}"
        )
        self._load_best(START_FILE)

    def _load_best(self, keep_as=None):
        if self.ranks.first:
            best = self.record.load_best(self.best["hash"], keep_as)
            self.model.load_state_dict(best["model"])
            self.scheduler.load_state_dict(best["scheduler"])
        parameters = [*self.model.parameters(), *self.scheduler.parameters()]
        self.ranks.same_as_first([*(p.data for p in parameters), *self.model.buffers()])

    def _test(self, seconds):
        self._load_best()
        accuracy = evaluate(self.model, self.run.evaluation_batches("test"), self.ranks)
        config, best = self.config, self.best
        summary = {
            "test_accuracy": accuracy,
            "valid_accuracy": best["valid_accuracy"],
            "best_phase": best["phase"],
            "best_epoch": best["epoch"],
            "best_step": best["step"],
            "steps": self.plan.total_steps,
            "seconds": seconds,
            "method": config.method,
            "setting": config.setting,
            "corrupted_rate": config.effective_corrupted_rate,
            "labeled_per_class": config.labeled_per_class,
            "seed": config.seed,
            "exp_name": config.exp_name,
            "fingerprint": self.run.split.fingerprint,
        }
        self.record.summarise(summary)
        say = self.progress.say
        say(f"best validation accuracy {best['valid_accuracy']:.4f} in {named(best)}")
        script = os.path.relpath(Path(__file__).with_name("inspect_schedule.py"))
        say(f"what the scheduler learned: python {script} {self.record.directory}")
        say(f"test accuracy: {accuracy:.4f}")
        return summary

    def _save(self, step):
        """Save all that the steps to come depend on. The batches follow from the step."""
        fine_tuning, device = self.run.fine_tuning, self.run.device
        state = {
            "step": step,
            **self.bilevel.state_dict(),
            "fine_tuning": fine_tuning.lower.state_dict() if fine_tuning else None,
            "random": self.ranks.gathered(random_state(device)),
            "best": self.best,
            "reported": self.progress.reported,
            "window": vars(self.progress.window),
            "history": self.history.state() if self.history else None,
            "seconds": time.perf_counter() - self.start,
        }
        self.record.save_checkpoint(step, state)

    def _restore(self, state):
        """Put back what ``_save`` saved; the number of steps done."""
        self.bilevel.load_state_dict(state)
        if state["fine_tuning"]:
            self.run.fine_tuning.lower.load_state_dict(state["fine_tuning"])
        set_random_state(state["random"][self.ranks.rank], self.run.device)
        self.best = state["best"]
        self.progress.reported = state["reported"]
        vars(self.progress.window).update(state["window"])
        if self.history:
            self.history.restore(state["history"], self.run.device)
        self.start -= state["seconds"]
        self.progress.say(f"continuing after step {state['step']}")
        return state["step"]

    def _diverged(self, step, reason):
        return self.progress.diverged(step, reason, self.best)


@torch.inference_mode()
def evaluate(model, batches, ranks):
    """Share of images whose target class is predicted, over the ranks' streams of batches.

    NaN if any prediction is not finite. The model is back in its mode afterwards.
    """
    training = model.training
    model.eval()
    hits = images = 0
    for batch in batches:
        logits = model.predict(batch.images)
        hits += (logits.argmax(dim=1) == batch.labels[:, 0]).sum().item()
        hits += 0.0 if torch.isfinite(logits).all() else math.nan
        images += len(batch.images)
    model.train(training)
    hits, images = ranks.total(hits, images)
    return hits / images


def random_state(device):
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "gpu": on_gpu}


def set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["gpu"], device)


def main():
    train(parse(description=__doc__))


if __name__ == "__main__":
    run_script(main)

"""Train a task model and the scheduler of its losses, and test the model.

  python data_preprocess.py --data_root CUB_200_2011
  python train_bilevel.py --method joint --train_batch_size 64 --epochs 100

This script alternates lower-level task updates with upper-level implicit-gradient updates of the
scheduler (auxilearn.hypernet.MonoJoint unless --method says otherwise). It writes
RECORD_DIR/<full|semi|noisy>/EXP_NAME with config.json, metrics.jsonl, log.txt, best.pt and
summary.json, and ends with the test accuracy (of a real-valued target the test RMSE) of the
checkpoint that was best in validation.
"""

import dataclasses
import math
import time

import torch

from auxilearn.data.split import load_split
from auxilearn.errors import run_script
from auxilearn.randomness import derived_seed
from auxilearn.run.build import build
from auxilearn.run.command_line import parse
from auxilearn.run.config import LOG_EVERY, check, ineffective, resolve
from auxilearn.run.processes import StopRequest, joined, machine_faults
from auxilearn.run.record import NoRecord, open_record
from auxilearn.run.state import State


def train(config):
    """Run ``config`` from data to test accuracy. Returns the summary, a dict.

    Everything is checked and built before the run's directory is made, so bad input (UserError)
    leaves nothing behind. Raises DivergenceError where the numbers stop being finite, RunError
    where the disk is full.
    """
    with machine_faults(config), joined(config.device) as ranks:
        if ranks.size > 1:
            config = dataclasses.replace(config, device=str(ranks.device))
        check(config)
        split = load_split(config.split_dir, config.data_root)
        run = build(resolve(config, split), split, ranks)
        record = open_record(run) if ranks.first else NoRecord()
        try:
            # The first rank alone has a record, which may have chosen the run's name.
            known = record.finished(), run.config.exp_name
            summary, run.config.exp_name = ranks.from_first(known)
            if summary is None:
                needs_dev = run.bilevel.scheduler.needs_dev
                return fit(run, record, ineffective(config, needs_dev, bool(split.rows)))
            if ranks.first:
                print(f"{record.directory} was finished before")
                metric = run.metric
                value = metric.text(summary[f"test_{metric.name}"])
                print(f"test {metric.words}: {value}", flush=True)
            return summary
        finally:
            record.close()


def fit(run, record, idle_flags=()):
    """Alternate, validate, keep the best, test. Returns the summary, a dict.

    Args: a ``Run`` as ``build`` makes it, its record, and names of flags that change nothing in it
    (a note lists them).
    """
    plan, model = run.plan, run.bilevel.model
    torch.manual_seed(derived_seed(run.config.seed, "training", run.ranks.rank))
    state = State(run, record)
    done = state.restore()
    state.progress.start(done, idle_flags)
    valid = run.evaluation_batches("valid")
    with StopRequest() as stop, state.progress.bar(done) as bar:
        batches = run.lower_batches(done)
        dev_batches = run.dev_batches_of_lower_steps(done)
        upper_batches = run.upper_batches(plan.upper_steps(done))
        model.train()
        for step in range(done + 1, plan.total_steps + 1):
            if step == plan.main_steps + 1:
                state.progress.start_fine_tuning(state.best)
                state.load_best(fine_tuning=True)
            lower_step(run, state, step, batches, dev_batches)
            if step in (1, plan.total_steps) or step % LOG_EVERY == 0:
                state.read()
                state.progress.step_row(step)
            if plan.upper_step_follows(step):
                upper_step(run, state, step, upper_batches)
            bar.update()
            if plan.epoch_ends(step):
                validate(run, state, step, valid)
            state.save_and_stop(step, stop)
    state.load_best()
    value = evaluate(model, run.evaluation_batches("test"), run.metric, run.ranks)
    return state.finish(value)


def lower_step(run, state, step, batches, dev_batches):
    """One step of the task model, by the scheduled loss or, in fine-tuning, the target's alone."""
    window = state.progress.window
    clock = time.perf_counter()
    batch, dev = next(batches), next(dev_batches)
    window.data_seconds += time.perf_counter() - clock
    clock = time.perf_counter()
    fine_tuning = step > run.plan.main_steps
    bilevel = run.fine_tuning if fine_tuning else run.bilevel
    result = bilevel.lower_step(batch, dev)
    if state.history and not fine_tuning:
        state.history.add(result)
    with torch.no_grad():
        target_outputs = bilevel.model.heads.target_logits(result.outputs.features)
    window.add(result, target_outputs)
    if state.margins and not fine_tuning:
        state.margins.add(result.outputs, target_outputs)
    window.lower_seconds += time.perf_counter() - clock


def upper_step(run, state, step, batches):
    """One step of the scheduler along the hypergradient."""
    state.read(upper_step_after=step)
    clock = time.perf_counter()
    result = run.bilevel.upper_step(*next(batches))
    if result.hypergradient_norm is None:
        raise state.diverged(
            step,
            f"the hypergradient is not finite (development loss {result.dev_loss:.4g}, residual "
            f"{result.solution.residual:.4g}); a smaller --neumann_alpha or --solver identity may "
            "help",
        )
    state.progress.upper_row(step, result, time.perf_counter() - clock)


def validate(run, state, step, batches):
    """Validation at the end of an epoch; the best checkpoint is kept."""
    state.read()
    clock = time.perf_counter()
    model = run.bilevel.model
    run.ranks.same_as_first(list(model.buffers()))  # each rank has batch norm statistics of its own
    value = evaluate(model, batches, run.metric, run.ranks)
    if math.isnan(value):
        raise state.diverged(step, "predictions on the validation set are not finite")
    state.progress.epoch_row(step, value, time.perf_counter() - clock)
    state.keep_if_best(step, value)


@torch.inference_mode()
def evaluate(model, batches, metric, ranks):
    """The target task's metric on the samples that have its label, over the ranks' streams.

    NaN if any prediction is not finite. The model is in training mode afterwards.
    """
    model.eval()
    points, samples = [], 0
    for batch in batches:
        outputs = model.predict(batch.inputs)
        of_each = metric.points(outputs, batch.labels)
        if batch.mask is None:
            samples += len(batch.labels)
        else:
            of_each = of_each.masked_fill(~batch.mask[:, 0], 0)
            samples += batch.mask[:, 0].sum()
        points.append(torch.where(torch.isfinite(outputs).all(), of_each.sum(), math.nan))
    model.train()
    points, samples = ranks.total(float(sum(points)), float(samples))
    return metric.value(points, samples)


def main():
    train(parse(description=__doc__))


if __name__ == "__main__":
    run_script(main)

"""What a person sees of a run while it trains, and the rows of metrics.jsonl."""

import math

import torch
from tqdm import tqdm

from auxilearn.run.build import FINE_TUNING
from auxilearn.run.config import slow_device
from auxilearn.solvers import stable_alpha

# Mean weights of a schedule over the samples of the last lower steps, in its collapse:
VANISHING = 1e-4  # the largest of the tasks' is below
DOMINATING = 0.99  # the largest has this share of their sum


class Progress:
    """Lines for the person and for log.txt, a progress bar on a terminal, means between two rows.

    Args: the ``Run``, its record, and the number of steps ``done`` before.
    """

    def __init__(self, run, record):
        self.run, self.record = run, record
        self.reported = []
        self.window = Window(run.metric)
        self._bar = None

    def bar(self, done):
        """The progress bar, for a ``with`` block; nothing where stderr is a file."""
        self._bar = tqdm(
            total=self.run.plan.total_steps,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.run.ranks.first else True,
        )
        return self._bar

    def say(self, text):
        if not self.run.ranks.first:
            return
        self.record.log(text)
        if self._bar is None or self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def warn_once(self, what, text):
        if what not in self.reported:
            self.reported.append(what)
            self.say(f"warning: {text}")

    def start(self, done, ineffective):
        """Say what is trained, on what, and what to know about it.

        Args: the number of steps ``done`` before, and names of flags that change nothing.
        """
        run, config, plan = self.run, self.run.config, self.run.plan
        others = f" and {run.ranks.size - 1} more" if run.ranks.size > 1 else ""
        samples = "rows" if run.split.rows else "images"
        self.say(
            f"{config.method} ({run.method.title}), {config.setting} setting, "
            f"{len(run.train_set)} {samples}, {config.task_num} task{'s' * (config.task_num > 1)}, "
            f"on {run.device}{others}"
        )
        weights = "random weights"
        if config.backbone_pretrain or config.backbone_weights:
            weights = config.backbone_weights or "ImageNet weights"
        pixels = "" if run.split.rows else f" at {config.image_size} pixels"
        self.say(f"{config.backbone}{pixels} from {weights}, learning rate {config.main_lr:g}")
        self.say(f"recording in {self.record.directory}")
        if ineffective:
            flags = ", ".join(f"--{name}" for name in ineffective)
            self.say(f"note: flags without effect in this run: {flags}")
        if "corrupted_rate" in ineffective:
            self.say("warning: --corrupted_rate without --corrupted 1: no label is corrupted")
        if slow := slow_device(config):
            self.say(f"warning: {slow}")
        if plan.bilevel and not plan.upper_steps(plan.main_steps):
            self.say(
                f"warning: {plan.main_steps} lower steps end before the first upper step "
                f"(--warmup_epochs {config.warmup_epochs} --hyperstep {config.hyperstep}): the "
                "schedule stays as it starts"
            )
        if done:
            self.say(f"continuing after step {done}")

    def start_fine_tuning(self, best):
        """``best``: the checkpoint that it starts from."""
        passes = self.run.plan.passes
        self.say(
            f"fine-tuning on the development set: {passes} pass{'es' * (passes > 1)}, from the "
            f"checkpoint of {named(best)}"
        )

    def step_row(self, step):
        """Write the row of the lower steps up to ``step``."""
        plan = self.run.plan
        row = self.window.close(step, self.run.ranks)
        phase = {"phase": plan.phase(step), "epoch": plan.epoch(step)}
        self.record.metrics("step", **phase, **row)
        name = self.run.metric.name
        self._bar.set_postfix({"loss": f"{row['loss']:.3f}", name: row[name]})

    def upper_row(self, step, result, seconds):
        """Write the row of an upper step, and say if the series diverges."""
        config, solution = self.run.config, result.solution
        norm, alpha = result.hypergradient_norm, None
        if solution.diverging and solution.growth is not None:
            alpha = stable_alpha(config.neumann_alpha, solution.growth)
            cure = "no alpha is stable: its terms grow along negative curvature, or overflow"
            if alpha is not None:
                cure = f"the largest stable --neumann_alpha is about {alpha:.2g}"
            self.warn_once(
                "divergence",
                f"step {step}: the Neumann series diverges at alpha {config.neumann_alpha:g} "
                f"(residual {solution.residual:.3g}), and is used all the same: {cure}",
            )
        self.record.metrics(
            "upper",
            step=step,
            dev_loss=result.dev_loss,
            hypergradient_norm=norm,
            clipped=bool(config.max_grad_norm) and norm > config.max_grad_norm,
            residual=solution.residual,
            products=solution.products,
            diverging=solution.diverging,
            stable_alpha=alpha,
            upper_seconds=seconds,
        )

    def check_schedule(self, step, weights):
        """Say, once, that the schedule trains nothing any more, or one task alone.

        ``weights``: the mean weight of every task.
        """
        largest = max(weights)
        if largest < VANISHING:
            self.warn_once(
                "vanishing",
                f"step {step}: the schedule has collapsed to zero (largest mean weight of a task "
                f"{largest:.2g}); a smaller --upper_lr may help",
            )
        elif len(weights) > 1 and largest > DOMINATING * sum(weights):
            self.warn_once(
                "dominating",
                f"step {step}: the schedule has collapsed to task {weights.index(largest)} (0 is "
                f"the target), which has {largest / sum(weights):.1%} of the mean weight",
            )

    def epoch_row(self, step, value, seconds):
        """Write the row of an epoch's end; ``value``: of the metric in validation."""
        plan, metric = self.run.plan, self.run.metric
        phase, epoch = plan.phase(step), plan.epoch(step)
        self.record.metrics(
            "epoch",
            phase=phase,
            epoch=epoch,
            step=step,
            **{f"valid_{metric.name}": value, "valid_seconds": seconds},
        )
        name = (
            f"fine-tuning pass {epoch} of {plan.passes}"
            if phase == FINE_TUNING
            else (f"epoch {epoch}")
        )
        self.say(f"{name}, step {step}: validation {metric.words} {metric.text(value)}")


def named(best):
    """``epoch 3`` or ``fine-tuning pass 3``."""
    word = "fine-tuning pass" if best["phase"] == FINE_TUNING else "epoch"
    return f"{word} {best['epoch']}"


class Window:
    """Means over the lower steps since the last row of metrics.

    ``add`` leaves the numbers of a step on the device, ``take`` counts them once they are read.
    ``metric``: of the target task.
    """

    def __init__(self, metric, start=0):
        self.metric = metric
        self.start = start
        self.taken = start  # the step up to which numbers are counted
        self.loss = self.target_loss = self.aux_loss = 0.0
        self.points = self.known = self.labeled_steps = self.aux_steps = 0
        self.data_seconds = self.lower_seconds = 0.0
        self._waiting = []

    @torch.no_grad()
    def add(self, step, outputs):
        """Take down a ``LowerStep``; ``outputs`` (B, C) of the target task, after it."""
        losses, _, _, mask, labels = step.outputs
        points = self.metric.points(outputs, labels)
        if mask is None:
            known, others = losses.new_full((), len(losses)), losses[:, 1:].mean()
        else:
            points, known = points.masked_fill(~mask[:, 0], 0), mask[:, 0].sum()
            losses = losses.masked_fill(~mask, 0.0)
            others = losses[:, 1:].sum() / mask[:, 1:].sum()
        numbers = step.loss, step.gradient_norm, losses[:, 0].sum(), others, points.sum(), known
        self._waiting.append(torch.stack([n.to(losses.dtype) for n in numbers]))

    def waiting(self):
        """The numbers of the steps that are not counted yet: a tensor (steps, 6) in a list, or
        none."""
        return [torch.stack(self._waiting)] if self._waiting else []

    def take(self, numbers=()):
        """Count what ``waiting`` holds, read into lists.

        Returns (step, loss, norm of its gradient) of the first step that is not finite, or None.
        """
        self._waiting.clear()
        for loss, norm, target, others, points, known in numbers:
            self.taken += 1
            if not math.isfinite(loss + norm):
                return self.taken, loss, norm
            self.loss += loss
            if known:
                self.target_loss += target / known
                self.labeled_steps += 1
            if not math.isnan(others):
                self.aux_loss += others
                self.aux_steps += 1
            self.points += points
            self.known += int(known)
        return None

    def state(self):
        """What is counted, for a checkpoint."""
        return {n: value for n, value in vars(self).items() if n not in ("metric", "_waiting")}

    def restore(self, state):
        """Go on from ``state()``."""
        vars(self).update(state)

    def close(self, step, ranks):
        """The row of the steps up to ``step``, all of them counted; starts over.

        Losses and seconds are per step, those of the target and of the auxiliary tasks per step
        that had a label (without any, None and 0); over several ranks, losses are the mean of
        theirs.
        """
        steps = step - self.start
        loss, target_loss, labeled_steps, aux_loss, aux_steps, points, known = ranks.total(
            self.loss,
            self.target_loss,
            self.labeled_steps,
            self.aux_loss,
            self.aux_steps,
            self.points,
            self.known,
        )
        row = {
            "step": step,
            "loss": loss / steps / ranks.size,
            "target_loss": target_loss / labeled_steps if labeled_steps else None,
            "aux_loss": aux_loss / max(aux_steps, 1),
            self.metric.name: self.metric.value(points, known) if known else None,
            "data_seconds": self.data_seconds / steps,
            "lower_seconds": self.lower_seconds / steps,
        }
        self.__init__(self.metric, step)
        return row

"""The bilevel training loop, one for every method.

lower step   Adam or SGD on theta with the gradient of the scheduled loss of a training batch
upper step   every ``hyperstep`` lower steps: SGD or Adam on phi with the hypergradient
epoch        accuracy on the validation set; the best checkpoint is kept, and tested at the end

A method that is fine-tuned ends with passes over the development set, whose steps are lower steps
on the target task alone, without upper steps.
"""

import contextlib
import dataclasses
import math
import signal
import time

import torch
from tqdm import tqdm

from auxilearn.data.cache import open_images
from auxilearn.data.dataset import (
    EndlessBatches,
    FirstBatch,
    OrderedBatches,
    Shard,
    Stream,
    sample_set,
    training_set_of,
)
from auxilearn.data.split import load_split
from auxilearn.errors import DivergenceError, RunError, UserError, needs
from auxilearn.implicit_diff import (
    conjugate_gradient,
    identity,
    neumann,
    preconditioned,
    stable_alpha,
)
from auxilearn.methods import LOWER, METHODS, Problem
from auxilearn.models import TaskModel, build_backbone
from auxilearn.optim import adam_scale, apply_hypergradient
from auxilearn.randomness import derived_seed
from auxilearn.run.config import (
    NEUTRAL,
    check,
    defaults,
    fine_tunes,
    ineffective,
    resolve,
    training_set_name,
)
from auxilearn.run.distributed import Ranks, joined
from auxilearn.run.history import ScheduleHistory
from auxilearn.run.record import START_FILE, NoRecord, RunRecord, environment, free_name
from auxilearn.run.signals import StopRequest
from auxilearn.second_order.products import UpperLevel, scheduled_loss

UPPER_BETAS = 0.9, 0.99  # upper steps are few: the usual 0.999 remembers a thousand of them
# Mean weights of a schedule over the samples of the last lower steps, in its collapse:
VANISHING = 1e-4  # the largest of the tasks' is below
DOMINATING = 0.99  # the largest has this share of their sum


def train(config):
    """Run ``config`` from data to test accuracy. Returns the summary, a dict.

    Everything is checked and built before the run's directory is made, so bad input (UserError)
    leaves nothing behind. Raises DivergenceError where the numbers stop being finite, RunError
    where the disk is full or a worker process dies.
    """
    with _machine_faults(config), joined(config.device) as ranks:
        if ranks.size > 1:
            config = dataclasses.replace(config, device=str(ranks.device))
        check(config)
        split = load_split(config.split_dir, config.data_root)
        trainer = Trainer(resolve(config, split), split, ranks, ineffective(config, ranks.size))
        record = _open_record(trainer) if ranks.first else NoRecord()
        try:
            summary = ranks.from_first(record.finished())
            if summary is None:
                return trainer.fit(record)
            if ranks.first:
                print(f"{record.directory} was finished before")
                print(f"test accuracy: {summary['test_accuracy']:.4f}", flush=True)
            return summary
        finally:
            record.close()


@contextlib.contextmanager
def _machine_faults(config):
    """A full or failing disk and dead worker processes, in one line."""
    name = config.exp_name or "NAME"
    advice = f"what was recorded is kept: continue with --exp_name {name} --resume 1"
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0]
        if _is_of_a_dead_worker(error):
            # PyTorch's handler would raise the same again at the end of every other worker.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise RunError(
                f"a process that loads images died ({first_line}), perhaps for want of memory; "
                f"--num_workers sets their number; {advice}"
            ) from None
        if not isinstance(error, OSError):
            raise
        place = error.filename or f"the run's folder in {config.record_dir}"
        raise RunError(f"{place}: {error.strerror or first_line}; {advice}") from None


def _is_of_a_dead_worker(error):
    """Whether PyTorch raises ``error`` where a worker, or its end of a socket, has gone."""
    sockets = (ConnectionResetError, ConnectionRefusedError, EOFError)
    return isinstance(error, sockets) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("DataLoader worker (pid", "ancillary data"))
    )


def _open_record(trainer):
    """The directory of the run; where the configuration names none, a new one is chosen."""
    config = trainer.config
    directory = f"{config.record_dir}/{config.setting}"
    if config.exp_name is None:
        name = free_name(directory, f"train_{config.method}_seed{config.seed}")
        config = trainer.config = dataclasses.replace(config, exp_name=name)
    return RunRecord(
        f"{directory}/{config.exp_name}",
        trainer.description(),
        overwrite=config.overwrite,
        resume=config.resume,
        neutral=NEUTRAL,
        defaults=defaults(),
    )


class Trainer:
    """One run: task model, scheduler, their optimisers and their streams of batches.

    Args: a resolved ``Config``, the ``Split`` it was resolved against, the ``Ranks`` that share
    the run (by default this process alone), and the names of settings to be called ineffective.
    """

    def __init__(self, config, split, ranks=None, ineffective=()):
        self.config = config
        self.ineffective = ineffective
        self.split = split
        self.ranks = ranks = ranks or Ranks()
        # Not a method: through the upper level, the trainer would hold itself and its workers.
        self._average = lambda tensors, batches: ranks.average(
            tensors, sum(len(batch.sample_id) for batch in batches)
        )
        self.method = METHODS[config.method]
        self.device = torch.device(config.device)
        self.open_events = None
        if config.tensorboard and ranks.first:
            with needs("tensorboard", "--tensorboard", "requirements-report.txt"):
                from auxilearn.report.tensorboard import Events
            self.open_events = Events
        self.train_set = training_set_of(config, split)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.steps_per_epoch = math.ceil(len(self.train_set) / config.train_batch_size)
        self.main_steps = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.main_steps = min(self.main_steps, config.max_steps)
        self.total_steps = self.main_steps
        self.fine_tunes = fine_tunes(config)
        if self.fine_tunes:
            self.dev_set = sample_set(split, "dev", config.task_num)
            self.steps_per_dev_epoch = math.ceil(len(self.dev_set) / config.aux_batch_size)
            self.total_steps += config.dev_epochs * self.steps_per_dev_epoch
        self._build_models()
        self._build_streams()

    def _build_models(self):
        config = self.config
        torch.manual_seed(derived_seed(config.seed, "task model"))
        backbone = build_backbone(
            config.backbone, config.in_dim, config.backbone_pretrain, config.backbone_weights
        )
        class_counts = [len(self.split.class_names)] + [2] * (config.task_num - 1)
        amp = config.amp == "bf16"
        model = TaskModel(backbone, config.in_dim, class_counts, config.aux_weight, amp)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.lower_model = torch.compile(self.model) if config.compile else self.model
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32
        self.theta = list(self.model.parameters())
        torch.manual_seed(derived_seed(config.seed, "scheduler"))
        problem = Problem.of(config, len(self.train_set))
        self.scheduler = self.method.build(problem).to(self.device)
        self.lower_optimizer = build_lower_optimizer(config, self.theta, config.main_lr)
        self.phi = list(self.scheduler.parameters())
        self.in_lower_level = self.theta
        if self.method.learned == LOWER:
            self.in_lower_level = self.theta + self.phi
            self.lower_optimizer.add_param_group({"params": self.phi, "weight_decay": 0.0})
        if self.method.bilevel:
            self.clip_at = config.max_grad_norm or math.inf
            self.upper_optimizer = build_upper_optimizer(config, self.phi)
            exact = config.reduction == "exact"
            solver = build_solver(config)
            if config.precondition == "adam":
                optimizer, theta = self.lower_optimizer, self.theta
                solver = preconditioned(solver, lambda: adam_scale(optimizer, theta))
            self.upper_level = UpperLevel(
                self.model,
                self.scheduler,
                solver,
                average=self._average if exact else None,
            )

    def _build_streams(self):
        config = self.config
        self.images = open_images(
            self.split, config.image_size, config.cache, config.cache_dir, config.num_workers
        )
        lower = EndlessBatches(len(self.train_set), config.train_batch_size, config.seed, "lower")
        self.lower_batches = self._stream(self.train_set, lower, "lower", augment=True)
        self.valid_batches = self._evaluation_stream("valid")
        if self.fine_tunes:
            order = EndlessBatches(
                len(self.dev_set), config.aux_batch_size, config.seed, "fine-tuning"
            )
            self.fine_tuning_batches = self._stream(
                self.dev_set, order, "fine-tuning", augment=True, workers=1
            )
        if not self.method.bilevel:
            return
        upper = EndlessBatches(len(self.train_set), config.train_batch_size, config.seed, "upper")
        self.upper_batches = self._stream(self.train_set, upper, "upper", augment=True, workers=1)
        dev_set = sample_set(self.split, "dev", config.task_num)
        if config.dev_batches == "first":
            dev = FirstBatch(len(dev_set), config.aux_batch_size)
        else:
            dev = EndlessBatches(len(dev_set), config.aux_batch_size, config.seed, "dev")
        self.dev_batches = self._stream(dev_set, dev, "dev", augment=False, workers=1)

    def _stream(self, samples, batches, name, *, augment, workers=None):
        config = self.config
        limit = config.num_workers if workers is None else min(workers, config.num_workers)
        if self.ranks.size > 1 and not isinstance(batches, OrderedBatches):
            batches = Shard(batches, self.ranks.rank, self.ranks.size)
        return Stream(
            self.images,
            samples,
            batches,
            config.image_size,
            self.device,
            augment=augment,
            seed=config.seed,
            name=name,
            workers=limit,
        )

    def _evaluation_stream(self, name):
        samples = sample_set(self.split, name, self.config.task_num)
        ranks = self.ranks
        batches = OrderedBatches(len(samples), self.config.test_batch_size, ranks.rank, ranks.size)
        return self._stream(samples, batches, name, augment=False)

    def description(self):
        """Everything that determines the run, for config.json."""
        split = self.split
        return {
            "config": dataclasses.asdict(self.config),
            "setting": self.config.setting,
            "data": {
                "fingerprint": split.fingerprint,
                "data_root": str(split.data_root),
                "split_seed": split.info["split_seed"],
                "aux_shot": split.info["aux_shot"],
                "classes": len(split.class_names),
                "sets": {name: len(indices) for name, indices in split.indices.items()},
                "trained_on": training_set_name(self.config),
            },
            "environment": environment(),
        }

    # ----------------------------------------------------------------------------------------------

    def fit(self, record):
        """Train, keep the best checkpoint in ``record``, test it. Returns the summary."""
        config = self.config
        self.record = record
        state = record.load_checkpoint(self._check_state) if config.resume else None
        state = self.ranks.from_first(state)
        self.history = self._open_history()
        self._say(
            f"{config.method} ({self.method.title}), {config.setting} setting, "
            f"{len(self.train_set)} images, {config.task_num} task{'s' * (config.task_num > 1)}, "
            f"on {self.device}"
            + (f" and {self.ranks.size - 1} more" if self.ranks.size > 1 else "")
        )
        self._say(f"recording in {record.directory}")
        if self.ineffective:
            flags = ", ".join(f"--{name}" for name in self.ineffective)
            self._say(f"note: settings without effect in this run: {flags}")
        if "corrupted_rate" in self.ineffective:
            self._say("warning: --corrupted_rate without --corrupted 1: no label is corrupted")
        if self.method.bilevel and not self._upper_steps(self.main_steps):
            self._say(
                f"warning: {self.main_steps} lower steps end before the first upper step "
                f"(--warmup_epochs {config.warmup_epochs} --hyperstep {config.hyperstep}): the "
                "schedule stays as it starts"
            )
        torch.manual_seed(derived_seed(config.seed, "training", self.ranks.rank))
        self.best = {"valid_accuracy": -1.0}
        self.skipped = 0
        self.reported = []
        self.window = window = _Window()
        self.start = time.perf_counter()
        done = self._restore(state) if state else 0
        if self.open_events:
            record.events = self.open_events(f"{record.directory}/tensorboard", after=done)
            if self.history:
                self.history.events = record.events
        with StopRequest() as stop, self._progress_bar(done) as bar:
            lower_iterator = self.lower_batches.after(done)
            if self.fine_tunes:
                fine_tuning_iterator = self.fine_tuning_batches.after(
                    max(0, done - self.main_steps)
                )
            if self.method.bilevel:
                upper = self._upper_steps(done)
                self.upper_iterator = self.upper_batches.after(
                    upper * config.n_meta_train_loss_accum
                )
                self.dev_iterator = self.dev_batches.after(upper * config.n_meta_loss_accum)
            for step in range(done + 1, self.total_steps + 1):
                fine_tuning = step > self.main_steps
                if step == self.main_steps + 1:
                    self._start_fine_tuning()
                clock = time.perf_counter()
                batch = next(fine_tuning_iterator if fine_tuning else lower_iterator)
                window.data_seconds += time.perf_counter() - clock
                self._lower_step(step, batch, window)
                if step == 1 or step % config.log_every == 0 or step == self.total_steps:
                    row = window.close(step, self.ranks)
                    record.metrics("step", epoch=self._epoch(step), **row)
                    bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=row["accuracy"])
                if self._upper_steps(step) > self._upper_steps(step - 1):
                    if self.history:
                        self._report_collapse(step, bar)
                        self.history.write(step)
                    self._upper_step(step, bar)
                bar.update()
                epoch_ends = self._epoch_ends(step)
                if epoch_ends:
                    self._finish_epoch(step, bar)
                stopping = self.ranks.total(stop.signal is not None)[0]
                due = step % config.save_every == 0 if config.save_every else epoch_ends
                if due or stopping:
                    self._checkpoint(step)
                if stopping and step < self.total_steps:
                    raise stop.interrupted(
                        f"stopped after step {step} of {self.total_steps} as asked; continue with "
                        f"--exp_name {config.exp_name} --resume 1"
                    )
        return self._finish(time.perf_counter() - self.start)

    def _checkpoint(self, step):
        """Save all that the steps to come depend on. The streams follow from the step."""
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "lower_optimizer": self.lower_optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "upper_optimizer": self.upper_optimizer.state_dict() if self.method.bilevel else None,
            "random": self.ranks.gathered(_random_state(self.device)),
            "best": self.best,
            "skipped": self.skipped,
            "reported": self.reported,
            "window": vars(self.window),
            "history": self.history.state() if self.history else None,
            "seconds": time.perf_counter() - self.start,
        }
        self.record.save_checkpoint(step, state)

    def _check_state(self, state):
        """UserError where ``state`` is not what ``_checkpoint`` saves of such a run."""
        try:
            self._load_state(state)
            wrong = [name for name, fits in self._fits(state).items() if not fits]
            problem = f"its {wrong[0]} is another's" if wrong else None
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            first_line = str(error).strip().split("\n")[0]
            problem = f"{type(error).__name__}: {first_line}"
        if problem:
            raise UserError(
                f"{self.record.directory}: its last checkpoint does not fit the run ({problem})"
            )

    def _fits(self, state):
        """{entry of a loaded ``state``: whether it is of this run's kind}."""
        step, best, window = state["step"], state["best"], state["window"]
        accuracy = best["valid_accuracy"]
        kinds = {"epoch": int, "step": int, "hash": str}
        return {
            "step": type(step) is int and 0 < step <= self.total_steps,
            "best": isinstance(accuracy, float)
            and (
                best == {"valid_accuracy": -1.0}
                or (0 <= accuracy <= 1 and all(type(best[n]) is k for n, k in kinds.items()))
            ),
            "window": window.keys() == vars(_Window()).keys()
            and all(type(value) in (int, float) for value in window.values())
            and window["start"] <= step,
            "history": not self.method.bilevel
            or ScheduleHistory.is_state(state["history"], self.config.task_num),
            "skipped": type(state["skipped"]) is int,
            "reported": isinstance(state["reported"], list),
            "seconds": isinstance(state["seconds"], float),
        }

    def _load_state(self, state):
        """Put back models, optimisers and random state. ValueError: an optimiser's is another's."""
        self.model.load_state_dict(state["model"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["step"] > self.main_steps:
            self.lower_optimizer = self._fine_tuning_optimizer()
        _load_optimizer(self.lower_optimizer, state["lower_optimizer"])
        if self.method.bilevel:
            _load_optimizer(self.upper_optimizer, state["upper_optimizer"])
        _set_random_state(state["random"][self.ranks.rank], self.device)

    def _restore(self, state):
        """Put back what ``_checkpoint`` saved; the number of steps done."""
        self._load_state(state)
        self.best, self.skipped = state["best"], state["skipped"]
        self.reported = state["reported"]
        vars(self.window).update(state["window"])
        if self.history:
            self.history.restore(state["history"], self.device)
        self.start -= state["seconds"]
        self._say(f"continuing after step {state['step']}")
        return state["step"]

    def _open_history(self):
        """What writes schedule.jsonl; None on other ranks than the first, or without a schedule."""
        if not (self.method.bilevel and self.ranks.first):
            return None
        corrupted = self.config.effective_corrupted_rate > 0
        return ScheduleHistory.of_run(self.record.directory, self.split, self.train_set, corrupted)

    def _upper_steps(self, step):
        """How many upper steps there are up to the end of lower step ``step``."""
        if not self.method.bilevel:
            return 0
        every = self.config.hyperstep
        before = self.config.warmup_epochs * self.steps_per_epoch // every
        return max(0, min(step, self.main_steps) // every - before)

    def _epoch(self, step):
        """The epoch of a step, from 1; those of fine-tuning are counted on."""
        if step <= self.main_steps:
            return (step - 1) // self.steps_per_epoch + 1
        beyond = step - self.main_steps
        return self._epoch(self.main_steps) + (beyond - 1) // self.steps_per_dev_epoch + 1

    def _epoch_ends(self, step):
        last = step in (self.main_steps, self.total_steps)
        return last or self._epoch(step + 1) > self._epoch(step)

    def _start_fine_tuning(self):
        """Go back to the best checkpoint, with a fresh optimiser."""
        self._load_best(START_FILE)
        self.lower_optimizer = self._fine_tuning_optimizer()

    def _fine_tuning_optimizer(self):
        return build_lower_optimizer(self.config, self.theta, self.config.dev_lr)

    def _lower_step(self, step, batch, window):
        clock = time.perf_counter()
        self.model.train()
        if step > self.main_steps:
            outputs = self.lower_model(batch)
            loss = outputs.losses[:, 0].mean()
        else:
            self.scheduler.before_lower_step(self.model, batch, self._average)
            outputs = self.lower_model(batch)
            loss = scheduled_loss(self.scheduler, outputs)
        value = loss.item()
        if not math.isfinite(value):
            self._diverged(step, f"the scheduled training loss is {value}")
        self.lower_optimizer.zero_grad()
        if self.history and step <= self.main_steps:
            self.history.watch(outputs)
        loss.backward(inputs=self.in_lower_level)
        self.ranks.average_gradients(self.in_lower_level, len(batch.sample_id))
        norm = torch.nn.utils.clip_grad_norm_(self.in_lower_level, math.inf).item()  # clips nothing
        if not math.isfinite(norm):
            self._diverged(
                step, f"the lower level's gradient has norm {norm}, at a scheduled loss of {value}"
            )
        self.lower_optimizer.step()
        window.add(value, outputs, batch)
        with torch.no_grad():
            predicted = self.model.heads.target_logits(outputs.features).argmax(dim=1)
            known = slice(None) if batch.mask is None else batch.mask[:, 0]
            hits = (predicted == batch.labels[:, 0])[known]
            window.hits += hits.sum().item()
            window.known += len(hits)
        window.lower_seconds += time.perf_counter() - clock

    def _upper_step(self, step, bar):
        clock = time.perf_counter()
        config = self.config
        train_batches = [next(self.upper_iterator) for _ in range(config.n_meta_train_loss_accum)]
        dev_batches = [next(self.dev_iterator) for _ in range(config.n_meta_loss_accum)]
        hypergrads, solution, dev_loss = self.upper_level.hypergradient(train_batches, dev_batches)
        if config.reduction == "final":
            dev_loss, *hypergrads = self._average(
                [torch.tensor(dev_loss, device=self.device), *hypergrads], train_batches
            )
            dev_loss = dev_loss.item()
        finite = all(torch.isfinite(h).all() for h in hypergrads)
        if not finite and config.on_nonfinite == "stop":
            self._diverged(
                step,
                f"the hypergradient is not finite (development loss {dev_loss:.4g}, residual of "
                f"--solver {config.solver} {solution.residual:.4g}); a smaller --neumann_alpha or "
                "--solver identity may help, --on_nonfinite skip leaves such steps out",
            )
        stable = None
        if solution.diverging and solution.growth is not None:
            stable = stable_alpha(config.neumann_alpha, solution.growth)
            self._report_divergence(step, solution, stable, bar)
        norm = None
        if finite:
            norm = apply_hypergradient(self.upper_optimizer, self.phi, hypergrads, self.clip_at)
            self.scheduler.clamp()
        else:
            self.skipped += 1
        self.record.metrics(
            "upper",
            step=step,
            dev_loss=dev_loss,
            hypergradient_norm=norm,
            clipped=finite and norm > self.clip_at,
            skipped=not finite,
            residual=solution.residual,
            products=solution.products,
            diverging=solution.diverging,
            stable_alpha=stable,
            upper_seconds=time.perf_counter() - clock,
        )

    def _report_divergence(self, step, solution, stable, bar):
        config = self.config
        if not math.isfinite(solution.growth):
            cure = "its terms overflow, try a far smaller --neumann_alpha"
        elif stable is None:
            cure = "the terms grow along negative curvature, where no alpha is stable"
        else:
            cure = f"the largest stable --neumann_alpha is about {stable:.2g}"
        then = "v_0 is used" if config.on_divergence == "identity" else "it is used all the same"
        self._report_once(
            "divergence",
            f"step {step}: the Neumann series diverges at alpha {config.neumann_alpha:g} (residual "
            f"{solution.residual:.3g}): {cure}; {then} (--on_divergence {config.on_divergence})",
            bar,
        )

    def _report_collapse(self, step, bar):
        """Say, once, that the schedule trains nothing any more, or one task alone."""
        count = torch.as_tensor(self.history.count).clamp(min=1)
        weights = (torch.as_tensor(self.history.total) / count).reshape(-1).tolist()
        largest = max(weights)
        if largest < VANISHING:
            self._report_once(
                "vanishing",
                f"step {step}: the schedule has collapsed to zero (largest mean weight of a task "
                f"{largest:.2g}); a smaller --aux_lr may help",
                bar,
            )
        elif len(weights) > 1 and largest > DOMINATING * sum(weights):
            self._report_once(
                "dominating",
                f"step {step}: the schedule has collapsed to task {weights.index(largest)} (0 is "
                f"the target), which has {largest / sum(weights):.1%} of the mean weight",
                bar,
            )

    def _report_once(self, what, text, bar):
        if what not in self.reported:
            self.reported.append(what)
            self._say(f"warning: {text}", bar)

    def _finish_epoch(self, step, bar):
        clock = time.perf_counter()
        self.ranks.same_as_first(list(self.model.buffers()))  # batch norm's statistics differ
        accuracy = evaluate(self.model, self.valid_batches, self.ranks)
        if math.isnan(accuracy):
            self._diverged(step, "predictions on the validation set are not finite")
        epoch = self._epoch(step)
        self.record.metrics(
            "epoch",
            epoch=epoch,
            step=step,
            valid_accuracy=accuracy,
            valid_seconds=time.perf_counter() - clock,
        )
        if accuracy > self.best["valid_accuracy"]:
            self.best = {"epoch": epoch, "step": step, "valid_accuracy": accuracy}
            file_hash = self.record.save_best(
                {
                    "model": self.model.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "config": dataclasses.asdict(self.config),
                    **self.best,
                }
            )
            self.best["hash"] = file_hash
        self._say(f"epoch {epoch}, step {step}: validation accuracy {accuracy:.4f}", bar)

    def _load_best(self, keep_as=None):
        if self.ranks.first:
            best = self.record.load_best(self.best["hash"], keep_as)
            self.model.load_state_dict(best["model"])
            self.scheduler.load_state_dict(best["scheduler"])
        self.ranks.same_as_first(
            [p.data for p in self.theta + self.phi] + list(self.model.buffers())
        )

    def _finish(self, seconds):
        self._load_best()
        test_accuracy = evaluate(self.model, self._evaluation_stream("test"), self.ranks)
        config = self.config
        summary = {
            "test_accuracy": test_accuracy,
            "valid_accuracy": self.best["valid_accuracy"],
            "best_epoch": self.best["epoch"],
            "best_step": self.best["step"],
            "steps": self.total_steps,
            "skipped_upper_steps": self.skipped,
            "seconds": seconds,
            "method": config.method,
            "setting": config.setting,
            "corrupted_rate": config.effective_corrupted_rate,
            "labeled_per_class": config.labeled_per_class,
            "seed": config.seed,
            "exp_name": config.exp_name,
            "fingerprint": self.split.fingerprint,
        }
        self.record.summarise(summary)
        self._say(
            f"best validation accuracy {self.best['valid_accuracy']:.4f} in epoch "
            f"{self.best['epoch']}"
        )
        self._say(f"test accuracy: {test_accuracy:.4f}")
        return summary

    def _diverged(self, step, reason):
        kept = (
            f"the best checkpoint, of epoch {self.best['epoch']}, is kept"
            if "epoch" in self.best
            else "no epoch was completed"
        )
        message = f"diverged at step {step}: {reason}; {kept} in {self.record.directory}"
        self.record.log(message)
        raise DivergenceError(message)

    def _progress_bar(self, done):
        """A bar on a terminal; nothing where stderr is a file, whose lines ``_say`` writes."""
        hidden = None if self.ranks.first else True
        return tqdm(
            total=self.total_steps,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=hidden,
        )

    def _say(self, text, bar=None):
        """A line for the person, without breaking the progress bar, and for log.txt."""
        if not self.ranks.first:
            return
        self.record.log(text)
        if bar is None or bar.disable:
            print(text, flush=True)
        else:
            bar.write(text)


class _Window:
    """Means over the lower steps since the last row of metrics."""

    def __init__(self, start=0):
        self.start = start
        self.loss = self.target_loss = self.aux_loss = 0.0
        self.hits = self.known = self.labeled_steps = 0
        self.data_seconds = self.lower_seconds = 0.0

    def add(self, loss, outputs, batch):
        """Count a step: its scheduled loss, and its plain mean losses of target and other tasks."""
        losses = outputs.losses.detach()
        target = losses[:, 0] if batch.mask is None else losses[batch.mask[:, 0], 0]
        self.loss += loss
        if len(target):
            self.target_loss += target.mean().item()
            self.labeled_steps += 1
        self.aux_loss += losses[:, 1:].mean().item() if losses.shape[1] > 1 else 0.0

    def close(self, step, ranks):
        """The row of the steps up to ``step``; starts over.

        Losses and seconds are per step, the target's per step that had a label (None: there was
        none); over several ranks, losses are the mean of theirs.
        """
        steps = step - self.start
        loss, target_loss, labeled_steps, aux_loss, hits, known = ranks.total(
            self.loss, self.target_loss, self.labeled_steps, self.aux_loss, self.hits, self.known
        )
        row = {
            "step": step,
            "loss": loss / steps / ranks.size,
            "target_loss": target_loss / labeled_steps if labeled_steps else None,
            "aux_loss": aux_loss / steps / ranks.size,
            "accuracy": hits / known if known else None,
            "data_seconds": self.data_seconds / steps,
            "lower_seconds": self.lower_seconds / steps,
        }
        self.__init__(step)
        return row


def _random_state(device):
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "gpu": on_gpu}


def _set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["gpu"], device)


def _load_optimizer(optimizer, state):
    """``load_state_dict``. ValueError: it has other rates, or moments of other parameters."""

    def rates():
        return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]

    expected = rates()
    optimizer.load_state_dict(state)
    if rates() != expected:
        raise ValueError(f"an optimiser's learning rate and decay are {rates()}, not {expected}")
    sgd = isinstance(optimizer, torch.optim.SGD)
    moments = ("momentum_buffer",) if sgd else ("exp_avg", "exp_avg_sq")
    for parameter, values in optimizer.state.items():
        for name in moments:
            if values[name].shape != parameter.shape:
                raise ValueError(f"an optimiser's {name} is of other parameters")


@torch.inference_mode()
def evaluate(model, batches, ranks):
    """Share of images whose target class is predicted, over the ranks' streams of batches.

    NaN if any prediction is not finite.
    """
    model.eval()
    hits = images = 0
    for batch in batches:
        logits = model.predict(batch.images)
        hits += (logits.argmax(dim=1) == batch.labels[:, 0]).sum().item()
        hits += 0.0 if torch.isfinite(logits).all() else math.nan
        images += len(batch.images)
    hits, images = ranks.total(hits, images)
    return hits / images


def build_lower_optimizer(config, theta, lr):
    """The optimiser of the task model that a resolved configuration names."""
    if config.main_optimizer == "adam":
        return torch.optim.Adam(theta, lr=lr, weight_decay=config.w_decay)
    return torch.optim.SGD(theta, lr=lr, momentum=0.9, weight_decay=config.w_decay)


def build_upper_optimizer(config, phi):
    """The optimiser of the scheduler that a resolved configuration names."""
    if config.upper_optimizer == "adam":
        # AdamW: a decay inside Adam would move what has no hypergradient by full steps.
        return torch.optim.AdamW(
            phi, lr=config.aux_lr, betas=UPPER_BETAS, weight_decay=config.auxw_decay
        )
    return torch.optim.SGD(phi, lr=config.aux_lr, momentum=0.9, weight_decay=config.auxw_decay)


def build_solver(config):
    """The solver that a resolved configuration names."""
    if config.solver == "neumann":
        return neumann(
            config.neumann_alpha, config.neumann_terms, config.neumann_scale, config.on_divergence
        )
    if config.solver == "identity":
        return identity()
    return conjugate_gradient(config.damping, config.cg_iterations)

"""The two implementations that side_by_side.py measures, each in its own process.

``Plain`` and ``Package`` start from the same random weights and the same images and offer the same
actions. ``Convolutions`` does a ResNet-18's forward convolutions and nothing else. ``Worker`` puts
any of them into its own process.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from auxilearn.data.dataset import Stream, in_order, sample_set  # noqa: E402
from auxilearn.implicit_diff import identity, neumann  # noqa: E402
from auxilearn.run import config as settings  # noqa: E402
from auxilearn.run.build import build, set_precision  # noqa: E402
from auxilearn.run.command_line import given_settings  # noqa: E402
from auxilearn.solvers import conjugate_gradient  # noqa: E402
from benchmarks import plain  # noqa: E402
from benchmarks.input_pipeline import as_split, random_labels, write_images  # noqa: E402

SOLVERS = ("neumann", "identity", "cg")
TERMS = {"neumann": 3, "identity": 0}  # products of a Neumann series; plain has no cg
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
FEATURES = 512
MAIN_LR = ALPHA = 1e-4
WEIGHT_DECAY = 5e-4
AUX_LR, AUX_DECAY, MAX_NORM = 1e-2, 5e-5, 10.0
TRAIN_BATCHES = 4  # in the generated training set


@dataclasses.dataclass(frozen=True)
class Workload:
    """The workload: its sizes, its device and its process settings.

    ``precision`` is that of both sides: as for train_bilevel.py, where plain's bf16 is
    torch.autocast. ``package_flags`` are further flags of train_bilevel.py. With ``own_settings``
    the package has the process settings of run_bilevel.sh, and plain has none of them.
    """

    root: Path
    batch: int = 64
    dev_batch: int = 50
    image_size: int = 224
    tasks: int = 313
    classes: int = 200
    threads: int | None = None
    device: str = "cpu"
    precision: str = "tf32"
    package_flags: tuple = ()
    own_settings: bool = False

    def write(self):
        """Write the images: a few training batches and one development batch."""
        write_images(self.root, TRAIN_BATCHES * self.batch + self.dev_batch)

    def split(self):
        """The images that ``write`` has written, with random labels and attributes."""
        names = sorted(path.name for path in (self.root / "images").iterdir())
        rng = np.random.default_rng(0)
        places = np.arange(len(names))
        train, dev = np.split(places, [TRAIN_BATCHES * self.batch])
        return dataclasses.replace(
            as_split(self.root, names),
            **random_labels(rng, len(names), self.classes, self.tasks - 1),
            indices={"full_train": places, "rest_train": train, "dev": dev, "valid": dev},
        )

    def initial_models(self, bf16=False):
        """The task model and the scheduler that both sides start from, as plain modules."""
        torch.manual_seed(0)
        counts = [self.classes] + [2] * (self.tasks - 1)
        model = plain.PlainModel(plain.resnet18_backbone(), FEATURES, counts, bf16)
        return model, plain.PlainScheduler(self.tasks, FEATURES)


# --------------------------------------------------------------------------------------------------
# The two sides, and the convolutions alone
# --------------------------------------------------------------------------------------------------


class Side:
    """A side to measure. ``actions``: {quantity: function that does it once}."""

    def __init__(self, workload):
        self.workload = workload
        self.device = torch.device(workload.device)
        self.actions = {}
        set_precision(workload.precision)

    def measure(self, quantity):
        """Do it once: the seconds it took."""
        self._wait()
        start = time.perf_counter()
        self.actions[quantity]()
        self._wait()
        return time.perf_counter() - start

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self):
        """The most memory so far, bytes: of this process, or on the GPU what its tensors took."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Plain(Side):
    """benchmarks/plain.py; controls choose another ``dtype`` or ``memory_format``."""

    def __init__(self, workload, dtype=torch.float32, memory_format="contiguous"):
        super().__init__(workload)
        self.options = {"dtype": dtype, "memory_format": FORMATS[memory_format]}
        bf16 = workload.precision == "bf16" and dtype == torch.float32
        model, scheduler = workload.initial_models(bf16)
        self.initial_scheduler = copy.deepcopy(scheduler.state_dict())
        self.model = model.to(self.device, **self.options).train()
        self.scheduler = scheduler.to(self.device, dtype)
        self.lower_optimizer = torch.optim.Adam(
            self.model.parameters(), lr=MAIN_LR, weight_decay=WEIGHT_DECAY
        )
        self.upper_optimizer = torch.optim.SGD(
            self.scheduler.parameters(), lr=AUX_LR, momentum=0.9, weight_decay=AUX_DECAY
        )
        split = workload.split()
        train, dev = split.indices["rest_train"], split.indices["dev"]
        self.train_batch = self._views(split, train[: workload.batch])
        self.dev_batch = self._views(split, dev)
        loader = DataLoader(self._dataset(split, train, True), workload.batch, shuffle=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))
        self.actions = {"data": self.load, "lower": self.lower}
        for solver, terms in TERMS.items():
            self.actions[solver] = functools.partial(self.upper, terms)

    def _dataset(self, split, positions, train):
        paths = [split.image_path(position) for position in positions]
        return plain.PlainDataset(paths, split.labels[positions], train, self.workload.image_size)

    def _views(self, split, positions):
        """The centre crops at ``positions`` and their labels, as one batch."""
        dataset = self._dataset(split, positions, False)
        images, labels = next(iter(DataLoader(dataset, len(positions))))
        return images.to(self.device, **self.options), labels.to(self.device)

    def load(self):
        images, labels = next(self.batches)
        return images.to(self.device), labels.to(self.device)

    def lower(self):
        return plain.lower_step(self.model, self.scheduler, self.lower_optimizer, *self.train_batch)

    def upper(self, terms):
        images, labels = self.dev_batch
        hypergradient, _ = plain.upper_step(
            self.model,
            self.scheduler,
            self.upper_optimizer,
            *self.train_batch,
            images,
            labels[:, 0],
            alpha=ALPHA,
            terms=terms,
            max_norm=MAX_NORM,
        )
        return hypergradient

    def numbers(self):
        """{solver: {parameter: hypergradient at the initial weights}, "loss": scheduled loss}."""
        result = {}
        for solver, terms in TERMS.items():
            result[solver] = _by_name(self.scheduler, self.upper(terms))
            self.scheduler.load_state_dict(self.initial_scheduler)
        return {**result, "loss": self.lower().item()}


class Package(Side):
    """The package: ``Bilevel`` with the models, optimisers, solvers and streams of a run.

    ``cache_dir`` is the flag.
    """

    def __init__(self, workload, cache_dir="none"):
        super().__init__(workload)
        split = workload.split()
        config = settings.Config(
            method="joint",
            task_num=workload.tasks,
            image_size=workload.image_size,
            num_workers=0,
            cache_dir=cache_dir,
            backbone_pretrain=False,
            train_batch_size=workload.batch,
            dev_batch_size=workload.dev_batch,
            main_lr=MAIN_LR,
            w_decay=WEIGHT_DECAY,
            upper_lr=AUX_LR,
            upper_decay=AUX_DECAY,
            max_grad_norm=MAX_NORM,
            neumann_alpha=ALPHA,
            neumann_terms=TERMS["neumann"],
            precision=workload.precision,
            device=workload.device,
        )
        given = given_settings(workload.package_flags)
        config = settings.resolve(dataclasses.replace(config, **given), split)
        self.run = build(config, split)
        self.bilevel = self.run.bilevel
        self._copy_weights()
        self.solvers = {
            "neumann": neumann(config.neumann_alpha, config.neumann_terms),
            "identity": identity(),
            "cg": conjugate_gradient(damping=1.0, iterations=10),
        }
        self.train_batch = self._views(self.run.train_set, workload.batch)
        self.dev_batch = self._views(sample_set(split, "dev", split.tasks), workload.dev_batch)
        batches = self.run.lower_batches(after=0)
        self.actions = {"data": lambda: next(batches), "lower": self.lower}
        for solver in SOLVERS:
            self.actions[solver] = functools.partial(self.upper, solver)

    def _copy_weights(self):
        model, scheduler = self.workload.initial_models()
        ours = self.bilevel.model.train()
        ours.backbone.load_state_dict(model.backbone.state_dict())
        with torch.no_grad():
            ours.heads.linear.weight.copy_(torch.cat([head.weight for head in model.heads]))
            ours.heads.linear.bias.copy_(torch.cat([head.bias for head in model.heads]))
        self.bilevel.scheduler.load_state_dict(scheduler.state_dict())

    def _views(self, samples, size):
        """The centre crops of the first ``size`` samples, as one batch."""
        images, pixels = self.run.inputs, self.workload.image_size
        order = in_order(len(samples), size)
        options = {"augment": False, "seed": 0, "name": "benchmark"}
        return next(iter(Stream(images, samples, order, pixels, self.device, **options)))

    def lower(self):
        return self.bilevel.lower_step(self.train_batch).loss

    def upper(self, solver):
        self.bilevel.solver = self.solvers[solver]
        self.solution = self.bilevel.upper_step([self.train_batch], [self.dev_batch]).solution

    def products(self):
        """Hessian-vector products of the last upper step."""
        return self.solution.products

    def numbers(self):
        """As ``Plain.numbers``."""
        result = {}
        for solver in TERMS:
            self.bilevel.solver = self.solvers[solver]
            gradient, _, _ = self.bilevel.hypergradient([self.train_batch], [self.dev_batch])
            result[solver] = _by_name(self.bilevel.scheduler, gradient)
        return {**result, "loss": self.lower().item()}


class Convolutions(Side):
    """The forward convolutions of a ResNet-18, in the workload's precision.

    Quantities: (images, memory format).
    """

    def __init__(self, workload):
        super().__init__(workload)
        self.convolutions = []  # (shape of an input, module)
        backbone = plain.resnet18_backbone().eval()
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(self._note)
        with torch.inference_mode():
            backbone(torch.zeros(1, 3, workload.image_size, workload.image_size))
        for images, name in self.quantities(workload):
            self.actions[images, name] = functools.partial(self.run, images, name)
        self.inputs = {}

    @staticmethod
    def quantities(workload):
        return list(itertools.product({workload.batch: 0, workload.dev_batch: 0}, FORMATS))

    def _note(self, module, inputs, output):
        self.convolutions.append((inputs[0].shape[1:], module))

    @torch.inference_mode()
    def run(self, images, name):
        if (images, name) not in self.inputs:  # made in the untimed turn
            bf16 = self.workload.precision == "bf16"
            placed = functools.partial(
                torch.Tensor.to,
                device=self.device,
                dtype=torch.bfloat16 if bf16 else torch.float32,
                memory_format=FORMATS[name],
            )
            self.inputs[images, name] = [
                (placed(torch.randn(images, *shape)), placed(module.weight), module)
                for shape, module in self.convolutions
            ]
        for values, weight, module in self.inputs[images, name]:
            F.conv2d(values, weight, None, module.stride, module.padding)


def _by_name(scheduler, tensors):
    names = [name for name, _ in scheduler.named_parameters()]
    return {n: t.detach().cpu().double().numpy() for n, t in zip(names, tensors, strict=True)}


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------


class Worker:
    """A ``Side`` in a process of its own, for a with block; ``call(method, ...)`` calls it.

    Args: ``kind``, the class, and its arguments. RuntimeError where a call fails or the process
    ends.
    """

    # Forked from a process that has done its imports and nothing else: seconds faster to start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "benchmarks.sides"])

    def __init__(self, kind, workload, **options):
        self.name = kind.__name__
        context, variables = self.context, {}
        if workload.own_settings:  # they take effect when a program starts, not when it forks
            context = multiprocessing.get_context("spawn")
            variables = (
                dict.fromkeys(run_script_settings()) if kind is Plain else run_script_settings()
            )
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, kind, workload, options)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with _environment(variables):
            self.process.start()
        theirs.close()

    def wait(self):
        """Wait until it is built: to be called once, before any call."""
        return self._receive()

    def call(self, method, *arguments):
        self.pipe.send((method, arguments))
        return self._receive()

    def _receive(self):
        try:
            error, result = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"the process of {self.name} ended with exit code {self.process.exitcode} (-9: "
                "killed, usually because memory ran out)"
            ) from None
        if error:
            raise RuntimeError(f"in the process of {self.name}:\n{error}")
        return result

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pipe.close()
        self.process.join(10)
        self.process.terminate()


def run_script_settings():
    """{name: value} of the environment variables that run_bilevel.sh sets for speed."""
    script = Path(__file__).resolve().parent.parent / "run_bilevel.sh"
    return dict(re.findall(r"\$\{((?:MALLOC|OMP)_\w+):=(\w+)\}", script.read_text()))


@contextlib.contextmanager
def _environment(variables):
    """Environment variables for a while; None removes one."""
    before = {name: os.environ.get(name) for name in variables}

    def put(values):
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(variables)
    try:
        yield
    finally:
        put(before)


def _serve(pipe, kind, workload, options):
    """The body of a worker: build the side, then answer calls until the pipe is closed."""

    def build():
        nonlocal side
        if workload.threads:
            torch.set_num_threads(workload.threads)
        side = kind(workload, **options)

    side = None
    os.dup2(2, 1)  # stdout is for the tables
    with contextlib.suppress(EOFError, BrokenPipeError):
        _answer(pipe, build)
        while True:
            method, arguments = pipe.recv()
            _answer(pipe, getattr(side, method), *arguments)


def _answer(pipe, function, *arguments):
    """Send (error or None, result)."""
    try:
        answer = None, function(*arguments)
    except Exception:
        answer = traceback.format_exc(), None
    pipe.send(answer)


@contextlib.contextmanager
def running(workload, **sides):
    """{name: ``Worker``}, built, for a block; ``sides`` = {name: (class, its options)}."""
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(kind, workload, **options))
            for name, (kind, options) in sides.items()
        }
        for worker in workers.values():
            worker.wait()
        yield workers

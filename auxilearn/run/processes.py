"""The processes of a run: several as one under torchrun, ended when asked, their faults in a line.

    torchrun --nproc_per_node 2 train_bilevel.py ...

Each rank takes every N-th sample of a batch. What is averaged over ranks is weighted by their
numbers of samples, so that gradients are those of the whole batch wherever the loss is a mean over
samples. Batch norm's statistics, and what a schedule takes from its batch (standardised losses; in
the stable form also mean weights and centred features), are each rank's own.
"""

import os
import signal
import threading
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from auxilearn.errors import Interrupted, RunError, UserError, disk_errors

TIMEOUT = timedelta(minutes=10)  # for a rank that is silent; one that ends is noticed at once


class Ranks:
    """The processes of a run. Without torchrun there is one, and everything here does nothing.

    Args: ``rank`` and ``size`` as torchrun numbers them; ``device`` as tensors are on.
    """

    def __init__(self, rank=0, size=1, device="cpu"):
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.alone = not dist.is_initialized()

    @property
    def first(self):
        """Whether this is the rank that writes."""
        return self.rank == 0

    def average(self, tensors, weight):
        """Mean of a list of tensors over the ranks, each weighted by its ``weight`` (samples)."""
        if self.alone:
            return tensors
        flat = torch.cat([t.reshape(-1) for t in tensors] + [tensors[0].new_ones(1)]) * weight
        with _rank_errors():
            dist.all_reduce(flat)
        flat = flat[:-1] / flat[-1]
        pieces = flat.split([t.numel() for t in tensors])
        return [piece.reshape(t.shape) for piece, t in zip(pieces, tensors, strict=True)]

    def total(self, *numbers):
        """Sums of numbers over the ranks."""
        if self.alone:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64 if self.device.type == "cpu" else None)
        sums = sums.to(self.device)
        with _rank_errors():
            dist.all_reduce(sums)
        return sums.tolist()

    def same_as_first(self, tensors):
        """Overwrite ``tensors`` by those of the first rank."""
        if not self.alone:
            with _rank_errors():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def gathered(self, value):
        """Every rank's ``value`` (anything that pickles), a list in the order of ranks."""
        if self.alone:
            return [value]
        values = [None] * self.size
        with _rank_errors():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value):
        """The first rank's ``value`` (anything that pickles), on every rank."""
        if self.alone:
            return value
        box = [value]
        with _rank_errors():
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]


@contextmanager
def joined(device=None):
    """The ``Ranks`` that torchrun started, joined for the block; alone without torchrun.

    ``device`` as for ``--device``: by default each rank takes the GPU of its local number.
    Raises UserError: fewer GPUs than ranks.
    """
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        yield Ranks()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_gpu and local >= torch.cuda.device_count():
        raise UserError(
            f"torchrun starts more processes than there are GPUs ({torch.cuda.device_count()}): "
            "lower --nproc_per_node, or train on the CPU with --device cpu"
        )
    place = f"cuda:{local}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    with leaving():
        yield Ranks(rank, size, place)


@contextmanager
def leaving():
    """Leave the process group after the block.

    gloo's threads let go of a collective's tensors some time after the call has returned, and need
    the interpreter for that: one that is late may abort the process as it ends
    (https://github.com/pytorch/pytorch/pull/179291). While this one waits for the other ranks,
    its threads get their turn, which makes no promise.
    """
    try:
        yield
        with _rank_errors():
            dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def _rank_errors():
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).strip().split("\n")[0]
        raise RunError(
            f"another process of this run has ended or does not answer ({first_line})"
        ) from None


# --------------------------------------------------------------------------------------------------
# Ending a run
# --------------------------------------------------------------------------------------------------

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGUSR1"):  # Windows has none
    EXIT_CODES[signal.SIGUSR1] = 143


class StopRequest:
    """While active, the first signal is noted in ``signal`` and a second one ends the process."""

    def __init__(self):
        self.signal = None
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number

    def interrupted(self, message):
        """The error to end the run with."""
        return Interrupted(message, EXIT_CODES.get(self.signal, 143))


def machine_faults(config):
    """``disk_errors`` of a run."""
    name = config.exp_name or "NAME"
    return disk_errors(
        f"the run's folder in {config.record_dir}",
        f"what was recorded is kept: continue with --exp_name {name} --resume 1",
    )

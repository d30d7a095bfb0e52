"""One seed, many independent streams: changing what one purpose draws never moves another."""

import contextlib
import zlib

import numpy as np
import torch


def derived_seed(seed, purpose, *numbers):
    """A 63-bit seed determined by the run's ``seed``, the name of a purpose, and counters."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def derived_generator(seed, purpose, *numbers):
    """A numpy Generator seeded by ``derived_seed``."""
    return np.random.default_rng(derived_seed(seed, purpose, *numbers))


@contextlib.contextmanager
def random_state_kept(tensors=(), seed=None):
    """Put torch's generators back after the block: the CPU's, and those of the GPUs of ``tensors``.

    ``seed``: the block draws from it; None: it draws on from the present state.
    """
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    generators = [torch.default_generator, *(torch.cuda.default_generators[d] for d in devices)]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators if seed is not None else ():
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

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
def random_state_kept(tensors, seed=None):
    """Put torch's generators, those of the GPUs of ``tensors`` included, back after the block.

    ``seed``: the block draws from it; None: it draws on from the present state.
    """
    states = generator_states(tensors)
    try:
        for generator, _ in states if seed is not None else ():
            generator.manual_seed(seed)
        yield
    finally:
        put_back(states)


def generator_states(tensors):
    """(generator, its state) of torch's generators: the CPU's, and the GPUs' of ``tensors``."""
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    generators = [torch.default_generator, *(torch.cuda.default_generators[d] for d in devices)]
    return [(generator, generator.get_state()) for generator in generators]


def put_back(states):
    """Give the generators back what ``generator_states`` has read."""
    for generator, state in states:
        generator.set_state(state)

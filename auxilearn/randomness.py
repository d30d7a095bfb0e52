"""One seed, many independent streams: changing what one purpose draws never moves another."""

import zlib

import numpy as np


def derived_seed(seed, purpose, *numbers):
    """A 63-bit seed determined by the run's ``seed``, the name of a purpose, and counters."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def derived_generator(seed, purpose, *numbers):
    """A numpy Generator seeded by ``derived_seed``."""
    return np.random.default_rng(derived_seed(seed, purpose, *numbers))

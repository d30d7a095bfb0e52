"""Wrong target labels, drawn once by the seed: uniform, to the next class, or by the input.

Only training labels outside the development set are corrupted, each with probability r. Real
numbers have no classes: a share r of them is permuted.
"""

import numpy as np

from auxilearn.data.cache import open_images
from auxilearn.data.pixels import resized_side
from auxilearn.errors import UserError
from auxilearn.randomness import derived_generator

UNIFORM, PAIR, INSTANCE = KINDS = ("uniform", "pair", "instance")
CROP = 14  # ``open_images`` makes the shorter side of an image 16 pixels for crops of so many
SIDE = resized_side(CROP)
SPREAD = 0.1  # standard deviation of the samples' flip rates (Xia et al. 2020, Algorithm 2)


def corrupted_targets(split, kind, rate, seed, inputs=None):
    """(N,) target labels of a ``Split``, of which those in rest_train are corrupted.

    Args: ``kind``: of ``KINDS``; ``rate`` r; ``inputs``: callable -> ``Inputs`` of all samples, for
    instance. Raises UserError: the target is a real number, and ``kind`` is about classes.
    """
    targets, classes = split.labels[:, 0].copy(), split.target.classes
    rest = split.indices["rest_train"]
    rest = rest[split.has_target[rest]]
    generator = derived_generator(seed, "corruption")
    check_kind(kind, split.target)
    if classes is None:
        targets[rest] = permute(targets[rest], rate, generator)
    elif kind == UNIFORM:
        targets[rest] = corrupt(targets[rest], rate, classes, generator)
    elif kind == PAIR:
        targets[rest] = to_next(targets[rest], rate, classes, generator)
    else:
        targets[rest] = by_instance(targets[rest], rate, classes, inputs().of(rest), seed)
    return targets


def check_kind(kind, target):
    """UserError: the ``Task`` ``target`` is a real number, and ``kind`` is about classes."""
    if kind != UNIFORM and target.classes is None:
        raise UserError(
            f"--corruption {kind} is of classes, but {target.name} is a number: leave it out, and "
            "labels are permuted"
        )


def corrupt(labels, rate, classes, generator):
    """``labels`` (n,) redrawn from (1 - rate) I + rate / classes: with probability ``rate`` a label
    becomes uniform over all classes, the true one included."""
    redrawn = generator.random(len(labels)) < rate
    return np.where(redrawn, generator.integers(classes, size=len(labels)), labels)


def to_next(labels, rate, classes, generator):
    """``labels`` (n,) of which each is, with probability ``rate``, the next class; after the last
    comes the first."""
    return np.where(generator.random(len(labels)) < rate, (labels + 1) % classes, labels)


def permute(labels, rate, generator):
    """``labels`` (n,) of which each is, with probability ``rate``, among those that change places
    at random; some may come back to their own."""
    moved = np.flatnonzero(generator.random(len(labels)) < rate)
    labels = labels.copy()
    labels[moved] = labels[generator.permutation(moved)]
    return labels


def by_instance(labels, rate, classes, inputs, seed):
    """``labels`` (n,) that are wrong as the inputs x_i say (Xia et al., NeurIPS 2020, Algorithm 2).

    A label is kept with probability 1 - q_i, where q_i is normal around ``rate``, truncated to
    [0, 1]. Otherwise it becomes another class, by the softmax of x_i W_y over the others: W_y is a
    standard normal matrix for every class y of a true label. Inputs are standardised first.
    """
    generator = derived_generator(seed, "corruption")
    flip = generator.normal(rate, SPREAD, len(labels))
    while (outside := (flip < 0) | (flip > 1)).any():
        flip[outside] = generator.normal(rate, SPREAD, int(outside.sum()))
    flipped = generator.random(len(labels)) < flip
    choice = generator.random(len(labels))
    labels, result = np.asarray(labels), np.array(labels)
    for y in np.unique(labels):
        places = np.flatnonzero(flipped & (labels == y))
        logits = inputs.of(places).projected(classes, derived_generator(seed, "projection", int(y)))
        logits[:, y] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        steps = np.cumsum(weights, axis=1)
        result[places] = (steps <= choice[places, None] * steps[:, -1:]).sum(axis=1)
    return result


class Inputs:
    """Inputs x (n, S) as numbers and one-hot codes, the latter kept as codes.

    Args: numbers (n, a) float; codes (n, c) int; sizes: how many codes each column has.
    """

    def __init__(self, numbers, codes, sizes):
        self.numbers, self.codes, self.sizes = numbers, codes, sizes

    def of(self, places):
        """Those of the samples at ``places``."""
        return Inputs(self.numbers[places], self.codes[places], self.sizes)

    def projected(self, width, generator):
        """x W (n, width), where W (S, width) is drawn from a standard normal distribution."""
        total = self.numbers @ generator.standard_normal((self.numbers.shape[1], width))
        for codes, size in zip(self.codes.T, self.sizes, strict=True):
            total += generator.standard_normal((size, width))[codes]
        return total


def inputs_of(split, cache_dir, workers, build=True):
    """The ``Inputs`` of all samples of a ``Split``: rows, or the central 16 x 16 pixels of images
    whose shorter side is 16.

    Args: as of ``open_images``. Raises UserError: an image that cannot be read.
    """
    if split.rows:
        return Inputs(split.rows.numbers, split.rows.codes, split.rows.shape.categories)
    images = open_images(split, CROP, cache_dir, workers, build)
    pixels = np.empty((len(split.paths), SIDE, SIDE, 3), np.float32)
    for position in range(len(pixels)):
        image = images.load(position)
        top, left = ((size - SIDE) // 2 for size in image.shape[:2])
        pixels[position] = image[top : top + SIDE, left : left + SIDE]
    pixels = pixels.reshape(len(pixels), -1)
    train = pixels[split.indices["full_train"]]
    pixels -= train.mean(axis=0)
    pixels /= np.maximum(train.std(axis=0), 1.0)  # a constant pixel says nothing
    return Inputs(pixels, np.zeros((len(pixels), 0), int), [])

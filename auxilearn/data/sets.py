"""Which samples are trained on, validated on, tested on, and held back for development."""

import numpy as np

from auxilearn.errors import UserError

# What a column or a folder may call a set -> the set.
SET_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "dev": "dev",
}
TENTH = 10  # a tenth is validated on and a tenth tested on
DEV_SIZE = 200  # of a target that is a real number, at most a tenth of its set


def divide(
    target, labels, given, source, *, aux_shot=None, dev_size=None, dev_from="train", seed=5
):
    """{"full_train", "dev", "rest_train", "valid", "test": positions} of N samples.

    Without ``given`` sets, a tenth of each class is drawn for validation and a tenth for the test;
    the first ``aux_shot`` + 1 of a class are trained on. Without a validation set, half of the test
    set is drawn for it. Samples without target label are trained on. The development set is drawn
    from the labelled samples of the training or the validation set; full_train has it in either
    case.

    Args:
        target: ``Task``. labels: (N,) of the target, as in ``Columns``.
        given: (N,) train, valid, test or dev; or None.
        source: the file or folder, for messages.
        aux_shot: development samples per class (default: 1); dev_size: or so many in all. Of a
            target that is a real number the default is ``DEV_SIZE``, a tenth of the set at most.
        dev_from: train or valid.

    Raises UserError: a set would be empty, a class has too few samples, or development samples are
    given and a number of them too.
    """
    if target.classes is None and aux_shot is not None:
        raise UserError(
            f"--aux_shot {aux_shot} is per class, but {target.name} is a number: give --dev_size"
        )
    named = 0 if given is None else int((given == "dev").sum())
    if named and (aux_shot or dev_size):
        flag = "--aux_shot" if aux_shot else "--dev_size"
        raise UserError(
            f"{source}: {named} samples are in the dev set, so nothing is drawn: leave out {flag}"
        )
    aux_shot = aux_shot or 1
    generator = np.random.default_rng(seed)
    classes = np.zeros(len(labels), np.int64) if target.classes is None else labels
    known = ~np.isnan(labels) if target.classes is None else labels >= 0
    if given is None:
        given = np.full(len(labels), "train")
        order, rank = _shuffled_by_class(classes, np.flatnonzero(known), generator)
        slot = np.arange(len(order)) % TENTH
        free = rank > (0 if target.classes is None else aux_shot)
        given[order[free & (slot == TENTH - 2)]] = "valid"
        given[order[free & (slot == TENTH - 1)]] = "test"
    else:
        given = given.copy()
        if not ((given == "test") & known).any():
            raise UserError(
                f"{source}: {int((given == 'test').sum())} samples are in the test set, none of "
                f"them with a label of {target.name}; expected one at least"
            )
    if not (given == "valid").any():
        test, _ = _shuffled_by_class(classes, np.flatnonzero((given == "test") & known), generator)
        given[test[::2]] = "valid"
    if not named:
        members = np.flatnonzero((given == dev_from) & known)
        given[_development(target, classes, members, generator, source, aux_shot, dev_size)] = "dev"
    sets = {name: np.flatnonzero(given == name) for name in ("train", "dev", "valid", "test")}
    for name, positions in sets.items():
        labelled = int(known[positions].sum())
        if not labelled or (name == "dev" and labelled < len(positions)):
            raise UserError(
                f"{source}: the {name} set has {len(positions)} samples, {labelled} of them with a "
                f"label of {target.name}; expected "
                + ("all to have one" if name == "dev" else "one at least")
            )
    if target.classes is not None:
        trained = np.bincount(labels[(given == "train") & known], minlength=target.classes)
        if not trained.all():
            name = target.class_names[int(np.argmin(trained))]
            raise UserError(
                f"{source}: no training sample has class {name} of {target.name}; add some, or "
                "remove the class"
            )
    return {
        "full_train": np.union1d(sets["train"], sets["dev"]),
        "dev": sets["dev"],
        "rest_train": sets["train"],
        "valid": sets["valid"],
        "test": sets["test"],
    }


def _shuffled_by_class(classes, positions, generator):
    """(``positions`` in random order, class after class; the rank of each in its class, from 0)."""
    order = generator.permutation(positions)
    order = order[np.argsort(classes[order], kind="stable")]
    starts = np.flatnonzero(np.diff(classes[order], prepend=-1))  # of the classes
    counts = np.diff(starts, append=len(order))
    return order, np.arange(len(order)) - np.repeat(starts, counts)


def _development(target, classes, members, generator, source, aux_shot, dev_size):
    """The positions among ``members`` that become the development set."""
    order, rank = _shuffled_by_class(classes, members, generator)
    if dev_size is None and target.classes is not None:
        counts = np.bincount(classes[members], minlength=target.classes)
        if (counts <= aux_shot).any():
            k = int(np.argmax(counts <= aux_shot))
            raise UserError(
                f"{source}: class {target.class_names[k]} of {target.name} has {counts[k]} samples "
                f"to choose from; --aux_shot {aux_shot} needs {aux_shot + 1}: those for the "
                "development set and one more. Give --dev_size N to draw it from all classes "
                "together, or remove the class"
            )
        return order[rank < aux_shot]
    if dev_size is None:
        dev_size = max(1, min(DEV_SIZE, len(members) // TENTH))
    free = generator.permutation(order[rank > 0])  # one of each class stays
    if len(free) < dev_size:
        raise UserError(
            f"{source}: --dev_size {dev_size} is more than the {len(free)} samples to choose from"
        )
    return free[:dev_size]

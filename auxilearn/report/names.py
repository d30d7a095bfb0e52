"""Names and labels as people read them."""

import math


def readable(name):
    """An attribute's or a class's name: upperparts color: brown; Black footed Albatross."""
    number, dot, rest = name.partition(".")
    name = rest if dot and number.isdigit() and rest[:1].isalpha() else name
    return name.removeprefix("has_").replace("::", ": ").replace("_", " ")


def worded(task, label):
    """A label of a fitted ``Task``: the name of its class; or the number, to two places finer than
    the spread of such labels."""
    if task.classes:
        return readable(task.class_names[int(label)])
    return f"{label:.{max(0, 2 - math.floor(math.log10(task.std)))}f}"


def shortened(text, length):
    """``text``, or as much of it as ``length`` holds, with an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"

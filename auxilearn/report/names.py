"""Names as people read them."""


def readable(name):
    """An attribute's or a class's name: upperparts color: brown; Black footed Albatross."""
    number, dot, rest = name.partition(".")
    name = rest if dot and number.isdigit() else name
    return name.removeprefix("has_").replace("::", ": ").replace("_", " ")


def shortened(text, length=30):
    """``text``, or as much of it as ``length`` holds, with an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"

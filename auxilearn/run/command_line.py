"""``Config`` as flags of train_bilevel.py, and back; presets; --help."""

import argparse
import textwrap

from auxilearn.errors import Parser, UserError
from auxilearn.methods import METHODS, Option, load_plugin
from auxilearn.run.config import FIELDS, GROUPS, KINDS, Config, choices_of, default_of, defaults

# Settings of the released script that have no flag there, or another default for some methods.
_AS_RELEASED = (
    *("method", "epochs", "train_batch_size", "test_batch_size", "upper_lr", "w_decay"),
    *("upper_decay", "aux_weight", "dev_batch_size", "hyperstep", "corrupted", "corrupted_rate"),
    *("corruption", "n_meta_loss_accum", "n_meta_train_loss_accum", "upper_optimizer"),
    *("warmup_epochs", "solver", "precondition", "max_grad_norm"),
)


def presets():
    """Sets of settings by name: --preset makes them the defaults of a command line."""
    usual = defaults()
    released = {name: usual[name] for name in _AS_RELEASED}
    network = {"backbone": "resnet18", "image_size": 224, "main_lr": 1e-4}
    released |= network | {"dev_batches": "first", "feature_dim": 512}
    paper = {"epochs": 100, "train_batch_size": 64, "upper_lr": 1e-2, "upper_decay": 5e-5}
    paper |= network
    upper = ("method", "hyperstep", "upper_optimizer", "warmup_epochs", "solver")
    upper += ("precondition", "max_grad_norm")
    return {"paper": {name: usual[name] for name in upper} | paper, "released": released}


NOT_REPRODUCED = (
    "--preset released does not reproduce these of the released code's behaviours: validation and "
    "test halves without a seed; one auxiliary task unless --task_num says more; batch norm's "
    "statistics moved by upper steps; n_meta_train_loss_accum ignored; NaN weights from a last "
    "batch of one image; --method common failing at its end (docs/differences.md)"
)


def parse(argv=None, description=None):
    """``Config`` from a command line. Raises UserError: a flag is unknown or cannot be read."""
    return Config(**given_settings(argv, description))


def given_settings(argv=None, description=None):
    """{setting: value} of what a command line says, presets included; the rest is left out."""
    load_given_plugin(argv)
    given = vars(_parser(description).parse_args(argv))
    preset = given.pop("preset", None)
    if preset == "released":
        print(f"note: {NOT_REPRODUCED}", flush=True)
    given = presets().get(preset, {}) | given
    words = given.pop("options", [])
    sizes = given.pop("aux_hidden_dim", None)
    method = METHODS[given.get("method", Config.method)]
    if sizes and "hidden_sizes" in method.options:
        words = [f"hidden_sizes={','.join(sizes)}", *words]
    if words:
        given["options"] = parse_options(method, words)
    return given


def load_given_plugin(argv):
    """Load the file of --plugin, if a command line has one: its methods are choices of other flags.

    Returns (path, hash of its content), or None.
    """
    parser = Parser(add_help=False)
    parser.add_argument("--plugin")
    plugin = parser.parse_known_args(argv)[0].plugin
    return (plugin, load_plugin(plugin)) if plugin else None


def parse_options(method, words):
    """{option: value} of a ``Method``'s own settings, from NAME=VALUE words. Raises UserError."""
    values = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            values[name] = method.option(name).parse(text)
        except ValueError as error:
            raise UserError(f"--option {name} {error}") from None
    return values


def _parser(description):
    parser = Parser(
        description=description, epilog=_methods_help(), argument_default=argparse.SUPPRESS
    )
    first = group = parser.add_argument_group(GROUPS["method"])
    for name, field in FIELDS.items():
        if name in GROUPS and name != "method":
            group = parser.add_argument_group(GROUPS[name])
        group.add_argument(*_names(field), **_argument(field))
    first.add_argument(
        "--preset",
        choices=tuple(presets()),
        help="settings to start from; flags beside it win. paper: the paper's settings; released: "
        "the released script's defaults, and its development batch",
    )
    parser.add_argument("--aux_hidden_dim", nargs="+", help=argparse.SUPPRESS)
    return parser


def _names(field):
    if field.name == "options":
        return ["--option"]
    return [f"--{name}" for name in (field.name, *field.metadata["aliases"])]


def _argument(field):
    """Keyword arguments of ``add_argument``."""
    info, argument = field.metadata, {"dest": field.name}
    if field.name == "options":
        argument |= {"nargs": "+", "action": "extend", "metavar": "NAME=VALUE"}
    elif KINDS[field.name] is bool:  # a switch may stand alone
        argument |= {"type": _switch, "nargs": "?", "const": True, "metavar": "0|1"}
    else:
        argument["type"] = KINDS[field.name]
        argument["choices"] = choices_of(field)
        argument["metavar"] = info["metavar"] or {int: "N", float: "X"}.get(
            KINDS[field.name], "NAME"
        )
        if info["choices"]:
            argument["metavar"] = None
    argument["help"] = argparse.SUPPRESS if info["hidden"] else _help(field)
    return argument


def _help(field):
    info, default = field.metadata, default_of(field)
    text = info["help"].replace("%(default)s", str(default))
    if info["by_method"] is not None:
        own = [
            f"{name} {_as_text(method.defaults[field.name])}"
            for name, method in METHODS.items()
            if field.name in method.defaults
        ]
        return f"{text} (default: {'; '.join([_as_text(default), *own])})"
    if default is None or "(default" in text or field.name == "options":
        return text
    return f"{text} (default: {_as_text(default)})"


def _methods_help():
    lines = ["methods (--method NAME, with --option NAME=VALUE for their own settings):"]
    for name, method in METHODS.items():
        about = f"{method.title}: {method.about}" if method.about else method.title
        lines += _indented(f"  {name:<13} ", about)
        for option, spec in method.options.items():
            flag = f"--option {option}={_option_text(spec.default)}  "
            lines += _indented(" " * 16 + flag, spec.help)
    return "\n".join(lines)


def _indented(start, text):
    """The lines of ``start`` and ``text``, at most 100 wide."""
    indent = " " * 16 if len(start) <= 16 else " " * 20
    return textwrap.wrap(start + text, 100, subsequent_indent=indent, break_on_hyphens=False)


def _switch(text):
    """0/1/true/false as the command line's booleans."""
    try:
        return Option(False).parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _as_text(value):
    return str(int(value) if isinstance(value, bool) else value)


def _option_text(value):
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else _as_text(value)


def flags_of(config):
    """The flags of train_bilevel.py that make ``config``: method, seed, and what is no default."""
    flags = []
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if name == "options":
            own = METHODS[config.method].options
            words = [f"{n}={_option_text(v)}" for n, v in value.items() if v != own[n].default]
            flags += ["--option", *words] if words else []
        elif value != field.default or name in ("method", "seed"):
            flags += [f"--{name}", _as_text(value)]
    return flags

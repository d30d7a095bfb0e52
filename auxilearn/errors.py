"""One way to tell a person what is wrong: a single line, exit code 2, no traceback."""

import argparse
import os
import sys
from contextlib import contextmanager


class UserError(Exception):
    """Bad input. The message is the one line shown to the person.

    It says what is wrong, where (file and line number where there is one), what was expected and
    what to do about it.
    """


class Unsupported(UserError, NotImplementedError):
    """A model that lacks a derivative, or keeps its parameters out of reach."""


class RunError(Exception):
    """A run cannot go on. The message says why, and what is left on disk."""


class Interrupted(RunError):
    """A signal asked the run to end; ``code`` is the exit code that stands for this signal."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class DivergenceError(RunError):
    """Training left the finite numbers."""


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError on what it cannot read, in place of its usage."""

    def __init__(self, **options):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def integer_from(least):
    """The ``type`` of a flag: an integer of at least ``least``."""

    def parse(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from {least} up")
        return int(text)

    return parse


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)


@contextmanager
def needs(package, what, requirements):
    """UserError if an import in the block fails because ``package`` is missing.

    ``what`` needs it, in the singular; ``requirements`` is the file that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] != package:
            raise
        raise UserError(
            f"{what} needs {package}: python -m pip install -r {requirements}"
        ) from None


@contextmanager
def disk_errors(place, advice):
    """RunError for a full or failing disk: its file, or else ``place``; why; ``advice``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or str(error).strip().split("\n")[0]
        raise RunError(f"{error.filename or place}: {reason}; {advice}") from None


def run_script(main):
    """Run a script's ``main()`` and turn its errors into one line on stderr and an exit code.

    ``UserError`` exits with 2, ``RunError`` with 1, Ctrl-C with 130; a closed output pipe ends the
    script with 1, without a word.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # the name of a file may be no text
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        sys.exit(_say(error, 2))
    except RunError as error:
        sys.exit(_say(error, getattr(error, "code", 1)))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))
    except BrokenPipeError:  # as ``head -1`` leaves one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is buffered
        sys.exit(1)
    except OSError as error:  # a path too long, a folder that may not be looked into
        if error.filename is None:
            raise
        sys.exit(_say(f"{os.fsdecode(error.filename)}: {error.strerror}", 2))


def _say(message, code):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    return code

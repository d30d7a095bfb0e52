"""One way to tell a person what is wrong: a single line, exit code 2, no traceback."""

import sys
from contextlib import contextmanager


class UserError(Exception):
    """Bad input. The message is the one line shown to the person.

    It says what is wrong, where (file and line number where there is one), what was expected and
    what to do about it.
    """


class RunError(Exception):
    """A run cannot go on. The message says why, and what is left on disk."""


class Interrupted(RunError):
    """A signal asked the run to end; ``code`` is the exit code by which shells tell which."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class DivergenceError(RunError):
    """Training left the finite numbers."""


@contextmanager
def needs(package, what, requirements):
    """UserError where an import in the block fails for want of ``package``.

    ``what`` says for which purpose, in the singular; ``requirements`` is the file that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] != package:
            raise
        raise UserError(
            f"{what} needs {package}: python -m pip install -r {requirements}"
        ) from None


def run_script(main):
    """Run a script's ``main()`` and turn its errors into one line on stderr and an exit code.

    ``UserError`` exits with 2, ``RunError`` with 1, Ctrl-C with 130.
    """
    try:
        main()
    except UserError as error:
        sys.exit(_say(error, 2))
    except RunError as error:
        sys.exit(_say(error, getattr(error, "code", 1)))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))


def _say(message, code):
    line = " ".join(str(message).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code

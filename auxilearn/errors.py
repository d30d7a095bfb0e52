"""One way to tell a person what is wrong: a single line, exit code 2, no traceback."""

import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout


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

    ``UserError`` exits with 2, ``RunError`` with 1, Ctrl-C with 130. Where whoever read the output
    has gone, as ``head -1`` has after a line, the script does all the same what it was asked to.
    """
    with redirect_stdout(_output(sys.stdout)), redirect_stderr(_output(sys.stderr)):
        try:
            main()
        except UserError as error:
            sys.exit(_say(error, 2))
        except RunError as error:
            sys.exit(_say(error, getattr(error, "code", 1)))
        except KeyboardInterrupt:
            sys.exit(_say("interrupted", 130))
        except OSError as error:  # a path too long, a folder that may not be looked into
            if error.filename is None:
                raise
            sys.exit(_say(f"{os.fsdecode(error.filename)}: {error.strerror}", 2))
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()


def _output(stream):
    if stream is None:
        return None
    # A path may be no text, a terminal may not know a character: neither is worth a run.
    stream.reconfigure(errors="backslashreplace")
    return _OutputOfScript(stream)


class _OutputOfScript:
    """A text stream that goes on into nothing when its reader has gone."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with self._going_on():
            self._stream.write(text)
        return len(text)

    def flush(self):
        with self._going_on():
            self._stream.flush()

    @contextmanager
    def _going_on(self):
        try:
            yield
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())  # what is still buffered goes there too
            os.close(nothing)


def _say(message, code):
    line = " ".join(str(message).split())
    if not line.isprintable():  # what a file says may move a terminal's cursor
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code

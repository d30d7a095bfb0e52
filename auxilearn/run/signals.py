"""Ending a run when somebody asks: Ctrl-C, a scheduler's SIGTERM, Slurm's warning SIGUSR1."""

import os
import signal
import threading

from auxilearn.errors import Interrupted

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class StopRequest:
    """While active, the first signal is noted in ``signal`` and a second one ends the process.

    To be entered before worker processes start, so that Ctrl-C, which reaches them too, leaves them
    alive for the step that is still to be finished.
    """

    def __init__(self):
        self.signal = None
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            try:
                signal.signal(number, handler)
            except BaseException:
                # It first runs handlers that are due: PyTorch's for SIGCHLD raises where a worker
                # has died, which is no reason to leave ours installed.
                self.__exit__()
                raise

    def _note(self, number, _frame):
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number

    def interrupted(self, message):
        """The error to end the run with."""
        return Interrupted(message, EXIT_CODES.get(self.signal, 143))

"""Training runs as one Slurm job array, through submitit.

submitit writes the array, requeues a job at its time limit and returns its exit code. This module
adds two things: it stops the training with a checkpoint, and it waits again for the jobs of an
earlier call. It imports little, so the process beside each run stays small.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from auxilearn.errors import Interrupted, UserError, needs
from auxilearn.files import read_json, write_json
from auxilearn.tables.local import ROOT, Outcome

WARNING = signal.SIGUSR2  # Slurm sends it ahead of the time limit; submitit listens to it
STOP = signal.SIGUSR1  # the one signal that the training is sent
MAX_TIMEOUTS = 20  # time limits that a run may use up, going on from its checkpoint after each
GONE = "gone from the queue without a result; cancelled, most likely"
PATIENCE = 30  # seconds until a job that has left the queue without a result counts as ended


class TrainingRun:
    """``python train_bilevel.py ARGV...`` on a node: submitit calls it there, after unpickling.

    Slurm sends its signals to all processes of a job, and SIGTERM more than once. train_bilevel.py
    ends after its step at the first signal, and at once at the second. This process therefore keeps
    Slurm's signals from the training and sends it a single one.

    Args:
        argv: flags of train_bilevel.py; with ``--resume 1``, a requeued job continues.
        log: file that stdout and stderr are appended to.
        cwd: the run's working directory.
        patience: seconds that a run has for its last step and checkpoint.
    """

    def __init__(self, argv, log, cwd, patience):
        self.argv, self.log, self.cwd, self.patience = list(argv), str(log), str(cwd), patience
        self._process, self._asked = None, False

    def __call__(self):
        """Run the training; returns its exit code."""
        command = [sys.executable, str(ROOT / "train_bilevel.py"), *self.argv]
        blocked = {WARNING, signal.SIGTERM}  # a child inherits it; here, they are only late
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        signal.signal(signal.SIGTERM, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        while self._process.poll() is None:  # wait() would keep a signal handler from waiting
            time.sleep(0.2)
        while self._asked:  # preempted, requeued or cancelled: Slurm goes on from here
            signal.pause()
        return self._process.returncode

    def checkpoint(self):
        """Stop the training after a checkpoint; called by submitit at Slurm's warning.

        Returns the job to queue: the same again.
        """
        from submitit.helpers import DelayedSubmission

        self._stop()
        deadline = time.monotonic() + self.patience
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._process.kill()  # if it is still there; it goes on from an earlier checkpoint
        return DelayedSubmission(TrainingRun(self.argv, self.log, self.cwd, self.patience))

    def _stop(self, *_):
        if not self._asked:
            self._asked = True
            self._process.send_signal(STOP)


def launch(
    jobs,
    log_dir,
    options,
    *,
    timeout_min=24 * 60,
    array_parallelism=256,
    grace_s=90,
    poll_s=10,
):
    """Submit ``jobs`` as one job array. Returns an iterator of (job, ``Outcome``), as they finish.

    Jobs of an earlier call that are still in the queue are waited for instead: LOG_DIR/slurm/
    jobs.json keeps their numbers. Ctrl-C leaves the jobs with Slurm.

    Args:
        jobs: have ``name`` (unique), ``argv`` (flags of train_bilevel.py, with --resume 1) and
            ``log`` (file).
        log_dir: the sweep's own; its folder slurm/ must be seen by the nodes.
        options: {option of sbatch: value}, such as {"partition": "gpu", "cpus-per-task": 4}.
        timeout_min: time limit in minutes, after which a run is queued again, to go on.
        array_parallelism: jobs that run at the same time, at most.
        grace_s: seconds before the time limit at which a run is asked to stop.
        poll_s: seconds between two calls of squeue.

    Raises UserError: Slurm or submitit is missing, or sbatch refuses; Interrupted: Ctrl-C while
    waiting.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on this machine: use --launcher local, or start the sweep on a "
            "machine of the Slurm cluster"
        )
    with needs("submitit", "--launcher slurm", "requirements-tables.txt"):
        import submitit
    folder = Path(log_dir).absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    options = {name.replace("-", "_"): value for name, value in options.items()}
    cpus = options.setdefault("cpus_per_task", 1)
    executor = submitit.SlurmExecutor(folder, max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(
        job_name=re.sub(r"[^\w.-]", "_", Path(log_dir).name),
        time=timeout_min,
        ntasks_per_node=1,
        array_parallelism=array_parallelism,
        setup=[
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            # PyTorch alone would start a thread per core of the node.
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus}}}",
        ],
        # srun does not take over sbatch's --cpus-per-task since Slurm 22.05.
        srun_args=["--export=ALL", f"--cpus-per-task={cpus}"],
        signal_delay_s=grace_s,
        additional_parameters={"requeue": True, **options},
    )
    waiting = _submit(executor, folder, jobs, 0.8 * grace_s)
    handles = {task: submitit.SlurmJob(folder, task) for task in waiting}
    return _outcomes(folder, waiting, handles, poll_s)


def _submit(executor, folder, jobs, patience):
    """{number: job} of ``jobs``; those that are not in the queue yet are submitted."""
    file = folder / "jobs.json"
    numbers = read_json(file) if file.exists() else {}
    queue = _queue() if numbers else set()
    if queue is None:
        raise UserError("squeue does not answer, so nothing is submitted: try again")
    numbers = {name: number for name, number in numbers.items() if number in queue}
    new = [job for job in jobs if job.name not in numbers]
    runs = [TrainingRun(j.argv, Path(j.log).absolute(), Path.cwd(), patience) for j in new]
    try:
        handles = executor.submit_array(runs) if runs else []
    except RuntimeError as error:  # submitit's FailedJobError holds what sbatch wrote
        said = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line]
        raise UserError(f"sbatch refused the jobs: {'; '.join(said)}") from None
    numbers |= {job.name: handle.job_id for job, handle in zip(new, handles, strict=True)}
    write_json(file, numbers)
    return {numbers[job.name]: job for job in jobs}


def _queue():
    """The numbers of this user's jobs in Slurm's queue, a set; None if squeue fails."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    result = subprocess.run(command, capture_output=True, text=True)
    return None if result.returncode else set(result.stdout.split())


def _outcomes(folder, waiting, handles, poll_s):
    """Yield (job, Outcome) until ``waiting``, {number: job}, is empty."""
    seen = dict.fromkeys(waiting, time.monotonic())
    try:
        while waiting:
            written = set(os.listdir(folder))  # which a remote file system looks up anew
            for task in [t for t in waiting if handles[t].paths.result_pickle.name in written]:
                yield waiting.pop(task), _result(handles[task])
            queue, now = _queue(), time.monotonic()
            for task in list(waiting):
                if queue is None or task in queue:
                    seen[task] = now
                elif now - seen[task] > PATIENCE:
                    state = handles[task].watcher.get_state(task, mode="force")
                    yield waiting.pop(task), Outcome(None, GONE if state == "UNKNOWN" else state)
            if waiting:
                time.sleep(poll_s)
    except KeyboardInterrupt:
        arrays = " ".join(sorted({task.partition("_")[0] for task in waiting}))
        raise Interrupted(
            f"interrupted; {len(waiting)} jobs stay with Slurm: the same command waits for them "
            f"again, and scancel {arrays} ends them",
            130,
        ) from None


def _result(handle):
    """The Outcome of a job that has written its result."""
    try:
        return Outcome(handle.result())
    except RuntimeError as error:  # submitit's FailedJobError: a traceback between dashed lines
        trace = [line for line in str(error).split("-" * 22)[1].splitlines() if line.strip()]
        return Outcome(None, f"failed ({trace[-1]})")

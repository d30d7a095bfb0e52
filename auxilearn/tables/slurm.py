"""Training runs as one Slurm job array, through submitit: submitted, requeued, waited for.

Nothing that a node needs for long is imported here: the process beside each training run stays
small.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from auxilearn.errors import Interrupted, UserError, needs
from auxilearn.files import append_regular
from auxilearn.tables.local import ROOT, Outcome

WARNING = signal.SIGUSR2  # what Slurm sends ahead of the time limit, and submitit listens to
STOP = signal.SIGUSR1  # what the training is sent in its place, and in SIGTERM's
STOPPED = (143, -STOP)  # exit codes of a training that did so; the second, before its first step
MAX_TIMEOUTS = 20  # time limits that a run may use up, going on from its checkpoint after each
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
RESULT_PATIENCE = 60  # seconds until a shared file system must show what a node has written
GONE = "gone from the queue without a result; cancelled, most likely"


class TrainingRun:
    """``python train_bilevel.py ARGV...`` on a node: called there by submitit, after unpickling.

    Slurm sends its signals to all processes of a job, and SIGTERM more than once: at a preemption
    twice within milliseconds, or at both ends of its grace time. train_bilevel.py ends after its
    step at the first signal, and at once at the second. So it is kept from Slurm's, and sent one
    from here.

    Args:
        argv: flags of train_bilevel.py. ``--resume 1`` among them makes a requeued run go on.
        log: file that stdout and stderr are appended to.
        cwd: the run's working directory.
        patience: seconds that a run has for its last step and checkpoint.
    """

    def __init__(self, argv, log, cwd, patience):
        self.argv, self.log, self.cwd = [str(a) for a in argv], str(log), str(cwd)
        self.patience = patience
        self._pid, self._asked = None, False

    def __call__(self):
        """Run the training. Returns its exit code; leaves by SystemExit where Slurm ends the job.

        Without a result written, submitit and whoever waits know that the job goes on.
        """
        command = [sys.executable, str(ROOT / "train_bilevel.py"), *self.argv]
        Path(self.log).parent.mkdir(parents=True, exist_ok=True)
        signals = {WARNING, signal.SIGTERM}
        # A child inherits what is blocked; here, it is only late.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            with open(self.log, "ab") as log:
                process = subprocess.Popen(
                    command, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self._pid = process.pid
            signal.signal(signal.SIGTERM, self._ask)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        # Not process.wait(): the lock it holds would keep ``checkpoint`` from seeing the end.
        os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        code = process.wait()
        if code in STOPPED:
            self._leave()
        return code

    def checkpoint(self):
        """Stop the training after a checkpoint; called by submitit at Slurm's warning.

        Returns what is to be queued: the same again.
        """
        from submitit.helpers import DelayedSubmission

        self._stop()
        return DelayedSubmission(TrainingRun(self.argv, self.log, self.cwd, self.patience))

    def _ask(self, *_):
        """Ask the training to stop, the first time; also what is done at SIGTERM."""
        if not self._asked:
            self._asked = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, STOP)

    def _stop(self):
        if self._pid is None:
            return
        self._ask()
        deadline = time.monotonic() + self.patience
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # has been waited for
            while os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if time.monotonic() > deadline:
                    os.kill(self._pid, signal.SIGKILL)  # goes on from an earlier checkpoint
                time.sleep(0.05)

    def _leave(self):
        """The training has stopped after SIGTERM: find out what for, and end likewise."""
        command = ["squeue", "--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--format=%T"]
        try:
            state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:  # a node without Slurm's commands
            state = None
        if state == "RUNNING":
            # The grace time of a preemption: queue the job again now. In all other cases, Slurm
            # has decided what becomes of it; queueing would bring a cancelled job back.
            os.kill(os.getpid(), WARNING)
        sys.exit(STOPPED[0])


def launch(
    jobs,
    log_dir,
    *,
    partition=None,
    gpus_per_job=0,
    cpus_per_job=1,
    mem_gb=None,
    timeout_min=24 * 60,
    array_parallelism=256,
    grace_s=90,
    poll_s=10,
    extra=None,
):
    """Submit ``jobs`` as one job array. Returns an iterator of (job, Outcome), as they finish.

    A job that is still in the queue, from a call that has ended, is waited for and not submitted
    again: before anything is submitted, LOG_DIR/slurm/submissions.json says which jobs go under
    which name, and squeue says what there is under that name. A job that has left the queue is
    submitted. Ctrl-C while waiting leaves the jobs with Slurm.

    Args:
        jobs: have ``name`` (unique), ``argv`` (flags of train_bilevel.py, with --resume 1), ``log``
            (file) and, if they like, ``cwd`` (else the repository).
        log_dir: the sweep's own; its folder slurm/ must be seen by the nodes.
        timeout_min: time limit in minutes. A run that reaches it is queued again, MAX_TIMEOUTS
            times at most.
        array_parallelism: jobs that run at the same time, at most.
        grace_s: seconds before the time limit at which a run is asked to stop.
        poll_s: seconds between two calls of squeue.
        extra: {option of sbatch: value}, such as {"account": "vision"}; True for a bare flag.

    Raises:
        UserError: Slurm or submitit is missing, sbatch refuses, or another process waits for the
            same sweep.
        Interrupted: while waiting, after Ctrl-C.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "Slurm is not on this machine (there is no sbatch): use --launcher local, or start the "
            "sweep where sbatch is"
        )
    submitit = _submitit()
    sweep = _Sweep(Path(log_dir).absolute())
    queued = sweep.queued()
    handles = {
        task: submitit.SlurmJob(folder=sweep.folder, job_id=task) for task in queued.values()
    }
    waiting = {queued[job.name]: job for job in jobs if job.name in queued}
    new = [job for job in jobs if job.name not in queued]
    if new:
        executor = submitit.AutoExecutor(
            sweep.folder, cluster="slurm", slurm_max_num_timeout=MAX_TIMEOUTS
        )
        executor.update_parameters(
            name=sweep.announce([job.name for job in new]),
            timeout_min=timeout_min,
            cpus_per_task=cpus_per_job,
            tasks_per_node=1,
            slurm_array_parallelism=array_parallelism,
            slurm_signal_delay_s=grace_s,
            slurm_setup=_environment(cpus_per_job),
            # srun does not take over sbatch's --cpus-per-task since Slurm 22.05.
            slurm_srun_args=["--export=ALL", f"--cpus-per-task={cpus_per_job}"],
            slurm_additional_parameters={
                "requeue": True,
                **(extra or {}),
                "signal": f"{WARNING.name.removeprefix('SIG')}@{grace_s}",
            },
            **({"slurm_partition": partition} if partition else {}),
            **({"gpus_per_node": gpus_per_job} if gpus_per_job else {}),
            **({"mem_gb": mem_gb} if mem_gb else {}),
        )
        for job, handle in zip(new, _submitted(executor, new, 0.8 * grace_s), strict=True):
            handles[handle.job_id] = handle
            waiting[handle.job_id] = job
    return _outcomes(sweep, waiting, handles, poll_s)


def _submitit():
    with needs("submitit", "--launcher slurm", "requirements-tables.txt"):
        import submitit
    return submitit


def _environment(cpus):
    """Lines of shell ahead of a job. PyTorch alone would start a thread per core of the node."""
    return [
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus}}}",
        f"export SUBMITIT_PREEMPT_SIGNAL={WARNING.name.removeprefix('SIG')}",
    ]


def _submitted(executor, jobs, patience):
    """submitit's handles of ``jobs``, submitted as one array."""
    runs = [
        TrainingRun(job.argv, Path(job.log).absolute(), getattr(job, "cwd", None) or ROOT, patience)
        for job in jobs
    ]
    try:
        with executor.batch():
            return [executor.submit(run) for run in runs]
    except RuntimeError as error:  # submitit's FailedJobError holds what sbatch wrote
        said = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line]
        raise UserError(f"sbatch refused the jobs: {'; '.join(said)}") from None


class _Sweep:
    """What is in Slurm's queue of a sweep.

    ``submissions`` maps the Slurm name of each job array, which is used once, to the names of its
    jobs, in order. It is written ahead of sbatch, so that no moment is left at which a process that
    is killed could forget what it has submitted.
    """

    def __init__(self, log_dir):
        from auxilearn.run.record import read_json  # imports PyTorch

        self.folder = log_dir / "slurm"
        self.file = self.folder / "submissions.json"
        self._prefix = re.sub(r"[^\w.-]", "_", log_dir.name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = append_regular(self.folder / "lock")
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror})") from None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process waits for the jobs of {log_dir}: leave it to it, or end it first"
            ) from None
        except OSError:
            pass  # a file system without locks
        self.submissions = read_json(self.file) if self.file.exists() else {}
        if not isinstance(self.submissions, dict) or not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names)
            for names in self.submissions.values()
        ):
            raise UserError(
                f"{self.file}: not written by a sweep; see with squeue that no job of it is "
                "left, and remove it"
            )

    def announce(self, names):
        """A new Slurm name, under which the jobs ``names`` are going to be submitted."""
        from auxilearn.run.record import write_json

        slurm_name = f"{self._prefix}-{uuid.uuid4().hex[:8]}"
        self.submissions[slurm_name] = names
        write_json(self.file, self.submissions)
        return slurm_name

    def queued(self):
        """{name: id} of the jobs that are in the queue. Forgets submissions that have left it.

        UserError if squeue fails: nothing may be submitted before it is known what is there.
        """
        if not self.submissions:
            return {}
        states = self.states()
        queued, current = {}, {}
        for slurm_name, names in self.submissions.items():
            for task, state in states.get(slurm_name, {}).items():
                if state in ENDED:
                    continue
                if not (self.folder / f"{task}_submitted.pkl").exists():
                    # The process died between sbatch and handing over what is to be run.
                    subprocess.run(["scancel", task], capture_output=True)
                    continue
                queued[names[int(task.partition("_")[2] or 0)]] = task
                current[slurm_name] = names
        self.submissions = current
        return queued

    def states(self):
        """{Slurm name: {id: state}} of what squeue knows: the queue, and what ended lately."""
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%j|%i|%T"]
        result = subprocess.run(
            [*command, f"--name={','.join(self.submissions)}"], capture_output=True, text=True
        )
        if result.returncode:
            raise UserError(f"squeue does not tell what is in the queue: {result.stderr.strip()}")
        states = {name: {} for name in self.submissions}
        for line in result.stdout.splitlines():
            name, task, state = line.rsplit("|", 2)
            states[name][task] = state
        return states

    def close(self):
        self._lock.close()


def _outcomes(sweep, waiting, handles, poll_s):
    """Yield (job, Outcome) until ``waiting``, {id: job}, is empty."""
    missed = {}  # {id: seconds at which a job was first seen to have ended without a result}
    polled = float("-inf")
    complained = False
    try:
        while waiting:
            written = set(os.listdir(sweep.folder))  # which a remote file system looks up anew
            for task in [t for t in waiting if handles[t].paths.result_pickle.name in written]:
                yield waiting.pop(task), _result(handles[task])
            now = time.monotonic()
            if waiting and now - polled >= poll_s:
                polled = now
                try:
                    states = {t: s for tasks in sweep.states().values() for t, s in tasks.items()}
                except UserError as error:  # a controller of Slurm that restarts, say
                    if not complained:
                        print(f"warning: {error}; waiting", file=sys.stderr, flush=True)
                    complained = True
                    continue
                complained = False
                for task in list(waiting):
                    state = states.get(task)
                    if state is not None and state not in ENDED:
                        missed.pop(task, None)
                        continue
                    # Twice, since a job on its way back into the queue may look ended; and longer
                    # where there should be a result.
                    first = missed.setdefault(task, now)
                    if now - first >= (RESULT_PATIENCE if state == "COMPLETED" else poll_s):
                        yield waiting.pop(task), Outcome(None, state or _accounted(task))
            if waiting:
                time.sleep(min(1, poll_s))
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {len(waiting)} jobs stay with Slurm: the same command waits for them "
            f"again, and scancel --name={','.join(sweep.submissions)} ends them",
            130,
        ) from None
    finally:
        sweep.close()


def _result(handle):
    """The Outcome of a job that has written its result."""
    try:
        return Outcome(handle.result(), "COMPLETED")
    except RuntimeError as error:  # submitit's FailedJobError: a traceback between dashed lines
        trace = [line for line in str(error).split("-" * 22)[1].splitlines() if line.strip()]
        return Outcome(None, f"FAILED ({trace[-1]})")


def _accounted(task):
    """The state of a job that squeue no longer knows, where the cluster keeps accounts."""
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State"]
    try:
        result = subprocess.run([*command, f"--jobs={task}"], capture_output=True, text=True)
    except FileNotFoundError:
        return GONE
    words = result.stdout.split()  # CANCELLED by 1000
    return words[0] if words else GONE

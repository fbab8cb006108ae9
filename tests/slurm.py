#!/usr/bin/env python3
"""A stand-in for Slurm on one machine: run it under the name sbatch, srun, squeue, scontrol or scancel.

It does what the manual pages of Slurm say, and srun's source where they say nothing, as far as the scripts of this
project rely on it. Jobs start at once. Nodes are addresses of the loopback interface. Slurm's requests are answered
with an error where Slurm would answer with one, and options that are not known here are refused.

The folder SLURM_STAND_IN holds the state: a folder per job, with the files `kind`, `limit` (seconds), `script`, `shell`
(its process id), `restarts` and `steps/`, the requests `cancel` and `requeue`, and `completing` while the job is ended.
Processes belong to a job or step by their environment, as they do by their cgroup under Slurm. A signal reaches the
script or the tasks alone, and with SIGNAL_CHILDREN=yes, as with SignalChildrenProcesses in cgroup.conf, all processes.
SIGKILL always reaches all of them.
"""

import contextlib
import getopt
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ["SLURM_STAND_IN"])
KILL_WAIT = 3  # seconds; Slurm's default is 30
REQUEUE_DELAY = 1  # seconds; Slurm's is two minutes
POLL = 0.05
SBATCH_OPTIONS = (
    "cpus-per-task= error= gpus-per-node= gres= job-name= nodes= no-requeue ntasks= ntasks-per-node= open-mode= "
    "output= parsable partition= requeue signal= time= wait wrap="
)
SRUN_OPTIONS = (
    "cpus-per-task= gpus-per-node= gres= job-name= kill-on-bad-exit= nodes= ntasks= ntasks-per-node= partition= "
    "signal= time= wait="
)


def fail(message: str) -> None:
    """End this command as Slurm's end."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def parse(arguments: list[str], known: str) -> tuple[dict[str, str], list[str]]:
    """Split a command line into options and the rest, as getopt_long does."""
    try:
        options, rest = getopt.getopt(arguments, "N:n:p:J:o:t:c:", known.split())
    except getopt.GetoptError as error:
        fail(str(error))
    short = {"-N": "nodes", "-n": "ntasks", "-p": "partition", "-J": "job-name", "-o": "output", "-t": "time"}
    short["-c"] = "cpus-per-task"
    return {short.get(name, name.lstrip("-")): value for name, value in options}, rest


def seconds(text: str) -> float:
    """Seconds of a time limit: minutes, minutes:seconds or hours:minutes:seconds. 0: no limit."""
    parts = [int(part) for part in text.split(":")]
    hours, minutes, rest = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return (hours * 60 + minutes) * 60 + rest or float("inf")


def processes(job: str, step: str | None = None) -> list[int]:
    """Process ids of a step; of step "batch", the script and its children; of all steps and the script if None."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            content = (entry / "environ").read_bytes()
            zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        variables = dict(pair.partition("=")[::2] for pair in content.decode(errors="replace").split("\0"))
        of_job = (variables.get("SLURM_STAND_IN"), variables.get("SLURM_JOB_ID")) == (str(STATE), job)
        if of_job and not zombie and step in (None, variables.get("SLURM_STEP_ID", "batch")):
            found.append(int(entry.name))
    return found


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def send_to(job: str, step: str, number: int) -> None:
    """Send a signal to a step, or to the step "batch"."""
    if number == signal.SIGKILL or os.environ.get("SIGNAL_CHILDREN") == "yes":
        send(processes(job, step), number)
    elif step == "batch":
        send([int((STATE / "jobs" / job / "shell").read_text())], number)
    else:
        send([int(task.name) for task in (STATE / "jobs" / job / "steps" / step).iterdir()], number)


def send_to_all(job: str, number: int) -> None:
    """Send a signal to the steps of a job, and to its batch script if it has one."""
    batch = ["batch"] if (STATE / "jobs" / job / "shell").exists() else []
    for step in [*batch, *steps_of(job)]:
        send_to(job, step, number)


def steps_of(job: str) -> list[str]:
    """Numbers of the steps of a job."""
    return [step.name for step in (STATE / "jobs" / job / "steps").iterdir()]


def make_job(kind: str, options: dict[str, str]) -> Path:
    """Number a new job, and make its folder."""
    number = 1
    while True:
        job = STATE / "jobs" / str(number)
        try:
            job.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
    (job / "steps").mkdir()
    (job / "kind").write_text("not to be requeued" if "no-requeue" in options else kind)
    (job / "limit").write_text(str(seconds(options.get("time", "0"))))
    return job


def gpus(options: dict[str, str]) -> str:
    """Number of GPUs per node that options ask for, "" if none."""
    return options.get("gpus-per-node", "") or options.get("gres", "").rpartition("gpu:")[2]


def job_environment(job: Path, options: dict[str, str]) -> dict[str, str]:
    """Variables that the batch script and the tasks of an allocation see."""
    nodes = int(options.get("nodes", "1"))
    if "ntasks" in options and "ntasks-per-node" in options and "nodes" not in options:
        nodes = -(-int(options["ntasks"]) // int(options["ntasks-per-node"]))
    names = "127.0.0.1" if nodes == 1 else f"127.0.0.[1-{nodes}]"
    variables = {
        "SLURM_JOB_ID": job.name,
        "SLURM_JOB_NAME": options.get("job-name", "job"),
        "SLURM_JOB_NODELIST": names,
        "SLURM_NODELIST": names,
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_SUBMIT_DIR": os.getcwd(),
    }
    optional = {
        "SLURM_GPUS_ON_NODE": gpus(options),
        "SLURM_CPUS_PER_TASK": options.get("cpus-per-task"),
        "SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node"),
        "SLURM_NTASKS": options.get("ntasks"),
    }
    return variables | {name: value for name, value in optional.items() if value}


class Clock:
    """Time limit of a running job, with the warning before it.

    Args:
        job: Folder of the job.
        warning: Value of --signal.
    """

    def __init__(self, job: Path, warning: str) -> None:
        self.job = job
        self.start = time.monotonic()
        match = re.fullmatch(r"(?:(B):)?(?:SIG)?(\w+)(?:@(\d+))?", warning) if warning else None
        self.to_shell = bool(match and match[1])
        self.number = match and signal.Signals[f"SIG{match[2]}"]
        self.before = int(match[3] or 60) if match else 0

    @property
    def left(self) -> float:
        """Seconds to the time limit, which scontrol may change."""
        return float((self.job / "limit").read_text()) - (time.monotonic() - self.start)

    def warn(self, shell: int | None) -> None:
        """Send the warning if it is due, once: with B: to the batch shell alone, without to the steps alone."""
        if self.number and self.left <= self.before:
            if self.to_shell:
                send([shell] if shell else [], self.number)
            else:
                for step in steps_of(self.job.name):
                    send_to(self.job.name, step, self.number)
            self.number = None


def end_job(job: str, reason: str, output: int) -> None:
    """SIGTERM to all processes of a job, and SIGKILL after KILL_WAIT."""
    (STATE / "jobs" / job / "completing").touch()
    os.write(output, f"slurmstepd: error: *** JOB {job} ON 127.0.0.1 CANCELLED {reason} ***\n".encode())
    send_to_all(job, signal.SIGCONT)
    send_to_all(job, signal.SIGTERM)
    deadline = time.monotonic() + KILL_WAIT
    while time.monotonic() < deadline and processes(job):
        time.sleep(POLL)
    send(processes(job), signal.SIGKILL)


def run_batch(job: Path, options: dict[str, str], arguments: list[str]) -> int:
    """Run the batch script once, and return its exit status."""
    output = Path(options.get("output", "slurm-%j.out").replace("%j", job.name))
    flags = os.O_APPEND if options.get("open-mode") == "append" else os.O_TRUNC
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | flags | os.O_APPEND, 0o644)
    shutil.rmtree(job / "steps")
    (job / "steps").mkdir()
    clock = Clock(job, options.get("signal", ""))
    environment = os.environ | job_environment(job, options)
    if restarts := int((job / "restarts").read_text()):
        environment["SLURM_RESTART_COUNT"] = str(restarts)
    script = subprocess.Popen(
        [job / "script", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=descriptor,
        stderr=descriptor,
        start_new_session=True,
    )
    (job / "shell").write_text(str(script.pid))
    while script.poll() is None:
        clock.warn(script.pid)
        reasons = {
            "DUE TO TIME LIMIT": clock.left <= 0,
            "DUE TO JOB REQUEUE": (job / "requeue").exists(),
            "": (job / "cancel").exists(),
        }
        if any(reasons.values()):
            end_job(job.name, next(reason for reason, holds in reasons.items() if holds), descriptor)
            script.wait()
        time.sleep(POLL)
    send(processes(job.name), signal.SIGKILL)  # the job ends with its script
    os.close(descriptor)
    return script.returncode


def sbatch() -> int:
    options, rest = parse(sys.argv[1:], SBATCH_OPTIONS)
    if "wrap" in options:
        script, arguments = f"#!/bin/sh\n# This script was created by sbatch --wrap.\n\n{options['wrap']}\n", []
    elif rest and Path(rest[0]).is_file():
        script, arguments = Path(rest[0]).read_text(), rest[1:]
    else:
        fail(f"Unable to open file {rest[0] if rest else ''}")
    if not script.startswith("#!"):
        fail(
            "This does not look like a batch script.  The first line must start with #! followed by the path to an "
            "interpreter."
        )
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            more, _ = parse(shlex.split(line)[1:], SBATCH_OPTIONS)
            options = {**more, **options}
    job = make_job("batch", options)
    (job / "restarts").write_text("0")
    (job / "script").write_text(script)  # slurmd runs a copy in its spool folder
    (job / "script").chmod(0o700)
    print(job.name if "parsable" in options else f"Submitted batch job {job.name}", flush=True)
    if "wait" not in options and os.fork():
        return 0
    while True:
        status = run_batch(job, options, arguments)
        if not (job / "requeue").exists():
            return status if status >= 0 else 128 - status
        time.sleep(REQUEUE_DELAY)
        (job / "restarts").write_text(str(int((job / "restarts").read_text()) + 1))
        for request in ("requeue", "completing", "cancel"):
            (job / request).unlink(missing_ok=True)


class Step:
    """The tasks of one srun.

    Args:
        job: Folder of the job.
        options: Options of srun.
        command: Command line of each task.
        environment: Variables of the job.
    """

    def __init__(self, job: Path, options: dict[str, str], command: list[str], environment: dict[str, str]) -> None:
        self.job = job
        nodes = int(options.get("nodes", environment["SLURM_JOB_NUM_NODES"]))
        per_node = int(options.get("ntasks-per-node", environment.get("SLURM_NTASKS_PER_NODE", "1")))
        count = int(options.get("ntasks", environment.get("SLURM_NTASKS", str(nodes * per_node))))
        per_node = -(-count // nodes)
        self.number = str(len(steps_of(job.name)))
        self.asked = float("-inf")  # time of the last Ctrl-C
        self.received: list[int] = []
        for number in signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2:
            signal.signal(number, lambda number, frame: self.received.append(number))
        cores = sorted(os.sched_getaffinity(0))
        cpus = int(options.get("cpus-per-task", "1"))
        self.tasks = {}
        for rank in range(count):
            place = {
                "SLURM_STEP_ID": self.number,
                "SLURM_STEP_NODELIST": environment["SLURM_JOB_NODELIST"],
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(rank),
                "SLURM_NODEID": str(rank // per_node),
                "SLURM_LOCALID": str(rank % per_node),
            }
            first = rank * cpus % len(cores)
            mask = [*cores[first:], *cores[:first]][:cpus]
            self.tasks[rank] = subprocess.Popen(
                command,
                env={**environment, **place},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=lambda mask=mask: self._begin_task(mask),
            )
        step = job / "part"
        step.mkdir()
        for task in self.tasks.values():
            (step / str(task.pid)).touch()
        step.rename(job / "steps" / self.number)

    @staticmethod
    def _begin_task(mask: list[int]) -> None:
        """Be bound to the task's cores, with all signals as slurmstepd leaves them."""
        os.sched_setaffinity(0, mask)
        for number in signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2:
            signal.signal(number, signal.SIG_DFL)

    def signal(self, number: int) -> None:
        """Send a signal to the step."""
        send_to(self.job.name, self.number, number)

    def answer(self, number: int) -> None:
        """Do what srun does when it gets a signal: it passes on SIGUSR1 and SIGUSR2 alone."""
        if number == signal.SIGINT and time.monotonic() - self.asked > 1:
            self.asked = time.monotonic()
            print("srun: interrupt (one more within 1 sec to abort)", file=sys.stderr)
        elif number in (signal.SIGUSR1, signal.SIGUSR2):
            self.signal(number)
        else:
            print("srun: forcing job termination", file=sys.stderr)
            self.signal(signal.SIGKILL)

    def run(self, clock: Clock | None, kill: bool, wait: float) -> int:
        """Wait for the tasks, and return the highest exit status."""
        statuses: dict[int, int] = {}
        first_end = None
        while len(statuses) < len(self.tasks):
            while self.received:
                self.answer(self.received.pop(0))
            if clock:
                clock.warn(None)
                if clock.left <= 0:
                    end_job(self.job.name, "DUE TO TIME LIMIT", sys.stderr.fileno())
            for rank, task in self.tasks.items():
                if rank in statuses or task.poll() is None:
                    continue
                (self.job / "steps" / self.number / str(task.pid)).unlink()
                statuses[rank] = task.returncode if task.returncode >= 0 else 128 - task.returncode
                first_end = first_end or time.monotonic()
                if statuses[rank]:
                    print(f"srun: error: task {rank}: Exited with exit code {statuses[rank]}", file=sys.stderr)
                    if kill:
                        self.signal(signal.SIGKILL)
            if wait and first_end and time.monotonic() - first_end > wait:
                print(f"srun: First task exited {wait:.0f}s ago", file=sys.stderr)
                self.signal(signal.SIGKILL)
            time.sleep(POLL)
        self.signal(signal.SIGKILL)  # the step ends with its tasks
        return max(statuses.values())


def srun() -> int:
    options, command = parse(sys.argv[1:], SRUN_OPTIONS)
    if not command:
        fail("No command given to execute.")
    job, environment, clock = STATE / "jobs" / os.environ.get("SLURM_JOB_ID", ""), dict(os.environ), None
    if "SLURM_JOB_ID" not in os.environ:
        job = make_job("interactive", options)
        environment |= job_environment(job, options)
        clock = Clock(job, options.get("signal", ""))  # it applies to allocations, not to steps
    if "cpus-per-task" in options:
        environment["SLURM_CPUS_PER_TASK"] = options["cpus-per-task"]
    else:
        environment.pop("SLURM_CPUS_PER_TASK", None)  # since 22.05, srun does not take it from the job
    step = Step(job, options, command, environment)
    return step.run(clock, options.get("kill-on-bad-exit", "0") == "1", float(options.get("wait", "0")))


def find_job(number: str) -> Path:
    job = STATE / "jobs" / number
    if not number or not job.is_dir():
        fail(f"Invalid job id specified: {number}")
    return job


def scontrol() -> int:
    action = sys.argv[1:]
    if action[0] == "show" and action[1] in ("hostname", "hostnames"):
        match = re.fullmatch(r"(.*)\[(\d+)-(\d+)\]", action[2])
        numbers = range(int(match[2]), int(match[3]) + 1) if match else ()
        print("\n".join(f"{match[1]}{number}" for number in numbers) if match else action[2])
    elif action[0] == "requeue":
        job = find_job(action[1])
        if (job / "kind").read_text() != "batch":
            fail(f"Requested operation is presently disabled for job {action[1]}")
        if not processes(job.name):
            fail(f"Job has already finished for job {action[1]}")
        (job / "requeue").touch()
    elif action[0] == "update":
        settings = {name.lower(): value for name, _, value in (pair.partition("=") for pair in action[1:])}
        part = find_job(settings.pop("jobid")) / "limit.part"
        part.write_text(str(seconds(settings.pop("timelimit"))))
        part.rename(part.with_name("limit"))
        if settings:
            fail(f"Update of this parameter is not supported: {settings}")
    else:
        fail(f"invalid keyword: {' '.join(action)}")
    return 0


def squeue() -> int:
    options, _ = parse(sys.argv[1:], "noheader jobs= format=")
    if options.get("format") != "%T" or "noheader" not in options:
        fail("only --noheader --format %T is known here")
    print("COMPLETING" if (find_job(options["jobs"]) / "completing").exists() else "RUNNING")
    return 0


def scancel() -> int:
    options, ids = parse(sys.argv[1:], "batch signal=")
    for identifier in ids:
        number, _, step = identifier.partition(".")
        job = find_job(number)
        if "signal" not in options:
            (job / "cancel").touch()
            continue
        sent = signal.Signals[f"SIG{options['signal'].removeprefix('SIG')}"]
        if "batch" in options:  # the shell alone
            send([int((job / "shell").read_text())], sent)
        elif step and step not in steps_of(job.name):
            fail(f"Kill job error on job step id {identifier}: Invalid job id specified")
        else:
            for part in [step] if step else steps_of(job.name):
                send_to(number, part, sent)
    return 0


if __name__ == "__main__":
    commands = {"sbatch": sbatch, "srun": srun, "squeue": squeue, "scontrol": scontrol, "scancel": scancel}
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # head reads one line
    sys.exit(commands[Path(sys.argv[0]).name]())

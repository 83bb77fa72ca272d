"""Independent jobs on other machines: `Cluster` is an `Executor` on a Dask scheduler's workers.

Each job runs in a process of its own, as with `bort.jobs.Processes`: a Dask worker may not have
children by multiprocessing, and OMP_NUM_THREADS has to be set before a process starts. The worker
starts the process in the folder of the driver, the program that submits the jobs, and watches it:
when the driver has ended, or nobody waits for the result, the process is ended.

A job may run more than once, even twice at the same time, where a worker was lost or only seemed
to be. So a job writes under a name of its own and renames, and its result is the same each time.

All machines share a disk. A function with its data that is larger than a few kilobytes is written
there once and read by each job, which compares its SHA-256 with the one in its message.

Anyone who reaches the scheduler can run code on the workers: use TLS or a closed network
(scripts/README.md).
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    TypeVar,
)

from bort.config import option
from bort.errors import UserError, reasons
from bort.files import LOCK_FILE, read_json, read_yaml, remove_temporaries, temporary_name
from bort.jobs import (
    SLOT_VARIABLE,
    UNLIMITED,
    Caps,
    Executor,
    JobProcess,
    ProcessDiedError,
    UnwantedError,
    outcome_of,
    sendable,
)
from bort.mxnet_setup import asked_threads, usable_cores

if TYPE_CHECKING:
    import dask_jobqueue
    import distributed
    from dask.typing import Key

Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECT_SECONDS = 20.0
WORKERS_POLL = 2.0  # seconds between looks at how many workers there are
END_POLL = 0.1  # seconds between looks whether jobs have ended
DISK_SECONDS = 5.0  # in which a file of the driver has to appear on a worker's machine
END_SECONDS = 120.0  # that a job which is told to end has to save its state
SENT_BYTES = 8192  # of a function; a larger one goes to the shared disk
PACKAGES = ("numpy", "gluonnlp", "tiktoken", "sentencepiece", "tokenizers")
# Before MXNet is imported, which sets the variable.
_USERS_THREADS = asked_threads() or None
_ADDRESS = re.compile(r"(?:tcp|tls)://[^/]+:\d+/?")
_JOB_QUEUES = {"slurm": "SLURMCluster", "pbs": "PBSCluster"}
_SUBMIT_KEYS = ("jobs",)  # of a job queue's file: ours; the others are dask-jobqueue's


@dataclass(frozen=True)
class ClusterSettings:
    """Other machines."""

    cluster: Optional[str] = option(
        None,
        "run the jobs on the workers of a Dask scheduler: tcp://host:8786, tls://host:8786, the "
        "scheduler.json that it wrote, or slurm:FILE.yaml (pbs:FILE.yaml) to start workers as "
        "batch jobs (default: this machine; see scripts/README.md)",
    )

    def check(self) -> None:
        """Raise `UserError` when packages that the flag needs are not installed."""
        if self.cluster is None:
            return
        kind, _, path = self.cluster.partition(":")
        queue = kind in _JOB_QUEUES
        if queue and not path:
            raise UserError(
                f"--cluster {self.cluster}: names no file of the queue's settings; give "
                f"{kind}:FILE.yaml"
            )
        for package in ("distributed", *(["dask_jobqueue"] if queue else [])):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--cluster: the package {package.replace('_', '-')} is not installed; "
                    "pip install -r requirements-cluster.txt"
                )


def refuse_with_cluster(cluster: Optional[str], flag: str, value: object, unset: object) -> None:
    """Raise `UserError` when a flag that says how many jobs run here is given with --cluster."""
    if cluster and value != unset:
        raise UserError(
            f"{flag} {value}: with --cluster its workers say how many jobs run at once; leave out "
            f"{flag}"
        )


class WorkerKilledError(UserError):
    """Every worker that ran a job died with it."""


# ---- the driver ----------------------------------------------------------------------------------


class Job(NamedTuple):
    """A job as it is sent to a worker."""

    function: bytes  # pickled; empty when it is in `file`, on the shared disk
    file: str
    digest: str  # SHA-256 of that file
    arguments: bytes  # pickled: args, kwargs
    folder: str  # which the driver has locked
    directory: str  # the driver's current one
    environment: Mapping[str, str]  # the driver's versions
    threads: Optional[int]  # OpenMP threads; None: the worker's share of its machine
    caps: Caps
    patience: float


class Cluster(Executor):
    """Runs each job in a new process on a Dask worker, as many at once as the workers have threads.

    Functions, arguments and results are pickled. A future raises what that of `Processes` does, and
    `WorkerKilledError` when the worker died each time that it ran the job.

    Args:
        address: as in `ClusterSettings`.
        folder: on the shared disk, locked by this process while jobs are submitted.
        threads: OpenMP threads of a job; None: OMP_NUM_THREADS of this process, where the user has
            set it, else the cores of the worker's machine, divided by the threads of the worker.
        caps: on time and memory of each job.
        patience: seconds that a job has to end after SIGTERM before it is killed.
        gpus: device numbers that each job uses, such as "0": it takes as many of its worker's
            resource GPU.
    """

    workers_change = WORKERS_POLL

    def __init__(
        self,
        address: str,
        folder: str,
        threads: Optional[int] = None,
        caps: Caps = UNLIMITED,
        patience: float = 0.0,
        gpus: Optional[str] = None,
    ) -> None:
        self._address, self._folder = address, os.path.abspath(folder)
        self._threads, self._caps = threads or _USERS_THREADS, caps
        self._patience = min(patience, END_SECONDS)
        self._gpus = len(gpus.split(",")) if gpus else 0
        self._client, self._queue = _connect(address)
        self._lock = threading.Lock()
        self._futures: dict[object, distributed.Future] = {}  # by key
        self._last: tuple[Any, bytes, str, str] = (None, b"", "", "")  # function, as it is sent
        self._counted, self._slots = -float("inf"), 0
        self._started = False

    @property
    def workers(self) -> int:  # type: ignore[override]  # it changes here
        """Return how many jobs the workers run at once, 1 while there are none."""
        if time.monotonic() - self._counted > WORKERS_POLL:
            with self._loss_named():
                slots = self._client.run_on_scheduler(_count_slots, gpus=self._gpus)
            if not slots and (self._slots or self._counted < 0):
                wanted = f" with the resource GPU={self._gpus}" if self._gpus else ""
                print(
                    f"--cluster {self._address}: has no workers{wanted}; waiting for one",
                    file=sys.stderr,
                )
            self._slots, self._counted = slots, time.monotonic()
        return max(1, self._slots)

    def submit(
        self, function: Callable[..., Result], /, *args: object, **kw: object
    ) -> Future[Result]:
        """Send the job to the scheduler; returns its future."""
        if not self._started:
            with self._loss_named():
                self._await_end(self._folder)  # of the jobs of a command that was killed
            self._started = True
        content, file, digest = self._sent(function)
        job = Job(
            *(content, file, digest, pickle.dumps((args, kw)), self._folder, os.getcwd()),
            *(environment(), self._threads, self._caps, self._patience),
        )
        mine: Future[Result] = Future()
        with self._loss_named():
            theirs = self._client.submit(
                run_job,
                job,
                key=f"bort-{uuid.uuid4().hex}",
                pure=False,
                resources={"GPU": self._gpus} if self._gpus else None,
            )
        with self._lock:
            self._futures[theirs.key] = theirs
        name = str(args[0] if args else function)[:200]
        theirs.add_done_callback(partial(self._settle, mine, name))
        return mine

    def _sent(self, function: Callable[..., Any]) -> tuple[bytes, str, str]:
        """Return the pickled function, or the file that it is in and its digest.

        The file stays until another function is submitted.
        """
        if function is not self._last[0]:
            self._remove_file()
            content = pickle.dumps(function)
            file = digest = ""
            if len(content) > SENT_BYTES:
                file, digest = self._write(content), hashlib.sha256(content).hexdigest()
                content = b""
            self._last = (function, content, file, digest)
        return self._last[1:]

    def _remove_file(self) -> None:
        with suppress(OSError):
            os.remove(self._last[2])

    def _write(self, content: bytes) -> str:
        path = temporary_name(os.path.join(self._folder, "function"))
        with open(path, "xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        return path

    def _settle(self, mine: Future[Any], name: str, theirs: distributed.Future) -> None:
        """Give a future of Dask's outcome to ours; called in a thread of the client's."""
        try:
            value, error = self._outcome(name, theirs)
        except Exception as failure:
            value, error = None, failure
        with self._lock:
            self._futures.pop(theirs.key, None)
        if error is None:
            mine.set_result(value)
        else:
            mine.set_exception(error)

    def _outcome(
        self, name: str, theirs: distributed.Future
    ) -> tuple[Any, Optional[BaseException]]:
        from distributed.scheduler import KilledWorker

        if theirs.status == "finished":
            return pickle.loads(theirs.result())
        if theirs.status == "error":
            error = theirs.exception()
            if isinstance(error, KilledWorker):
                host = error.last_worker.host
                return None, WorkerKilledError(
                    f"--cluster: each of {error.allowed_failures + 1} workers that ran the job "
                    f"{name} died with it, the last one on {host}: its log, or the system's, may "
                    "say why; often memory runs out"
                )
            return None, error
        return None, self._lost()

    def _lost(self) -> UserError:
        return UserError(
            f"--cluster {self._address}: the scheduler was lost; rerun the same command to resume"
        )

    @contextmanager
    def _loss_named(self) -> Iterator[None]:
        """Raise `UserError` for what Dask raises when the scheduler is lost.

        That is a timeout while the client tries to reconnect, and any error after it.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) or self._client.status != "running":
                raise self._lost() from None
            raise

    def as_completed(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        ahead: int = 0,
        on_error: Optional[Callable[[Item, BaseException], Result]] = None,
    ) -> Iterator[Result]:
        """Yield function(item) of every item as the jobs end; see `Executor`.

        A job that kills its workers does not end the others: `on_error` is called after them.
        """
        killed: list[tuple[Item, BaseException]] = []

        def handled(item: Item, error: BaseException) -> Any:
            """Put off the error of a job that kills its workers; `killed` stands for its result."""
            if isinstance(error, WorkerKilledError):
                killed.append((item, error))
                return killed
            if on_error is None:
                raise error
            return on_error(item, error)

        for result in super().as_completed(function, items, ahead, handled):
            if result is not killed:
                yield result
        for item, error in killed:
            if on_error is None:
                raise error
            yield on_error(item, error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """End the jobs that run, wait for their end, and leave the cluster."""
        with self._lock:
            waiting = list(self._futures.values())
        with suppress(Exception):  # the scheduler may be gone
            if waiting:
                self._client.cancel(waiting, force=True)
            self._await_end(self._folder)
        self._remove_file()
        remove_temporaries(self._folder)  # of jobs whose machine was lost
        self._client.close()
        if self._queue is not None:
            self._queue.close()

    def _await_end(self, folder: str) -> None:
        """Wait until no worker runs a job for the folder."""
        while any(self._client.run(count_jobs, folder, on_error="ignore").values()):
            time.sleep(END_POLL)


def _count_slots(gpus: int, dask_scheduler: Any = None) -> int:
    """Return how many jobs the workers run at once (on the scheduler)."""
    return sum(
        min(worker.nthreads, int(worker.resources.get("GPU", 0)) // gpus)
        if gpus
        else worker.nthreads
        for worker in dask_scheduler.workers.values()
    )


def _connect(address: str) -> tuple[distributed.Client, Optional[dask_jobqueue.JobQueueCluster]]:
    """Return a client of the scheduler, and the job queue that it belongs to, or None.

    Raises `UserError` when there is no scheduler, it admits no one without a certificate, or it
    or a worker has another Python or Dask.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # errors come as exceptions
    import distributed

    for name in ("distributed", "distributed.client"):  # Dask has set them again
        logging.getLogger(name).setLevel(logging.CRITICAL)

    class Client(distributed.Client):
        """One that `Cluster` closes: it does not wait for 40 s if it failed while it connected."""

        def __del__(self) -> None:
            pass

    queue = None
    try:
        kind, _, path = address.partition(":")
        if kind in _JOB_QUEUES:
            queue = _start_queue(kind, path)
            client = Client(queue, set_as_default=False)
        else:
            scheduler = _scheduler_of(address)
            asyncio.run(_require_answer(scheduler))
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        compare_versions(address, client.get_versions())
        return client, queue
    # Dask takes the first words of another server for the length of a message.
    except (asyncio.TimeoutError, MemoryError):
        raise UserError(
            f"--cluster {address}: no Dask scheduler answers there; scripts/README.md says how to "
            "start one"
        ) from None
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--cluster {address}: cannot be reached ({reasons(error)[0]}); scripts/README.md says "
            "how to start a scheduler, and how to use certificates"
        ) from None


async def _require_answer(scheduler: str) -> None:
    """Raise what shows that no scheduler answers in time: Dask's client would wait without end."""
    import distributed
    from distributed.comm import connect

    arguments = distributed.Security().get_connection_args("client")
    # Its own limit does not hold where a server accepts the connection and says nothing.
    answer = connect(scheduler, timeout=CONNECT_SECONDS, **arguments)
    comm = await asyncio.wait_for(answer, CONNECT_SECONDS + 2)
    await comm.close()


def _scheduler_of(address: str) -> str:
    """Return the address of a scheduler, which may be in the scheduler.json that it wrote.

    Raises `UserError` for what Dask takes for no address: it would wait for 40 seconds and leave
    with a traceback.
    """
    found: object = address
    if address.endswith(".json"):
        if not os.path.exists(address):
            raise UserError(f"--cluster {address}: no such file; start a scheduler first")
        content = read_json(address)
        found = content.get("address") if isinstance(content, dict) else None
        if not isinstance(found, str) or not _ADDRESS.fullmatch(found):
            raise UserError(
                f"--cluster {address}: has no address of a scheduler; name the scheduler.json that "
                "`dask scheduler --scheduler-file` writes"
            )
    elif not _ADDRESS.fullmatch(address):
        raise UserError(
            f"--cluster {address}: is none of tcp://host:8786, tls://host:8786, scheduler.json and "
            "slurm:FILE.yaml"
        )
    return str(found)


def compare_versions(address: str, versions: Any) -> None:
    """Raise `UserError` for the first machine whose Python or Dask is another than here.

    `versions` are those that Dask collects.
    """
    own = versions["client"]["packages"]
    others = {f"the scheduler {address}": versions["scheduler"], **versions["workers"]}
    for name, found in others.items():
        for package in ("python", "distributed", "cloudpickle"):
            there = found["packages"].get(package)
            if there != own.get(package):
                raise UserError(
                    f"--cluster: {name} has {package} {there}, this machine {own.get(package)}; "
                    "install the same versions everywhere"
                )


def _start_queue(kind: str, path: str) -> dask_jobqueue.JobQueueCluster:
    """Submit workers to a job queue; the YAML file has `jobs`, and arguments of dask-jobqueue.

    Raises `UserError` for a mistake in the file and for a batch job that the queue refuses; those
    submitted before it are cancelled.
    """
    dask_jobqueue = _import_job_queues()
    where = f"--cluster {kind}:{path}"
    content = read_yaml(path)
    jobs = content.get("jobs") if isinstance(content, dict) else None
    if type(jobs) is not int or jobs < 1:  # True is an int, too
        raise UserError(
            f"{where}: needs a line `jobs: N`, the number of batch jobs, at least 1; the other "
            f"lines are arguments of dask_jobqueue.{_JOB_QUEUES[kind]}"
        )
    make = getattr(dask_jobqueue, _JOB_QUEUES[kind])
    command = make.job_cls.submit_command
    if shutil.which(command) is None:
        raise UserError(
            f"{where}: there is no command {command} here; start this where jobs are submitted"
        )
    arguments = {name: value for name, value in content.items() if name not in _SUBMIT_KEYS}
    try:
        options = {"dashboard": False, **(arguments.pop("scheduler_options", None) or {})}
        queue = make(**arguments, scheduler_options=options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {reasons(error)[0]}") from None
    # What queue.scale() does, but it would leave a refused job to a task that no one waits for.
    for _ in range(jobs):
        queue.worker_spec.update(queue.new_worker_spec())
    try:
        queue.sync(_submit, queue)
    except (OSError, RuntimeError, ValueError) as error:
        with suppress(AssertionError):  # Dask's, that a job which was never started is closed
            queue.close()
        raise UserError(f"{where}: {command} refused a job: {reasons(error)[-1]}") from None
    return queue


def _import_job_queues() -> ModuleType:
    """Import dask_jobqueue, but not its way with a Ctrl-C: the process would end with status 0."""
    before = signal.getsignal(signal.SIGINT)
    import dask_jobqueue

    if signal.getsignal(signal.SIGINT) is not before:
        signal.signal(signal.SIGINT, before)
    return dask_jobqueue


async def _submit(queue: dask_jobqueue.JobQueueCluster) -> None:
    await queue


@functools.cache
def environment() -> dict[str, str]:
    """Return what has to be the same on all machines: versions, and the SHA-256 of the project."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        found[name] = _version_of(name)
    builds = (_version_of(name) for name in ("mxnet", "mxnet-cu117", "mxnet-cu101"))
    found["mxnet"] = next(filter(None, builds), "")
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted([*root.glob("bort/**/*.py"), *root.glob("data/**/*.py")]):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    found["this project"] = digest.hexdigest()[:16]
    return found


def _version_of(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


# ---- a worker ------------------------------------------------------------------------------------

_jobs: Counter[str] = Counter()  # that run in this worker, by folder


def count_jobs(folder: str) -> int:
    """Return how many jobs for a folder this worker runs."""
    return _jobs[folder]


def run_job(job: Job) -> bytes:
    """Run a job in a process of its own (on a worker); returns its pickled result and exception."""
    from distributed import Reschedule, get_worker

    worker = get_worker()
    key = worker.get_current_task()
    try:
        _check_machine(job)
        with _counted(job.folder):
            threads = job.threads or max(1, usable_cores() // worker.state.nthreads)
            return _in_process(job, threads, partial(_is_wanted, worker, key))
    except ProcessDiedError as error:
        if error.status in (-signal.SIGTERM, 128 + signal.SIGTERM):
            raise Reschedule from None  # its machine was told to stop
        return pickle.dumps((None, error))
    except UnwantedError:  # or the worker is about to end: then another one runs the job
        raise Reschedule from None
    except Exception as error:
        return pickle.dumps((None, sendable(error)))


def _is_wanted(worker: distributed.Worker, key: Key) -> bool:
    """Return whether a worker is to finish a task that it runs."""
    task = worker.state.tasks.get(key)
    return (
        task is not None
        and task.state in ("executing", "long-running")
        and worker.status.name in ("running", "paused")
    )


@contextmanager
def _counted(folder: str) -> Iterator[None]:
    _jobs[folder] += 1
    try:
        yield
    finally:
        _jobs[folder] -= 1


def _in_process(job: Job, threads: int, wanted: Callable[[], bool]) -> bytes:
    variables = {"OMP_NUM_THREADS": str(threads), SLOT_VARIABLE: "0/1"}
    function = partial(_call, job.function, job.file, job.digest, job.arguments)
    process: JobProcess[bytes] = JobProcess(function, variables, job.directory)
    try:
        return process.result(job.caps, wanted)
    except UnwantedError:
        process.terminate()
        process.wait(job.patience)
        raise
    finally:
        process.end()


def _check_machine(job: Job) -> None:
    """Raise `UserError` where this machine has other versions, or does not share the disk."""
    host, own = socket.gethostname(), environment()
    for name, version in job.environment.items():
        if own.get(name) != version:
            raise UserError(
                f"--cluster: the worker on {host} has {name} {own.get(name) or 'not at all'}, the "
                f"driver {version}; install the same everywhere and restart the workers"
            )
    for path in (job.directory, os.path.join(job.folder, LOCK_FILE)):
        if not _appears(path):
            raise UserError(
                f"--cluster: the worker on {host} does not see {os.path.abspath(path)} of the "
                "driver; start the command in a folder that all machines share, and write to one"
            )


def _appears(path: str) -> bool:
    """Return whether a path is there, or appears within seconds: network file systems are late."""
    end = time.monotonic() + DISK_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > end:
            return False
        time.sleep(END_POLL)
    return True


# ---- the process of a job ------------------------------------------------------------------------


def _call(function: bytes, file: str, digest: str, arguments: bytes) -> bytes:
    """Run the job; returns its pickled result and exception, which the worker does not read."""
    content = function or _content(file, digest)
    args, kw = pickle.loads(arguments)
    value, error = outcome_of(lambda: pickle.loads(content)(*args, **kw))
    return pickle.dumps((value, error and sendable(error)))


def _content(file: str, digest: str) -> bytes:
    """Return the content of a file; raises `UserError` unless it is what the driver wrote."""
    if _appears(file):
        content = Path(file).read_bytes()
        if hashlib.sha256(content).hexdigest() == digest:
            return content
    raise UserError(f"{file}: is not what the driver wrote; rerun the same command")

"""Independent jobs: here one after another, in processes of their own, in workers, or on ranks.

The interface is that of `concurrent.futures.Executor`: `submit` returns a `Future`. `Executor` adds
results in the order of completion or of the input, with a bounded number of jobs under way.

    Serial      in this process
    Processes   each job in a new process with its own environment, caps on time and memory
    Cluster     the same on other machines, in bort/cluster.py
    WorkerPool  worker processes that serve many short jobs each
    Ranks       on the ranks of a communicator; the other ranks call `serve`

A process never outlives the one that started it. The system kills it with its parent (on Linux), a
thread looks for the parent every second, and a process whose parent died before either was set up
ends itself: it gets the parent's pid when it starts.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from concurrent import futures
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Generic,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    TypeVar,
)

from bort.errors import Stopped, UserError, lacks_memory
from bort.mxnet_setup import cpu_threads, usable_cores

if TYPE_CHECKING:  # it imports NumPy, which would take most of the time that a job takes to start
    from bort.communicator import Communicator

Item = TypeVar("Item")
Result = TypeVar("Result")

CAP_POLL = 0.1  # seconds between checks of the caps
PARENT_POLL = 1.0  # seconds between checks that the parent lives
EXIT_GRACE = 10.0  # seconds that a process has to exit after it has sent its result
SLOT_VARIABLE = "BORT_JOB_SLOT"  # "0/2": the first of two jobs that run at once
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_BOOT = "import sys; sys.path[:] = {path!r}; from bort.jobs import main; main()"


class Caps(NamedTuple):
    """Limits of a job; None: no limit."""

    seconds: Optional[float] = None  # including the start of its process
    megabytes: Optional[float] = None  # peak resident memory, libraries included


UNLIMITED = Caps()


class CapExceededError(Exception):
    """A job exceeded a cap after `seconds`; its process is gone."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class OverTimeError(CapExceededError):
    """A job exceeded its cap on seconds."""


class OverMemoryError(CapExceededError):
    """A job exceeded its cap on memory."""


class UnwantedError(Exception):
    """Nobody waits for the result of a job any more; its process is gone."""


class ProcessDiedError(UserError):
    """A job's process ended without a result."""

    def __init__(self, status: int) -> None:
        if status == -signal.SIGKILL:
            reason = "was killed, as the system does when memory runs out"
        else:
            reason = f"ended with status {status}" if status >= 0 else f"died of signal {-status}"
        super().__init__(f"a worker process {reason}")
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.status,)


# ---- the interface -------------------------------------------------------------------------------


def _raise(_: object, error: BaseException) -> Any:
    raise error


class Executor(futures.Executor):
    """Runs jobs, at most `workers` at once."""

    workers = 1
    # Seconds after which `workers` may have changed; None: it never does.
    workers_change: Optional[float] = None

    def flush(self) -> None:
        """Start the submitted jobs that wait for others to start with them."""

    def as_completed(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        ahead: int = 0,
        on_error: Callable[[Item, BaseException], Result] = _raise,
    ) -> Iterator[Result]:
        """Yield function(item) of every item as the jobs end.

        At most `workers + ahead` jobs are submitted and not yet finished; `items` is read no
        further than that. Where a job raised, `on_error` gives the result; by default it raises.
        """
        waiting: dict[Future[Result], Item] = {}
        rest = iter(items)
        while True:
            free = max(0, self.workers + ahead - len(waiting))
            for item in itertools.islice(rest, free):
                waiting[self.submit(function, item)] = item
            if not waiting:
                return
            if not any(future.done() for future in waiting):
                self.flush()
            done = futures.wait(waiting, self.workers_change, futures.FIRST_COMPLETED).done
            # Those that raised last: no result is lost with them.
            for future in sorted(done, key=lambda each: each.exception() is not None):
                item, error = waiting.pop(future), future.exception()
                yield future.result() if error is None else on_error(item, error)

    def in_order(
        self, function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 0
    ) -> Iterator[Result]:
        """Yield function(item) of every item in the order of the items.

        At most `workers + ahead` results are under way or wait for earlier ones.
        """
        waiting: deque[Future[Result]] = deque()
        rest = iter(items)
        while True:
            free = max(0, self.workers + ahead - len(waiting))
            waiting.extend(self.submit(function, item) for item in itertools.islice(rest, free))
            if not waiting:
                return
            future = waiting.popleft()
            if not future.done():
                self.flush()
            yield future.result()


class Serial(Executor):
    """Runs each job in this process when it is submitted."""

    def submit(
        self, function: Callable[..., Result], /, *args: object, **kw: object
    ) -> Future[Result]:
        """Run the job; returns a future that is done."""
        future: Future[Result] = Future()
        value, error = outcome_of(partial(function, *args, **kw))
        _settle(future, value, error)
        return future


def outcome_of(function: Callable[[], Any]) -> tuple[Any, Optional[Exception]]:
    """Call a function; returns its result, or the exception that it raised."""
    try:
        return function(), None
    except Stopped:  # this process was told to stop, not the job
        raise
    except Exception as error:
        return None, error


def _settle(future: Future[Any], value: Any, error: Optional[BaseException]) -> None:
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


class Failures:
    """Errors of jobs, kept until the others have ended: `keep` is an `on_error`."""

    def __init__(self) -> None:
        self._kept: list[BaseException] = []

    def keep(self, item: Any, error: BaseException) -> None:
        """Keep the error of an item, which is named where the user can correct it."""
        self._kept.append(UserError(f"{item}: {error}") if isinstance(error, UserError) else error)

    def raise_first(self, what: str, count: int) -> None:
        """Raise the first of the errors, if there are any, of `count` items; `what` is in words."""
        if not self._kept:
            return
        first = self._kept[0]
        if not isinstance(first, UserError):
            raise first
        raise UserError(
            f"{len(self._kept)} of {count} {what}; {first}; rerun the same command for the rest"
        )


# ---- a process for each job ----------------------------------------------------------------------


class Processes(Executor):
    """Runs each job in a new process, at most `workers` at once.

    Functions, arguments and results are pickled. The process inherits the environment of this one
    but for OMP_NUM_THREADS, which is `threads` (default: an equal share of the cores), and
    `SLOT_VARIABLE`. Leaving the context ends the jobs that still run: by SIGTERM, and after
    `patience` seconds by SIGKILL. Ctrl-C in the terminal reaches this process only.

    A future raises `OverTimeError` or `OverMemoryError` when a cap was exceeded,
    `ProcessDiedError` when the process ended without a result, and what the function raised.
    """

    def __init__(
        self,
        workers: int,
        threads: Optional[int] = None,
        caps: Caps = UNLIMITED,
        patience: float = 0.0,
    ) -> None:
        self.workers, self.caps, self.patience = workers, caps, patience
        self.threads = threads or thread_share(workers)
        # One thread watches each process. The death signal of a process is sent when the thread
        # that started it ends, so these live as long as the executor.
        self._watchers = futures.ThreadPoolExecutor(workers)
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(workers):
            self._slots.put(slot)
        self._lock = threading.Lock()
        self._running: set[JobProcess[Any]] = set()
        self._closed = False

    def submit(
        self, function: Callable[..., Result], /, *args: object, **kw: object
    ) -> Future[Result]:
        """Queue the job; returns its future."""
        return self._watchers.submit(self._run, partial(function, *args, **kw))

    def _run(self, function: Callable[[], Any]) -> Any:
        slot = self._slots.get()
        try:
            environment = {
                "OMP_NUM_THREADS": str(self.threads),
                SLOT_VARIABLE: f"{slot}/{self.workers}",
            }
            with self._lock:
                if self._closed:
                    raise ProcessDiedError(-signal.SIGTERM)
                process: JobProcess[Any] = JobProcess(function, environment)
                self._running.add(process)
            try:
                return process.result(self.caps)
            finally:
                with self._lock:
                    self._running.discard(process)
                process.end()
        finally:
            self._slots.put(slot)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """End the jobs that run and drop those that wait."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            process.terminate() if self.patience else process.end()
        end = time.monotonic() + self.patience
        for process in running:
            process.wait(end - time.monotonic())
            process.end()
        self._watchers.shutdown(wait, cancel_futures=cancel_futures)


def run(
    function: Callable[[], Result], threads: Optional[int] = None, caps: Caps = UNLIMITED
) -> Result:
    """Call a picklable function in a process of its own; see `Processes` for what it raises."""
    with Processes(1, threads, caps) as executor:
        return executor.submit(function).result()


class JobProcess(Generic[Result]):
    """A process that runs one function: the function goes to its stdin, the result to a pipe.

    It is started in `folder` (default: the current one); `environment` adds to that of this one.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        environment: Mapping[str, str],
        folder: Optional[str] = None,
    ) -> None:
        job = pickle.dumps(function)
        self._start = time.monotonic()
        receiver, sender = os.pipe()
        path = [entry or os.getcwd() for entry in sys.path]
        # Ctrl-C while it starts waits until it ignores that.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", _BOOT.format(path=path), str(os.getpid()), str(sender)],
                stdin=subprocess.PIPE,
                pass_fds=[sender],
                env={**os.environ, **environment},
                cwd=folder,
            )
        except BaseException:
            os.close(receiver)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(sender)
        self._receiver = Connection(receiver, writable=False)
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError), self._popen.stdin as stdin:  # it has died: `result` raises
            pickle.dump(_main_module(job), stdin)
            stdin.write(job)

    def result(self, caps: Caps, wanted: Optional[Callable[[], bool]] = None) -> Result:
        """Wait for the result; raises what the function raised, and as `Processes` says.

        `wanted` is asked now and then whether the result is; else `UnwantedError` is raised.
        """
        self._wait_for_result(caps, wanted)
        try:
            value, error, peak = self._receiver.recv()
        except (EOFError, OSError):
            raise ProcessDiedError(self._popen.wait()) from None
        if caps.megabytes is not None and peak > caps.megabytes:
            raise OverMemoryError(time.monotonic() - self._start)
        self.wait(EXIT_GRACE)
        if error is not None:
            raise error
        return value

    def _wait_for_result(self, caps: Caps, wanted: Optional[Callable[[], bool]]) -> None:
        watched = caps != UNLIMITED or wanted is not None
        while not self._receiver.poll(CAP_POLL if watched else None):
            if wanted is not None and not wanted():
                raise UnwantedError
            seconds = time.monotonic() - self._start
            if caps.seconds is not None and seconds > caps.seconds:
                raise OverTimeError(seconds)
            if caps.megabytes is not None and peak_megabytes(self._popen.pid) > caps.megabytes:
                raise OverMemoryError(seconds)

    def wait(self, seconds: float) -> None:
        """Wait until the process has ended, `seconds` at most."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(None if seconds == float("inf") else max(0.0, seconds))

    def terminate(self) -> None:
        """Ask the process to end (SIGTERM)."""
        self._popen.terminate()

    def end(self) -> None:
        """End the process, unless it has ended."""
        self._popen.kill()
        self._popen.wait()


def become_program(words: Sequence[str], log: str) -> NoReturn:
    """Replace this process by a Python program (a job of `Processes`); its output goes to `log`.

    The future raises `ProcessDiedError` with the exit status, which is 0 when all went well.
    """
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.execv(sys.executable, [sys.executable, *words])


def _main_module(job: bytes) -> dict[str, Any]:
    """Return how the child finds functions of the program itself, where the job has any."""
    from multiprocessing import spawn

    if b"__main__" not in job:
        return {}
    prepared = spawn.get_preparation_data("job")
    return {name: value for name, value in prepared.items() if name.startswith("init_main_from")}


def main() -> None:
    """Run the job that comes in on stdin (in the child process)."""
    parent, sender = (int(word) for word in sys.argv[1:])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    from multiprocessing import spawn

    spawn.prepare(pickle.load(sys.stdin.buffer))
    function = pickle.load(sys.stdin.buffer)
    try:
        value, error = function(), None
    except Stopped as stop:
        sys.exit(128 + stop.signum)
    except Exception as raised:
        value, error = None, sendable(raised)
    # With the peak, which the parent, checking now and then, may have missed.
    message = (value, error, peak_megabytes(os.getpid()))
    sys.stdout.flush()
    with Connection(sender, readable=False) as connection:
        connection.send(message)


def sendable(error: Exception) -> Exception:
    """Return the exception, or a RuntimeError of its text where it cannot be pickled.

    Unless a user or the system caused it, it is a bug: its traceback goes to stderr.
    """
    if not (isinstance(error, (UserError, OSError)) or lacks_memory(error)):
        traceback.print_exception(type(error), error, error.__traceback__)
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


# ---- workers that serve many jobs ----------------------------------------------------------------


class WorkerPool(Executor):
    """Worker processes for many short jobs of one function, which each worker gets once.

    Forked workers start at once and share the function's tables, in the processor's cache too. A
    fork survives no threads of this process, and MXNet has some: where it is loaded, workers are
    spawned. A future raises `ProcessDiedError` when a worker was killed.
    """

    def __init__(self, workers: int, function: Callable[[Any], Any]) -> None:
        self.workers, self._function = workers, function
        context = multiprocessing.get_context("spawn" if "mxnet" in sys.modules else "fork")
        start = (function, os.getpid())
        self._pool = futures.ProcessPoolExecutor(workers, context, _start_worker, start)
        for _ in range(workers):  # start them all, before this process has threads
            self._pool.submit(os.getpid)

    def submit(
        self, function: Callable[..., Result], /, *args: object, **kw: object
    ) -> Future[Result]:
        """Queue a job of the function that the pool was made for."""
        if function is not self._function:
            raise ValueError("a worker pool serves the function that it was made for")
        return self._pool.submit(_call_worker_function, *args, **kw)

    def in_order(
        self, function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 0
    ) -> Iterator[Result]:
        """Yield function(item) of every item in the order of the items; see `Executor`."""
        try:
            yield from super().in_order(function, items, ahead)
        except BrokenProcessPool:
            raise ProcessDiedError(-signal.SIGKILL) from None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Wait for the jobs that run, drop those that wait, end the workers."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


_worker_function: Callable[..., Any]


def _start_worker(function: Callable[..., Any], parent: int) -> None:
    global _worker_function  # noqa: PLW0603  (what a worker keeps between jobs)
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_function = function


def _call_worker_function(*args: object, **kw: object) -> Any:
    return _worker_function(*args, **kw)


# ---- ranks ---------------------------------------------------------------------------------------


class Ranks(Executor):
    """Runs jobs on the ranks of a communicator, which share a disk; for rank 0.

    As many jobs as ranks form a wave; the next wave starts when all of it have ended. The other
    ranks call `serve`, which returns when this executor is shut down. With `isolated`, each rank
    runs its jobs by `run`, in a process with these threads and caps.
    """

    def __init__(
        self, communicator: Communicator, isolated: Optional[tuple[int, Caps]] = None
    ) -> None:
        self.workers, self._communicator = communicator.size, communicator
        self._isolated = isolated
        self._waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._in_wave = False

    def submit(
        self, function: Callable[..., Result], /, *args: object, **kw: object
    ) -> Future[Result]:
        """Queue the job; the last of a wave runs the wave before this returns."""
        future: Future[Result] = Future()
        job = partial(function, *args, **kw)
        self._waiting.append(
            (future, partial(run, job, *self._isolated) if self._isolated else job)
        )
        if len(self._waiting) == self.workers:
            self.flush()
        return future

    def flush(self) -> None:
        """Run the jobs that wait."""
        if self._waiting:
            submitted, self._waiting = self._waiting, []
            self._in_wave = True
            outcomes = _wave(self._communicator, [job for _, job in submitted])
            self._in_wave = False
            for (future, _), outcome in zip(submitted, outcomes):
                _settle(future, *outcome)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Let the other ranks return from `serve`.

        After an interrupted wave they are not told: they wait for its end, and lose this rank.
        """
        if not self._in_wave:
            self._communicator.broadcast_object(None)
            self._communicator.barrier()  # a broadcast may be under way when its sender has ended


def _wave(communicator: Communicator, jobs: Optional[Sequence[Any]]) -> Sequence[Any]:
    """Run a job on each rank; `jobs` are rank 0's. Returns the outcome of each, none at the end."""
    jobs = communicator.broadcast_object(jobs)
    if jobs is None:
        return []
    own = communicator.rank < len(jobs)
    value, error = outcome_of(jobs[communicator.rank]) if own else (None, None)
    outcome = value, error and sendable(error)
    return communicator.allgather_object(outcome)[: len(jobs)]


def serve(communicator: Communicator) -> None:
    """Run jobs for the `Ranks` of rank 0 until it is shut down."""
    while _wave(communicator, None):
        pass
    communicator.barrier()


# ---- what a job's process knows ------------------------------------------------------------------


def thread_share(workers: int) -> int:
    """Return the OpenMP threads of one of `workers` processes that share the cores.

    OMP_NUM_THREADS is an upper bound.
    """
    return min(cpu_threads(), max(1, usable_cores() // workers))


def slot() -> tuple[int, int]:
    """Return which of how many jobs that run at once on this machine this process is: (0, 1) alone.

    A rank that `horovodrun` started is one of the ranks on its host.
    """
    if SLOT_VARIABLE in os.environ:
        number, _, count = os.environ[SLOT_VARIABLE].partition("/")
        return int(number), int(count)
    local = os.environ.get("HOROVOD_LOCAL_RANK", "0"), os.environ.get("HOROVOD_LOCAL_SIZE", "1")
    return int(local[0]), int(local[1])


def share_of_gpus(gpus: Optional[str], number: int, count: int) -> Optional[str]:
    """Return the GPUs of job `number` of `count`: of "0,1,2" as many for each, one at least.

    An update takes a micro-batch for each: jobs with unequal shares would train differently. GPUs
    that are left over are not used.
    """
    if not gpus:
        return gpus
    devices = gpus.split(",")
    each = max(1, len(devices) // count)
    return ",".join(devices[number::count][:each]) or devices[number % len(devices)]


def gpus_of_each(gpus: Optional[str], count: int) -> int:
    """Return how many of the GPUs each of `count` jobs has; 1 without any, as for the CPU."""
    return len((share_of_gpus(gpus, 0, count) or "cpu").split(","))


def peak_megabytes(pid: Optional[int]) -> float:
    """Return the most memory a process has had resident at once; 0 when it has ended."""
    with suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8") as handle:
        found = re.search(r"VmHWM:\s*(\d+) kB", handle.read())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def die_with_parent(parent: int) -> None:
    """End this process when process `parent`, which started it, ends, however it ends."""
    with suppress(OSError, AttributeError):  # another system has no prctl
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the signal was set
        os._exit(1)
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL)
    os._exit(1)


@contextmanager
def stopped_by_sigterm(
    message: str = "interrupted; rerun the same command to resume",
) -> Iterator[None]:
    """Let SIGTERM raise `Stopped` in the main thread; its message is this one."""

    def stop(signum: int, _: object) -> None:
        raise Stopped(signum, message)

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main_thread else None
    try:
        yield
    except Stopped as stopped:  # also of a training loop, whose message is about its own run
        raise Stopped(stopped.signum, message) from None
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)

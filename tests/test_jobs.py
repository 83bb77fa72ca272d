"""Jobs: order, look-ahead, environments, caps, errors, and that no process outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from bort import jobs
from bort.errors import Stopped, UserError
from bort.jobs import (
    Caps,
    OverMemoryError,
    OverTimeError,
    ProcessDiedError,
    Processes,
    Ranks,
    Serial,
    WorkerPool,
    gpus_of_each,
    peak_megabytes,
    run,
    share_of_gpus,
)
from tests.job_functions import (
    bug,
    end,
    environment,
    environment_late,
    kill_itself,
    killed_at_50,
    late,
    save_at_sigterm,
    square_late,
    take_memory,
    unpicklable_error,
    user_mistake,
    write_pid_and_sleep,
)
from tests.ranks import ThreadRanks

ROOT = Path(__file__).resolve().parents[1]


def gone(pid, seconds=5.0):
    """Wait until a process has ended; a zombie has."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as handle:
                if handle.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def wait_for(path, seconds=30.0):
    until = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < until, f"{path} was not written"
        time.sleep(0.02)
    return Path(path).read_text()


# ---- the interface -------------------------------------------------------------------------------


@pytest.fixture(params=["serial", "processes", "pool", "ranks"])
def executor(request):
    function = {"pool": partial(square_late)}.get(request.param, square_late)
    if request.param == "ranks":
        with ThreadRanks(2) as ranks, Ranks(ranks.rank(0)) as made:
            yield made, function
        return
    make = {
        "serial": Serial,
        "processes": lambda: Processes(2),
        "pool": lambda: WorkerPool(2, function),
    }
    with make[request.param]() as made:
        yield made, function


def test_every_executor_gives_all_results(executor):
    made, function = executor
    assert list(made.in_order(function, range(3))) == [0, 1, 4]
    assert sorted(made.as_completed(function, range(3))) == [0, 1, 4]
    assert list(made.in_order(function, [])) == list(made.as_completed(function, [])) == []


def test_results_come_in_order_of_completion_and_of_input():
    with Processes(2) as executor:
        function = partial(late, {0: 5.0})
        assert next(executor.as_completed(function, range(2))) == 1
    with Processes(2) as executor:
        assert list(executor.in_order(partial(late, {0: 0.5}), range(2))) == [0, 1]


@pytest.mark.parametrize("method", ["in_order", "as_completed"])
def test_the_input_is_read_a_bounded_number_of_jobs_ahead(method):
    read = []

    def items():
        for number in range(10):
            read.append(number)
            yield number

    results = getattr(Serial(), method)(square_late, items(), 2)
    next(results)
    assert len(read) == 3
    assert len(list(results)) == 9
    assert len(read) == 10


@pytest.mark.parametrize("method", ["in_order", "as_completed"])
def test_workers_may_become_fewer(method):
    class Shrinking(Serial):
        workers = 3

        def submit(self, function, number):
            self.workers = 1
            return super().submit(function, number)

    assert sorted(getattr(Shrinking(), method)(square_late, range(5))) == [0, 1, 4, 9, 16]


def test_results_are_not_lost_with_an_exception():
    def either(number):
        if number == 0:
            raise KeyError(number)
        return number

    results = Serial().as_completed(either, range(2), ahead=1)
    assert next(results) == 1
    with pytest.raises(KeyError):
        next(results)


# ---- processes -----------------------------------------------------------------------------------


def test_a_job_has_a_process_with_its_own_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with Processes(2, threads=3) as executor:
        found = list(executor.in_order(environment_late, range(3)))
    assert len({pid for pid, _, _ in found} | {os.getpid()}) == 4
    assert {threads for _, threads, _ in found} == {"3"}
    assert {slot for _, _, slot in found} == {(0, 2), (1, 2)}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.setattr(jobs, "usable_cores", lambda: 12)
    assert run(environment)[1] == "7"
    monkeypatch.setattr(jobs, "cpu_threads", lambda: 12)
    with Processes(4) as executor:
        assert executor.threads == 3


def test_errors_reach_the_caller(capfd):
    with pytest.raises(UserError, match="file: wrong; fix it"):
        run(user_mistake)
    assert capfd.readouterr().err == ""
    with pytest.raises(FileNotFoundError, match="missing") as missing:
        run(partial(os.listdir, "/missing"))
    assert (missing.value.filename, capfd.readouterr().err) == ("/missing", "")
    with pytest.raises(KeyError, match="not the user's"):
        run(bug)
    assert "in bug" in capfd.readouterr().err  # its traceback
    with pytest.raises(RuntimeError, match="TwoArgumentsError: 1 and 2"):
        run(unpicklable_error)
    with pytest.raises(ProcessDiedError, match="was killed, as the system does when memory"):
        run(kill_itself)
    with pytest.raises(ProcessDiedError, match="ended with status 3") as died:
        run(partial(end, 3))
    assert died.value.status == 3


def test_ctrl_c_never_reaches_a_job_not_even_while_it_starts(capfd):
    with Processes(1) as executor:
        future = executor.submit(time.sleep, 0.2)
        while not executor._running:
            time.sleep(0.001)
        (process,) = executor._running
        while not future.done():
            process._popen.send_signal(signal.SIGINT)
            time.sleep(0.005)
        assert future.result() is None
    assert capfd.readouterr().err == ""


def test_a_job_over_time_is_ended(monkeypatch):
    started, popen = [], subprocess.Popen

    def recorded(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(jobs.subprocess, "Popen", recorded)
    start = time.monotonic()
    with pytest.raises(OverTimeError) as over:
        run(partial(time.sleep, 60), 1, Caps(seconds=0.5))
    assert 0.5 < over.value.seconds < time.monotonic() - start < 50
    assert gone(started[0].pid)


def test_a_job_over_memory_is_ended():
    start = time.monotonic()
    with pytest.raises(OverMemoryError):
        run(partial(take_memory, 300, 60), 1, Caps(megabytes=200))
    assert time.monotonic() - start < 50
    assert run(partial(take_memory, 1, 0), 1, Caps(60, 200)) == 1


def test_a_short_peak_between_two_checks_counts(monkeypatch):
    monkeypatch.setattr(jobs, "CAP_POLL", 60)
    with pytest.raises(OverMemoryError):
        run(partial(take_memory, 300, 0), 1, Caps(megabytes=200))


def test_peaks_are_read():
    assert 10 < peak_megabytes(os.getpid()) < 1e5
    assert peak_megabytes(2**22 + 1) == 0  # no process has this number


def test_leaving_the_context_ends_the_jobs(tmp_path):
    path = tmp_path / "pid"
    with Processes(1) as executor:
        running = executor.submit(write_pid_and_sleep, path)
        waiting = executor.submit(square_late, 1)
        pid = wait_for(path)
    assert gone(pid, 1.0)
    assert waiting.cancelled() or isinstance(waiting.exception(), ProcessDiedError)
    assert isinstance(running.exception(), ProcessDiedError)


def test_patience_lets_jobs_save(tmp_path):
    with Processes(1, patience=float("inf")) as executor:
        executor.submit(save_at_sigterm, tmp_path / "saved", tmp_path / "started")
        wait_for(tmp_path / "started")
    assert (tmp_path / "saved").read_text() == "saved"
    with Processes(1, patience=0.1) as executor:
        executor.submit(save_at_sigterm, tmp_path / "late", tmp_path / "again")
        pid = wait_for(tmp_path / "again")
    assert gone(pid, 1.0)
    assert not (tmp_path / "late").exists()


def test_a_job_that_becomes_a_program(tmp_path):
    program, log = tmp_path / "program.py", tmp_path / "run.log"
    program.write_text("import sys; print(sys.argv[1:], flush=True); sys.exit('error: no')")
    with pytest.raises(ProcessDiedError) as died:
        run(partial(jobs.become_program, [str(program), "--lr", "1"], str(log)))
    assert died.value.status == 1
    assert log.read_text() == "['--lr', '1']\nerror: no\n"


MAIN = """
import sys
from bort.jobs import Processes, Serial, WorkerPool, run
from tests.job_functions import write_pid_and_sleep
def double(number):
    return 2 * number
if __name__ == "__main__":
    print(list(Processes(1).in_order(double, [1, 2])))
"""


def test_functions_of_the_program_itself_are_found(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(MAIN)
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[2, 4]\n"


# ---- nothing outlives its parent -----------------------------------------------------------------


PARENTS = {
    "process": "run(partial(write_pid_and_sleep, path))",
    "worker": "list(WorkerPool(1, write_pid_and_sleep).in_order(write_pid_and_sleep, [path]))",
    "program": "run(partial(become_program, [program, path], path + '.log'))",
}
PROGRAM = "import sys; from tests.job_functions import *; write_pid_and_sleep(sys.argv[1])"


@pytest.mark.parametrize("kind", PARENTS)
def test_processes_end_with_a_killed_parent(tmp_path, kind):
    path, program = tmp_path / "pid", tmp_path / "program.py"
    program.write_text(PROGRAM)
    code = (
        "from functools import partial; from bort.jobs import *\n"
        "from bort.jobs import become_program\n"
        "from tests.job_functions import write_pid_and_sleep\n"
        f"path, program = {str(path)!r}, {str(program)!r}\n{PARENTS[kind]}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) as parent:
        pid = wait_for(path)
        parent.kill()
    assert gone(pid)


def test_a_process_whose_parent_died_before_it_looked_ends_itself():
    code = "from bort import jobs; jobs.die_with_parent({parent}); print('alive')"
    run_with = partial(subprocess.run, capture_output=True, text=True, cwd=ROOT, check=False)
    own = run_with([sys.executable, "-c", code.format(parent=os.getpid())])
    assert own.stdout == "alive\n"
    other = run_with([sys.executable, "-c", code.format(parent=os.getpid() + 1)])
    assert (other.returncode, other.stdout) == (1, "")


def test_the_parent_is_watched_where_the_system_sends_no_signal():
    code = (
        "import os, subprocess, sys, time; from bort import jobs\n"
        "jobs._PR_SET_PDEATHSIG, jobs.PARENT_POLL = 0, 0.05\n"
        "if os.fork() == 0:\n"
        "    jobs.die_with_parent(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pid = parent.stdout.readline().strip()
        parent.kill()
    assert gone(pid)


# ---- workers, ranks ------------------------------------------------------------------------------


def test_a_killed_worker_is_reported():
    with WorkerPool(2, killed_at_50) as pool:
        results = pool.in_order(killed_at_50, range(100), ahead=4)
        assert next(results) == 0
        with pytest.raises(ProcessDiedError, match="was killed"):
            list(results)


def test_ranks_run_jobs_in_waves():
    ran = []

    def job(number):
        ran.append(threading.current_thread().name)
        if number == 3:
            raise UserError("three: wrong")
        return number * number

    with ThreadRanks(3) as ranks, Ranks(ranks.rank(0)) as executor:
        assert list(executor.in_order(job, range(3))) == [0, 1, 4]
        assert len(set(ran)) == 3
        with pytest.raises(UserError, match="three: wrong"):
            list(executor.as_completed(job, range(5)))
        assert executor.submit(job, 5).done() is False
        executor.flush()
    assert ranks.finished()


def test_lack_of_memory_is_no_bug_of_a_job(capfd):
    """What MXNet raises for it is sent without a traceback, which an error of ours has."""
    error = type("MXNetError", (RuntimeError,), {})
    assert str(jobs.sendable(error("std::bad_alloc"))) == "MXNetError: std::bad_alloc"
    assert capfd.readouterr().err == ""
    jobs.sendable(error("Check failed: shape is not known"))
    assert "shape is not known" in capfd.readouterr().err


# ---- shares, signals -----------------------------------------------------------------------------


def test_gpus_are_divided():
    assert [share_of_gpus("0,1", slot, 2) for slot in (0, 1)] == ["0", "1"]
    assert [share_of_gpus("4,5,6,7", slot, 2) for slot in (0, 1)] == ["4,6", "5,7"]
    # Equally: with two GPUs an update would take twice as many examples as with one.
    assert [share_of_gpus("4,5,6", slot, 2) for slot in (0, 1)] == ["4", "5"]
    assert [share_of_gpus("1,2", slot, 3) for slot in (0, 1, 2)] == ["1", "2", "1"]
    assert (share_of_gpus("0,1", 0, 1), share_of_gpus(None, 1, 2)) == ("0,1", None)
    numbers = [gpus_of_each(*given) for given in (("0,1,2", 1), ("0,1,2", 2), ("0", 2), (None, 2))]
    assert numbers == [3, 1, 1, 1]


def test_a_rank_has_the_slot_that_horovod_gave_it(monkeypatch):
    assert jobs.slot() == (0, 1)
    monkeypatch.setenv("HOROVOD_LOCAL_RANK", "1")
    monkeypatch.setenv("HOROVOD_LOCAL_SIZE", "4")
    assert jobs.slot() == (1, 4)


def test_sigterm_stops_the_program():
    stopped = pytest.raises(Stopped, match="rerun")
    with stopped as stop, jobs.stopped_by_sigterm("rerun it"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(Stopped, match="rerun it"), jobs.stopped_by_sigterm("rerun it"):
        raise Stopped(signal.SIGTERM, "the message of a run inside")

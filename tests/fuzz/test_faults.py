"""Programs that handle faults pass; those that are made not to are reported."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.fuzz import faults
from tests.fuzz.programs import PROGRAMS, Program

# All of it is in the try: a Ctrl-C comes at any moment, also during the imports and at the end.
SCRIPT = """\
try:
    import os, sys, time
    out = sys.argv[1]
    with open(out + ".tmp", "w") as file:
        file.write("result")
    time.sleep(0.05)
    os.replace(out + ".tmp", out)
    {more}
    print("done", flush=True)
    os._exit(0)
except KeyboardInterrupt:
    import os, sys
    if os.path.exists(sys.argv[1] + ".tmp"):
        os.remove(sys.argv[1] + ".tmp")
    os._exit(130)
except OSError as error:
    if os.path.exists(out + ".tmp"):
        os.remove(out + ".tmp")
    sys.stdout = None
    sys.exit(f"error: {{out}}: {{error.strerror}}")
"""
STREAMS = ["no stdin", "| head", ">/dev/full", "no stderr"]

pytestmark = pytest.mark.integration


def run(tmp_path: Path, names: list[str], more: str = "pass") -> list[str]:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT.format(more=more))
    program = Program(str(script), "{w}/out.txt", [])
    found = faults.run([program], names, 2, 3, 2, tmp_path / "work")
    return [one.problem for one in found if not one.problem.startswith(faults.SKIPPED)]


@pytest.fixture(autouse=True)
def work(tmp_path):
    (tmp_path / "work").mkdir()


def test_a_program_that_handles_faults_has_no_problems(tmp_path):
    names = ["kill", "Ctrl-C", "two at once", *STREAMS, "odd path", "disk full", "read-only"]
    assert set(run(tmp_path, names)) == {""}


PROBLEMS = [
    ("no stdin", "if sys.stdin is None: raise ValueError", "traceback"),
    ("no stdin", "if sys.stdin is None: sys.exit(1)", "status 1 with 0 lines"),
    ("no stdin", "if sys.stdin is None: os.abort()", "status -6"),
    ("no stderr", "if sys.stderr is None: open(out, 'w').write('x')", "out.txt differs"),
    ("no stderr", "if sys.stderr is None: os.remove(out)", "out.txt is missing"),
    ("no stdin", "if sys.stdin is None: open(out + '.part', 'w')", "left behind: out.txt.part"),
    ("threads 2,1", "sys.exit('error: x')", "status 1"),
]


@pytest.mark.parametrize(("name", "more", "problem"), PROBLEMS)
def test_problems_are_reported(tmp_path, monkeypatch, name, more, problem):
    if name == "threads 2,1":  # which the reference run does not have
        more = f"if ',' in os.environ['OMP_NUM_THREADS']: {more}"
    (found,) = run(tmp_path, [name], more)
    assert problem in found


def test_processes_that_live_on_are_ended_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "GONE", 0.5)
    more = "if sys.stdin is None: import subprocess; subprocess.Popen(['sleep', '60'])"
    (found,) = run(tmp_path, ["no stdin"], more)
    assert found == "1 of its processes live on"


def test_what_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "LIMIT", 0.5)
    (found,) = run(tmp_path, ["no stdin"], "if sys.stdin is None: time.sleep(60)")
    assert found == "no end after 0.5 s"


TRACE = 'Traceback (most recent call last):\n  File "{}", line 1\nKeyboardInterrupt\n'
ENDS = [
    (130, "interrupted\n", ""),
    (-2, "interrupted\n", ""),
    (0, "warning: x\n[07:20:39] MXNet start\n", ""),
    (1, "error: x\n", ""),
    (-2, TRACE.format("program.py"), "traceback"),
    (130, TRACE.format("program.py"), "traceback"),
    (-2, TRACE.format("<frozen site>"), ""),
    (-2, TRACE.replace("line 1", "line 0, in <module>").format("program.py"), ""),
    (-2, TRACE.replace("line 1", "line 30, in <module>").format("program.py"), "traceback"),
    (1, "", "0 lines"),
    (1, "error: x\nand more\n", "2 lines"),
    (-11, "", "status -11"),
    (0, "Exception ignored in: x\n", "traceback"),
]


@pytest.mark.parametrize(("status", "error", "problem"), ENDS)
def test_ends_of_commands_are_classified(tmp_path, status, error, problem):
    case = faults.Case(PROGRAMS[0], tmp_path, tmp_path / "case", None, "")
    try:
        case.require_clean(faults.End(status, error), 130, -signal.SIGINT)
        said = ""
    except faults.FaultError as found:
        said = str(found)
    assert problem in said
    assert bool(problem) == bool(said)


def test_waiting_does_not_count_the_time_in_which_this_process_is_stopped(monkeypatch):
    moments = iter([0.0, 100.0, 200.0, 200.1, 200.2])
    monkeypatch.setattr(faults.time, "monotonic", lambda: next(moments))
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)
    done = iter([False, False, False, True])
    assert faults.waited(lambda: next(done), 1.5)


def test_a_table_counts_passed_cases_without_those_that_were_skipped():
    outcomes = [
        faults.Outcome("a.py", "kill", 0, ""),
        faults.Outcome("a.py", "kill", 1, "traceback"),
        faults.Outcome("b.py", "kill", 0, ""),
        faults.Outcome("b.py", "disk full", 0, f"{faults.SKIPPED}no mounts"),
    ]
    table = [line.split() for line in faults.table(outcomes).splitlines()]
    assert table[1:] == [
        ["a.py", "1/2", "-", "1/2"],
        ["b.py", "1/1", "-", "1/1"],
        ["all", "2/3", "-", "2/3"],
    ]
    assert faults.problems(outcomes) == outcomes[1:2]


def test_every_program_of_the_project_is_among_them():
    known = {program.name.split()[0] for program in PROGRAMS}
    there = {path.name for place in (faults.ROOT, faults.ROOT / "scripts")
             for path in place.glob("*.py")}  # fmt: skip
    # Set-up, tests of the tests, benchmarks, and what needs the network or many runs.
    others = {
        *("setup_env.py", "fuzz.py", "kill_test.py", "benchmark.py", "agora_toys.py"),
        *("compare_agora.py", "describe_released.py", "demo_page.py"),
    }
    assert there - known == others


@pytest.mark.slow
def test_a_session_is_seen_until_it_has_ended():
    pid = os.fork()
    if pid == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)
    assert faults.waited(lambda: faults.in_session(pid) == [pid], 10)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert faults.in_session(pid) == []

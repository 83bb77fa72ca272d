"""What becomes of every program under faults of the system around it.

Each case runs one command in a copy of its inputs, in a session and, where a fault mounts
something, a mount namespace of its own. A case passes when the program does its work, or ends
with one line that is no traceback and leaves nothing half-written, and when the same command
afterwards gives the results of the reference run.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

from tests.conftest import ROOT
from tests.fuzz.harness import columns, result_of, start_child
from tests.fuzz.programs import PROGRAMS, Program, copy_inputs, make_inputs
from tests.fuzz.server import MODES, serving

LIMIT = 300.0  # seconds of one command
GONE = 10.0  # seconds in which the processes of a killed program end
SKIPPED = "skipped: "
# Of MXNet's own log, and of Python at the end of a process whose standard output is closed.
_NOISE = re.compile(r"\[\d\d:\d\d:\d\d\] |warning: |\s*$")
# A signal that came before the program's first statement: no program can do anything about that.
_STARTING = re.compile(
    r"<frozen site>|/site\.py|init_import_site|init_sys_streams"
    r"|line [01], in <module>\n( {4}.*\n)?KeyboardInterrupt"
    r"|ignored in: <function _get_module_lock"  # Python's import loses the signal
)
ODD_NAMES = (
    b"with blanks", b"new\nline", b"not utf-8 \xff\xfe", "caf\u00e9 \u6f22\u5b57".encode(), b"-q",
    b"%s {w} $HOME 'a' \"b\" *", b"/".join([b"long" * 50] * 5),
)  # fmt: skip


class ReferenceRun(NamedTuple):
    """What a program leaves without a fault: SHA-256 by path, of what is the same every time."""

    files: Dict[str, str]
    bytes: int
    seconds: float


class End(NamedTuple):
    """How a command ended; without a status it had to be ended."""

    status: Optional[int]
    error: str


class FaultError(Exception):
    """A program failed a check."""


class Case:
    """One program in a folder with its inputs, and the checks of what it does there."""

    def __init__(
        self,
        program: Program,
        inputs: Path,
        place: Path,
        reference: Optional[ReferenceRun],
        seed: str,
    ) -> None:
        self.program, self.inputs, self.place, self.reference = program, inputs, place, reference
        self.generator = random.Random(f"{seed} {program.name}")
        self.folder, self.server = place / "work", ""
        place.mkdir(parents=True)

    def prepare(self, folder: Optional[Path] = None) -> None:
        """Copy the inputs, into the usual folder or another one."""
        self.folder = folder or self.folder
        copy_inputs(self.program, self.inputs, self.folder)

    def start(self, redirect: str = "", stdout: Any = None, **variables: str) -> subprocess.Popen:
        """Start the command in a new session, with a redirection in the words of a shell."""
        command = self.program.command(str(self.folder), self.server)
        if redirect:
            command = ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", *command]
        (self.place / "stdin").write_bytes(self.program.stdin)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
        number = len(list(self.place.glob("*.err")))
        with (
            open(self.place / "stdin", "rb") as stdin,
            open(self.place / f"{number}.out", "wb") as out,
            open(self.place / f"{number}.err", "wb") as error,
        ):
            process = subprocess.Popen(
                command, stdin=stdin, stdout=stdout or out, stderr=error, cwd=ROOT,
                env=environment, start_new_session=True,
            )  # fmt: skip
        process.error_file = self.place / f"{number}.err"  # type: ignore[attr-defined]
        return process

    def end(self, process: subprocess.Popen) -> End:
        """Wait for the end of a command and of all its processes."""
        if not waited(lambda: process.poll() is not None, LIMIT):
            end_session(process.pid)
            process.wait()
            raise FaultError(f"no end after {LIMIT:g} s")
        if not waited(lambda: not in_session(process.pid), GONE):
            left = end_session(process.pid)
            raise FaultError(f"{left} of its processes live on")
        said = process.error_file.read_bytes().decode("utf-8", "replace")  # type: ignore[attr-defined]
        return End(process.returncode, said)

    def run(self, redirect: str = "", **variables: str) -> End:
        """Run the command to its end."""
        return self.end(self.start(redirect, **variables))

    def require_clean(self, end: End, *more: int) -> None:
        """Raise `FaultError` unless a command ended well, or in one line; `more` are statuses."""
        lines = [line for line in end.error.splitlines() if not _NOISE.match(line)]
        shown = " / ".join(lines)[-300:]
        if end.status in (0, 1, -signal.SIGINT) and _STARTING.search(end.error) and more:
            return
        if "Traceback" in end.error or "Error in" in end.error or "Exception ignored" in end.error:
            raise FaultError(f"status {end.status}, traceback: {shown}")
        if end.status in (0, *more):
            return
        if end.status is None or end.status < 0:
            raise FaultError(f"status {end.status}: {shown}")
        if len(lines) != 1:
            raise FaultError(f"status {end.status} with {len(lines)} lines: {shown}")

    def require_success(self, end: End) -> None:
        """Raise `FaultError` unless a command did its work."""
        self.require_clean(end)
        if end.status:
            raise FaultError(f"status {end.status}: {end.error[-300:]}")

    def require_results(self) -> None:
        """Raise `FaultError` unless the results are those of the reference run."""
        assert self.reference
        there = files_in(self.folder)
        # What was verified, and when, is remembered in a file that any run may write.
        expected = {
            name: one for name, one in self.reference.files.items() if "/.verified" not in name
        }
        wrong = [name for name, found in expected.items() if there.get(name) != found]
        if wrong:
            state = "differs" if wrong[0] in there else "is missing"
            raise FaultError(f"{wrong[0]} {state}")
        self.require_no_leftovers()

    def require_no_leftovers(self) -> None:
        """Raise `FaultError` when something half-written is there."""
        half = [name for name in files_in(self.folder, folders=True) if _is_temporary(name)]
        if half:
            raise FaultError(f"left behind: {half[0]}")

    def require_rerun(self) -> None:
        """Raise `FaultError` unless the same command now gives the results of the reference run."""
        try:
            end = self.run()
            self.require_clean(end)
            self.require_results()
            if end.status and "already" not in end.error:
                raise FaultError(f"status {end.status}: {end.error[-300:]}")
        except FaultError as error:
            raise FaultError(f"the command afterwards: {error}") from None


def _is_temporary(name: str) -> bool:
    base = os.path.basename(name)
    return base.endswith((".tmp", ".part", ".partial", ".replaced")) or base == ".lock"


# ---- faults --------------------------------------------------------------------------------------


def signalled(signum: int, *statuses: int) -> Callable[[Case], None]:
    """Return a fault: a signal at a random moment; `statuses` are those it may end with."""

    def fault(case: Case) -> None:
        assert case.reference
        case.prepare()
        process = case.start()
        waited(
            lambda: process.poll() is not None, case.generator.uniform(0, case.reference.seconds)
        )
        with contextlib.suppress(ProcessLookupError):
            # Ctrl-C reaches all processes of a terminal, the others one.
            send = os.killpg if signum == signal.SIGINT else os.kill
            send(process.pid, signum)
        end = case.end(process)
        case.require_clean(end, *statuses)
        if end.status != -signum:
            case.require_no_leftovers()
        case.require_rerun()

    return fault


def two_at_once(case: Case) -> None:
    """Start the same command twice: one does its work, the other too or in one line not."""
    case.prepare()
    ends = [case.end(process) for process in (case.start(), case.start())]
    for end in ends:
        case.require_clean(end)
    if all(end.status for end in ends):
        raise FaultError(f"both failed: {ends[0].error[-200:]} / {ends[1].error[-200:]}")
    case.require_results()


def full_disk(case: Case) -> None:
    """Let the disk be full at a random moment."""
    assert case.reference
    private_mounts()
    case.folder.mkdir()
    copy_inputs(case.program, case.inputs, case.place / "sized")
    size = blocks_of(case.place / "sized") + int(case.generator.random() * case.reference.bytes)
    mount("tmpfs", case.folder, "tmpfs", 0, f"size={max(size, 4096)}")
    case.prepare()
    case.require_clean(case.run())
    case.require_no_leftovers()
    mount("tmpfs", case.folder, "tmpfs", _MS_REMOUNT, "size=1g")
    case.require_rerun()


def read_only(case: Case) -> None:
    """Let the folder be read-only."""
    private_mounts()
    case.prepare()
    mount(str(case.folder), case.folder, "", _MS_BIND)
    mount("", case.folder, "", _MS_BIND | _MS_REMOUNT | _MS_RDONLY)
    before = files_in(case.folder, folders=True)
    case.require_clean(case.run())
    if files_in(case.folder, folders=True) != before:
        raise FaultError("something changed in a read-only folder")


def redirected(redirect: str, *statuses: int, works: bool = True) -> Callable[[Case], None]:
    """Return a fault: a standard stream that is closed or full."""

    def fault(case: Case) -> None:
        case.prepare()
        end = case.run(redirect)
        case.require_clean(end, *statuses)
        if works and not (redirect == "<&-" and case.program.stdin):
            case.require_success(end)
            case.require_results()
        case.require_no_leftovers()

    return fault


def closed_pipe(case: Case) -> None:
    """Close the pipe behind standard output after its first bytes, as `head -1` does."""
    case.prepare()
    reader, writer = os.pipe()
    process = case.start(stdout=writer)
    os.close(writer)
    waited(lambda: bool(select.select([reader], [], [], 0)[0]) or process.poll() is not None, LIMIT)
    os.close(reader)
    end = case.end(process)
    case.require_clean(end, 128 + signal.SIGPIPE)
    if end.status == 128 + signal.SIGPIPE and end.error.strip().startswith("error"):
        raise FaultError(f"status {end.status} with a message: {end.error[-200:]}")
    case.require_rerun()


def odd_path(name: bytes) -> Callable[[Case], None]:
    """Return a fault: a folder of an odd name."""

    def fault(case: Case) -> None:
        case.prepare(Path(os.fsdecode(os.path.join(os.fsencode(case.place), name))))
        end = case.run()
        case.require_clean(end)
        if end.status == 0:
            case.require_results()
        case.require_no_leftovers()

    return fault


def environment(same: bool = True, **variables: str) -> Callable[[Case], None]:
    """Return a fault: unusual environment variables; `same`: they change no result."""

    def fault(case: Case) -> None:
        case.prepare()
        case.require_success(case.run(**variables))
        if same:
            case.require_results()

    return fault


def without_docstrings(case: Case) -> None:
    """Let Python remove docstrings, which MXNet needs."""
    case.prepare()
    end = case.run(PYTHONOPTIMIZE="2")
    case.require_clean(end)
    if end.status == 0:
        case.require_results()
    case.require_no_leftovers()


def no_shared_memory(case: Case) -> None:
    """Let /dev/shm be read-only, as in some containers."""
    private_mounts()
    mount("tmpfs", Path("/dev/shm"), "tmpfs", _MS_RDONLY, "")
    case.prepare()
    case.require_success(case.run())
    case.require_results()


def misbehaving_server(mode: str) -> Callable[[Case], None]:
    """Return a fault: a server that answers in one of `server.MODES`."""

    def fault(case: Case) -> None:
        case.prepare()
        with serving(mode) as case.server:
            end = case.run()
        case.require_clean(end)
        if end.status == 0:
            raise FaultError("a success, of what is no archive")
        # What was fetched may be kept, for the next attempt.
        left = [name for name in files_in(case.folder) if not name.endswith(".part")]
        if left:
            raise FaultError(f"left behind: {left[0]}")

    return fault


SERVER = "bad server"
FAULTS: Dict[str, Sequence[Callable[[Case], None]]] = {
    "kill": [signalled(signal.SIGKILL, -signal.SIGKILL)],
    "Ctrl-C": [signalled(signal.SIGINT, 130, -signal.SIGINT)],
    "SIGTERM": [signalled(signal.SIGTERM, 143, -signal.SIGTERM)],
    "two at once": [two_at_once],
    "disk full": [full_disk],
    "read-only": [read_only],
    "no stdin": [redirected("<&-")],
    "no stdout": [redirected(">&-")],
    "no stderr": [redirected("2>&-")],
    "| head": [closed_pipe],
    ">/dev/full": [redirected(">/dev/full", 1, works=False)],
    "odd path": [odd_path(name) for name in ODD_NAMES],
    "threads 2,1": [environment(same=False, OMP_NUM_THREADS="2,1")],
    "python -OO": [without_docstrings],
    "/dev/shm": [no_shared_memory],
    SERVER: [misbehaving_server(mode) for mode in MODES],
}
# Repeated with other moments.
REPEATED = ("kill", "Ctrl-C", "SIGTERM", "two at once", "disk full")


# ---- processes, files, mounts --------------------------------------------------------------------


def waited(done: Callable[[], bool], seconds: float) -> bool:
    """Wait until something holds, for seconds in which this process was not stopped itself."""
    spent, before = 0.0, time.monotonic()
    while not done():
        if spent > seconds:
            return False
        time.sleep(0.02)
        now = time.monotonic()
        spent, before = spent + min(now - before, 0.5), now
    return True


def in_session(session: int) -> List[int]:
    """Return the processes of a session, without those that have ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if int(stat[3]) == session and stat[0] != "Z":
                found.append(int(name))
    return found


def end_session(session: int) -> int:
    """Kill the processes of a session; returns how many there were."""
    left = in_session(session)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


def files_in(folder: Path, folders: bool = False) -> Dict[str, str]:
    """Return the SHA-256 of all files below a folder by their paths; of links where they lead."""
    found = {}
    for place, inside, names in os.walk(folder):
        for name in (*names, *(inside if folders else ())):
            path = os.path.join(place, name)
            if os.path.islink(path):
                content = os.fsencode(os.readlink(path))
            else:
                content = Path(path).read_bytes() if os.path.isfile(path) else b""
            found[os.path.relpath(path, folder)] = hashlib.sha256(content).hexdigest()
    return found


def blocks_of(folder: Path) -> int:
    """Return the bytes that a folder takes on a disk of pages."""
    sizes = [
        4096 * (1 + -(-os.lstat(os.path.join(place, name)).st_size // 4096))
        for place, folders, names in os.walk(folder)
        for name in (*folders, *names)
    ]
    return sum(sizes) + 4096


_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


def private_mounts() -> None:
    """Give this process mounts of its own, as root or in a user namespace.

    Raises `FaultError` with `SKIPPED` where that is not possible.
    """
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        if libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER) != 0:
            raise FaultError(f"{SKIPPED}no mounts ({os.strerror(ctypes.get_errno())})")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("none", Path("/"), "", _MS_REC | _MS_PRIVATE)


def mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    """Mount something; raises `FaultError` with `SKIPPED` where that is not possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [os.fsencode(word) for word in (source, str(target), kind)]
    if libc.mount(*words, flags, options.encode()) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise FaultError(f"{SKIPPED}{target} cannot be mounted ({reason})")


# ---- all cases -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a case: an empty problem when it passed."""

    program: str
    fault: str
    number: int
    problem: str


def reference_run(program: Program, inputs: Path, place: Path) -> ReferenceRun:
    """Run a program twice without a fault."""
    found = []
    for name in ("first", "second"):
        case = Case(program, inputs, place / name, None, "")
        case.prepare()
        before, start = blocks_of(case.folder), time.monotonic()
        case.require_success(case.run())
        seconds = time.monotonic() - start
        found.append((files_in(case.folder), blocks_of(case.folder) - before))
    (first, size), (second, _) = found
    same = {name: value for name, value in first.items() if second.get(name) == value}
    return ReferenceRun(same, size, seconds)


def run(
    programs: Sequence[Program], faults: Sequence[str], repeats: int, seed: int, jobs: int,
    folder: Path, report: Callable[[Outcome], None] = lambda one: None,
) -> List[Outcome]:  # fmt: skip
    """Run every fault of every program, `jobs` cases at a time; in children."""
    inputs = folder / "inputs"
    result_of(*start_child(lambda: make_inputs(inputs, programs)), "inputs")
    references = {}

    def measure(program: Program) -> str:
        return json.dumps(
            reference_run(program, inputs, folder / "reference" / program.name.replace("/", "-"))
        )

    measured = [(p, lambda p=p: measure(p)) for p in programs if not p.downloads]
    for program, result in _in_children(measured, jobs):
        references[program.name] = ReferenceRun(*json.loads(result))
    cases = [
        (Outcome(program.name, name, number, ""), program, fault)
        for program in programs
        for name in faults
        if program.downloads == (name == SERVER)
        for number in range(repeats if name in REPEATED else 1)
        for fault in FAULTS[name]
    ]
    calls = [
        ((outcome, index),
         lambda o=outcome, p=program, f=fault, i=index: problem_of(
             p, f, inputs, folder / "cases" / str(i), references.get(p.name),
             f"{seed} {o.fault} {o.number}"))
        for index, (outcome, program, fault) in enumerate(cases)
    ]  # fmt: skip
    outcomes = []
    for (outcome, index), result in _in_children(calls, jobs):
        outcomes.append(outcome._replace(problem=result))
        report(outcomes[-1])
        shutil.rmtree(folder / "cases" / str(index), ignore_errors=True)
    return outcomes


def problem_of(
    program: Program, fault: Callable[[Case], None], inputs: Path, place: Path,
    reference: Optional[ReferenceRun], seed: str,
) -> str:  # fmt: skip
    """Run one case; returns the problem, "" when there is none."""
    try:
        fault(Case(program, inputs, place, reference, seed))
    except FaultError as error:
        return " ".join(str(error).split())
    return ""


def _in_children(calls: Sequence[Any], jobs: int) -> Iterator[Any]:
    """Yield the key and the text of each function, run in children of this process."""
    waiting, running = list(calls)[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key, function = waiting.pop()
            reader, pid = start_child(function)
            running[reader] = key, pid
        for reader in select.select(list(running), [], [])[0]:
            key, pid = running.pop(reader)
            yield key, result_of(reader, pid, str(key))


def table(outcomes: Sequence[Outcome]) -> str:
    """Return passed/all by program and fault; cases that had to be skipped are left out."""
    names = list(dict.fromkeys(one.program for one in outcomes))
    faults = list(dict.fromkeys(one.fault for one in outcomes))
    rows = [["program", *faults, "all"]]
    for name in (*names, "all"):
        mine = [one for one in outcomes if name in (one.program, "all")]
        cells = [[one for one in mine if one.fault == fault] for fault in faults]
        rows.append([name, *map(_share, (*cells, mine))])
    return columns(rows)


def _share(outcomes: Sequence[Outcome]) -> str:
    run_ones = [one for one in outcomes if not one.problem.startswith(SKIPPED)]
    passed = sum(not one.problem for one in run_ones)
    return f"{passed}/{len(run_ones)}" if run_ones else "-"


def problems(outcomes: Sequence[Outcome]) -> List[Outcome]:
    """Return the cases that did not pass, without those that had to be skipped."""
    return [one for one in outcomes if one.problem and not one.problem.startswith(SKIPPED)]


def chosen(names: str) -> Sequence[Program]:
    """Return the programs whose names hold one of several words, with commas between them."""
    found = [one for one in PROGRAMS if any(word in one.name for word in names.split(","))]
    if not found:
        raise SystemExit(f"error: --only {names}: there is no such program")
    return found

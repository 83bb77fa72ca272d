"""A Dask cluster of simulated nodes: a scheduler, and workers in process groups of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.conftest import ROOT

SECONDS = 90.0  # until a scheduler and its workers are there


class Nodes:
    """A context with a scheduler and `count` nodes of one worker each, whose logs are in `folder`.

    `variables` are added to the environment of all of them.
    """

    def __init__(self, folder, count=2, threads=1, protocol="tcp", **variables):
        self.folder, self.count = Path(folder), count
        self.file = str(self.folder / "scheduler.json")
        self.protocol, self.worker = protocol, ["--nthreads", str(threads)]
        self.variables = variables
        self.scheduler, self.nodes = None, []

    def __enter__(self):
        self.folder.mkdir(exist_ok=True)
        arguments = ["--host", "localhost", "--port", "0", "--scheduler-file", self.file]
        arguments += ["--protocol", self.protocol]
        self.scheduler = self._start("dask_scheduler", "scheduler", arguments)
        wait_until(lambda: Path(self.file).exists() and Path(self.file).read_text().endswith("}"))
        self.address = json.loads(Path(self.file).read_text())["address"]
        for _ in range(self.count):
            self.start_node()
        self.wait()
        return self

    def add(self, *arguments, **variables):
        """Start one more node and wait until it has joined."""
        self.start_node(*arguments, **variables)
        self.wait()

    def start_node(self, *arguments, **variables):
        name = f"node{len(self.nodes)}"
        folder = str(self.folder / name)
        given = ["--scheduler-file", self.file, "--name", name, "--local-directory", folder]
        given += [*self.worker, *arguments]
        self.nodes.append(self._start("dask_worker", name, given, variables))

    def wait(self):
        """Wait until all nodes have joined."""
        for number in range(len(self.nodes)):
            log = self.folder / f"node{number}.log"
            wait_until(lambda log=log: "Registered to:" in log.read_text(), str(log))

    def _start(self, program, name, arguments, variables=None):
        # Another number of threads than any test asks for, so that an inherited one is noticed.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "3"}
        environment.update(self.variables, **(variables or {}))
        words = [sys.executable, "-m", f"distributed.cli.{program}", "--no-dashboard"]
        with open(self.folder / f"{name}.log", "w") as log:
            return subprocess.Popen(
                [*words, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )

    def kill(self, number):
        """Kill all processes of a node at once."""
        os.killpg(self.nodes[number].pid, signal.SIGKILL)
        self.nodes[number].wait()

    def workers(self, number):
        """Return the processes of a node that run jobs: the children of its first one."""
        return [pid for pid in children(self.nodes[number].pid) if "spawn_main" in command(pid)]

    def jobs(self):
        """Return the processes of all jobs that run."""
        workers = [pid for number in range(len(self.nodes)) for pid in self.workers(number)]
        return [
            pid for worker in workers for pid in children(worker) if "bort.jobs" in command(pid)
        ]

    def __exit__(self, *error):
        for process in [*self.nodes, self.scheduler]:
            if process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def children(pid):
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        found = [task.joinpath("children").read_text().split() for task in tasks]
    except OSError:
        return []
    return [int(child) for each in found for child in each]


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def wait_until(condition, what="", seconds=SECONDS):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what or "not in time"
        time.sleep(0.05)

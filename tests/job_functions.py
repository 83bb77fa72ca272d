"""Functions of test_jobs.py that run in other processes, which import no more than they need."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from bort import jobs
from bort.errors import UserError


def environment():
    return os.getpid(), os.environ["OMP_NUM_THREADS"], jobs.slot()


def environment_late(number):
    time.sleep(0.5)
    return environment()


def write_pid_and_sleep(path, seconds=60):
    Path(f"{path}.tmp").write_text(str(os.getpid()))
    os.replace(f"{path}.tmp", path)
    time.sleep(seconds)


def take_memory(megabytes, seconds):
    taken = b"\1" * (megabytes * 2**20)
    time.sleep(seconds)
    return taken[0]


def square_late(number, seconds=0.0):
    time.sleep(seconds)
    return number * number


def late(seconds, number):
    time.sleep(seconds.get(number, 0))
    return number


def user_mistake():
    raise UserError("file: wrong; fix it")


def bug():
    raise KeyError("not the user's")


class TwoArgumentsError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def unpicklable_error():
    raise TwoArgumentsError(1, 2)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def end(status):
    os._exit(status)


def save_at_sigterm(path, started):
    def save(*_):
        time.sleep(0.3)
        Path(path).write_text("saved")
        os._exit(0)

    signal.signal(signal.SIGTERM, save)
    write_pid_and_sleep(started)


def killed_at_50(number):
    if number == 50:
        kill_itself()
    return number

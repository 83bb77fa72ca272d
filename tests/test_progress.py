"""The progress bar: a bar on a terminal, lines elsewhere, nothing where it is told so."""

from __future__ import annotations

import re
import sys
import time

import pytest

from bort.progress import ProgressBar


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("bort.progress._SECONDS_BETWEEN_LINES", 0)


def test_without_a_terminal_it_is_a_line_now_and_then(capsys, monkeypatch):
    with ProgressBar("making", 4_000_000) as progress:
        progress.skip(2_000_000)
        progress.advance(1_000_000)
    line = capsys.readouterr().err
    assert re.search(r"^making:  50%\|.*1\.00M/2\.00M .*B/s\]$", line, re.MULTILINE)
    monkeypatch.setattr("bort.progress._SECONDS_BETWEEN_LINES", 60)
    with ProgressBar("making", 4_000_000) as progress:
        progress.advance(1_000_000)
    assert capsys.readouterr().err == ""


def test_units_that_were_done_before_count(capsys):
    with ProgressBar("caching", 8, unit="sequence", initial=4) as progress:
        progress.advance()
    assert re.search(r"^caching:  62%.* 5/8 .*sequence", capsys.readouterr().err)


@pytest.mark.parametrize("terminal", [False, True])
def test_units_that_were_done_before_say_nothing_about_the_speed(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with ProgressBar("caching", 2000, unit="sequence", initial=500) as progress:
        progress.found(500)
        time.sleep(0.2)
        progress.advance(2)
    *_, last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
    found = re.search(r"1002/2000 .* ([0-9.]+)sequence/s", last)
    assert found, last
    assert float(found[1]) <= 10


@pytest.mark.parametrize("flags", [{"enabled": False}, {"lines": False}])
def test_it_can_be_silent(capsys, flags):
    with ProgressBar("making", 4, **flags) as progress:
        progress.advance(2)
        progress.write("A line.")
    assert capsys.readouterr() == ("A line.\n", "")


def test_on_a_terminal_it_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar("making", 4, unit="model") as progress:
        progress.advance(4)
    shown = capsys.readouterr().err
    assert "making: 100%" in shown
    assert "4/4" in shown
    assert shown.count("\n") == 1, "the bar alone"

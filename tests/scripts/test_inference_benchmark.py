"""The benchmark of inference: what it counts, chooses and shows; no speed is tested."""

from __future__ import annotations

import contextlib

import pytest

from bort.errors import UserError
from bort.inference.runtime import available_backends
from scripts.benchmarks import inference
from scripts.benchmarks.inference import DEFAULT, GLUONNLP, PYTORCH, PYTORCH_BFLOAT16, Cell, Way

BASE, LARGE = Way("BERT-base", GLUONNLP), Way("BERT-large", GLUONNLP)


@pytest.mark.parametrize(
    ("way", "macs"),
    [
        # The closed form D [S (4 H^2 + 2 H I) + 2 S^2 H] for S = 128, in 10^9.
        (LARGE, 39.5),
        (BASE, 11.2),
        (Way("Bort", "mxnet"), 3.09),
        (Way("Bort", "onnx"), 3.09 * 3 / 4),
        (Way("Bort", "openvino-bfloat16"), 3.09 * 3 / 4),
    ],
)
def test_operations_are_those_of_the_closed_form(way, macs):
    assert inference.operations(way, Cell(1, 128)) / 2e9 == pytest.approx(macs, rel=5e-3)
    eight = inference.operations(way, Cell(8, 128))
    assert eight == 8 * inference.operations(way, Cell(1, 128))


def test_stock_networks_also_run_on_the_default_threads(monkeypatch):
    monkeypatch.setattr(inference.importlib.util, "find_spec", lambda name: None)
    rows = inference.rows_of(["Bort", "BERT-base"], ["1", "2"])
    assert (BASE, DEFAULT) in rows
    assert [way for way, threads in rows if threads == DEFAULT] == [BASE]
    assert {way.network for way, _ in rows} == {"Bort", "BERT-base"}
    assert len(rows) == len(available_backends()) * 2 + 3
    monkeypatch.setattr(inference, "available_backends", lambda: ("mxnet", "onnx"))
    ours = {way.engine for way, _ in inference.rows_of(["Bort"], ["1"])}
    assert ours == {"mxnet", "onnx"}
    monkeypatch.setattr(inference.importlib.util, "find_spec", lambda name: object())
    for fast in (False, True):
        monkeypatch.setattr(inference, "multiplies_bfloat16", lambda fast=fast: fast)
        rows = inference.rows_of(["BERT-base"], ["1"])
        assert (Way("BERT-base", PYTORCH), "1") in rows
        assert ((Way("BERT-base", PYTORCH_BFLOAT16), "1") in rows) == fast
    with pytest.raises(UserError, match="--networks: GPT unknown; Bort, "):
        inference.rows_of(["GPT"], ["1"])


MEDIANS = {
    (Way("Bort", "onnx"), "2", Cell(1, 128)): 0.010,
    (Way("Bort", "onnx-int8"), "2", Cell(1, 128)): 0.005,
    (Way("Bort", "openvino-bfloat16"), "2", Cell(1, 128)): 0.008,
    (BASE, "2", Cell(1, 128)): 0.080,
    (BASE, DEFAULT, Cell(1, 128)): 0.160,
    (LARGE, "2", Cell(1, 128)): 0.300,
    (LARGE, DEFAULT, Cell(1, 128)): 0.600,
}


def test_goals_are_measured_against_both_columns(capsys):
    inference.print_goals(MEDIANS, ["1", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert "BERT-base, default" in lines[2]
    shown = "Bort onnx 16.0 (goal 7.9) 60.0 (goal 20) 8.0 (goal 7.9) 30.0 (goal 20)"
    assert " ".join(lines[3].split()) == shown
    assert lines[4].split()[:5] == ["Bort", "onnx-int8", "32.0", "(goal", "15)"]


def test_the_table_shows_the_share_of_the_floor(capsys):
    rows = [(way, threads) for way, threads, _ in MEDIANS]
    rates = {"float32": 924.0, "bfloat16": 1158.0, "int8": 1848.0}
    peaks = dict.fromkeys(("2", DEFAULT), rates)
    sizes = {way: 100.0 for way, _ in rows if way != LARGE}
    inference.print_table(MEDIANS, rows, [Cell(1, 128), Cell(8, 512)], peaks, sizes)
    lines = capsys.readouterr().out.splitlines()
    # 4.63 x 10^9 operations at 924 x 10^9 a second are 5 ms of the 10.
    assert lines[3].split() == ["Bort", "onnx", "2", "100", "10.0", "(", "50%)", "-"]
    assert lines[5].split()[:7] == [
        "Bort", "openvino-bfloat16", "2", "100", "8.0", "(", "50%)"
    ]  # fmt: skip
    assert lines[-1].split()[:4] == ["BERT-large", "GluonNLP", DEFAULT, "-"]


def test_the_plot_shows_the_best_latency_of_each_runtime(tmp_path, figures):
    sizes = {way: 100.0 + number for number, (way, _, _) in enumerate(MEDIANS)}
    inference.draw(MEDIANS, sizes, str(tmp_path / "latency.png"))
    (axes,) = figures[0].axes
    drawn = {points.get_label(): points.get_offsets().tolist() for points in axes.collections}
    assert drawn["Bort"] == [[100.0, 10.0], [101.0, 5.0], [102.0, 8.0]]
    assert drawn["BERT-base"] == [[sizes[BASE], 80.0]]
    assert [text.get_text() for text in axes.texts][:2] == ["onnx", "onnx-int8"]
    assert axes.get_ylabel() == "latency, ms"
    with pytest.raises(UserError, match="there is no folder"):
        inference.draw(MEDIANS, sizes, str(tmp_path / "absent" / "latency.png"))


def test_equal_numbers_of_threads_are_measured_once_in_one_process(monkeypatch):
    asked = []

    @contextlib.contextmanager
    def worker(count):
        made = set()

        def ask(request):
            asked.append((count, request["way"]))
            if request["way"] in made:
                return [0.2, 0.1, 0.3]
            made.add(request["way"])
            return 438.0

        yield ask

    monkeypatch.setattr(inference, "start_worker", worker)
    monkeypatch.setattr(inference.os, "cpu_count", lambda: 2)
    rows = [(BASE, "1"), (BASE, "2"), (BASE, DEFAULT)]
    found = inference.measure_cell(Cell(1, 128), rows, rounds=2)
    assert found == dict.fromkeys(rows, inference.Measured(0.2, 438.0))
    # To make it, and two turns.
    assert sorted(asked) == [(1, BASE)] * 3 + [(2, BASE)] * 3


def test_a_process_that_ends_before_it_answers_is_a_one_line_error(monkeypatch, tmp_path):
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexit 0\n")
    silent.chmod(0o755)
    monkeypatch.setattr(inference.sys, "executable", str(silent))
    with pytest.raises(UserError, match="for lack of memory"), inference.start_worker(1) as ask:
        ask({})


def test_a_limit_that_leaves_everything_out_is_named(monkeypatch, tmp_path):
    rates = {"float32": 100.0, "bfloat16": 100.0, "int8": 100.0}
    monkeypatch.setattr(inference, "_peaks_of", lambda threads: dict.fromkeys(threads, rates))
    flags = ["--networks", "Bort", "--threads", "1", "--longest", "0"]
    with pytest.raises(UserError, match=r"--longest 0\.0: leaves everything out"):
        inference.main([*flags, "--plot", str(tmp_path / "latency.png")])


def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_measured(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(inference, "_peaks_of", lambda _: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for name, message in (
        ("x.words", "use .png, .pdf or .svg"),
        ("file/x.png", "is not a folder"),
        ("absent/x.png", "there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            inference.main(["--plot", str(tmp_path / name)])

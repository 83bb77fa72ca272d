"""The front end: what-if searches, explanations, lists, and its messages about invalid input."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bort.ose import run
from bort.ose.bert_family import BertFamily, bert_small_space
from bort.ose.known_errors import read_errors
from bort.ose.report import OrderedSpace, explanation
from bort.ose.search import extract, ordered
from bort.shapes import shape_of
from scripts import run_ose

SMALL = ["--space", "bert-small", "--vocab_size", "8000", "--sequence_length", "128"]


def call(capsys, *argv):
    result = run_ose.main([str(one) for one in argv])
    return result, capsys.readouterr().out


def complaint(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        run_ose.main([str(one) for one in argv])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_explain_prints_the_known_figures(capsys):
    _, out = call(capsys, "--explain", "bort_4_8_768_1024")
    assert "p = 75,106,304 parameters" in out
    assert "i = 13,958,643,712 multiply-accumulates for 512 tokens" in out
    assert "g = 0.464 against T = bort_12_16_3072_1024: rank 178 of 300" in out
    assert "over bort_2_4_256_512 (g = 0.817) when its error is at least 1.76 times lower" in out


def test_explain_with_other_counts_and_maximum_points(capsys):
    explain = ["--explain", "bort_4_8_768_1024"]
    assert "at least 1.45 times lower" in call(capsys, *explain, "--effective")[1]
    roberta = ["--maximum_point", "bort_24_16_4096_1024"]
    assert "at least 1.26 times lower" in call(capsys, *explain, *roberta)[1]
    assert "at least 1.16 times lower" in call(capsys, *explain, *roberta, "--effective")[1]
    assert " operations for 512 tokens" in call(capsys, *explain, "--all_operations")[1]
    best = call(capsys, "--explain", "bort_2_4_256_512")[1]
    assert "the best by size and speed: another one needs a lower error to win" in best
    smaller = call(capsys, "--explain", "bort_1_1_1_1")[1]
    assert "(g = 0.817) unless its error is 1.22 times higher" in smaller
    level = call(capsys, "--explain", "bort_2_8_256_512")[1]  # heads change neither
    assert "wins over bort_2_4_256_512 (g = 0.817) when its error is lower\n" in level
    heads = call(capsys, "--explain", "bort_2_8_256_512", "--all_operations")[1]
    assert "when its error is at least 1.00008 times lower" in heads  # not 1.00 times lower
    _, out = call(capsys, "--explain", "bort_12_16_3072_1024")
    assert "never wins: W is 0 whatever the error" in out


def test_explain_against_a_space_of_one_shape(capsys, tmp_path):
    space = tmp_path / "one.yaml"
    space.write_text("architectures: [bort_1_2_8_4]\n")
    flags = ["--space", space, "--explain"]
    assert (
        "  wins whatever its error: W is 0 for every shape"
        in call(capsys, *flags, "bort_1_1_2_4")[1]
    )
    assert "never wins" in call(capsys, *flags, "bort_1_2_8_4")[1]
    line = complaint(capsys, *flags[:2], "--errors", "synthetic", "--output_dir", tmp_path / "out")
    assert "stride 1: all architectures that it visits have the parameters or the op" in line


def test_every_row_of_an_explained_shape_has_its_own_rank():
    names = ["bort_1_2_8_4", "bort_2_2_8_4", "bort_4_2_8_4"]
    family, shapes = BertFamily(), [shape_of(name) for name in names]
    members = ordered(shapes, family.parameter_size, family.inference_cost)
    errors = {(1, 1.0): 4.0, (1, 2.0): 2.0, (2, 1.0): 100.0, (2, 2.0): 90.0}
    result = extract(
        shapes,
        family.parameter_size,
        family.inference_cost,
        lambda shape, steps, hparams, generator: errors[shape.layers, hparams["lr"]],
        hparams=[{"lr": 1.0}, {"lr": 2.0}],
    )
    lines = explanation(OrderedSpace(family, members, members[-1]), shapes[0], result)
    assert [line.partition("rank ")[2] for line in lines[-2:]] == ["2 of 6", "1 of 6"]


def test_an_explained_name_that_is_none_stops_a_search_before_it_begins(capsys, tmp_path):
    out = tmp_path / "out"
    line = complaint(capsys, *SMALL, "--errors", "synthetic", "--explain", "x", "--output_dir", out)
    assert "--explain: model name 'x': expected bort_" in line
    assert not out.exists()


def test_costs_of_more_than_64_bits(capsys, tmp_path):
    flags = ["--errors", "synthetic", "--max_length", 9 * 10**18, "--output_dir", tmp_path / "out"]
    _, out = call(capsys, *SMALL, *flags)
    assert "selected: get_bort_model(" in out


def test_list_shows_the_space_in_order_and_the_conditions(capsys):
    _, out = call(capsys, "--list", *SMALL)
    rows = [line.split() for line in out.splitlines()[1:37]]
    assert [row[0] for row in rows] == [str(n) for n in range(36)]
    assert {row[1] for row in rows} == {shape.name for shape in bert_small_space()}
    sizes = [int(row[2].replace(",", "")) for row in rows]
    assert sizes == sorted(sizes)
    assert "36 architectures, T = bort_4_4_512_256" in out
    assert "holds  operations: the last layer is smaller than a middle layer" in out


def write_errors(tmp_path, *lines):
    path = tmp_path / "errors.csv"
    path.write_text("\n".join(["architecture,error", *lines]) + "\n")
    return path


def test_a_search_with_errors_measured_elsewhere(capsys, tmp_path, figures):
    path = write_errors(
        tmp_path,
        "bort_4_8_768_1024,2.0",
        "bort_2_4_256_512,4.0",
        "bort_2_4_256_512,3.8",
        "bort_12_12_3072_768,1.8",
        "bort_8_8_1024_512,nan",
        "bort_12_16_3072_1024,1.5",
    )
    folder = tmp_path / "out"
    explain = ["--explain", "bort_2_4_256_512"]
    result, out = call(capsys, "--errors", path, "--output_dir", folder, *explain)
    assert result.best.architecture == shape_of("bort_4_8_768_1024")
    assert 'selected: get_bort_model("bort_4_8_768_1024") or --student_model bort_4_8' in out
    assert "wins over bort_4_8_768_1024 (W = 0.2321) below error 3.52" in out
    assert "error 3.9, W = 0.2095: rank 2 of 5" in out

    report = json.loads((folder / "ose.json").read_text())
    assert report["model_name"] == "bort_4_8_768_1024"
    assert report["maximum_point"] == "bort_12_16_3072_1024"
    table = {row["model_name"]: row for row in report["table"]}
    assert table["bort_2_4_256_512"]["error"] == pytest.approx(3.9)
    assert table["bort_4_8_768_1024"]["w"] == pytest.approx(0.46415 / 2, rel=1e-4)
    assert table["bort_8_8_1024_512"]["error"] is None
    assert table["bort_12_16_3072_1024"]["w"] == 0
    assert [name for name, row in table.items() if row["pareto"]] == [
        "bort_2_4_256_512",
        "bort_4_8_768_1024",
        "bort_12_12_3072_768",
    ]
    with open(folder / "ose.csv", newline="") as handle:
        assert [row["model_name"] for row in csv.DictReader(handle)] == list(table)
    assert (folder / "ose.png").read_bytes().startswith(b"\x89PNG")
    by_size = figures[-1].axes[0]
    points, rings = (drawn.get_offsets().tolist() for drawn in by_size.collections)
    assert [error for _, error in points] == [
        row["error"] for row in table.values() if row["error"] is not None
    ]
    assert [error for _, error in rings] == [
        row["error"] for row in table.values() if row["pareto"]
    ]
    assert by_size.lines[0].get_label() == "bort_4_8_768_1024"


def test_strides_are_compared(capsys, tmp_path, figures):
    options = ["--errors", "synthetic", "--compare_strides", "4,2,8", "--output_dir", tmp_path]
    result, out = call(capsys, *options, *SMALL)
    lines = out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.split()[:2] == ["stride", "trained"])
    rows = [line.split() for line in lines[start + 1 : start + 5]]
    assert [row[:2] for row in rows] == [["1", "34"], ["2", "17"], ["4", "9"], ["8", "5"]]
    assert rows[0][2:7] == ["100.0%", "0.0", f"{result.best.w:.4f}", "100.0%", "100.0%"]
    assert [row[6] for row in rows] == ["100.0%", "50.0%", "25.0%", "12.5%"]
    for row in rows:
        assert float(row[5][:-1]) >= float(row[6][:-1])
    assert (tmp_path / "strides.png").read_bytes().startswith(b"\x89PNG")
    found, bound = figures[-1].axes[0].lines
    assert list(found.get_xdata()) == [1, 2, 4, 8]
    assert list(bound.get_ydata()) == pytest.approx([result.best.w / n for n in (1, 2, 4, 8)])
    assert all(found.get_ydata() >= bound.get_ydata())


def test_stride_and_seed_reach_the_search(capsys, tmp_path):
    def table(*options):
        argv = ["--errors", "synthetic", "--output_dir", tmp_path, *SMALL, *options]
        return call(capsys, *argv)[0].table

    everything = table()
    assert table("--stride", "3") == everything[::3]
    assert table("--seed", "1") != everything
    assert table() == everything


def test_latency_is_listed_with_its_correlation(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_latency", lambda shape, length: shape.layers * length / 1e5)
    path = tmp_path / "space.yaml"
    path.write_text("layers: [1, 2, 3]\nheads: [2]\nhidden: [8]\nintermediate: [4]\n")
    space = ["--space", path, "--sequence_length", "64", "--measure_latency"]
    _, out = call(capsys, *space)
    assert [line.split()[-1] for line in out.splitlines()[1:4]] == ["0.64", "1.28", "1.92"]
    assert "correlation of operations and latency over 3: 1.0000" in out
    options = ["--errors", "synthetic", "--output_dir", tmp_path]
    call(capsys, *space, *options)
    report = json.loads((tmp_path / "ose.json").read_text())
    assert report["spearman_operations_latency"] == pytest.approx(1)
    assert [row["latency_ms"] for row in report["table"]] == pytest.approx([0.64, 1.28, 1.92])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["bort_4_8_768_1024,two"], "errors.csv:2: error 'two': must be a number"),
        (["bort_4_8_768_1024,1,5"], "errors.csv:2: has more fields than the header; numbers have"),
        (["bort_4_8_768_1024"], "errors.csv:2: has fewer fields than the header"),
        (["bort_4_8_768_1024,-1"], "errors.csv:2: error -1.0: must not be negative"),
        (["bort_4_8_768_1024,2", "bert,2"], "errors.csv:3: model name 'bert'"),
        (["bort_1_8_768_1024,2"], "errors.csv:2: bort_1_8_768_1024 is not in the space"),
        ([], "errors.csv: contains no errors"),
    ],
)
def test_invalid_errors_are_named_by_line(capsys, tmp_path, lines, message):
    path = write_errors(tmp_path, *lines)
    assert message in complaint(capsys, "--errors", path, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_search_keeps_its_errors_and_the_results_of_a_training(capsys, tmp_path):
    path = write_errors(tmp_path, "bort_4_8_768_1024,2").rename(tmp_path / "ose.csv")
    before = path.read_bytes()
    line = complaint(capsys, "--errors", path, "--output_dir", f"{tmp_path}/.")
    assert "ose.csv: would be replaced by the table of this search" in line
    assert path.read_bytes() == before
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "journal-0.jsonl").touch()
    line = complaint(capsys, "--errors", path, "--output_dir", folder)
    assert "out: has a search that trained its architectures, whose table would be repla" in line
    assert [entry.name for entry in folder.iterdir()] == ["journal-0.jsonl"]


def test_empty_fields_at_the_end_of_a_row_of_errors_are_no_more_than_the_header(tmp_path):
    """As of a spreadsheet that had a third column."""
    path = write_errors(tmp_path, "bort_4_8_768_1024,2,", "bort_2_4_128_64,3,,")
    space = [shape_of("bort_4_8_768_1024"), shape_of("bort_2_4_128_64")]
    assert list(read_errors(str(path), space)[0]) == space


def test_other_invalid_input(capsys, tmp_path):
    (tmp_path / "other.csv").write_text("name,loss\n")
    wrong = [
        ([], "nothing to do: give --list, --explain"),
        (["--errors", tmp_path / "other.csv"], "other.csv:1: needs the columns architecture"),
        (["--errors", tmp_path / "absent.csv"], "absent.csv: cannot be read"),
        (["--list", "--compare_strides", "2"], "--compare_strides needs --errors"),
        (["--errors", "synthetic", "--compare_strides", "2,x"], "must be integers"),
        (["--errors", "synthetic", "--compare_strides", "0"], "must be from 1 to 36"),
        (["--errors", "synthetic", "--stride", "37"], "stride 37: must be from 1 to 36"),
        (["--list", "--maximum_point", "bort_1_2_128_64"], "maximum point"),
        (
            ["--explain", "bort_9_4_512_256"],
            "maximum point bort_4_4_512_256: bort_9_4_512_256 has more",
        ),
        (["--errors", "synthetic", "--explain", "bort_9_4_512_256"], "maximum point"),
        (["--explain", "bort"], "--explain: model name 'bort'"),
        (["--list", "--maximum_point", "bort"], "--maximum_point: model name 'bort'"),
    ]
    for argv, message in wrong:
        out = ["--output_dir", tmp_path / "out"]
        assert message in complaint(capsys, "--space", "bert-small", *argv, *out)
    assert not (tmp_path / "out").exists()


def test_the_script_itself(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    script = os.path.join(root, "scripts", "run_ose.py")
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, script, "--space", "missing", "--list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --space missing")

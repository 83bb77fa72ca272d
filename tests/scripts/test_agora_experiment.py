"""The experiment of Agora with a competent labeller: its sets and its tables."""

from __future__ import annotations

import pytest

from bort.files import read_json, write_json
from data.tasks import get_task
from scripts.experiments import agora_table, label_real_rows

# Sets


@pytest.fixture
def drawn(tmp_path):
    """Return the flags for a draw of five rows, labels for all, and Agora with two images."""
    folder = tmp_path / "draw" / "glue" / "MRPC"
    folder.mkdir(parents=True)
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = [f"1\t{number}\t{number}\tone {number} .\ttwo {number} .\n" for number in range(5)]
    (folder / "train.tsv").write_text(header + "".join(rows))
    (folder / "dev.tsv").write_text(header + rows[0])
    (folder / "test.tsv").write_text(header + rows[1])
    (tmp_path / "labels.tsv").write_text("".join(f"0\t0.{number}\n" for number in range(5)))
    (tmp_path / "agora" / "MRPC").mkdir(parents=True)
    rounds = [{"train_size": size} for size in (1, 2, 3)]
    write_json(str(tmp_path / "agora" / "MRPC" / "agora.json"), {"rounds": rounds})
    return [
        *("--task_name", "MRPC", "--agora", str(tmp_path / "agora")),
        *("--data_dir", str(tmp_path / "draw")),
        *("--labels", str(tmp_path / "labels.tsv"), "--output_dir", str(tmp_path / "made")),
    ]


def test_real_rows_get_the_labels_of_the_labeller(drawn, tmp_path):
    label_real_rows.main([*drawn, "--rows", "1", "--first_real", "2"])
    task = get_task("MRPC")
    rows = task.read(str(tmp_path / "made"), "train").examples
    assert [(row.inputs[0][0], row.label) for row in rows] == [
        ("one 0 .", 1),
        ("one 2 .", 0),
        ("one 3 .", 0),
    ]
    for name in ("dev.tsv", "test.tsv"):
        made, given = (tmp_path / f"{at}/glue/MRPC/{name}" for at in ("made", "draw"))
        assert made.read_text() == given.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--first_real", "4", "--rows", "1"], "2 real rows follow within the 5 rows of train"),
        (["--first_real", "2", "--rows", "3"], "--rows 3 --first_real 2: must be in this order"),
        (["--task_name", "CB"], "--task_name CB: is not a task of GLUE"),
        (["--data_dir", "absent"], "--data_dir absent: has no training set of MRPC"),
    ],
)
def test_rows_that_are_not_there_are_named(drawn, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        label_real_rows.main([*drawn, *flags])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_run_without_augmented_examples_is_named(drawn, tmp_path, capsys):
    write_json(str(tmp_path / "agora/MRPC/agora.json"), {"rounds": [{"train_size": 1}]})
    with pytest.raises(SystemExit):
        label_real_rows.main([*drawn, "--rows", "1", "--first_real", "2"])
    assert f"{tmp_path / 'agora'}: its last fits had no augmented" in capsys.readouterr().err


def test_a_file_without_a_header_is_not_taken_for_one_with(drawn, tmp_path, capsys):
    (tmp_path / "draw/glue/CoLA").mkdir()
    (tmp_path / "draw/glue/CoLA/train.tsv").write_text("a\t1\t\tOne.\n" * 5)
    (tmp_path / "agora/CoLA").mkdir()
    write_json(str(tmp_path / "agora/CoLA/agora.json"), {"rounds": [{"train_size": 1}]})
    with pytest.raises(SystemExit):
        label_real_rows.main([*drawn, "--task_name", "CoLA"])
    assert "--task_name CoLA: its training file has no header" in capsys.readouterr().err


def test_labels_of_other_rows_are_refused(drawn, tmp_path, capsys):
    (tmp_path / "labels.tsv").write_text("0\t0.5\n")
    with pytest.raises(SystemExit):
        label_real_rows.main([*drawn, "--rows", "1", "--first_real", "2"])
    assert "labels.tsv: has 1 lines for 5 rows of train" in capsys.readouterr().err


# Table

IMAGES = "round\treplay\tdev_row\tkept\ttimaeus\tdev_label\timage\tdev_text\n"


def write_method(folder, draw, dev, test, sizes=(200, 202)):
    """Write a run of Agora with three images of label 1, of which two are kept."""
    content = {
        "rounds": [{"seconds": 3.0, "train_size": size} for size in sizes],
        "best_of_grid": {"dev": {"accuracy": 0.5}, "test": {"accuracy": 0.5}},
        "best": {"dev": {"accuracy": dev}, "test": {"accuracy": test}},
        "timaeus": {"test": {"accuracy": 0.9}},
    }
    path = folder / f"draw-{draw}" / "SST-2"
    path.mkdir(parents=True)
    write_json(str(path / "agora.json"), content)
    lines = [f'0\t0\t0\tyes\t{label}\t1\ta " b\ta\n' for label in (1, 0)]
    (path / "images.tsv").write_text(IMAGES + "".join(lines) + "0\t0\t0\tno\t0\t1\tc\tc\n")


def test_the_table(tmp_path, capsys):
    folder = tmp_path / "SST-2" / "200"
    for draw, test in enumerate((0.625, 0.375)):
        write_method(folder / "mistakes", draw, 0.75, test)
        write_method(folder / "real", draw, 0.5, 0.75, sizes=(204,))
        metrics = {split: {"metrics": {"accuracy": 0.25}} for split in ("dev", "test")}
        path = folder / "plain" / f"draw-{draw}" / "SST-2"
        path.mkdir(parents=True)
        write_json(str(path / "metrics.json"), {"answers": metrics, "seconds": 3.0})
    agora_table.main([str(folder)])
    assert capsys.readouterr().out.splitlines()[4:] == [
        "| best of grid | 0.500 ± 0.000 |  |  |  |  | 0.000 | 3 |",
        "| mistakes | 0.500 ± 0.177 | 0.000 ± 0.177 | 1 of 2 | 2 | 0.500 | 0.250 | 6 |",
        "| plain | 0.250 ± 0.000 | -0.250 ± 0.000 | 0 of 2 |  |  | 0.000 | 3 |",
        "| real | 0.750 ± 0.000 | 0.250 ± 0.000 | 2 of 2 | 4 |  | -0.250 | 3 |",
        "| Timaeus | 0.900 ± 0.000 |  |  |  |  |  |  |",
    ]


def test_runs_that_are_not_there_are_named(tmp_path, capsys):
    folder = tmp_path / "SST-2" / "200"
    for path in (folder, folder / "mistakes"):
        path.mkdir(parents=True)
        with pytest.raises(SystemExit):
            agora_table.main([str(folder)])
        assert f"{folder}: has no runs mistakes/draw-*" in capsys.readouterr().err
    for draw in (0, 1):
        write_method(folder / "mistakes", draw, 0.5, 0.5)
    write_method(folder / "random", 0, 0.5, 0.5)
    with pytest.raises(SystemExit):
        agora_table.main([str(folder)])
    assert str(folder / "random" / "draw-1") in capsys.readouterr().err


def test_a_run_that_has_not_finished_is_named(tmp_path, capsys):
    folder = tmp_path / "SST-2" / "200"
    write_method(folder / "mistakes", 0, 0.5, 0.5)
    path = folder / "mistakes" / "draw-0" / "SST-2" / "agora.json"
    content = read_json(str(path))
    del content["best"]
    write_json(str(path), content)
    with pytest.raises(SystemExit):
        agora_table.main([str(folder)])
    assert f"{path}: the run has not finished; rerun its command" in capsys.readouterr().err

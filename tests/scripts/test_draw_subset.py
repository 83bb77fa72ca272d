"""Small sets drawn from the official files: disjoint, readable as the task, the same by seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.tasks import get_task
from scripts import draw_subset

TEST_DATA = str(Path(__file__).resolve().parents[2] / "test_data")


def arguments(tmp_path, task="SST-2", **sizes):
    sizes = {"train": 3, "dev": 2, "test": 2, "timaeus_train": 2, "timaeus_dev": 1, **sizes}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return ["--task_name", task, "--data_dir", TEST_DATA, "--output_dir", str(tmp_path), *flags]


def inputs(task, folder, *splits):
    return [one.inputs for split in splits for one in get_task(task).read(folder, split).examples]


@pytest.mark.parametrize("task", ["SST-2", "CoLA", "STS-B", "CB"])
def test_the_sets_are_rows_of_the_task_and_share_none(tmp_path, task):
    sizes = {"timaeus_train": 1, "dev": 1, "test": 1} if task == "CB" else {}
    files = draw_subset.main(arguments(tmp_path, task, draws=2, **sizes))
    assert len(files) == len(set(files)) == 8
    known = {
        one.inputs: one.label
        for split in ("train", "dev")
        for one in get_task(task).read(TEST_DATA, split).examples
    }
    labeller = inputs(task, tmp_path / "timaeus", "train", "dev")
    hidden = [inputs(task, tmp_path / f"draw-{draw}", "test") for draw in range(2)]
    assert hidden[0] == hidden[1]
    for draw in range(2):
        drawn = inputs(task, tmp_path / f"draw-{draw}", "train", "dev")
        every = [*labeller, *hidden[0], *drawn]
        assert len(set(every)) == len(every)
        for split in ("train", "dev", "test"):
            for one in get_task(task).read(tmp_path / f"draw-{draw}", split).examples:
                assert known[one.inputs] == one.label


def test_the_seed_decides_and_draws_differ(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw_subset.main(arguments(tmp_path / name, draws=2, seed=seed))
    tables = {
        (name, draw): inputs("SST-2", tmp_path / name / f"draw-{draw}", "train", "dev", "test")
        for name in "abc"
        for draw in (0, 1)
    }
    assert tables["a", 0] == tables["b", 0] != tables["c", 0]
    assert tables["a", 0] != tables["a", 1]


def test_of_equal_rows_one_is_drawn(tmp_path):
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "same text\t1\n" * 9 + "other\t0\n")
    (folder / "dev.tsv").write_text("sentence\tlabel\nthird\t0\nsame text\t1\n")
    pool = draw_subset.read_pool(get_task("SST-2"), str(tmp_path))
    assert pool.lines == [b"same text\t1", b"other\t0", b"third\t0"]


@pytest.mark.parametrize(
    ("task", "sizes", "message"),
    [
        ("SST-2", {"train": 100}, "SST-2: the sets need 107 rows, there are 12 with different"),
        ("MultiRC", {}, "has not one line for each example"),
        ("AX-b", {}, "--task_name AX-b: has no training set to draw from"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, task, sizes, message):
    with pytest.raises(SystemExit):
        draw_subset.main(arguments(tmp_path / "out", task, **sizes))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

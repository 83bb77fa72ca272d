"""Small sets drawn from the official files: disjoint, readable as the task, the same by seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bort.files import lock_folder
from bort.sums import check_sums
from data import subset
from data.tasks import get_task, task_names
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


def test_sums_that_a_kill_prevented_are_written_by_the_next_run(tmp_path):
    for _ in range(2):
        draw_subset.main(arguments(tmp_path))
        for folder in ("draw-0", "timaeus"):
            (sums,) = (tmp_path / folder).rglob("SHA256SUMS")
            check_sums(str(sums.parent))
            sums.unlink()


def test_what_a_killed_draw_left_is_removed_from_the_folder_of_every_set(tmp_path):
    draw_subset.main(arguments(tmp_path, draws=2))
    before = sorted(tmp_path.rglob("*"))
    for each in tmp_path.rglob("train.tsv"):
        (each.parent / f".train.tsv.{2**31:08x}00000000.tmp").touch()
    draw_subset.main(arguments(tmp_path, draws=2))
    assert sorted(tmp_path.rglob("*")) == before


def test_two_draws_into_one_folder_do_not_mix(tmp_path, capsys):
    with lock_folder(str(tmp_path / "draw-0" / "glue" / "SST-2")), pytest.raises(SystemExit):
        draw_subset.main(arguments(tmp_path))
    assert "glue/SST-2: process" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tsv"))
    draw_subset.main(arguments(tmp_path))


def test_of_equal_rows_one_is_drawn(tmp_path):
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "same text\t1\n" * 9 + "other\t0\n")
    (folder / "dev.tsv").write_text("sentence\tlabel\nthird\t0\nsame text\t1\n")
    pool = subset.read_pool(get_task("SST-2"), str(tmp_path), ("train", "dev"))
    assert pool.lines == [b"same text\t1", b"other\t0", b"third\t0"]


@pytest.mark.parametrize(
    ("task", "sizes", "message"),
    [
        ("SST-2", {"train": 100}, "SST-2: the sets need 107 rows, there are 12 with different"),
        ("RACE-H", {}, "is a folder; draw from a task with one file per set"),
        ("MNLI", {"train": 1, "dev": 1}, "MNLI: the sets need 4 rows of dev_mismatched, there"),
        ("AX-b", {}, "--task_name AX-b: has no training set to draw from"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, task, sizes, message):
    with pytest.raises(SystemExit):
        draw_subset.main(arguments(tmp_path / "out", task, **sizes))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ONE = {"train": 1, "dev": 1, "test": 1, "timaeus_train": 0, "timaeus_dev": 0}


@pytest.mark.parametrize(
    "name", [n for n in task_names() if get_task(n).train and get_task(n).suite != "race"]
)
def test_every_task_reads_its_subset(tmp_path, name):
    files = draw_subset.main(arguments(tmp_path, name, **ONE))
    task = get_task(name)
    assert len(files) == len(task.splits)
    for split in task.splits:
        examples = task.read(tmp_path / "draw-0", split).examples
        assert all(example.label is not None for example in examples)
        path = task.find(tmp_path / "draw-0", split)
        assert str(path) in files
        assert not path.with_suffix(".tmp").exists()


@pytest.mark.parametrize("name", ["ReCoRD", "MultiRC"])
def test_questions_of_the_train_and_dev_files_are_kept_apart(tmp_path, name):
    """Both files count from 0, and the answers to a question are found by its index."""
    folder = tmp_path / name
    folder.mkdir()
    rows = 0
    for split in ("train", "val"):
        lines = (Path(TEST_DATA) / "superglue" / name / f"{split}.jsonl").read_text("utf-8")
        numbered = [json.loads(line) for line in lines.splitlines() * 3]
        for number, row in enumerate(numbered):
            row["idx"] = number
            row["passage"]["text"] += f" {split} {number}"
        for number, query in enumerate(q for row in numbered for q in row.get("qas", [])):
            query["idx"] = number
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, numbered)), "utf-8")
        rows += len(numbered)
    line = arguments(tmp_path / "out", name, **{**ONE, "test": rows - 2})
    line[line.index(TEST_DATA)] = str(tmp_path)
    drawn = draw_subset.main(line)[-1]
    questions = [
        question
        for row in map(json.loads, Path(drawn).read_text("utf-8").splitlines())
        for question in (row.get("qas") or row["passage"]["questions"])
    ]
    examples = get_task(name).read(tmp_path / "out" / "draw-0", "test").examples
    groups = {example.uid[: 1 if name == "ReCoRD" else 2] for example in examples}
    assert len(groups) == len(questions)


def test_files_of_another_draw_are_kept(tmp_path, capsys):
    files = draw_subset.main(arguments(tmp_path))
    before = [Path(path).read_bytes() for path in files]
    assert draw_subset.main(arguments(tmp_path)) == files
    with pytest.raises(SystemExit):
        draw_subset.main([*arguments(tmp_path), "--seed", "5"])
    assert "is of another draw; name another --output_dir" in capsys.readouterr().err
    assert [Path(path).read_bytes() for path in files] == before


OFFICIAL_MNLI = {  # other columns in train and dev, as in the official files
    "train": "index genre sentence1 sentence2 label1 gold_label",
    "dev": "index genre label1 label2 sentence1 sentence2 label3 label4 label5 gold_label",
}


def test_dev_rows_of_mnli_have_the_columns_of_the_training_set(tmp_path):
    folder = tmp_path / "data" / "glue" / "MNLI"
    folder.mkdir(parents=True)
    for name, columns in (("train", "train"), ("dev_matched", "dev"), ("dev_mismatched", "dev")):
        header = OFFICIAL_MNLI[columns].split()
        lines = ["\t".join(header)]
        for row in range(6):
            values = {"index": row, "genre": name, "gold_label": "neutral"}
            values.update(sentence1=f"{name} {row}", sentence2="so")
            lines.append("\t".join(str(values.get(column, "x")) for column in header))
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    flags = arguments(tmp_path, "MNLI", train=5, dev=2, test=2, timaeus_train=2, timaeus_dev=1)
    flags[flags.index(TEST_DATA)] = str(tmp_path / "data")
    assert len(draw_subset.main(flags)) == 8
    task = get_task("MNLI")
    for root, split, rows in (
        ("timaeus", "dev_mismatched", 1),
        ("draw-0", "train", 5),
        ("draw-0", "dev_matched", 2),
        ("draw-0", "test_matched", 2),
        ("draw-0", "test_mismatched", 2),
    ):
        examples = task.read(tmp_path / root, split).examples
        assert len(examples) == rows
        genres = {example.inputs[0][0].split()[0] for example in examples}
        assert (genres == {"dev_mismatched"}) == split.endswith("_mismatched")
        assert {task.labels[example.label] for example in examples} == {"neutral"}


def test_nothing_remains_of_sets_that_do_not_read_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subset, "COLA_HEADER", b"sentence\tlabel")
    with pytest.raises(SystemExit):
        draw_subset.main(arguments(tmp_path, "CoLA"))
    assert "CoLA" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

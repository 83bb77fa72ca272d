"""The tables of the experiments on fine-tuning and on reduced precision, from made-up runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.experiments import finetuning_table, tricks_table


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def add_run(folder: Path, network: str, seed: int, accuracy: float, rate: str = "0.0003") -> None:
    metrics = {"accuracy": accuracy, "f1": accuracy + 0.1}
    content = {
        "task": "MRPC",
        "answers": {"dev": {"rows": 408, "metrics": metrics}, "test": {"rows": 1725}},
        "baseline": {"dev": {"accuracy": 0.684, "f1": 0.812}},
        "seconds": 90.0,
    }
    write(folder / network / f"MRPC-sweep/seed={seed},lr={rate}/MRPC/metrics.json", content)


def test_pretrained_and_random_weights_stand_side_by_side_without_seed_0(tmp_path, capsys):
    for seed, accuracy in ((0, 0.1), (1, 0.70), (2, 0.72), (3, 0.74)):
        add_run(tmp_path, "bert-tiny", seed, accuracy)
    add_run(tmp_path, "bert-tiny-random", 1, 0.6)
    add_run(tmp_path, "all-MiniLM-L6-v2", 1, 0.8)
    table = finetuning_table.main([str(tmp_path)])
    assert capsys.readouterr().out == table
    tiny = "| MRPC | bert-tiny | 0.0003 |"
    assert table.splitlines()[2:] == [
        "| MRPC | all-MiniLM-L6-v2 | 0.0003 | accuracy | 80.0 | - | 68.4 | - | 1 / 0 | 1.5 |",
        "| MRPC | all-MiniLM-L6-v2 | 0.0003 | f1 | 90.0 | - | 81.2 | - | 1 / 0 | 1.5 |",
        f"{tiny} accuracy | 72.0 ± 2.0 | 60.0 | 68.4 | 71.1 | 3 / 1 | 1.5 ± 0.0 |",
        f"{tiny} f1 | 82.0 ± 2.0 | 70.0 | 81.2 | 81.1 | 3 / 1 | 1.5 ± 0.0 |",
    ]


def test_runs_at_another_rate_have_their_own_row(tmp_path):
    for seed, accuracy in ((1, 0.70), (2, 0.72)):
        add_run(tmp_path, "bert-tiny", seed, accuracy)
        add_run(tmp_path, "bert-tiny", seed, accuracy - 0.2, rate="0.001")
    rows = finetuning_table.main([str(tmp_path)]).splitlines()[2:]
    assert [row[:48] for row in rows if "accuracy" in row] == [
        "| MRPC | bert-tiny | 0.0003 | accuracy | 71.0 ± ",
        "| MRPC | bert-tiny | 0.001 | accuracy | 51.0 ± 1",
    ]


def test_seed_10_is_not_seed_0(tmp_path):
    add_run(tmp_path, "bert-tiny", 10, 0.7)
    assert "70.0" in finetuning_table.main([str(tmp_path)])


def add_best(folder: Path, run: str, score: float, weights: bool = True) -> Path:
    """Write a run of the sweep of MRPC with this score; returns its folder."""
    path = folder / "bert-tiny/MRPC-sweep" / run / "MRPC"
    write(path / "metrics.json", {"best": {"score": score}, "seconds": 1.0})
    if weights:
        (path / "best.params").touch()
    return path


def test_tricks_take_the_best_of_several_grids_without_seed_0(tmp_path, capsys):
    for run, score in (("lr=0.001,seed=0", 0.9), ("seed=0,lr=0.001", 0.9), ("seed=1,lr=0.1", 0.6)):
        add_best(tmp_path, run, score)
    best = add_best(tmp_path, "seed=10,lr=0.001", 0.7)
    earlier = add_best(tmp_path, "seed=2,lr=0.001", 0.65, weights=False)
    (best.parents[1] / "seed=3,lr=0.001/MRPC").mkdir(parents=True)
    (best.parents[1] / "seed=3,lr=0.001/MRPC/best.params").touch()  # still training
    tricks_table.main(["--best", str(tmp_path / "bert-tiny/MRPC-sweep")])
    assert capsys.readouterr().out == f"{best}/best.params\n"
    for folder, score in ((best, 70.0), (earlier, 65.0)):
        checks = [{"runtime": "mxnet", "score": score, "cosine": 1.0}]
        write(folder / "int8/best.json", {"checks": checks})
    rows = tricks_table.main([str(tmp_path)]).splitlines()[2:]
    assert rows == ["| bert-tiny | MRPC | mxnet | 70.00 | 0.00 | 1.00000 |"]


def test_the_points_that_a_runtime_loses_are_those_below_mxnet_in_float32(tmp_path):
    checks = [
        {"runtime": "mxnet", "score": 80.0, "cosine": 1.0},
        {"runtime": "onnx-int8", "score": 79.25, "cosine": 0.99},
    ]
    path = tmp_path / "bert-tiny/STS-B-sweep/seed=1,lr=0.0003/STS-B"
    write(path / "metrics.json", {"best": {"score": 0.8}, "seconds": 1.0})
    (path / "best.params").touch()
    write(path / "int8/best.json", {"checks": checks})
    assert tricks_table.main([str(tmp_path)]).splitlines()[2:] == [
        "| bert-tiny | STS-B | mxnet | 80.00 | 0.00 | 1.00000 |",
        "| bert-tiny | STS-B | onnx-int8 | 79.25 | 0.75 | 0.99000 |",
    ]


@pytest.mark.parametrize("table", [finetuning_table, tricks_table])
def test_a_folder_without_runs_is_named(table, tmp_path, capsys):
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "nothing")])
    assert "nothing: has no" in capsys.readouterr().err

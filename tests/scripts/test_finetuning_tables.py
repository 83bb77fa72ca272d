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


def add_run(folder: Path, network: str, seed: int, accuracy: float) -> None:
    metrics = {"accuracy": accuracy, "f1": accuracy + 0.1}
    content = {
        "task": "MRPC",
        "answers": {"dev": {"rows": 408, "metrics": metrics}, "test": {"rows": 1725}},
        "baseline": {"dev": {"accuracy": 0.684, "f1": 0.812}},
        "seconds": 90.0,
    }
    write(folder / network / f"MRPC-sweep/seed={seed},lr=0.0003/MRPC/metrics.json", content)


def test_pretrained_and_random_weights_stand_side_by_side_without_seed_0(tmp_path, capsys):
    for seed, accuracy in ((0, 0.1), (1, 0.70), (2, 0.72), (3, 0.74)):
        add_run(tmp_path, "bert-tiny", seed, accuracy)
    add_run(tmp_path, "bert-tiny-random", 1, 0.6)
    add_run(tmp_path, "all-MiniLM-L6-v2", 1, 0.8)
    table = finetuning_table.main([str(tmp_path)])
    assert capsys.readouterr().out == table
    assert table.splitlines()[2:] == [
        "| MRPC | all-MiniLM-L6-v2 | accuracy | 80.0 | - | 68.4 | - | 1 / 0 | 1.5 |",
        "| MRPC | all-MiniLM-L6-v2 | f1 | 90.0 | - | 81.2 | - | 1 / 0 | 1.5 |",
        "| MRPC | bert-tiny | accuracy | 72.0 ± 2.0 | 60.0 | 68.4 | 71.1 | 3 / 1 | 1.5 ± 0.0 |",
        "| MRPC | bert-tiny | f1 | 82.0 ± 2.0 | 70.0 | 81.2 | 81.1 | 3 / 1 | 1.5 ± 0.0 |",
    ]


def test_seed_10_is_not_seed_0(tmp_path):
    add_run(tmp_path, "bert-tiny", 10, 0.7)
    assert "70.0" in finetuning_table.main([str(tmp_path)])


def test_the_points_that_a_runtime_loses_are_those_below_mxnet_in_float32(tmp_path):
    checks = [
        {"runtime": "mxnet", "score": 80.0, "cosine": 1.0},
        {"runtime": "onnx-int8", "score": 79.25, "cosine": 0.99},
    ]
    path = tmp_path / "bert-tiny/STS-B-sweep/seed=1,lr=0.0003/STS-B/int8/best.json"
    write(path, {"checks": checks})
    assert tricks_table.main([str(tmp_path)]).splitlines()[2:] == [
        "| bert-tiny | STS-B | mxnet | 80.00 | 0.00 | 1.00000 |",
        "| bert-tiny | STS-B | onnx-int8 | 79.25 | 0.75 | 0.99000 |",
    ]


@pytest.mark.parametrize("table", [finetuning_table, tricks_table])
def test_a_folder_without_runs_is_named(table, tmp_path, capsys):
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "nothing")])
    assert "nothing: has no" in capsys.readouterr().err

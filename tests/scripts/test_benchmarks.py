from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from bort.errors import UserError
from data.shards import open_shards

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_random_shards_are_full_and_the_same_each_time(tmp_path: Path) -> None:
    from benchmarks.workers import write_shards

    for name in ("one", "two"):
        write_shards(str(tmp_path / name), 2, sequences=7, length=20, vocab_size=100)
    shards = open_shards(str(tmp_path / "one"))
    np.testing.assert_array_equal(shards.lengths, [20] * 14)
    for index in range(14):
        ids, positions, labels = shards.sequence(index)
        assert 5 <= ids.min() <= ids.max() < 100
        assert len(positions) == len(labels) == 3
        assert (np.diff(positions) > 0).all()
        assert positions[-1] < 20
    assert shards.manifest.shards == open_shards(str(tmp_path / "two")).manifest.shards


@pytest.mark.parametrize(("cores", "sequences"), [(2, 8), (6, 12), (64, 64)])
def test_any_number_of_cores_divides_the_sequences_of_an_update(
    monkeypatch: pytest.MonkeyPatch, cores: int, sequences: int
) -> None:
    from benchmarks import workers

    given = {}

    def started(processes: int, flags: dict[str, Any]) -> None:
        given[processes] = flags["batch_size"]

    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.setattr(workers, "write_shards", lambda *_: None)
    monkeypatch.setattr(workers, "start_training", started)
    monkeypatch.setattr(workers, "require_success", lambda *_: None)
    monkeypatch.setattr(workers, "metric_lines", lambda _: [{"tokens_per_second": 1.0}] * 2)
    assert workers.main([]) == {1: 1.0, cores: 1.0}
    assert given == {1: sequences, cores: sequences // cores}
    with pytest.raises(UserError, match=f"--batch_size 7: not divisible by the {cores} cores; giv"):
        workers.main(["--batch_size", "7"])


def test_a_process_left_behind_is_found() -> None:
    from benchmarks.starvation import _family, _private_memory, _still_there

    code = "import subprocess; child = subprocess.Popen(['sleep', '60'], stdout=-3)"
    command = [sys.executable, "-c", f"{code}; print(child.pid, flush=True); input()"]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        family = _family(parent.pid)
        assert {process.pid for process in family} == {parent.pid, child}
        assert 1 < _private_memory(family) < 500
        parent.communicate("\n")
        assert [process.pid for process in _still_there(family, patience=0.1)] == [child]
    finally:
        os.kill(child, 9)
    assert not _still_there(family)


def test_a_cluster_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import cluster

    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such option >&2\nexit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    said = r"did not start: .*no such option"
    with pytest.raises(UserError, match=said), cluster._cluster(str(tmp_path), 2):
        pass


def test_a_run_that_is_over_before_its_memory_is_measured_is_named() -> None:
    from benchmarks.starvation import peak

    samples = [(0.1, 5.0), (0.2, 7.0), (0.5, 9.0)]
    assert peak(samples, 0.1, 0.3) == 7
    with pytest.raises(UserError, match="--passes: the run was over before"):
        peak(samples, 0.8, 1)


def test_the_work_of_a_step_is_that_of_its_products() -> None:
    from benchmarks._peers import decoder_flops, encoder_flops

    # One layer of 8 units, 16 in the feed-forward layer, 6 tokens in sequences of 3, 2 at the end.
    keys_and_values = 6 * 2 * (2 * 8 * 8)
    rest = 2 * (2 * (2 * 8 * 8) + 2 * (2 * 8 * 16) + 2 * (2 * 3 * 8))
    assert encoder_flops("bort_1_2_16_8", tokens=6, length=3, last=2) == keys_and_values + rest
    whole = keys_and_values + 3 * rest  # a layer below is computed for all 6
    assert encoder_flops("bort_2_2_16_8", 6, 3, 2) == whole + keys_and_values + rest
    assert decoder_flops(8, vocab_size=50, positions=3) == 3 * 2 * 8 * (8 + 50)


@pytest.mark.parametrize("model", ["bort_4_8_768_1024", "bort_1_2_32_16"])
def test_a_step_of_fine_tuning_updates_the_parameters_of_its_model(model: str) -> None:
    from benchmarks.finetuning import LABELS, FinetuningBenchmarkSettings, _work

    from bort.saved_model import ModelConfig, build_network

    config = ModelConfig(model, 100, "random", "classification", "SST-2", LABELS, 2)
    parameters = build_network(config, dropout=0.1).collect_params().values()
    trained = sum(np.prod(each.shape) for each in parameters if each.grad_req != "null")
    assert _work(FinetuningBenchmarkSettings(model, vocab_size=100)).parameters == trained


@pytest.mark.parametrize("batch_size", [8, 48, 128])
def test_every_step_of_fine_tuning_that_is_measured_is_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    from benchmarks.finetuning import FinetuningBenchmarkSettings, our_step

    from bort.finetuning.run import ClassificationStep

    rows, to_device = [], ClassificationStep.to_device

    def noted(self: ClassificationStep, batch: Any, device: Any) -> Any:
        rows.append(len(batch.indices))
        return to_device(self, batch, device)

    monkeypatch.setattr(ClassificationStep, "to_device", noted)
    settings = FinetuningBenchmarkSettings("bort_1_2_16_16", batch_size, length=8, vocab_size=100)
    step = our_step(settings, str(tmp_path))
    for _ in range(3):
        step()
    assert set(rows) == {batch_size}


def test_steps_of_pytorch_are_of_the_model_that_is_fine_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import finetuning

    given, python = tmp_path / "given", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >{given}\nwhile read -r _; do echo 1; done\n')
    python.chmod(0o755)
    monkeypatch.setattr(finetuning, "print_floors", lambda *_: None)
    flags = ["--model", "bort_1_2_16_8", "--batch_size", "2", "--length", "8", "--repeats", "1"]
    finetuning.main([*flags, "--vocab_size", "100", "--pytorch", str(python)])
    assert given.read_text().endswith(" --model 1,2,16,8\n")


def test_steps_of_pytorch_are_of_the_student_and_the_teacher_that_are_distilled() -> None:
    from benchmarks.distillation import DistillationBenchmarkSettings, _commands_apart

    settings = DistillationBenchmarkSettings(no_original=True, pytorch="python")
    for name, shape in {"roberta_12_768_12": "12,12,3072,768", "bort_2_2_16_8": "2,2,16,8"}.items():
        ((_, command, _),) = _commands_apart(name, name, settings)
        assert command[-4:] == ["--model", "4,8,768,1024", "--teacher", shape]


def test_a_shape_is_that_of_pytorchs_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch", "torch.nn", "transformers"):
        monkeypatch.setitem(sys.modules, module, mock.MagicMock(RobertaConfig=dict))
    monkeypatch.delitem(sys.modules, "benchmarks._pytorch", raising=False)
    from benchmarks import _pytorch

    monkeypatch.delitem(sys.modules, "benchmarks._pytorch")
    config = _pytorch.config_of("6,12,1536,384", 30522)
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (6, 12)
    assert (config["intermediate_size"], config["hidden_size"]) == (1536, 384)


def test_a_process_that_ends_instead_of_making_a_step_is_named() -> None:
    from benchmarks._peers import step_apart

    command = [sys.executable, "-c", "print(float(input() or 2), flush=True)"]
    with step_apart(command, threads=1) as step:
        assert step() == 2
        with pytest.raises(UserError, match="has ended instead of making a step"):
            step()


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("finetuning", ["--dtypes", "float99"], "--dtypes: float99 unknown; float32, bfloat16"),
        ("distillation", ["--dtypes", "float32,float99"], "--dtypes: float99 unknown"),
        (
            "distillation",
            ["--pytorch", "/absent/python"],
            "--pytorch /absent/python: is no program",
        ),
        ("distillation", ["--teachers", "roberta_12_768_12,x"], "model name 'x'"),
    ],
)
def test_what_there_is_not_is_named_before_anything_is_measured(
    name: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmark import main

    with pytest.raises(SystemExit):
        main([name, *flags])
    assert message in capsys.readouterr().err


def test_parts_of_benchmarks_are_no_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmark import main

    with pytest.raises(SystemExit):
        main(["_peers"])
    assert "invalid choice: '_peers'" in capsys.readouterr().err


def test_an_error_says_where_the_flags_of_a_benchmark_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmark import main

    monkeypatch.setattr(sys, "argv", ["scripts/benchmark.py", "data"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.endswith("(see benchmark.py data --help)\n")


@pytest.mark.slow  # 20 s: a text that is long enough to grow with
@pytest.mark.cluster
def test_memory_of_command_and_scheduler_does_not_grow_with_the_text() -> None:
    pytest.importorskip("distributed")
    from benchmarks.cluster import main

    text = SCRIPTS.parent / "test_data" / "sample_text.txt"
    flags = ["--input_file", str(text), "--megabytes", "1,20", "--shard_megabytes", "10"]
    small, large = main([*flags, "--workers", "2"])
    for column in (-2, -1):  # peak MB of the command, of the scheduler
        assert 0 < float(large[column]) < float(small[column]) + 8


def test_the_text_of_a_benchmark_is_plain_whatever_its_format(tmp_path: Path) -> None:
    from benchmarks.data import write_text

    from data.text_formats import TextSource

    rows, target = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    rows.write_text('{"text": "One.\\nTwo."}\n{"text": "\\u00e9\\u00e9"}\n', encoding="utf-8")
    write_text([TextSource(str(rows))], 18, str(target))
    assert target.read_text(encoding="utf-8") == "One.\nTwo.\n\néé\n\nO"


def test_the_text_for_a_cluster_is_cut_between_characters(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    from benchmarks.cluster import _write_text

    text = tmp_path / "in.txt"
    text.write_text(f"x{'é' * 300_000}y", encoding="utf-8")
    _write_text(str(tmp_path), str(text), megabytes=1)
    last = (tmp_path / "text" / "0001.txt").read_text(encoding="utf-8")
    assert last == f"x{'é' * 199_998}"

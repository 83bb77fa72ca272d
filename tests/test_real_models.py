"""Training from real pretrained BERTs, which scripts/experiments/fetch_weights.sh fetches."""

from __future__ import annotations

from pathlib import Path

import pytest

import create_pretraining_data
import finetune_classifier
import run_pretraining_distillation
from bort.files import read_json
from scripts.convert_from_huggingface import main as convert
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Convert the three models; returns the folder of the saved models."""
    pretrained = ROOT / "model" / "pretrained"
    if not pretrained.exists():
        pytest.skip("scripts/experiments/fetch_weights.sh fetches the real models")
    folder = tmp_path_factory.mktemp("models")
    for source in sorted(pretrained.iterdir()):
        convert([str(source), "--output", str(folder / source.name)])
    return folder


def test_minilm_learns_sst_2(models, shared, tmp_path):
    finetune_classifier.main([
        "--task_name=SST-2", f"--data_dir={shared / 'data' / 'glue'}", "--train_rows=2000",
        f"--pretrained_parameters={models / 'paraphrase-MiniLM-L3-v2'}", "--epochs=1",
        "--batch_size=16", "--lr=1e-4", "--max_len=64", f"--output_dir={tmp_path / 'run'}",
        f"--cache_dir={tmp_path / 'encoded'}",
    ])  # fmt: skip
    metrics = read_json(str(tmp_path / "run" / "SST-2" / "metrics.json"))
    assert metrics["best"]["accuracy"] >= 0.75


def test_bert_tiny_is_a_student_of_minilm(models, tmp_path):
    """Its masked-LM loss falls; the teacher has another hidden size and the same vocabulary."""
    create_pretraining_data.main([
        f"--input_file={ROOT / 'test_data' / 'sample_text.txt'}", "--max_seq_length=64",
        f"--output_dir={tmp_path / 'shards'}", "--num_workers=1", "--dupe_factor=5",
        f"--vocab_file={ROOT / 'model' / 'pretrained' / 'all-MiniLM-L6-v2' / 'vocab.txt'}",
    ])  # fmt: skip
    first, last = run_pretraining_distillation.main([
        f"--data={tmp_path / 'shards'}", f"--data_eval={tmp_path / 'shards'}",
        "--student_model=bort_2_2_512_128", f"--student_parameters={models / 'bert-tiny'}",
        "--teacher_model=bort_3_12_1536_384", "--num_steps=30", "--eval_interval=30",
        f"--teacher_ckpt_dir={models / 'paraphrase-MiniLM-L3-v2'}",
        f"--ckpt_dir={tmp_path / 'run'}",
    ])  # fmt: skip
    assert last["mlm_loss"] < first["mlm_loss"] - 0.5
    assert last["kl"] < first["kl"]

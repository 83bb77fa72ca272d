"""--dynamic_masking and --no_verify: what a run trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import create_pretraining_data
from bort.errors import UserError
from data.shards import MANIFEST_FILE, shard_name
from tests.conftest import ROOT
from tests.pretraining.helpers import digest, finished_run, make_run, metrics
from tests.pretraining.test_run import run_killed_at


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train/, shards of the sample text with their tokenizer."""
    folder = tmp_path_factory.mktemp("dynamic")
    text = folder / "a.txt"
    sample = (ROOT / "test_data" / "sample_text.txt").read_text(encoding="utf-8")
    text.write_text("\n\n".join(sample.split("\n\n")[:2]), encoding="utf-8")
    create_pretraining_data.main(
        [f"--input_file={text}", f"--output_dir={folder / 'train'}", "--max_seq_length=32",
         "--num_workers=1"]
    )  # fmt: skip
    return folder


def test_a_resumed_run_has_the_masks_of_an_uninterrupted_one(data, tmp_path):
    per_epoch = make_run(data).job.stream.source.batches_per_epoch
    flags = {"dynamic_masking": True, "num_steps": 2 * per_epoch, "ckpt_interval": 3}
    uninterrupted = finished_run(data, ckpt_dir=tmp_path / "uninterrupted", **flags)
    run_killed_at(data, tmp_path / "resumed", per_epoch + 2, **flags)
    resumed = finished_run(data, ckpt_dir=tmp_path / "resumed", resume=True, **flags)
    assert digest(resumed) == digest(uninterrupted)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "uninterrupted")
    fixed = finished_run(data, ckpt_dir=tmp_path / "fixed", **{**flags, "dynamic_masking": False})
    assert digest(fixed) != digest(uninterrupted)


def test_the_flag_cannot_change_when_a_run_is_resumed(data, tmp_path):
    finished_run(data, ckpt_dir=tmp_path, num_steps=1)
    with pytest.raises(UserError, match="--dynamic_masking True: the checkpoint was made with Fal"):
        finished_run(data, ckpt_dir=tmp_path, num_steps=2, resume=True, dynamic_masking=True)


def test_it_is_refused_with_a_teacher_cache(data, tmp_path):
    with pytest.raises(UserError, match="--dynamic_masking: not with --teacher_cache"):
        make_run(data, teacher_cache=tmp_path, dynamic_masking=True)


def test_no_verify_reads_no_shard_but_refuses_a_wrong_id(data, tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.sha256_of", lambda path: pytest.fail("read"))
    make_run(data, no_verify=True)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    content = bytearray((data / "train" / shard_name(0)).read_bytes())
    start = content.index(b"\n", content.index(b"input_ids.npy")) + 1
    content[start + 2 : start + 4] = np.uint16(65535).tobytes()
    (damaged / shard_name(0)).write_bytes(content)
    (damaged / MANIFEST_FILE).write_text((data / "train" / MANIFEST_FILE).read_text())
    run = make_run(data, data=damaged, no_verify=True, ckpt_dir=tmp_path / "run", num_steps=20)
    with pytest.raises(UserError, match="holds an id or a position out of range"):
        run.run()
    monkeypatch.undo()
    with pytest.raises(UserError, match="its SHA-256 is not the manifest's"):
        make_run(data, data=damaged)

"""Fine-tuning on two ranks under Horovod, against one rank that sees the same global batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.finetuning.helpers import arguments, finetuned, write_reviews
from tests.pretraining.helpers import assert_same_training, horovodrun

pytestmark = pytest.mark.distributed

# 13 batches an epoch: the last update has one for rank 0 and none for rank 1.
FLAGS = {"batch_size": 5, "num_buckets": 1, "epochs": 3, "dropout": 0.1, "lr": 0.001}


def weights(folder: Path) -> dict[str, np.ndarray]:
    from mxnet import nd

    stored = nd.load(str(folder / "best.params"))
    return {name: array.asnumpy() for name, array in stored.items()}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def one_rank(reviews, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    found = finetuned(reviews, folder, accumulate=2, **FLAGS)
    return folder / "SST-2", found


def test_two_ranks_train_like_one_that_accumulates(reviews, tmp_path, one_rank):
    said = horovodrun(2, "python", "finetune_classifier.py", *arguments(reviews, tmp_path, **FLAGS))
    folder, expected = one_rank
    two = tmp_path / "SST-2"
    assert_same_training(folder, weights(folder), two, weights(two))
    found = json.loads((two / "metrics.json").read_text(encoding="utf-8"))
    for key in ("rows", "steps", "baseline", "train_examples"):
        assert found[key] == expected[key]
    assert [one["step"] for one in found["history"]] == [7, 14, 21]
    assert found["answers"]["dev"]["metrics"] == expected["answers"]["dev"]["metrics"]
    assert (two / "SST-2.tsv").read_text() == (folder / "SST-2.tsv").read_text()
    # Only rank 0 prints.
    assert "[1]<stdout>" not in said


def test_two_ranks_predict_what_one_does(reviews, tmp_path, one_rank):
    folder, _ = one_rank
    flags = {"only_inference": True, "model_parameters": folder, "model_name": None}
    horovodrun(2, "python", "finetune_classifier.py", *arguments(reviews, tmp_path, **flags))
    scores = []
    for place in (folder, tmp_path / "SST-2"):
        lines = (place / "dev_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        scores.append([json.loads(line)["scores"] for line in lines])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    assert (tmp_path / "SST-2" / "SST-2.tsv").read_text() == (folder / "SST-2.tsv").read_text()

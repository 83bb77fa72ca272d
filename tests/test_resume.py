"""Flags recorded in a folder against flags given: what is the same, and what is named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Optional

import pytest

from bort.config import option
from bort.resume import changed_flags


@dataclass(frozen=True)
class Flags:
    data_dir: Optional[str] = option(None, "data")
    lr: float = option(1e-3, "rate")
    epochs: int = option(3, "epochs")
    timaeus: Optional[str] = option(None, "a model")


def test_changed_flags_are_named_and_free_ones_are_not():
    recorded = {"data_dir": None, "lr": 0.1, "epochs": 3, "removed": 1}
    assert changed_flags(recorded, [Flags(epochs=4)]) == ["--lr", "--epochs"]
    assert changed_flags(recorded, [Flags(epochs=4)], free=("lr", "epochs")) == []


def test_a_flag_that_was_not_recorded_had_its_default():
    assert changed_flags({}, [Flags()]) == []
    assert changed_flags({}, [Flags(lr=0.1)]) == ["--lr"]


@pytest.mark.parametrize("given", ["data", "data/", "./data", "x/../data", "{root}/data", "link"])
def test_a_path_may_be_spelled_in_any_way(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "x").mkdir()
    os.symlink("data", "link")
    flags = [Flags(data_dir=given.format(root=tmp_path))]
    assert changed_flags({"data_dir": "data"}, flags) == []
    assert changed_flags({"data_dir": "x"}, flags) == ["--data_dir"]
    assert changed_flags({"data_dir": None}, flags) == ["--data_dir"]


def test_a_path_may_have_moved_but_keeps_its_name(tmp_path):
    (tmp_path / "data").mkdir()
    moved = [Flags(data_dir=str(tmp_path / "data"))]
    assert changed_flags({"data_dir": "/missing/data"}, moved) == []
    assert changed_flags({"data_dir": "/missing/other"}, moved) == ["--data_dir"]


def test_a_model_may_be_named_by_its_file_or_its_folder(tmp_path):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "best.params"
    file.touch()
    assert changed_flags({"timaeus": str(file)}, [Flags(timaeus=f"{tmp_path}/model/")]) == []
    other = [Flags(timaeus=str(tmp_path))]
    assert changed_flags({"timaeus": str(file)}, other) == ["--timaeus"]

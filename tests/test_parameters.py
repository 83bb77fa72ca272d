"""Parameter files: which one a path means, and what is in it."""

from __future__ import annotations

import errno
import os
import re
import resource
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mxnet import nd

from bort import checkpoint
from bort.bort import BortModel, get_bort_model
from bort.errors import UserError
from bort.parameters import (
    fixed_parameter_file,
    parameter_file,
    read_arrays,
    save_parameters,
)


def save_checkpoint(folder: Path, model: Any, step: int = 1, fingerprint: str = "f1") -> Path:
    """Write a checkpoint as the pretraining program does."""
    folder.mkdir(exist_ok=True)
    write = partial(save_parameters, model)
    state = {"tokenizer_fingerprint": fingerprint}
    return Path(checkpoint.save(str(folder), step, write, {"mean.0": np.zeros(2)}, state))


@pytest.mark.parametrize("limit", [100, 5000, 20_000])
def test_a_full_disk_is_reported_without_mxnets_stack(
    tiny_model: BortModel, tmp_path: Path, limit: int
) -> None:
    path = str(tmp_path / "x.params")
    save_parameters(tiny_model, path)
    assert os.path.getsize(path) > 20_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            save_parameters(tiny_model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == path


def test_a_folder_whose_name_is_not_utf8_is_written_to(
    tiny_model: BortModel, tmp_path: Path
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd \xff"))
    folder.mkdir()
    path = str(folder / "x.params")
    save_parameters(tiny_model, path)
    assert read_arrays(path)["encoder.position_weight"].shape == (
        tiny_model.encoder.position_weight.shape
    )


# ---- which file --------------------------------------------------------------------------------


def test_the_same_file_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "roberta.params"
    path.touch()
    assert parameter_file(str(path)) == str(path)


def test_a_folder_with_one_parameter_file_is_accepted_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "with [brackets]"
    folder.mkdir()
    (folder / "vocab.json").touch()
    (folder / "roberta.params").touch()
    assert parameter_file(str(folder)) == str(folder / "roberta.params")


def test_a_parameter_file_that_stays_when_its_run_goes_on(
    tiny_model: BortModel, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = save_checkpoint(run, tiny_model) / "model.params"
    link = tmp_path / "link"
    link.symlink_to(first.parent, target_is_directory=True)
    for path in (run, link, run / "checkpoint_last", first):
        assert fixed_parameter_file(str(path)) == str(first)
    assert parameter_file(str(run)) == str(first), "what is beside it is of the same checkpoint"
    stored, model = tmp_path / "store" / "4f2a", tmp_path / "model"
    stored.parent.mkdir()
    stored.touch()
    model.mkdir()
    (model / "best.params").symlink_to(stored)  # best.json is beside the link
    assert fixed_parameter_file(str(model)) == str(model / "best.params")


def test_several_parameter_files_are_listed_not_guessed(tmp_path: Path) -> None:
    for name in ("b.params", "a.params"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"several parameter files \(a\.params, b\.params\)"):
        parameter_file(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "holds no parameters (*.params); name a model, a checkpoint or a run"),
        ("absent", "not found"),
    ],
)
def test_no_parameter_file_is_a_user_error(name: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(UserError) as caught:
        parameter_file(str(path))
    assert str(caught.value) == f"{path}: {said}"


def test_the_folder_of_a_task_is_named_to_who_gives_that_of_all(tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "best.params").touch()
    with pytest.raises(UserError, match=rf"no parameters .*; name {tmp_path}/SST-2$"):
        parameter_file(str(tmp_path))


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_model_of_hugging_face_is_to_be_converted(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"convert its folder first, with scripts/convert_from_h"):
        parameter_file(str(tmp_path / name))


def test_an_onnx_file_is_no_parameter_file(tmp_path: Path) -> None:
    (tmp_path / "best.onnx").touch()
    with pytest.raises(
        UserError, match=r"best\.onnx: an ONNX file, not parameters; give the model"
    ):
        parameter_file(str(tmp_path / "best.onnx"))


def test_the_description_of_a_model_is_no_parameter_file(tmp_path: Path) -> None:
    (tmp_path / "best.json").touch()
    with pytest.raises(UserError, match=r"best\.json: describes a model; give its \.params file"):
        parameter_file(str(tmp_path / "best.json"))


def test_a_checkpoint_folder_is_accepted_as_a_model(tiny_model: BortModel, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model)
    assert parameter_file(str(path)) == str(path / "model.params")


def test_a_run_folder_is_accepted_for_its_newest_checkpoint(
    tiny_model: BortModel, tmp_path: Path
) -> None:
    for step in (1, 12):
        newest = save_checkpoint(tmp_path, tiny_model, step)
    assert Path(parameter_file(str(tmp_path))).resolve() == (newest / "model.params").resolve()


def test_a_damaged_checkpoint_is_refused(tiny_model: BortModel, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model)
    content = bytearray((path / "model.params").read_bytes())
    content[-1] ^= 1
    (path / "model.params").write_bytes(content)
    for given in (path, tmp_path):
        with pytest.raises(UserError, match=r"model\.params: its SHA-256 is not that"):
            parameter_file(str(given))


# ---- its arrays --------------------------------------------------------------------------------


def test_the_arrays_are_those_that_mxnet_wrote(tmp_path: Path) -> None:
    types = ["float32", "float16", "float64", "int8", "uint8", "int32", "int64"]
    values = np.arange(-12, 12).reshape(2, 3, 4)
    written = {f"bort.\u00e9.{one}": nd.array(values, dtype=one) for one in types}
    written["long"] = nd.arange(1000)
    nd.save(str(tmp_path / "all.params"), written)
    found = read_arrays(str(tmp_path / "all.params"))
    assert list(found) == list(written)
    for name, array in written.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array.asnumpy(), err_msg=name)


@pytest.mark.parametrize("size", [0, 5, 24, 40, 100, -1])
def test_a_damaged_file_is_a_user_error(size: int, tmp_path: Path) -> None:
    path = tmp_path / "best.params"
    nd.save(str(path), {"a": nd.arange(10), "b": nd.arange(20)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"best\.params: cannot be read as a parameter file \("):
        read_arrays(str(path))


def test_another_format_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "best.params"
    path.write_bytes(b"<html>" * 100)
    with pytest.raises(UserError, match=r"a parameter file \(another format\)"):
        read_arrays(str(path))
    nd.save(str(path), {"sparse": nd.arange(9).reshape((3, 3)).tostype("csr")})
    with pytest.raises(UserError, match="an array of another format"):
        read_arrays(str(path))


@pytest.mark.parametrize(
    ("place", "number"),
    # After the file's 24 bytes: format and storage of the first array, its dimensions, its sizes.
    [(32, np.int32(-1)), (36, np.int64(-3))],
)
def test_negative_numbers_in_a_file_are_refused(place: int, number: Any, tmp_path: Path) -> None:
    path = tmp_path / "arrays.params"
    nd.save(str(path), {"one": nd.ones((3,)), "other": nd.ones((2, 2))})
    content = bytearray(path.read_bytes())
    content[place : place + number.nbytes] = number.tobytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a parameter file"):
        read_arrays(str(path))


@pytest.mark.parametrize(
    ("path", "code"), [("missing/a.params", errno.ENOENT), ("folder", errno.EISDIR)]
)
def test_a_file_that_mxnet_cannot_open_is_named_with_the_reason(tmp_path, path, code):
    """Not by MXNet's stack; a read-only disk is another such reason."""
    (tmp_path / "folder").mkdir()
    network, _ = get_bort_model("bort_1_2_32_32", vocab=range(20))
    with pytest.raises(OSError, match=re.escape(os.strerror(code))) as refused:
        save_parameters(network, str(tmp_path / path))
    assert (refused.value.errno, refused.value.filename) == (code, str(tmp_path / path))

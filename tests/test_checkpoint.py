"""Checkpoints: whole or absent, verified, found again, pruned; and nothing pickled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bort import checkpoint
from bort.errors import UserError
from bort.files import json_sha256, lock_folder
from bort.parameters import parameter_file

ARRAYS = {
    "mean.0": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32),
    "variance.0": np.full((3, 4), np.float32(1e-38)),
    "count": np.array(2**53 + 1),
}
STATE = {"position": 12, "best_loss": float("inf"), "settings": {"RunSettings": {"seed": 1}}}


def save(folder: Path, step: int, content: bytes = b"parameters") -> Path:
    write = lambda path: Path(path).write_bytes(content)  # noqa: E731
    return Path(checkpoint.save(str(folder), step, write, ARRAYS, STATE))


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


class Killed(BaseException):
    """Simulates SIGKILL: no handler of ours may turn it into something else."""


def test_what_was_saved_is_loaded(tmp_path):
    path = save(tmp_path, 7)
    assert path.name == "step-0000007"
    assert sorted(os.listdir(path)) == ["model.params", "state.json", "trainer.npz"]
    found = checkpoint.load(str(path))
    assert {name: found.state[name] for name in STATE} == STATE
    assert found.state["step"] == 7
    assert Path(found.model_path).read_bytes() == b"parameters"
    arrays = found.trainer_arrays()
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].tobytes() == array.tobytes()


def test_nothing_is_ever_unpickled(tmp_path):
    path = save(tmp_path, 1)
    np.savez(path / "trainer.npz", **{"mean.0": np.array([print], dtype=object)})
    state = json.loads((path / "state.json").read_text())
    content = (path / "trainer.npz").read_bytes()
    state["sha256"]["trainer.npz"] = hashlib.sha256(content).hexdigest()
    del state["state_sha256"]
    state["state_sha256"] = json_sha256(state)
    (path / "state.json").write_text(json.dumps(state))
    planted = checkpoint.load(str(path))
    with pytest.raises(UserError, match="pickle"):
        planted.trainer_arrays()


def test_the_links_lead_to_the_newest_and_the_best(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    checkpoint.point(str(tmp_path), checkpoint.BEST, "step-0000001")
    assert checkpoint.load(str(tmp_path / "checkpoint_last")).state["step"] == 2
    assert checkpoint.load(str(tmp_path / "checkpoint_best")).state["step"] == 1
    assert os.readlink(tmp_path / "checkpoint_last") == "step-0000002", "the folder can be moved"
    checkpoint.point(str(tmp_path), checkpoint.BEST, "step-0000002")
    assert checkpoint.load(str(tmp_path / "checkpoint_best")).state["step"] == 2


def killed(*_args, **_keywords):
    raise Killed


def killed_renaming(source, target, rename=os.replace):
    if Path(target).name == "step-0000002":
        raise Killed
    rename(source, target)


@pytest.mark.parametrize(
    ("place", "name", "instead", "stands"),
    [
        (checkpoint, "write_npz", killed, 1),
        (checkpoint, "_flushed_sha256", killed, 1),
        (checkpoint, "write_json", killed, 1),
        (os, "replace", killed_renaming, 1),
        (checkpoint, "point", killed, 2),
    ],
)
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, capsys, place, name, instead, stands
):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, instead)
        with pytest.raises(Killed):
            save(tmp_path, 2)
    assert checkpoint.latest(str(tmp_path)).state["step"] == stands
    assert not capsys.readouterr().err, "no checkpoint was skipped"
    assert checkpoint.load(str(tmp_path / "checkpoint_last")).state["step"] == 1
    with lock_folder(str(tmp_path)):
        checkpoint.rewind(str(tmp_path), stands, best_step=None)
    assert checkpoint.load(str(tmp_path / "checkpoint_last")).state["step"] == stands
    assert not list(tmp_path.glob(".*")), "half-written files are left"
    save(tmp_path, 2)
    assert checkpoint.load(str(tmp_path / "checkpoint_last")).state["step"] == 2


def test_a_killed_writer_of_half_a_file_leaves_nothing_that_loads(tmp_path):
    def half(path):
        Path(path).write_bytes(b"param")
        raise Killed

    with pytest.raises(Killed):
        checkpoint.save(str(tmp_path), 1, half, ARRAYS, STATE)
    assert steps(tmp_path) == []
    assert checkpoint.latest(str(tmp_path)) is None
    save(tmp_path, 1)
    assert checkpoint.latest(str(tmp_path)).state["step"] == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["model.params", "trainer.npz", "state.json"])
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_refused_by_name_and_the_one_before_is_used(tmp_path, capsys, file, harm):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2) / file
    if (file, harm) == ("state.json", truncate):
        damaged.write_bytes(damaged.read_bytes()[:-3])  # more than the newline at its end
    else:
        harm(damaged)
    with pytest.raises(UserError, match=str(damaged)):
        checkpoint.load(str(damaged.parent))
    assert checkpoint.latest(str(tmp_path)).state["step"] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {damaged}: ")
    assert line.endswith("; skipping this checkpoint")
    with pytest.raises(UserError, match=str(damaged)):
        checkpoint.at_step(str(tmp_path), 2)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"sha256": 7}', '{"sha256": {}}'])
def test_a_state_without_checksums_is_refused(tmp_path, content):
    path = save(tmp_path, 2)
    (path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json"):
        checkpoint.load(str(path))


def test_a_state_with_another_number_in_it_is_refused(tmp_path):
    path = save(tmp_path, 2)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"position": 12', '"position": 13'))
    with pytest.raises(UserError, match=r"state\.json.*altered"):
        checkpoint.load(str(path))


def test_a_run_with_only_damaged_checkpoints_does_not_start_from_scratch(tmp_path, capsys):
    for step in (1, 2):
        truncate(save(tmp_path, step) / "model.params")
    # No flag is named: fine-tuning has another one for the folder than pretraining.
    with pytest.raises(UserError, match=r"are damaged; start a new run in another folder$"):
        checkpoint.latest(str(tmp_path))
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_no_checkpoint_is_no_error_for_latest(tmp_path):
    assert checkpoint.latest(str(tmp_path)) is None
    assert checkpoint.latest(str(tmp_path / "absent")) is None


def test_at_step_names_the_steps_there_are(tmp_path):
    with pytest.raises(UserError, match=r"--start_step 5: .* \(steps: none\)"):
        checkpoint.at_step(str(tmp_path), 5)
    save(tmp_path, 10)
    save(tmp_path, 200)
    with pytest.raises(UserError, match=r"--start_step 5: .* \(steps: 10, 200\)"):
        checkpoint.at_step(str(tmp_path), 5)
    assert checkpoint.at_step(str(tmp_path), 10).state["step"] == 10


def test_a_new_run_is_refused_in_a_folder_with_checkpoints(tmp_path):
    checkpoint.require_none(str(tmp_path))
    checkpoint.require_none(str(tmp_path / "absent"))
    save(tmp_path, 10)
    with pytest.raises(UserError, match=r"--ckpt_dir .*--resume"):
        checkpoint.require_none(str(tmp_path))


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 10, 9_999_999, 10_000_000):
        save(tmp_path, step)
    checkpoint.point(str(tmp_path), checkpoint.BEST, "step-0000002")
    (tmp_path / "step-notes").mkdir()
    checkpoint.prune(str(tmp_path), keep=2)
    (tmp_path / "step-notes").rmdir()
    assert steps(tmp_path) == [2, 9_999_999, 10_000_000]
    assert checkpoint.load(str(tmp_path / "checkpoint_last")).state["step"] == 10_000_000
    checkpoint.prune(str(tmp_path), keep=1)
    assert steps(tmp_path) == [2, 10_000_000]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, b"first")
    path = save(tmp_path, 1, b"second")
    assert Path(checkpoint.load(str(path)).model_path).read_bytes() == b"second"
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_rewinding_drops_later_values_and_finds_the_best_again(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    checkpoint.point(str(tmp_path), checkpoint.BEST, "step-0000008")
    checkpoint.rewind(str(tmp_path), 6, best_step=4, remove_later=True)
    assert steps(tmp_path) == [2, 4, 6]
    assert checkpoint.load(str(tmp_path / "checkpoint_last")).state["step"] == 6
    assert checkpoint.load(str(tmp_path / "checkpoint_best")).state["step"] == 4
    # The best of that moment has been pruned since: no link is better than a dangling one.
    checkpoint.rewind(str(tmp_path), 6, best_step=3)
    assert not os.path.lexists(tmp_path / "checkpoint_best")


def test_a_damaged_checkpoint_is_pruned_before_valid_ones(tmp_path):
    save(tmp_path, 1)
    truncate(save(tmp_path, 9) / "model.params")
    found = checkpoint.latest(str(tmp_path))
    checkpoint.rewind(str(tmp_path), found.state["step"], best_step=None)
    save(tmp_path, 5)
    checkpoint.prune(str(tmp_path), keep=1)
    assert steps(tmp_path) == [5]


def test_a_damaged_checkpoint_is_renamed_not_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "damaged-step-0000009").mkdir()
    damaged = (save(tmp_path, 9) / "model.params").read_bytes()[:-1]
    truncate(tmp_path / "step-0000009" / "model.params")
    checkpoint.rewind(str(tmp_path), 1, best_step=None)
    assert (tmp_path / "damaged-step-0000009.2" / "model.params").read_bytes() == damaged
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("file", ["state.json", "trainer.npz"])
def test_a_read_that_fails_is_not_taken_for_damage(tmp_path, monkeypatch, file, code):
    save(tmp_path, 1)
    save(tmp_path, 2)
    real = os.open

    def failing(path, *rest, **keywords):
        if str(path).endswith(f"step-0000002/{file}"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *rest, **keywords)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        checkpoint.latest(str(tmp_path))


@pytest.mark.parametrize(
    ("where", "reason"),
    [("makedirs", ""), ("fsync", "trainer.npz: cannot be written ")],
)
def test_a_full_disk_names_the_last_valid_checkpoint_and_leaves_nothing(
    tmp_path, monkeypatch, where, reason
):
    def full(*_args, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 7)
    monkeypatch.setattr(os, where, full)
    with pytest.raises(UserError) as caught:
        save(tmp_path, 9)
    explained = f"{reason}(No space left on device)"
    assert str(caught.value) == (
        f"{tmp_path}: the checkpoint of step 9 cannot be written "
        f"{f'({explained})' if reason else explained}; the "
        "last valid checkpoint is step-0000007; free some space and resume"
    )
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_last", "step-0000007"]


def test_without_symbolic_links_checkpoints_are_saved_found_and_pruned(tmp_path, monkeypatch):
    def unsupported(*_args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", unsupported)
    for step in (1, 2, 3):
        save(tmp_path, step)
        checkpoint.prune(str(tmp_path), keep=1, best_step=1)
    assert steps(tmp_path) == [1, 3]
    checkpoint.rewind(str(tmp_path), 3, best_step=1)
    assert sorted(os.listdir(tmp_path)) == ["step-0000001", "step-0000003"]
    assert checkpoint.newest_path(str(tmp_path)) == str(tmp_path / "step-0000003")
    assert parameter_file(str(tmp_path)) == str(tmp_path / "step-0000003" / "model.params")


def test_a_copy_that_followed_the_links_is_named(tmp_path):
    save(tmp_path / "run", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    link = tmp_path / "copy" / "checkpoint_last"
    with pytest.raises(UserError, match=f"{link}: is a folder instead of a link"):
        checkpoint.rewind(str(tmp_path / "copy"), 1, best_step=None)
    assert not list((tmp_path / "copy").glob(".*"))
    shutil.rmtree(link)
    checkpoint.rewind(str(tmp_path / "copy"), 1, best_step=None)
    assert os.readlink(link) == "step-0000001"


def test_an_unfinished_checkpoint_is_valid_before_and_after_it_is_amended(tmp_path):
    def write(path):
        Path(path).write_bytes(b"parameters")
        Path(path).with_name("model.json").write_text("first")

    def write_config(path):
        Path(path).with_name("model.json").write_text("second")

    arguments = (str(tmp_path), 4, write, ARRAYS, {**STATE, "evaluation_pending": True})
    path = checkpoint.save(*arguments, unfinished=True)
    assert checkpoint.load(path).state["evaluation_pending"]
    checkpoint.amend(path, write_config, STATE)
    amended = checkpoint.load(path).state
    assert "evaluation_pending" not in amended
    assert list(amended["sha256"]) == ["model.json", "model.params", "trainer.npz"]
    flip(Path(path) / "model.json")
    with pytest.raises(UserError, match=r"model\.json: its SHA-256"):
        checkpoint.load(path)


def test_a_folder_that_cannot_hold_checkpoints_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below/it"):
        with pytest.raises(UserError, match=r"--ckpt_dir .*file is not a folder; name another"):
            checkpoint.require_usable(str(tmp_path / folder), "--ckpt_dir")
    checkpoint.require_usable(str(tmp_path / "new" / "run"), "--ckpt_dir")
    assert not (tmp_path / "new").exists()
    (tmp_path / "run").mkdir()
    checkpoint.require_usable(str(tmp_path / "run"), "--ckpt_dir")
    (tmp_path / "run" / "step-0000004").write_text("")
    with pytest.raises(UserError, match="step-0000004 is a file where a checkpoint would go"):
        checkpoint.require_usable(str(tmp_path / "run"), "--ckpt_dir")


def test_a_checkpoint_is_not_the_folder_of_a_run(tmp_path):
    path = save(tmp_path, 4)
    for name in (path.name, checkpoint.LAST):
        with pytest.raises(UserError, match=rf"--ckpt_dir .*{name}: is a checkpoint; name the fol"):
            checkpoint.require_usable(str(tmp_path / name), "--ckpt_dir")
    checkpoint.require_usable(str(tmp_path), "--ckpt_dir")

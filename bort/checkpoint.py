"""Checkpoints: complete, atomic, verified, pruned.

    <folder>/step-0001000/model.params   parameters, MXNet's format, the tied matrix once
                          model.json, tokenizer/   what makes it a saved model (bort.saved_model)
                          trainer.npz    optimizer state, plain arrays
                          state.json     step, position, settings, SHA-256 of the files and itself
    <folder>/checkpoint_last             link to the newest
    <folder>/checkpoint_best             link to the best by held-out loss, never pruned
    <folder>/damaged-step-0001000/       a checkpoint that failed verification

A checkpoint is written under a temporary name, fsynced and renamed: one that stands under its
final name is complete, and its checksums are verified before it is loaded. Where a file system has
no symbolic links there are none.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import sys
from typing import Callable, Mapping, NamedTuple

import numpy as np

from bort.arrays import read_npz, write_npz
from bort.errors import UserError
from bort.files import (
    MODEL_BYTES,
    WHOLE_BYTES,
    json_sha256,
    open_regular,
    require_writable,
    sha256_of,
    temporary_name,
    write_json,
)
from bort.types import JSONMapping, JSONObject

MODEL = "model.params"
MODEL_CONFIG = "model.json"
TRAINER = "trainer.npz"
STATE = "state.json"
OWN_SUM = "state_sha256"
LAST = "checkpoint_last"
BEST = "checkpoint_best"
DAMAGED = "damaged-"
# Errors of reading a damaged or absent file; any other one may be transient (ESTALE, EIO).
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# Errors of a file system without symbolic links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    path: str
    state: JSONObject  # the content of state.json

    @property
    def model_path(self) -> str:
        """Return the path of the parameters."""
        return os.path.join(self.path, MODEL)

    def trainer_arrays(self) -> dict[str, np.ndarray]:
        """Read the optimizer state as {name: array}; raises `UserError` unless it is arrays."""
        return read_npz(os.path.join(self.path, TRAINER))


# ---- writing -------------------------------------------------------------------------------------


def save(
    folder: str,
    step: int,
    write_model: Callable[[str], None],
    arrays: Mapping[str, np.ndarray],
    state: JSONMapping,
    unfinished: bool = False,
) -> str:
    """Write the checkpoint of a step and point `checkpoint_last` to it; returns its path.

    Args:
        folder: where the run keeps its checkpoints.
        step: number of updates made.
        write_model: called with the path that the parameters go to; may write more beside them.
        arrays: the optimizer state.
        state: what else a resumed run needs; JSON.
        unfinished: `amend` will follow, with another state and model config.

    Raises `UserError` when it cannot be written; nothing of it is left then.
    """
    name = _name(step)
    temporary = temporary_name(path_of(folder, step))
    try:
        os.makedirs(temporary)
        write_model(os.path.join(temporary, MODEL))
        write_npz(os.path.join(temporary, TRAINER), arrays)
        files = [file for file in _files(temporary) if not (unfinished and file == MODEL_CONFIG)]
        sums = {file: _flushed_sha256(os.path.join(temporary, file)) for file in files}
        write_state(temporary, {"step": step, **state, "sha256": sums})
        _fsync_folder(temporary)
        _move(temporary, os.path.join(folder, name))
        _fsync_folder(folder)
        point(folder, LAST, name)
    except (OSError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _not_saved(folder, step, error, temporary) from None
    return os.path.join(folder, name)


def amend(path: str, write_config: Callable[[str], None], state: JSONMapping) -> None:
    """Finish a checkpoint that was saved as unfinished: replace its model config and its state.

    Killed in between, it is still unfinished, with either config. `write_config` is called with the
    path of the parameters.
    """
    step = _step_of(os.path.basename(path))
    try:
        write_config(os.path.join(path, MODEL))
        sums = dict(_read_state(path)["sha256"])
        if os.path.exists(os.path.join(path, MODEL_CONFIG)):
            sums[MODEL_CONFIG] = sha256_of(os.path.join(path, MODEL_CONFIG))
        sums = {file: sums[file] for file in sorted(sums)}
        write_state(path, {"step": step, **state, "sha256": sums})
    except (OSError, UserError) as error:
        raise _not_saved(os.path.dirname(path), step, error, path) from None


def write_state(path: str, content: JSONMapping) -> None:
    """Write the state.json of a checkpoint's folder, with the SHA-256 of its content."""
    summed = {**content, OWN_SUM: json_sha256(content)}
    write_json(os.path.join(path, STATE), summed, with_sum=False)


def _move(source: str, target: str) -> None:
    """Rename a folder; what stood there, an earlier save of the same step, is removed after it."""
    replaced = None
    if os.path.isdir(target):
        replaced = temporary_name(target)
        os.rename(target, replaced)
    os.replace(source, target)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)


def _not_saved(folder: str, step: int, error: Exception, place: str) -> UserError:
    """Return the error that says why a step cannot be saved; `place` is where it was written."""
    reason = getattr(error, "strerror", None) or str(error).replace(os.path.join(place, ""), "")
    valid = [other for other in steps(folder) if other < step]
    last = (
        f"the last valid checkpoint is {_name(valid[-1])}" if valid else "there is none before it"
    )
    return UserError(
        f"{folder}: the checkpoint of step {step} cannot be written ({reason}); {last}; "
        "free some space and resume"
    )


def point(folder: str, link: str, name: str) -> None:
    """Let the link `checkpoint_last` or `checkpoint_best` lead to checkpoint `name`.

    Raises `UserError` where it is a folder: a copy of the run has followed the link.
    """
    path = os.path.join(folder, link)
    if os.path.isdir(path) and not os.path.islink(path):
        raise UserError(
            f"{path}: is a folder instead of a link, as in a copy that followed links; remove it: "
            "it is one of the checkpoints beside it"
        )
    temporary = temporary_name(path)
    try:
        os.symlink(name, temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise


# ---- reading -------------------------------------------------------------------------------------


def load(path: str) -> Checkpoint:
    """Verify and open one checkpoint.

    Raises `UserError` that names what is missing or altered, and `OSError` for a read that failed
    though the file is there: it may be transient.
    """
    state = _read_state(path)
    for file, expected in state["sha256"].items():
        full = os.path.join(path, file)
        try:
            found = sha256_of(full, MODEL_BYTES)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise UserError(f"{full}: {error.strerror}; altered") from None
            if error.errno not in _ABSENT:
                raise
            raise UserError(f"{full}: missing; the checkpoint is not complete") from None
        if found != expected:
            raise UserError(f"{full}: its SHA-256 is not that of state.json; altered or truncated")
    return Checkpoint(path, state)


def _read_state(path: str) -> JSONObject:
    """Return the content of state.json, verified by its own SHA-256, which is left out."""
    file = os.path.join(path, STATE)
    try:
        with open_regular(file, WHOLE_BYTES) as handle:
            content = handle.read()
    except OSError as error:
        if error.errno not in (*_ABSENT, errno.EFBIG):
            raise
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        state = json.loads(content.decode("utf-8"))
        intact = isinstance(state, dict) and state.pop(OWN_SUM, None) == json_sha256(state)
    except (ValueError, RecursionError):
        raise UserError(f"{file}: is not JSON") from None
    if not intact:
        raise UserError(f"{file}: its own SHA-256 is missing or wrong; altered")
    sums = state.get("sha256")
    if not (
        isinstance(state.get("step"), int)
        and isinstance(sums, dict)
        and {MODEL, TRAINER} <= sums.keys()
        and all(_inside(name) and isinstance(value, str) for name, value in sums.items())
    ):
        raise UserError(f"{file}: is not the state of a checkpoint")
    return state


def _inside(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in name.split("/")


def requested(folder: str, resume: bool, start_step: int) -> Checkpoint | None:
    """Open the checkpoint that a run begins with; None for a run that begins at step 0.

    Raises `UserError` as `at_step` and `latest`, and for a new run in a folder that holds some.
    """
    if start_step:
        return at_step(folder, start_step)
    if resume:
        return latest(folder)
    require_none(folder)
    return None


def latest(folder: str) -> Checkpoint | None:
    """Open the newest valid checkpoint of a run; None when the run has not saved any.

    Warns of each damaged one that it skips; raises `UserError` when all are damaged.
    """
    names = _names(folder)
    for name in reversed(names):
        try:
            return load(os.path.join(folder, name))
        except UserError as error:
            print(f"warning: {error}; skipping this checkpoint", file=sys.stderr)
    if names:
        raise UserError(
            f"{folder}: all its checkpoints are damaged; start a new run in another folder"
        )
    return None


def at_step(folder: str, step: int) -> Checkpoint:
    """Open the checkpoint of a step; raises `UserError` with the steps there are."""
    name = _name(step)
    if name not in _names(folder):
        there = ", ".join(str(_step_of(name)) for name in _names(folder)) or "none"
        raise UserError(f"--start_step {step}: {folder} has no such checkpoint (steps: {there})")
    return load(os.path.join(folder, name))


def require_none(folder: str) -> None:
    """Raise `UserError` when the folder holds checkpoints: a new run would mix its own in."""
    if _names(folder):
        raise UserError(
            f"--ckpt_dir {folder}: holds the checkpoints of another run; "
            "--resume continues it, another folder starts a new run"
        )


def require_usable(folder: str, flag: str) -> None:
    """Raise `UserError` when checkpoints cannot be written into a folder, or into a new one there.

    A checkpoint is refused: its run deletes it in time, with all that is in it. Writes nothing.
    """
    require_writable(folder, flag)
    if os.path.exists(os.path.join(folder, STATE)):
        raise UserError(
            f"{flag} {folder}: is a checkpoint; name the folder of its run, or a new one"
        )
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if _is_checkpoint(name) and not os.path.isdir(os.path.join(folder, name)):
            raise UserError(
                f"{flag} {folder}: {name} is a file where a checkpoint would go; move it away"
            )


def steps(folder: str) -> list[int]:
    """Return the steps of a run's checkpoints, damaged ones included."""
    return [_step_of(name) for name in _names(folder)]


def path_of(folder: str, step: int) -> str:
    """Return the path of the checkpoint of a step."""
    return os.path.join(folder, _name(step))


def newest_path(folder: str) -> str | None:
    """Return the folder of a run's newest checkpoint, links or not; None when there is none.

    Not its link, which a run in training may move while the files there are read one by one.
    """
    last = os.path.join(folder, LAST)
    if os.path.isdir(last):
        return os.path.join(folder, os.readlink(last)) if os.path.islink(last) else last
    names = _names(folder)
    return os.path.join(folder, names[-1]) if names else None


# ---- the folder of a run -------------------------------------------------------------------------


def rewind(folder: str, step: int, best_step: int | None, remove_later: bool = False) -> None:
    """Make the folder what it was when the run had saved the checkpoint of `step`.

    With `remove_later` the later checkpoints are deleted. Without it they are damaged: they are
    renamed, so that new checkpoints do not collide with them.
    """
    for name in _names(folder):
        if _step_of(name) > step:
            path = os.path.join(folder, name)
            if remove_later:
                shutil.rmtree(path)
            else:
                os.rename(path, _free_name(os.path.join(folder, f"{DAMAGED}{name}")))
    point(folder, LAST, _name(step))
    if best_step is not None and _name(best_step) in _names(folder):
        point(folder, BEST, _name(best_step))
    elif os.path.islink(os.path.join(folder, BEST)):
        os.remove(os.path.join(folder, BEST))


def _free_name(path: str) -> str:
    names = itertools.chain([path], (f"{path}.{number}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def remove_all(folder: str) -> None:
    """Delete the checkpoints of a run that has ended, and the links to them."""
    for link in (LAST, BEST):
        if os.path.islink(os.path.join(folder, link)):
            os.remove(os.path.join(folder, link))
    for name in _names(folder):
        shutil.rmtree(os.path.join(folder, name))


def prune(folder: str, keep: int, best_step: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints, the one linked as best, and `best_step`'s."""
    best = os.path.join(folder, BEST)
    kept = {os.readlink(best)} if os.path.islink(best) else set()
    kept.update(_names(folder)[-keep:])
    if best_step is not None:
        kept.add(_name(best_step))
    for name in _names(folder):
        if name not in kept:
            shutil.rmtree(os.path.join(folder, name))


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _step_of(name: str) -> int:
    return int(name[len("step-") :])


def _is_checkpoint(name: str) -> bool:
    return re.fullmatch(r"step-\d{7,}", name) is not None


def _names(folder: str) -> list[str]:
    found = os.listdir(folder) if os.path.isdir(folder) else []
    names = [n for n in found if _is_checkpoint(n) and os.path.isdir(os.path.join(folder, n))]
    # By number: ten million has a digit more than the names are padded to.
    return sorted(names, key=_step_of)


def _files(folder: str) -> list[str]:
    paths = [os.path.join(there, name) for there, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(path, folder) for path in paths)


def _flushed_sha256(path: str) -> str:
    with open_regular(path) as handle:
        os.fsync(handle.fileno())
    return sha256_of(path)


def _fsync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

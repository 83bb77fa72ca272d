"""Checkpoints: complete, atomic, verified, pruned.

    <folder>/step-0001000/model.params   parameters, MXNet's format, the tied matrix once
                          model.json, tokenizer/   what makes it a saved model (bort.saved_model)
                          trainer.npz    optimiser state, plain arrays
                          state.json     step, position, settings, SHA-256 of the files and itself
    <folder>/checkpoint_last             link to the newest
    <folder>/checkpoint_best             link to the best by held-out loss, never pruned

A checkpoint is written under a temporary name, fsynced and renamed: one that stands under its
final name is complete, and its checksums are verified before it is loaded.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import warnings
from typing import Any, NamedTuple

import numpy as np

from bort.errors import UserError
from bort.files import read_json, sha256_of, write_json

MODEL = "model.params"
TRAINER = "trainer.npz"
STATE = "state.json"
OWN_SUM = "state_sha256"
LAST = "checkpoint_last"
BEST = "checkpoint_best"


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    path: str
    state: dict[str, Any]  # the content of state.json

    @property
    def model_path(self) -> str:
        """Return the path of the parameters."""
        return os.path.join(self.path, MODEL)

    def trainer_arrays(self) -> dict[str, np.ndarray]:
        """Read the optimiser's state as {name: array}."""
        with np.load(os.path.join(self.path, TRAINER), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def save(
    folder: str, step: int, write_model: Any, arrays: dict[str, np.ndarray], state: dict[str, Any]
) -> str:
    """Write the checkpoint of a step and point `checkpoint_last` to it; returns its path.

    Args:
        folder: where the run keeps its checkpoints.
        step: number of updates made.
        write_model: called with the path that the parameters go to; may write more beside them.
        arrays: the optimiser's state.
        state: what else a resumed run needs; JSON.
    """
    name = _name(step)
    temporary = os.path.join(folder, f".{name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    write_model(os.path.join(temporary, MODEL))
    np.savez(os.path.join(temporary, TRAINER), **arrays)
    sums = {file: _flushed_sha256(os.path.join(temporary, file)) for file in _files(temporary)}
    content = {"step": step, **state, "sha256": sums}
    write_json(os.path.join(temporary, STATE), {**content, OWN_SUM: _json_sha256(content)})
    _fsync_folder(temporary)
    final = os.path.join(folder, name)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _fsync_folder(folder)
    point(folder, LAST, name)
    return final


def point(folder: str, link: str, name: str) -> None:
    """Let the link `checkpoint_last` or `checkpoint_best` lead to checkpoint `name`."""
    temporary = os.path.join(folder, f".{link}.tmp")
    if os.path.lexists(temporary):
        os.remove(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, os.path.join(folder, link))


def load(path: str) -> Checkpoint:
    """Verify and open one checkpoint; raises `UserError` naming what is missing or altered."""
    state = read_json(os.path.join(path, STATE))
    if not isinstance(state, dict) or state.pop(OWN_SUM, None) != _json_sha256(state):
        raise UserError(
            f"{os.path.join(path, STATE)}: its own SHA-256 is missing or wrong; altered"
        )
    for file, expected in state["sha256"].items():
        full = os.path.join(path, file)
        if not os.path.exists(full):
            raise UserError(f"{full}: missing; the checkpoint is not complete")
        if sha256_of(full) != expected:
            raise UserError(f"{full}: its SHA-256 is not that of state.json; altered or truncated")
    return Checkpoint(path, state)


def latest(folder: str) -> Checkpoint | None:
    """Open the newest good checkpoint of a run; None when the run has not saved any.

    Warns of each damaged one that it passes over; raises `UserError` when all are damaged.
    """
    names = _names(folder)
    for name in reversed(names):
        try:
            return load(os.path.join(folder, name))
        except UserError as error:
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
    if names:
        raise UserError(
            f"{folder}: all its checkpoints are damaged; give another --ckpt_dir to start anew"
        )
    return None


def rewind(folder: str, step: int, best_step: int | None) -> None:
    """Make the folder what it was when the run had saved the checkpoint of `step`.

    Later checkpoints, damaged or of a continuation that is given up, would otherwise outlive the
    ones to come when those are pruned. What a killed run left half-written goes, too.
    """
    for name in _names(folder):
        if _step_of(name) > step:
            shutil.rmtree(os.path.join(folder, name))
    for half_written in glob.glob(os.path.join(glob.escape(folder), ".step-*.tmp")):
        shutil.rmtree(half_written)
    point(folder, LAST, _name(step))
    if best_step is not None and _name(best_step) in _names(folder):
        point(folder, BEST, _name(best_step))
    elif os.path.lexists(os.path.join(folder, BEST)):
        os.remove(os.path.join(folder, BEST))


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
            "--resume goes on from them, another folder starts anew"
        )


def steps(folder: str) -> list[int]:
    """Return the steps of a run's checkpoints, damaged ones included."""
    return [_step_of(name) for name in _names(folder)]


def remove_all(folder: str) -> None:
    """Delete the checkpoints of a run that has ended, and what leads to them."""
    for link in (LAST, BEST):
        if os.path.lexists(os.path.join(folder, link)):
            os.remove(os.path.join(folder, link))
    for name in _names(folder):
        shutil.rmtree(os.path.join(folder, name))


def prune(folder: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best."""
    best = os.path.join(folder, BEST)
    kept = {os.readlink(best)} if os.path.islink(best) else set()
    kept.update(_names(folder)[-keep:])
    for name in _names(folder):
        if name not in kept:
            shutil.rmtree(os.path.join(folder, name))


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _step_of(name: str) -> int:
    return int(name[len("step-") :])


def _names(folder: str) -> list[str]:
    found = os.listdir(folder) if os.path.isdir(folder) else []
    # By number: ten million has a digit more than the names are padded to.
    return sorted((name for name in found if re.fullmatch(r"step-\d{7,}", name)), key=_step_of)


def _files(folder: str) -> list[str]:
    paths = [os.path.join(there, name) for there, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(path, folder) for path in paths)


def _json_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flushed_sha256(path: str) -> str:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    return sha256_of(path)


def _fsync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

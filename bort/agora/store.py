"""Where a run of Agora keeps its records and models."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any, Callable, Iterator

from bort.errors import UserError


class Store:
    """Where a run keeps its fits: a JSON record for each, and the models that still matter.

    A record is written after the model that it may make the best, and a model is dropped after
    the record that supersedes it, so that a run killed between any two calls can go on. This one
    lasts as long as the process; a subclass may keep everything elsewhere.
    """

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}
        self.models: dict[str, Any] = {}

    def recall(self, name: str) -> Any:
        """Return the record kept under `name`, or None."""
        return self.records.get(name)

    def record(self, name: str, content: Any) -> None:
        """Keep JSON content under `name`."""
        self.records[name] = content

    def save_model(self, name: str, model: Any) -> None:
        """Keep a model under `name`, instead of the one that may be there."""
        self.models[name] = model

    def load_model(self, name: str) -> Any:
        """Return the model kept under `name`."""
        return self.models[name]

    def drop_model(self, name: str) -> None:
        """Forget the model under `name`; does nothing when there is none."""
        self.models.pop(name, None)


class DiskStore(Store):
    """A store in a folder: `journal.jsonl` with a line for each record, and `models/`.

    `write_model(path, model)` and `read_model(path)` know the models' format; a model may be a
    file or a folder. A last line that a crash cut short is removed; any other line that is no
    record raises `UserError`.
    """

    def __init__(
        self,
        folder: str,
        write_model: Callable[[str, Any], None],
        read_model: Callable[[str], Any],
    ) -> None:
        super().__init__()
        self.folder = os.path.join(folder, "models")
        self.journal = os.path.join(folder, "journal.jsonl")
        self.write_model, self.read_model = write_model, read_model
        os.makedirs(self.folder, exist_ok=True)
        self.records.update(self._read_journal())

    def _read_journal(self) -> Iterator[tuple[str, Any]]:
        if not os.path.exists(self.journal):
            return
        with open(self.journal, "rb+") as handle:
            whole, newline, _ = handle.read().rpartition(b"\n")
            handle.truncate(len(whole) + len(newline))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                yield record["name"], record["content"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.journal}, line {number}: is no record of a fit; "
                    "restore the file, or start again in an empty folder"
                ) from None

    def record(self, name: str, content: Any) -> None:
        """Append the record to the journal; it is on the disk when this returns."""
        with open(self.journal, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"name": name, "content": content}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        super().record(name, content)

    def save_model(self, name: str, model: Any) -> None:
        """Write the model; it appears under its name whole or not at all."""
        path = os.path.join(self.folder, name)
        temporary = f"{path}.tmp"
        _remove(temporary)
        self.write_model(temporary, model)
        _flush(temporary)
        _remove(path)
        os.replace(temporary, path)

    def load_model(self, name: str) -> Any:
        """Read the model kept under `name`."""
        return self.read_model(os.path.join(self.folder, name))

    def drop_model(self, name: str) -> None:
        """Remove the model under `name`; does nothing when there is none."""
        _remove(os.path.join(self.folder, name))


def _flush(path: str) -> None:
    inside = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    for file in [path] if os.path.isfile(path) else inside:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)

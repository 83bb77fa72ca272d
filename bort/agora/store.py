"""Where a run of Agora keeps its records and models."""

from __future__ import annotations

import os
import shutil
from typing import Any, Callable

from bort.files import temporary_name
from bort.journal import Journal
from bort.types import JSONMapping, JSONObject


class Store:
    """Where a run keeps its fits: a JSON record for each, and the models that are still needed.

    A record is written after the model that it may make the best, and a model is dropped after
    the record that supersedes it, so that a run that was killed between any two calls can be
    resumed. This store lasts as long as the process; `DiskStore` keeps everything in a folder.
    """

    def __init__(self) -> None:
        self.records: JSONObject = {}
        self.models: dict[str, Any] = {}

    def recall(self, name: str) -> Any:
        """Return the record kept under `name`, or None."""
        return self.records.get(name)

    def record(self, name: str, content: Any) -> None:
        """Keep JSON content under `name`."""
        self.records[name] = content

    def save_model(self, name: str, model: Any) -> None:
        """Keep a model under `name`, instead of a former one."""
        self.models[name] = model

    def has_model(self, name: str) -> bool:
        """Return whether a model is kept under `name`."""
        return name in self.models

    def load_model(self, name: str) -> Any:
        """Return the model kept under `name`."""
        return self.models[name]

    def drop_model(self, name: str) -> None:
        """Remove the model under `name`, if there is one."""
        self.models.pop(name, None)


class DiskStore(Store):
    """A store in a folder: `journal.jsonl` with a line for each record, and `models/`.

    `write_model(path, model)` and `read_model(path)` know the format of models, each a file or a
    folder. Damaged lines of the journal are reported and moved aside (see `bort.journal`): their
    fits are repeated.
    """

    def __init__(
        self,
        folder: str,
        write_model: Callable[[str, Any], None],
        read_model: Callable[[str], Any],
    ) -> None:
        super().__init__()
        self.folder = os.path.join(folder, "models")
        self.write_model, self.read_model = write_model, read_model
        os.makedirs(self.folder, exist_ok=True)
        self._journal = Journal(os.path.join(folder, "journal.jsonl"), _is_record)
        self.records.update((line["name"], line["content"]) for line in self._journal.records)

    def record(self, name: str, content: Any) -> None:
        """Append the record to the journal; it is on the disk when this returns."""
        self._journal.append({"name": name, "content": content})
        super().record(name, content)

    def save_model(self, name: str, model: Any) -> None:
        """Write the model; it appears under its name complete or not at all."""
        path = os.path.join(self.folder, name)
        temporary = temporary_name(path)
        try:
            self.write_model(temporary, model)
            _flush(temporary)
            _remove(path)
            os.replace(temporary, path)
        finally:
            _remove(temporary)

    def has_model(self, name: str) -> bool:
        """Return whether a model is kept under `name`."""
        return os.path.exists(os.path.join(self.folder, name))

    def load_model(self, name: str) -> Any:
        """Read the model kept under `name`."""
        return self.read_model(os.path.join(self.folder, name))

    def drop_model(self, name: str) -> None:
        """Remove the model under `name`, if there is one."""
        _remove(os.path.join(self.folder, name))


def _is_record(line: Any) -> bool:
    name, content = line["name"], line["content"]
    if not isinstance(name, str) or not isinstance(content, dict):
        return False
    return not name.startswith("fit-") or _is_fit(content)


def _is_fit(content: JSONMapping) -> bool:
    return (
        isinstance(content["data"], str)
        and isinstance(content["predictions"], list)
        and all(isinstance(value, str) or _is_number(value) for value in content["predictions"])
        and _is_number(content["seconds"])
    )


def _is_number(value: Any) -> bool:
    # JSON's whole numbers may have any number of digits.
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


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

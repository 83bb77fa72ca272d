"""The table of tasks by name: GLUE, SuperGLUE and RACE."""

from __future__ import annotations

import re

from bort.errors import UserError, escaped, quoted
from data.glue import GLUE_TASKS
from data.race import RACE_TASKS, Race
from data.super_glue import SUPER_GLUE_TASKS
from data.task import Task

LEADERBOARDS: tuple[str, ...] = ("glue", "superglue")
SUITES: tuple[str, ...] = (*LEADERBOARDS, "race")
_CLASSES: tuple[type[Task], ...] = (*GLUE_TASKS, *SUPER_GLUE_TASKS, *RACE_TASKS)


def task_names(suite: str = "") -> list[str]:
    """Return the names of all tasks, or of those of one suite: glue, superglue or race.

    Raises `UserError` for another suite.
    """
    if suite not in ("", *SUITES):
        raise UserError(f"suite {quoted(suite)}: expected one of {', '.join(SUITES)}")
    return [cls.name for cls in _CLASSES if suite in ("", cls.suite)]


def get_task(name: str, *, race_cast: str = "choices", flag: str = "task") -> Task:
    """Return the task of a name or alias; case, dots, dashes and underscores do not matter.

    race_cast: how RACE's options are cast, see `data.race.Race`; unused by other tasks.
    flag: the one that gave the name, for the message.
    Raises `UserError` for an unknown name.
    """
    for cls in _CLASSES:
        if _plain(name) in map(_plain, (cls.name, *cls.aliases)):
            return cls(race_cast) if issubclass(cls, Race) else cls()
    shown = escaped(name)
    raise UserError(f"{flag} {shown}: unknown; the tasks are {', '.join(task_names())}")


def check_inputs_version(task: Task, inputs_version: int, path: str) -> None:
    """Raise `UserError` when the model in `path` was trained on other inputs than the task has."""
    if task.inputs_version != inputs_version:
        raise UserError(
            f"{path}: trained on version {inputs_version} of {task.name}'s inputs; the texts made "
            f"from its rows have changed since (version {task.inputs_version}): fine-tune it again"
        )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

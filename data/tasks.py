"""The table of tasks: GLUE, SuperGLUE and RACE, by name."""

from __future__ import annotations

import re

from bort.errors import UserError
from data.glue import GLUE_TASKS
from data.race import RACE_TASKS, Race
from data.super_glue import SUPER_GLUE_TASKS
from data.task import Task

LEADERBOARDS: tuple[str, ...] = ("glue", "superglue")
SUITES: tuple[str, ...] = (*LEADERBOARDS, "race")
_CLASSES: tuple[type[Task], ...] = (*GLUE_TASKS, *SUPER_GLUE_TASKS, *RACE_TASKS)


def task_names(suite: str = "") -> list[str]:
    """Return the names of all tasks, or of those of one suite: glue, superglue or race."""
    return [cls.name for cls in _CLASSES if suite in ("", cls.suite)]


def get_task(name: str, *, race_cast: str = "choices") -> Task:
    """Return the task of a name or alias; case, dots, dashes and underscores do not matter.

    race_cast: how RACE's options are cast, see `data.race.Race`; other tasks ignore it.
    Raises `UserError` for an unknown name.
    """
    for cls in _CLASSES:
        if _plain(name) in map(_plain, (cls.name, *cls.aliases)):
            return cls(race_cast) if issubclass(cls, Race) else cls()
    raise UserError(f"--task_name {name}: unknown; the tasks are {', '.join(task_names())}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

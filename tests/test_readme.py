"""README.md: its flag tables and its map are those of the repository, and it names nothing else.

`python -m tests.test_readme` writes the flag tables anew, from the programs' own parsers.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator
from unittest import mock
from urllib.parse import urlsplit

import pytest

import create_pretraining_data

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SAMPLE_TEXT = ROOT / "test_data" / "sample_text.txt"
TABLE = re.compile(r"(<!-- flags: ([^\n]+) -->\n)(.*?)(<!-- end of flags -->)", re.DOTALL)
MAP_ENTRY = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
# What a reader looks for by name; tests, test data and the tasks' scripts may have a pattern.
NAMED_ONE_BY_ONE = re.compile(r"[^/]+|(bort|data)/[^/]+|scripts/(?!finetune/).+")
# Two programs of the same flags share a table.
WITHOUT_TABLE = {
    "run_pretraining_distillation_hvd.py": "run_pretraining_distillation.py",
    "scripts/sweep.py": "finetune_classifier.py",
    "scripts/benchmark.py": None,  # its parts have one each
    "scripts/describe_released.py": None,  # has no flags
}
HOSTS = {
    "arxiv.org",
    "dl.fbaipublicfiles.com",
    "gluebenchmark.com",
    "super.gluebenchmark.com",
    "www.cs.cmu.edu",
}
UNWANTED = {
    "the path of one machine": r"(?<![\w.$])/(home|root|tmp|work|Users|mnt|data|scratch)/",
    "an address of one machine": r"\b\d{1,3}(\.\d{1,3}){3}\b",
    "something unfinished": r"\b(TODO|FIXME|TBD|XXX)\b",
}


class HelpAskedError(Exception):
    """Carries the parser of a program that was called with --help."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser that a program, with the arguments given, would print the help of."""
    program, *arguments = command.split()
    parse_args = argparse.ArgumentParser.parse_args

    def intercept(parser: Any, args: Any = None, namespace: Any = None) -> Any:
        if "--help" in (args or ()):
            raise HelpAskedError(parser)
        return parse_args(parser, args, namespace)

    paths = mock.patch.object(sys, "path", [str((ROOT / program).parent), *sys.path])
    parsing = mock.patch.object(argparse.ArgumentParser, "parse_args", intercept)
    with paths, parsing, mock.patch.dict(os.environ):
        os.environ.pop("MXNET_HOME", None)  # part of a default
        module = importlib.import_module(program[: -len(".py")].replace("/", "."))
        with pytest.raises(HelpAskedError) as asked:
            module.main([*arguments, "--help"])
    return asked.value.args[0]


def flag_table(command: str) -> str:
    """Return the flags of a program as a Markdown table."""
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for group in parser_of(command)._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if actions and group.description:
            rows.append(f"| *{_cell(group.description)}* | | |")
        rows += [_row(action) for action in actions]
    return "\n".join(rows) + "\n"


def _row(action: argparse.Action) -> str:
    name = action.option_strings[0] if action.option_strings else action.dest
    if action.choices:
        name += f" {{{','.join(action.choices)}}}"
    elif action.option_strings and action.nargs != 0:
        name += f" {action.metavar or action.dest.upper()}"
    elif action.nargs == "+":
        name += " ..."
    default = f"`{action.default}`".replace(str(Path.home()), "~")
    if action.required:
        default = "required"
    elif action.default is None:
        default = ""
    elif action.nargs == 0:
        default = "off"
    meaning = re.sub(r" \(default (%\(default\)s|[^()]*)\)$", "", action.help or "")
    return f"| `{name}` | {default} | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def with_tables(readme: str) -> str:
    """Return the text of README.md with every flag table made anew."""
    return TABLE.sub(lambda found: found[1] + flag_table(found[2]) + found[4], readme)


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    return [name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()]


def programs() -> Iterator[str]:
    """Yield the programs and, of the benchmark, its parts."""
    for name in tracked():
        if re.fullmatch(r"(scripts/)?[^/]+\.py", name):
            yield name
        elif re.fullmatch(r"scripts/benchmarks/[a-z]+\.py", name):
            yield f"scripts/benchmark.py {Path(name).stem}"


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def mapped(readme: str) -> list[str]:
    _, _, after = readme.partition("\n## Map\n")
    return MAP_ENTRY.findall(after.partition("\n## ")[0])


def test_flag_tables_are_those_of_the_programs(readme):
    assert with_tables(readme) == readme, "run: python -m tests.test_readme"


def test_every_program_has_a_table(readme):
    tables = {command for _, command, _, _ in TABLE.findall(readme)}
    assert tables == set(programs()) - set(WITHOUT_TABLE)
    for program, other in WITHOUT_TABLE.items():
        if other:
            common, own = flag_table(other), flag_table(program)
            assert own.startswith(common)
            for flag in re.findall(r"`(--\w+)", own[len(common) :]):
                assert flag in readme


@pytest.mark.parametrize(
    ("script", "number"),
    [("run_pretraining_distillation.sh", 4), ("scripts/finetune/common.sh", 4),
     ("scripts/launch.sh", 1)],
)  # fmt: skip
def test_settings_of_the_shell_scripts_are_named(readme, script, number):
    text = (ROOT / script).read_text(encoding="utf-8")
    settings = set(re.findall(r"\$\{([A-Z_]+):[-+]", text))
    assert len(settings) >= number
    assert not {name for name in settings if f"`{name}`" not in readme}


def test_every_entry_of_the_map_exists(mapped):
    assert len(mapped) == len(set(mapped)) > 50
    assert not [name for name in mapped if not list(ROOT.glob(name))]


def test_every_file_is_in_the_map(mapped):
    def is_named(name: str) -> bool:
        if NAMED_ONE_BY_ONE.fullmatch(name):
            return name in mapped
        return any(fnmatch.fnmatch(name, entry.rstrip("/") + "*") for entry in mapped)

    assert not [name for name in tracked() if not is_named(name)]


@pytest.fixture(scope="module")
def commands(readme: str) -> list[str]:
    """Return the shell's lines of all examples, continued lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    shell = "".join(block for language, block in blocks if language == "bash")
    return shell.replace("\\\n", "").splitlines()


def test_files_named_in_commands_exist(commands):
    named = set(re.findall(r"(?:scripts/)?\w+\.(?:py|sh)\b", "\n".join(commands)))
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).exists()]


def test_flags_in_commands_exist(commands):
    program = r"\bpython (scripts/benchmark\.py \w+|\S+\.py)( .*)"
    calls = [found for line in commands for found in re.findall(program, line)]
    assert len(calls) > 10
    for called, arguments in calls:
        known = parser_of(called)._option_string_actions
        assert not [flag for flag in re.findall(r"--\w+", arguments) if flag not in known]


def test_first_example_prints_what_is_shown(readme, tmp_path, capsys):
    _, _, section = readme.partition("\n### create_pretraining_data.py\n")
    command, shown = re.findall(r"^```\w*\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)[:2]
    arguments = shlex.split(command.replace("\\\n", ""))[2:]
    places = {"runs/shards": str(tmp_path), "test_data/sample_text.txt": str(SAMPLE_TEXT)}
    create_pretraining_data.main([places.get(one, one) for one in arguments])
    assert capsys.readouterr().out.startswith(shown.removesuffix("...\n"))


@pytest.mark.parametrize("what", UNWANTED)
@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "model/README.md"])
def test_nothing_unwanted(name, what):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(UNWANTED[what], text)


def test_links_lead_to_public_places_and_to_files_of_ours(readme):
    links = re.findall(r"https?://[^\s)>}\"`]+", readme)
    assert {urlsplit(link).hostname for link in links} <= HOSTS
    headings = re.findall(r"^#+ (.+)$", readme, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("http"):
            assert (ROOT / target.partition("#")[0]).exists()


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")

"""The Markdown files: commands parse, links lead somewhere, examples print what is shown."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any, Optional
from unittest import mock
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_TEXT = ROOT / "test_data" / "sample_text.txt"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n(?:\n(?= {4}))?)+")
# A command with the output that the document shows below it.
EXAMPLE = re.compile(
    r"^```bash\n([^`]*)^```\n\n(?:[^`]+\n\n)?```text\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:python|horovodrun|\./)[^`]*)`")
# Programs that are quick enough to run here.
QUICK = ("create_pretraining_data.py", "scripts/run_ose.py --explain")
# The program that a shell script passes its flags to, and a flag that it requires.
FLAGS_GO_TO = {
    "run_finetune.sh": ("finetune_classifier.py", "--task_name"),
    "run_pretraining_distillation.sh": ("run_pretraining_distillation.py", "--data"),
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
# Bash that finds no program and changes nothing: each command's words go to file descriptor 9.
RECORDER = r"""
PATH=/nonexistent
command_not_found_handle() { printf '%s\x1f' "$@" >&9; printf '\x1e' >&9; }
set() { :; }
cd() { :; }
source() { :; }
"""


@cache
def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    return [name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()]


@cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def pytest_generate_tests(metafunc: Any) -> None:
    if "document" in metafunc.fixturenames:
        documents = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("*.md"))]
        documents.append("model/README.md")  # what lies below it was downloaded
        for folder in ("bort", "data", "scripts", "test_data"):
            documents += [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.md")]
        metafunc.parametrize("document", documents)


def shell_blocks(text: str) -> list[str]:
    """Return the blocks of shell commands, indented blocks (some are output), inline commands."""
    fenced = [content for language, content in FENCED.findall(text) if language == "bash"]
    prose = FENCED.sub("", text)
    indented = [textwrap.dedent(block) for block in INDENTED.findall(prose)]
    inline = [found for found in INLINE.findall(prose) if not re.search(r"\.\.\.|--help", found)]
    return [*fenced, *indented, *inline]


def commands_in(blocks: list[str], folder: Path) -> list[list[str]]:
    """Return the words of each command, loops, variables and functions expanded by Bash itself."""
    scripts = [name for name in tracked() if name.endswith(".sh")]
    functions = "".join(
        f'{prefix}{name}() {{ command_not_found_handle "{name}" "$@"; }}\n'
        for name in scripts
        for prefix in ("", "./")
    )
    optional = re.compile(r"\[(--[^\]\n]+)\]")  # [--flag value]
    evaluated = "".join(
        f"eval {shlex.quote(optional.sub(lambda found: found[1], block))}\n" for block in blocks
    )
    (folder / "runs").mkdir(exist_ok=True)
    subprocess.run(
        ["bash", "-c", f"exec 9>recorded\n{RECORDER}{functions}{evaluated}"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=False,
    )
    records = (folder / "recorded").read_text(encoding="utf-8").split("\x1e")
    return [record.split("\x1f")[:-1] for record in records if record]


def call_of(command: list[str]) -> Optional[tuple[str, list[str]]]:
    """Return the file that a command runs and its arguments; None for other people's programs."""
    if command[0] == "horovodrun" and "python" in command:
        command = command[command.index("python") :]
    if command[0].endswith(".sh"):
        return command[0], command[1:]
    if command[0] != "python":
        return None
    words = command[1:]
    if words[0] == "-u":
        del words[0]
    if words[0] == "-m" and words[1] not in ("pytest", "http.server"):
        return words[1].replace(".", "/") + ".py", words[2:]
    if words[0] == "-c":
        ast.parse(words[1])
    return None if words[0].startswith("-") else (words[0], words[1:])


class ParsedError(Exception):
    """Raised where a program has parsed its arguments, before it uses them."""


def parse(program: str, arguments: list[str]) -> argparse.ArgumentParser:
    """Let a program parse its arguments; returns its parser, or raises `SystemExit`."""
    parse_args = argparse.ArgumentParser.parse_args

    def intercept(parser: Any, args: Any = None, namespace: Any = None) -> Any:
        parsed = parse_args(parser, args, namespace)
        if list(args) != arguments[len(arguments) - len(args) :]:
            return parsed  # benchmark.py parses the name of a benchmark first
        raise ParsedError(parser)

    paths = mock.patch.object(sys, "path", [str((ROOT / program).parent), *sys.path])
    parsing = mock.patch.object(argparse.ArgumentParser, "parse_args", intercept)
    with paths, parsing:
        module = importlib.import_module(program[: -len(".py")].replace("/", "."))
        with pytest.raises(ParsedError) as caught:
            module.main(arguments)
    return caught.value.args[0]


def test_commands_name_programs_and_flags_that_exist(document, tmp_path, capsys):
    blocks = shell_blocks(text_of(document))
    calls = [found for found in map(call_of, commands_in(blocks, tmp_path)) if found]
    expected = sum(len(re.findall(r"^(?:python [\w/]+\.py|\./)", block, re.M)) for block in blocks)
    assert len(calls) >= expected
    for program, arguments in calls:
        assert (ROOT / program).is_file(), program
        if program.endswith(".py"):
            try:
                parse(program, arguments)
            except SystemExit:
                pytest.fail(f"{program} {shlex.join(arguments)}: {capsys.readouterr().err}")
        elif program in FLAGS_GO_TO:
            python_program, required = FLAGS_GO_TO[program]
            known = parse(python_program, [required, "x"])._option_string_actions
            assert {word for word in arguments if word.startswith("--")} <= set(known)


def test_fenced_commands_are_valid_shell(document):
    for language, content in FENCED.findall(text_of(document)):
        if language == "bash":
            checked = subprocess.run(
                ["bash", "-n"], input=content, capture_output=True, text=True, check=False
            )
            assert not checked.returncode, checked.stderr
        assert language in ("bash", "python", "text", "bibtex")


def test_python_examples_import_what_exists(document):
    for language, content in FENCED.findall(text_of(document)):
        for node in ast.walk(ast.parse(content if language == "python" else "")):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("bort", "data"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_links_and_anchors_lead_somewhere(document):
    text = FENCED.sub("", text_of(document))
    assert {urlsplit(link).hostname for link in re.findall(r"https?://[^\s)>}\"`]+", text)} <= HOSTS
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def test_requirements_files_exist(document):
    named = set(re.findall(r"\brequirements[\w-]*\.txt", text_of(document)))
    assert not [name for name in named if not (ROOT / name).exists()]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("what", UNWANTED)
def test_nothing_unwanted(document, what):
    assert not re.search(UNWANTED[what], text_of(document))


def test_quick_examples_print_what_is_shown(document, tmp_path, monkeypatch, capsys):
    (tmp_path / "test_data").symlink_to(ROOT / "test_data")
    (tmp_path / "runs" / "TEST").mkdir(parents=True)
    documents = SAMPLE_TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    training = [content for i, content in enumerate(documents, 1) if i % 5]
    (tmp_path / "runs" / "TEST" / "train.txt").write_text("\n\n".join(training), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command, shown in EXAMPLE.findall(text_of(document)):
        words = shlex.split(command.replace("\\\n", ""))
        if " ".join(words[1:]).startswith(QUICK):
            module = importlib.import_module(words[1][: -len(".py")].replace("/", "."))
            capsys.readouterr()
            module.main(words[2:])
            assert capsys.readouterr().out.startswith(shown)


def test_the_quick_examples_are_found():
    shown = "".join(
        command for name in ("README.md", "bort/ose/README.md")
        for command, _ in EXAMPLE.findall(text_of(name))
    )  # fmt: skip
    assert all(f"python {command}" in shown for command in QUICK)


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 300


def test_layout_lists_every_folder():
    _, _, section = text_of("README.md").partition("\n## Layout\n")
    listed = set(re.findall(r"`([\w./]+/)`", section.partition("\n## ")[0]))
    parents = {f"{parent}/" for name in tracked() for parent in Path(name).parents}
    wanted = {
        folder
        for folder in parents
        if folder.count("/") == 1 or folder.startswith(("bort/", "data/", "scripts/"))
    }
    assert listed - {"./"} == wanted - {"./"}


def test_every_script_is_described():
    named = re.findall(
        r"`([\w./-]+\.(?:py|sh|yaml))`|^### (.+)$", text_of("scripts/README.md"), re.M
    )
    described = {word for pair in named for word in "".join(pair).split() if "." in word}
    files = {name: Path(name).name for name in tracked() if name.endswith((".py", ".sh", ".yaml"))}
    scripts = {name for path, name in files.items() if re.fullmatch(r"(scripts/)?[^/]+", path)}
    assert len(scripts) > 20
    assert scripts <= described
    assert {Path(name).name for name in described} <= set(files.values())


@pytest.mark.parametrize("folder", ["bort", "data", "scripts/benchmarks"])
def test_every_module_is_listed(folder):
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", text_of(f"{folder}/README.md"), re.M)
    modules = [
        name[len(folder) + 1 :]
        for name in tracked()
        if name.startswith(f"{folder}/") and name.endswith(".py") and "__init__" not in name
    ]
    assert sorted(listed) == sorted(modules)


def test_variables_of_the_shell_scripts_are_those_listed():
    scripts = ("run_pretraining_distillation.sh", "scripts/finetune/common.sh", "scripts/launch.sh")
    read = set(re.findall(r"\$\{([A-Z_]+):[-+]", "".join(map(text_of, scripts))))
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", text_of("scripts/README.md"), re.M))
    assert len(read) > 4
    assert listed == read

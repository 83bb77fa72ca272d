from __future__ import annotations

import dataclasses
import errno
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import pytest

from bort.config import (
    OneLineParser,
    as_dict,
    build,
    command_of,
    counts_of,
    option,
    parse,
    parser_for,
    required,
)
from bort.errors import UserError
from bort.files import read_json, write_json


@dataclass(frozen=True)
class CookingSettings:
    """How the meal is made."""

    dish: str = required("what to cook")
    portions: int = option(4, "plates", minimum=1, maximum=12)
    salt: float = option(0.5, "part of 100 %", minimum=0.0, maximum=1.0)
    cook: Optional[str] = option(None, "who cooks")
    minutes: Optional[int] = option(None, "time limit", minimum=5)
    spicy: bool = option(False, "with chilli")
    style: str = option("boiled", "manner", choices=("boiled", "fried"))

    def check(self) -> None:
        """Refuse what does not go together."""
        if self.style == "fried" and self.dish == "soup":
            raise UserError("--style fried: soup cannot be fried; choose boiled")


@dataclass(frozen=True)
class TableSettings:
    """Where the meal is eaten."""

    seats: int = option(2, "chairs")
    candles: int = option(0, "lights", minimum=0)


def cooking(*argv: str) -> CookingSettings:
    return parse("Cooks.", ["--dish", "rice", *argv], CookingSettings)[0]


def test_fields_without_flag_have_their_defaults() -> None:
    assert cooking() == CookingSettings(
        dish="rice", portions=4, salt=0.5, cook=None, minutes=None, spicy=False, style="boiled"
    )


def test_flags_have_the_types_of_their_fields() -> None:
    settings = cooking(
        *("--portions", "7", "--salt", "1e-2", "--cook", "12"),
        *("--minutes", "30", "--spicy", "--style", "fried"),
    )
    assert dataclasses.astuple(settings) == ("rice", 7, 0.01, "12", 30, True, "fried")
    assert type(settings.portions) is type(settings.minutes) is int


def test_each_class_gets_its_own_instance() -> None:
    meal, table = parse("", ["--seats", "6", "--dish", "x"], CookingSettings, TableSettings)
    assert (meal.dish, table) == ("x", TableSettings(seats=6))


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        cooking().portions = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "required: --dish"),
        (["--dish"], "expected one argument"),
        (["--dish", "x", "--portions", "many"], "--portions: invalid int value: 'many'"),
        (["--dish", "x", "--portions", "1.5"], "--portions: invalid int value"),
        (["--dish", "x", "--minutes", ""], "--minutes: invalid int value"),
        (["--dish", "x", "--salt", "a"], "--salt: invalid float value"),
        (["--dish", "x", "--style", "raw"], "--style: invalid choice: 'raw'"),
        (["--dish", "x", "--spicy", "yes"], "unrecognized arguments: yes"),
        (["--dish", "x", "--dessert", "cake"], "unrecognized arguments: --dessert cake (see"),
        (["--dish", "x", "--potions=3"], "--potions=3; did you mean --portions? (see"),
        (["--dihs", "x", "--salt", "0.1"], "unrecognized arguments: --dihs; did you mean --dish?"),
        (["--salt", "0.1"], "the following arguments are required: --dish"),
        (["--dish", "x\udcff"], r"'x\udcff': is not UTF-8; rename the file or folder"),
    ],
)
def test_errors_of_the_parser_are_one_line_with_status_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("Cooks.", argv, CookingSettings)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert complaint in printed.err
    assert "--help)" in printed.err


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("portions", "0", "--portions 0: must be at least 1"),
        ("portions", "13", "--portions 13: must be at most 12"),
        ("salt", "-0.1", "--salt -0.1: must be at least 0.0"),
        ("salt", "1.01", "--salt 1.01: must be at most 1.0"),
        ("salt", "inf", "--salt inf: must be at most 1.0"),
        ("salt", "1e-320", "--salt 1e-320: must be 0 or at least 1.2e-38"),
        ("salt", "nan", "--salt nan: must be at least 0.0"),
        ("minutes", "4", "--minutes 4: must be at least 5"),
        ("dish", "", "--dish: is empty; give a value, or leave the flag out"),
    ],
)
def test_values_outside_the_limits_are_refused(flag: str, value: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        cooking(f"--{flag}", value)
    assert str(caught.value) == complaint


def test_an_empty_flag_is_refused_beside_arguments_without_a_flag() -> None:
    parser = parser_for("Cooks.", CookingSettings)
    parser.add_argument("guest")
    parser.add_argument("--drink", default="tea")
    assert parser.parse_args(["Ann", "--dish", "rice"]).cook is None
    for flag in ("--cook", "--drink"):
        with pytest.raises(UserError, match=f"^{flag}: is empty; give a value, or leave the flag"):
            parser.parse_args(["Ann", "--dish", "rice", flag, ""])


@pytest.mark.parametrize("text", ["", "5,", "x", "0", "1.5", "-1", "9,513", "9" * 5000])
def test_a_list_of_counts_has_whole_numbers_within_limits(text: str) -> None:
    assert counts_of("--lengths", "1,512", maximum=512) == [1, 512]
    with pytest.raises(
        UserError, match=r"^--lengths '.*: must be whole numbers from 1 to 512, sep"
    ):
        counts_of("--lengths", text, maximum=512)


def test_limits_are_inclusive() -> None:
    assert cooking("--portions", "1", "--salt", "0").portions == 1
    assert cooking("--portions", "12", "--salt", "1", "--minutes", "5").salt == 1


def test_a_class_is_validated() -> None:
    with pytest.raises(UserError, match="soup cannot be fried"):
        cooking("--dish", "soup", "--style", "fried")
    with pytest.raises(UserError, match="soup cannot be fried"):
        build(CookingSettings, {"dish": "soup", "style": "fried"})


def test_a_field_without_flag_keeps_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dish", "soup"]
    settings = parse("Cooks.", flags, CookingSettings, without=("salt",))[0]
    assert settings == parse("Cooks.", flags, CookingSettings)[0]
    with pytest.raises(SystemExit):
        parse("Cooks.", [*flags, "--salt", "0.1"], CookingSettings, without=("salt",))
    assert "unrecognized arguments: --salt 0.1" in capsys.readouterr().err


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser_for("Cooks a meal.", CookingSettings, TableSettings).parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "Cooks a meal.",
        "How the meal is made:",
        "--dish STR what to cook (required)",
        "--portions INT plates (default 4)",
        "--salt FLOAT part of 100 % (default 0.5)",
        "--cook STR who cooks",
        "--minutes INT time limit",
        "--spicy with chilli",
        "--style {boiled,fried} manner (default boiled)",
        "Where the meal is eaten:",
        "--seats INT chairs (default 2)",
        "--candles INT lights (default 0)",
    ):
        assert expected in text


def test_help_keeps_the_lines_of_a_description() -> None:
    help_text = OneLineParser(description="Cooks.\n\n    cook.py --dish rice\n").format_help()
    assert "\nCooks.\n\n    cook.py --dish rice\n" in help_text


def test_building_passes_over_what_belongs_to_other_classes() -> None:
    values = {"dish": "stew", "seats": 3, "portions": 2}
    assert build(CookingSettings, values) == CookingSettings(dish="stew", portions=2)
    assert build(TableSettings, values) == TableSettings(seats=3)


def test_settings_survive_config_json(tmp_path: Path) -> None:
    path = str(tmp_path / "config.json")
    before = cooking("--dish", "crème brûlée 甜", "--salt", "0.1", "--minutes", "45", "--spicy")
    write_json(path, as_dict(before, TableSettings()))
    content = read_json(path)
    assert set(content) == {"CookingSettings", "TableSettings"}
    assert build(CookingSettings, content["CookingSettings"]) == before
    assert build(TableSettings, content["TableSettings"]) == TableSettings()


def test_json_is_utf8_for_people_to_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(str(path), {"name": "naïve"}, with_sum=False)
    assert path.read_bytes() == '{\n  "name": "naïve"\n}\n'.encode()


def test_unserializable_content_leaves_the_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(str(path), {"a": 1})
    with pytest.raises(TypeError):
        write_json(str(path), {"a": 2, "b": object()})
    assert read_json(str(path)) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    write_json(str(path), {"a": 1})
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(UserError, match="No space left"):
            write_json(str(path), {"a": 2})
    assert read_json(str(path)) == {"a": 1}
    write_json(str(path), [3])
    assert read_json(str(path)) == [3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot be read"), (b"{", "is not JSON"), (b"\xff\xfe", "is not JSON")],
)
def test_unreadable_json_is_a_user_error(content: Any, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_json(str(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_in_place_of_a_json_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_json(str(tmp_path))


# ---- --config ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OvenSettings:
    """The oven."""

    degrees: float = option(180.0, "temperature")
    preheated: bool = option(False, "it is warm already", rerun=False)


def rerun(*argv: str) -> tuple[Any, ...]:
    return parse("Cooks.", argv, CookingSettings, OvenSettings, config=True)


def test_a_run_is_repeated_from_its_config_and_flags_override_it(tmp_path: Path) -> None:
    path = str(tmp_path / "config.json")
    first = rerun("--dish", "stew", "--salt", "0.25", "--minutes", "9", "--spicy", "--preheated")
    write_json(path, as_dict(*first))
    meal, oven = rerun("--config", path)
    assert meal == first[0]
    assert not oven.preheated, "what belongs to one run only is not taken over"
    assert rerun("--portions", "2", "--config", path)[0] == dataclasses.replace(meal, portions=2)
    assert rerun(f"--conf={path}")[0] == meal, "flags may be abbreviated"
    assert rerun("--conf", path)[0] == meal, "argparse takes the beginning of a flag"
    write_json(path, as_dict(dataclasses.replace(meal, cook="")))
    assert rerun("--config", path)[0] == meal, "as in files of earlier versions"


def test_a_flag_that_a_config_has_is_left_out_in_a_copy_of_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "config.json")
    (meal,) = parse("Cooks.", ["--dish", "stew", "--minutes", "9", "--spicy"], CookingSettings)
    write_json(path, as_dict(meal))
    with pytest.raises(UserError, match=rf"or set it to null in a copy of {re.escape(path)}$"):
        rerun("--config", path, "--cook", "")
    write_json(path, as_dict(dataclasses.replace(meal, minutes=None, spicy=False)))
    (plain,) = parse("Cooks.", ["--dish", "stew"], CookingSettings)
    assert rerun("--config", path)[0] == plain


@dataclass(frozen=True)
class NoteSettings:
    """Notes."""

    text: str = option("", "any text")
    offset: float = option(0.0, "any number")


@pytest.mark.parametrize("text", ["-begins like a flag", "--offset", "'quoted' $HOME", "a\nb"])
def test_the_command_of_settings_gives_these_settings(text: str) -> None:
    settings = NoteSettings(text, -1e-5)
    _, program, *words = shlex.split(command_of("program.py", settings))
    assert program == "program.py"
    assert parse("Notes.", words, NoteSettings) == (settings,)
    of_many = command_of("program.py", settings, processes=3)
    assert shlex.split(of_many) == ["horovodrun", "-np", "3", "python", program, *words]


@dataclass(frozen=True)
class NumberSettings:
    """Numbers."""

    steps: int = option(1, "steps")
    rate: float = option(1.0, "rate")
    random_seed: int = option(0, "seed")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("steps", "9223372036854775808"), ("steps", f"-1{'0' * 30}"), ("steps", "9" * 4000),
     ("rate", "1e39"), ("rate", "-1e308")],
)  # fmt: skip
def test_numbers_beyond_those_of_mxnet_are_refused(flag: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^--{flag} .*: must be at most "):
        parse("Counts.", [f"--{flag}={value}"], NumberSettings)


@pytest.mark.parametrize(
    ("program", "flag"),
    [("run_agora", "workers"), ("run_agora", "tau_samples"), ("sweep", "jobs"),
     ("run_ose", "workers"), ("run_ose", "threads"), ("run_ose", "repeats"),
     ("run_ose", "sequence_length"), ("inspect_shards", "num")],
)  # fmt: skip
def test_counts_that_would_fill_memory_are_refused(capsys: Any, program: str, flag: str) -> None:
    main = importlib.import_module(f"scripts.{program}").main
    needed = {"run_agora": ["--task_name=x", "--search_space=x", "--timaeus=x"],
              "sweep": ["--task_name=x", "--grid=x"], "inspect_shards": ["x"]}  # fmt: skip
    with pytest.raises(SystemExit):
        main([*needed.get(program, []), f"--{flag}=1000000000"])
    assert f"--{flag} 1000000000: must be at most " in capsys.readouterr().err


def test_a_seed_may_have_any_number_of_digits() -> None:
    (numbers,) = parse("Counts.", ["--random_seed", "9" * 40], NumberSettings)
    assert numbers.random_seed == int("9" * 40)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[]", "is not the config.json of a run of this program"),
        ('{"TaskSettings": {}}', "is not the config.json of a run of this program"),
        ('{"OvenSettings": {}, "Other": {}}', "'Other' is not a part of this program's settings"),
        ('{"OvenSettings": 3}', "'OvenSettings' is not a part of this program's settings"),
        ('{"OvenSettings": {"hue": 1}}', "'hue' is not a flag of this program"),
        ('{"OvenSettings": {"degrees": "hot"}}', "degrees: Expected `float`, got `str`"),
        ('{"CookingSettings": {"dish": "x", "portions": 40}}', "--portions 40: must be at most 12"),
        ('{"CookingSettings": {"dish": "x", "style": "raw"}}', "--style 'raw': must be one of"),
        ('{"OvenSettings": {"degrees": NaN}}', "--degrees nan: must be a finite number"),
        ("{", "is not JSON"),
    ],
)
def test_a_config_of_another_program_or_type_is_refused(
    content: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint.replace("`", ".")):
        rerun("--config", str(path), "--dish", "x")


def test_required_flags_are_still_required_beside_a_config_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"OvenSettings": {}}')
    with pytest.raises(SystemExit):
        rerun("--config", str(path))
    assert "required: --dish" in capsys.readouterr().err


ORIGINAL_FLAGS = {
    "finetune_classifier.py": {
        "--no_distributed True": "one process is the default",
        "--init gaussian": "use --init normal",
        "--init=gaussian": "use --init normal",
        "--use_scheduler True": "leave it out",
        "--momentum 0.9": "leave it out",
        "--multirc_test_location a": "--data_dir",
        "--record_test_location a": "--data_dir",
        "--record_dev_location a": "--data_dir",
        "--race_dataset_location a": "--data_dir",
    },
    "run_pretraining_distillation.py": {
        "--model bort_4_8_768_1024": "use --student_model",
        "--pretrained": "--student_parameters",
        "--dataset_name x": "the shards record their vocabulary",
        "--num_eval_steps 3": "leave it out",
        "--cpu_only": "without --gpus the CPU is used",
        "--verbose": "leave it out",
        "--profile p": "leave it out",
    },
}
ORIGINAL_FLAGS["run_pretraining_distillation_hvd.py"] = ORIGINAL_FLAGS[
    "run_pretraining_distillation.py"
]


@pytest.mark.parametrize(
    ("program", "line"), [(p, line) for p, lines in ORIGINAL_FLAGS.items() for line in lines]
)
def test_flags_of_the_original_are_refused_with_what_to_give_instead(program, line, capsys):
    main = importlib.import_module(program[:-3]).main
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line.split('=')[0].split()[0]}")
    assert ORIGINAL_FLAGS[program][line] in error
    assert error.count("\n") == 1


def test_flags_of_the_original_that_are_taken():
    from bort.finetuning.config import FINETUNING_CLASSES, FinetuningSettings

    line = [
        "--task_name",
        "CB",
        "--gpu",
        "0",
        "--dataset",
        "openwebtext_ccnews_stories_books_cased",
    ]
    settings = FinetuningSettings(*parse("", line, *FINETUNING_CLASSES))
    assert settings.run.gpus == "0"
    assert settings.tokenizer.dataset_name == line[-1]

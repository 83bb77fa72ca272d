"""The picture of runs' metrics: what is drawn, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.plot_metrics import main, read_run

PNG = b"\x89PNG\r\n\x1a\n"


def write_metrics(folder: Path, steps: int, teacher: bool = True, offset: float = 0.0) -> Path:
    """Write the metrics.jsonl of a run of so many lines."""
    folder.mkdir()
    lines = []
    for step in range(0, 10 * steps + 1, 10):
        values = {"mlm_loss": offset + 5 / (1 + step), "accuracy": step / 1000}
        if teacher:
            values["kl"] = 3 / (1 + step)
        if step % 50 == 0:
            lines.append({"step": step, "phase": "eval", "time": 1.0, **values})
        if step:
            more = {"loss": values["mlm_loss"] / 2, "lr": 1e-4, "tokens_per_second": 900}
            lines.append({"step": step, "phase": "train", "time": 1.0, **values, **more})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def complaint(capsys, *line: object) -> str:
    """Return the one line that the program leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in line])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (said,) = captured.err.splitlines()
    return said


def test_one_run_is_drawn_into_its_folder(tmp_path, figures, capsys):
    folder = write_metrics(tmp_path / "run", steps=20)
    assert main([str(folder)]) == str(folder / "metrics.png")
    assert (folder / "metrics.png").read_bytes().startswith(PNG)
    assert capsys.readouterr().out == f"{folder}/metrics.png\n"
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert len(panels) == 6
    trained, held_out = panels["masked-LM loss"].lines
    assert list(trained.get_xdata()) == list(range(10, 201, 10))
    assert list(held_out.get_xdata()) == [0, 50, 100, 150, 200]
    assert held_out.get_ydata()[1] == pytest.approx(5 / 51)
    assert (trained.get_linestyle(), held_out.get_linestyle()) == ("-", "None")
    assert not list(panels["learning rate"].lines[1].get_xdata()), "nothing of it is held out"


def test_several_runs_share_the_panels_and_differ_in_colour(tmp_path, figures):
    folders = [
        write_metrics(tmp_path / "a", steps=5),
        write_metrics(tmp_path / "b", steps=8, teacher=False, offset=1.0),
    ]
    output = tmp_path / "both.svg"
    main([str(folders[0]), str(folders[1] / "metrics.jsonl"), "--output", str(output)])
    assert "<svg" in output.read_text()
    assert not (folders[0] / "metrics.png").exists()
    loss = next(axes for axes in figures[0].axes if axes.get_title() == "masked-LM loss")
    assert len({line.get_color() for line in loss.lines}) == 2
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == [str(folders[0]), str(folders[1] / "metrics.jsonl"), "held out"]


def test_a_metric_that_no_run_has_gets_no_panel(tmp_path, figures):
    main([str(write_metrics(tmp_path / "run", steps=4, teacher=False))])
    assert "distance from the teacher, T² KL" not in {a.get_title() for a in figures[0].axes}
    assert len(figures[0].axes) == 5


def test_values_that_are_not_finite_and_an_unfinished_line_are_left_out(tmp_path, figures):
    folder = write_metrics(tmp_path / "run", steps=2)
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 30, "phase": "train", "loss": NaN, "accuracy": 0.5}\n')
        handle.write('{"step": 40, "phase": "tra')
    assert read_run(str(folder)).records[-1]["step"] == 30
    main([str(folder)])
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert list(panels["loss that is trained on"].lines[0].get_xdata()) == [10, 20]
    assert list(panels["accuracy at masked positions"].lines[0].get_xdata()) == [10, 20, 30]


def test_any_name_of_a_run_is_in_the_legend(tmp_path, figures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("_run", "a$b{$c"):
        write_metrics(tmp_path / name, steps=2)
    main(["_run", "a$b{$c"])
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[:2] == ["./_run", "a$b{$c"]


def test_missing_metrics_are_a_one_line_error(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty/metrics.jsonl: cannot be read" in complaint(
        capsys, tmp_path / "empty"
    )
    assert "absent: cannot be read" in complaint(capsys, tmp_path / "absent")
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert "holds no metrics yet" in complaint(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1')
    assert "holds no metrics yet" in complaint(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text(
        '{"step": 1, "phase": "train", "loss": NaN}\n'
    )
    assert "nothing to plot" in complaint(capsys, tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n")
    assert "binary:1: is damaged" in complaint(capsys, tmp_path / "binary")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    "line",
    [
        *("text", "[1]", "{}", "3"),
        '{"step": "1", "phase": "train", "loss": 2.0}',
        '{"step": 1, "phase": "train", "loss": "2"}',
        '{"step": 1, "phase": "train", "lr": null}',
        f'{{"step": 1, "phase": "train", "loss": 1{"0" * 400}}}',
    ],
)
def test_a_line_that_is_no_metrics_is_named(tmp_path, capsys, line):
    folder = write_metrics(tmp_path / "run", steps=1)
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write(f"{line}\n")
    said = complaint(capsys, folder)
    assert said == (f"error: {folder}/metrics.jsonl:3: is damaged or not a metric line; delete it")


def test_an_output_that_cannot_be_written_is_a_one_line_error(tmp_path, capsys):
    folder = write_metrics(tmp_path / "run", steps=1)
    wrong = {tmp_path / "absent" / "x.png": "there is no folder", tmp_path / "x.words": "use .png"}
    for output, message in wrong.items():
        said = complaint(capsys, folder, "--output", output)
        assert said.startswith(f"error: {output}: ")
        assert message in said
    assert not list(tmp_path.glob("*x.*"))

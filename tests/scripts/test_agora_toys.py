"""The toy tasks of Agora: what they draw, what they print and draw."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from bort.agora import toys
from bort.agora.algorithm import input_key
from scripts import agora_toys


@pytest.mark.parametrize("name", toys.TASKS)
def test_only_the_training_set_is_biased_and_no_row_is_shared(name):
    task, _ = toys.TASKS[name]
    data = toys.draw_task(task, seed=3)
    sets = (data.train, data.dev, data.sample, data.test)
    assert [len(each) for each in sets] == [40, 100, 30, 2000]
    keys = [input_key(example) for each in sets for example in each.inputs]
    assert len(set(keys)) == len(keys)
    inputs, _, seen = task(5000, np.random.default_rng(0))
    assert 0.3 < seen.mean() < 0.8
    lower, upper = inputs[seen].min(0), inputs[seen].max(0)
    inside = np.all((inputs >= lower) & (inputs <= upper), axis=1).mean()
    assert inside < 0.8 or name == "XOR"  # XOR's three quadrants fill the square
    for each in sets:
        assert 0.2 < each.labels.mean() < 0.8


def test_interval_is_students():
    mean, half = toys.interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert half == pytest.approx(3.18245 * np.sqrt(5 / 3) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--plot", "x.words", "use .png, .pdf or .svg"),
        ("--plot", "absent/x.png", "there is no folder"),
        ("--table", "absent/x.md", "there is no folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_draw(
    tmp_path, monkeypatch, capsys, flag, name, message
):
    monkeypatch.setattr(toys, "compare_methods", lambda *_: pytest.fail("computed"))
    with pytest.raises(SystemExit):
        agora_toys.main([flag, str(tmp_path / name)])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_table_and_plot(tmp_path, capsys, figures):
    plot, table = tmp_path / "toys.png", tmp_path / "toys.md"
    argv = ["--seeds", "3", "--plot", str(plot), "--table", str(table)]
    accuracies = agora_toys.main(argv)
    assert list(accuracies) == list(toys.TASKS)
    assert all(values.shape == (3, 4) for values in accuracies.values())
    assert np.mean([values[:, 1] - values[:, 0] for values in accuracies.values()]) > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in figures[0].axes] == list(toys.TASKS)
    for axes, values in zip(figures[0].axes, accuracies.values()):
        assert np.array([line.get_ydata() for line in axes.lines[:3]]) == pytest.approx(values)
    text = table.read_text()
    assert text in capsys.readouterr().out
    moons = accuracies["two moons"]
    assert f"| {moons[:, 0].mean():.3f} ±" in text.splitlines()[2]

"""Markdown tables and plots."""

from __future__ import annotations

import pytest

from bort.errors import UserError
from bort.plots import figure_file
from bort.tables import markdown_table, spread


def test_a_table_in_markdown():
    text = markdown_table(["task", "score"], [["RTE", "0.5"], ["a|b", "1\n2"]])
    assert text == "| task | score |\n| --- | --- |\n| RTE | 0.5 |\n| a\\|b | 1 2 |\n"
    assert markdown_table(["a"], []) == "| a |\n| --- |\n"


def test_the_spread_of_several_runs_is_that_of_a_sample():
    assert spread([1.0, 2.0, 3.0], digits=2) == "2.00 ± 1.00"
    assert spread([0.5]) == "0.500"


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_a_plot_is_written_in_the_format_of_its_name(tmp_path, suffix, start):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{suffix}"
    with figure_file(str(path), 2, 1) as figure:
        figure.subplots().plot([1, 2])
        assert tuple(figure.get_size_inches()) == (2, 1)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_a_plot_that_fails_leaves_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(KeyError), figure_file(str(tmp_path / "plot.png"), 2, 1):
        raise KeyError
    for kind in ("words", "pgf"):
        with pytest.raises(UserError, match=rf"a plot cannot be written as \.{kind}; use .png"):
            figure_file(str(tmp_path / f"plot.{kind}"), 2, 1).__enter__()
    assert list(tmp_path.iterdir()) == []

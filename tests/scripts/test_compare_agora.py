"""The table of Agora against plain fine-tuning and the best of the grid, from runs' files."""

from __future__ import annotations

import numpy as np
import pytest

from bort.files import read_json, write_json
from scripts import compare_agora


def write_runs(folder, plain=(0.5, 0.6), grid=(0.55, 0.7), best=(0.65, 0.6), random=(0.5, 0.4)):
    for draw, (one, two, three, four) in enumerate(zip(plain, grid, best, random)):
        answers = {"dev": {"metrics": {"accuracy": 0.9}}, "test": {"metrics": {"accuracy": one}}}
        contents = {"plain": {"answers": answers, "seconds": 2.0 + draw}}
        for name, score in (("agora", three), ("random", four)):
            contents[name] = {
                "rounds": [{"seconds": 10.0}, {"seconds": 4.0 + draw}],
                "best_of_grid": {"test": {"accuracy": two}},
                "best": {"test": {"accuracy": score}, "dev": {"accuracy": 0.9}},
                "timaeus": {"source": "labels", "test": {"accuracy": 0.8}},
            }
        for name, content in contents.items():
            path = folder / name / str(draw) / "SST-2"
            path.mkdir(parents=True)
            write_json(str(path / f"{'metrics' if name == 'plain' else 'agora'}.json"), content)
    return [
        word
        for name in ("plain", "agora", "random")
        for word in (f"--{name}", *(str(folder / name / str(draw)) for draw in range(len(plain))))
    ]


def test_means_spreads_and_draws_won(tmp_path, capsys):
    columns = compare_agora.main(["SST-2", *write_runs(tmp_path)])
    found = {column.name: column for column in columns}
    assert list(found) == ["plain", "best of grid", "Agora", "random augmentation", "Timaeus"]
    assert np.allclose(found["Agora"].scores, [0.65, 0.6])
    seconds = {name: column.seconds for name, column in found.items()}
    assert seconds == {
        "plain": 2.5, "best of grid": 10.0,
        "Agora": 14.5, "random augmentation": 14.5, "Timaeus": None,
    }  # fmt: skip
    given = write_runs(tmp_path / "again")
    without = compare_agora.main(["SST-2", *given[: given.index("--random")]])
    assert [column.name for column in without] == ["plain", "best of grid", "Agora", "Timaeus"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == (
        "| SST-2 | 0.550 ± 0.071 | 0.625 ± 0.106 | 0.625 ± 0.035 | 0.450 ± 0.071 | 0.800 ± 0.000 "
        "| 0.000 ± 0.141 | 1 of 2 |"
    )
    assert lines[3] == "| seconds of fits | 2 | 10 | 14 | 14 |  |  |  |"


def test_mistakes_are_named(tmp_path, capsys):
    given = write_runs(tmp_path)
    with pytest.raises(SystemExit):
        compare_agora.main(["SST-2", *given, str(tmp_path / "random" / "0")])
    assert "give as many runs of each" in capsys.readouterr().err
    twice = [word.replace(f"{tmp_path}/agora/1", f"{tmp_path}/agora/../agora/0") for word in given]
    with pytest.raises(SystemExit):
        compare_agora.main(["SST-2", *twice])
    assert "--agora: names a run twice; give one run of each draw" in capsys.readouterr().err
    path = str(tmp_path / "agora" / "1" / "SST-2" / "agora.json")
    content = read_json(path)
    content["best"]["test"] = None
    write_json(path, content)
    with pytest.raises(SystemExit):
        compare_agora.main(["SST-2", *given])
    assert f"{tmp_path / 'agora' / '1'}: has no metrics of a test set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rounds", [], "agora.json: is not the record of a run, it has no rounds"),
        ("best", {"test": {"f1": 0.5}}, "1: its test set has no 'accuracy' of SST-2"),
    ],
)
def test_records_of_something_else_are_named(tmp_path, capsys, key, value, message):
    given = write_runs(tmp_path)
    path = str(tmp_path / "agora" / "1" / "SST-2" / "agora.json")
    write_json(path, {**read_json(path), key: value})
    with pytest.raises(SystemExit):
        compare_agora.main(["SST-2", *given])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("agora", "agora.json", "agora.json: the run has not finished; rerun its command"),
        ("random", "agora.json", "agora.json: the run has not finished; rerun its command"),
        ("plain", "metrics.json", "1: has no metrics of a test set"),
    ],
)
def test_runs_without_results_are_named(tmp_path, capsys, name, file, message):
    given = write_runs(tmp_path)
    path = tmp_path / name / "1" / "SST-2" / file
    content = read_json(str(path))
    content.pop("best", None)  # written at the end of a run of Agora
    content.pop("best_of_grid", None)
    content.get("answers", {}).pop("test", None)  # there was no test file
    write_json(str(path), content)
    with pytest.raises(SystemExit):
        compare_agora.main(["SST-2", *given])
    assert message in capsys.readouterr().err
    path.write_text("{}")
    with pytest.raises(SystemExit):
        compare_agora.main(["SST-2", *given])
    assert f"error: {path}: " in capsys.readouterr().err

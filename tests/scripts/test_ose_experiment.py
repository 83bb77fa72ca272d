"""The parts of scripts/experiments/ose.sh: a smaller vocabulary, and the tables of made-up runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mxnet import nd

from bort.bort import get_bort_model
from bort.errors import UserError
from bort.saved_model import ModelConfig, load_model, save_model
from bort.shapes import BodyOptions
from bort.wordpiece import Normalizer, WordPiece
from scripts.experiments import ose_tables, reduce_vocabulary
from tests.reference import redraw
from tests.wordpieces import VOCABULARY

SHAPE = "bort_1_2_16_8"
RARE = ["##aff", "##want", "runn"]  # not in the text


@pytest.fixture
def model(tmp_path):
    """Write a masked LM with two token types; returns its path, and that of a text."""
    tokenizer = WordPiece(VOCABULARY, Normalizer())
    options = BodyOptions(layer_norm_eps=1e-12, type_separator=tokenizer.eos_id)
    network, _ = get_bort_model(SHAPE, vocab=tokenizer, options=options)
    redraw(network, seed=1)
    config = ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "masked_lm", **options._asdict()
    )
    save_model(str(tmp_path / "model/best.params"), network, config, tokenizer)
    (tmp_path / "text.txt").write_text("the un able,\n\nunable wanted the cafe want ing\n")
    return tmp_path / "model", tmp_path / "text.txt"


def test_a_reduced_model_gives_the_logits_of_the_pieces_it_keeps(model, tmp_path, capsys):
    folder, text = model
    needed = 5 + sum(len(token.removeprefix("##")) == 1 and token.isascii() for token in VOCABULARY)
    flags = [f"--text={text}", f"--output={tmp_path}/small"]
    reduce_vocabulary.main([str(folder), *flags, f"--pieces={needed + 6}"])
    assert f"kept {needed + 6} pieces, 100.0% of the text's" in capsys.readouterr().out
    old, new = load_model(str(folder)), load_model(f"{tmp_path}/small")
    kept = new.tokenizer.tokens(range(new.tokenizer.vocab_size))
    assert not set(RARE) & set(kept)
    assert {"the", "want", "##able", "cafe"} < set(kept)
    rows = [VOCABULARY.index(token) for token in kept]

    logits = []
    for saved in (old, new):
        ids = [saved.tokenizer.encode(text) for text in ("the un", "want able")]
        tokens = [saved.tokenizer.bos_id]
        for each in ids:
            tokens += [*each, saved.tokenizer.eos_id]
        inputs = nd.array([tokens]), nd.array([len(tokens)]), nd.array([[1, len(tokens) - 2]])
        logits.append(saved.network(*inputs)[-1].asnumpy())
    np.testing.assert_allclose(logits[1], logits[0][..., rows], rtol=1e-5, atol=1e-6)


def test_a_vocabulary_of_an_impossible_size_is_refused(model, tmp_path):
    tokenizer = WordPiece(VOCABULARY, Normalizer())
    counts = reduce_vocabulary.count_pieces(tokenizer, str(model[1]))
    for pieces in (10, len(VOCABULARY) + 1):
        with pytest.raises(UserError, match=f"--pieces {pieces}: must be from"):
            reduce_vocabulary.frequent_pieces(tokenizer, counts, pieces)


def row(position, name, size, gain, errors):
    mean = None if None in errors else float(np.mean(errors))
    w = 0.0 if mean is None else gain / mean
    values = {"position": position, "model_name": name, "parameters": size, "gain": gain}
    return {**values, "errors": errors, "error": mean, "w": w, "theta": {"lr": 0.01}}


def write_search(folder, rows, lower_bound=4.0, plateau=2.0):
    folder.mkdir(parents=True)
    report = {"lower_bound": lower_bound, "plateau": plateau, "table": rows}
    (folder / "ose.json").write_text(json.dumps(report))


@pytest.fixture
def experiment(tmp_path):
    short = [
        row(0, "a", 100, 0.9, [1.9, 2.1]),  # at the plateau
        row(1, "b", 200, 0.8, [1.0, 1.6]),  # wins by divergence
        row(2, "c", 201, 0.8, [1.5, 1.7]),
        row(3, "d", 900, 0.2, [1.1, None]),
    ]
    write_search(tmp_path / "search-200", short)
    slower = [{**each, "theta": {"lr": 0.002}} for each in short]
    write_search(tmp_path / "rates", [*short, *slower])
    write_search(tmp_path / "theory", [{**each, "theta": {"lr": 0.5}} for each in short])
    long = [{**each, "errors": [0.5, 0.5], "error": 0.5, "w": each["gain"] / 0.5} for each in short]
    write_search(tmp_path / "search-1000", long)
    for name, kl in {"b": 0.3, "c": 0.2}.items():
        for seed in (1, 2):
            run = tmp_path / f"pretrained/{name}-{seed}"
            run.mkdir(parents=True)
            records = [
                {"step": step, "phase": "eval", "time": 0.0, "kl": kl + seed * 0.1, "mlm_loss": 5.0}
                for step in (0, 2000)
            ]
            (run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    (tmp_path / "pretrained/b-3").mkdir()
    (tmp_path / "pretrained/b-3/metrics.jsonl").write_text("")  # has just begun
    return tmp_path


def test_the_tables_of_a_search_that_did_not_train_all(tmp_path, capsys):
    short = [
        row(0, "a", 100, 0.9, [None, 2.1]),
        row(1, "b", 200, 0.8, [None, 1.6]),
        {**row(2, "T", 900, 0.0, [1.0]), "errors": [], "error": None},
    ]
    write_search(tmp_path / "search-200", short)
    write_search(tmp_path / "search-1000", short[1:2])
    ose_tables.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "0 of 2 shapes below it with every seed" in out
    assert "| 200 | divergence | 0 | - | - | - |" in out
    assert "| 200 | divergence | 1 | b (100%) | a (86%) | a (86%) |" in out
    assert "| 1000 | divergence | 1 | b (100%) | - | - |" in out


def test_the_tables_of_an_experiment(experiment, capsys):
    ose_tables.main([str(experiment)])
    out = capsys.readouterr().out
    assert "200 steps: T's entropy 4.000 nats, plateau of the divergence 2.000, " in out
    assert "2 of 4 shapes below it with every seed" in out
    w = 0.8 / 1.3, 0.8 / 5.3
    cells = f"1.300 ± 0.424 | 0.500 ± 0.000 | 0.01 | 0.01 | {w[0]:.4f} | {w[1]:.4f} |"
    assert f"| b | 200 | 0.800 | {cells}" in out
    assert "| learning rate | 0.002 | 0.01 |" in out
    assert "| c | 1.600 | 1.600 |" in out
    assert "| learning rate, theory mode | 0.5 |" in out
    assert "| c | 1.600 |\n" in out
    assert "| d | 900 | 0.200 | failed |" in out
    share = (0.9 / 2.0) / (0.8 / 1.3)
    assert f"| 200 | divergence | mean | b (100%) | c ({0.8 / 1.6 / w[0]:.0%}) |" in out
    assert f"| a ({share:.0%}) |" in out  # stride 4 sees position 0 alone
    assert "| 200 | cross-entropy | mean | b (100%) |" in out
    assert "| b | 1.300 ± 0.424 | 0.500 ± 0.000 | 0.450 ± 0.071 | 5.000 ± 0.000 | 2 |" in out
    assert "Spearman's correlation of divergence after 200 and 1000 steps, 4 shapes: " in out
    assert "200 steps and the longer runs: seed 1 -1.00, seed 2 -1.00, means -1.00" in out


def test_longer_runs_that_have_not_ended_are_left_out(experiment, capsys):
    unfinished = experiment / "pretrained/c-1/metrics.jsonl"
    unfinished.write_text(unfinished.read_text().replace("2000", "500"))
    ose_tables.main([str(experiment)])
    out = capsys.readouterr().out
    assert "| divergence, 2000 steps | masked-LM loss | seeds |" in out
    assert "| 0.450 ± 0.071 | 5.000 ± 0.000 | 2 |" in out
    assert "| 0.400 | 5.000 | 1 |" in out
    assert "200 steps and the longer runs: seed 2 -1.00, means -1.00" in out


def test_a_longer_search_may_have_fewer_shapes(experiment, capsys):
    path = experiment / "search-1000/ose.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "table": report["table"][::2]}))
    ose_tables.main([str(experiment)])
    out = capsys.readouterr().out
    w = 0.8 / 1.3, 0.8 / 5.3
    cells = f"1.300 ± 0.424 | - | 0.01 | - | {w[0]:.4f} | {w[1]:.4f} | - | - |"
    assert f"| b | 200 | 0.800 | {cells}" in out
    assert "| 1000 | divergence | mean | a (100%) | a (100%) | a (100%) |" in out
    assert "Spearman's correlation of divergence" not in out
    assert "| b | 1.300 ± 0.424 | - | 0.450 ± 0.071 |" in out
    assert "1000 steps and the longer runs" not in out


def test_a_choice_below_the_bound_is_marked(tmp_path, capsys):
    rows = [row(0, "a", 100, 0.9, [9.0]), row(1, "b", 200, 0.8, [1.0])]
    write_search(tmp_path / "search-200", rows)
    ose_tables.main([str(tmp_path)])
    assert "| b (100%) | a (12%, below the bound) |" in capsys.readouterr().out


def test_the_winner_and_those_of_its_size(experiment, capsys):
    ose_tables.main([str(experiment), "--winners"])
    assert capsys.readouterr().out.split("\n") == ["b 0.01", "c 0.01", "a 0.01", "d 0.01", ""]


def test_a_shape_counts_with_its_best_learning_rate(tmp_path, capsys):
    rows = [
        {**row(0, "a", 100, 0.9, [1.0, 3.0]), "theta": {"lr": 0.001}},
        {**row(0, "a", 100, 0.9, [1.5, 1.5]), "theta": {"lr": 0.002}},
        {**row(1, "b", 101, 0.9, [1.2, 2.9]), "theta": {"lr": 0.001}},
        {**row(1, "b", 101, 0.9, [None, 1.0]), "theta": {"lr": 0.002}},
    ]
    write_search(tmp_path / "search-200", rows)
    ose_tables.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "1 of 2 shapes below it with every seed" in out
    assert "| a | 100 | 0.900 | 1.500 ± 0.000 | 0.002 |" in out
    assert "| b | 101 | 0.900 | 2.050 ± 1.202 | 0.001 |" in out
    assert "| 200 | divergence | 0 | a (100%) | a (100%) | a (100%) |" in out  # with 0.001
    assert "| 200 | divergence | mean | a (100%) |" in out
    ose_tables.main([str(tmp_path), "--winners"])
    assert capsys.readouterr().out.split("\n") == ["a 0.002", "b 0.001", ""]


def test_the_two_rates_of_the_lowest_mean_errors(tmp_path, capsys):
    rows = [
        {**row(0, "a", 1, 0.9, [error]), "theta": {"lr": rate}}
        for rate, errors in {0.002: [2.0, 1.0], 0.005: [1.4, 1.4], 0.01: [None, 0.1]}.items()
        for error in errors
    ]
    write_search(tmp_path / "rates", rows)
    ose_tables.main([str(tmp_path), "--best", "2e-3", "5e-3", "1e-2"])
    assert capsys.readouterr().out == "5e-3,2e-3\n"


def test_tables_of_nothing_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        ose_tables.main([str(tmp_path)])
    assert "has no finished search" in capsys.readouterr().err

"""The search itself, against brute force and by hand; nothing here knows of BERT."""

from __future__ import annotations

import functools
import itertools
import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from bort.errors import UserError
from bort.jobs import OverMemoryError, OverTimeError, Ranks, Serial
from bort.journal import record_of
from bort.ose.abnc import LayerCost, Layers, check_abnc
from bort.ose.candidates import (
    Candidate,
    Measurement,
    SearchJournal,
    executor_map,
    process_map,
)
from bort.ose.search import (
    MINIMUM_ERROR,
    MODES,
    Member,
    extract,
    hyperparameter_sets,
    largest,
    ordered,
    pareto_front,
    size_and_speed_gain,
    w_coefficient,
)
from data.metrics import spearman
from tests.ranks import ThreadRanks

ROOT = str(Path(__file__).resolve().parents[2])
SPACE = list(itertools.product(range(1, 9), range(1, 9)))  # 64 of (depth, width)


def size(architecture):
    depth, width = architecture
    return 10 * width + depth * width**2


def cost(architecture):
    depth, width = architecture
    return 2 * depth * width**2 + width


def smooth_error(architecture, steps, hparams, generator):
    return 1 + 20 / size(architecture) ** 0.7


def noisy_error(architecture, steps, hparams, generator):
    scale = hparams.get("scale", 1)
    return float(scale * smooth_error(architecture, steps, hparams, generator) + generator.random())


def search(error=smooth_error, **options):
    return extract(SPACE, size, cost, error, **options)


# ---------------------------------------------------------------------------------------------
# W, the order, the maximum point


def test_w_by_hand():
    top = Member((9,), size=100, cost=80)
    member = Member((1,), size=25, cost=40)
    assert size_and_speed_gain(member, top) == pytest.approx(0.375)  # 75/100 * 40/80
    assert w_coefficient(member, top, 1.5) == pytest.approx(0.25)
    assert w_coefficient(top, top, 1.5) == 0
    assert w_coefficient(member, top, math.inf) == 0
    assert w_coefficient(member, top, math.nan) == 0
    assert w_coefficient(member, top, 0.0) == pytest.approx(0.375 / MINIMUM_ERROR)
    with pytest.raises(ValueError, match="negative"):
        w_coefficient(member, top, -0.1)


def test_order_is_size_then_cost_then_tie_break():
    sizes = {(1, 1): 5, (2, 1): 5, (3, 1): 5, (0, 2): 5, (9, 9): 1}
    costs = {(1, 1): 7, (2, 1): 6, (3, 1): 7, (0, 2): 7, (9, 9): 9}
    plain = [m.architecture for m in ordered(sizes, sizes.get, costs.get)]
    assert plain == [(9, 9), (2, 1), (0, 2), (1, 1), (3, 1)]
    by_second = ordered(sizes, sizes.get, costs.get, lambda a: (a[1], a))
    assert [m.architecture for m in by_second] == [(9, 9), (2, 1), (1, 1), (3, 1), (0, 2)]
    assert len(ordered(SPACE + SPACE, size, cost)) == 64
    with pytest.raises(UserError, match="empty"):
        ordered([], size, cost)


def test_maximum_point_is_the_largest_and_never_trained():
    def error(architecture, *_):
        assert architecture != (8, 8)
        return 1.0

    result = search(error)
    assert result.maximum_point.architecture == (8, 8)
    last = result.table[-1]
    assert (last.architecture, last.w, last.error, last.errors) == ((8, 8), 0.0, None, ())


@pytest.mark.parametrize("zero", [0, 1])
def test_a_maximum_point_without_parameters_or_operations_is_refused(zero):
    measures = [size, cost]
    measures[zero] = lambda a: 0
    with pytest.raises(UserError, match=r"maximum point \(.*\): has .*; both must be above 0"):
        extract(SPACE, *measures, smooth_error)


def test_the_maximum_point_may_be_outside_but_not_below():
    result = search(maximum_point=(20, 20))
    assert result.maximum_point == Member((20, 20), size((20, 20)), cost((20, 20)))
    assert all(row.w > 0 for row in result.table)
    with pytest.raises(UserError, match=r"maximum point \(7, 8\): \(8, 8\) has more"):
        search(maximum_point=(7, 8))


def test_a_space_without_a_member_largest_in_both_is_refused():
    costs = {(1,): 3, (2,): 9, (3,): 4}
    with pytest.raises(UserError, match="maximum point"):
        extract(costs, lambda a: a[0], costs.get, lambda *_: 1.0)


# ---------------------------------------------------------------------------------------------
# What is found


@pytest.mark.parametrize("seed", range(20))
def test_stride_1_equals_brute_force(seed):
    errors = dict(zip(SPACE, np.random.default_rng(seed).uniform(0.5, 8, len(SPACE))))
    top_size, top_cost = max(map(size, SPACE)), max(map(cost, SPACE))
    w = {a: (1 - size(a) / top_size) * (1 - cost(a) / top_cost) / errors[a] for a in SPACE}
    best = max(w, key=w.get)
    result = search(lambda a, *_: errors[a])
    assert result.best.architecture == best
    assert result.best.w == pytest.approx(w[best], rel=1e-12)
    assert [row.w for row in result.table] == pytest.approx(
        [w[row.architecture] for row in result.table], rel=1e-12
    )


@pytest.mark.parametrize("stride", [1, 2, 3, 8, 63, 64])
def test_every_stride_th_of_the_order_is_visited(stride):
    everything = search(noisy_error)
    some = search(noisy_error, stride=stride)
    assert [row.position for row in some.table] == list(range(0, 64, stride))
    assert some.table == everything.table[::stride]
    assert some.best.w == max(row.w for row in some.table)
    assert some.space_size == 64


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("seed", range(10))
def test_the_bound_holds_for_errors_that_are_smooth_along_the_order(stride, seed):
    generator = np.random.default_rng(seed)
    floor, scale, power = generator.uniform([0.1, 1, 0.2], [3, 50, 1.2])
    error = lambda a, *_: floor + scale / size(a) ** power  # noqa: E731
    best, found = search(error).best.w, search(error, stride=stride).best.w
    assert best / stride <= found <= best
    assert abs(best - found) / found <= abs(1 - stride)


def test_the_number_of_trainings_falls_as_one_over_the_stride():
    pause = 0.002
    calls = []

    def error(*given):
        calls.append(given)
        time.sleep(pause)
        return 1.0

    for stride in (1, 2, 4):
        calls.clear()
        start = time.perf_counter()
        result = search(error, stride=stride, maximum_point=(9, 9))
        elapsed = time.perf_counter() - start
        assert len(calls) == len(result.table) == 64 // stride
        assert pause * len(calls) <= sum(row.seconds for row in result.table) <= elapsed


def test_a_worse_error_never_helps():
    generator = np.random.default_rng(0)
    for _ in range(30):
        errors = dict(zip(SPACE, generator.uniform(0.5, 8, len(SPACE))))
        before = search(lambda a, *_, errors=errors: errors[a])
        worse = SPACE[generator.integers(len(SPACE) - 1)]
        raised = {**errors, worse: errors[worse] * 1.5}
        after = search(lambda a, *_, errors=raised: errors[a])
        old, new = ({r.architecture: r.w for r in x.table} for x in (before, after))
        assert new[worse] < old[worse]
        assert {a: w for a, w in new.items() if a != worse} == {
            a: w for a, w in old.items() if a != worse
        }
        assert before.best.architecture in (after.best.architecture, worse)


def test_of_equal_size_and_cost_the_lower_error_wins():
    space = [(1, 0), (1, 1), (9, 0)]
    result = extract(space, lambda a: a[0], lambda a: a[0], lambda a, *_: 2.0 - a[1])
    assert result.best.architecture == (1, 1)


def test_ties_go_to_the_smaller_model():
    errors = {(1,): 0.8, (2,): 0.6, (4,): 0.2, (5,): 1.0}  # g: 0.64, 0.36, 0.04
    exact = {a: size_and_speed_gain(Member(a, a[0], a[0]), Member((5,), 5, 5)) for a in errors}
    result = extract(errors, lambda a: a[0], lambda a: a[0], lambda a, *_: exact[a])
    assert [row.w for row in result.table] == [1, 1, 1, 0]
    assert result.best.architecture == (1,)


def test_seeds_are_averaged_before_w_is_taken():
    draws = iter([1.0, 3.0, 2.0, 6.0])
    result = extract(
        [(1,), (2,), (9,)], lambda a: a[0], lambda a: a[0], lambda *_: next(draws), repeats=2
    )
    first, second, _ = result.table
    assert (first.errors, first.error) == ((1.0, 3.0), 2.0)
    assert (second.errors, second.error) == ((2.0, 6.0), 4.0)
    assert first.w == pytest.approx((8 / 9) ** 2 / 2)


def test_a_lower_bound_is_subtracted_before_w_is_taken():
    bound = 0.9
    given = extract(SPACE, size, cost, smooth_error, lower_bound=bound)
    less = extract(SPACE, size, cost, lambda *run: smooth_error(*run) - bound)
    assert given == less
    assert given.best.architecture != extract(SPACE, size, cost, smooth_error).best.architecture
    with pytest.raises(ValueError, match="must not be negative"):
        extract(SPACE, size, cost, smooth_error, lower_bound=2.0)


def test_errors_below_0_with_a_lower_bound_below_them_resume(tmp_path):
    def error(*run):
        return smooth_error(*run) - 10

    search = functools.partial(extract, SPACE, size, cost, lower_bound=-20.0)
    expected = search(error, journal=SearchJournal(str(tmp_path), {}))
    again = SearchJournal(str(tmp_path), {})
    assert search(lambda *run: pytest.fail("measured again"), journal=again) == expected


def test_an_error_below_the_lower_bound_ends_the_search_at_once():
    measured = []

    def error(architecture, *others):
        measured.append(architecture)
        return 0.5

    with pytest.raises(ValueError, match=r"below lower_bound, 0\.6"):
        extract(SPACE, size, cost, error, lower_bound=0.6)
    assert len(measured) == 1


def test_hyperparameters_that_can_be_walked_through_once():
    chosen = [{"scale": 3}, {"scale": 1}]
    assert search(noisy_error, hparams=iter(chosen)) == search(noisy_error, hparams=chosen)


def test_numbers_of_numpy_are_those_of_python():
    space = list(itertools.product(np.arange(1, 9), np.arange(1, 9)))
    chosen = [{"scale": np.int64(2)}]
    found = extract(space, size, cost, noisy_error, hparams=chosen, seed=np.int64(1))
    plain = search(noisy_error, hparams=[{"scale": 2}], seed=1)
    assert [row.architecture for row in found.table] == [row.architecture for row in plain.table]
    # The noise is the same; a power may differ in its last bit.
    assert [row.w for row in found.table] == pytest.approx([row.w for row in plain.table])
    with pytest.raises(TypeError, match="plain values"):
        search(hparams=[{"scale": {1}}])


def test_one_text_in_place_of_a_list_of_values_is_refused():
    with pytest.raises(UserError, match="optimizer: expected a list of values, found 'sgd'"):
        hyperparameter_sets(optimizer="sgd")


def test_the_best_of_all_hyperparameter_sets_wins():
    chosen = [{"scale": 3}, {"scale": 1}, {"scale": 2}]
    result = search(noisy_error, hparams=chosen, stride=5)
    assert [row.hparams for row in result.table[:3]] == chosen
    assert len(result.table) == 13 * 3
    assert result.best.hparams == {"scale": 1}
    assert result.best.w == max(row.w for row in result.table)


def test_hyperparameter_sets_are_the_grid_under_a_mode():
    sets = hyperparameter_sets("theory", learning_rate=[0.1, 0.2], batch_size=[8])
    assert sets == [
        {**MODES["theory"], "learning_rate": 0.1, "batch_size": 8},
        {**MODES["theory"], "learning_rate": 0.2, "batch_size": 8},
    ]
    assert hyperparameter_sets() == [{"optimizer": "bertadam"}]
    with pytest.raises(UserError, match="mode 'other'"):
        hyperparameter_sets("other")


def test_candidates_that_fail_cannot_win():
    result = search(lambda a, *_: math.nan if a[1] < 4 else smooth_error(a, 0, {}, None))
    assert result.best.architecture[1] >= 4
    failed = [row for row in result.table if row.architecture[1] < 4]
    assert {(row.w, row.errors) for row in failed} == {(0.0, (math.inf,))}
    with pytest.raises(UserError, match="stride 1: no visited architecture has a W above 0"):
        search(lambda *_: math.inf)


def test_one_failed_repeat_fails_the_candidate():
    draws = iter([1.0, math.nan, 1.0, 1.0])
    result = extract(
        [(1,), (2,), (9,)], lambda a: a[0], lambda a: a[0], lambda *_: next(draws), repeats=2
    )
    assert [row.w > 0 for row in result.table] == [False, True, False]


@pytest.mark.parametrize(
    "options", [{"stride": 0}, {"stride": 65}, {"repeats": 0}, {"hparams": []}], ids=str
)
def test_invalid_settings_are_refused(options):
    with pytest.raises(UserError):
        search(**options)


def test_what_the_error_function_gets():
    calls = []

    def error(architecture, steps, hparams, generator):
        calls.append((architecture, steps, dict(hparams), generator.integers(2**40)))
        return 1.0

    def draws(**options):
        calls.clear()
        search(error, **options)
        return list(calls)

    first = draws(max_steps=7, hparams=[{"a": 1}, {"a": 2}], repeats=2, seed=3)
    assert {(steps, hparams["a"]) for _, steps, hparams, _ in first} == {(7, 1), (7, 2)}
    assert len({draw for *_, draw in first}) == len(first) == 63 * 4
    assert draws(max_steps=7, hparams=[{"a": 1}, {"a": 2}], repeats=2, seed=3) == first
    # Neither the limit of steps nor the stride nor the other sets change a candidate's draws.
    longer = {(a, d) for a, *_, d in draws(max_steps=14, hparams=[{"a": 2}], stride=4, seed=3)}
    assert longer < {(a, d) for a, *_, d in first}
    other = draws(max_steps=7, hparams=[{"a": 1}, {"a": 2}], repeats=2, seed=4)
    assert not {d for *_, d in other} & {d for *_, d in first}


# ---------------------------------------------------------------------------------------------
# Executors; resuming after a kill


def test_processes_find_the_same_table(tmp_path):
    options = {"hparams": [{"scale": 1}, {"scale": 2}], "stride": 31}
    journal = SearchJournal(str(tmp_path), {})
    spread = search(noisy_error, **options, map=process_map(2), journal=journal)
    assert spread == search(noisy_error, **options)
    assert len(_lines(tmp_path / "journal-0.jsonl")) == 1 + 3 * 2


def failing_error(architecture, steps, hparams, generator):
    raise RuntimeError(f"cannot train {architecture}")


def test_an_error_in_a_process_reaches_the_caller():
    with pytest.raises(RuntimeError, match="cannot train"):
        search(failing_error, stride=32, map=process_map(1))


def test_a_map_that_loses_candidates_is_caught():
    with pytest.raises(RuntimeError, match="62 of 63"):
        search(map=lambda function, items: (function(item) for item in items[1:]))


def test_ranks_share_the_work_and_agree(tmp_path):
    calls = []

    def error(architecture, *rest):
        calls.append(architecture)
        return noisy_error(architecture, *rest)

    def on_ranks(count, **options):
        journal = SearchJournal(str(tmp_path), {})
        with ThreadRanks(count) as ranks, Ranks(ranks.rank(0)) as executor:
            return search(error, map=executor_map(executor), journal=journal, stride=2)

    serial = search(noisy_error, stride=2)
    assert on_ranks(3) == serial
    assert len(calls) == len(set(calls)) == 32
    assert len(_lines(tmp_path / "journal-0.jsonl")) == 1 + 32
    # Another number of ranks repeats nothing.
    calls.clear()
    assert on_ranks(2) == serial
    assert calls == []


def test_journals_of_several_ranks_are_read(tmp_path):
    """Earlier versions wrote a journal for each rank."""
    expected = search(noisy_error, journal=SearchJournal(str(tmp_path), {}), stride=2)
    lines = _lines(tmp_path / "journal-0.jsonl")
    (tmp_path / "journal-0.jsonl").write_text("\n".join(lines[:10]) + "\n")
    (tmp_path / "journal-1.jsonl").write_text("\n".join([lines[0], *lines[10:]]) + "\n")
    assert search(None, journal=SearchJournal(str(tmp_path), {}), stride=2) == expected


def test_a_candidate_over_a_cap_of_the_executor_is_named():
    def over(candidate):
        raise (OverTimeError if candidate.architecture[0] == 1 else OverMemoryError)(1.5)

    candidates = [Candidate(0, (1, 1), {}, 0), Candidate(1, (2, 1), {}, 0)]
    assert list(executor_map(Serial())(over, candidates)) == [
        Measurement(0, math.inf, 1.5, "time cap"),
        Measurement(1, math.inf, 1.5, "memory cap"),
    ]


def _lines(path):
    return path.read_text().splitlines()


def test_measurements_of_an_interrupted_search_are_reused(tmp_path):
    calls = []

    def error(architecture, steps, hparams, generator):
        if len(calls) == 20:
            raise KeyboardInterrupt
        calls.append(architecture)
        return math.inf if len(calls) == 5 else noisy_error(architecture, steps, hparams, generator)

    with pytest.raises(KeyboardInterrupt):
        search(error, journal=SearchJournal(str(tmp_path), {"data": "x"}))
    again = []

    def error_again(architecture, *rest):
        again.append(architecture)
        return noisy_error(architecture, *rest)

    result = search(error_again, journal=SearchJournal(str(tmp_path), {"data": "x"}))
    assert (len(calls), len(again)) == (20, 43)
    assert not set(again) & set(calls)
    uninterrupted = {row.architecture: row for row in search(noisy_error).table}
    for row in result.table:
        if row.architecture == calls[4]:
            assert row.errors == (math.inf,)
        else:
            assert row == uninterrupted[row.architecture]


def test_a_killed_search_continues(tmp_path):
    program = textwrap.dedent(
        f"""
        import sys, time
        sys.path[:0] = [{ROOT!r}]
        from bort.ose import SearchJournal, extract
        def error(a, steps, hparams, generator):
            time.sleep(float(sys.argv[2]))
            return 1 + generator.random()
        result = extract([(k,) for k in range(1, 41)], lambda a: a[0], lambda a: a[0], error,
                         journal=SearchJournal(sys.argv[1], {{}}))
        assert "mxnet" not in sys.modules, "the search needs NumPy alone"
        print(repr(result.table))
        """
    )
    command = [sys.executable, "-c", program]
    journal = tmp_path / "killed" / "journal-0.jsonl"
    slow = [*command, str(journal.parent), "0.05"]
    with subprocess.Popen(slow, stdout=subprocess.DEVNULL) as process:
        while not journal.exists() or len(_lines(journal)) < 8:
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    before = journal.read_text()
    assert 8 <= len(before.splitlines()) < 40
    with journal.open("a") as handle:
        handle.write('{"candidate": "torn')
    outputs = [
        subprocess.run([*command, folder, "0"], check=True, capture_output=True, text=True).stdout
        for folder in (str(journal.parent), str(tmp_path / "uninterrupted"))
    ]
    continued, uninterrupted = (_without_seconds(text) for text in outputs)
    assert continued == uninterrupted
    assert journal.read_text().startswith(before)
    assert len(_lines(journal)) == 40
    assert all(json.loads(line) for line in _lines(journal))


def _without_seconds(text):
    return [part.split(", seconds=")[0] for part in text.split("Evaluation(")]


def test_a_journal_serves_strides_but_not_other_steps_or_seeds(tmp_path):
    calls = []

    def error(architecture, *rest):
        calls.append(architecture)
        return noisy_error(architecture, *rest)

    def count(**options):
        calls.clear()
        search(error, journal=SearchJournal(str(tmp_path), {}), **options)
        return len(calls)

    assert count(stride=4) == 16
    assert count(stride=4) == 0
    assert count(stride=2) == 16
    assert count(stride=4, max_steps=400) == 16
    assert count(stride=4, seed=1) == 16
    assert count(stride=4, repeats=2) == 16


def test_journals_of_other_searches_are_refused(tmp_path):
    journal = SearchJournal(str(tmp_path), {"data": "x", "mode": "theory"})
    search(stride=32, journal=journal)
    assert len(SearchJournal(str(tmp_path), {"data": "x", "mode": "theory"}).known) == 2
    with pytest.raises(UserError, match=r"journal-0\.jsonl: was written by another.*give another"):
        SearchJournal(str(tmp_path), {"data": "y", "mode": "theory"})


DAMAGE = [b"{", b'{"candidate": "a"}', b"7", b"\xff\xfe", b"[" * 100_000, b""]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line_loses_only_its_own_measurement(tmp_path, capsys, damage):
    expected = search(noisy_error, stride=8, journal=SearchJournal(str(tmp_path), {}))
    path = tmp_path / "journal-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage + b"\n", *lines[3:]]))
    calls = []

    def error(architecture, *rest):
        calls.append(architecture)
        return noisy_error(architecture, *rest)

    assert search(error, stride=8, journal=SearchJournal(str(tmp_path), {})) == expected
    assert len(calls) == 1
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {path}:3: damaged record, moved to {path}.damaged (")
    assert len(warning) < 700
    assert Path(f"{path}.damaged").read_bytes() == damage + b"\n"
    kept = [json.loads(line).get("candidate") for line in path.read_bytes().splitlines()]
    assert sorted(map(str, kept)) == sorted(
        str(json.loads(line).get("candidate")) for line in lines
    )


def test_a_journal_without_its_first_line_is_set_aside(tmp_path, capsys):
    expected = search(noisy_error, stride=8, journal=SearchJournal(str(tmp_path), {}))
    path = tmp_path / "journal-0.jsonl"
    content = path.read_bytes()
    path.write_bytes(b"x" + content)
    assert search(noisy_error, stride=8, journal=SearchJournal(str(tmp_path), {})) == expected
    assert "the line that describes the search is damaged; its 8 records" in capsys.readouterr().err
    damaged = Path(f"{path}.damaged").read_bytes()
    assert sorted(damaged.splitlines()) == sorted((b"x" + content).splitlines())
    assert len(path.read_bytes().splitlines()) == 9


def test_a_journal_cut_within_its_first_line_starts_again(tmp_path):
    (tmp_path / "journal-0.jsonl").write_text('{"format": 2, "sea')
    assert SearchJournal(str(tmp_path), {}).known == {}
    (line,) = _lines(tmp_path / "journal-0.jsonl")
    assert record_of(line.encode()) == {"format": 2, "search": {}}


# ---------------------------------------------------------------------------------------------
# The AB^nC property, the Pareto front, the correlation


def _perceptron(architecture):
    _, width = architecture
    return Layers(
        first=LayerCost(10 * width, 20 * width),
        middle=LayerCost(width**2, 2 * width**2),
        last=LayerCost(3 * width, 6 * width),
    )


def test_abnc_on_a_perceptron():
    space = list(itertools.product((1, 2), (11, 16, 32)))
    conditions = check_abnc(ordered(space, size, cost), _perceptron)
    assert len(conditions) == 9
    assert all(condition.holds for condition in conditions)
    assert all(str(condition).startswith("holds  ") for condition in conditions)


def test_abnc_names_what_fails():
    narrow = check_abnc(ordered([(1, 10), (1, 32)], size, cost), _perceptron)  # as large
    failed = [str(condition) for condition in narrow if not condition.holds]
    assert failed == [
        "FAILS  size: the first layer is smaller than a middle layer ((1, 10): 100 against 100)",
        "FAILS  operations: the first layer is smaller than a middle layer ((1, 10): 200 against "
        "200)",
    ]

    def cubic_last(architecture):
        layers = _perceptron(architecture)
        return layers._replace(last=LayerCost(architecture[1] ** 3, 1))

    grown = check_abnc(ordered([(1, 20), (1, 40), (2, 40)], size, cost), cubic_last)
    failed = [str(condition) for condition in grown if not condition.holds]
    assert failed == [
        "FAILS  size: the last layer grows by a smaller factor than a middle layer ((1, 20) to "
        "(1, 40): 8 against 4 times, and 1 more pair)",
        "FAILS  size: the last layer is smaller than a middle layer ((1, 20): 8e+03 against 400, "
        "and 2 more)",
    ]


def test_abnc_requires_one_largest_member():
    costs = {(1, 20): 3, (2, 20): 9, (3, 20): 4}
    members = ordered(costs, size, costs.get)
    assert largest(members).architecture == (3, 20)
    assert str(check_abnc(members, _perceptron)[-1]) == (
        "FAILS  one member is the largest in size and in operations ((2, 20))"
    )


def test_pareto_front_against_the_definition():
    points = np.random.default_rng(0).integers(0, 6, (60, 3))
    expected = [not any(all(q <= p) and any(q < p) for q in points) for p in points]
    assert pareto_front(points).tolist() == expected
    assert 0 < sum(expected) < 60
    assert pareto_front(np.array([[1, 2], [1, 2], [2, 1], [2, 2]])).tolist() == [True] * 3 + [False]


def test_spearman_equals_scipy():
    assert spearman([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for _ in range(10):
        first, second = generator.integers(0, 9, (2, 40))
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second)[0])


# ---------------------------------------------------------------------------------------------
# A family that really trains: perceptrons of depth x width in NumPy, in both modes


def perceptron_error(architecture, steps, hparams, generator):
    """Held-out squared error of tanh layers after full-batch training on a noisy sin(3x)."""
    depth, width = architecture
    widths = [1, *[width] * depth, 1]
    weights = [generator.normal(0, 1.5 / a**0.5, (a + 1, b)) for a, b in zip(widths, widths[1:])]
    update = (
        adam_steps(weights) if hparams["optimizer"] == "bertadam" else lambda gradients: gradients
    )
    bound = hparams.get("weight_bound", math.inf)
    x = np.linspace(-1, 1, 80)[:, None]
    y = np.sin(3 * x) + np.random.default_rng(0).normal(0, 0.2, x.shape)
    for _ in range(steps):
        for w, step in zip(weights, update(_gradients(weights, x[::2], y[::2]))):
            w[:] = np.clip(w - hparams["learning_rate"] * step, -bound, bound)
    return float(np.mean((_layers(weights, x[1::2])[-1] - y[1::2]) ** 2))


def adam_steps(weights):
    moments = [np.zeros((2, *w.shape)) for w in weights]

    def update(gradients):
        for m, gradient in zip(moments, gradients):
            m[0] += 0.1 * (gradient - m[0])
            m[1] += 0.01 * (gradient**2 - m[1])
        return [m[0] / (np.sqrt(m[1]) + 1e-6) for m in moments]

    return update


def _layers(weights, x):
    outputs = [x]
    for number, w in enumerate(weights, start=1):
        z = outputs[-1] @ w[:-1] + w[-1]
        outputs.append(z if number == len(weights) else np.tanh(z))
    return outputs


def _gradients(weights, x, y):
    outputs = _layers(weights, x)
    delta = 2 * (outputs[-1] - y) / len(x)
    gradients = []
    for w, inputs in zip(reversed(weights), reversed(outputs[:-1])):
        gradients.append(np.concatenate([inputs.T @ delta, delta.sum(0, keepdims=True)]))
        delta = (delta @ w[:-1].T) * (1 - inputs**2)
    return gradients[::-1]


@pytest.mark.parametrize(("mode", "rates"), [("theory", [0.1, 0.3]), ("practical", [0.01, 0.03])])
def test_trained_perceptrons_at_several_strides(mode, rates, tmp_path):
    space = list(itertools.product((1, 2, 3), (2, 4, 6, 8, 12)))
    found = {
        stride: extract(
            space,
            lambda a: 3 * a[1] + (a[0] - 1) * a[1] * (a[1] + 1) + 1,
            lambda a: 2 * a[1] + (a[0] - 1) * a[1] ** 2,
            perceptron_error,
            stride=stride,
            max_steps=150,
            hparams=hyperparameter_sets(mode, learning_rate=rates),
            repeats=2,
            journal=SearchJournal(str(tmp_path), {}),
        )
        for stride in (1, 2, 4)
    }
    best = found[1].best
    errors = [row.error for row in found[1].table if row.errors]
    assert min(errors) < 0.1  # the mean of y^2 is about 0.6, the noise 0.04
    assert best.w == max(row.w for row in found[1].table)
    for stride, result in found.items():
        assert best.w / stride <= result.best.w <= best.w

#!/usr/bin/env python3
"""Print what scripts/experiments/ose.sh found, as Markdown tables.

    python scripts/experiments/ose_tables.py FOLDER [--winners | --best RATE...]

FOLDER is that of the experiment. `--best` prints which two of some learning rates have the lowest
mean errors in FOLDER/rates, separated by a comma. `--winners` prints the shape that the shorter
search chose by divergence and the three whose sizes are nearest to its, each with its best rate.
"""

from __future__ import annotations

import glob
import itertools
import math
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Iterator, Mapping, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

import numpy as np

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.files import read_json
from bort.reporter import read_records
from bort.tables import markdown_table, spread
from bort.types import JSONObject
from data.metrics import spearman

STEPS = (200, 1000)
STRIDES = (1, 2, 4)
ERRORS = ("divergence", "cross-entropy")  # the second adds T's entropy
SIBLINGS = 3  # of the winner, of equal size
KEPT_RATES = 2  # of those that were tried
Row = JSONObject
Reports = Mapping[int, Row]  # of the searches, by their steps
LongerRuns = Mapping[str, Mapping[int, Row]]  # by shape and seed


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Print the tables, or what the next step of the experiment needs."""
    parser = OneLineParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", help="folder of the experiment")
    parser.add_argument("--best", metavar="RATE", nargs="+", help="print the best two of these")
    parser.add_argument("--winners", action="store_true", help="print four shapes alone")
    settings = parser.parse_args(argv)
    folder = settings.folder
    if settings.best:
        print(",".join(best_rates(read_report(f"{folder}/rates/ose.json")["table"], settings.best)))
    elif settings.winners:
        report = read_report(f"{folder}/search-{STEPS[0]}/ose.json")
        for row in winners(report):
            print(row["model_name"], row["theta"]["lr"])
    else:
        print("\n".join(tables(folder)), end="")


def read_report(path: str) -> Row:
    """Read the ose.json of a search; the errors of runs that failed become infinite.

    Rows that are not trained, such as that of T, are left out.
    """
    report: Row = read_json(path)
    report["table"] = [row for row in report["table"] if row["errors"]]
    for row in report["table"]:
        row["errors"] = [math.inf if error is None else error for error in row["errors"]]
        row["error"] = math.inf if row["error"] is None else row["error"]
    return report


def best_rates(table: Sequence[Row], rates: Sequence[str]) -> list[str]:
    """Return the two learning rates with the lowest mean errors over the shapes, best first."""

    def mean_error(rate: str) -> float:
        return fmean(row["error"] for row in table if row["theta"]["lr"] == float(rate))

    return sorted(rates, key=mean_error)[:KEPT_RATES]


def winners(report: Row) -> list[Row]:
    """Return the row of the shape with the largest W, and of those nearest to it in size."""
    rows = list(by_shape(report).values())
    best = max(rows, key=lambda row: row["w"])
    return sorted(rows, key=lambda row: abs(row["parameters"] - best["parameters"]))[: 1 + SIBLINGS]


def tables(folder: str) -> Iterator[str]:
    """Yield the tables of the searches, of their choices, and of the longer runs."""
    paths = {steps: f"{folder}/search-{steps}/ose.json" for steps in STEPS}
    reports = {steps: read_report(path) for steps, path in paths.items() if Path(path).exists()}
    if STEPS[0] not in reports:
        raise UserError(f"{folder}: has no finished search; run scripts/experiments/ose.sh first")
    for name, title in {"rates": "learning rate", "theory": "learning rate, theory mode"}.items():
        if Path(path := f"{folder}/{name}/ose.json").exists():
            yield markdown_table(*rate_table(title, read_report(path)))
    for steps, report in reports.items():
        shapes = by_shape(report)
        left = sum(max(row["errors"]) < report["plateau"] for row in shapes.values())
        yield (
            f"{steps} steps: T's entropy {report['lower_bound']:.3f} nats, plateau of the "
            f"divergence {report['plateau']:.3f}, "
            f"{left} of {len(shapes)} shapes below it with every seed\n"
        )
    yield markdown_table(*search_table(reports))
    header = ["steps", "error", "seed", *(f"stride {stride}" for stride in STRIDES)]
    yield markdown_table(header, choices(reports))
    if len(reports) == len(STEPS):
        yield "".join(order_lines(reports))
    runs = longer_runs(folder)
    if runs:
        yield markdown_table(*longer_table(reports, runs))
    if len(runs) > 1:
        yield "".join(longer_order(reports, runs))


def rate_table(title: str, report: Row) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: the divergence of each shape at each learning rate tried."""
    rates = sorted({row["theta"]["lr"] for row in report["table"]})
    found = {(row["model_name"], row["theta"]["lr"]): row["error"] for row in report["table"]}
    shapes = dict.fromkeys(shape for shape, _ in found)
    rows = [[shape, *(f"{found[shape, rate]:.3f}" for rate in rates)] for shape in shapes]
    return [title, *(f"{rate:g}" for rate in rates)], rows


def search_table(reports: Reports) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: for each shape g, its divergences and its W by both errors.

    They are those of the learning rate with the larger W. A longer search may have trained some of
    the shapes only.
    """
    header = ["shape", "parameters", "g", *(f"divergence, {steps} steps" for steps in reports)]
    header += [f"rate, {steps}" for steps in reports]
    header += [f"W by {error}, {steps}" for steps in reports for error in ERRORS]
    rows = []
    for shape, first in by_shape(reports[STEPS[0]]).items():
        cells = [
            shape,
            f"{first['parameters']:,}",
            f"{first['gain']:.3f}",
            *_errors(reports, shape),
            *(f"{row['theta']['lr']:g}" if row else "-" for row in _rows(reports, shape)),
        ]
        for report in reports.values():
            row = by_shape(report).get(shape)
            cells += [f"{w_of(row, report, error):.4f}" if row else "-" for error in ERRORS]
        rows.append(cells)
    return header, rows


def _errors(reports: Reports, shape: str) -> list[str]:
    """Return the divergence of a shape in each search, "-" where it was not trained."""
    return [_spread(row["errors"]) if row else "-" for row in _rows(reports, shape)]


def _rows(reports: Reports, shape: str) -> list[Optional[Row]]:
    return [by_shape(report).get(shape) for report in reports.values()]


def _spread(errors: Sequence[float]) -> str:
    return spread(errors) if all(map(math.isfinite, errors)) else "failed"


def w_of(row: Row, report: Row, error: str, seed: Optional[int] = None) -> float:
    """Return W of a row by an error of ERRORS, of one seed or (None) of the mean."""
    divergence = row["error"] if seed is None else row["errors"][seed]
    added = report["lower_bound"] if error == "cross-entropy" else 0.0
    return row["gain"] / (divergence + added)


def choices(reports: Reports) -> list[list[str]]:
    """Return for each search and seed what each stride chooses, and its share of the best W."""
    rows = []
    for (steps, report), error in itertools.product(reports.items(), ERRORS):
        seeds = [*range(len(report["table"][0]["errors"])), None]
        for seed in seeds:
            w: dict[int, float] = {}  # of the seed's best learning rate
            for row in report["table"]:
                found = w_of(row, report, error, seed)
                w[row["position"]] = max(found, w.get(row["position"], 0.0))
            names = {row["position"]: row["model_name"] for row in report["table"]}
            cells = [_choice(names, w, stride) for stride in STRIDES]
            rows.append([str(steps), error, "mean" if seed is None else str(seed), *cells])
    return rows


def _choice(names: Mapping[int, str], w: Mapping[int, float], stride: int) -> str:
    """Return the shape of the largest W at a stride, its share, and whether it breaks the bound.

    Both mappings are by position in the ordered space. "-" where a stride visits none that has been
    trained.
    """
    visited = [position for position in w if position % stride == 0 and w[position]]
    if not visited:
        return "-"
    best = max(visited, key=w.__getitem__)
    share = w[best] / max(w.values())
    note = "" if share >= 1 / stride else ", below the bound"
    return f"{names[best]} ({share:.0%}{note})"


def order_lines(reports: Reports) -> Iterator[str]:
    """Yield how the searches of different steps rank the shapes that both have trained."""
    searches = [by_shape(report) for report in reports.values()]
    shapes = [shape for shape in searches[0] if shape in searches[1]]
    if len(shapes) < 3:  # two have an order only
        return
    steps = " and ".join(map(str, reports))
    for name, what in (("error", "divergence"), ("w", "W")):
        values = [np.array([search[shape][name] for shape in shapes]) for search in searches]
        yield (
            f"Spearman's correlation of {what} after {steps} steps, {len(shapes)} shapes: "
            f"{spearman(*values):.2f}\n"
        )


def longer_runs(folder: str) -> LongerRuns:
    """Return the held-out metrics of the longer runs at their last step, by shape and seed.

    Runs that have not come so far are left out.
    """
    found: dict[tuple[str, int], Row] = {}
    for path in glob.glob(f"{glob.escape(folder)}/pretrained/*/metrics.jsonl"):
        name = re.fullmatch(r"(.+)-(\d+)", Path(path).parent.name)
        evaluations = [record for record in read_records(path) if record["phase"] == "eval"]
        if name and evaluations:  # none yet in a run that has just begun
            found[name[1], int(name[2])] = evaluations[-1]
    last = max((run["step"] for run in found.values()), default=0)
    runs: dict[str, dict[int, Row]] = {}
    for (shape, seed), run in sorted(found.items()):
        if run["step"] == last:
            runs.setdefault(shape, {})[seed] = run
    return runs


def longer_table(reports: Reports, runs: LongerRuns) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: the searches' divergences, and what the longer runs end with."""
    last = max(run["step"] for found in runs.values() for run in found.values())
    header = ["shape", *(f"divergence, {steps} steps" for steps in reports)]
    header += [f"divergence, {last} steps", "masked-LM loss", "seeds"]
    rows = []
    for shape, found in runs.items():
        cells = _errors(reports, shape)
        cells += [spread(run[name] for run in found.values()) for name in ("kl", "mlm_loss")]
        rows.append([shape, *cells, str(len(found))])
    return header, rows


def longer_order(reports: Reports, runs: LongerRuns) -> Iterator[str]:
    """Yield how well the order of each search holds, for each seed of all shapes and the means."""
    seeds = sorted(set.intersection(*(set(found) for found in runs.values())))
    finals = {f"seed {seed}": [found[seed]["kl"] for found in runs.values()] for seed in seeds}
    finals["means"] = [fmean(run["kl"] for run in found.values()) for found in runs.values()]
    for steps, report in reports.items():
        search = by_shape(report)
        if not set(runs) <= set(search):
            continue
        errors = np.array([search[shape]["error"] for shape in runs])
        ranks = [f"{name} {spearman(errors, np.array(kl)):.2f}" for name, kl in finals.items()]
        yield f"Spearman's correlation of {steps} steps and the longer runs: {', '.join(ranks)}\n"


def by_shape(report: Row) -> dict[str, Row]:
    """Return for each shape of a search, in its order, the row of the best learning rate."""
    rows: dict[str, Row] = {}
    for row in report["table"]:
        best = rows.setdefault(row["model_name"], row)
        if row["w"] > best["w"]:
            rows[row["model_name"]] = row
    return rows


if __name__ == "__main__":
    main()

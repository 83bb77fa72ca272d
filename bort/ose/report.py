"""The report of a space and of a search: printed lines, ose.json, ose.csv, plots."""

from __future__ import annotations

import csv
import json
import math
import os
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from bort.files import atomic_write, write_json
from bort.ose.abnc import check_abnc
from bort.ose.bert_family import BertFamily
from bort.ose.search import (
    Evaluation,
    Member,
    OseResult,
    check_maximum_point,
    pareto_front,
    size_and_speed_gain,
    w_coefficient,
)
from bort.plots import figure_file
from bort.shapes import Shape
from bort.sums import write_sums
from bort.types import JSONMapping, JSONObject
from data.metrics import spearman

FORMAT_VERSION = 1
SHOWN = 20  # printed rows of the table; the files have all


class OrderedSpace(NamedTuple):
    """A space in order, its closed forms, and the maximum point T."""

    family: BertFamily
    members: list[Member]
    maximum_point: Member

    @property
    def shapes(self) -> list[Shape]:
        """Return the architectures in order."""
        return [member.architecture for member in self.members]


def member_of(family: BertFamily, shape: Shape) -> Member:
    """Return a shape with its closed forms."""
    return Member(shape, family.parameter_size(shape), family.inference_cost(shape))


def print_space(space: OrderedSpace, latencies: Mapping[Shape, float]) -> None:
    """Print the ordered space, the correlation of cost and latency, and the AB^nC conditions."""
    print(f"{'':>4} {'architecture':<24} {'parameters':>12} {'operations':>16} {'g':>7} {'ms':>8}")
    for position, member in enumerate(space.members):
        gain = size_and_speed_gain(member, space.maximum_point)
        line = f"{position:>4} {member.architecture.name:<24} {member.size:>12,} {member.cost:>16,}"
        print(f"{line} {gain:>7.4f} {_milliseconds(latencies, member.architecture):>8}")
    print(f"{len(space.members)} architectures, T = {space.maximum_point.architecture.name}")
    _print_correlation(space.family, latencies)
    print("\n".join(abnc_lines(space)))


def _milliseconds(latencies: Mapping[Shape, float], shape: Shape) -> str:
    return f"{1000 * latencies[shape]:.2f}" if shape in latencies else "-"


def _correlation(family: BertFamily, latencies: Mapping[Shape, float]) -> float | None:
    if len(latencies) < 2:
        return None
    costs = [family.inference_cost(shape) for shape in latencies]
    return spearman(np.array(costs), np.array(list(latencies.values())))


def _print_correlation(family: BertFamily, latencies: Mapping[Shape, float]) -> None:
    correlation = _correlation(family, latencies)
    if correlation is not None:
        count = len(latencies)
        print(f"Spearman's correlation of operations and latency over {count}: {correlation:.4f}")


def abnc_lines(space: OrderedSpace) -> list[str]:
    """Return the report of the AB^nC conditions."""
    conditions = check_abnc(space.members, space.family.layers)
    return [
        "AB^nC property (C is the masked-LM decoder):",
        *(f"  {condition}" for condition in conditions),
        "  open   a smooth training problem, and SGD with clipped weights (theory mode)",
    ]


def explanation(space: OrderedSpace, shape: Shape, result: OseResult | None) -> list[str]:
    """Return lines on the size and cost of a shape, its rank by both, and the error to win.

    Raises `UserError` for a shape larger than the maximum point.
    """
    member = member_of(space.family, shape)
    check_maximum_point(space.maximum_point, [member])
    gains = {m.architecture: size_and_speed_gain(m, space.maximum_point) for m in space.members}
    gain, best = size_and_speed_gain(member, space.maximum_point), max(gains, key=gains.__getitem__)
    others = [other for each, other in gains.items() if each != shape]
    rank, count = 1 + sum(other > gain for other in others), len(others) + 1
    lines = [
        *_cost_lines(space.family, member),
        f"  g = {gain:.3f} against T = {space.maximum_point.architecture.name}: "
        f"rank {rank} of {count} by size and speed",
    ]
    if gain == 0:
        return [*lines, "  never wins: W is 0 whatever the error"]
    lines.append(_winning_error(shape, gain, best, gains[best]))
    return lines + (_standing(member, space.maximum_point, result) if result else [])


def _winning_error(shape: Shape, gain: float, best: Shape, best_gain: float) -> str:
    """Return the line on the error at which a shape wins over the best by size and speed."""
    if shape == best:
        return "  the best by size and speed: another one needs a lower error to win"
    if not best_gain:
        return "  wins whatever its error: W is 0 for every shape of the space"
    over = f"  wins over {best.name} (g = {best_gain:.3f}) "
    if gain == best_gain:
        return over + "when its error is lower"
    if gain > best_gain:
        return over + f"unless its error is {_factor(gain / best_gain)} times higher"
    return over + f"when its error is at least {_factor(best_gain / gain)} times lower"


def _factor(ratio: float) -> str:
    """Return a ratio above 1 with two decimals, or with five where these might read 1.00."""
    return f"{ratio:.2f}" if ratio >= 1.01 else f"{ratio:.6g}"


def _cost_lines(family: BertFamily, member: Member) -> list[str]:
    shape, layers = member.architecture, family.layers(member.architecture)
    counted = "encoder alone" if family.effective else "embeddings and encoder"
    unit = "operations" if family.all_operations else "multiply-accumulates"
    return [
        f"{shape.name}: layers {shape.layers}, heads {shape.heads}, "
        f"intermediate {shape.intermediate}, hidden {shape.hidden}",
        f"  p = {member.size:,} parameters ({counted})",
        f"      embeddings {layers.first.size:,}, a layer {layers.middle.size:,}, "
        f"masked-LM decoder {layers.last.size:,}",
        f"  i = {member.cost:,} {unit} for {family.sequence_length} tokens",
    ]


def _standing(member: Member, top: Member, result: OseResult) -> list[str]:
    """Return the rank of a shape among measured errors, and the error below which it wins."""
    rivals = [row for row in result.table if row.architecture != member.architecture]
    own = [row for row in result.table if row.architecture == member.architecture]
    best = max(rivals, key=lambda row: row.w, default=None)
    lines = []
    if best is not None and best.w > 0:
        limit = w_coefficient(member, top, 1.0) / best.w
        lines = [f"  wins over {best.architecture.name} (W = {best.w:.4g}) below error {limit:.4g}"]
    for row in own:
        rank = 1 + sum(other.w > row.w for other in result.table)
        shown = "none" if row.error is None else row.failure or f"{row.error:.4g}"
        lines.append(f"  error {shown}, W = {row.w:.4g}: rank {rank} of {len(result.table)}")
    return lines


def records(result: OseResult, latencies: Mapping[Shape, float]) -> list[JSONObject]:
    """Return the table for JSON; values that are not finite are None."""
    front = on_front(result.table)
    return [
        {
            "position": row.position,
            "model_name": row.architecture.name,
            **row.architecture._asdict(),
            "theta": dict(row.hparams),
            "parameters": row.size,
            "operations": row.cost,
            "gain": row.gain,
            "errors": [_finite(error) for error in row.errors],
            "error": _finite(row.error),
            "failure": row.failure,
            "w": row.w,
            "pareto": bool(best),
            "latency_ms": _finite(1000 * latencies.get(row.architecture, math.nan)),
            "seconds": row.seconds,
        }
        for row, best in zip(result.table, front)
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def on_front(table: Sequence[Evaluation]) -> np.ndarray:
    """Return which rows are on the Pareto front of size, cost and error: bool [rows]."""
    rows = [(row.size, row.cost, math.inf if row.error is None else row.error) for row in table]
    points = np.array(rows, float)  # a cost may have more than 64 bits
    return pareto_front(points) & np.isfinite(points).all(axis=1)


def write_report(
    result: OseResult,
    space: OrderedSpace,
    latencies: Mapping[Shape, float],
    settings: JSONMapping,
    folder: str,
    lower_bound: float = 0.0,
    plateau: float | None = None,
) -> None:
    """Write ose.json, ose.csv and ose.png into the folder, and print the best rows.

    `lower_bound` is what was subtracted from the errors; `plateau` is the error of a network that
    knows word frequencies alone, where it is known.
    """
    table = records(result, latencies)
    summary = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "maximum_point": result.maximum_point.architecture.name,
        "searched": result.space_size,
        "abnc": [
            condition._asdict() for condition in check_abnc(space.members, space.family.layers)
        ],
        "spearman_operations_latency": _correlation(space.family, latencies),
        "model_name": result.best.architecture.name,
        "lower_bound": lower_bound,
        "plateau": plateau,
        "table": table,
    }
    write_json(os.path.join(folder, "ose.json"), summary)
    with atomic_write(os.path.join(folder, "ose.csv")) as handle:
        writer = csv.DictWriter(handle, list(table[0]))
        writer.writeheader()
        writer.writerows({**row, "theta": json.dumps(row["theta"])} for row in table)
    write_sums(folder, ["ose.csv"])
    plot_table(result, os.path.join(folder, "ose.png"))
    print_best(result, latencies)
    if plateau is not None:
        print(plateau_line(result, plateau))
    _print_correlation(space.family, latencies)
    print("\n".join(abnc_lines(space)))
    print(f"written: ose.json, ose.csv, ose.png in {folder}")
    chosen = result.best.architecture.name
    print(f'selected: get_bort_model("{chosen}") or --student_model {chosen}')


def print_best(result: OseResult, latencies: Mapping[Shape, float]) -> None:
    """Print the rows with the largest W."""
    front = on_front(result.table)
    rows = sorted(zip(result.table, front), key=lambda pair: -pair[0].w)[:SHOWN]
    print(
        f"{len(result.table)} rows, {result.space_size} architectures, "
        f"T = {result.maximum_point.architecture.name}"
    )
    print(
        f"{'W':>9} {'error':>10} {'g':>7} {'parameters':>12} {'operations':>16} {'ms':>8}  "
        "architecture (* on the Pareto front)"
    )
    for row, best in rows:
        error = "-" if row.error is None else row.failure or f"{row.error:.4f}"
        latency = _milliseconds(latencies, row.architecture)
        theta = f" {json.dumps(dict(row.hparams))}" if row.hparams else ""
        print(
            f"{row.w:>9.4f} {error:>10} {row.gain:>7.4f} {row.size:>12,} {row.cost:>16,} "
            f"{latency:>8}  {row.architecture.name}{' *' if best else ''}{theta}"
        )


def plateau_line(result: OseResult, plateau: float) -> str:
    """Return how many of the trained rows have left the plateau of word frequencies."""
    errors = [row.error for row in result.table if row.error is not None]
    left = sum(error < plateau for error in errors)
    return (
        f"{left} of {len(errors)} errors are below {plateau:.4f}, the plateau of a network that "
        "knows word frequencies alone; the others tell little about their shapes"
    )


def plot_table(result: OseResult, path: str) -> None:
    """Plot error against size and against cost; colour is W, rings mark the Pareto front."""
    front = on_front(result.table)
    rows = [(row, best) for row, best in zip(result.table, front) if _finite(row.error) is not None]
    error, w = [row.error for row, _ in rows], [row.w for row, _ in rows]
    columns = {"parameters (millions)": "size", "operations of one input (billions)": "cost"}
    with figure_file(path, 12, 5) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (label, name), unit in zip(axes, columns.items(), (1e6, 1e9)):
            values = [getattr(row, name) / unit for row, _ in rows]
            points = axis.scatter(values, error, c=w, s=18)
            ringed = [(x, row.error) for x, (row, best) in zip(values, rows) if best]
            rings = {"s": 60, "facecolors": "none", "edgecolors": "k"}
            axis.scatter(*zip(*ringed), label="Pareto front", **rings)
            chosen = getattr(result.best, name) / unit, result.best.error
            axis.plot(*chosen, "r*", ms=14, label=result.best.architecture.name)
            axis.set_xlabel(label)
        axes[0].set_ylabel("error")
        axes[0].legend()
        figure.colorbar(points, ax=axes, label="W-coefficient")


def compare_strides(found: Sequence[tuple[int, OseResult]], folder: str) -> None:
    """Print and plot the best W against the stride and against the cost of the search.

    The cost is the sum of the trained candidates' operations, relative to stride 1; minutes are
    those of training, summed over workers.
    """
    results = dict(found)
    best = results[1].best.w
    spent = {stride: _search_cost(result) for stride, result in found}
    print(
        f"{'stride':>6} {'trained':>8} {'cost':>7} {'minutes':>8} {'W':>9} {'of best':>8} "
        f"{'bound':>7}"
    )
    for stride, result in found:
        trained = sum(len(row.errors) for row in result.table)
        minutes = sum(row.seconds for row in result.table) / 60
        print(
            f"{stride:>6} {trained:>8} {spent[stride] / spent[1]:>7.1%} {minutes:>8.1f} "
            f"{result.best.w:>9.4f} {result.best.w / best:>8.1%} {1 / stride:>7.1%}  "
            f"{result.best.architecture.name}"
        )
    path = os.path.join(folder, "strides.png")
    plot_strides(results, {s: cost / spent[1] for s, cost in spent.items()}, path)
    print(f"written: {path}")


def _search_cost(result: OseResult) -> int:
    return sum(row.cost * len(row.errors) for row in result.table)


def plot_strides(results: Mapping[int, OseResult], spent: Mapping[int, float], path: str) -> None:
    """Plot W found against stride, with the bound W_best / stride, and against relative cost."""
    strides, w = list(results), [result.best.w for result in results.values()]
    with figure_file(path, 10, 4) as figure:
        by_stride, by_cost = figure.subplots(1, 2, sharey=True)
        by_stride.plot(strides, w, "o-", label="found")
        bound = [results[1].best.w / stride for stride in strides]
        by_stride.plot(strides, bound, "k--", label="bound")
        by_stride.set(xlabel="stride", ylabel="W-coefficient of the result", ylim=(0, None))
        by_stride.legend()
        by_cost.plot([spent[stride] for stride in strides], w, "o-")
        by_cost.set(xlabel="operations of the search, relative to stride 1", xscale="log")
        offset = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        for stride, value in zip(strides, w):
            by_cost.annotate(f"stride {stride}", (spent[stride], value), **offset)

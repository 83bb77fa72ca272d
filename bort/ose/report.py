"""What `scripts/run_ose.py` shows of a space and of a search: lines, ose.json, ose.csv, plots."""

from __future__ import annotations

import csv
import json
import math
import os
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from bort.files import write_json
from bort.ose.bert_family import BertFamily
from bort.ose.search import (
    Member,
    OseResult,
    Row,
    check_abnc,
    check_maximum_point,
    pareto_front,
    size_and_speed_gain,
    w_coefficient,
)
from bort.shapes import Shape
from data.metrics import spearman

FORMAT_VERSION = 1
SHOWN = 20  # rows of the table on the screen; the file has all


class Frame(NamedTuple):
    """A space in order, its closed forms, and the maximum point it is measured against."""

    family: BertFamily
    members: list[Member]
    top: Member


def member_of(family: BertFamily, shape: Shape) -> Member:
    """Return any shape with its closed forms."""
    return Member(shape, family.parameter_size(shape), family.inference_cost(shape))


def print_space(frame: Frame, latencies: Mapping[Shape, float]) -> None:
    """Print the ordered space, the correlation of cost and latency, and the AB^nC conditions."""
    print(f"{'':>4} {'architecture':<24} {'parameters':>12} {'operations':>16} {'g':>7} {'ms':>8}")
    for position, member in enumerate(frame.members):
        gain = size_and_speed_gain(member, frame.top)
        line = f"{position:>4} {member.architecture.name:<24} {member.size:>12,} {member.cost:>16,}"
        print(f"{line} {gain:>7.4f} {_milliseconds(latencies, member.architecture):>8}")
    print(f"{len(frame.members)} architectures, T = {frame.top.architecture.name}")
    _print_correlation(frame.family, latencies)
    print("\n".join(abnc_lines(frame)))


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


def abnc_lines(frame: Frame) -> list[str]:
    """Return the report of the AB^nC conditions."""
    conditions = check_abnc(frame.members, frame.family.layers)
    return [
        "AB^nC property (C is the masked-LM decoder):",
        *(f"  {condition}" for condition in conditions),
        "  open   a smooth training problem, and SGD with clipped weights (the theory mode)",
    ]


def explanation(frame: Frame, shape: Shape, result: OseResult | None) -> list[str]:
    """Say what a shape costs, where it stands by size and speed, and the error it needs to win.

    Raises `UserError` for a shape larger than the maximum point.
    """
    member = member_of(frame.family, shape)
    check_maximum_point(frame.top, [member])
    gains = {m.architecture: size_and_speed_gain(m, frame.top) for m in frame.members}
    gain, best = size_and_speed_gain(member, frame.top), max(gains, key=gains.__getitem__)
    others = [other for one, other in gains.items() if one != shape]
    rank, count = 1 + sum(other > gain for other in others), len(others) + 1
    lines = [
        *_cost_lines(frame.family, member),
        f"  g = {gain:.3f} against T = {frame.top.architecture.name}: rank {rank} of {count} by "
        "size and speed",
    ]
    if gain == 0:
        return [*lines, "  never wins: W is 0 whatever the error"]
    lines.append(
        f"  wins over {best.name} (g = {gains[best]:.3f}) when its error is at least "
        f"{gains[best] / gain:.2f} times lower"
    )
    return lines + (_standing(member, frame.top, result) if result else [])


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
    """Where a shape stands among measured errors, and the error below which it wins."""
    rivals = [row for row in result.table if row.architecture != member.architecture]
    own = [row for row in result.table if row.architecture == member.architecture]
    best = max(rivals, key=lambda row: row.w, default=None)
    lines = []
    if best is not None and best.w > 0:
        limit = w_coefficient(member, top, 1.0) / best.w
        lines = [f"  wins over {best.architecture.name} (W = {best.w:.4g}) below error {limit:.4g}"]
    for row in own:
        rank = 1 + sum(rival.w > row.w for rival in rivals)
        shown = "none" if row.error is None else row.failure or f"{row.error:.4g}"
        lines.append(f"  error {shown}, W = {row.w:.4g}: rank {rank} of {len(result.table)}")
    return lines


def records(result: OseResult, latencies: Mapping[Shape, float]) -> list[dict[str, Any]]:
    """Return the table as plain dictionaries; what is not finite is null."""
    front = on_front(result.table)
    return [
        {
            "position": row.position,
            "model_name": row.architecture.name,
            **row.architecture._asdict(),
            "theta": dict(row.theta),
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


def on_front(table: Sequence[Row]) -> np.ndarray:
    """Return which rows no other beats in size, cost and error at once: bool [rows]."""
    points = [(row.size, row.cost, math.inf if row.error is None else row.error) for row in table]
    return pareto_front(np.array(points)) & np.isfinite(np.array(points)).all(axis=1)


def write_report(
    result: OseResult,
    frame: Frame,
    latencies: Mapping[Shape, float],
    settings: Mapping[str, Any],
    folder: str,
) -> None:
    """Write ose.json, ose.csv and ose.png into the folder, and print the best rows."""
    table = records(result, latencies)
    summary = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "maximum_point": result.maximum_point.architecture.name,
        "searched": result.space_size,
        "abnc": [
            condition._asdict() for condition in check_abnc(frame.members, frame.family.layers)
        ],
        "spearman_operations_latency": _correlation(frame.family, latencies),
        "model_name": result.best.architecture.name,
        "table": table,
    }
    write_json(os.path.join(folder, "ose.json"), summary)
    with open(os.path.join(folder, "ose.csv"), "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(table[0]))
        writer.writeheader()
        writer.writerows({**row, "theta": json.dumps(row["theta"])} for row in table)
    plot_table(result, os.path.join(folder, "ose.png"))
    print_best(result, latencies)
    _print_correlation(frame.family, latencies)
    print("\n".join(abnc_lines(frame)))
    print(f"the whole table and the plot: {folder}/ose.json, ose.csv, ose.png")
    chosen = result.best.architecture.name
    print(f'chosen: get_bort_model("{chosen}") or --student_model {chosen}')


def print_best(result: OseResult, latencies: Mapping[Shape, float]) -> None:
    """Print the rows of the largest W."""
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
        theta = f" {json.dumps(dict(row.theta))}" if row.theta else ""
        print(
            f"{row.w:>9.4f} {error:>10} {row.gain:>7.4f} {row.size:>12,} {row.cost:>16,} "
            f"{latency:>8}  {row.architecture.name}{' *' if best else ''}{theta}"
        )


def plot_table(result: OseResult, path: str) -> None:
    """Draw error against size and against cost; colour is W, rings mark the Pareto front."""
    pyplot = _pyplot()
    front = on_front(result.table)
    rows = [(row, best) for row, best in zip(result.table, front) if _finite(row.error) is not None]
    error, w = [row.error for row, _ in rows], [row.w for row, _ in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    columns = {"parameters (millions)": "size", "operations of one input (billions)": "cost"}
    for axis, (label, name), unit in zip(axes, columns.items(), (1e6, 1e9)):
        values = [getattr(row, name) / unit for row, _ in rows]
        points = axis.scatter(values, error, c=w, s=18)
        ringed = [(x, row.error) for x, (row, best) in zip(values, rows) if best]
        axis.scatter(*zip(*ringed), s=60, facecolors="none", edgecolors="k", label="Pareto front")
        chosen = getattr(result.best, name) / unit, result.best.error
        axis.plot(*chosen, "r*", ms=14, label=result.best.architecture.name)
        axis.set_xlabel(label)
    axes[0].set_ylabel("error")
    axes[0].legend()
    figure.colorbar(points, ax=axes, label="W-coefficient")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compare_strides(found: Sequence[tuple[int, OseResult]], folder: str) -> None:
    """Print and plot W found against the stride and against the cost of the search.

    The cost is the sum of the trained candidates' operations, as a share of stride 1's; beside it
    the minutes that their training took, of all workers together.
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
    print(f"the plot: {path}")


def _search_cost(result: OseResult) -> int:
    return sum(row.cost * len(row.errors) for row in result.table)


def plot_strides(results: Mapping[int, OseResult], spent: Mapping[int, float], path: str) -> None:
    """Draw W found against stride, with the bound W_best / stride, and against relative cost."""
    pyplot = _pyplot()
    strides, w = list(results), [result.best.w for result in results.values()]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    axes[0].plot(strides, w, "o-", label="found")
    axes[0].plot(strides, [results[1].best.w / s for s in strides], "k--", label="bound")
    axes[0].set(xlabel="stride", ylabel="W-coefficient of the result", ylim=(0, None))
    axes[0].legend()
    axes[1].plot([spent[s] for s in strides], w, "o-")
    axes[1].set(xlabel="operations of the search, stride 1 = 1", xscale="log")
    for stride, value in zip(strides, w):
        place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        axes[1].annotate(f"stride {stride}", (spent[stride], value), **place)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

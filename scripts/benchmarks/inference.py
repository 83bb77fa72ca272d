"""Latency of one classifier in every runtime, beside BERT and DistilBERT, in one run.

    python scripts/benchmark.py inference [--batch_sizes 1] [--lengths 128] [--plot latency.png]

The contenders run in turn, so that a change in the machine's speed affects all alike; the table has
medians, in milliseconds for a batch. MXNet's number of threads is fixed when it is imported: each
number of threads has a process of its own. The processes restart for each size of input, because
the buffers that the runtimes keep for every size fill the memory. The weights are random, because
the time does not depend on them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence

import numpy as np

from bort.config import counts_of, option, parse
from bort.errors import UserError
from bort.files import require_place, require_writable
from bort.inference.runtime import BACKENDS, available_backends
from bort.plots import figure_file, picture_kind
from bort.processor import multiplies_bfloat16
from bort.shapes import MAX_LENGTH

# Layers, heads, width inside the feed-forward layers, hidden size; vocabulary.
SHAPES = {
    "Bort": ((4, 8, 768, 1024), 50265),
    "DistilBERT": ((6, 12, 3072, 768), 30522),
    "BERT-base": ((12, 12, 3072, 768), 30522),
    "BERT-large": ((24, 16, 4096, 1024), 30522),
}
GLUONNLP, PYTORCH, PYTORCH_BFLOAT16 = "GluonNLP", "PyTorch", "PyTorch-bfloat16"
DEFAULT = "default"  # MXNet's own choice of threads, half of the logical CPUs
PEAK_SIZE = 2048
TURN_SECONDS, MOST_PASSES = 0.2, 5

Ask = Callable[[dict], Any]


class Way(NamedTuple):
    """A network in a runtime of ours, in GluonNLP or in PyTorch."""

    network: str
    engine: str

    @property
    def precision(self) -> str:
        """The type of what its products multiply: float32, bfloat16 or int8."""
        _, _, precision = self.engine.partition("-")
        return precision or "float32"


class Cell(NamedTuple):
    """One size of input."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


WAYS = (
    *(Way("Bort", name) for name in BACKENDS),
    *(Way("DistilBERT", name) for name in ("onnx", "onnx-int8", PYTORCH, PYTORCH_BFLOAT16)),
    *(Way("BERT-base", name) for name in (GLUONNLP, PYTORCH, PYTORCH_BFLOAT16)),
    Way("BERT-large", GLUONNLP),
)
GOAL_CELL = Cell(1, 128)
# Times as fast as BERT-base and BERT-large.
GOALS = {"lossless": (7.9, 20), "reduced": (15, 50)}


@dataclass(frozen=True)
class InferenceBenchmarkSettings:
    """What is measured, and how often."""

    batch_sizes: str = option("1,8,32", "sequences per batch, separated by commas")
    lengths: str = option("64,128,512", "tokens per sequence, separated by commas")
    threads: str = option("1,2", "numbers of threads, separated by commas")
    networks: str = option(",".join(SHAPES), "networks to measure, separated by commas")
    rounds: int = option(3, "measurements of each variant", minimum=1)
    longest: float = option(
        3.2, "skip what would take more than this many seconds for a batch", minimum=0.0
    )
    plot: Optional[str] = option(None, "file for a plot of latency against size (PNG, PDF, SVG)")
    answer: bool = option(False, "used by the program itself: time what standard input asks for")


def main(argv: Optional[Sequence[str]] = None) -> dict[tuple[Way, str, Cell], float]:
    """Measure, print, return {(way, threads, cell): median seconds}."""
    (settings,) = parse(str(__doc__), argv, InferenceBenchmarkSettings)
    if settings.answer:
        _answer()
        return {}
    if settings.plot:  # before minutes of measurements
        picture_kind(settings.plot)
        require_writable(os.path.dirname(settings.plot) or ".", "--plot")
        require_place(settings.plot)
    threads = [str(count) for count in counts_of("--threads", settings.threads)]
    rows = rows_of(settings.networks.split(","), threads)
    cells = [Cell(*one) for one in itertools.product(*_lists(settings))]
    peaks = _peaks_of([*threads, DEFAULT])
    _print_peaks(peaks)
    medians: dict[tuple[Way, str, Cell], float] = {}
    sizes: dict[Way, float] = {}
    for cell in cells:
        short = [row for row in rows if _floor(*row, cell, peaks) <= settings.longest]
        found = measure_cell(cell, short, settings.rounds)
        medians |= {(*row, cell): one.seconds for row, one in found.items()}
        sizes |= {way: one.megabytes for (way, _), one in found.items()}
    if not medians:
        raise UserError(
            f"--longest {settings.longest}: leaves everything out; give more seconds, or smaller "
            "--batch_sizes and --lengths"
        )
    print_table(medians, rows, cells, peaks, sizes)
    print_goals(medians, threads)
    if settings.plot:
        draw(medians, sizes, settings.plot)
    return medians


def _lists(settings: InferenceBenchmarkSettings) -> tuple[list[int], list[int]]:
    lengths = counts_of("--lengths", settings.lengths, maximum=MAX_LENGTH)
    return counts_of("--batch_sizes", settings.batch_sizes), lengths


def rows_of(networks: list[str], threads: list[str]) -> list[tuple[Way, str]]:
    """Return what is measured: ways with numbers of threads, stock ones also on the default."""
    unknown = set(networks) - SHAPES.keys()
    if unknown:
        raise UserError(f"--networks: {', '.join(sorted(unknown))} unknown; {', '.join(SHAPES)}")
    left_out = {*BACKENDS} - {*available_backends()}
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        left_out.add(PYTORCH)
    if PYTORCH in left_out or not multiplies_bfloat16():
        left_out.add(PYTORCH_BFLOAT16)
    ways = [way for way in WAYS if way.network in networks and way.engine not in left_out]
    rows = [(way, one) for way in ways for one in threads]
    return rows + [(way, DEFAULT) for way in ways if way.engine == GLUONNLP]


def operations(way: Way, cell: Cell) -> float:
    """Return the multiplications and additions of matrix products in the encoder for a batch.

    Our graphs' last layer counts as nothing: it is computed for the first token alone.
    """
    (layers, _, inner, hidden), _ = SHAPES[way.network]
    layers -= way.engine.startswith(("onnx", "openvino"))
    one_layer = cell.length * (4 * hidden**2 + 2 * hidden * inner) + 2 * cell.length**2 * hidden
    return 2.0 * cell.batch * layers * one_layer


def _floor(way: Way, threads: str, cell: Cell, peaks: dict[str, dict[str, float]]) -> float:
    """Return the seconds that the products of a batch take at the rate of a large product."""
    return operations(way, cell) / (peaks[threads][way.precision] * 1e9)


# ---- measuring -----------------------------------------------------------------------------------


class Measured(NamedTuple):
    """The median time of a batch, and the size of the weights."""

    seconds: float
    megabytes: float


def measure_cell(
    cell: Cell, rows: list[tuple[Way, str]], rounds: int
) -> dict[tuple[Way, str], Measured]:
    """Let rows take turns; those that differ in nothing but the name of their threads are one."""
    ways = {row: (row[0], _count(row[1])) for row in rows}
    seconds: dict[tuple[Way, int], list[float]] = {one: [] for one in ways.values()}
    with _workers({count for _, count in seconds}) as workers:
        megabytes = _make_all(cell, list(seconds), workers)
        for way, count in [*seconds] * rounds:
            seconds[way, count] += workers[count]({"way": way, "cell": cell})
            shown = f"{1e3 * seconds[way, count][-1]:.1f} ms"
            print(f"{cell} {' '.join(way)}, threads {count}: {shown}", file=sys.stderr)
    return {
        row: Measured(statistics.median(seconds[one]), megabytes[one[0]])
        for row, one in ways.items()
    }


def _make_all(cell: Cell, rows: list[tuple[Way, int]], workers: dict[int, Ask]) -> dict[Way, float]:
    """Let each process make its networks, all processes at once; return their megabytes."""

    def make(count: int) -> dict[Way, float]:
        ways = [way for way, one in rows if one == count]
        return {way: workers[count]({"way": way, "cell": cell}) for way in ways}

    with ThreadPoolExecutor() as pool:
        return {way: size for made in pool.map(make, workers) for way, size in made.items()}


def _peaks_of(threads: list[str]) -> dict[str, dict[str, float]]:
    with _workers(set(map(_count, threads))) as workers:
        found = {count: ask({}) for count, ask in workers.items()}
    return {one: found[_count(one)] for one in threads}


def _count(threads: str) -> int:
    return max(1, (os.cpu_count() or 2) // 2) if threads == DEFAULT else int(threads)


@contextlib.contextmanager
def _workers(counts: set[int]) -> Iterator[dict[int, Ask]]:
    with contextlib.ExitStack() as stack:
        yield {count: stack.enter_context(start_worker(count)) for count in sorted(counts)}


@contextlib.contextmanager
def start_worker(count: int) -> Iterator[Ask]:
    """Start a process on a number of threads; yield a function that asks it something."""
    script = os.path.join(os.path.dirname(os.path.dirname(__file__)), "benchmark.py")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", script, "inference", "--answer"],
        env={**os.environ, "OMP_NUM_THREADS": str(count)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(request: dict) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it has ended: there will be no answer
            print(json.dumps(request), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise UserError(
                f"the process that measures with {count} thread(s) has ended, most likely for lack "
                "of memory: measure less at once, see --networks and --batch_sizes"
            )
        return json.loads(answer)

    try:
        yield ask
    finally:
        process.communicate()


def _answer() -> None:
    """Answer the requests on standard input, each with a line on standard output.

    A way and a cell: first the megabytes of the network that is made for it, then seconds. Nothing:
    the rates of large products.
    """
    made: dict[Way, Callable[[Cell], None]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if not request:
            answer: Any = _peaks()
        else:
            way, cell = Way(*request["way"]), Cell(*request["cell"])
            if way in made:
                answer = _turn(made[way], cell)
            else:
                made[way], answer = _make(way)
                made[way](cell)  # MXNet plans its memory at the first pass
        print(json.dumps(answer), flush=True)


def _turn(run: Callable[[Cell], None], cell: Cell) -> list[float]:
    """Time some passes; of fast ones the first only wakes caches and threads up."""
    first = _seconds(run, cell)
    passes = min(MOST_PASSES, int(TURN_SECONDS / first))
    return [_seconds(run, cell) for _ in range(passes)] or [first]


def _seconds(run: Callable[[Cell], object], cell: Cell) -> float:
    start = time.perf_counter()
    run(cell)
    return time.perf_counter() - start


def _peaks() -> dict[str, float]:
    """Return 10^9 operations a second of a large product, by precision.

    MXNet's in float32 and, where the processor has it, in bfloat16; ONNX Runtime's MatMulInteger
    in int8.
    """
    import mxnet as mx
    from onnx import TensorProto, helper, numpy_helper

    from bort.inference.onnx_file import onnx_session
    from bort.mxnet_setup import cpu_threads

    def product_in(dtype: str) -> Callable[[Cell], None]:
        ones = mx.nd.amp_cast(mx.nd.ones((PEAK_SIZE, PEAK_SIZE)), dtype=dtype)
        return lambda _: mx.nd.FullyConnected(
            ones, ones, no_bias=True, num_hidden=PEAK_SIZE
        ).wait_to_read()

    bytes_ = np.ones((PEAK_SIZE, PEAK_SIZE), np.int8)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["values", "matrix"], ["sums"])],
        "product",
        [info("values", TensorProto.UINT8, bytes_.shape)],
        [info("sums", TensorProto.INT32, bytes_.shape)],
        [numpy_helper.from_array(bytes_, "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnx_session(model.SerializeToString(), cpu_threads())
    feed = {"values": bytes_.astype(np.uint8)}
    mxnet_dtypes = ("float32", "bfloat16") if multiplies_bfloat16() else ("float32",)
    products: dict[str, Callable[[Cell], object]] = {one: product_in(one) for one in mxnet_dtypes}
    products["int8"] = lambda _: session.run(None, feed)
    return {
        precision: 2 * PEAK_SIZE**3 / 1e9 / min(_seconds(run, GOAL_CELL) for _ in range(6))
        for precision, run in products.items()
    }


# ---- the ways ------------------------------------------------------------------------------------


def _make(way: Way) -> tuple[Callable[[Cell], None], float]:
    """Return a function that scores a batch, and the megabytes of the weights."""
    if way.engine in (PYTORCH, PYTORCH_BFLOAT16):
        return _pytorch(way)
    if way.engine == GLUONNLP:
        return _gluonnlp(way)
    return _ours(way)


def _batch(way: Way, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    ids = generator.integers(5, SHAPES[way.network][1], (cell.batch, cell.length))
    return ids, np.full(cell.batch, cell.length)


def _ours(way: Way) -> tuple[Callable[[Cell], None], float]:
    from bort.inference.quantization import quantize_in_mxnet
    from bort.inference.runtime import MXNetBackend, backend_for

    network = _classifier(way.network)
    if way.engine == "mxnet-int8":
        quantized = quantize_in_mxnet(network, *_batch(way, Cell(4, 128)))
        backend: Any = MXNetBackend(quantized, SHAPES[way.network][1])
    else:
        backend = backend_for(network, way.engine)
    size = sum(p.data().size for p in network.collect_params().values()) / 1e6
    bytes_each = 1 if way.precision == "int8" else 4
    return lambda cell: backend.logits(*_batch(way, cell)), size * bytes_each


@functools.lru_cache(maxsize=1)
def _classifier(name: str) -> Any:
    """Build one of our networks; its ways ask for it one after another."""
    import mxnet as mx

    from bort.bort import BortClassifier, get_bort_model, initialize
    from bort.shapes import Shape

    (layers, heads, inner, hidden), vocabulary = SHAPES[name]
    shape = Shape(layers, heads, inner, hidden).name
    body, _ = get_bort_model(
        shape,
        vocab=range(vocabulary),
        use_decoder=False,
        dropout=0.0,
        random_init=False,
        trainable=False,
    )
    network = BortClassifier(body, dropout=0.0)
    initialize(network, None, random_init=False, trainable=False)
    # NumPy draws them sooner than MXNet, whose int8 cannot take a layer that is all 0.
    generator = np.random.default_rng(0)
    for parameter in network.collect_params().values():
        values = generator.standard_normal(parameter.shape, np.float32)
        parameter.set_data(mx.nd.array(0.02 * values))
    return network


def _gluonnlp(way: Way) -> tuple[Callable[[Cell], None], float]:
    """Return BERT with GluonNLP's own classifier on it, hybridised."""
    import gluonnlp as nlp
    import mxnet as mx

    (layers, heads, _, hidden), vocabulary = SHAPES[way.network]
    body, _ = nlp.model.get_model(
        f"bert_{layers}_{hidden}_{heads}",
        dataset_name=None,
        vocab=range(vocabulary),
        pretrained=False,
        use_decoder=False,
        use_classifier=False,
    )
    network = nlp.model.BERTClassifier(body, num_classes=2)
    network.collect_params().setattr("grad_req", "null")
    network.initialize(mx.init.Constant(0.01))  # to draw 340 M values takes long
    network.hybridize(static_alloc=True)

    def run(cell: Cell) -> None:
        ids, lengths = (mx.nd.array(one) for one in _batch(way, cell))
        network(ids, mx.nd.zeros_like(ids), lengths).asnumpy()

    run(Cell(1, 2))
    size = sum(p.data().size for p in network.collect_params().values()) / 1e6
    return run, 4 * size


def _pytorch(way: Way) -> tuple[Callable[[Cell], None], float]:
    """Return Hugging Face's BERT or DistilBERT, with its classifier; bfloat16 is autocast's."""
    import torch
    import transformers

    (layers, heads, inner, hidden), vocabulary = SHAPES[way.network]
    if way.network == "DistilBERT":
        config: Any = transformers.DistilBertConfig(
            vocab_size=vocabulary, n_layers=layers, n_heads=heads, hidden_dim=inner, dim=hidden
        )
        network: Any = transformers.DistilBertForSequenceClassification(config)
    else:
        config = transformers.BertConfig(
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            hidden_size=hidden,
        )
        network = transformers.BertForSequenceClassification(config)
    network.eval()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def run(cell: Cell) -> None:
        ids, _ = _batch(way, cell)
        low = way.engine == PYTORCH_BFLOAT16
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = network(torch.from_numpy(ids), attention_mask=torch.ones(cell)).logits
        logits.float().numpy()

    return run, 4 * sum(p.numel() for p in network.parameters()) / 1e6


# ---- what is shown -------------------------------------------------------------------------------


def _print_peaks(peaks: dict[str, dict[str, float]]) -> None:
    for threads, found in peaks.items():
        shown = ", ".join(f"{value:,.0f} in {precision}" for precision, value in found.items())
        print(
            f"threads {threads}: products of {PEAK_SIZE} x {PEAK_SIZE} matrices, "
            f"10^9 operations/s: {shown}"
        )


def print_table(
    medians: dict[tuple[Way, str, Cell], float],
    rows: list[tuple[Way, str]],
    cells: list[Cell],
    peaks: dict[str, dict[str, float]],
    sizes: dict[Way, float],
) -> None:
    """Print a line for each way and number of threads: MB, then ms by size of the batch."""
    print("\nmilliseconds for a batch, as sequences x tokens; in brackets the share of the floor")
    heading = "".join(f"{cell!s:>16}" for cell in cells)
    print(f"{'network':<12}{'runtime':<18}{'threads':>8}{'MB':>8}{heading}")
    for way, threads in rows:
        size = f"{sizes[way]:,.0f}" if way in sizes else "-"
        line = f"{way.network:<12}{way.engine:<18}{threads:>8}{size:>8}"
        for cell in cells:
            found = medians.get((way, threads, cell))
            if found is None:
                line += f"{'-':>16}"
                continue
            share = _floor(way, threads, cell, peaks) / found
            line += f"{1e3 * found:9,.1f} ({100 * share:3.0f}%)"
        print(line)


def print_goals(medians: dict[tuple[Way, str, Cell], float], threads: list[str]) -> None:
    """Say how many times as fast as stock BERT each runtime is at the size of the goals."""
    most = max(threads, key=int)
    stock = [Way(name, GLUONNLP) for name in ("BERT-base", "BERT-large")]
    columns = [(way, one) for one in (DEFAULT, most) for way in stock]
    if any((*column, GOAL_CELL) not in medians for column in columns):
        return
    print(f"\ntimes as fast as GluonNLP's, {GOAL_CELL}, {most} threads")
    titles = "".join(
        f"{way.network + (', default' if one == DEFAULT else ', same'):>21}" for way, one in columns
    )
    print(f"{'network':<12}{'runtime':<18}{titles}")
    for way in WAYS:
        own = medians.get((way, most, GOAL_CELL))
        if own is None or way.engine == GLUONNLP:
            continue
        goals = GOALS["lossless" if way.precision == "float32" else "reduced"]
        line = f"{way.network:<12}{way.engine:<18}"
        for (other, one), goal in zip(columns, goals * 2):
            times = medians[other, one, GOAL_CELL] / own
            mark = f" (goal {goal:g})" if way.network == "Bort" else ""
            line += f"{times:8.1f}{mark:<13}"
        print(line.rstrip())


def draw(medians: dict[tuple[Way, str, Cell], float], sizes: dict[Way, float], path: str) -> None:
    """Draw the best latency of each way against its size, for the goals' size of input."""
    cells = {cell for _, _, cell in medians}
    cell = GOAL_CELL if GOAL_CELL in cells else min(cells)
    best: dict[Way, float] = {}
    for (way, _, one), found in medians.items():
        if one == cell:
            best[way] = min(found, best.get(way, found))
    with figure_file(path, 7.5, 5.5) as figure:
        axes = figure.add_subplot()
        for number, network in enumerate(SHAPES):
            points = {way: found for way, found in best.items() if way.network == network}
            places = [sizes[way] for way in points], [1e3 * found for found in points.values()]
            axes.scatter(*places, color=f"C{number}", label=network)
            for way, x, y in zip(points, *places):
                axes.annotate(way.engine, (x, y), (5, 4), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="weights, MB", ylabel="latency, ms")
        axes.set_title(f"{cell.batch} x {cell.length} tokens", fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)

"""One step of distillation, against the original's recipe of stock GluonNLP parts, in one run.

    python scripts/benchmark.py distillation [--teachers roberta_12_768_12] [--repeats 9]

Every contender trains the 4-layer Bort on the same batches. They run in turn, so that a change in
the machine's speed affects all alike; the table has medians. The original's recipe runs in
processes of its own, in turn too: with as many threads as ours, and with MXNet's default; both
without our setting for freed memory. --dtypes float32,bfloat16 measures ours in both precisions,
where OpenVINO is installed with the teacher in it too, and --pytorch PYTHON measures PyTorch's
steps, with the interpreter of another environment.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Callable, Iterator, Optional, Sequence

import numpy as np

from benchmarks._peers import (
    Work,
    check_dtypes,
    check_python,
    decoder_flops,
    encoder_flops,
    print_floors,
    pytorch_command,
    step_apart,
    units_of,
    whole_batches,
)
from benchmarks.workers import write_shards
from bort import mxnet_setup
from bort.config import option, parse
from bort.mxnet_setup import cpu_threads, usable_cores
from bort.shapes import body_shape

MLM_WEIGHT, TEACHER_WEIGHT, TEMPERATURE = 0.1, 0.5, 2.0
MASKED = 0.15
SEQUENCES = 64
STUDENT = "bort_4_8_768_1024"
ENCODER_PARAMETERS = 24_700_000  # with those of the decoder's dense layer


@dataclass(frozen=True)
class DistillationBenchmarkSettings:
    """What is measured, and how often."""

    teachers: str = option("roberta_12_768_12", "teachers to measure with, separated by commas")
    batch_size: int = option(4, "sequences per step", minimum=1)
    length: int = option(128, "tokens per sequence", minimum=8, maximum=512)
    vocab_size: int = option(50265, "tokens of the vocabulary", minimum=100)
    repeats: int = option(9, "measured steps of each variant", minimum=1)
    dtypes: str = option("float32", "precisions of our steps, separated by commas")
    pytorch: Optional[str] = option(
        None, "a Python with torch and transformers: measure PyTorch's steps too"
    )
    no_original: bool = option(False, "leave the original's recipe out")
    stock_only: Optional[str] = option(
        None, "measure only the original's recipe with this teacher ('none': without), step by step"
    )

    def check(self) -> None:
        """Raise `UserError` for a precision or a teacher that there is not."""
        check_dtypes(self.dtypes)
        check_python(self.pytorch)
        for teacher in self.teachers.split(","):
            body_shape(teacher)


def main(argv: Optional[Sequence[str]] = None) -> dict[str, float]:
    """Measure, print a table, return {way: median seconds}."""
    (settings,) = parse(str(__doc__), argv, DistillationBenchmarkSettings)
    with tempfile.TemporaryDirectory() as folder:
        if settings.stock_only:
            _answer_with_stock_steps(settings)
            return {}
        shards = os.path.join(folder, "shards")
        sequences = whole_batches(SEQUENCES, settings.batch_size)
        write_shards(shards, 1, sequences, settings.length, settings.vocab_size)
        medians: dict[str, float] = {}
        # One teacher after the other: memory does not hold all of them several times.
        for teacher in settings.teachers.split(","):
            medians.update(_compare(teacher, shards, folder, settings))
    return medians


def _compare(
    teacher: str, shards: str, folder: str, settings: DistillationBenchmarkSettings
) -> dict[str, float]:
    """Measure all ways with and without one teacher, and print their table."""
    with contextlib.ExitStack() as opened:
        ways, building = _ways(teacher, shards, folder, settings, opened)
        seconds = _measure(ways, settings.repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    _print_table(medians, seconds, settings)
    print_floors(medians, _work(teacher, settings))
    if "float32" not in settings.dtypes.split(","):
        return medians
    live, cached = (medians[f"ours, {teacher} {kind}"] for kind in ("live", "cached"))
    sequences = whole_batches(SEQUENCES, settings.batch_size)
    epoch = (live - cached) * sequences / settings.batch_size
    print(
        f"{teacher}'s cache: {building / sequences:.2f} s to build and "
        f"{(live - cached) / settings.batch_size:.2f} s saved in an epoch, for each sequence: "
        f"pays after {building / epoch:.1f} epochs\n"
    )
    return medians


def _measure(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    for way in ways.values():
        way()  # graphs are made and memory is taken at the first step
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in list(ways.items()) * repeats:
        seconds[name].append(way())
    return seconds


def _ways(
    teacher: str,
    shards: str,
    folder: str,
    settings: DistillationBenchmarkSettings,
    opened: contextlib.ExitStack,
) -> tuple[dict[str, Callable[[], float]], float]:
    """Return all ways to make a step, and the seconds it took to build the teacher's cache."""
    weights = os.path.join(folder, f"{teacher}.params")
    cache = os.path.join(folder, f"cache-{teacher}")
    flags = ["--teacher_model", teacher, "--teacher_ckpt_dir", weights]
    _write_teacher(teacher, weights, settings)
    building = _build_cache(shards, cache, teacher, weights)
    steps = {}
    for dtype in settings.dtypes.split(","):
        kinds = {"no teacher": [], f"{teacher} live": flags}
        if find_spec("openvino"):
            kinds[f"{teacher} live, OpenVINO"] = [*flags, "--teacher_runtime", "openvino"]
        if dtype == "float32":
            kinds[f"{teacher} cached"] = ["--teacher_cache", cache]
        for kind, given in kinds.items():
            low = ["--dtype", dtype, "--teacher_dtype", dtype]
            steps[f"ours{_label(dtype)}, {kind}"] = _our_step(
                settings, shards, folder, [*given, *low]
            )
    ways = {name: timed(step) for name, step in steps.items()}
    for name, stock in (("no teacher", None), (teacher, teacher)):
        for way, command, threads in _commands_apart(name, stock, settings):
            ways[way] = opened.enter_context(step_apart(command, threads))
    return ways, building


def _commands_apart(
    name: str, teacher: Optional[str], settings: DistillationBenchmarkSettings
) -> Iterator[tuple[str, list[str], int]]:
    """Yield the name, the command and the threads of steps of other processes."""
    if not settings.no_original:
        command = _stock_command(teacher, settings)
        yield f"original, {name}", command, usable_cores()
        default = max(1, (os.cpu_count() or 2) // 2)  # MXNet's own choice
        yield f"original, {name}, default threads", command, default
    if settings.pytorch:
        for dtype in settings.dtypes.split(","):
            command = pytorch_command("pretraining", dtype, settings, STUDENT, teacher)
            yield f"PyTorch{_label(dtype)}, {name}", command, cpu_threads()


def _label(dtype: str) -> str:
    return "" if dtype == "float32" else f" in {dtype}"


def _work(teacher: str, settings: DistillationBenchmarkSettings) -> dict[str, tuple[str, Work]]:
    """Return the precision and the work of our steps by name."""
    tokens = settings.batch_size * settings.length
    masked = settings.batch_size * round(MASKED * settings.length)

    def forward(name: str) -> float:
        decoder = decoder_flops(units_of(name), settings.vocab_size, masked)
        return encoder_flops(name, tokens, settings.length, masked) + decoder

    student = 3 * forward(STUDENT)
    parameters = settings.vocab_size * (units_of(STUDENT) + 1) + ENCODER_PARAMETERS
    found = {}
    for dtype in settings.dtypes.split(","):
        ours = f"ours{_label(dtype)}"
        found[f"{ours}, no teacher"] = (dtype, Work(student, parameters))
        both = Work(student + forward(teacher), parameters)
        for runtime in ("", ", OpenVINO") if find_spec("openvino") else ("",):
            found[f"{ours}, {teacher} live{runtime}"] = (dtype, both)
    return found


def timed(step: Callable[[], None]) -> Callable[[], float]:
    """Return a function that runs a step to its end and returns the seconds it took."""

    def run() -> float:
        import mxnet as mx

        mx.nd.waitall()
        start = time.perf_counter()
        step()
        mx.nd.waitall()
        return time.perf_counter() - start

    return run


def _our_step(
    settings: DistillationBenchmarkSettings, shards: str, folder: str, flags: list[str]
) -> Callable[[], None]:
    import mxnet as mx

    from bort.communicator import SingleProcess
    from bort.pretraining.config import SETTINGS_CLASSES, PretrainingSettings
    from bort.pretraining.run import pretraining_loop
    from bort.reporter import NullReporter

    argv = ["--data", shards, "--batch_size", str(settings.batch_size), "--num_steps", "100000"]
    argv += ["--ckpt_dir", tempfile.mkdtemp(dir=folder), "--log_interval", "1000", *flags]
    run = PretrainingSettings(*parse("", argv, *SETTINGS_CLASSES))
    loop = pretraining_loop(run, SingleProcess(), [mx.cpu()], NullReporter())
    loop.setup()
    batches = loop.batches()
    return lambda: loop.train_step(batches)


def _write_teacher(teacher: str, path: str, settings: DistillationBenchmarkSettings) -> None:
    import mxnet as mx

    from bort.bort import build_network
    from bort.parameters import save_parameters

    save_parameters(build_network(teacher, settings.vocab_size, mx.cpu()), path)


def _build_cache(shards: str, cache: str, teacher: str, weights: str) -> float:
    """Build a teacher's cache; returns the seconds it took, the loading of the teacher aside."""
    import mxnet as mx

    from bort.communicator import SingleProcess
    from bort.pretraining.teacher import load_teacher
    from bort.pretraining.teacher_cache import build_cache
    from data.shards import open_shards

    opened = open_shards(shards)
    manifest = opened.manifest
    network = load_teacher(
        teacher, weights, manifest.vocab_size, manifest.tokenizer_fingerprint, [mx.cpu()]
    )
    start = time.perf_counter()
    build_cache(cache, [opened], network, teacher, "float16", 16, SingleProcess())
    return time.perf_counter() - start


class StockStep:
    """A step as the original makes it, from stock parts of MXNet and GluonNLP.

    Softmaxes of both networks for KL and MSE, top-k accuracy over the logits, a stock Trainer with
    BERTAdam, no clipping in float32, the losses read back to the host at every step.
    """

    def __init__(self, settings: DistillationBenchmarkSettings, teacher: Optional[str]) -> None:
        import gluonnlp as nlp
        import mxnet as mx

        from bort.bort import build_network, get_bort_model

        self.student, _ = get_bort_model(vocab=range(settings.vocab_size))
        self.student.hybridize(static_alloc=True)
        self.teacher = None
        if teacher:
            self.teacher = build_network(teacher, settings.vocab_size, mx.cpu())
            self.teacher.collect_params().setattr("grad_req", "null")
            self.teacher.hybridize(static_alloc=True)
        optimizer = nlp.optimizer.BERTAdam(learning_rate=1e-4, wd=0.01)
        self.trainer = mx.gluon.Trainer(self.student.collect_params(), optimizer)
        self.cross_entropy = mx.gluon.loss.SoftmaxCELoss()
        self.divergence = mx.gluon.loss.KLDivLoss(from_logits=False)
        self.square = mx.gluon.loss.L2Loss()
        self.batch = random_batch(settings)

    def __call__(self) -> None:
        """Make one step."""
        from mxnet import autograd, nd

        ids, lengths, positions, true = self.batch
        count = true.size
        with autograd.record():
            logits = self.student(ids, lengths, positions)[1]
            loss = self.cross_entropy(logits, true.expand_dims(-1)).sum() / true.shape[1]
            figures = [loss]
            if self.teacher is not None:
                with autograd.pause():
                    teacher_logits = self.teacher(ids, lengths, positions)[1]
                student_soft = nd.softmax(logits, temperature=TEMPERATURE)
                teacher_soft = nd.softmax(teacher_logits, temperature=TEMPERATURE)
                divergence = self.divergence(student_soft, teacher_soft).sum() * TEMPERATURE**2
                figures.append(divergence / count)
                square = self.square(nd.softmax(logits), nd.softmax(teacher_logits))
                figures.append(square.sum() / count)
                loss = MLM_WEIGHT * loss + TEACHER_WEIGHT * figures[1]
        loss.backward()
        self.trainer.step(1)
        found = nd.topk(logits, axis=-1, k=1).squeeze(axis=-1)
        figures.append((found == true).sum() / count)
        for figure in figures:
            figure.asscalar()


def random_batch(settings: DistillationBenchmarkSettings) -> tuple[Any, ...]:
    """Return NDArrays: ids [batch, length], lengths [batch], positions, labels [batch, masks]."""
    from mxnet import nd

    generator = np.random.default_rng(0)
    shape = (settings.batch_size, settings.length)
    ids = generator.integers(5, settings.vocab_size, shape)
    places = [generator.permutation(settings.length) for _ in range(settings.batch_size)]
    positions = np.sort(np.stack(places)[:, : round(MASKED * settings.length)])
    labels = generator.integers(5, settings.vocab_size, positions.shape)
    lengths = np.full(settings.batch_size, settings.length)
    return tuple(nd.array(array) for array in (ids, lengths, positions, labels))


# ---- the original's recipe in a process of its own ----------------------------------------------


def _stock_command(teacher: Optional[str], settings: DistillationBenchmarkSettings) -> list[str]:
    script = os.path.join(os.path.dirname(os.path.dirname(__file__)), "benchmark.py")
    flags = [f"--{f}={getattr(settings, f)}" for f in ("batch_size", "length", "vocab_size")]
    return [sys.executable, script, "distillation", "--stock_only", teacher or "none", *flags]


def _answer_with_stock_steps(settings: DistillationBenchmarkSettings) -> None:
    # Before MXNet is imported: the original does without this.
    mxnet_setup.keep_freed_memory = lambda: None
    step = timed(
        StockStep(settings, None if settings.stock_only == "none" else settings.stock_only)
    )
    for _ in sys.stdin:
        print(step(), flush=True)


# ---- the table ----------------------------------------------------------------------------------


def _print_table(
    medians: dict[str, float],
    seconds: dict[str, list[float]],
    settings: DistillationBenchmarkSettings,
) -> None:
    threads = os.environ["OMP_NUM_THREADS"]
    tokens = settings.batch_size * settings.length
    print(
        f"{settings.batch_size} x {settings.length} tokens, vocabulary {settings.vocab_size:,}, "
        f"{threads} OpenMP threads, medians of {settings.repeats} steps in turn"
    )
    print(f"{'':<46}{'ms':>8}{'range':>16}{'tokens/s':>10}{'of original':>13}")
    for name, median in medians.items():
        low, high = 1e3 * min(seconds[name]), 1e3 * max(seconds[name])
        stock = medians.get(f"original, {_teacher_of(name)}")
        ratio = f"{median / stock:.2f}x" if stock else "-"
        print(
            f"{name:<46}{1e3 * median:>8.0f}{f'{low:.0f}-{high:.0f}':>16}"
            f"{tokens / median:>10.0f}{ratio:>13}"
        )


def _teacher_of(way: str) -> str:
    return way.split(", ")[1].replace(" live", "").replace(" cached", "")

"""One step of fine-tuning, against the original's recipe of stock GluonNLP parts, in one run.

    python scripts/benchmark.py finetuning [--batch_size 8] [--length 128] [--repeats 15]

Both train the classifier of the 4-layer Bort on the same random tokens and threads, in turn, so
that a change in the machine's speed affects both alike; the table has medians. --dtypes
float32,bfloat16 measures ours in both precisions, and --pytorch PYTHON measures PyTorch's steps,
with the interpreter of another environment.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

import numpy as np

from benchmarks._peers import (
    Work,
    check_dtypes,
    check_python,
    encoder_flops,
    print_floors,
    pytorch_command,
    step_apart,
    units_of,
    whole_batches,
)
from bort.config import option, parse
from bort.mxnet_setup import cpu_threads
from bort.ose.bert_family import BertFamily
from bort.shapes import shape_of

LABELS = ("0", "1")
EXAMPLES = 64


@dataclass(frozen=True)
class FinetuningBenchmarkSettings:
    """What is measured, and how often."""

    model: str = option("bort_4_8_768_1024", "shape")
    batch_size: int = option(8, "sequences per step", minimum=1)
    length: int = option(128, "tokens per sequence", minimum=8, maximum=512)
    vocab_size: int = option(50265, "tokens of the vocabulary", minimum=100)
    repeats: int = option(15, "measured steps of each variant", minimum=1)
    dtypes: str = option("float32", "precisions of our steps, separated by commas")
    pytorch: Optional[str] = option(
        None, "a Python with torch and transformers: measure PyTorch's steps too"
    )

    def check(self) -> None:
        """Raise `UserError` for a precision that there is not."""
        check_dtypes(self.dtypes)
        check_python(self.pytorch)


class RandomTokenizer:
    """Stands in for a vocabulary: a text is the seed of so many random tokens."""

    name, fingerprint = "random", "random"
    bos_id, pad_id, eos_id = 0, 1, 2

    def __init__(self, settings: FinetuningBenchmarkSettings) -> None:
        self.vocab_size = settings.vocab_size
        self._tokens = settings.length - 2

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return random ids for each text, which is a number."""
        return [
            np.random.default_rng(int(text)).integers(5, self.vocab_size, self._tokens)
            for text in texts
        ]


def main(argv: Optional[Sequence[str]] = None) -> dict[str, float]:
    """Measure, print a table, return {way: median seconds}."""
    from benchmarks.distillation import timed

    (settings,) = parse(str(__doc__), argv, FinetuningBenchmarkSettings)
    dtypes = settings.dtypes.split(",")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        ways = {"the original's recipe": timed(StockStep(settings))}
        for dtype in dtypes:
            ways[f"ours, {dtype}"] = timed(our_step(settings, os.path.join(folder, dtype), dtype))
            if settings.pytorch:
                command = pytorch_command("finetuning", dtype, settings, settings.model)
                apart = opened.enter_context(step_apart(command, cpu_threads()))
                ways[f"PyTorch, {dtype}"] = apart
        for way in list(ways.values()) * 2:
            way()  # graphs are made and memory is taken at the first steps
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for name, way in list(ways.items()) * settings.repeats:
            seconds[name].append(way())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"{settings.model}, {settings.batch_size} x {settings.length} tokens, vocabulary "
        f"{settings.vocab_size:,}, {os.environ['OMP_NUM_THREADS']} OpenMP threads, medians of "
        f"{settings.repeats} steps in turn"
    )
    print(f"{'':<24}{'ms':>8}{'range':>16}{'examples/s':>12}{'of original':>13}")
    stock = medians["the original's recipe"]
    for name, median in medians.items():
        low, high = 1e3 * min(seconds[name]), 1e3 * max(seconds[name])
        print(
            f"{name:<24}{1e3 * median:>8.0f}{f'{low:.0f}-{high:.0f}':>16}"
            f"{settings.batch_size / median:>12.1f}{median / stock:>12.2f}x"
        )
    print_floors(medians, {f"ours, {dtype}": (dtype, _work(settings)) for dtype in dtypes})
    return medians


def _work(settings: FinetuningBenchmarkSettings) -> Work:
    """Return the work of our step: of the last layer token 0 alone, without keys and values."""
    tokens, units = settings.batch_size * settings.length, units_of(settings.model)
    flops = encoder_flops(settings.model, tokens, settings.length, settings.batch_size)
    flops -= 4 * tokens * units**2
    head = (units + len(LABELS)) * (units + 1)
    body = BertFamily(settings.vocab_size).parameter_size(shape_of(settings.model))
    return Work(3 * flops, body + head)


def our_step(
    settings: FinetuningBenchmarkSettings, folder: str, dtype: str = "float32"
) -> Callable[[], None]:
    """Return a function that makes one update as `bort.finetuning.run` does, clipping included."""
    import mxnet as mx

    from bort.communicator import SingleProcess
    from bort.finetuning.classifier import Classifier, prepared
    from bort.finetuning.config import FinetuningOptimizerSettings
    from bort.finetuning.run import FinetuningOptions, finetuning_loop
    from bort.finetuning.task_data import TaskData
    from bort.reporter import NullReporter
    from bort.saved_model import ModelConfig, build_network
    from data.task import Example
    from data.tasks import get_task

    tokenizer: Any = RandomTokenizer(settings)
    model_config = ModelConfig(
        settings.model, settings.vocab_size, "random", "classification", "SST-2", LABELS, 2
    )
    network = build_network(model_config, dropout=0.1)
    count = whole_batches(EXAMPLES, settings.batch_size)
    examples = [Example(n, ((str(n),),), n % 2) for n in range(count)]
    data = TaskData(get_task("SST-2"), examples, {})
    classifier = prepared(Classifier(network, model_config, tokenizer), dtype, [mx.cpu()])
    optimizer = FinetuningOptimizerSettings(
        batch_size=settings.batch_size, epochs=10**6, dtype=dtype
    )
    options = FinetuningOptions(
        folder=os.path.join(folder, "run"),
        max_len=settings.length,
        cache_dir=os.path.join(folder, "encoded"),
        log_interval=10**6,
    )
    loop = finetuning_loop(
        classifier, data, optimizer, options, SingleProcess(), [mx.cpu()], NullReporter()
    ).loop
    loop.setup()
    batches = loop.batches()
    return lambda: loop.train_step(batches)


class StockStep:
    """A step as the original makes it, from stock parts of MXNet and GluonNLP.

    A hybridized classifier, a Trainer with BERTAdam, GluonNLP's clipping to norm 1, the loss read
    back to the host at every step.
    """

    def __init__(self, settings: FinetuningBenchmarkSettings) -> None:
        import gluonnlp as nlp
        import mxnet as mx
        from mxnet import nd

        from bort.saved_model import ModelConfig, build_network

        model_config = ModelConfig(
            settings.model, settings.vocab_size, "random", "classification", num_outputs=2
        )
        self.network = build_network(model_config, dropout=0.1)
        self.network.hybridize(static_alloc=True)
        optimizer = nlp.optimizer.BERTAdam(learning_rate=5e-5, wd=0.01)
        self.trainer = mx.gluon.Trainer(
            self.network.collect_params(), optimizer, update_on_kvstore=False
        )
        parameters = self.network.collect_params().values()
        self.parameters = [p for p in parameters if p.grad_req != "null"]
        self.loss = mx.gluon.loss.SoftmaxCELoss()
        tokens = RandomTokenizer(settings)
        ids = np.stack(tokens.encode_batch([str(n) for n in range(settings.batch_size)]))
        self.ids = nd.array(np.pad(ids, ((0, 0), (1, 1)), constant_values=2))
        self.lengths = nd.full(settings.batch_size, settings.length)
        self.labels = nd.arange(settings.batch_size) % 2

    def __call__(self) -> None:
        """Make one step."""
        import gluonnlp as nlp
        from mxnet import autograd

        with autograd.record():
            loss = self.loss(self.network(self.ids, self.lengths), self.labels).mean()
        loss.backward()
        self.trainer.allreduce_grads()
        nlp.utils.clip_grad_global_norm(self.parameters, 1)
        self.trainer.update(1)
        loss.asscalar()

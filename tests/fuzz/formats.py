"""Every format that is read here, with a valid sample and the reader that the programs use."""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from tests.fuzz import samples
from tests.fuzz.harness import Format, Noticed, WrongValueError

TEXTS = ["the quick brown fox", "a  lazy dog\u00e9 \u6f22 <mask> </s>", " 42 stones"]
IDS = np.array([[0, 20, 31, 44, 2], [0, 17, 2, 1, 1]])
LENGTHS = np.array([5, 3])


def require(holds: Any, message: str) -> None:
    """Raise `WrongValueError` unless what a reader returned can be right."""
    if not holds:
        raise WrongValueError(message)


def require_finite(values: Any) -> np.ndarray:
    """Return scores; raises `WrongValueError` when they are no numbers."""
    scores = np.asarray(values)
    require(np.isfinite(scores).all(), "scores that are not finite")
    return scores


# ---- data ----------------------------------------------------------------------------------------


def read_shards(folder: Path) -> Any:
    """Open a folder of shards and gather every sequence."""
    from data.batches import collate
    from data.shards import open_shards

    shards = open_shards(str(folder / "shards"), verify=True)
    size = shards.manifest.vocab_size
    rows = [shards.sequence(index) for index in range(shards.num_sequences)]
    for input_ids, positions, ids in rows:
        for values, limit in ((input_ids, size), (ids, size), (positions, len(input_ids))):
            require(((values >= 0) & (values < limit)).all(), "ids or positions out of range")
    batch = collate(rows, shards.manifest.pad_id)
    return rows, [np.asarray(one) for one in batch if isinstance(one, np.ndarray)]


def read_tokenizer(folder: Path) -> Any:
    """Load a tokenizer and use it."""
    from bort.tokenization import load_tokenizer_folder

    return _used(load_tokenizer_folder(str(folder)))


def read_tokenizer_flags(folder: Path) -> Any:
    """Load the tokenizer that --vocab_file and --bpe_ranks name."""
    from bort.tokenization import TokenizerSettings, load_tokenizer

    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return _used(load_tokenizer(TokenizerSettings(vocab_file=files[0], bpe_ranks=files[1])))


def read_wordpiece_flag(folder: Path) -> Any:
    """Load the WordPiece tokenizer that --vocab_file names."""
    from bort.tokenization import TokenizerSettings, load_tokenizer

    return _used(load_tokenizer(TokenizerSettings(vocab_file=str(folder / "vocab.txt"))))


def read_tokenizer_json(folder: Path) -> Any:
    """Load the tokenizer of another program's folder."""
    from bort.huggingface.tokenizer import read_tokenizer

    return _used(read_tokenizer(str(folder)))


def read_sentencepiece_flag(folder: Path) -> Any:
    """Load the tokenizer that --sentencepiece names."""
    from bort.tokenization import TokenizerSettings, load_tokenizer

    return _used(load_tokenizer(TokenizerSettings(sentencepiece=str(folder / "sp.model"))))


def _used(tokenizer: Any) -> Any:
    if tokenizer is None:
        return None
    rows = [tokenizer.encode(one) for one in TEXTS]
    rows += [*tokenizer.encode_sentences(TEXTS), tokenizer.encode_continued(TEXTS[0])]
    for row in rows:
        require(len(row) == 0 or 0 <= row.min() <= row.max() < tokenizer.vocab_size, "an id")
    return tokenizer.fingerprint, rows, tokenizer.tokens(range(tokenizer.vocab_size))


def task_format(name: str) -> Format:
    """Return the format of a task's official files."""

    def make(folder: Path) -> None:
        from data.tasks import get_task

        task = get_task(name)
        for suite in ("glue", "superglue", "race"):
            for one in task.folders:
                source = samples.TEST_DATA / suite / one
                if suite == task.suite and source.exists():
                    shutil.copytree(source, folder / suite / one, dirs_exist_ok=True)

    return Format(f"task {name}", make, lambda folder: _read_task(folder, name), share=0.5)


def _read_task(folder: Path, name: str) -> Any:
    from data.tasks import get_task

    task = get_task(name)
    found = []
    for split in (*filter(None, (task.train,)), *task.dev, *task.test):
        for skip in (True, False):
            read = task.read(folder, split, skip_bad_rows=skip)
            for example in read.examples:
                _check_example(task, example)
            found.append([tuple(example) for example in read.examples])
    return found


def _check_example(task: Any, example: Any) -> None:
    require(example.inputs, "an example without inputs")
    require(all(isinstance(t, str) for one in example.inputs for t in one), "a text that is none")
    if example.label is not None and task.labels and task.kind != "multiple_choice":
        require(example.label in range(len(task.labels)), f"label {example.label}")
    if example.label is not None and task.kind == "regression":
        require(np.isfinite(example.label), f"label {example.label}")


def read_corpora(folder: Path) -> Any:
    """Survey and read plain and compressed text."""
    from data.corpus import open_sources, read_documents, scan

    with open_sources(f"{folder}/*") as sources:
        return [(scan(one).documents, list(read_documents(one))) for one in sources]


def read_prepared(folder: Path) -> Any:
    """Make shards of a text by the program; what it leaves must be whole or nothing."""
    samples_main(folder)
    from data.shards import open_shards

    shards = open_shards(str(folder / "out"), verify=True)
    return [shards.sequence(index) for index in range(shards.num_sequences)]


def samples_main(folder: Path) -> None:
    """Run create_pretraining_data.py on the text of a folder."""
    from bort.tokenization import TokenizerSettings
    from data.masking import MaskingSettings, SequenceSettings
    from data.preparation import CorpusSettings
    from data.shard_jobs import prepare

    corpus = CorpusSettings(str(folder / "plain.txt"), str(folder / "out"), num_workers=1)
    prepare(corpus, TokenizerSettings(), SequenceSettings(max_seq_length=48), MaskingSettings())


def make_encoded(folder: Path) -> None:
    """Fill a cache of encoded examples."""
    read_encoded(folder)


def read_encoded(folder: Path) -> Any:
    """Encode examples with a cache: a damaged file of it must not change what comes out."""
    from bort.tokenization import TokenizerSettings, load_tokenizer
    from data.encoding import encode_examples
    from data.task import Example

    examples = [
        Example(number, ((one,),), number % 2) for number, one in enumerate(samples.sentences(20))
    ]
    return tuple(
        encode_examples(examples, load_tokenizer(TokenizerSettings()), 48, str(folder / "encoded"))
    )


def submission_format(name: str) -> Format:
    """Return the format of a task's file for the leaderboard."""

    def make(folder: Path) -> None:
        from data.submission import write_submission
        from data.tasks import get_task

        task = get_task(name)
        examples = task.read(samples.TEST_DATA, task.test[0]).examples
        scores = np.random.default_rng(0).normal(size=(len(examples), max(1, len(task.labels))))
        write_submission(task, task.test[0], examples, scores, folder)

    def read(folder: Path) -> Any:
        from data.submission import check_submission
        from data.tasks import get_task

        task = get_task(name)
        examples = task.read(samples.TEST_DATA, task.test[0]).examples
        path = folder / str(task.submission_file(task.test[0]))
        return check_submission(path, task, task.test[0], examples)

    return Format(f"submission {name}", make, read, share=0.3)


def read_archive(folder: Path) -> Any:
    """Unpack an archive that a server gave."""
    from data.download import unpack
    from data.tasks import get_task

    out = folder / "out"
    out.mkdir()
    names = [file.name for file in get_task("SST-2").files]
    unpack(folder / "SST-2.zip", names, out)
    return [(out / name).read_bytes() for name in names]


# ---- configurations ------------------------------------------------------------------------------


def make_grid(folder: Path) -> None:
    """Write a search space."""
    (folder / "grid.yaml").write_text("lr: [1e-4, 1e-5]\nbatch_size: [8, 16]\nepochs: [1]\n")


def read_grid(folder: Path) -> Any:
    """Read a search space."""
    from bort.finetuning.config import (
        ClassifierSettings,
        FinetuningOptimizerSettings,
        FinetuningRunSettings,
    )
    from bort.finetuning.search_space import read_space

    found = read_space(str(folder / "grid.yaml"), FinetuningOptimizerSettings(),
                       ClassifierSettings(), FinetuningRunSettings())  # fmt: skip
    for theta in found:
        require(all(np.isfinite(value) for value in theta.values()), "a value that is no number")
    return [dict(theta) for theta in found]


def make_space(folder: Path) -> None:
    """Write a space of architectures."""
    (folder / "space.yaml").write_text(
        "layers: [1, 2]\nheads: [2]\nhidden: [16, 32]\nintermediate: [32]\n"
    )


def read_architectures(folder: Path) -> Any:
    """Read a space of architectures and count its parameters."""
    from bort.ose.bert_family import BertFamily, load_space

    space = load_space(str(folder / "space.yaml"))
    family = BertFamily(1000)
    return [(shape.name, family.parameter_size(shape)) for shape in space]


def make_errors(folder: Path) -> None:
    """Write measured errors of architectures."""
    (folder / "errors.csv").write_text(
        "architecture,error\nbort_1_2_32_16,3.5\nbort_2_2_32_16,3.25\nbort_2_2_32_32,3\n"
    )


def read_errors(folder: Path) -> Any:
    """Read measured errors of architectures."""
    from bort.ose.known_errors import read_errors as read
    from bort.shapes import Shape

    space = [Shape(layers, 2, 32, hidden) for layers in (1, 2) for hidden in (16, 32)]
    shapes, error_of = read(str(folder / "errors.csv"), space)
    generator = np.random.default_rng(0)
    found = [error_of(shape, 1, {}, generator) for shape in shapes]
    require(not np.isnan(found).any(), "an error that is NaN")
    return [shape.name for shape in shapes], found


def make_labels(folder: Path) -> None:
    """Write labels that were made elsewhere."""
    import json

    rows = [{"inputs": [[one]], "label": "01"[n % 2]} for n, one in enumerate(samples.sentences(8))]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_labels(folder: Path) -> Any:
    """Read labels that were made elsewhere and ask for those that are there."""
    from bort.agora.labellers import FileTimaeus, LabelsMissingError
    from data.tasks import get_task

    path = folder / "labels.jsonl"
    timaeus = FileTimaeus(get_task("SST-2"), str(path), str(folder / "to_label.jsonl"))
    try:
        found = timaeus.label([((one,),) for one in samples.sentences(8)])
    except LabelsMissingError:
        return "labels are missing"
    require(np.isin(found, (0, 1)).all(), "a label that is none")
    return found


# ---- inputs of predictions -----------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """Write inputs of each format."""
    import json

    lines = samples.sentences(6)
    (folder / "inputs.txt").write_text("".join(f"{one}\n" for one in lines))
    (folder / "inputs.tsv").write_text("text\n" + "".join(f"{one}\n" for one in lines))
    (folder / "inputs.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in lines))


def read_inputs(folder: Path) -> Any:
    """Read inputs as predict.py does."""
    from bort.inference.base import InputSchema
    from bort.inference.prediction_files import InputReader, open_input

    found, schema = [], InputSchema(("text",), ("sentence",))
    for name in ("inputs.txt", "inputs.tsv", "inputs.jsonl"):
        with open_input(str(folder / name)) as lines:
            inputs = InputReader(lines, "auto", schema)
            found.append([(one.number, one.content) for one in inputs])
    return found


# ---- journals and metrics ------------------------------------------------------------------------


def read_plot(folder: Path) -> Any:
    """Read metrics as plot_metrics.py does."""
    from scripts.plot_metrics import read_run

    return read_run(str(folder)).records


def read_metrics_resumed(folder: Path) -> Any:
    """Open metrics as a resumed run does: damage in them never stops it."""
    from bort import reporter
    from bort.errors import UserError

    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    try:
        reporter.cut_after(str(path), 7, evaluate=False)
        records = reporter.read_records(str(path))
        table = reporter.closing_table(str(path))
    except UserError as error:
        raise WrongValueError(f"a resume is stopped by metrics: {error}") from None
    return (records, table) if len(records) == 12 else Noticed("lines are missing")


_FITS = {
    f"fit-{number}": {"data": "d", "predictions": [number / 7, 0.5], "seconds": 2.0}
    for number in range(5)
}


def make_store(folder: Path) -> None:
    """Write Agora's journal."""
    store = _store(folder)
    for name, content in _FITS.items():
        store.record(name, content)


def read_store(folder: Path) -> Any:
    """Read Agora's journal: damaged lines never stop it."""
    return _subset(dict(_store(folder).records), _FITS)


def _subset(found: dict, made: dict) -> Any:
    """Return records that were made; a record that was not made is wrong, one missing noticed."""
    if len(found) < len(made) and all(made.get(key) == one for key, one in found.items()):
        return Noticed("records are missing and made again")
    return found


def _store(folder: Path) -> Any:
    from bort.agora.store import DiskStore

    return DiskStore(str(folder), shutil.copyfile, str)


_MEASURED = {str(number): (-1, 1.5 + number, 2.0, "") for number in range(5)}


def make_journal(folder: Path) -> None:
    """Write the journal of a search."""
    from bort.ose.candidates import Measurement, SearchJournal

    journal = SearchJournal(str(folder), {"seed": 0})
    for key, values in _MEASURED.items():
        journal.write(key, Measurement(*values))


def read_journal(folder: Path) -> Any:
    """Read the journal of a search: damaged lines never stop it."""
    from bort.ose.candidates import SearchJournal

    known = SearchJournal(str(folder), {"seed": 0}).known
    for one in known.values():
        require(not np.isnan(one.error) and np.isfinite(one.seconds), "a figure that is none")
    return _subset({key: tuple(one) for key, one in known.items()}, _MEASURED)


def read_folder(folder: Path) -> Any:
    """Look at a folder as verify.py does."""
    from bort.errors import UserError
    from scripts.verification.report import DAMAGED, verify

    rows = verify(str(folder))
    for row in rows:
        if row.state == DAMAGED:
            raise UserError(row.detail)
    return [tuple(row)[1:] for row in rows]


def read_scores(folder: Path) -> Any:
    """Read the results of fine-tuning runs as score.py and report_runs.py do."""
    from bort.finetuning.run_report import report
    from bort.finetuning.scoreboard import as_table, read_scores, suite_score

    scores = read_scores([folder / "run"])
    reports, problems = report([folder])
    return as_table("glue", suite_score("glue", scores)), [one[1:] for one in reports], problems


# ---- models --------------------------------------------------------------------------------------


def read_parameters(folder: Path) -> Any:
    """Read the arrays of a parameter file, of which nothing else is known."""
    from bort.parameters import read_arrays

    return {name: np.array(one) for name, one in read_arrays(str(folder / "best.params")).items()}


def read_model(folder: Path) -> Any:
    """Load a saved model and ask it."""
    from bort.saved_model import load_model

    network, model_config, tokenizer = load_model(str(folder))
    scores = _logits(network, model_config.vocab_size)
    if tokenizer is None:
        return Noticed("a model without tokenizer, which no program takes")
    return scores, model_config.task, model_config.labels, _used(tokenizer)


def read_pretrained(folder: Path) -> Any:
    """Load a pretrained model and fill a mask with it."""
    from bort.inference.pipelines import fill_mask, load_mask_filler

    found = list(fill_mask(load_mask_filler(str(folder)), ["the <mask> fox"]))
    require_finite([word.probability for word in found[0]])
    return found


def read_classifier(folder: Path) -> Any:
    """Load a classifier as predict.py does and ask it."""
    return _predictions(folder, "mxnet")


def _predictions(folder: Path, runtime: str) -> Any:
    from bort.inference.pipelines import load_classifier, predict

    found = list(predict(load_classifier(str(folder), runtime=runtime), TEXTS[:2]))
    for one in found:
        require_finite(list(one.probabilities.values()))
    return found


def runtime_reader(*runtimes: str) -> Callable[[Path], Any]:
    """Return a reader that asks a classifier in runtimes."""
    return lambda folder: [_predictions(folder, name) for name in runtimes]


def read_huggingface(folder: Path) -> Any:
    """Read a folder of Hugging Face's and ask the network."""
    from bort.huggingface.folder import read
    from bort.inference.masked_lm import FillMaskPipeline
    from bort.inference.pipelines import fill_mask

    network, model_config, tokenizer = read(str(folder / "hf"))
    if model_config.kind == "masked_lm":
        pipeline = FillMaskPipeline(model_config, tokenizer, network)
        scores: Any = list(fill_mask(pipeline, [f"the {tokenizer.special_tokens['mask']} fox"]))
    else:
        scores = _logits(network, model_config.vocab_size)
    return scores, model_config.labels, model_config.kind, _used(tokenizer)


def _logits(network: Any, vocab_size: int) -> np.ndarray:
    """Return the logits that predict.py takes: damage may make them overflow."""
    from bort.inference.runtime import MXNetBackend

    return MXNetBackend(network, vocab_size).logits(IDS % vocab_size, LENGTHS)


# ---- runs ----------------------------------------------------------------------------------------


def make_run(folder: Path) -> None:
    """Write a pretraining run beside its shards, as if it had been killed before its end."""
    samples.write_shards(folder / "shards")
    samples.write_pretraining(folder / "run", folder / "shards")
    shutil.rmtree(folder / "run" / "step-0000006")
    for link in ("checkpoint_last", "checkpoint_best"):
        (folder / "run" / link).unlink()
        (folder / "run" / link).symlink_to("step-0000004")


def read_checkpoints(folder: Path) -> Any:
    """Open the checkpoint a resume would take, and its optimiser's state."""
    from bort import checkpoint

    found = checkpoint.latest(str(folder / "run"))
    require(found is not None, "no checkpoint is found")
    if "step-0000004" not in found.path:
        return Noticed("the checkpoint before it is taken")
    state = {name: value for name, value in found.state.items() if name != "sha256"}
    return state, found.trainer_arrays()


def read_resumed(folder: Path) -> Any:
    """Resume a run whose journals, configuration or checkpoints are damaged."""
    from bort.parameters import read_arrays
    from run_pretraining_distillation import main

    words = ("--data", folder / "shards", "--student_model", samples.SHAPE, "--batch_size", 4,
             "--num_buckets", 2, "--num_steps", 6, "--ckpt_interval", 2, "--eval_interval", 2,
             "--data_eval", folder / "shards", "--log_interval", 1, "--ckpt_dir", folder / "run",
             "--resume")  # fmt: skip
    main.__wrapped__([str(word) for word in words])
    found = read_arrays(str(folder / "run" / "step-0000006" / "model.params"))
    return {name: np.array(one) for name, one in found.items()}


def make_cache(folder: Path) -> None:
    """Write a teacher's stored outputs beside the shards they are of."""
    make_run(folder)
    samples.write_teacher_cache(folder / "cache", folder / "shards", folder / "run")
    shutil.rmtree(folder / "run")


def read_cache(folder: Path) -> Any:
    """Open a teacher's stored outputs and project them."""
    import mxnet as mx

    from bort.pretraining.teacher_cache import CachedTeacher, open_rows
    from data.batches import BucketSampler, PretrainingLoader
    from data.shards import open_shards

    shards = open_shards(str(folder / "shards"))
    rows = open_rows(str(folder / "cache"), shards)
    CachedTeacher(str(folder / "cache"), [mx.cpu()])
    order = BucketSampler(shards.lengths, 4, 1)
    loader = PretrainingLoader(shards, order, shards.manifest.pad_id, rows)
    for position in range(loader.batches_per_epoch):
        require_finite(loader(position).teacher_hidden)
    return [np.array(one) for one in rows]


# ---- the table -----------------------------------------------------------------------------------

_TASKS = (
    *("CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "QNLI", "RTE", "WNLI", "AX", "BoolQ", "CB"),
    *("COPA", "MultiRC", "ReCoRD", "SuperGLUERTE", "WiC", "WSC", "AX-b", "AX-g"),
    *("RACE", "RACE-H", "RACE-M"),
)


def _copy(source: Path) -> Callable[[Path], None]:
    return lambda folder: _copied(source, folder)


def _copied(source: Path, folder: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, folder / source.name)


def _sentencepiece(folder: Path) -> None:
    shutil.copyfile(samples.TEST_DATA / "sample_text.model", folder / "sp.model")


def _tokenizer_folder(folder: Path) -> None:
    shutil.copyfile(samples.TEST_DATA / "sample_text.model", folder / "tokenizer.model")


def _shards(folder: Path) -> None:
    samples.write_shards(folder / "shards")


def _pretrained(folder: Path) -> None:
    make_run(folder)
    shutil.rmtree(folder / "shards")


def _finetuned(folder: Path) -> None:
    samples.write_finetuning(folder / "run")
    shutil.rmtree(folder / "run" / "encoded")


def _huggingface(write: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: samples.write_huggingface(folder / "hf", write)


def _masked_lm_and_classifier() -> Iterator[Format]:
    for name, write in (("classifier", samples.write_classifier),
                        ("masked LM", samples.write_masked_lm)):  # fmt: skip
        yield Format(f"huggingface {name}", _huggingface(write), read_huggingface,
                     checksummed=("*",), share=1.5, has_sums=True)  # fmt: skip


def _folders() -> Iterator[Format]:
    for name, make in (
        ("pretraining folder", _pretrained),
        ("fine-tuning folder", _finetuned),
        ("agora folder", samples.write_agora),
        ("ose folder", samples.write_ose),
    ):
        yield Format(name, make, read_folder,
                     ("**/*.json", "**/metrics.jsonl", "**/journal*.jsonl"), share=0.5,
                     has_sums=True)  # fmt: skip


def all_formats() -> Sequence[Format]:
    """Return every format, those with checksums also with sums that fit the damage."""
    plain = _plain_formats()
    return (*plain, *(_with_renewed_sums(one) for one in plain if one.has_sums))


# MXNet parses the graph of an int8 model itself, and can crash: only its SHA-256 protects from
# damage, and nothing from malice (CONTRIBUTING.md, Security).
_READ_BY_MXNET_ITSELF = {"int8": ("int8/*.onnx", "int8/*.params", "int8/best.json")}


def _with_renewed_sums(form: Format) -> Format:
    return replace(
        form, name=f"{form.name} with renewed sums", checksummed=(), has_sums=False, renews=True,
        shares=form.name, files=_READ_BY_MXNET_ITSELF.get(form.name, form.files),
    )  # fmt: skip


def _plain_formats() -> Sequence[Format]:
    return (
        Format("shards", _shards, read_shards, ("shards/*.npz", "shards/*.json"),
               ("*.npz", "*.json"), 3, has_sums=True),
        Format("sentencepiece folder", _tokenizer_folder, read_tokenizer),
        Format("--sentencepiece", _sentencepiece, read_sentencepiece_flag),
        Format("bpe folder", samples.write_bpe, read_tokenizer),
        Format("--vocab_file", samples.write_bpe, read_tokenizer_flags),
        Format("--vocab_file of WordPiece", samples.write_wordpiece, read_wordpiece_flag,
               ("*.txt", "tokenizer_config.json")),
        Format("wordpiece folder", samples.write_wordpiece, read_tokenizer, ("*.json",)),
        Format("tokenizer.json of a BPE", samples.write_tokenizer_json, read_tokenizer_json),
        *map(task_format, _TASKS),
        Format("corpora", samples.write_corpora, read_corpora, share=2),
        Format("create_pretraining_data", lambda f: (f / "plain.txt").write_text(samples.text()),
               read_prepared, share=0.5, writes=True),
        Format("encoded cache", make_encoded, read_encoded, checksummed=("*.npz",), share=2,
               writes=True, has_sums=True),
        *map(submission_format, ("SST-2", "STS-B", "MNLI", "BoolQ", "MultiRC", "ReCoRD", "AX-g")),
        Format("downloaded archive", lambda f: samples.write_zip(f / "SST-2.zip"), read_archive,
               checksummed=("*.zip",), writes=True),
        Format("grid", make_grid, read_grid),
        Format("space of architectures", make_space, read_architectures, share=2),
        Format("errors.csv", make_errors, read_errors),
        Format("label file", make_labels, read_labels, writes=True),
        Format("predict inputs", make_inputs, read_inputs, share=2),
        Format("metrics.jsonl", lambda f: samples.write_metrics(f / "metrics.jsonl"), read_plot),
        Format("metrics.jsonl resumed", lambda f: samples.write_metrics(f / "metrics.jsonl"),
               read_metrics_resumed, writes=True, has_sums=True),
        Format("agora journal", make_store, read_store, ("journal.jsonl",), writes=True,
               has_sums=True),
        Format("ose journal", make_journal, read_journal, writes=True, has_sums=True),
        Format("run results", _finetuned, read_scores, ("run/**/*.json", "run/**/*.tsv")),
        *_folders(),
        Format("parameters", samples.write_classifier, read_parameters, ("*.params",), share=2),
        Format("saved model", samples.write_classifier, read_model,
               checksummed=("*.params", "tokenizer.model", "*.json"), share=2, has_sums=True),
        Format("pretrained model", samples.write_masked_lm, read_pretrained,
               checksummed=("*.params", "tokenizer.model", "*.json"), has_sums=True),
        Format("predict", samples.write_classifier, read_classifier,
               checksummed=("*.params", "tokenizer.model", "*.json"), has_sums=True),
        Format("onnx", samples.write_onnx, runtime_reader("onnx"), ("*.onnx", "*.json"),
               ("*.params", "*.onnx", "*.json"), has_sums=True),
        Format("int8", samples.write_int8, runtime_reader("onnx-int8", "mxnet-int8"), ("int8/*",),
               ("*.onnx", "*.params", "*.json"), share=1.5, has_sums=True),
        *_masked_lm_and_classifier(),
        Format("checkpoint", make_run, read_checkpoints, ("run/step-0000004/**/*",),
               ("*",), share=2, has_sums=True),
        Format("resumed run", make_run, read_resumed,
               ("run/step-0000004/*", "run/*.jsonl", "run/*.json"),
               ("model.params", "trainer.npz", "state.json"), share=0.25, writes=True),
        Format("teacher cache", make_cache, read_cache, ("cache/*",), ("*",), share=2,
               has_sums=True),
    )  # fmt: skip


def named(names: str, has_sums: bool = False) -> Sequence[Format]:
    """Return the formats whose names hold one of several words, with commas between them.

    has_sums: only those with checksums.
    """
    chosen = [
        form
        for form in all_formats()
        if (form.has_sums or not has_sums)
        and any(word.lower() in form.name.lower() for word in names.split(","))
    ]
    if not chosen:
        known = ", ".join(form.name for form in all_formats())
        raise SystemExit(f"error: --only {names}: no such format; there are {known}")
    return chosen


def one_named(name: str, has_sums: bool = False) -> Format:
    """Return the format of a name, or the only one whose name holds it."""
    found = named(name, has_sums)
    exact = [form for form in found if form.name.lower() == name.lower()]
    if len(exact or found) > 1:
        several = ", ".join(form.name for form in found)
        raise SystemExit(f"error: --only {name}: --case needs one format; there are {several}")
    return (exact or found)[0]


def prepare_imports() -> None:
    """Import what readers need, so that a child that is forked has it; no thread is started.

    MXNet's plain engine works in the thread that calls it.
    """
    os.environ.update(
        MXNET_ENGINE_TYPE="NaiveEngine", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"
    )
    # `bort` first: it prepares MXNet.
    for name in ("bort", "gluonnlp", "mxnet", "onnxruntime", "safetensors.numpy", "sentencepiece",
                 "tiktoken", "yaml", "bort.huggingface.folder", "bort.inference.pipelines",
                 "bort.inference.runtime", "bort.finetuning.run",
                 "bort.pretraining.run"):  # fmt: skip
        importlib.import_module(name)
    _compile_update()


def _compile_update() -> None:
    """Compile the optimizer's update, which each child that trains would compile for itself."""
    from bort.training.bert_adam import compiled_update

    update = compiled_update()
    if update:
        update(*np.zeros((4, 1), np.float32), tuple(np.zeros(8, np.float32)))

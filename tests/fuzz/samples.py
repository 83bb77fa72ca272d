"""Small valid folders of everything that the programs write, made by the programs themselves."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import shutil
import zipfile
from pathlib import Path
from typing import Any, Callable

import numpy as np

from bort.journal import line_of
from bort.sums import write_sums
from tests.conftest import ROOT

TEST_DATA = ROOT / "test_data"
SHAPE = "bort_1_2_32_32"
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "warm",
         "rain", "falls", "on", "old", "grey", "stones")  # fmt: skip


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return sentences of a few words each."""
    generator = np.random.default_rng(seed)
    return [
        " ".join(generator.choice(WORDS, generator.integers(4, 12))).capitalize() + "."
        for _ in range(count)
    ]


def text(documents: int = 12, seed: int = 0) -> str:
    """Return a corpus: one sentence per line, a blank line between documents."""
    lines = sentences(6 * documents, seed)
    return "\n\n".join("\n".join(lines[i : i + 6]) for i in range(0, len(lines), 6)) + "\n"


def called(main: Callable[[Any], Any], *words: Any) -> None:
    """Call the `main` of a program without what it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([str(word) for word in words])
        except SystemExit as stopped:
            raise AssertionError(f"status {stopped.code}: {said.getvalue()[-2000:]}") from None


# ---- data ----------------------------------------------------------------------------------------


def write_shards(folder: Path, seed: int = 0, shards: int = 2) -> None:
    """Write a folder of shards of the sample vocabulary."""
    from create_pretraining_data import main

    source = folder.with_name(f"{folder.name}.txt")
    source.write_text(text(seed=seed), encoding="utf-8")
    called(main, "--input_file", source, "--output_dir", folder, "--num_outputs", shards,
           "--max_seq_length", 48, "--num_workers", 1)  # fmt: skip
    source.unlink()


def write_bpe(folder: Path) -> None:
    """Write a small byte-level BPE in Hugging Face's layout and in GluonNLP's."""
    from bort.tokenization import BYTE_TO_CHARACTER, SPECIAL_TOKENS, ByteLevelBPE

    space = BYTE_TO_CHARACTER[ord(" ")]
    merges = ["t h", "th e", f"{space} the", "o n", f"{space} a", "e r", "i n", "a t"]
    tokens = [*SPECIAL_TOKENS.values(), *BYTE_TO_CHARACTER.values()]
    tokens += [one.replace(" ", "") for one in merges]
    ByteLevelBPE(tokens, merges).save(str(folder))


def write_wordpiece(folder: Path) -> None:
    """Write a small WordPiece as vocab.txt with its configuration, and as tokenizer.json."""
    from bort.tokenization import TokenizerSettings, load_tokenizer
    from tests.wordpieces import write_vocabulary

    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}', encoding="utf-8")
    load_tokenizer(TokenizerSettings(vocab_file=write_vocabulary(folder))).save(str(folder))


def write_tokenizer_json(folder: Path) -> None:
    """Write a byte-level BPE as tokenizer.json alone."""
    from bort.files import write_json
    from bort.huggingface.tokenizer import JSON, describe

    write_bpe(folder)
    write_json(str(folder / JSON), describe(str(folder), 48, True)[JSON], with_sum=False)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def write_corpora(folder: Path) -> None:
    """Write the same text plain and compressed."""
    import zstandard

    content = text().encode()
    packed = {
        "plain.txt": content,
        "text.gz": gzip.compress(content, mtime=0),
        "text.bz2": bz2.compress(content),
        "text.xz": lzma.compress(content),
        "text.zst": zstandard.ZstdCompressor(write_checksum=True).compress(content),
    }
    for name, found in packed.items():
        (folder / name).write_bytes(found)


# ---- runs ----------------------------------------------------------------------------------------


def write_pretraining(folder: Path, shards: Path) -> None:
    """Write a finished pretraining run of six updates."""
    from run_pretraining_distillation import main

    called(main, "--data", shards, "--data_eval", shards, "--student_model", SHAPE,
           "--batch_size", 4, "--num_buckets", 2, "--num_steps", 6, "--ckpt_interval", 2,
           "--eval_interval", 2, "--log_interval", 1, "--ckpt_dir", folder)  # fmt: skip


def write_teacher_cache(folder: Path, shards: Path, teacher: Path) -> None:
    """Write the stored outputs of a teacher for shards."""
    from scripts.build_teacher_cache import main

    called(main, "--data", shards, "--output_dir", folder, "--teacher_model", SHAPE,
           "--teacher_ckpt_dir", teacher, "--batch_size", 4)  # fmt: skip


def write_finetuning(folder: Path, task: str = "SST-2", cache: str = "encoded") -> None:
    """Write a finished fine-tuning run of one epoch, with its encoded cache beside it."""
    from finetune_classifier import main

    called(main, "--task_name", task, "--data_dir", TEST_DATA, "--output_dir", folder,
           "--model_name", SHAPE, "--epochs", 1, "--batch_size", 8, "--max_len", 48,
           "--cache_dir", folder / cache)  # fmt: skip


def write_classifier(folder: Path, task_name: str = "SST-2") -> None:
    """Write a saved classifier of drawn values."""
    from bort.saved_model import ModelConfig, build_network, save_model
    from bort.tokenization import TokenizerSettings, load_tokenizer
    from data.tasks import get_task
    from tests.reference import redraw

    tokenizer, task = load_tokenizer(TokenizerSettings()), get_task(task_name)
    model_config = ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, task.kind, task.name, task.labels,
        task.num_outputs, max_len=48,
    )  # fmt: skip
    network = build_network(model_config)
    redraw(network, seed=3)
    save_model(str(folder / "best.params"), network, model_config, tokenizer)


def write_masked_lm(folder: Path) -> None:
    """Write a saved pretrained model of drawn values."""
    from bort.saved_model import ModelConfig, build_network, save_model
    from bort.tokenization import TokenizerSettings, load_tokenizer
    from tests.reference import redraw

    tokenizer = load_tokenizer(TokenizerSettings())
    model_config = ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "masked_lm", max_len=48
    )
    network = build_network(model_config)
    redraw(network, seed=4)
    save_model(str(folder / "bort.params"), network, model_config, tokenizer)


def write_onnx(folder: Path, classifier: bool = True) -> None:
    """Write a classifier, unless it is there, with its ONNX file."""
    from scripts.export_onnx import main

    if classifier:
        write_classifier(folder)
    called(main, folder)


def write_int8(folder: Path) -> None:
    """Write a classifier with its int8 models."""
    from scripts.quantize import main

    write_classifier(folder)
    called(main, folder, "--data_dir", TEST_DATA)


def write_onnx_folder(folder: Path) -> None:
    """Write a classifier in Hugging Face's ONNX layout."""
    from scripts.export_onnx import main

    source = folder.with_name(f"{folder.name}.source")
    write_classifier(source)
    called(main, source, "--layout", "huggingface", "--output", folder)
    shutil.rmtree(source)


def write_huggingface(folder: Path, write: Callable[[Path], None] = write_classifier) -> None:
    """Write the Hugging Face folder of a saved model."""
    from scripts.convert_to_huggingface import main

    source = folder.with_name(f"{folder.name}.source")
    write(source)
    if folder.exists():
        folder.rmdir()  # the program makes it
    called(main, source, "--output", folder)
    shutil.rmtree(source)


def write_sweep(folder: Path, run: Path) -> None:
    """Write what a sweep leaves whose one run is a finished one of fine-tuning."""
    from bort.files import write_json

    place = folder / "lr=0.001"
    shutil.copytree(run, place / "SST-2")
    (place / "run.log").write_text("finished\n", encoding="utf-8")
    write_json(str(folder / "sweep.json"), {"task_name": "SST-2"})
    (folder / "sweep.tsv").write_text("lr\truns\tmean\n0.001\t1\t0.5\n", encoding="utf-8")
    write_sums(str(folder), ["sweep.tsv"])


def write_agora(folder: Path) -> None:
    """Write a finished run of Agora."""
    from scripts.run_agora import main

    beside = folder.with_name(f"{folder.name}.source")
    write_classifier(beside / "timaeus")
    write_masked_lm(beside / "pretrained")
    (beside / "space.yaml").write_text("lr: [1e-2, 1e-3]\nbatch_size: [4]\nepochs: [1]\n")
    called(main, "--task_name", "SST-2", "--data_dir", TEST_DATA, "--output_dir", folder,
           "--pretrained_parameters", beside / "pretrained", "--timaeus", beside / "timaeus",
           "--search_space", beside / "space.yaml", "--max_len", 48, "--max_rounds", 2,
           "--cache_dir", beside / "encoded")  # fmt: skip
    shutil.rmtree(beside)


def write_ose(folder: Path) -> None:
    """Write a finished search with errors of a formula, and a journal of trained candidates."""
    from bort.ose.candidates import Measurement, SearchJournal
    from scripts.run_ose import main

    called(main, "--space", "bert-small", "--errors", "synthetic", "--output_dir", folder)
    journal = SearchJournal(str(folder), {"seed": 0})
    for number in range(5):
        journal.write(str(number), Measurement(number, 1.5 + number, 2.0, ""))


def write_submission(folder: Path) -> None:
    """Write a leaderboard's archive of GLUE, one file predicted and the others filled."""
    from data.submission import write_submission
    from data.tasks import get_task
    from scripts.make_submission import main

    task = get_task("SST-2")
    examples = task.read(TEST_DATA, "test").examples
    write_submission(task, "test", examples, np.eye(2)[[0] * len(examples)], folder / "runs")
    called(main, "glue", "--runs", folder / "runs", "--output", folder / "glue.zip",
           "--fill_missing", "--data_dir", TEST_DATA)  # fmt: skip


def write_answers(folder: Path, model: Path) -> None:
    """Write the answers of a model that is not trained further."""
    from finetune_classifier import main

    called(main, "--only_inference", "--task_name", "SST-2", "--data_dir", TEST_DATA,
           "--model_parameters", model, "--cache_dir", folder / "encoded", "--output_dir",
           folder)  # fmt: skip
    shutil.rmtree(folder / "encoded")
    (folder / "SST-2" / "SST-2.tsv").unlink()
    write_sums(str(folder / "SST-2"))


def write_plain_parameters(folder: Path, run: Path) -> None:
    """Write a parameter file that nothing beside it describes."""
    from scripts.export_params import main

    folder.mkdir()
    called(main, run, "--output", folder / "bort.params")


def write_task_data(folder: Path, source: str = "glue/CoLA") -> None:
    """Write a folder of task data as a download leaves it; `source`: below test_data/."""
    from bort.files import write_json

    shutil.copytree(TEST_DATA / source, folder)
    write_sums(str(folder))
    write_json(str(folder / "source.json"), {"fetched": "", "sources": []})


def write_zip(path: Path, task: str = "SST-2") -> None:
    """Write an archive as the server of GLUE gives it; the same bytes at any time."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((TEST_DATA / "glue" / task).iterdir()):
            member = zipfile.ZipInfo(f"{task}/{file.name}")
            archive.writestr(member, file.read_bytes(), zipfile.ZIP_DEFLATED)


def write_metrics(path: Path) -> None:
    """Write a metrics.jsonl of a few lines."""
    records = [
        {"step": step, "phase": phase, "time": 1.5 * step, "mlm_loss": 7 - 0.1 * step,
         "tokens_per_second": 1000.0 + step, "model_share": 0.9}
        for step in range(1, 7) for phase in ("train", "eval")
    ]  # fmt: skip
    path.write_bytes(b"".join(map(line_of, records)))

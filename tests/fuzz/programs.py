"""Every program with a short command, and the inputs of all of them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple, Sequence

from tests.conftest import ROOT


class Program(NamedTuple):
    """One command.

    words: of the command line, with blanks between them; {w} is the folder that holds the inputs
        and gets the results, under out; {server} is the address of a server.
    needs: the inputs, of `make_inputs`.
    """

    name: str
    words: str
    needs: Sequence[str]
    stdin: bytes = b""

    @property
    def downloads(self) -> bool:
        """Tell whether it needs a server; there is none that behaves here."""
        return "{server}" in self.words

    def command(self, folder: str, server: str = "") -> list[str]:
        """Return the words for a folder and a server."""
        script = self.name.split()[0]
        place = ROOT / script if (ROOT / script).exists() else ROOT / "scripts" / script
        words = [
            word.replace("{w}", folder).replace("{server}", server) for word in self.words.split()
        ]
        return [sys.executable, str(place), *words]


_PRETRAINING = (
    "--data {w}/shards --data_eval {w}/shards --student_model bort_1_2_32_32 --batch_size 4 "
    "--num_steps 6 --ckpt_interval 2 --eval_interval 2 --log_interval 1 --ckpt_dir {w}/out --resume"
)
_FINETUNING = (
    "--task_name SST-2 --data_dir {w}/data --model_name bort_1_2_32_32 --batch_size 8 --max_len 48 "
    "--cache_dir {w}/out/encoded --output_dir {w}/out"
)
_TEXTS = b"the quick brown fox\na lazy dog\n"
PROGRAMS = (
    Program("create_pretraining_data.py",
            "--input_file {w}/text.txt --output_dir {w}/out --num_outputs 3 --max_seq_length 48 "
            "--num_workers 2", ["text.txt"]),
    Program("run_pretraining_distillation.py", _PRETRAINING, ["shards"]),
    Program("run_pretraining_distillation_hvd.py", _PRETRAINING, ["shards"]),
    Program("finetune_classifier.py", f"{_FINETUNING} --epochs 2 --resume", ["data"]),
    Program("train_sentencepiece.py", "--input_file {w}/text.txt --model_file {w}/out.model "
            "--vocab_size 330", ["text.txt"]),
    Program("inspect_shards.py", "{w}/shards", ["shards"]),
    Program("build_teacher_cache.py",
            "--data {w}/shards --output_dir {w}/out --teacher_model bort_1_2_32_32 "
            "--teacher_ckpt_dir {w}/run --batch_size 4", ["shards", "run"]),
    Program("predict.py", "--model_parameters {w}/model --output {w}/out.txt", ["model"], _TEXTS),
    Program("predict.py --fill_mask", "--fill_mask --model_parameters {w}/lm", ["lm"],
            b"the <mask> fox\n"),
    Program("export_params.py", "{w}/run --output {w}/out.params", ["run"]),
    Program("export_onnx.py", "{w}/model --output {w}/out.onnx", ["model"]),
    Program("export_onnx.py --layout", "{w}/model --layout huggingface --output {w}/out",
            ["model"]),
    Program("quantize.py", "{w}/model --data_dir {w}/data", ["model", "data"]),
    Program("convert_to_huggingface.py", "{w}/model --output {w}/out", ["model"]),
    Program("convert_from_huggingface.py", "{w}/hf --output {w}/out", ["hf"]),
    Program("sweep.py", f"{_FINETUNING} --epochs 1 --grid {{w}}/grid.yaml --jobs 2",
            ["data", "grid.yaml"]),
    Program("run_agora.py",
            "--task_name SST-2 --data_dir {w}/data --pretrained_parameters {w}/lm --timaeus "
            "{w}/model --search_space {w}/space.yaml --max_len 48 --max_rounds 1 --workers 2 "
            "--cache_dir {w}/out/encoded --output_dir {w}/out",
            ["data", "lm", "model", "space.yaml"]),
    Program("run_ose.py --errors", "--space bert-small --errors synthetic --output_dir {w}/out",
            []),
    Program("run_ose.py",
            "--space {w}/ose.yaml --data {w}/shards --data_eval {w}/shards --batch_size 4 --steps "
            "3 --loss mlm --workers 2 --sequence_length 24 --output_dir {w}/out",
            ["ose.yaml", "shards"]),
    Program("draw_subset.py",
            "--task_name SST-2 --data_dir {w}/data --output_dir {w}/out --train 3 --dev 2 --test 2",
            ["data"]),
    Program("tasks.py", "--check SST-2 --data_dir {w}/data", ["data"]),
    Program("make_submission.py",
            "glue --runs {w}/finetuned --output {w}/out.zip --fill_missing --data_dir {w}/data",
            ["finetuned", "data"]),
    Program("score.py", "{w}/finetuned", ["finetuned"]),
    Program("report_runs.py", "{w}/finetuned", ["finetuned"]),
    Program("plot_metrics.py", "{w}/run --output {w}/out.png", ["run"]),
    Program("verify.py", "{w}/run", ["run"]),
    Program("download_data.py", "CoLA --data_dir {w}/out --server {server}", []),
)  # fmt: skip


def make_inputs(folder: Path, programs: Sequence[Program]) -> str:
    """Write what some programs need into a new folder; returns an empty text."""
    from tests.fuzz import samples

    folder.mkdir()
    texts = {
        "text.txt": samples.text(60),
        "grid.yaml": "lr: [1e-3, 1e-4]\n",
        "space.yaml": "lr: [1e-2, 1e-3]\nbatch_size: [4]\nepochs: [1]\n",
        "ose.yaml": "architectures: [bort_1_2_8_8, bort_1_2_16_16]\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    writers = {
        "data": lambda path: shutil.copytree(samples.TEST_DATA, path),
        "shards": samples.write_shards,
        "run": lambda path: samples.write_pretraining(path, folder / "shards"),
        "model": samples.write_classifier,
        "lm": samples.write_masked_lm,
        "hf": samples.write_huggingface,
        "finetuned": samples.write_finetuning,
    }
    needed = {name for program in programs for name in program.needs}
    needed |= {"shards"} if "run" in needed else set()
    for name, write in writers.items():
        if name in needed:
            write(folder / name)
    return ""


def copy_inputs(program: Program, source: Path, target: Path) -> None:
    """Copy what a program needs into a new folder."""
    os.makedirs(target, exist_ok=True)
    for name in program.needs:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, symlinks=True)
        else:
            shutil.copyfile(source / name, target / name)

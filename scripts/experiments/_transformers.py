"""Fine-tunes a Hugging Face folder on MRPC, STS-B, RTE or CoLA with transformers, for comparison.

    PYTHON scripts/experiments/_transformers.py FOLDER --data GLUE/MRPC --seeds 1,2,3 --lr 3e-4

Needs torch and transformers, and nothing of this project. The recipe is that of
finetune_classifier.py: AdamW without decay on biases and LayerNorm, linear warmup and decay,
dropout 0.1, clipping to norm 1, and the best epoch on dev by the mean of the task's metrics. With
--dropout gluonnlp, dropout is where GluonNLP's encoder and Bort's head have it: before the
LayerNorm of the embeddings, not after it, and before the head's first dense layer, too. Prints the
metrics with the seed and the seconds as JSON for each seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

WITHOUT_DECAY = ("bias", "LayerNorm.weight")
WARMUP = 0.1
DROPOUT = 0.1


# Names of the columns of the texts and of the label, by the name of the task's folder.
COLUMNS = {
    "MRPC": (("#1 String", "#2 String"), "Quality"),
    "STS-B": (("sentence1", "sentence2"), "score"),
    "RTE": (("sentence1", "sentence2"), "label"),
    "CoLA": (("sentence",), "label"),
}
HEADERS = {"CoLA": ["source", "label", "star", "sentence"]}  # of files that have none
CLASSES = {"entailment": 0.0, "not_entailment": 1.0}
Row = tuple[tuple[str, ...], float]


def read(path: Path) -> list[Row]:
    """Return the texts and the label of each row of a task's file."""
    texts, label = COLUMNS[path.parent.name]
    with path.open(encoding="utf-8-sig", newline="") as handle:
        rows = csv.DictReader(
            handle, HEADERS.get(path.parent.name), delimiter="\t", quoting=csv.QUOTE_NONE
        )
        return [
            (
                tuple(row[name] for name in texts),
                CLASSES[row[label]] if row[label] in CLASSES else float(row[label]),
            )
            for row in rows
        ]


def metrics_of(task: str, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the metrics by which a task's epochs are compared; outputs: [n] or classes [n]."""
    if task == "STS-B":
        pearson, spearman = pearsonr(outputs, labels)[0], spearmanr(outputs, labels)[0]
        return {"pearson": float(pearson), "spearman": float(spearman)}
    if task == "CoLA":
        return {"matthews": float(matthews_corrcoef(labels, outputs))}
    metrics = {"accuracy": float((outputs == labels).mean())}
    return {**metrics, "f1": float(f1_score(labels, outputs))} if task == "MRPC" else metrics


def make_optimizer(network: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW, which decays the matrices alone."""
    named = list(network.named_parameters())
    plain = [value for name, value in named if name.endswith(WITHOUT_DECAY)]
    decayed = [value for name, value in named if not name.endswith(WITHOUT_DECAY)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, eps=1e-6)


def move_dropout(network: torch.nn.Module, place: str) -> None:
    """Move the dropout of a BERT to the places of GluonNLP and of Bort's head, or turn it off."""

    def drop(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.nn.functional.dropout(inputs[0], DROPOUT, module.training),)

    if place == "gluonnlp":
        embeddings = network.bert.embeddings
        embeddings.dropout = torch.nn.Identity()
        embeddings.LayerNorm.register_forward_pre_hook(drop)
        network.bert.pooler.dense.register_forward_pre_hook(drop)
    for module in network.modules() if place == "none" else ():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # of attention computed in one call
            module.dropout_prob = 0.0


class Run:
    """One fine-tuning run."""

    def __init__(self, flags: argparse.Namespace, seed: int) -> None:
        torch.manual_seed(seed)
        self.flags = flags
        self.tokenizer = AutoTokenizer.from_pretrained(flags.folder)
        self.network = AutoModelForSequenceClassification.from_pretrained(
            flags.folder, num_labels=1 if flags.data.name == "STS-B" else 2
        )
        move_dropout(self.network, flags.dropout)
        self.train, self.dev = (read(flags.data / f"{part}.tsv") for part in ("train", "dev"))

    def logits(self, rows: list[Row]) -> torch.Tensor:
        """Return the logits of rows."""
        texts = map(list, zip(*(texts for texts, _ in rows)))
        inputs = self.tokenizer(
            *texts,
            truncation=True,
            max_length=self.flags.max_len,
            padding=True,
            return_tensors="pt",
        )
        return self.network(**inputs).logits

    def __call__(self) -> dict[str, float]:
        """Train, and return the metrics of the best epoch."""
        size = self.flags.batch_size
        optimizer = make_optimizer(self.network, self.flags.lr)
        steps = self.flags.epochs * -(-len(self.train) // size)
        schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
        results = []
        for _ in range(self.flags.epochs):
            self.network.train()
            for chosen in torch.randperm(len(self.train)).split(size):
                rows = [self.train[index] for index in chosen.tolist()]
                self.loss(rows).backward()
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            results.append(self.evaluate())
        return max(results, key=lambda result: sum(result.values()))

    def loss(self, rows: list[Row]) -> torch.Tensor:
        """Return the mean loss of rows."""
        logits, labels = self.logits(rows), torch.tensor([label for _, label in rows])
        if logits.shape[1] == 1:
            return torch.nn.functional.mse_loss(logits[:, 0], labels)
        return torch.nn.functional.cross_entropy(logits, labels.long())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metrics on dev."""
        self.network.eval()
        parts = [self.dev[start : start + 64] for start in range(0, len(self.dev), 64)]
        logits = torch.cat([self.logits(rows) for rows in parts])
        outputs = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(dim=1)
        labels = np.array([label for _, label in self.dev])
        return metrics_of(self.flags.data.name, outputs.numpy(), labels)


def main() -> None:
    """Train once per seed, and print the metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_len", type=int, default=128)
    parser.add_argument("--dropout", choices=["bert", "gluonnlp", "none"], default="bert")
    flags = parser.parse_args()
    for seed in map(int, flags.seeds.split(",")):
        start = time.perf_counter()
        metrics = Run(flags, seed)()
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"seed": seed, **metrics, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()

"""Fine-tunes a Hugging Face folder on MRPC or STS-B with transformers, for comparison.

    PYTHON scripts/experiments/_transformers.py FOLDER --data GLUE/MRPC --seeds 1,2,3 --lr 3e-4

Needs torch and transformers, and nothing of this project. The recipe is that of
finetune_classifier.py: AdamW without decay on biases and LayerNorm, linear warmup and decay,
dropout 0.1, clipping to norm 1, and the best epoch on dev by the mean of the two metrics. Prints
them with the seed and the seconds as JSON for each seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import torch
from scipy.stats import pearsonr, spearmanr
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

WITHOUT_DECAY = ("bias", "LayerNorm.weight")
WARMUP = 0.1


# Names of the columns of the two texts and of the label, by the name of the task's folder.
COLUMNS = {
    "MRPC": ("#1 String", "#2 String", "Quality"),
    "STS-B": ("sentence1", "sentence2", "score"),
}
Row = tuple[str, str, float]


def read(path: Path) -> list[Row]:
    """Return the two texts and the label of each row of a task's file."""
    first, second, label = COLUMNS[path.parent.name]
    with path.open(encoding="utf-8-sig", newline="") as handle:
        rows = csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row[first], row[second], float(row[label])) for row in rows]


def make_optimizer(network: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW, which decays the matrices alone."""
    named = list(network.named_parameters())
    plain = [value for name, value in named if name.endswith(WITHOUT_DECAY)]
    decayed = [value for name, value in named if not name.endswith(WITHOUT_DECAY)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, eps=1e-6)


class Run:
    """One fine-tuning run."""

    def __init__(self, flags: argparse.Namespace, seed: int) -> None:
        torch.manual_seed(seed)
        self.flags = flags
        self.tokenizer = AutoTokenizer.from_pretrained(flags.folder)
        self.network = AutoModelForSequenceClassification.from_pretrained(
            flags.folder, num_labels=1 if flags.data.name == "STS-B" else 2
        )
        self.train, self.dev = (read(flags.data / f"{part}.tsv") for part in ("train", "dev"))

    def logits(self, rows: list[Row]) -> torch.Tensor:
        """Return the logits of rows."""
        first, second, _ = zip(*rows)
        inputs = self.tokenizer(
            list(first),
            list(second),
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
        logits, labels = self.logits(rows), torch.tensor([label for _, _, label in rows])
        if logits.shape[1] == 1:
            return torch.nn.functional.mse_loss(logits[:, 0], labels)
        return torch.nn.functional.cross_entropy(logits, labels.long())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metrics on dev."""
        self.network.eval()
        parts = [self.dev[start : start + 64] for start in range(0, len(self.dev), 64)]
        logits = torch.cat([self.logits(rows) for rows in parts])
        labels = torch.tensor([label for _, _, label in self.dev])
        if logits.shape[1] == 1:
            given, wanted = logits[:, 0].numpy(), labels.numpy()
            return {
                "pearson": float(pearsonr(given, wanted)[0]),
                "spearman": float(spearmanr(given, wanted)[0]),
            }
        predicted = logits.argmax(dim=1)
        both = (predicted * labels).sum().item()
        f1 = 2 * both / max(1, (predicted.sum() + labels.sum()).item())
        return {"accuracy": (predicted == labels).float().mean().item(), "f1": f1}


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
    flags = parser.parse_args()
    for seed in map(int, flags.seeds.split(",")):
        start = time.perf_counter()
        metrics = Run(flags, seed)()
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"seed": seed, **metrics, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()

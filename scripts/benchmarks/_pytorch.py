"""Training steps of PyTorch, for comparison: run in a process and environment of their own.

    PYTHON scripts/benchmarks/_pytorch.py pretraining|finetuning --model 4,8,768,1024 ...

Needs torch and transformers, and nothing of this project. Makes a step for every line read and
prints the seconds it took.

Each step is what a careful user writes: Hugging Face's RoBERTa in the shape of our network,
autocast where the dtype is bfloat16, fused AdamW, clipping to norm 1, and the decoder at the masked
positions alone.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

MLM_WEIGHT, TEACHER_WEIGHT, TEMPERATURE = 0.1, 0.5, 2.0
MASKED = 0.15


def config_of(shape: str, vocab_size: int) -> RobertaConfig:
    """Return the configuration of a shape: layers, heads, intermediate and hidden size."""
    layers, heads, intermediate, units = map(int, shape.split(","))
    return RobertaConfig(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=units,
        intermediate_size=intermediate,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )


class Step:
    """One update of a network, on the same random tokens every time."""

    def __init__(self, flags: argparse.Namespace, network: torch.nn.Module) -> None:
        self.network = network.train()
        self.low = flags.dtype == "bfloat16"
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(5, flags.vocab_size, (flags.batch_size, flags.length))
        self.mask = torch.ones_like(self.ids)

    def loss(self) -> torch.Tensor:
        """Return the loss of the batch."""
        raise NotImplementedError

    def __call__(self) -> None:
        """Make one update, and read the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


class Pretraining(Step):
    """Masked-LM loss, with a teacher its divergence too."""

    def __init__(self, flags: argparse.Namespace) -> None:
        super().__init__(flags, RobertaForMaskedLM(config_of(flags.model, flags.vocab_size)))
        self.teacher = None
        if flags.teacher:
            self.teacher = RobertaForMaskedLM(config_of(flags.teacher, flags.vocab_size)).eval()
        masks = round(MASKED * flags.length)
        places = torch.rand(self.ids.shape).argsort(1)[:, :masks] + (
            flags.length * torch.arange(flags.batch_size)[:, None]
        )
        self.positions = places.sort(1).values.reshape(-1)
        self.labels = torch.randint(5, flags.vocab_size, self.positions.shape)

    def logits(self, network: RobertaForMaskedLM) -> torch.Tensor:
        """Return the logits [n, vocabulary] at the masked positions."""
        hidden = network.roberta(self.ids, attention_mask=self.mask).last_hidden_state
        return network.lm_head(hidden.flatten(0, 1)[self.positions])

    def loss(self) -> torch.Tensor:
        """Return the weighted sum of both losses."""
        logits = self.logits(self.network).float()
        loss = MLM_WEIGHT * F.cross_entropy(logits, self.labels)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            target = F.log_softmax(self.logits(self.teacher).float() / TEMPERATURE, -1)
        student = F.log_softmax(logits / TEMPERATURE, -1)
        kl = F.kl_div(student, target, reduction="batchmean", log_target=True)
        return loss + TEACHER_WEIGHT * TEMPERATURE**2 * kl


class Finetuning(Step):
    """Cross-entropy of a classifier with two classes."""

    def __init__(self, flags: argparse.Namespace) -> None:
        config = config_of(flags.model, flags.vocab_size)
        super().__init__(flags, RobertaForSequenceClassification(config))
        self.labels = torch.arange(flags.batch_size) % 2

    def loss(self) -> torch.Tensor:
        """Return the mean loss."""
        logits = self.network(self.ids, attention_mask=self.mask).logits
        return F.cross_entropy(logits.float(), self.labels)


def main() -> None:
    """Make a step for every line of the standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("pretraining", "finetuning"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--teacher")
    for name in ("batch_size", "length", "vocab_size", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    step = Pretraining(flags) if flags.kind == "pretraining" else Finetuning(flags)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()

"""Does a merged model on disk compute what base and adapter compute?"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.targets import linear_layers
from rosa_ds.export.merge import adapter_folder, load_adapted

PROMPTS = (
    "The capital of France is",
    "Write a SQL query that answers the question.\ntable: singers (name text, age number)\nquestion: Which name has the highest age?",
    "def fibonacci(n):",
    "1, 1, 2, 3, 5, 8, 13,",
)


@dataclasses.dataclass(frozen=True)
class Verification:
    """Differences of the logits, merged against adapter model, over all positions of the prompts."""

    relative_rms: float
    bound: float
    largest: float
    mean: float
    kl: float
    top1_agreement: float

    @property
    def passed(self) -> bool:
        return self.relative_rms <= self.bound

    def __str__(self) -> str:
        return (
            f"{'passed' if self.passed else 'FAILED'}: relative RMS difference of the logits {self.relative_rms:.2e} "
            f"(bound {self.bound:.2e}), largest {self.largest:.2e}, mean {self.mean:.2e}, KL {self.kl:.2e} nats, "
            f"top-1 agreement {self.top1_agreement:.2%}"
        )


def error_bound(dtype: torch.dtype, layers: int) -> float:
    """What rounding the merged weights to ``dtype`` may do to the logits, as a relative RMS.

    Each of ``layers`` products adds an independent relative error of at most the unit roundoff, so their square sum
    grows with √layers; the factor 4 covers normalisations and the head. Arithmetic in float32 bounds it from below.
    """
    roundoff = torch.finfo(dtype).eps / 2
    return 4 * math.sqrt(layers) * max(roundoff, 8 * torch.finfo(torch.float32).eps)


@torch.no_grad()
def _logits(model: nn.Module, prompts: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=ids).logits[0].double() for ids in prompts])


def verify(source: str | Path, exported: str | Path) -> Verification:
    """Compare the adapter model with the merged model reloaded from disk, both computed in float32."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in PROMPTS]
    adapted, _ = load_adapted(adapter_folder(source), torch.float32)
    expected = _logits(adapted, prompts)
    layers = len(linear_layers(adapted)) + len(adapted_layers(adapted))
    del adapted
    merged = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)
    dtype = merged.dtype
    actual = _logits(merged.float().eval(), prompts)
    difference = actual - expected
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    return Verification(
        relative_rms=float(difference.norm() / expected.norm()),
        bound=error_bound(dtype, layers),
        largest=float(difference.abs().max()),
        mean=float(difference.abs().mean()),
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
    )

"""Does a merged model on disk compute what base and adapter compute?"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.targets import linear_layers
from rosa_ds.checkpoints.source import open_source
from rosa_ds.config.schema import MergeBase
from rosa_ds.export.adapted import load_adapted
from rosa_ds.models.load import identified
from rosa_ds.models.task import auto_class

PROMPTS = (
    "The capital of France is",
    "Write a SQL query that answers the question.\ntable: singers (name text, age number)\nquestion: Which name has the highest age?",
    "def fibonacci(n):",
    "1, 1, 2, 3, 5, 8, 13,",
)


@dataclasses.dataclass(frozen=True)
class Verification:
    """Merged against adapter model: the worst weight entry in units of its rounding, and differences of the logits over
    all positions of the prompts."""

    worst_layer: str
    worst_entry: float
    relative_rms: float
    bound: float
    largest: float
    mean: float
    kl: float
    top1_agreement: float

    @property
    def passed(self) -> bool:
        return self.relative_rms <= self.bound and self.worst_entry <= 1

    def __str__(self) -> str:
        return (
            f"{'passed' if self.passed else 'FAILED'}: worst weight entry {self.worst_entry:.2f} of its rounding "
            f"({self.worst_layer}), relative RMS difference of the logits {self.relative_rms:.2e} "
            f"(bound {self.bound:.2e}), largest {self.largest:.2e}, mean {self.mean:.2e}, KL {self.kl:.2e} nats, "
            f"top-1 agreement {self.top1_agreement:.2%}"
        )


def verify(source: str | Path, exported: str | Path, merge_base: MergeBase = "dequantized") -> Verification:
    """Compare the adapter model with the merged model reloaded from disk, both computed in float32.

    ``merge_base``: what was merged into, if the base was quantised.
    """
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in PROMPTS]
    opened = open_source(source)
    adapted = load_adapted(opened, torch.float32, merge_base)
    expected = _logits(adapted, prompts)
    linear = len(linear_layers(adapted)) + len(adapted_layers(adapted))
    task = identified(opened.description.base).task
    merged = auto_class(task).from_pretrained(exported, trust_remote_code=False)
    dtype = merged.dtype
    errors = {
        name: largest_entry_error(layer, merged.get_submodule(name).weight)
        for name, layer in adapted_layers(adapted).items()
    }
    worst = max(errors, key=lambda name: errors[name], default="")
    del adapted
    actual = _logits(merged.float().eval(), prompts)
    difference = actual - expected
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    return Verification(
        worst_layer=worst,
        worst_entry=errors.get(worst, 0.0),
        relative_rms=float(difference.norm() / expected.norm()),
        bound=error_bound(dtype, linear),
        largest=float(difference.abs().max()),
        mean=float(difference.abs().mean()),
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
    )


@torch.no_grad()
def _logits(model: nn.Module, prompts: list[Tensor]) -> Tensor:
    return torch.cat([torch.atleast_2d(model(input_ids=ids).logits[0].double()) for ids in prompts])


@torch.no_grad()
def largest_entry_error(layer: AdaptedLinear, exported: Tensor, seed: int = 0) -> float:
    """How far exported weight entries are from what the layer computes, as a multiple of their rounding.

    The layer is applied to unit vectors of up to 128 random input features and up to 128 that hold sparse entries, so its
    own forward, not the merge, says what the weight should be. At most 1 where every entry was rounded once; float32
    arithmetic of the layer itself is allowed for.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randperm(layer.in_features, generator=generator)[:128]
    if layer.positions is not None and layer.mask_known:
        chosen = layer.positions[torch.randperm(layer.entries, generator=generator)[:128]].long()
        features = torch.cat(
            [features, chosen // layer.out_features if layer.transposed else chosen % layer.in_features]
        )
    features = features.unique()
    units = torch.zeros(len(features), layer.in_features).scatter_(1, features[:, None], 1.0)
    expected = layer(units) - (0 if layer.bias is None else layer.bias)
    logical = exported.T if layer.transposed else exported
    difference = (logical.T[features].double() - expected.double()).abs()
    arithmetic = 8 * torch.finfo(torch.float32).eps * expected.abs().max()
    return float((difference / (torch.finfo(exported.dtype).eps / 2 * expected.abs() + arithmetic)).max())


def error_bound(dtype: torch.dtype, layers: int) -> float:
    """What rounding the merged weights to ``dtype`` may do to the logits, as a relative RMS.

    Each of ``layers`` products adds an independent relative error of at most the unit roundoff, so their square sum
    grows with √layers. Arithmetic in float32 bounds it from below.
    """
    roundoff = torch.finfo(dtype).eps / 2
    return math.sqrt(layers) * max(roundoff, 8 * torch.finfo(torch.float32).eps)

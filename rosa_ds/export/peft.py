"""A trained state as a folder that ``peft.PeftModel.from_pretrained`` loads.

``lora`` becomes LORA, ``robust`` and ``sparse`` become SUPERTUNING (with and without its low-rank part), and of ``subspace``
the difference to the base is factorised as LORA of a rank that the user gives.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.state import check_changes, check_fit, trained_parameters
from rosa_ds.adapters.stored import StoredAdapter
from rosa_ds.adapters.subspace import singular_directions
from rosa_ds.adapters.targets import by_pattern
from rosa_ds.export.adapted import dense_change
from rosa_ds.models.load import identified
from rosa_ds.models.stream import Base
from rosa_ds.models.task import PEFT_TASKS, whole_modules
from rosa_ds.utils.files import write_tensors

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class _Peft:
    """What is written: ``adapter_config.json`` and the tensors by PEFT's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def _refuse(what: str, why: str) -> NoReturn:
    raise ValueError(f"{what} cannot be written in PEFT's format: {why}; use --format merged")


def _whole_modules(model: PreTrainedModel, source: StoredAdapter) -> dict[str, Tensor]:
    """Parameters of modules that were trained whole."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    layers = adapted_layers(model)
    found = {}
    for name, tensor in source.trained.items():
        if name.rpartition(".")[0] not in layers:
            tied = next(group for group in names.values() if name in group)
            if len(tied) > 1:
                _refuse(f"adapter.modules_to_save {name}", f"it is tied to {tied[1]}, which PEFT would leave as it was")
            found[name] = tensor
    return found


def _common(
    model: PreTrainedModel, kind: str, source: StoredAdapter, layers: list[str], whole: dict[str, Tensor]
) -> dict[str, Any]:
    base = source.description.base
    modules = sorted({_saved_module(name, whole_modules(model)) for name in whole})
    return {
        "peft_type": kind,
        "task_type": PEFT_TASKS[identified(base).task],
        "base_model_name_or_path": base.get("name_or_path"),
        "revision": base.get("revision"),
        "target_modules": layers,
        "modules_to_save": modules or None,
        "inference_mode": True,
    }


def _saved_module(parameter: str, heads: list[str]) -> str:
    """The module of ``modules_to_save`` that a parameter is in. PEFT names a classifier's head itself, as a whole."""
    inside = (head for head in heads if parameter.startswith(f"{head}."))
    return next(inside, parameter.rpartition(".")[0])


def _lora(model: PreTrainedModel, source: StoredAdapter, whole: dict[str, Tensor]) -> _Peft:
    config, tensors, ranks = source.description.config, {}, {}
    for name, layer in adapted_layers(model).items():
        tensors[f"{name}.lora_A.weight"] = source.trained[f"{name}.A"]
        tensors[f"{name}.lora_B.weight"] = source.trained[f"{name}.B"]
        ranks[name] = layer.rank
    alphas = {name: by_pattern(name, config.alpha_pattern, config.alpha) for name in ranks}
    patterns = {f"^{name}": own for name, own in alphas.items() if own != config.alpha}
    made = _lora_config(model, source, ranks, config.rank, config.alpha, whole)
    return _Peft({**made, "alpha_pattern": patterns}, tensors)


def _lora_config(
    model: PreTrainedModel,
    source: StoredAdapter,
    ranks: dict[str, int],
    rank: int,
    alpha: float,
    whole: dict[str, Tensor],
) -> dict[str, Any]:
    return {
        **_common(model, "LORA", source, list(ranks), whole),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": source.description.config.dropout,
        "rank_pattern": {f"^{name}": own for name, own in ranks.items() if own != rank},
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in adapted_layers(model).values()),
    }


def _supertuning(model: PreTrainedModel, source: StoredAdapter, whole: dict[str, Tensor]) -> _Peft:
    """PEFT derives the number of entries from one sparsity; where that gives more than we have, zeros fill them up."""
    config, layers = source.description.config, adapted_layers(model)
    if any(layer.transposed for layer in layers.values()):
        _refuse("a model with Conv1D layers", "SUPERTUNING knows nn.Linear alone")
    for setting in ("rank_pattern", "alpha_pattern", "density_pattern"):
        if getattr(config, setting):
            _refuse(f"adapter.{setting}", "SUPERTUNING has one rank, one alpha and one density")
    sparsity, counts = _sparsity(layers)
    tensors = {}
    for name, layer in layers.items():
        if not layer.entries:
            _refuse(f"{name}, whose density gives it no entry,", "SUPERTUNING has entries in every layer")
        if layer.weight_name not in source.positions:
            raise ValueError(f"{source.folder}: the mask is not known yet, its run is before the end of mask.steps")
        positions, values = source.positions[layer.weight_name], source.trained[f"{name}.values"].float()
        missing = counts[name] - layer.entries
        tensors[f"{name}.supertuning_indices"] = torch.cat([positions, positions[:1].expand(missing)])
        tensors[f"{name}.supertuning_values"] = torch.cat([values, values.new_zeros(missing)])
        if layer.rank:
            tensors[f"{name}.supertuning_lora_A.weight"] = source.trained[f"{name}.A"]
            tensors[f"{name}.supertuning_lora_B.weight"] = source.trained[f"{name}.B"]
    low_rank = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    return _Peft(
        {
            **_common(model, "SUPERTUNING", source, list(layers), whole),
            "sparsity": sparsity,
            "save_precomputed_indices": True,
            **(low_rank if config.method == "robust" else {"r": None}),
        },
        tensors,
    )


def _sparsity(layers: dict[str, AdaptedLinear]) -> tuple[float, dict[str, int]]:
    """The largest sparsity that leaves each layer room for its entries, and the entries that PEFT then wants."""
    density = max(layer.entries / layer.weight_numel for layer in layers.values())
    sparsity = 1.0 - density
    while True:
        counts = {name: int(layer.weight_numel * (1 - sparsity)) for name, layer in layers.items()}
        if all(counts[name] >= layer.entries for name, layer in layers.items()):
            return sparsity, counts
        sparsity -= 0.1 / max(layer.weight_numel for layer in layers.values())


def _difference(
    model: PreTrainedModel, source: StoredAdapter, base: Base | None, whole: dict[str, Tensor], rank: int | None
) -> _Peft:
    """``W_fixed + B A − W`` of each layer by its largest singular directions."""
    if rank is None:
        raise ValueError(
            "method subspace changes the base: give --rank, of LoRA factors for the difference, or use --format merged"
        )
    tensors, ranks, left = {}, {}, 0.0
    total = 0.0
    for name, layer in adapted_layers(model).items():
        difference = dense_change(layer, source, base)
        ranks[name] = min(rank, *difference.shape)
        # in float32 the Gram matrix would lose the smaller ones of a difference of low rank
        basis = singular_directions(difference.double(), torch.arange(ranks[name]), "gram")[0].float()
        short = difference.shape[0] <= difference.shape[1]
        A, B = (basis.T @ difference, basis) if short else (basis.T, difference @ basis)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A.contiguous(), B.contiguous()
        left += float((difference - B @ A).square().sum())
        total += float(difference.square().sum())
    share = (left / total) ** 0.5 if total else 0.0
    logger.info("rank %d leaves out %.2e of the difference to the base (Frobenius norm)", rank, share)
    config = _lora_config(model, source, ranks, rank, float(rank), whole)
    # scale 1 in every layer, also where the rank is smaller
    patterns = {f"^{name}": float(own) for name, own in ranks.items() if own != rank}
    return _Peft({**config, "alpha_pattern": patterns, "lora_dropout": 0.0}, tensors)


def write_peft(
    model: PreTrainedModel, base: Base | None, source: StoredAdapter, folder: Path, rank: int | None
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        model: injected; ``base``: where its numbers are, if it has none.
        rank: of the difference of a subspace method.

    Raises: ValueError for what PEFT has no format for, by name.
    """
    check_fit(source.folder, source.trained, list(source.trained), trained_parameters(model))
    check_changes(source.folder, source.base, model)
    method, whole = source.description.config.method, _whole_modules(model, source)
    if method == "lora":
        made = _lora(model, source, whole)
    elif method in ("robust", "sparse"):
        made = _supertuning(model, source, whole)
    elif method == "subspace":
        made = _difference(model, source, base, whole, rank)
    else:
        _refuse(f"method {method}", "PEFT has no adapter of this kind")
    tensors = {PREFIX + name: tensor for name, tensor in {**made.tensors, **whole}.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(made.config, indent=2) + "\n")

"""A trained state as a folder that ``peft.PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.peft_format import NotInPeftError, PeftFolder, lora_folder, peft_folder
from rosa_ds.adapters.state import check_changes, check_fit, trained_parameters
from rosa_ds.adapters.stored import StoredAdapter
from rosa_ds.adapters.subspace import singular_directions
from rosa_ds.export.adapted import dense_change
from rosa_ds.models.stream import Base

logger = logging.getLogger(__name__)


def write_peft(
    model: PreTrainedModel, base: Base | None, source: StoredAdapter, folder: Path, rank: int | None
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, see :func:`rosa_ds.adapters.peft_format.peft_folder`.

    Of a subspace method the difference to the base is factorised as LORA.

    Args:
        model: injected; ``base``: where its numbers are, if it has none.
        rank: of the difference of a subspace method.

    Raises: ValueError for what PEFT has no format for, by name.
    """
    check_fit(source.folder, source.trained, list(source.trained), trained_parameters(model))
    check_changes(source.folder, source.base, model)
    subspace = source.description.config.method == "subspace"
    try:
        made = _difference(model, source, base, rank) if subspace else peft_folder(model, source)
    except NotInPeftError as problem:
        raise ValueError(f"{problem}; use --format merged") from None
    made.write(folder)


def _difference(model: PreTrainedModel, source: StoredAdapter, base: Base | None, rank: int | None) -> PeftFolder:
    """``W_fixed + B A − W`` of each layer by its largest singular directions."""
    if rank is None:
        raise ValueError(
            "method subspace changes the base: give --rank, of LoRA factors for the difference, or use --format merged"
        )
    factors, left, total = {}, 0.0, 0.0
    for name, layer in adapted_layers(model).items():
        difference = dense_change(layer, source, base)
        # in float32 the Gram matrix would lose the smaller ones of a difference of low rank
        wanted = torch.arange(min(rank, *difference.shape))
        basis = singular_directions(difference.double(), wanted, "gram")[0].float()
        short = difference.shape[0] <= difference.shape[1]
        A, B = (basis.T @ difference, basis) if short else (basis.T, difference @ basis)
        factors[name] = A.contiguous(), B.contiguous()
        left += float((difference - B @ A).square().sum())
        total += float(difference.square().sum())
    share = (left / total) ** 0.5 if total else 0.0
    logger.info("rank %d leaves out %.2e of the difference to the base (Frobenius norm)", rank, share)
    scales_of_one = {name: float(len(A)) for name, (A, _) in factors.items()}
    return lora_folder(model, source, factors, scales_of_one, rank, float(rank), dropout=0.0)

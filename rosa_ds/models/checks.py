"""What is wrong with the files of a base, in one message: given, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rosa_ds.config.schema import ModelSettings
from rosa_ds.utils.suggest import did_you_mean_path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_LONGEST = 600
"""Characters of a message of transformers that are shown; some list every class that there is."""


def check_folder(name: str, folder: Path) -> None:
    """Raise ValueError for a folder that is something else than a model."""
    weights = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.name != "mask.safetensors"]
    if not weights and ((folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file()):
        raise ValueError(
            f"model.name_or_path {name} is a run: export it first (launch/export.py {name} OUT) and give OUT, or go on with --resume"
        )
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model.name_or_path {name} is an adapter: give its base here, and this folder as adapter.init_from; or merge the two"
        )
    raise ValueError(
        f"model.name_or_path {name!r} cannot be loaded: it has no config.json; a model's folder holds that, weights "
        f"({', '.join(WEIGHT_SUFFIXES)}) and a tokenizer"
    )


BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, ImportError, RuntimeError)
"""What transformers raises of files that it cannot read or make sense of; RuntimeError of tensors and .bin files."""


def refused(settings: ModelSettings, error: Exception, what: str = "model.name_or_path") -> ValueError:
    """One message for what transformers says, which may be pages."""
    said = str(error).strip() or type(error).__name__
    if isinstance(error, (TypeError, KeyError, AttributeError, ArithmeticError)):
        said = f"its files make no sense to transformers ({type(error).__name__}: {said}): are they whole?"
    if "trust_remote_code" in said:
        said = "it needs code of its own, which is never run here: use a model of an architecture that transformers has"
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."
    name = settings.name_or_path
    hint = "" if Path(name).expanduser().exists() else did_you_mean_path(Path(name))
    if settings.attn_implementation is not None and "attn_implementation" in said:
        hint = f" Given is model.attn_implementation {settings.attn_implementation}."
    return ValueError(f"{what} {name!r} cannot be loaded: {said}{hint}")


def damaged_files(folder: Path) -> str:
    """Names of the safetensors files of a folder that are not whole."""
    damaged = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            damaged.append(path.name)
    return ", ".join(damaged)


def check_complete(report: Mapping[str, Any], settings: ModelSettings) -> None:
    """Raise ValueError for parameters that the base's files lack or have in another shape, which would begin as noise."""
    if wrong := sorted(report["mismatched_keys"]):
        name, found, wanted = wrong[0]
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r} cannot be loaded: size mismatch: {name} is {tuple(found)} in its files and "
            f"{tuple(wanted)} by its config.json ({len(wrong)} such): are both of one model?"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model.name_or_path {settings.name_or_path!r} cannot be loaded: its files have no tensor for {missing[0]} "
            f"({len(missing)} parameters): is it whole, and a base of this architecture?"
        )


@torch.no_grad()
def check_numbers(model: nn.Module, settings: ModelSettings) -> None:
    """Raise ValueError for a base with a number that is not finite: nothing could be trained, and nothing compared."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter):
            raise not_finite(name, settings.name_or_path)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is infinite or NaN: a sum first, which reads it once and keeps nothing."""
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())


def not_finite(name: str, base: str) -> ValueError:
    return ValueError(
        f"model.name_or_path {base!r}: {name} is not finite (it has NaN or infinite numbers): the file is damaged, or what trained it "
        "has diverged; get the base again"
    )

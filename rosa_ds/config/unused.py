"""Which of the settings that were given change nothing in a run."""

from __future__ import annotations

from rosa_ds.config.schema import DrawSettings, MaskSettings, RunConfig


def settings_without_effect(settings: RunConfig) -> list[str]:
    """Settings that were given but change nothing in this run, each with the reason."""
    unused = _of_parts(settings)
    if settings.parts.everything:
        unused["adapter.target_modules"] = "method full trains everything"
    elif not settings.adapter.modules_to_save and settings.model.task == "causal-lm":
        unused["training.learning_rate"] = "adapters have adapter.low_rank_lr and adapter.sparse_lr"
    if settings.parts.resampled and settings.draw.directions == "projection":
        unused["draw.factorization"] = "draw.directions projection factorises nothing"
    if settings.parts.resampled and settings.draw.every == "never":
        unused |= {f"draw.{name}": "draw.every is never" for name in ("moments", "warmup_steps")}
    if settings.model.quantization != "nf4":
        unused["model.double_quantization"] = f"model.quantization is {settings.model.quantization}"
    if settings.model.quantization == "none":
        unused["model.quantization_skip"] = "model.quantization is none"
    if settings.training.max_steps is not None:
        unused["training.epochs"] = "training.max_steps is given"
    sections = ("model", "adapter", "mask", "draw", "training")
    given = {f"{section}.{key}" for section in sections for key in getattr(settings, section).model_fields_set}
    return [f"{name} ({reason})" for name, reason in unused.items() if name in given]


def _of_parts(settings: RunConfig) -> dict[str, str]:
    """Settings of parts that the method does not have, or that a mask which is known before does not need."""
    unused: dict[str, str] = {}
    if not settings.parts.low_rank:
        for name in ("rank", "alpha", "dropout", "rank_pattern", "alpha_pattern", "low_rank_lr"):
            unused[f"adapter.{name}"] = f"method {settings.method} has no low-rank part"
    if settings.parts.resampled:
        for name in ("alpha", "alpha_pattern", "dropout"):
            unused[f"adapter.{name}"] = "what is drawn from the base is neither scaled nor dropped out"
    else:
        unused |= {f"draw.{name}": f"method {settings.method} draws nothing" for name in DrawSettings.model_fields}
    if not settings.parts.sparse:
        for name in ("density", "density_pattern", "sparse_lr", "sparse_product", "partition_positions"):
            unused[f"adapter.{name}"] = f"method {settings.method} has no sparse part"
        unused |= {f"mask.{name}": f"method {settings.method} has no sparse part" for name in MaskSettings.model_fields}
    elif settings.collects_gradients and not settings.parts.low_rank:
        unused["mask.warmup_steps"] = f"method {settings.method} has no low-rank part to warm up"
    elif not settings.collects_gradients:
        reason = "the mask is loaded" if settings.mask.load else f"mask.score {settings.mask.score} needs no gradient"
        if settings.adapter.init_from is not None:
            reason = "the mask is that of adapter.init_from"
        if settings.adapter.init_from is not None or settings.mask.load is not None:
            unused["mask.score"] = reason
        for name in ("warmup_steps", "steps", "after", "device_memory_gib"):
            unused[f"mask.{name}"] = reason
    return unused

"""Robust (RoSA) and random subspace (ROSA) adaptation of language models, trained with DeepSpeed."""

from rosa_ds.adapters.inject import adapted_layers, draw, inject, merge, merged
from rosa_ds.adapters.mask import compute_mask, load_mask, save_mask, set_mask
from rosa_ds.adapters.quantize import quantize
from rosa_ds.adapters.registry import adapter_names
from rosa_ds.adapters.state import AdapterDescription, load_adapter, save_adapter
from rosa_ds.adapters.switch import disable, disabled, enable, remove_adapter, set_adapter
from rosa_ds.config import AdapterConfig, RunConfig

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "AdapterDescription",
    "RunConfig",
    "adapted_layers",
    "adapter_names",
    "compute_mask",
    "disable",
    "disabled",
    "draw",
    "enable",
    "inject",
    "load_adapter",
    "load_mask",
    "merge",
    "merged",
    "quantize",
    "remove_adapter",
    "save_adapter",
    "save_mask",
    "set_adapter",
    "set_mask",
]

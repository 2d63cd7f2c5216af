"""Robust (RoSA) and random subspace (ROSA) adaptation of language models, trained with DeepSpeed.

Every name is imported when it is first used: what only reads settings does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosa_ds.adapters.inject import adapted_layers as adapted_layers
    from rosa_ds.adapters.inject import draw as draw
    from rosa_ds.adapters.inject import inject as inject
    from rosa_ds.adapters.inject import merge as merge
    from rosa_ds.adapters.inject import merged as merged
    from rosa_ds.adapters.mask import compute_mask as compute_mask
    from rosa_ds.adapters.mask import load_mask as load_mask
    from rosa_ds.adapters.mask import save_mask as save_mask
    from rosa_ds.adapters.mask import set_mask as set_mask
    from rosa_ds.adapters.quantize import quantize as quantize
    from rosa_ds.adapters.registry import adapter_names as adapter_names
    from rosa_ds.adapters.state import load_adapter as load_adapter
    from rosa_ds.adapters.state import save_adapter as save_adapter
    from rosa_ds.adapters.stored import AdapterDescription as AdapterDescription
    from rosa_ds.adapters.switch import disable as disable
    from rosa_ds.adapters.switch import disabled as disabled
    from rosa_ds.adapters.switch import enable as enable
    from rosa_ds.adapters.switch import remove_adapter as remove_adapter
    from rosa_ds.adapters.switch import set_adapter as set_adapter
    from rosa_ds.config.schema import AdapterConfig as AdapterConfig
    from rosa_ds.config.schema import RunConfig as RunConfig

# module -> what it gives; the imports above say the same to type checkers
_NAMES = {
    "rosa_ds.adapters.inject": ("adapted_layers", "draw", "inject", "merge", "merged"),
    "rosa_ds.adapters.mask": ("compute_mask", "load_mask", "save_mask", "set_mask"),
    "rosa_ds.adapters.quantize": ("quantize",),
    "rosa_ds.adapters.registry": ("adapter_names",),
    "rosa_ds.adapters.state": ("load_adapter", "save_adapter"),
    "rosa_ds.adapters.stored": ("AdapterDescription",),
    "rosa_ds.adapters.switch": ("disable", "disabled", "enable", "remove_adapter", "set_adapter"),
    "rosa_ds.config.schema": ("AdapterConfig", "RunConfig"),
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}
__version__ = "0.1.0"
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})

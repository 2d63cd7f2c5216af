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

_PLACES = {
    "AdapterConfig": "rosa_ds.config.schema",
    "AdapterDescription": "rosa_ds.adapters.stored",
    "RunConfig": "rosa_ds.config.schema",
    "adapted_layers": "rosa_ds.adapters.inject",
    "adapter_names": "rosa_ds.adapters.registry",
    "compute_mask": "rosa_ds.adapters.mask",
    "disable": "rosa_ds.adapters.switch",
    "disabled": "rosa_ds.adapters.switch",
    "draw": "rosa_ds.adapters.inject",
    "enable": "rosa_ds.adapters.switch",
    "inject": "rosa_ds.adapters.inject",
    "load_adapter": "rosa_ds.adapters.state",
    "load_mask": "rosa_ds.adapters.mask",
    "merge": "rosa_ds.adapters.inject",
    "merged": "rosa_ds.adapters.inject",
    "quantize": "rosa_ds.adapters.quantize",
    "remove_adapter": "rosa_ds.adapters.switch",
    "save_adapter": "rosa_ds.adapters.state",
    "save_mask": "rosa_ds.adapters.mask",
    "set_adapter": "rosa_ds.adapters.switch",
    "set_mask": "rosa_ds.adapters.mask",
}
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


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})

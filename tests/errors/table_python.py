"""Bad arguments of the functions for Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import rosa_ds
import rosa_kernels
from errors.rows import FunctionRow, adapter, cut, mask, tiny, write
from rosa_ds.adapters.inject import adapted_layers

Q = "model.layers.0.self_attn.q_proj.weight"


def injected(method: str = "robust", **settings: object) -> PreTrainedModel:
    model = tiny()
    config = {"rank": 2, "density": 0.001, "method": method, **settings}
    rosa_ds.inject(model, rosa_ds.AdapterConfig(**config))
    return model


def loaded(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A folder after ``change``, loaded into the built-in model."""

    def call(folder: Path) -> None:
        change(folder)
        rosa_ds.load_adapter(tiny(), folder / "adapter")

    return call


def masked(name: str, positions: torch.Tensor | None) -> Callable[[Path], object]:
    """A mask of which one matrix is replaced, or left out."""

    def call(folder: Path) -> None:
        model = injected()
        given = {layer.weight_name: torch.arange(layer.entries) for layer in adapted_layers(model).values()}
        given = {key: value.int() for key, value in given.items()}
        given.pop(name, None)
        if positions is not None:
            given[name] = positions
        try:
            rosa_ds.set_mask(model, given)
        finally:  # nothing is set unless all fit
            assert not any(layer.mask_known for layer in adapted_layers(model).values())

    return call


def sddmm(grad: torch.Tensor, x: torch.Tensor, positions: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: rosa_kernels.sddmm(grad, x, positions)


ENTRIES = 26
POSITIONS = torch.arange(ENTRIES, dtype=torch.int32)
ROWS = [
    FunctionRow(
        "inject twice",
        lambda f: rosa_ds.inject(injected(), rosa_ds.AdapterConfig()),
        ("has adapters already", "rosa_ds.merge"),
    ),
    FunctionRow(
        "inject into nothing",
        lambda f: rosa_ds.inject(torch.nn.ReLU(), rosa_ds.AdapterConfig()),
        ("ReLU has no linear layer",),
    ),
    FunctionRow(
        "inject unknown targets",
        lambda f: injected(target_modules=["query"]),
        ("'query' matches no module", "There are"),
    ),
    FunctionRow("inject an unknown setting", lambda f: rosa_ds.AdapterConfig(rnk=3), ("rnk", "not permitted")),
    FunctionRow("inject an infinite alpha", lambda f: rosa_ds.AdapterConfig(alpha=float("inf")), ("alpha", "finite")),
    FunctionRow("mask of a missing matrix", masked(Q, None), ("nothing for " + Q, "other targets")),
    FunctionRow("mask of a wrong length", masked(Q, POSITIONS[:5]), (Q, "5", str(ENTRIES))),
    FunctionRow("mask unsorted in Python", masked(Q, POSITIONS.flip(0)), (Q, "sorted")),
    FunctionRow("mask with one twice", masked(Q, POSITIONS.clamp(max=24)), (Q, "sorted")),
    FunctionRow("mask below 0", masked(Q, POSITIONS - 3), (Q, "-3", "25600 entries")),
    FunctionRow("mask of floats in Python", masked(Q, POSITIONS.float()), (Q, "int32")),
    FunctionRow("mask of rows and columns", masked(Q, POSITIONS.view(2, -1)), (Q, "(2, 13)")),
    FunctionRow(
        "mask of a strange matrix",
        masked("model.layers.0.q.weight", POSITIONS),
        ("model.layers.0.q.weight", "no sparse part"),
    ),
    FunctionRow(
        "mask for a model without adapters", lambda f: rosa_ds.set_mask(tiny(), {Q: POSITIONS}), (Q, "no sparse part")
    ),
    FunctionRow(
        "load no folder",
        loaded(lambda f: None),
        ("adapter", "not an adapter folder", "rosa_adapter.json", "adapter_config.json"),
    ),
    FunctionRow(
        "load cut tensors",
        loaded(lambda f: cut(adapter(f) / "adapter_model.safetensors")),
        ("adapter_model.safetensors", "not a whole safetensors file"),
    ),
    FunctionRow(
        "load tensors of another shape",
        loaded(
            lambda f: save_file(
                {"base_model.model.model.norm.supertuning_lora_A.weight": torch.zeros(2, 2)},
                adapter(f) / "adapter_model.safetensors",
            )
        ),
        ("adapter", "is not in the"),
    ),
    FunctionRow(
        "load a broken config",
        loaded(lambda f: (adapter(f), write("adapter/rosa_adapter.json", "{")(f))),
        ("rosa_adapter.json", "not JSON"),
    ),
    FunctionRow(
        "load a mask's file", lambda f: rosa_ds.load_mask(f / "mask.safetensors"), ("mask.safetensors", "no such file")
    ),
    FunctionRow(
        "load a cut mask",
        lambda f: (cut(mask(f)), rosa_ds.load_mask(f / "mask.safetensors")),
        ("mask.safetensors", "not a whole safetensors file"),
    ),
    FunctionRow(
        "save without an adapter", lambda f: rosa_ds.save_adapter(tiny(), f / "out"), ("no adapter", "rosa_ds.inject")
    ),
    FunctionRow("draw without a part to draw", lambda f: rosa_ds.draw(injected("lora")), ("this one has lora",)),
    FunctionRow(
        "draw in unknown directions",
        lambda f: rosa_ds.draw(injected("subspace"), directions="left"),
        ("directions", "'left'", "random"),
    ),
    FunctionRow(
        "set an adapter that is not there",
        lambda f: rosa_ds.set_adapter(injected(), "defalt"),
        ("'defalt'", "Did you mean default"),
    ),
    FunctionRow(
        "mask by an unknown score",
        lambda f: rosa_ds.compute_mask(injected(), [], score="fisher"),
        ("'fisher'", "mean_squared"),
    ),
    FunctionRow("mask from no batch", lambda f: rosa_ds.compute_mask(injected(), []), ("needs gradients", "one batch")),
    FunctionRow(
        "sddmm of unequal lengths",
        sddmm(torch.ones(3, 4), torch.ones(2, 5), POSITIONS[:2]),
        ("same T", "(3, 4)", "(2, 5)"),
    ),
    FunctionRow(
        "sddmm of two types",
        sddmm(torch.ones(3, 4), torch.ones(3, 5).double(), POSITIONS[:2]),
        ("one floating type", "float64"),
    ),
    FunctionRow(
        "sddmm of float positions",
        sddmm(torch.ones(3, 4), torch.ones(3, 5), torch.ones(2)),
        ("int32 or int64", "float32"),
    ),
]

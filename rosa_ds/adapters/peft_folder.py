"""Folders that PEFT has written (LORA, SUPERTUNING, SHIRA), as an adapter of ours: the same function, to the last rounding.

What no adapter of ours computes is refused by name. Only safetensors are read.
Formats: peft 0.21, ``tuners/{lora,supertuning,shira}`` and ``utils/save_and_load.py``.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rosa_ds import zero
from rosa_ds.adapters.layer import MAX_POSITIONS, stored_shape
from rosa_ds.adapters.stored import AdapterDescription, StoredAdapter
from rosa_ds.adapters.targets import Value, find_targets, linear_layers
from rosa_ds.config.methods import Method
from rosa_ds.config.schema import AdapterConfig
from rosa_ds.models.task import PEFT_TASKS, is_classifier
from rosa_ds.utils.files import TensorFiles
from rosa_ds.utils.json_files import read_json
from rosa_ds.utils.suggest import did_you_mean

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."
CONFIG_FILE, TENSOR_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_PARTS = {
    "LORA": {".lora_A.weight": "A", ".lora_B.weight": "B"},
    "SUPERTUNING": {
        ".supertuning_lora_A.weight": "A",
        ".supertuning_lora_B.weight": "B",
        ".supertuning_values": "values",
        ".supertuning_indices": "positions",
    },
    "SHIRA": {".shira_weight": "values", ".shira_indices": "positions"},
}
_READ = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "init_lora_weights",
        "save_precomputed_indices",
        "bias",
    }
)
# the tensors say which layers there are; the others speak of PEFT itself, of how the numbers came about, or of the device
_SAYS_NOTHING = frozenset(
    {
        "peft_version",
        "auto_mapping",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "runtime_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "ensure_weight_tying",
        "sparsity",
        "select_top",
        "init_weights",
        "mask_type",
        "random_seed",
    }
)
_LEAVES_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_MERGE = "merge it with PEFT (merge_and_unload) and give the merged folder as model.name_or_path"


def is_peft(folder: Path) -> bool:
    """Whether ``adapter_config.json`` is one of PEFT's."""
    path = folder / CONFIG_FILE
    return path.is_file() and "peft_type" in read_json(path)


def _refuse(folder: Path, what: str, remedy: str = _MERGE) -> NoReturn:
    raise ValueError(f"{folder} has {what}, which no adapter here can be: {remedy}")


def _check_config(folder: Path, config: Mapping[str, Any], model: nn.Module) -> None:
    kind, task = config["peft_type"], config.get("task_type")
    own = PEFT_TASKS["classification" if is_classifier(model) else "causal-lm"]
    if kind not in _PARTS:
        _refuse(folder, f"peft_type {kind} (known: {', '.join(_PARTS)})")
    if task not in (None, own):
        known = f"only {' and '.join(PEFT_TASKS.values())} are trained here"
        other = f"{type(model).__name__} is a model of {own}"
        _refuse(folder, f"task_type {task}", other if task in PEFT_TASKS.values() else known)
    if config.get("bias", "none") != "none":
        _refuse(folder, f"bias {config['bias']!r}")
    if config.get("init_lora_weights") not in _LEAVES_THE_BASE:
        _refuse(folder, f"init_lora_weights {config['init_lora_weights']!r} (the base is changed with it)")
    if kind == "SUPERTUNING" and not config.get("save_precomputed_indices", True):
        _refuse(folder, "no positions", "save it again with save_precomputed_indices=True")
    for key, value in config.items():
        if key not in _READ | _SAYS_NOTHING and value not in (None, False, [], {}):
            _refuse(folder, f"{key} {value!r}")


def _open(folder: Path) -> TensorFiles:
    if not (folder / TENSOR_FILE).is_file() and (folder / PICKLE_FILE).is_file():
        raise ValueError(
            f"{folder / PICKLE_FILE} is a pickle, which can run any code and is not read here: load it with PEFT and save it "
            "again (model.save_pretrained(folder, safe_serialization=True))"
        )
    return TensorFiles([folder / TENSOR_FILE])


def _sort_tensors(files: TensorFiles, kind: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Layer name -> part -> tensor name, and parameter name -> tensor name of everything else."""
    layers: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for key in files:
        name = key.removeprefix(PREFIX)
        ending = next((ending for ending in _PARTS[kind] if name.endswith(ending)), None)
        if ending is None:
            others[name] = key
        else:
            layers.setdefault(name.removesuffix(ending), {})[_PARTS[kind][ending]] = key
    return layers, others


def _whole_modules(
    folder: Path, files: TensorFiles, others: dict[str, str], wanted: list[str], model: nn.Module
) -> dict[str, str]:
    """Parameter name -> tensor name of ``modules_to_save``. What else is there must be the base's own numbers."""
    whole = [name for name, _ in model.named_modules() if any(name.endswith(ending) for ending in wanted)]  # as PEFT
    named: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name)
    parameters = {name: group for group in named.values() for name in group}
    found = {name: key for name, key in others.items() if any(name.startswith(f"{module}.") for module in whole)}
    for name in found:
        if len(parameters.get(name, ())) > 1:
            tied = next(other for other in parameters[name] if other != name)
            _refuse(folder, f"its own copy of {name}, here tied to {tied}")
    for name in others.keys() - found.keys():
        _check_same(folder, name, files[others[name]], model)
    return found


def _check_same(folder: Path, name: str, tensor: Tensor, model: nn.Module) -> None:
    """Raise ValueError unless this frozen tensor, such as an embedding that PEFT saved along, is the base's."""
    own = name.replace(".base_layer.", ".")
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(own)
    if parameter is None or tuple(tensor.shape) != tuple(zero.full_shape(parameter)):
        there = f", which is {tuple(zero.full_shape(parameter))} here" if parameter is not None else ""
        _refuse(folder, f"{name} {tuple(tensor.shape)}{there}")
    if parameter.is_meta or zero.is_partitioned(parameter):
        logger.warning("%s: %s is taken for the base's own, which is not there to compare", folder, name)
    elif not torch.equal(tensor.to(parameter), parameter.detach()):
        _refuse(folder, f"{name} with other numbers than the base has, not in modules_to_save")


def _unique(positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted positions, each once, with the sum of its values. Shapes: (Z,) each; results (Z',), int32 and float32."""
    unique, inverse = positions.long().unique(return_inverse=True)
    sums = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, inverse, values.double())
    return unique.to(torch.int32), sums.float()


def _flat_positions(folder: Path, name: str, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """PEFT's indices into a weight of this shape, (Z,) or rows and columns (2, Z), as flat ones. Shapes: result (Z,) int64."""
    rows, columns = shape
    indices = indices.long()
    if indices.ndim == 2 and indices.numel():
        inside = bool((indices >= 0).all()) and bool((indices.amax(1) < torch.tensor([rows, columns])).all())
        indices = indices[0] * columns + indices[1]
    else:
        inside = indices.numel() == 0 or (int(indices.min()) >= 0 and int(indices.max()) < rows * columns)
    if not inside or rows * columns > MAX_POSITIONS:
        raise ValueError(f"{folder}: indices of {name} do not lie in a weight of {shape}: is it another base?")
    return indices


def _alpha(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """The number that divided by the rank is what PEFT multiplies ``B A`` of a layer with."""
    alpha = config.get("lora_alpha")
    if alpha is None and config["peft_type"] == "LORA":
        raise ValueError(f"{CONFIG_FILE} has no lora_alpha: it is damaged; save the adapter with PEFT again")
    if alpha is None:
        alpha = 2 * rank  # SUPERTUNING's default
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = own
            break
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _spell(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """Layer name -> value as a default and patterns, by the names' endings where these decide."""
    default = Counter(values.values()).most_common(1)[0][0]
    endings: dict[str, list[str]] = {}
    for name in values:
        endings.setdefault(name.rpartition(".")[2], []).append(name)
    patterns: dict[str, Value] = {}
    for ending, names in endings.items():
        own = {values[name] for name in names}
        if len(own) == 1 and own != {default}:
            patterns[rf"(^|\.){re.escape(ending)}$"] = own.pop()
        elif len(own) > 1:
            patterns |= {f"^{re.escape(name)}$": values[name] for name in names if values[name] != default}
    return default, patterns


def _spell_names(names: set[str], model: nn.Module) -> list[str]:
    """Names of modules by their endings, where these name no others."""
    endings = {name.rpartition(".")[2] for name in names}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return sorted(endings) if named == names else sorted(names)


def _low_rank(
    folder: Path, files: TensorFiles, layers: Mapping[str, Mapping[str, str]], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    trained: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, parts in layers.items():
        if parts.keys() & {"A", "B"} != {"A", "B"}:
            raise ValueError(f"{folder}: {name} has not both of A and B: is the file whole?")
        trained[f"{name}.A"], trained[f"{name}.B"] = files[parts["A"]].float(), files[parts["B"]].float()
        alphas[name] = _alpha(name, len(trained[f"{name}.A"]), config)
    ranks = {name: len(trained[f"{name}.A"]) for name in layers}
    rank, rank_pattern = _spell(ranks)
    alpha, alpha_pattern = _spell(alphas)
    dropout = config.get("lora_dropout", 0.0)
    settings = {"rank": rank, "rank_pattern": rank_pattern, "alpha": alpha, "alpha_pattern": alpha_pattern}
    return {**settings, "dropout": dropout}, trained


def _sparse(
    folder: Path,
    files: TensorFiles,
    layers: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    trained: dict[str, Tensor] = {}
    positions: dict[str, Tensor] = {}
    densities: dict[str, float] = {}
    for name, parts in layers.items():
        if parts.keys() & {"values", "positions"} != {"values", "positions"}:
            raise ValueError(f"{folder}: {name} has not both of values and positions: is the file whole?")
        flat = _flat_positions(folder, name, files[parts["positions"]], shapes[name])
        positions[f"{name}.weight"], trained[f"{name}.values"] = _unique(flat, files[parts["values"]])
        densities[name] = len(trained[f"{name}.values"]) / math.prod(shapes[name])
    density, density_pattern = _spell(densities)
    return {"density": density, "density_pattern": density_pattern}, trained, positions


def read_peft(folder: Path, model: nn.Module) -> StoredAdapter:
    """Read a PEFT folder for a base model, which may be on the meta device or partitioned.

    Raises: ValueError for a pickle, for what no adapter of ours computes (by name), and for layers the model does not have.
    """
    config = read_json(folder / CONFIG_FILE)
    _check_config(folder, config, model)
    files = _open(folder)
    layers, others = _sort_tensors(files, config["peft_type"])
    linear = linear_layers(model)
    for name in layers:
        if name not in linear:
            raise ValueError(f"{folder}: {name} is no linear layer of this model.{did_you_mean(name, linear)}")
    whole = _whole_modules(folder, files, others, config.get("modules_to_save") or [], model)
    if not layers:
        raise ValueError(f"{folder} holds no adapter: {TENSOR_FILE} has no tensor of {config['peft_type']}")
    low_rank = config["peft_type"] == "LORA" or (config["peft_type"] == "SUPERTUNING" and config.get("r") is not None)
    settings: dict[str, Any] = {}
    trained: dict[str, Tensor] = {}
    positions: dict[str, Tensor] = {}
    if low_rank:
        settings, trained = _low_rank(folder, files, layers, config)
    if config["peft_type"] != "LORA":
        shapes = {name: tuple(stored_shape(linear[name])) for name in layers}
        of_sparse, values, positions = _sparse(folder, files, layers, shapes)  # type: ignore[arg-type]
        settings |= of_sparse
        trained |= values
    trained |= {name: files[key].float() for name, key in whole.items()}
    files.close()
    method: Method = "lora" if not positions else "robust" if low_rank else "sparse"
    all_linear = layers.keys() == find_targets(model, ["all-linear"]).keys()
    targets = ["all-linear"] if all_linear else _spell_names(set(layers), model)
    modules = _spell_names({name.rpartition(".")[0] for name in whole}, model)
    made = AdapterConfig(method=method, target_modules=targets, modules_to_save=modules, **settings)
    base = {"name_or_path": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    if is_classifier(model):
        base["task"] = "classification"
    return StoredAdapter(folder, AdapterDescription(made, 42, base), trained, positions, {})

"""PEFT's folders: read as an adapter of ours (LORA, SUPERTUNING, SHIRA), and written (LORA, SUPERTUNING).

Both compute the same function, to the last rounding; what the other side has nothing for is refused by name. Only safetensors
are read. Formats: peft 0.21, ``tuners/{lora,supertuning,shira}`` and ``utils/save_and_load.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rosa_ds import zero
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.layer import MAX_POSITIONS, AdaptedLinear, stored_shape
from rosa_ds.adapters.stored import AdapterDescription, StoredAdapter
from rosa_ds.adapters.targets import Value, by_pattern, find_targets, linear_layers
from rosa_ds.config.methods import Method
from rosa_ds.config.schema import AdapterConfig, Task
from rosa_ds.models.task import PEFT_TASKS, head_modules, is_classifier, whole_modules
from rosa_ds.utils.files import TensorFiles, write_tensors
from rosa_ds.utils.json_files import read_json
from rosa_ds.utils.suggest import did_you_mean

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."
CONFIG_FILE, TENSOR_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PARTS = {
    "LORA": {".lora_A.weight": "A", ".lora_B.weight": "B"},
    "SUPERTUNING": {
        ".supertuning_lora_A.weight": "A",
        ".supertuning_lora_B.weight": "B",
        ".supertuning_values": "values",
        ".supertuning_indices": "positions",
    },
    "SHIRA": {".shira_weight": "values", ".shira_indices": "positions"},
}
"""What a tensor's name ends with, after its layer's -> which part of an adapted layer it is."""
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


def read_peft(folder: Path, model: nn.Module) -> StoredAdapter:
    """Read a PEFT folder for a base model, which may be on the meta device or partitioned.

    Raises: ValueError for a pickle, for what no adapter of ours computes (by name), and for layers the model does not have.
    """
    config = read_json(folder / CONFIG_FILE)
    _check_config(folder, config, model)
    if not (folder / TENSOR_FILE).is_file() and (folder / PICKLE_FILE).is_file():
        raise ValueError(
            f"{folder / PICKLE_FILE} is a pickle, which can run any code and is not read here: load it with PEFT and save it "
            "again (model.save_pretrained(folder, safe_serialization=True))"
        )
    files = TensorFiles([folder / TENSOR_FILE])
    layers, others = _sort_tensors(files, config["peft_type"])
    linear = linear_layers(model)
    for name in layers:
        if name not in linear:
            raise ValueError(f"{folder}: {name} is no linear layer of this model.{did_you_mean(name, linear)}")
    whole = _saved_modules(folder, files, others, config.get("modules_to_save") or [], model)
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


def _check_config(folder: Path, config: Mapping[str, Any], model: nn.Module) -> None:
    kind, task = config["peft_type"], config.get("task_type")
    own = PEFT_TASKS["classification" if is_classifier(model) else "causal-lm"]
    if kind not in PARTS:
        _refuse(folder, f"peft_type {kind} (known: {', '.join(PARTS)})")
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


def _refuse(folder: Path, what: str, remedy: str = _MERGE) -> NoReturn:
    raise ValueError(f"{folder} has {what}, which no adapter here can be: {remedy}")


def _sort_tensors(files: TensorFiles, kind: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Layer name -> part -> tensor name, and parameter name -> tensor name of everything else."""
    layers: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for key in files:
        name = key.removeprefix(PREFIX)
        ending = next((ending for ending in PARTS[kind] if name.endswith(ending)), None)
        if ending is None:
            others[name] = key
        else:
            layers.setdefault(name.removesuffix(ending), {})[PARTS[kind][ending]] = key
    return layers, others


def _saved_modules(
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


def _unique(positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted positions, each once, with the sum of its values. Shapes: (Z,) each; results (Z',), int32 and float32."""
    unique, inverse = positions.long().unique(return_inverse=True)
    sums = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, inverse, values.double())
    return unique.to(torch.int32), sums.float()


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


class NotInPeftError(ValueError):
    """PEFT has no format for an adapter."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} cannot be written in PEFT's format: {why}")


@dataclasses.dataclass(frozen=True)
class PeftFolder:
    """What is written: ``adapter_config.json``, and the tensors by PEFT's names, float32 (of a float64 model float64).

    ``entries``: weight name -> entries of the layers whose tensors PEFT's number of entries makes longer.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    entries: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """What a folder has to say beside PEFT's files, so that :func:`read_record` gives back what was written."""
        return {"config": _digest(self.config), "entries": self.entries}

    def write(self, folder: Path) -> None:
        write_tensors(folder / TENSOR_FILE, self.tensors, {"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")


def peft_folder(model: nn.Module, stored: StoredAdapter) -> PeftFolder:
    """``lora`` as LORA, ``robust`` and ``sparse`` as SUPERTUNING (with and without its low-rank part).

    ``model`` is injected, and may be on the meta device or partitioned.

    Raises: NotInPeftError for what PEFT has no format for, by name.
    """
    config, layers = stored.description.config, adapted_layers(model)
    if config.parts.everything or config.parts.resampled:
        raise NotInPeftError(f"method {config.method}", "PEFT has no adapter of this kind")
    if config.parts.sparse:
        return _supertuning_folder(model, stored)
    factors = {name: (stored.trained[f"{name}.A"], stored.trained[f"{name}.B"]) for name in layers}
    alphas = {name: by_pattern(name, config.alpha_pattern, config.alpha) for name in layers}
    return lora_folder(model, stored, factors, alphas, config.rank, config.alpha, config.dropout)


def lora_folder(
    model: nn.Module,
    stored: StoredAdapter,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    alphas: Mapping[str, float],
    rank: int,
    alpha: float,
    dropout: float,
) -> PeftFolder:
    """Factors A (R, M) and B (N, R) of the layers as LORA; a rank or alpha that differs from the default becomes a pattern.

    Raises: NotInPeftError as :func:`peft_folder`.
    """
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": {f"^{name}": own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{name}": own for name, own in alphas.items() if own != alpha},
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in adapted_layers(model).values()),
    }
    return _folder(model, stored, "LORA", {name: {"A": A, "B": B} for name, (A, B) in factors.items()}, config)


def _supertuning_folder(model: nn.Module, stored: StoredAdapter) -> PeftFolder:
    """PEFT derives the number of entries from one sparsity; where that gives more than we have, zeros fill them up."""
    config, layers = stored.description.config, adapted_layers(model)
    if any(layer.transposed for layer in layers.values()):
        raise NotInPeftError("a model with Conv1D layers", "SUPERTUNING knows nn.Linear alone")
    for setting in ("rank_pattern", "alpha_pattern", "density_pattern"):
        if getattr(config, setting):
            raise NotInPeftError(f"adapter.{setting}", "SUPERTUNING has one rank, one alpha and one density")
    for name, layer in layers.items():
        if not layer.entries:
            raise NotInPeftError(f"{name}, whose density gives it no entry,", "SUPERTUNING has entries in every layer")
        if layer.weight_name not in stored.positions:
            raise NotInPeftError("an adapter whose mask is not known yet", "its run is before the end of mask.steps")
    sparsity, counts = _sparsity(layers.values())
    parts: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        positions, values = stored.positions[layer.weight_name], stored.trained[f"{name}.values"]
        if missing := counts[name] - layer.entries:
            positions = torch.cat([positions, positions[:1].expand(missing)])
            values = torch.cat([values, values.new_zeros(missing)])
        low_rank = {part: stored.trained[f"{name}.{part}"] for part in ("A", "B") if layer.rank}
        parts[name] = {"positions": positions, "values": values, **low_rank}
    more = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    settings = {
        "sparsity": sparsity,
        "save_precomputed_indices": True,
        **(more if config.parts.low_rank else {"r": None}),
    }
    entries = {layer.weight_name: layer.entries for name, layer in layers.items() if counts[name] != layer.entries}
    return dataclasses.replace(_folder(model, stored, "SUPERTUNING", parts, settings), entries=entries)


def _sparsity(layers: Iterable[AdaptedLinear]) -> tuple[float, dict[str, int]]:
    """The largest sparsity that leaves each layer room for its entries, and the entries that PEFT then wants."""
    layers = list(layers)
    sparsity = 1.0 - max(layer.entries / layer.weight_numel for layer in layers)
    while True:
        counts = {layer.name: int(layer.weight_numel * (1 - sparsity)) for layer in layers}
        if all(counts[layer.name] >= layer.entries for layer in layers):
            return sparsity, counts
        sparsity -= 0.1 / max(layer.weight_numel for layer in layers)


def _folder(
    model: nn.Module,
    stored: StoredAdapter,
    kind: str,
    layers: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
) -> PeftFolder:
    """The parts of the layers by PEFT's names, and the modules that are trained whole."""
    if not layers:
        raise NotInPeftError("an adapter without an adapted layer", f"{kind} has one at least")
    endings = {part: ending for ending, part in PARTS[kind].items()}
    tensors = {f"{name}{endings[part]}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    whole = _trained_whole(model, stored)
    heads = whole_modules(model)
    # PEFT names a classifier's head itself, as a whole
    modules = {next((h for h in heads if name.startswith(f"{h}.")), name.rpartition(".")[0]) for name in whole}
    for module in sorted(modules):
        if left := [own for own in model.get_submodule(module).state_dict() if f"{module}.{own}" not in whole]:
            raise NotInPeftError(f"{module}, whose {left[0]} is not trained,", "PEFT has modules_to_save as a whole")
    task: Task = "classification" if is_classifier(model) else "causal-lm"
    base = stored.description.base
    common = {
        "peft_type": kind,
        # with SEQ_CLS PEFT wants the numbers of a head
        "task_type": PEFT_TASKS[task] if modules.issuperset(head_modules(model)) else None,
        "base_model_name_or_path": base.get("name_or_path"),
        "revision": base.get("revision"),
        "target_modules": list(layers),
        "modules_to_save": sorted(modules) or None,
        "inference_mode": True,
    }
    named = {f"{PREFIX}{name}": tensor for name, tensor in {**tensors, **whole}.items()}
    for name, tensor in named.items():
        if tensor.is_floating_point():
            named[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return PeftFolder({**common, **config}, named)


def _trained_whole(model: nn.Module, stored: StoredAdapter) -> dict[str, Tensor]:
    """Parameters of modules that are trained whole, by name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    layers, found = adapted_layers(model), {}
    for name, tensor in stored.trained.items():
        if name.rpartition(".")[0] not in layers:
            tied = next(group for group in names.values() if name in group)
            if len(tied) > 1:
                why = f"it is tied to {tied[1]}, which PEFT would leave as it was"
                raise NotInPeftError(f"adapter.modules_to_save {name}", why)
            found[name] = tensor
    return found


def read_record(folder: Path, record: Mapping[str, Any]) -> tuple[TensorFiles, TensorFiles]:
    """The trained tensors and the positions of a folder that :class:`PeftFolder` has written, as they were, by our names.

    Raises: ValueError if PEFT's files are missing, damaged, or were written again by another program.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_FILE}, which belongs to its rosa_adapter.json: take it from its run again"
        )
    config = read_json(folder / CONFIG_FILE)
    if _digest(config) != record["config"]:
        raise ValueError(
            f"{folder / CONFIG_FILE} is not the one that its rosa_adapter.json belongs to, was the adapter saved again with PEFT? "
            "Remove rosa_adapter.json to read the folder as PEFT's, or take it from its run again"
        )
    files = TensorFiles([folder / TENSOR_FILE])
    layers, others = _sort_tensors(files, config["peft_type"])
    named = {(layer, part): key for layer, parts in layers.items() for part, key in parts.items()}
    positions = {f"{layer}.weight": key for (layer, part), key in named.items() if part == "positions"}
    trained = {f"{layer}.{part}": key for (layer, part), key in named.items() if part != "positions"} | others
    entries: Mapping[str, int] = record["entries"]
    lengths = {f"{name.removesuffix('.weight')}.values": length for name, length in entries.items()}
    return files.renamed(trained, lengths), files.renamed(positions, entries)


def _digest(config: Mapping[str, Any]) -> str:
    """Of all that says what the tensors mean; where the base is may be changed."""
    said = {key: value for key, value in config.items() if key not in ("base_model_name_or_path", "revision")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

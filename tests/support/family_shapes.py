"""Small models of every family that the installed transformers has: hints name attributes of configs, not families."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from rosa_ds.config.schema import Task
from rosa_ds.models.stream import parameters_on_meta
from rosa_ds.models.task import auto_class

MOST = 4_500_000
"""Parameters of a model that is still small; what the hints do not shrink below it is not built."""
VOCABULARY = 64
_SIZES = {
    32: "hidden_size d_model n_embd word_embed_proj_dim embedding_size hidden_dim dim hidden_size_global d_latents entity_emb_size "
    "router_hidden_size text_hidden_size",
    48: "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head n_heads num_heads "
    "decoder_attention_heads encoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "rotary_dim mamba_n_heads mamba_num_heads time_step_rank mamba_dt_rank linear_num_value_heads index_n_heads linear_num_heads "
    "swa_num_attention_heads num_global_attention_heads indexer_n_heads shape_size indexer_budget",
    2: "encoder_layers num_key_value_heads num_experts_per_tok linear_num_key_heads eos_token_id moe_topk zero_expert_num "
    "swa_num_key_value_heads num_kv_shared_layers num_global_key_value_heads attn_layer_period indexer_compress_ratio "
    "n_layers_per_attn_res_block num_blocks",
    1: "mamba_n_groups n_groups n_group topk_group first_k_dense_replace bos_token_id indexer_kv_heads attn_layer_offset n_shared_experts",
    0: "pad_token_id",
    6: "coordinate_size",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state kv_channels linear_key_head_dim "
    "linear_value_head_dim ssm_state_size linear_head_dim swa_head_dim dim_head global_head_dim hidden_size_per_layer_input "
    "num_latents indexer_head_dim rel_extent",
    16: "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim index_head_dim",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    VOCABULARY: "vocab_size unpadded_vocab_size entity_vocab_size pronunciation_vocab_size shape_vocab_size vocab_size_per_layer_input mamba_d_ssm "
    "encoder_hash_byte_group_vocab",
    128: "max_position_embeddings n_positions",
}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
HINTS: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": 16},
    {"num_experts_per_tok": 1},
    {"hidden_size": 48},
    {"hidden_size_per_layer_input": 0},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    {"layer_types": ["conv", "full_attention"] * 2},
    {"default_language": "en_XX"},
    {"axial_pos_embds": False, "is_decoder": True, "num_hashes": 1},
)
"""Other hints, for those that the first do not fit: latent attention has as many heads of keys as of queries."""
TASKS: dict[Task, Any] = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


class NotBuiltError(Exception):
    """Why there is no small model of a family."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model by its ``model_type``, for a task."""

    task: Task
    name: str

    def __str__(self) -> str:
        return f"{self.name} ({self.task})"


def families(task: Task) -> list[Family]:
    """Every family that the installed transformers has for a task, in its order."""
    return [Family(task, name) for name in dict.fromkeys(TASKS[task])]


def build(family: Family) -> tuple[PreTrainedModel, Any]:
    """A small model with random weights from one seed, float32, in evaluation mode, and its config. Raises: NotBuiltError."""
    errors: list[str] = []
    for fill, made, variant in itertools.product((False, True), (_by_setting, _by_class), VARIANTS):
        try:
            config = made(AutoConfig.for_model(family.name), Hints(variant, fill))
            return _model(family, config), config
        except Exception as error:  # of any kind: sizes that do not fit together, packages that are not there
            errors.append(str(error) if isinstance(error, NotBuiltError) else one_line(error))
    raise NotBuiltError(errors[0])


def _model(family: Family, config: Any) -> PreTrainedModel:
    type(config).from_dict(config.to_dict())  # else its sizes contradict each other, and no file of it can be read
    with parameters_on_meta():
        empty = auto_class(family.task).from_config(copy.deepcopy(config), dtype=torch.float32)
    if (numel := sum(parameter.numel() for parameter in empty.parameters())) > MOST:
        raise NotBuiltError(f"{numel:,} parameters with the hints there are")
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(family.task).from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():  # parameters that begin as zeros would hide what is wrong behind them
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise.to(parameter.dtype), alpha=0.02)
    ids = token_ids(config)
    more = {"use_cache": False} if family.task == "causal-lm" else {}
    with torch.no_grad():
        try:
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits  # noqa: B018
        except Exception as error:
            raise NotBuiltError(f"its forward pass of tokens alone fails: {one_line(error)}") from error
    return model


def token_ids(config: Any, length: int = 9, rows: int = 2) -> Tensor:
    """Random tokens, the same for a length; rows of a model with an encoder end as its texts do."""
    ids = torch.randint(3, VOCABULARY - 2, (rows, length), generator=torch.Generator().manual_seed(length))
    if config.is_encoder_decoder and isinstance(end := config.eos_token_id, int):
        ids[:, -1] = end
    return ids


@dataclasses.dataclass(frozen=True)
class Hints:
    """Small sizes by the names that configs have for them. ``fill``: also where a config has none."""

    variant: Mapping[str, Any]
    fill: bool

    def of(self, present: Mapping[str, Any]) -> dict[str, Any]:
        """Those for what a config has; of the variant those whose name it has."""
        fit = {
            name: size
            for name, size in HINTS.items()
            if name in present and (_is_size(present[name]) or (present[name] is None and (self.fill or size == 0)))
        }
        return fit | {name: value for name, value in self.variant.items() if name in present}


def _present(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """What a config has by some names; some raise errors of their own for what differs from layer to layer."""
    found = {}
    for name in names:
        with contextlib.suppress(Exception):
            found[name] = getattr(config, name)
    return found


def _by_setting(config: Any, hints: Hints) -> Any:
    """The config with small sizes, its parts too; kinds of layers take turns, so that each is there."""
    depth = getattr(config, "num_hidden_layers", None)
    lists = {name: value for name, value in vars(config).items() if _is_list(value) and len(value) == depth}
    kept = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    sizes = hints.of(_present(config, {**HINTS, **hints.variant}))
    for name, size in sizes.items():
        with contextlib.suppress(Exception):  # a config that computes it from others
            setattr(config, name, size)
    if config.is_encoder_decoder and not hasattr(
        config, "decoder_start_token_id"
    ):  # files have it beside the class's names
        config.decoder_start_token_id = 0
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int):
        for name, value in (({"layer_types": kept} if kept else {}) | lists).items():
            with contextlib.suppress(Exception):
                setattr(config, name, _of_length(value, HINTS.get(name), layers))
    for part in getattr(config, "sub_configs", None) or ():
        if getattr(config, part, None) is not None:
            _by_setting(getattr(config, part), hints)
    return config


def _by_class(config: Any, hints: Hints) -> Any:
    """A config of the same class from small sizes, which computes the others from them."""
    return type(config)(**_arguments(config, hints))


def _arguments(config: Any, hints: Hints) -> dict[str, Any]:
    own = _present(config, (field.name for field in dataclasses.fields(config)))
    depth = next((own[name] for name in DEPTHS if isinstance(own.get(name), int)), None)
    found = hints.of(own)
    layers = next((found[name] for name in DEPTHS if name in found), None)
    for name, value in own.items():
        if _is_list(value) and len(value) == depth and layers is not None:
            found[name] = _of_length(value, HINTS.get(name), layers)
    for part in config.sub_configs:
        if own.get(part) is not None:
            found[part] = _arguments(own[part], hints)
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0


def _of_length(values: Sequence[Any], size: Any, length: int) -> list[Any]:
    """One entry a layer: a small size, or the kinds that there are, which take turns."""
    if all(map(_is_size, values)) and size is not None:
        return [size] * length
    kinds = list(dict.fromkeys(values)) if all(isinstance(value, str) for value in values) else list(values)
    return list(itertools.islice(itertools.cycle(kinds), length))


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]

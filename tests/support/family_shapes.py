"""Small models of every family that the installed transformers has: hints name attributes of configs, not families."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from rosa_ds.config.schema import Task
from rosa_ds.models.stream import parameters_on_meta
from rosa_ds.models.task import auto_class

MOST = 3_000_000
"""Parameters of a model that is still small; what the hints do not shrink below it is not built."""
VOCABULARY = 64
_SIZES = {
    32: "hidden_size d_model n_embd word_embed_proj_dim embedding_size hidden_dim dim",
    48: "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head n_heads num_heads "
    "decoder_attention_heads encoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "rotary_dim mamba_n_heads mamba_num_heads time_step_rank mamba_dt_rank linear_num_value_heads index_n_heads",
    2: "encoder_layers num_key_value_heads num_experts_per_tok linear_num_key_heads eos_token_id",
    1: "mamba_n_groups n_groups n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state kv_channels linear_key_head_dim "
    "linear_value_head_dim ssm_state_size",
    16: "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim index_head_dim",
    24: "moe_intermediate_size shared_expert_intermediate_size",
    VOCABULARY: "vocab_size",
    128: "max_position_embeddings n_positions",
}
HINTS = {name: size for size, names in _SIZES.items() for name in names.split()}
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


def build(family: Family) -> PreTrainedModel:
    """A small model with random weights from one seed, float32, in evaluation mode. Raises: NotBuiltError."""
    try:
        config = _shrink(AutoConfig.for_model(family.name))
        type(config).from_dict(config.to_dict())  # else its sizes contradict each other, and no file of it can be read
        with parameters_on_meta():
            numel = sum(
                p.numel() for p in auto_class(family.task).from_config(config, dtype=torch.float32).parameters()
            )
        if numel > MOST:
            raise NotBuiltError(f"{numel:,} parameters with the hints there are")
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class(family.task).from_config(config, dtype=torch.float32)
    except NotBuiltError:
        raise
    except Exception as error:  # of any kind: sizes that do not fit together, packages that are not there
        raise NotBuiltError(one_line(error)) from error
    with torch.no_grad():  # parameters that begin as zeros would hide what is wrong behind them
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise.to(parameter.dtype), alpha=0.02)
    return model.eval()


def _shrink(config: Any) -> Any:
    """The config with small sizes, its parts too; kinds of layers take turns, so that each is there."""
    kept = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    for name, size in HINTS.items():
        present = getattr(config, name, None)
        if (isinstance(present, int) and not isinstance(present, bool)) or (size == 0 and hasattr(config, name)):
            with contextlib.suppress(Exception):  # a config that computes it from others
                setattr(config, name, size)
    if kept and isinstance(getattr(config, "num_hidden_layers", None), int):
        with contextlib.suppress(Exception):
            config.layer_types = list(itertools.islice(itertools.cycle(kept), config.num_hidden_layers))
    for part in getattr(config, "sub_configs", None) or ():
        if getattr(config, part, None) is not None:
            _shrink(getattr(config, part))
    return config


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]

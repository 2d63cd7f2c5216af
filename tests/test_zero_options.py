"""Every option of DeepSpeed's ZeRO section gives the adapter that the run without it gives, or is refused before work.

The options come from DeepSpeed's own schema: one that this file does not know fails here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel
from transformers import LlamaForCausalLM

from launching import ROOT, run
from rosa_ds.config.command_line import CommandLine
from rosa_ds.config.deepspeed_keys import STAGE3_NAMES
from rosa_ds.config.schema import RunConfig
from rosa_ds.training.settle import settle
from rosa_ds.zero.schema import check_by_deepspeed

CHECKS = str(ROOT / "tests" / "support" / "zero_option_ranks.py")
SHARDS, FLAT, ALL, NONE = (3,), (1, 2), (1, 2, 3), ()

# Option -> values that are not its default, and the stages at which it changes what DeepSpeed does. The adapter is the reference's.
SAME: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "contiguous_gradients": ((False,), ALL),
    "reduce_scatter": ((False,), ALL),
    "reduce_bucket_size": ((200, 1), ALL),
    "use_multi_rank_bucket_allreduce": ((False,), FLAT),
    "allgather_partitions": ((False,), FLAT),
    "allgather_bucket_size": ((200, 0), FLAT),
    "overlap_comm": ((True, False), ALL),
    "load_from_fp32_weights": ((False,), FLAT),
    "elastic_checkpoint": ((True,), FLAT),
    "sub_group_size": ((100, 0), SHARDS),
    "cpu_offload_use_pin_memory": ((True,), NONE),
    "stage3_prefetch_bucket_size": ((50, 0), SHARDS),
    "stage3_param_persistence_threshold": ((100, 0, 10**9), SHARDS),
    "stage3_model_persistence_threshold": ((100, 0), SHARDS),
    "stage3_max_live_parameters": ((0, 500), SHARDS),
    "stage3_max_reuse_distance": ((0, 500), SHARDS),
    "stage3_gather_16bit_weights_on_model_save": ((True,), SHARDS),
    "stage3_allgather_sequential": ((True,), SHARDS),
    "stage3_gather_fp16_weights_on_model_save": ((True,), NONE),
    "ignore_unused_parameters": ((False,), FLAT),
    "round_robin_gradients": ((True,), FLAT),
    "parameter_alignment": ((True,), FLAT),
    "memory_efficient_linear": ((False,), SHARDS),
    "pipeline_loading_checkpoint": ((True,), SHARDS),
    "override_module_apply": ((False,), SHARDS),
    "log_trace_cache_warnings": ((True,), SHARDS),
    "enable_sanity_checks": ((True,), SHARDS),
    "save_muon_momentum_buffer_in_memory": ((True,), SHARDS),
    "leaf_module": (({"classes": ["LlamaRMSNorm"], "name_suffixes": ["k_proj"]},), SHARDS),
    "offload_param.device": (("cpu",), SHARDS),
    "offload_param.pin_memory": ((False,), SHARDS),
    "offload_param.buffer_count": ((2,), NONE),
    "offload_param.buffer_size": ((100,), NONE),
    "offload_param.max_in_cpu": ((10,), NONE),
    "offload_param.nvme_path": (("/tmp",), NONE),
    "offload_optimizer.device": (("cpu",), SHARDS),
    "offload_optimizer.pin_memory": ((False,), SHARDS),
    "offload_optimizer.buffer_count": ((2,), NONE),
    "offload_optimizer.nvme_path": (("/tmp",), NONE),
    "offload_optimizer.pipeline_read": ((True,), SHARDS),
    "offload_optimizer.pipeline_write": ((True,), SHARDS),
    "offload_optimizer.fast_init": ((True,), SHARDS),
    "offload_optimizer.cpuadam_cores_perc": ((0.5,), NONE),
}

# Option -> a value that is refused, and what the message says. With the option inside of a section, that section is given.
REFUSED: dict[str, tuple[Any, str]] = {
    "stage": (4, "zero_optimization.stage 4: supported are"),
    "cpu_offload": (True, "cpu_offload True is not supported: remove it"),
    "cpu_offload_param": (True, "cpu_offload_param True is not supported: remove it"),
    "compute_grad_norm": (False, "compute_grad_norm False is not supported; a step whose gradients are not finite"),
    "legacy_stage1": (True, "legacy_stage1 True is not supported; DeepSpeed has given it up: remove it"),
    "zenflow": ({}, "zenflow {} is not supported: remove it"),
    "stage3_module_granularity_threshold": (
        3000,
        "stage3_module_granularity_threshold 3000 is not .* fail in backward",
    ),
    "stage3_use_all_reduce_for_fetch_params": (True, "fetch_params True is not supported; .* positions are integers"),
    "zero_hpz_partition_size": (2, "zero_hpz_partition_size 2 is not supported: remove it"),
    "zero_quantized_weights": (True, "zero_quantized_weights True is not supported: remove it"),
    "zero_quantized_nontrainable_weights": (True, "quantized_nontrainable_weights True is not supported: remove it"),
    "zero_quantized_gradients": (True, "zero_quantized_gradients True is not supported: remove it"),
    "offload_optimizer.ratio": (0.5, "zero_optimization.offload_optimizer.ratio 0.5 is not supported: remove it"),
    "offload_optimizer.super_offload": (True, "offload_optimizer.super_offload True is not supported: remove it"),
}
REFUSED_VALUES = [
    ({"stage": 2, "allgather_bucket_size": 201}, "allgather_bucket_size 201: DeepSpeed takes even numbers only"),
    ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param to 'nvme' at stage 3: only stage 3 offloads"),
    ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer to 'cpu' at stage 1: only stage 3"),
    ({"stage": 2, "leaf_module": {"classes": ["LlamaMLP"]}}, "leaf_module at stage 2: only stage 3 gathers modules"),
    ({"stage": 3, "leaf_module": True}, "zero_optimization.leaf_module of the DeepSpeed file is a section such as"),
    ({"stage": 3, "leaf_module": {"class": "LlamaMLP"}}, "leaf_module.class of the DeepSpeed file: extra inputs"),
    (
        {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2},
        "has prefetch_bucket_size and stage3_prefetch_bucket_size, which are one option: remove one",
    ),
    ({"stage": 3, "use_all_reduce_for_fetch_params": True}, "stage3_use_all_reduce_for_fetch_params True is not"),
]


def options(schema: type[BaseModel] = DeepSpeedZeroConfig, path: str = "") -> Iterator[str]:
    """What a file can say, by the names of the documentation; sections that are refused whole are one option."""
    for name, field in schema.model_fields.items():
        full = f"{path}{field.alias or name}"
        sections = [
            kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if sections and full not in REFUSED:
            yield from options(sections[0], f"{full}.")
        else:
            yield full


def section(stage: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A ZeRO section with these options; what is inside of a section gives its device, too."""
    result: dict[str, Any] = {"stage": stage}
    for name, value in chosen.items():
        outer, _, inner = name.partition(".")
        if inner:
            result.setdefault(outer, {"device": "cpu"} if stage == 3 else {})[inner] = value
        else:
            result[name] = value
    return result


def levels(stage: int) -> dict[str, tuple[Any, ...]]:
    """The options that change something at a stage, with their values."""
    return {name: values for name, (values, stages) in SAME.items() if stage in stages}


def covering(names: list[str]) -> list[set[str]]:
    """Few sets in which every two names meet, and each comes without the other.

    All of them; and for each binary digit of their numbers those that have it and those that do not, since two numbers
    differ in some digit.
    """
    sets = [{name for number, name in enumerate(names) if number >> bit & 1} for bit in range(len(names).bit_length())]
    return [set(names), *sets, *(set(names) - some for some in sets)]


def together(stage: int) -> Iterator[dict[str, Any]]:
    """Sections in which every two options meet, and each comes without the other, with their first values."""
    first = {name: values[0] for name, values in levels(stage).items()}
    yield from ({name: first[name] for name in first if name in some} for some in covering(list(first)))


def single(stage: int) -> Iterator[dict[str, Any]]:
    yield from ({name: values[0]} for name, values in levels(stage).items())


def pairs(stage: int) -> Iterator[dict[str, Any]]:
    for (one, its), (other, others) in itertools.combinations(levels(stage).items(), 2):
        yield from ({one: a, other: b} for a, b in itertools.product(its, others))


@pytest.fixture
def base(tmp_path: Path, llama: LlamaForCausalLM) -> Path:
    llama.float().save_pretrained(tmp_path / "llama")
    return tmp_path


def wrong(folder: Path, wanted: Iterable[tuple[int, dict[str, Any]]], dtype: str = "float32") -> dict[str, Any]:
    """What two ranks train with each of these options, where it is not bit for bit what they train without."""
    cases = {f"stage {stage} {chosen}": {"zero": section(stage, chosen), "dtype": dtype} for stage, chosen in wanted}
    return {name: what for name, what in outcomes(folder, cases).items() if what != {"apart": [0.0, 0.0]}}


def outcomes(folder: Path, cases: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What ``zero_option_ranks.py`` says of each case on two ranks."""
    (folder / "cases.json").write_text(json.dumps(cases))
    run("fork", 2, CHECKS, str(folder), str(folder / "cases.json"), str(folder / "out.json"), cwd=folder, timeout=3000)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert found.keys() == cases.keys()
    return found


def test_every_option_of_deepspeed_is_known() -> None:
    assert sorted(options()) == sorted([*SAME, *REFUSED])
    aliases = {name for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias == f"stage3_{name}"}
    assert aliases == {name for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}
    assert aliases == set(STAGE3_NAMES)


def test_values_are_no_defaults() -> None:
    default = DeepSpeedZeroConfig(stage=2).model_dump(by_alias=True)
    for name, (values, stages) in SAME.items():
        if "." not in name and name != "overlap_comm":  # whose default is the stage's
            assert default[name] not in values or not stages, name


def refused(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        settle(CommandLine(RunConfig(), {"zero_optimization": zero}, None), 2, False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_before_work(name: str, stage: int) -> None:
    value, message = REFUSED[name]
    refused(section(stage, {name: value}), message)


@pytest.mark.parametrize(("zero", "message"), REFUSED_VALUES)
def test_values_that_are_refused_before_work(zero: dict[str, Any], message: str) -> None:
    refused(zero, message)


def test_what_deepspeed_says_of_options_together_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^zero_optimization of the DeepSpeed file: value error, .*stage 1 or 2\. "):
        check_by_deepspeed({"zero_optimization": {"stage": 3, "compute_grad_norm": False}})


@pytest.mark.parametrize("name", STAGE3_NAMES)
def test_both_names_of_an_option_are_one(name: str) -> None:
    plan, _ = settle(CommandLine(RunConfig(), {"zero_optimization": {"stage": 3, name: 0}}, None), 2, False)
    assert plan.config["zero_optimization"] == {"stage": 3, f"stage3_{name}": 0}


def test_every_two_options_meet() -> None:
    names = list("abcdefghijklm")
    sets = covering(names)
    for one, other in itertools.permutations(names, 2):
        assert any(one in some and other in some for some in sets)
        assert any(one in some and other not in some for some in sets)
    assert len(sets) == 9


@pytest.mark.ranks
def test_options_and_pairs_of_them_train_the_same_adapter(base: Path) -> None:
    """Each option alone, and sections in which every two of them meet."""
    chosen = [(stage, some) for stage in ALL for some in (*single(stage), *together(stage))]
    assert not wrong(base, chosen)


LEAVES = [
    ({"classes": ["LlamaMLP"]}, ["q_proj", "o_proj"], ""),
    ({"names": ["model.layers.0.self_attn"]}, ["up_proj", "1.self_attn.q_proj"], ""),
    ({"name_suffixes": ["layers.1"]}, ["0.self_attn.q_proj", "0.mlp.up_proj"], ""),
    ({"classes": ["MixtralSparseMoeBlock"]}, ["q_proj"], ""),  # this model has none
    (
        {"classes": ["LlamaAttention"]},
        ["q_proj"],
        "has model.layers.0.self_attn gathered as one, and model.layers.0.self_attn",
    ),
]


@pytest.mark.ranks
def test_modules_that_are_gathered_as_one(base: Path) -> None:
    """They train what they train apart, or are refused where something inside of them is trained."""
    cases = {
        str(number): {"dtype": "float32", "zero": {"stage": 3, "leaf_module": leaf}, "targets": targets}
        for number, (leaf, targets, _) in enumerate(LEAVES)
    }
    found = outcomes(base, cases)
    for (leaf, _, message), what in zip(LEAVES, found.values(), strict=True):
        if message:
            assert message in what["refused"]
        else:
            assert max(what["apart"]) < 1e-7, leaf  # a whole block's gradients are summed in another order


@pytest.mark.ranks
@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_options_at_all_stages(base: Path, dtype: str) -> None:
    unused = ({name: value} for name, (values, _) in SAME.items() for value in values)
    shards = {"leaf_module", *(name for name in SAME if "." in name)}  # refused at other stages
    apart = [(stage, some) for some in unused for stage in (0, *ALL) if stage == 3 or not shards & some.keys()]
    assert not wrong(base, apart, dtype)


@pytest.mark.ranks
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", ALL)
def test_all_pairs(base: Path, stage: int) -> None:
    assert not wrong(base, ((stage, some) for some in pairs(stage)))

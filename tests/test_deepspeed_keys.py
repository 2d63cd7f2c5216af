"""What becomes of each key of a DeepSpeed file; the keys are those that DeepSpeed itself asks for."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.config import ADAM_W_MODE, TORCH_ADAM_PARAM, DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from transformers import LlamaForCausalLM

from rosa_ds.config.command_line import CommandLine, build_config
from rosa_ds.config.deepspeed import DeepSpeedPlan, plan_deepspeed
from rosa_ds.config.deepspeed_keys import EFFECT, KNOWN, REFUSED, WITHOUT_EFFECT, ZERO_OPTIONS
from rosa_ds.config.deepspeed_sections import SECTIONS
from rosa_ds.config.schema import RunConfig
from rosa_ds.training.settle import settle
from test_zero_options import outcomes


class Asked(dict[str, Any]):
    """Remembers the keys that it is asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.keys_asked: set[str] = set()

    def _note(self, method: Callable[..., Any], key: str, *default: Any) -> Any:
        self.keys_asked.add(key)
        return method(key, *default)

    def __getitem__(self, key: str) -> Any:
        return self._note(super().__getitem__, key)

    def __contains__(self, key: object) -> bool:
        return bool(self._note(super().__contains__, str(key)))

    def get(self, key: str, default: Any = None) -> Any:
        return self._note(super().get, key, default)

    def keys(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Asked:
        return self


def plan(**config: Any) -> DeepSpeedPlan:
    return plan_deepspeed({"train_batch_size": 4, **config}, build_config({}), 1, gpu_has_bfloat16=False)[0]


def test_every_key_that_deepspeed_asks_for_has_its_fate() -> None:
    config = Asked({"train_batch_size": 1, "zero_optimization": {"stage": 2}})
    DeepSpeedConfig(config)
    assert len(config.keys_asked) > 40
    assert config.keys_asked <= KNOWN
    assert not EFFECT & REFUSED.keys()
    assert not (EFFECT | REFUSED.keys()) & WITHOUT_EFFECT.keys()


SCHEMAS: dict[str, type[DeepSpeedConfigModel]] = {
    "bf16": DeepSpeedBF16Config,
    "compile": CompileConfig,
    "comms_logger": CommsLoggerConfig,
    "fp16": DeepSpeedFP16Config,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
"""Sections that DeepSpeed reads with a schema; it asks the others for their keys."""
ARGUMENTS = {
    "optimizer.params": (FusedAdam, DeepSpeedCPUAdam),
    "scheduler.params": (WarmupLR, WarmupDecayLR, WarmupCosineLR),
}
"""And what it hands on to a class."""


def keys_of_sections() -> dict[str, set[str]]:
    """What the installed DeepSpeed reads in each section that is not refused or without effect as a whole."""
    found = {path: set(schema.model_fields) for path, schema in SCHEMAS.items()}
    for path, kinds in ARGUMENTS.items():
        names = [name for kind in kinds for name in inspect.signature(kind.__init__).parameters]
        found[path] = set(names) - {"self", "model_params", "params", "optimizer"}
    found["compile"] |= {"enabled", "backend"}  # of its older versions
    found["optimizer.params"] -= {"adamw_mode"}  # the engine's own argument, from adam_w_mode
    found["optimizer.params"] |= {ADAM_W_MODE, TORCH_ADAM_PARAM}  # which it takes out
    for name in EFFECT - SCHEMAS.keys() - {"zero_optimization"}:
        section = Asked({"type": "AdamW"})
        with contextlib.suppress(Exception):  # where no section is wanted
            DeepSpeedConfig({"train_batch_size": 1, name: section})
        if section.keys_asked:
            found[name] = section.keys_asked
    return found


def test_every_key_inside_of_a_section_has_its_fate() -> None:
    found = keys_of_sections()
    assert found.keys() == SECTIONS.keys()
    for path, keys in SECTIONS.items():
        assert found[path] == keys.known, path
        assert len(keys.known) == len(keys.effect) + len(keys.refused) + len(keys.without_effect), path


def test_every_schema_of_deepspeed_is_known() -> None:
    """A section that DeepSpeed begins to read with a schema is seen here."""
    read = {type(value) for value in vars(DeepSpeedConfig({"train_batch_size": 1})).values()} | {CommsLoggerConfig}
    models = {kind.__name__ for kind in read if issubclass(kind, DeepSpeedConfigModel)}
    one_fate = {"DeepSpeedMonitorConfig", "HybridEngineConfig", "TPTrainingConfig"}
    assert models == one_fate | {kind.__name__ for kind in [*SCHEMAS.values(), DeepSpeedZeroConfig]}


REFUSED_INSIDE = [(path, key) for path, section in SECTIONS.items() for key in section.refused]
TOLD_INSIDE = [(path, key) for path, section in SECTIONS.items() for key in section.without_effect]


def inside(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """A file with this content at a path."""
    kinds = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    outer, _, inner = path.partition(".")
    return {outer: {**kinds.get(outer, {}), **({inner: content} if inner else content)}}


@pytest.mark.parametrize(("path", "key"), REFUSED_INSIDE)
def test_a_refused_key_inside_of_a_section_is_told(path: str, key: str) -> None:
    harmless, _ = SECTIONS[path].refused[key]
    other = "fp32" if harmless in (None, "auto") else not harmless
    with pytest.raises(ValueError, match=f"^{path}.{key} of the DeepSpeed file: {other!r} is not supported here .*"):
        plan(**inside(path, {key: other}))
    if harmless is not None:
        plan(**inside(path, {key: harmless}))


@pytest.mark.parametrize(("path", "key"), TOLD_INSIDE)
def test_a_key_inside_of_a_section_without_effect_is_told(
    path: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    value = 3 if key == "number_checkpoints" else True
    plan(**inside(path, {key: value}))
    assert f"setting without effect: {path}.{key} of the DeepSpeed file" in caplog.text
    caplog.clear()
    plan(**inside(path, {key: None}))
    assert not caplog.text


@pytest.mark.parametrize("path", SECTIONS)
def test_a_key_that_no_section_has_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"^{path}.enabledd of the DeepSpeed file is not known: {path} has"):
        plan(**inside(path, {"enabledd": True}))
    plan(**inside(path, {"_comment": "mine"}))


BAD = [
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype of the DeepSpeed file is fp32 for float32 at"),
    ({"gradient_allreduce_op": "avg"}, "gradient_allreduce_op of the DeepSpeed file is mean or sum at stage 2"),
    (
        {"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}},
        "gradient_allreduce_op of the DeepSpeed file is mean at stage 3, given 'sum'",
    ),
    ({"gradient_predivide_factor": 2.0}, "factor 2.0 at stage 2: DeepSpeed needs zero_optimization.reduce_scatter"),
    ({"gradient_predivide_factor": "two"}, "gradient_predivide_factor of the DeepSpeed file is a number"),
    ({"communication_data_type": "int8"}, "DeepSpeed refuses its file: Invalid communication_data_type"),
    ({"timers": {"throughput": {"enabled": "maybe"}}}, "DeepSpeed refuses its file: .*enabled"),
    ({"comms_logger": {"enabled": True, "prof_ops": 3}}, "DeepSpeed refuses its file: .*prof_ops"),
    ({"activation_checkpointing": {"profile": "yes"}}, "activation_checkpointing.profile of .* is true or false"),
    ({"activation_checkpointing": True}, "activation_checkpointing of the DeepSpeed file is a section"),
]


@pytest.mark.parametrize(("config", "message"), BAD)
def test_what_deepspeed_would_fail_with_is_one_line_before_work(config: dict[str, Any], message: str) -> None:
    config = {"zero_optimization": {"stage": 2}, **config}
    with pytest.raises(ValueError, match=message) as error:
        settle(CommandLine(RunConfig(), config, None), 2, False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "given", "wanted"),
    [
        ({"cpu_checkpointing": True, "partition_activations": True}, {}, "host"),
        ({"partition_activations": True}, {}, True),
        ({"partition_activations": True}, {"gradient_checkpointing": "reentrant"}, "reentrant"),
        ({"cpu_checkpointing": False, "number_checkpoints": None}, {}, False),
    ],
)
def test_checkpointing_of_activations_becomes_a_setting(section: Any, given: Any, wanted: Any) -> None:
    config = {"train_batch_size": 4, "activation_checkpointing": section}
    settings = plan_deepspeed(config, RunConfig(training=given), 1, gpu_has_bfloat16=False)[1]
    assert settings.training.gradient_checkpointing == wanted


def test_checkpointing_that_is_asked_for_and_forbidden_is_refused() -> None:
    config = {"train_batch_size": 4, "activation_checkpointing": {"cpu_checkpointing": True}}
    with pytest.raises(ValueError, match=r"says 'host', training.gradient_checkpointing False: remove one of the two"):
        plan_deepspeed(config, RunConfig(training={"gradient_checkpointing": False}), 1, gpu_has_bfloat16=False)


# Sections and a type that train what the run without them trains, on two ranks; with float16 a GPU is needed
EQUAL: list[tuple[str, int, dict[str, Any]]] = [
    *(("bfloat16", stage, {"bf16": {"immediate_grad_update": True}}) for stage in (1, 2)),
    *(("bfloat16", stage, {"data_types": {"grad_accum_dtype": "bf16"}}) for stage in (0, 1, 2, 3)),
    ("bfloat16", 1, {"data_types": {"grad_accum_dtype": "fp32"}}),
    *(
        ("float32", stage, more)
        for stage in (2, 3)
        for more in (
            {"comms_logger": {"enabled": True, "verbose": True, "debug": True, "prof_ops": ["all_reduce"]}},
            {"flops_profiler": {"enabled": True, "profile_step": 1, "output_file": "flops.txt"}},
            {"timers": {"throughput": {"enabled": False, "synchronized": False}}},
            {"wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True},
            {"communication_data_type": "fp32", "disable_python_gc": True, "log_level": "error"},
        )
    ),
]


@pytest.mark.ranks
def test_sections_that_say_and_measure_change_nothing(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    llama.float().save_pretrained(tmp_path / "llama")
    cases = {
        f"{dtype} {stage} {more}": {"dtype": dtype, "zero": {"stage": stage}, "more": more}
        for dtype, stage, more in EQUAL
    }
    found = outcomes(tmp_path, cases)
    assert not {name: what for name, what in found.items() if what != {"apart": [0.0, 0.0]}}
    assert "flops" in (tmp_path / "flops.txt").read_text()


def compiled(backend: str) -> dict[str, Any]:
    """A compiled model of each stage and type on two ranks."""
    more = {"compile": {"enabled": True, "backend": backend}}
    kinds = [("float32", 0), ("float32", 1), ("float32", 2), ("bfloat16", 2)]
    return {f"{dtype} {stage}": {"dtype": dtype, "zero": {"stage": stage}, "more": more} for dtype, stage in kinds}


@pytest.mark.nightly
@pytest.mark.ranks
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_trains_the_same_adapter(tmp_path: Path, llama: LlamaForCausalLM, backend: str) -> None:
    llama.float().save_pretrained(tmp_path / "llama")
    found = outcomes(tmp_path, compiled(backend))
    for name, what in found.items():
        # inductor rounds less often to bfloat16, and Adam makes a step of every difference: the learning rate is 1e-2
        assert max(what["apart"]) < (1e-2 if name.startswith("bfloat16") else 1e-6), found


def test_the_options_of_zero_are_deepspeeds() -> None:
    fields = DeepSpeedZeroConfig.model_fields.items()
    assert {*(name for name, _ in fields), *(str(field.alias) for _, field in fields if field.alias)} == ZERO_OPTIONS


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_refused_key_is_told_and_one_that_is_off_is_dropped(key: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=f"'{key}' of the DeepSpeed file is not supported here"):
        plan(**{key: {"enabled": True}})
    for off in ({"enabled": False}, False, {}, None):
        assert key not in plan(**{key: off}).config
    assert "without effect" not in caplog.text


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_a_key_without_effect_is_told(key: str, caplog: pytest.LogCaptureFixture) -> None:
    assert key not in plan(**{key: {"enabled": False}}).config
    assert "without effect" not in caplog.text
    assert key not in plan(**{key: {"enabled": True}}).config
    assert f"setting without effect: {key} of the DeepSpeed file" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stage": 3}, "'stage' of the DeepSpeed file belongs into its section zero_optimization"),
        ({"overlap_comm": True}, "'overlap_comm' of the DeepSpeed file belongs into"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping' .*Did you mean gradient_clipping"),
        ({"adapter": {}}, "'adapter' in the DeepSpeed file is a setting of ours"),
    ],
    ids=["stage", "overlap", "misspelt", "ours"],
)
def test_keys_at_the_wrong_place_or_of_other_ways(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**config)


def test_a_key_that_nobody_knows_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert "zzz_notes" not in plan(zzz_notes=1, _comment="mine").config
    assert "setting without effect: zzz_notes of the DeepSpeed file (DeepSpeed knows no such key)" in caplog.text
    assert "_comment" not in caplog.text

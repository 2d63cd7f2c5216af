"""What becomes of each key of a DeepSpeed file; the keys are those that DeepSpeed itself asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from rosa_ds.config.command_line import build_config
from rosa_ds.config.deepspeed import DeepSpeedPlan, plan_deepspeed
from rosa_ds.config.deepspeed_keys import EFFECT, KNOWN, REFUSED, WITHOUT_EFFECT, ZERO_OPTIONS


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
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "masters are float32.: remove it"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states .* is not supported"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "fp16.fp16_master_weights_and_grads .* is not supported"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal .*--resume goes on with any number"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping' .*Did you mean gradient_clipping"),
        ({"adapter": {}}, "'adapter' in the DeepSpeed file is a setting of ours"),
    ],
    ids=["stage", "overlap", "masters", "moments", "fp16", "universal", "misspelt", "ours"],
)
def test_keys_at_the_wrong_place_or_of_other_ways(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**config)


def test_a_key_that_nobody_knows_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert "zzz_notes" not in plan(zzz_notes=1, _comment="mine").config
    assert "setting without effect: zzz_notes of the DeepSpeed file (DeepSpeed knows no such key)" in caplog.text
    assert "_comment" not in caplog.text

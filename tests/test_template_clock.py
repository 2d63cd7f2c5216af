"""A chat template that writes the date: a run trains one, and goes on with it on another day; who asks writes that of the day."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from launching import SMALL, TRAIN, losses, run
from rosa_ds.checkpoints.checkpoint import Checkpoint, Identity
from rosa_ds.checkpoints.resume import check_resumable
from rosa_ds.config.schema import DataSettings, ModelSettings, RunConfig
from rosa_ds.data.chat import choose_template
from rosa_ds.data.clock import reads_clock, stop_clock
from rosa_ds.data.prepare import prepare
from rosa_ds.data.turn_end import end_of_turn
from rosa_ds.evaluation.causal_lm import load_questions
from rosa_ds.models.load import load_tokenizer
from rosa_ds.training.task import settle_clock
from scripted import CHATML, byte_tokenizer

DATED = "{%- if strftime_now is defined %}{{- 'Today: ' + strftime_now('%-d %B %Y') + '\n' }}{% endif %}" + CHATML
TO_THE_SECOND = DATED.replace("%Y", "%Y %H:%M:%S")
CHAT = [{"role": "user", "content": "2+3?"}]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2+3?", "completion": "5"}\n')
    return str(path)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("strftime_now('%-d %B %Y')", "2 January 2026"),
        ("strftime_now(format='%Y-%m-%d %H:%M:%S')", "2026-01-02 03:04:05"),
        ("strftime_now('100%% on %A')", "100% on Friday"),
        ("strftime_now('%' ~ '%d %d') ~ '%d'", "%d 02%d"),
        ("strftime_now('%5Y|%^a')", "02026|FRI"),
    ],
)
def test_the_clock_stands(expression: str, text: str) -> None:
    template = "{%if true %}{% macro day() %}{{ " + expression + " }}{% endmacro %}{{ day() }}\n{%endif%}" + CHATML
    tokenizer = byte_tokenizer(template)
    stopped = stop_clock(tokenizer, "2026-01-02T03:04:05")
    shown = [each.apply_chat_template(CHAT, tokenize=False) for each in (stopped, byte_tokenizer(CHATML))]
    assert shown[0] == f"{text}\n{shown[1]}"
    assert tokenizer.chat_template == template
    assert reads_clock(tokenizer)
    assert not reads_clock(stopped)
    assert stop_clock(stopped, None) is stopped
    assert end_of_turn(stopped) == end_of_turn(byte_tokenizer(CHATML))


def test_the_clock_of_today() -> None:
    before = datetime.now().strftime("%-d %B %Y")
    text = stop_clock(byte_tokenizer(DATED), None).apply_chat_template(CHAT, tokenize=False)
    assert text.split("\n")[0] in {f"Today: {day}" for day in (before, datetime.now().strftime("%-d %B %Y"))}


def test_a_template_without_a_clock_is_left_alone() -> None:
    named = byte_tokenizer()
    named.chat_template = {"a": CHATML, "b": DATED}
    stopped = stop_clock(named, "2026-01-02").chat_template
    assert isinstance(stopped, dict)
    assert stopped["a"] == CHATML
    assert stopped["b"] != DATED
    for template in (None, CHATML):
        tokenizer = byte_tokenizer(template)
        assert stop_clock(tokenizer, "2026-01-02") is tokenizer


def test_another_day_is_other_data(rows: str) -> None:
    """Tokens of yesterday are not found for a run of today; those of an hour ago are, if the template shows none."""
    tokenizer = byte_tokenizer(DATED)
    days = ("2026-01-02T03:04:05", "2026-01-02T23:00:00", "2026-01-03T03:04:05")
    made = [prepare(rows, "train", tokenizer, DataSettings(template_clock=day)) for day in days]
    assert [data.sample(tokenizer).split("\n")[1] for data in made] == [
        "Today: 2 January 2026",
        "Today: 2 January 2026",
        "Today: 3 January 2026",
    ]
    assert made[0].data.cache_files == made[1].data.cache_files != made[2].data.cache_files
    asked = load_questions(rows, tokenizer, DataSettings(template_clock=days[2]))[0].prompt
    assert made[2].tokens(0).ids[: len(asked)] == asked


def test_one_moment_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    dated, plain = byte_tokenizer(DATED), byte_tokenizer(CHATML)
    assert settle_clock(RunConfig(), plain, None).data.template_clock is None
    with caplog.at_level(logging.INFO):
        settled = settle_clock(RunConfig(), dated, None)
    assert settled.data.template_clock is not None
    assert abs((datetime.fromisoformat(settled.data.template_clock) - datetime.now()).total_seconds()) < 60
    assert f"{settled.data.template_clock} is trained" in caplog.text
    given = RunConfig(data=DataSettings(template_clock="2026-11-30"))
    assert settle_clock(given, dated, None).data.template_clock == "2026-11-30T00:00:00"
    assert settle_clock(RunConfig(), dated, checkpoint(given)).data.template_clock == "2026-11-30T00:00:00"
    assert settle_clock(settled, dated, checkpoint(given)) == settled


def checkpoint(settings: RunConfig, data: str = "") -> Checkpoint:
    parts: dict[str, dict[str, object]] = {name: {} for name in ("trained", "moments", "positions", "collected")}
    more = {"base_changes": {}, "optimizer_scalars": {}, "loss_scaler": {}, "base": {"hash": ""}, "data": data}
    counts = {"collected_steps": 0, "trained_tokens": 0, "batch_size": 1, "evaluation_due": False}
    return Checkpoint(step=1, phase="train", config=settings.model_dump(), **parts, **more, **counts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        (None, None, "give the same data$"),
        (None, "2026-11-30", "give the same data; their .* has not kept which: give it as data.template_clock$"),
        ("2026-11-29", "2026-11-30", "and leave data.template_clock as it was, 2026-11-29T00:00:00$"),
    ],
)
def test_what_is_said_of_another_date(saved: str | None, now: str | None, message: str) -> None:
    before, after = (RunConfig(data=DataSettings(template_clock=clock)) for clock in (saved, now))
    identity = Identity(after.model_dump(), 1, {"hash": ""}, "digest")
    check_resumable(checkpoint(before, "digest"), identity)
    with pytest.raises(ValueError, match=message):
        check_resumable(checkpoint(before, "another"), identity)


def test_wrong_settings() -> None:
    with pytest.raises(ValidationError, match="as 2026-11-30 or 2026-11-30T09:00:00, given 'yesterday'"):
        DataSettings(template_clock="yesterday")
    with pytest.raises(ValueError, match="no chat template here reads the clock"):
        load_tokenizer(ModelSettings(), DataSettings(template_clock="2026-11-30"))
    choose_template(byte_tokenizer(DATED), DataSettings(template_clock="2026-11-30"))


@pytest.mark.parametrize("drawn", ["{{ ['a', 'b'] | random }}", "{{ lipsum(n=1) }}"])
def test_a_template_that_draws_at_random(drawn: str, rows: str) -> None:
    with pytest.raises(ValueError, match="the chat template draws at random"):
        prepare(rows, "train", byte_tokenizer(drawn + CHATML), DataSettings())


@pytest.mark.ranks
def test_a_run_goes_on_with_its_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second later, with a template that shows seconds, and nothing in the cache."""
    (tmp_path / "dated.jinja").write_text(TO_THE_SECOND.replace("<im_start>", "<s>").replace("<im_end>", "</s>"))
    arguments = (*SMALL, "--method", "lora", "--data.chat_template", "dated.jinja", "--ds.train_batch_size", "8")
    arguments += ("--training.save_steps", "2", "--training.max_steps", "4", "--training.keep_checkpoints", "9")
    folder = tmp_path / "runs" / "default"
    for cache, more in (("one", ()), ("two", ("--resume", "runs/default/checkpoints/step-000002"))):
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / cache))
        output = run("python", 1, TRAIN, *arguments, *more, cwd=tmp_path)
        clock = json.loads((folder / "config.json").read_text())["data"]["template_clock"]
        assert f"{clock} is trained" in output
        if cache == "one":
            begun, whole = clock, losses(folder)
    assert clock == begun
    assert losses(folder) == whole

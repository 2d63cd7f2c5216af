"""Which phase, batch and learning rate each step has."""

from __future__ import annotations

import logging

import pytest

from rosa_ds.config.schema import RunConfig
from rosa_ds.training.schedule import Schedule, lr_factor
from rosa_ds.training.settle import build_schedule


def make(**changes: object) -> Schedule:
    settings = {
        "train_steps": 6,
        "mask_warmup": 2,
        "mask_steps": 2,
        "restart": True,
        "lr_warmup": 2,
        "lr_kind": "linear",
    }
    return Schedule(**(settings | changes))  # type: ignore[arg-type]


def test_restart_begins_data_and_rates_again() -> None:
    schedule = make()
    steps = [schedule.at(number) for number in range(schedule.total_steps)]
    assert [step.phase for step in steps] == ["warmup"] * 2 + ["collect"] * 2 + ["train"] * 6
    assert [step.data_step for step in steps] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert [step.lr_factor for step in steps[:4]] == [step.lr_factor for step in steps[4:8]]
    assert [step.number for step in steps if step.mask_after] == [3]
    assert [step.number for step in steps if step.restart_after] == [3]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("train_steps", [1, 3, 20, 44, 200])
@pytest.mark.parametrize("restart", [True, False])
def test_rates_stay_between_0_and_1(kind: str, train_steps: int, restart: bool) -> None:
    before = 64 if restart or train_steps > 65 else 0
    schedule = make(
        train_steps=train_steps, mask_warmup=before, mask_steps=1 if before else 0, restart=restart, lr_kind=kind
    )
    factors = [schedule.at(number).lr_factor for number in range(schedule.total_steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_continue_goes_on() -> None:
    schedule = make(restart=False)
    steps = [schedule.at(number) for number in range(schedule.total_steps)]
    assert [step.phase for step in steps] == ["warmup"] * 2 + ["collect"] * 2 + ["train"] * 2
    assert [step.data_step for step in steps] == list(range(6))
    assert [step.number for step in steps if step.mask_after] == [3]
    assert not any(step.restart_after for step in steps)


def test_without_a_mask_to_compute() -> None:
    schedule = make(mask_warmup=0, mask_steps=0)
    assert schedule.total_steps == 6
    assert {schedule.at(number).phase for number in range(6)} == {"train"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0.25]), ("cosine", [1, 0.5, 0.14644660940672627])],
)
def test_rates_after_the_warm_up(kind: str, expected: list[float]) -> None:
    assert [lr_factor(step, 10, 2, kind) for step in (2, 6, 8)] == pytest.approx(expected)
    assert [lr_factor(step, 10, 2, kind) for step in (0, 1)] == pytest.approx([1 / 3, 2 / 3])


def test_rejects() -> None:
    with pytest.raises(ValueError, match="leave no step of 4 to train the sparse part"):
        make(train_steps=4, restart=False)
    with pytest.raises(ValueError, match="step 10 of a run of 10 steps"):
        make().at(10)


@pytest.mark.parametrize(
    ("settings", "warmup", "collect"),
    [
        ({"method": "robust"}, 64, 1),
        ({"method": "sparse"}, 0, 1),
        ({"method": "lora"}, 0, 0),
        ({"method": "robust", "mask": {"score": "random"}}, 0, 0),
        ({"method": "robust", "mask": {"load": "mask.safetensors"}}, 0, 0),
    ],
)
def test_schedule_of_settings(settings: dict[str, object], warmup: int, collect: int) -> None:
    schedule = build_schedule(RunConfig(**settings, training={"epochs": 2}), 10)  # type: ignore[arg-type]
    assert (schedule.mask_warmup, schedule.mask_steps, schedule.train_steps) == (warmup, collect, 20)


def test_draws_every_so_many_steps() -> None:
    schedule = make(mask_warmup=0, mask_steps=0, draws=True, draw_every=2, draw_warmup=1)
    steps = [schedule.at(number) for number in range(6)]
    assert [step.draw for step in steps] == [0, None, 1, None, 2, None]
    assert [step.low_rank_factor for step in steps] == [1.0, 1.0, 0.5, 1.0, 0.5, 1.0]
    assert [schedule.has_drawn(number) for number in (0, 1, 6)] == [False, True, True]
    once = make(mask_warmup=0, mask_steps=0, draws=True)
    assert [once.at(number).draw for number in range(6)] == [0] + [None] * 5
    assert all(step.low_rank_factor == 1.0 for step in map(once.at, range(6)))


def test_before_a_restart_nothing_is_drawn() -> None:
    """The base is then what it was, and needs no restoring."""
    schedule = make(draws=True, draw_every=4)
    assert [schedule.at(number).draw for number in range(10)] == [None] * 4 + [0, None, None, None, 1, None]
    assert [schedule.has_drawn(number) for number in (3, 4, 5)] == [False, False, True]
    going_on = make(draws=True, draw_every=4, restart=False)
    assert [going_on.at(number).draw for number in range(6)] == [0, None, None, None, 1, None]
    assert [step.lr_factor for step in map(schedule.at, range(10))] == [make().at(n).lr_factor for n in range(10)]


def test_a_warm_up_ends_before_the_next_draw() -> None:
    with pytest.raises(ValueError, match=r"draw\.warmup_steps 3 does not end before the next draw, after 3 steps"):
        make(draws=True, draw_every=3, draw_warmup=3)


def test_draws_of_settings() -> None:
    settings = RunConfig(method="subspace", draw={"every": "2 epochs", "warmup_steps": 3}, training={"epochs": 5})
    schedule = build_schedule(settings, 10)
    assert [number for number in range(50) if schedule.at(number).draw is not None] == [0, 20, 40]
    assert schedule.draw_warmup == 3
    assert not build_schedule(RunConfig(method="lora"), 10).draws


@pytest.mark.parametrize(
    ("steps", "said"),
    [(66, []), (64, ["65 steps find the mask"]), (20, ["65 steps find the mask", "never reaches its value"])],
)
def test_few_steps_of_training_are_pointed_out(steps: int, said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A small data set: the default warm-up is then most of the run, and the learning rate's all of it."""
    logger = logging.getLogger("rosa_ds")
    propagates, logger.propagate = logger.propagate, True
    try:
        build_schedule(RunConfig(method="robust", training={"max_steps": steps}), 10)
    finally:
        logger.propagate = propagates
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len(said)
    assert all(part in warning for part, warning in zip(said, warnings, strict=True))

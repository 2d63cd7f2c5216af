"""The step benchmark on the built-in model; what it measures is not a test's business, that it measures all is."""

from __future__ import annotations

import pytest
import torch
from step_time import OURS, PEERS, StepBench, StepCase, main

from rosa_ds.config.schema import ModelSettings

CASE = StepCase(ModelSettings(), torch.float32, rank=2, density=0.01, batch=1, length=8, repeats=2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_all_candidates_train_and_are_compared() -> None:
    names = [*PEERS, *OURS, "robust-nf4"]
    rows = {row.name: row for row in StepBench(CASE, names).measure()}
    assert list(rows) == names
    assert rows["robust-nf4"].trained == rows["robust"].trained
    assert rows["peft-lora"].ratio == 1.0
    assert rows["lora"].trained == rows["peft-lora"].trained
    assert rows["robust"].trained == rows["lora"].trained + rows["sparse"].trained
    # PEFT rounds the number of entries down where ours rounds to the nearest
    assert 0 <= rows["robust"].trained - rows["peft-supertuning"].trained <= len(rows) * 40
    for row in rows.values():
        assert 0 < row.forward < row.step
        assert 0 < row.backward < row.step
        assert row.ratio == pytest.approx(row.step / rows["peft-lora"].step)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_operators_are_those_of_each_candidate() -> None:
    (found,) = StepBench(CASE, ["peft-lora", "lora"]).profile().values()
    rows = {row.operator: row for row in found}
    assert len(rows) == len(found)
    ours = [row for name, row in rows.items() if "AdapterLinear" in name]
    assert ours
    assert all(row.first == 0 < row.other for row in ours)
    attention = next(row for name, row in rows.items() if "scaled_dot_product" in name)
    assert min(attention.first, attention.other) > 0
    differences = [abs(row.other - row.first) for row in found]
    assert differences == sorted(differences, reverse=True)


def test_unknown_candidates_are_named() -> None:
    with pytest.raises(ValueError, match="no candidate 'dora': choose from robust"):
        StepBench(CASE, ["dora"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--length", "1"], "--rank, --batch and --repeats are 1 or more, --length 2 or more"),
        (["tiny", "--candidate", "lora", "--profile"], "--profile compares: give --candidate twice"),
    ],
    ids=["no token", "one candidate"],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments)

"""The synthetic regression, small: bounds, recovery by draws, and a run from command line to picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from draw_time import measure_draws, released_draw
from regression import OUTPUTS, Training, draws_to_recover, make_task, train
from torch import nn

from launching import ROOT, run


def test_the_bound_of_a_rank_is_that_of_the_best_factors() -> None:
    """Against the truncated SVD of the update, on fresh inputs."""
    task = make_task(1, noise=0.0)
    x, y = (tensor.double() for tensor in task.train)
    base = task.base[0].weight.detach().double()
    update = torch.linalg.lstsq(x, y).solution.T - base
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    assert int((1e-6 * S[0] < S).sum()) == 24
    fresh = torch.randn(200_000, 512, generator=torch.Generator().manual_seed(1)).double()
    for rank in (1, 8, 24):
        left = (U[:, rank:] * S[rank:]) @ Vh[rank:]
        assert task.bounds[rank] == pytest.approx(float((fresh @ left.T).square().mean()), rel=0.01, abs=1e-9)


def test_draws_leave_lora_behind() -> None:
    """A few epochs are enough for subspace to be below what any LoRA of its rank can reach."""
    task = make_task(1)
    short = Training("subspace", rank=8, epochs=18, draws=5, warmup_epochs=2, learning_rate=5e-3)
    subspace = train(task, short)[-1]
    lora = train(task, dataclasses.replace(short, method="lora"))[-1]
    assert lora > 0.99 * task.bounds[8]
    assert subspace < 0.8 * task.bounds[8]


def test_recovery_takes_more_draws_than_rank_over_rank() -> None:
    """What is removed from the weight has to be learnt again, unless it was small or is hit at random."""
    assert draws_to_recover("top", 8, limit=60) is None
    found = draws_to_recover("random", 8, limit=200)
    assert found is not None
    assert found > 3


def test_training_to_convergence_is_the_truncated_svd() -> None:
    """What draws_to_recover takes for granted, by gradient descent on the factors of one draw."""
    torch.manual_seed(0)
    wanted = torch.randn(OUTPUTS, 40, dtype=torch.float64)
    A, B = (nn.Parameter(torch.randn(*shape, dtype=torch.float64) * 0.1) for shape in ((4, 40), (OUTPUTS, 4)))
    optimizer = torch.optim.LBFGS([A, B], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (B @ A - wanted).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    best = torch.linalg.svdvals(wanted)[4:].square().sum()
    assert float(loss().detach()) == pytest.approx(float(best), rel=1e-6)


def test_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "figure"
    arguments = ("--ranks", "8", "--epochs", "6", "--draws", "2", "--directions", "random")
    output = run("fork", 1, str(ROOT / "benchmarks" / "regression.py"), str(out), *arguments, cwd=tmp_path)
    assert "bound of its rank" in output
    assert (out / "regression.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "regression.json").read_text())
    assert set(content["two layers"]["curves"]) == {"full", "lora 8", "subspace 8"}
    assert len(content["linear map"]["curves"]["full"]) == 6


def test_the_peer_of_the_timing_does_draw() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    left, right, rest = released_draw(weight, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rest + left @ right, weight)
    found = measure_draws((60, 40), 4, 1, ("random", "projection"))
    assert set(found.seconds) == {"released", "random", "projection"}
    assert found.ratio("random") == found.seconds["released"] / found.seconds["random"]

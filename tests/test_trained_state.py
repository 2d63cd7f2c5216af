"""Optimizer wrappers that a CPU cannot run for real: their loss scale is found all the same."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rosa_ds.zero.trained_state import TrainedState


def test_loss_scale_of_the_unfused_float16_optimizer_is_kept() -> None:
    """FP16_UnfusedOptimizer (stage 0) holds it in ``loss_scale_config``, the ZeRO optimizers in ``loss_scaler``."""
    parameter = torch.nn.Parameter(torch.ones(2))
    for holder in ("loss_scale_config", "loss_scaler"):
        fields = {"cur_scale": 1024.0, "cur_iter": 7, "last_overflow_iter": 3}
        optimizer = SimpleNamespace(optimizer=torch.optim.AdamW([parameter]), **{holder: SimpleNamespace(**fields)})
        state = TrainedState(optimizer, {"low_rank": {"A": parameter}})
        assert state.read_scaler() == fields
        state.write_scaler(fields | {"cur_scale": 2.0})
        assert getattr(optimizer, holder).cur_scale == 2.0


def test_reset_is_as_before_the_first_step() -> None:
    def steps(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
        for factor in (1.0, -0.5, 2.0):
            parameter.grad = torch.full_like(parameter, factor)
            optimizer.step()
        return parameter.detach().clone()

    used, fresh = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([used], lr=0.1)
    steps(optimizer, used)
    state = TrainedState(optimizer, {"sparse": {"values": used}})
    assert state.reset_optimizer(["low_rank"]) == 0
    assert state.reset_optimizer(["sparse"]) > 0
    state.write({"values": torch.ones(3)})
    assert torch.equal(steps(optimizer, used), steps(torch.optim.AdamW([fresh], lr=0.1), fresh))


def test_parameters_without_a_gradient_have_no_moments() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([unused, used])
    used.grad = torch.ones(2)
    optimizer.step()
    tensors, scalars = TrainedState(optimizer, {"whole": {"unused": unused, "used": used}}).read_optimizer()
    assert sorted(tensors) == ["used/exp_avg", "used/exp_avg_sq"]
    assert scalars["whole"]["step"] == 1

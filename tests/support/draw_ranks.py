"""Draws on several ranks at every ZeRO stage, all in one process group; started by test_draw.py with a model's folder."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

import rosa_ds
from rosa_ds import distributed, zero
from rosa_ds.adapters.mask import static_positions
from rosa_ds.adapters.subspace import project_moments
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import DrawSettings, RunConfig
from rosa_ds.methods.subspace import MOMENTS, Drawing
from rosa_ds.methods.subspace_base import ChangedBase
from rosa_ds.models.load import load_model
from rosa_ds.training.engine import build_engine
from rosa_ds.training.model import adapt, load_base
from rosa_ds.zero import trained_state
from rosa_kernels.testing import relative_rms

MODEL = Path(sys.argv[1])
ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(3, 25).view(2, 11)
LR = 0.01
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)


def read_one(state: trained_state.TrainedState, name: str, key: str | None = None) -> Tensor:
    """A master or a moment, whole, on every rank."""
    return state.read_for({name}, [(name, key)])[name, key]


class Trainee:
    """A small model on all ranks in an engine, with a sparse part and a module that is trained whole."""

    def __init__(
        self, file: str, dtype: str = "float32", rank_pattern: dict[str, int] | None = None, **draw: Any
    ) -> None:
        given = RunConfig(
            method="robust-subspace",
            model={"name_or_path": str(MODEL), "dtype": dtype},
            adapter={
                **{"rank": 3, "density": 0.05, "modules_to_save": ["lm_head"], "low_rank_lr": LR},
                "rank_pattern": rank_pattern or {},
            },
            draw=draw,
        )
        config = json.loads((ROOT / "ds_configs" / file).read_text())
        config.pop("rosa", None)
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if "zero3" in file else {}
        config |= {"train_batch_size": distributed.world_size(), "train_micro_batch_size_per_gpu": 1}
        plan, self.settings = plan_deepspeed(config, given, distributed.world_size(), False)
        self.model: Any = adapt(*load_base(self.settings, plan), self.settings, plan)
        self.engine, self.state = build_engine(self.model, self.settings, plan)
        self.layers = rosa_ds.adapted_layers(self.model)
        self.layers = {name: layer for name, layer in self.layers.items() if layer.rank}
        for layer in rosa_ds.adapted_layers(self.model).values():
            layer.set_positions(static_positions("random", layer, layer.weight, 0))
        self.base = ChangedBase(self.layers, self.settings.draw)
        self.drawing = Drawing(self.base, self.state, self.settings.draw, seed=1)

    def step(self) -> None:
        self.engine.backward(self.engine(input_ids=IDS, labels=IDS, use_cache=False).loss)
        self.engine.step()

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.engine(input_ids=IDS, use_cache=False).logits.float()

    def whole(self) -> dict[str, Tensor]:
        """Every parameter as the model computes with it."""
        return {name: zero.read_whole(p).detach().clone() for name, p in self.model.named_parameters()}

    def weights(self) -> dict[str, Tensor]:
        """The drawn layers' bases, with their residuals."""
        found = {name: self.base.read_weight(name, distributed.rank()) for name in self.layers}
        return {name: both[0].clone() for name, both in found.items() if both is not None}

    def masters(self) -> dict[str, Tensor]:
        return {name: read_one(self.state, name) for name in self.state.parameters}

    def moments(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": read_one(self.state, name, key) for name in self.state.parameters for key in MOMENTS}


def is_factor(name: str) -> bool:
    return name.partition("/")[0].rpartition(".")[2] in ("A", "B")


def assert_same_everywhere(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        bits = tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        assert distributed.same_everywhere(bits), f"the ranks have different bits of {name}"


def check_first_draw_is_that_of_one_process(file: str) -> None:
    trainee = Trainee(file)
    before = trainee.logits()
    event = trainee.drawing.draw(0)
    assert event["moments_reset"] in (None, 1.0)
    assert event["rounding"] < 1e-7
    alone = load_model(trainee.settings.model, torch.float32)
    rosa_ds.inject(alone, trainee.settings.adapter_config(), seed=1, draw=DrawSettings())
    reference = dict(alone.named_parameters())
    found = trainee.whole()
    for name, layer in trainee.layers.items():
        for part in ("A", "B", "weight"):
            assert relative_rms(found[f"{name}.{part}"], reference[f"{name}.{part}"]) < 1e-6, f"{name}.{part}"
        assert layer.scale == 1.0
    assert_same_everywhere(found)
    assert relative_rms(trainee.logits(), before) < 1e-5


def check_a_draw_replaces_what_it_should(file: str) -> None:
    trainee = Trainee(file)
    trainee.drawing.draw(0)
    trainee.step()
    trainee.step()
    logits, before, moments = trainee.logits(), trainee.whole(), trainee.moments()
    event = trainee.drawing.draw(1)
    assert event["moments_reset"] == 1.0
    after, masters = trainee.whole(), trainee.masters()
    assert_same_everywhere(after)
    assert relative_rms(trainee.logits(), logits) < 1e-5
    for name, tensor in after.items():
        changed = is_factor(name) or any(name == layer.weight_name for layer in trainee.layers.values())
        assert torch.equal(tensor, before[name]) != changed, name
        if name in masters:
            assert torch.equal(masters[name].to(tensor.dtype), tensor), f"master of {name}"
    for name, moment in trainee.moments().items():
        assert bool(moments[name].any()) or "values" in name
        assert torch.equal(moment, torch.zeros_like(moment) if is_factor(name) else moments[name]), name
    trainee.step()
    moved = {name: (tensor - after[name]).abs() for name, tensor in trainee.whole().items() if is_factor(name)}
    for name, distance in moved.items():
        # Adam's first step after a reset goes by the learning rate, whatever the gradient
        assert float(distance.max()) < 1.01 * LR, f"{name} did not begin at the draw"
        assert float(distance.median()) > 0.9 * LR, name


def check_moments_kept_and_projected(file: str) -> None:
    for kind in ("keep", "project"):
        trainee = Trainee(file, moments=kind)
        trainee.drawing.draw(0)
        trainee.step()
        trainee.step()
        before, old = trainee.moments(), trainee.masters()
        assert trainee.drawing.draw(1)["moments_reset"] is None
        after, new = trainee.moments(), trainee.masters()
        for name in trainee.layers:
            expected = {f"{name}.{part}/{key}": before[f"{name}.{part}/{key}"] for part in "AB" for key in MOMENTS}
            if kind == "project":
                A, B = f"{name}.A", f"{name}.B"
                first, second = project_moments(before[f"{A}/exp_avg"], before[f"{A}/exp_avg_sq"], new[B], old[B])
                expected |= {f"{A}/exp_avg": first, f"{A}/exp_avg_sq": second}
                first, second = project_moments(
                    before[f"{B}/exp_avg"].T, before[f"{B}/exp_avg_sq"].T, new[A].T, old[A].T
                )
                expected |= {f"{B}/exp_avg": first.T, f"{B}/exp_avg_sq": second.T}
            for key, moment in expected.items():
                torch.testing.assert_close(after[key], moment, rtol=1e-5, atol=1e-12)
        trainee.step()


def check_a_residual_keeps_the_bits_of_a_bfloat16_base(file: str) -> None:
    drifts = {}
    for residual in (True, False):
        trainee = Trainee(file, dtype="bfloat16", residual=residual)
        start = trainee.whole()
        for number in range(20):
            event = trainee.drawing.draw(number)
        drifts[residual] = event["drift"]
        assert_same_everywhere(trainee.whole())
        worst = 0.0
        masters = trainee.masters()
        for name, weight in trainee.weights().items():
            found = weight + masters[f"{name}.B"] @ masters[f"{name}.A"]
            worst = max(worst, float(relative_rms(found, start[f"{name}.weight"].float())))
        assert event["compute_rounding"] > 1e-3 or not residual
        assert worst < 1.5 * drifts[residual], "the drift is larger than the run says"
        if residual:
            assert trainee.base.bytes == 2 * sum(-(-layer.weight_numel // 2) for layer in trainee.layers.values())
    assert drifts[True] < 1e-6, drifts
    assert drifts[False] > 1e-3, drifts


def check_what_is_read_is_what_deepspeed_reads(file: str) -> None:
    trainee = Trainee(file)
    trainee.step()
    state = trainee.state
    if hasattr(state.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed 0.19 links moments once, after the first group's first step, when the others have none yet
        state.optimizer._hp_optimizer_states_linked = False
        state.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in state.parameters.items() if "zero0" not in file else ():  # where DeepSpeed reads nothing
        assert torch.equal(read_one(state, name), safe_get_full_fp32_param(parameter)), name
        for key in MOMENTS:
            moment = safe_get_full_optimizer_state(parameter, key)
            assert torch.equal(read_one(state, name, key), moment.to(distributed.device())), f"{name}/{key}"
    name = next(name for name in state.parameters if is_factor(name))
    value = read_one(state, name)
    value[0] = -0.0
    state.write({name: value})
    assert torch.equal(read_one(state, name).view(torch.int32), value.view(torch.int32)), "the sign of 0 is lost"
    owners = {name: number % distributed.world_size() for number, name in enumerate(state.parameters)}
    at_once = state.read(owners), state.read_optimizer(owners)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_state, "BATCH_BYTES", 2000)
        in_batches = state.read(owners), state.read_optimizer(owners)[0]
    for whole, parts in zip(at_once, in_batches, strict=True):
        assert whole.keys() == parts.keys()
        assert {name.partition("/")[0] for name in whole} == {n for n, r in owners.items() if r == distributed.rank()}
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def check_collectives_do_not_grow_with_the_factors() -> None:
    """One message a layer, and a few sums a turn: a collective of a few numbers waits longer than its data take."""
    trainee = Trainee("zero2.json")
    trainee.drawing.draw(0)
    trainee.step()
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        call = getattr(torch.distributed, name)
        return lambda *args, **kwargs: (calls.update([name]), call(*args, **kwargs))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("broadcast", "all_reduce", "all_gather_into_tensor", "all_gather_object"):
            patch.setattr(torch.distributed, name, counting(name))
        trainee.drawing.draw(1)
    turns = len(trainee.drawing.turns)
    assert calls == {"broadcast": len(trainee.layers), "all_reduce": 2 * turns, "all_gather_object": 2}, calls


def check_changes_are_restored(file: str, dtype: str) -> None:
    trainee = Trainee(file, dtype=dtype)
    trainee.drawing.draw(0)
    trainee.step()
    trainee.drawing.draw(1)
    weights = trainee.weights()
    parts = distributed.gather_objects(trainee.base.read(trainee.drawing.owners))
    names = [set(part) for part in parts]
    assert all(names), "a rank owns no layer"
    assert not names[0] & names[1]
    changes = {name: tensor for part in parts for name, tensor in part.items()}
    fresh = Trainee(file, dtype=dtype)
    assert not any(torch.equal(found, weights[name]) for name, found in fresh.weights().items())
    fresh.base.restore(changes, 0.5, None)
    for name, found in fresh.weights().items():
        assert torch.equal(found, weights[name]), name
    assert fresh.base.drift == 0.5
    assert all(layer.drawn for layer in fresh.layers.values())
    changes.pop(next(iter(changes)))
    with pytest.raises(ValueError, match="the checkpoint lacks"):
        fresh.base.restore(changes, 0.5, None)


def check_a_layer_without_low_rank_part(file: str) -> None:
    trainee = Trainee(file, rank_pattern={"k_proj": 0})
    assert not any(name.endswith("k_proj") for name in trainee.drawing.layers)
    before = trainee.logits()
    trainee.drawing.draw(0)
    assert relative_rms(trainee.logits(), before) < 1e-5


def main() -> None:
    zero.initialize(5)
    distributed.use_threads()
    files = ("zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json")
    for file in files:
        check_first_draw_is_that_of_one_process(file)
        check_a_draw_replaces_what_it_should(file)
        check_moments_kept_and_projected(file)
        check_what_is_read_is_what_deepspeed_reads(file)
        check_changes_are_restored(file, "float32")
        if file in ("zero2.json", "zero3_offload.json"):
            check_a_residual_keeps_the_bits_of_a_bfloat16_base(file)
            check_changes_are_restored(file, "bfloat16")
            check_a_layer_without_low_rank_part(file)
        if file == "zero2.json":
            check_collectives_do_not_grow_with_the_factors()
        if distributed.is_main():
            sys.stdout.write(f"passed {file}\n")
    distributed.leave()


if __name__ == "__main__":
    main()

"""Checks of ZeRO-3 that need several ranks, all in one process group; started by test_zero3.py.

Arguments: a folder with the models that test_zero3.py makes, and the persistence threshold.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import engines
import rosa_ds
from rosa_ds import distributed, zero
from rosa_ds.adapters.folder import open_adapter
from rosa_ds.config.deepspeed import DeepSpeedPlan, plan_deepspeed
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.prepare import prepare
from rosa_ds.models.load import load_model, load_tokenizer
from rosa_ds.training.engine import build_engine
from rosa_ds.training.evaluate import evaluate
from rosa_ds.training.model import adapt, load_base
from rosa_ds.zero.engine import forget_order
from rosa_ds.zero.trained_state import TrainedState

FOLDER, THRESHOLD = Path(sys.argv[1]), int(sys.argv[2])
IDS = torch.arange(3, 25).view(2, 11)
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)


def plan(settings: RunConfig) -> tuple[DeepSpeedPlan, RunConfig]:
    section = {"stage": 3, "stage3_param_persistence_threshold": THRESHOLD}
    return plan_deepspeed({"zero_optimization": section}, settings, distributed.world_size(), gpu_has_bfloat16=False)


def settings(model: str, method: str = "robust", dtype: str = "float32", **adapter: Any) -> RunConfig:
    given = {"rank": 3, "density": 0.05, "dropout": 0.0, **adapter}
    if method in ("sparse", "full"):
        given = {key: value for key, value in given.items() if key not in ("rank", "dropout")}
    return RunConfig(
        method=method,
        model={"name_or_path": str(FOLDER / model), "dtype": dtype},
        adapter=given if method != "full" else {},
    )


def make_engine(given: RunConfig) -> tuple[Any, Any, TrainedState]:
    made, given = plan(given)
    return engines.make_engine(given, made)


def step(engine: Any) -> float:
    loss = engine(input_ids=IDS, labels=IDS, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def plain_copy(model: Any, given: RunConfig, folder: Path) -> Any:
    """What another process makes of the adapter that this model saves."""
    rosa_ds.save_adapter(model, folder)
    distributed.barrier()
    copy = load_model(given.model, torch.float32)
    rosa_ds.load_adapter(copy, folder)
    return copy.eval()


def check_streamed_base_is_divided_without_traffic() -> None:
    for name in ("llama", "tied", "gpt2", "both"):
        given = settings(name, modules_to_save=["lm_head"] if name == "llama" else [])
        made, given = plan(given)
        with distributed.TrafficCounter() as counter:
            model = adapt(*load_base(given, made), given, made)
        agreed = {("all_reduce", torch.int64): 16}  # twice: did all succeed?
        assert counter.bytes == agreed, f"{name}: building the model moved {dict(counter.bytes)}"
        reference = dict(load_model(given.model, torch.float32).named_parameters())
        own = ("A", "B", "values", "positions")
        base = {key: p for key, p in model.named_parameters() if key.rpartition(".")[2] not in own}
        assert base.keys() == reference.keys()
        for key, parameter in base.items():
            assert parameter.numel() == 0, f"{key} is whole"
            assert parameter.ds_tensor.numel() == -(-reference[key].numel() // distributed.world_size())
            assert torch.equal(zero.read_whole(parameter), reference[key]), key
        for layer in rosa_ds.adapted_layers(model).values():
            for key, tensor in layer.initial_parameters().items():
                assert torch.equal(zero.read_whole(getattr(layer, key)), tensor), key
        if name == "tied":
            assert model.lm_head.weight is model.model.embed_tokens.weight


def check_other_checkpoints_are_loaded_whole() -> None:
    """No safetensors; weights that the config ties and the file does not."""
    for name in ("bin", "differs"):
        given = settings(name)
        model = adapt(*load_base(given, plan(given)[0]), given, plan(given)[0])
        reference = dict(load_model(given.model, torch.float32).named_parameters())
        assert "lm_head.weight" in reference
        for key, tensor in reference.items():
            assert torch.equal(zero.read_whole(model.get_parameter(key)), tensor), key


def check_an_evaluation_changes_nothing_of_later_steps() -> None:
    """DeepSpeed takes a first forward pass for a step, and keeps what it has decided by that."""

    gathered = {}
    for case in ("no evaluation", "evaluated", "and forgotten"):
        _, engine, _ = make_engine(settings("llama"))
        engine.eval()
        with torch.no_grad():
            for _ in range(0 if case == "no evaluation" else 2):
                engine(input_ids=IDS, use_cache=False)
        if case == "and forgotten":
            forget_order(engine)
        engine.train()
        for _ in range(2):
            step(engine)
        assert engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace() == (case != "evaluated")
        step(engine)
        with distributed.TrafficCounter() as counter:
            step(engine)
        gathered[case] = sum(size for (kind, _), size in counter.bytes.items() if kind.startswith("all_gather"))
    assert gathered["and forgotten"] == gathered["no evaluation"]
    if THRESHOLD == 0:
        assert gathered["evaluated"] > 1.5 * gathered["no evaluation"]  # what forget_order is there for


def check_injecting_gathers_nothing() -> None:
    """Into a model that DeepSpeed's own context has partitioned, as transformers' Trainer makes it."""
    made, given = plan(settings("llama"))
    with deepspeed.zero.Init(config_dict_or_path=made.config):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER / "llama"))
    with distributed.TrafficCounter() as counter:
        report = rosa_ds.inject(model, given.adapter_config())
    assert not counter.bytes, f"inject moved {dict(counter.bytes)}"
    layer = model.model.layers[0].mlp.down_proj
    assert (layer.out_features, layer.in_features) == (32, 48)
    assert layer.entries == round(0.05 * 32 * 48)
    assert report.frozen == sum(p.ds_numel for p in model.parameters() if hasattr(p, "ds_id"))
    engine, _ = build_engine(model, given, made)
    assert step(engine) > 0


def check_adapters_are_saved_whole() -> None:
    for name in ("llama", "tied", "gpt2"):
        given = settings(name)
        model, engine, state = make_engine(given)
        for _ in range(3):
            step(engine)
        copy = plain_copy(model, given, FOLDER / f"adapter-{name}-{THRESHOLD}")
        saved = open_adapter(FOLDER / f"adapter-{name}-{THRESHOLD}")
        assert all(tensor.numel() for part in (saved.trained, saved.positions) for tensor in part.values())
        for key, parameter in state.parameters.items():
            assert saved.trained[key].shape == zero.full_shape(parameter), key
        assert any(tensor.any() for key, tensor in saved.trained.items() if key.endswith(".values"))
        engine.eval()
        with torch.no_grad():
            ours, theirs = engine(input_ids=IDS).logits, copy(input_ids=IDS).logits
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), f"{name}: {(ours - theirs).abs().max()}"
        with pytest.raises(ValueError, match="belongs to a DeepSpeed engine already"):
            rosa_ds.load_adapter(model, FOLDER / f"adapter-{name}-{THRESHOLD}")
        again = adapt(*load_base(given, plan(given)[0]), given, plan(given)[0])
        rosa_ds.load_adapter(again, FOLDER / f"adapter-{name}-{THRESHOLD}")
        for key, parameter in again.named_parameters():
            if key in saved.trained:
                assert torch.equal(zero.read_whole(parameter), saved.trained[key]), key


def check_merging_is_refused() -> None:
    model, engine, _ = make_engine(settings("llama"))
    step(engine)
    with pytest.raises(ValueError, match="partitioned by ZeRO-3"):
        rosa_ds.merge(model)
    with pytest.raises(ValueError, match="partitioned by ZeRO-3"), rosa_ds.merged(model):
        pass


def check_what_is_written_stays() -> None:
    """Both copies: forward sees it at once, and the next step does not undo it. Sizes no multiple of the ranks."""
    _, engine, state = make_engine(settings("llama", rank=3, density=0.013))
    step(engine)
    odd = [p for p in state.parameters.values() if p.ds_numel % distributed.world_size()]
    assert odd, "no parameter of an odd size in this check"
    generator = torch.Generator().manual_seed(1)
    wanted = {n: torch.randn(p.ds_shape, generator=generator) / 10 for n, p in state.parameters.items()}
    before = step_without_learning(engine)
    state.write(wanted)
    assert state.reset_optimizer(state.groups) > 0
    changed = step_without_learning(engine)
    assert changed != before
    assert step_without_learning(engine) == changed
    for key, parameter in state.parameters.items():
        assert torch.equal(zero.read_whole(parameter), wanted[key]), key
    masters = state.read()
    assert masters.keys() == (wanted.keys() if distributed.is_main() else set())
    assert all(torch.equal(masters[key], wanted[key]) for key in masters)


def step_without_learning(engine: Any) -> float:
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    return step(engine)


def check_moments_are_read_and_written() -> None:
    _, engine, state = make_engine(settings("llama"))
    for _ in range(2):
        step(engine)
    tensors, scalars = state.read_optimizer()
    assert scalars["low_rank"]["step"] == scalars["sparse"]["step"] == 2
    _, _, other = make_engine(settings("llama"))
    shared = [tensors if distributed.is_main() else None]
    torch.distributed.broadcast_object_list(shared)
    other.write_optimizer(shared[0], scalars)
    again, numbers = other.read_optimizer()
    assert numbers == scalars
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert not distributed.is_main() or any(tensor.any() for tensor in tensors.values())


def check_one_dtype_and_no_empty_parameter() -> None:
    more = {"modules_to_save": ["model.norm", "lm_head"], "density_pattern": {"q_proj": 0.0, "k_proj": 1e-9}}
    model, engine, state = make_engine(settings("llama", dtype="bfloat16", **more))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert all(p.ds_numel for p in model.parameters())
    layers = rosa_ds.adapted_layers(model)
    assert all(layers[name].values is None for name in layers if name.endswith(("q_proj", "k_proj")))
    assert list(state.groups) == ["low_rank", "sparse", "whole"]
    first = step(engine)
    assert step(engine) < first


def check_methods_without_some_groups() -> None:
    for method in ("lora", "sparse", "full"):
        _, engine, state = make_engine(settings("llama", method=method))
        assert len(state.groups) == 1
        first = step(engine)
        assert step(engine) < first


def check_evaluation_with_fewer_batches_than_ranks_can_share() -> None:
    tokenizer = load_tokenizer(RunConfig().model)
    data = prepare("builtin:sql[:3]", "train", tokenizer, RunConfig().data)
    given = RunConfig(adapter={"dropout": 0.0})
    _, engine, _ = make_engine(given)
    engine.eval()
    pad = tokenizer.pad_token_id
    loss = evaluate(engine, data, 1, pad)["loss"]  # 3 batches
    plain = evaluate(load_model(given.model, torch.float32), data, 1, pad)["loss"]
    assert abs(loss / plain - 1) < 1e-5, (loss, plain)


def check_reading_inside_a_gather() -> None:
    model, _, _ = make_engine(settings("llama"))
    weight = model.model.layers[0].mlp.up_proj.weight
    expected = zero.read_whole(weight)
    with deepspeed.zero.GatheredParameters([weight]):
        assert torch.equal(zero.read_whole(weight), expected)
        assert torch.equal(weight, expected)
    assert weight.numel() == 0


def check_disabled_is_the_base() -> None:
    for name in ("llama", "gpt2"):
        given = settings(name)
        model, engine, _ = make_engine(given)
        for _ in range(2):
            step(engine)
        with torch.no_grad():
            base = load_model(given.model, torch.float32)(input_ids=IDS, use_cache=False).logits
            ours = engine(input_ids=IDS, use_cache=False).logits
            with rosa_ds.disabled(model):
                assert torch.equal(engine(input_ids=IDS, use_cache=False).logits, base)
            assert torch.equal(engine(input_ids=IDS, use_cache=False).logits, ours)
        assert not torch.equal(ours, base)
        step(engine)
    model, _, _ = make_engine(settings("llama", modules_to_save=["model.norm"]))
    with pytest.raises(ValueError, match="are partitioned by ZeRO-3"):
        rosa_ds.disable(model)


def main() -> None:
    zero.initialize()
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("WARNING")
    for name, check in list(globals().items()):
        if name.startswith(sys.argv[3] if len(sys.argv) > 3 else "check_"):
            torch.manual_seed(0)
            check()
            if distributed.is_main():
                sys.stdout.write(f"passed {name}\n")
                sys.stdout.flush()
    distributed.leave()


if __name__ == "__main__":
    main()

"""The mask is the top-k of true autograd's gradient, for every matrix."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import rosa_ds
from rosa_ds.adapters.mask import MaskCollector, gradient_score, top_positions
from rosa_ds.config.mask_scores import RANKINGS, Score, ranking_of
from rosa_ds.config.schema import AdapterConfig
from rosa_kernels import gradient

DENSITY = 0.07


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 97, (2, 9), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def dense_gradients(model: PreTrainedModel, names: list[str], count: int) -> list[dict[str, torch.Tensor]]:
    """Each batch's gradient of each named weight, by plain autograd on the plain model."""
    weights = {name: model.get_parameter(name) for name in names}
    result = []
    for batch in batches(count):
        grads = torch.autograd.grad(model(**batch).loss, [weight.requires_grad_() for weight in weights.values()])
        result.append(dict(zip(weights, grads, strict=True)))
    return result


DENSE = {
    "mean_squared": lambda gradients, weight: gradients.square().sum(0),
    "mean": lambda gradients, weight: gradients.sum(0).abs(),
    "gradient_over_magnitude": lambda gradients, weight: gradients.sum(0).abs() / weight.abs(),
}
"""Every score that comes from gradients, from all of them, (steps, N, M), and the weight."""


@pytest.mark.parametrize("score", DENSE)
@pytest.mark.parametrize("count", [1, 3], ids=["one step", "three steps"])
def test_equals_dense_autograd_for_every_matrix(model: PreTrainedModel, score: str, count: int) -> None:
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and "emb" not in name and "wte" not in name]
    names = [name for name in names if "wpe" not in name and "lm_head" not in name]
    dense = dense_gradients(model, names, count)
    rosa_ds.inject(model, AdapterConfig(method="robust", rank=2, density=DENSITY, dropout=0.0))
    mask = rosa_ds.compute_mask(model, batches(count), score=score)
    assert sorted(mask) == sorted(names)
    for name in names:
        stacked = torch.stack([gradients[name] for gradients in dense])
        assert stacked.any(), name
        wanted = DENSE[score](stacked, model.get_parameter(name).detach())
        expected = wanted.flatten().topk(round(DENSITY * wanted.numel())).indices.sort().values
        assert torch.equal(mask[name].long(), expected), name


def test_static_scores(llama: PreTrainedModel) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="sparse", density=DENSITY))
    magnitude = rosa_ds.compute_mask(llama, [], score="magnitude")
    for name, positions in magnitude.items():
        weight = llama.get_parameter(name).detach().abs().flatten()
        assert weight[positions.long()].min() >= weight.topk(positions.numel()).values.min()
    random, again = (rosa_ds.compute_mask(llama, [], score="random", seed=5) for _ in range(2))
    other = rosa_ds.compute_mask(llama, [], score="random", seed=6)
    assert all(torch.equal(random[name], again[name]) for name in random)
    q_proj = [f"model.layers.{index}.self_attn.q_proj.weight" for index in (0, 1)]
    assert not torch.equal(random[q_proj[0]], other[q_proj[0]])
    assert not torch.equal(random[q_proj[0]], random[q_proj[1]])


def test_collecting_leaves_no_gradient_behind(llama: PreTrainedModel) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="robust", rank=2, density=DENSITY))
    rosa_ds.compute_mask(llama, batches(1))
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert all(layer.collect is None for layer in rosa_ds.adapted_layers(llama).values())


def test_micro_batches_of_a_step_add_up_before_they_are_squared(llama: PreTrainedModel) -> None:
    """Two micro-batches in one step score (G1 + G2)², not G1² + G2²."""
    rosa_ds.inject(llama, AdapterConfig(method="robust", rank=2, density=DENSITY, dropout=0.0))
    layers = rosa_ds.adapted_layers(llama)
    collector = MaskCollector(layers, "mean_squared", dict.fromkeys(layers, 0), 0, lambda tensor, owner: None)
    collector.attach()
    halves = batches(2)
    whole = {key: torch.cat([half[key] for half in halves]) for key in halves[0]}
    for half in halves:
        (llama(**half).loss / 2).backward()
    collector.end_step()
    collector.detach()
    expected = rosa_ds.compute_mask(llama, [whole])
    assert all(
        torch.equal(collector.positions(name, layers[name].weight), expected[f"{name}.weight"]) for name in layers
    )


@pytest.mark.parametrize("score", DENSE)
def test_one_micro_batch_keeps_its_largest_entries_alone(
    llama: PreTrainedModel, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "BLOCK_BYTES", 4 * 32 * 5)  # five rows of a matrix of 32 columns at a time
    rosa_ds.inject(llama, AdapterConfig(method="robust", rank=2, density=DENSITY, dropout=0.0))
    layers = rosa_ds.adapted_layers(llama)
    blocks: list[int] = []

    def double(block: torch.Tensor, owner: int) -> None:
        blocks.append(block.numel())
        block *= 2  # as if another rank had the same gradient

    collector = MaskCollector(layers, score, dict.fromkeys(layers, 0), 0, double, single=True)
    collector.attach()
    (batch,) = batches(1)
    (llama(**batch).loss * 4).backward()
    collector.end_step(scale=4)
    collector.detach()
    assert max(blocks) <= 5 * 64
    assert not collector.totals
    expected = rosa_ds.compute_mask(llama, [batch], score=score)
    assert all(
        torch.equal(collector.positions(name, layers[name].weight), expected[f"{name}.weight"]) for name in layers
    )


def test_single_collector_refuses_a_second_use_and_forgets_overflow(llama: PreTrainedModel) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="robust", rank=2, density=DENSITY, dropout=0.0))
    layers = rosa_ds.adapted_layers(llama)
    collector = MaskCollector(
        layers, "mean_squared", dict.fromkeys(layers, 0), 0, lambda tensor, owner: None, single=True
    )
    collector.attach()
    first, second = batches(2)
    loss = llama(**first).loss
    (loss * float("inf")).backward(retain_graph=True)
    with pytest.raises(ValueError, match="is used more than once in a forward pass; .* set mask.steps to 2"):
        loss.backward()
    collector.end_step(valid=False)
    (llama(**second).loss).backward()
    collector.end_step()
    expected = rosa_ds.compute_mask(llama, [second])
    assert all(
        torch.equal(collector.positions(name, layers[name].weight), expected[f"{name}.weight"]) for name in layers
    )
    collector.end_step(valid=False)
    collector.attach()  # compute_mask has taken it off
    (llama(**second).loss * float("nan")).backward()
    collector.end_step()
    with pytest.raises(ValueError, match="score is not finite"):
        collector.positions(next(iter(layers)), layers[next(iter(layers))].weight)


def test_ranks_at_different_layers_are_an_error(llama: PreTrainedModel) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="robust", rank=2, density=DENSITY))
    layers = rosa_ds.adapted_layers(llama)
    other = next(name for name in layers if "layers.0" in name and "v_proj" in name)
    summed: list[int] = []
    collector = MaskCollector(
        layers,
        "mean_squared",
        dict.fromkeys(layers, 0),
        0,
        lambda block, owner: summed.append(owner),
        agree=lambda name: name != other,
    )
    collector.attach()
    with pytest.raises(ValueError, match=f"used different layers in one step .here {other}"):
        llama(**batches(1)[0]).loss.backward()
    assert 0 < len(summed) < len(layers)


def test_overflowed_steps_are_forgotten(llama: PreTrainedModel) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="robust", rank=2, density=DENSITY, dropout=0.0))
    layers = rosa_ds.adapted_layers(llama)
    collector = MaskCollector(layers, "mean", dict.fromkeys(layers, 0), 0, lambda tensor, owner: None)
    collector.attach()
    first, second = batches(2)
    (llama(**first).loss * float("inf")).backward()
    collector.end_step(valid=False)
    name = next(iter(layers))
    with pytest.raises(ValueError, match="every collect step overflowed"):
        collector.positions(name, layers[name].weight)
    (llama(**second).loss * 8).backward()
    collector.end_step(scale=8)
    collector.detach()
    assert collector.steps == 1
    expected = rosa_ds.compute_mask(llama, [second], score="mean")
    assert torch.equal(collector.positions(name, layers[name].weight), expected[f"{name}.weight"])


def test_a_layer_without_gradient_is_named(llama: PreTrainedModel) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="robust", rank=2, density=DENSITY))
    llama.model.layers[0].self_attn.o_proj.weight.data.zero_()
    with pytest.raises(ValueError, match="self_attn.q_proj.weight is zero everywhere"):
        rosa_ds.compute_mask(llama, batches(1))


def test_top_positions() -> None:
    positions = top_positions(torch.tensor([[0.1, 5.0], [3.0, 4.0]]), 2)
    assert positions.tolist() == [1, 3]
    assert positions.dtype == torch.int32
    with pytest.raises(ValueError, match="not finite"):
        top_positions(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="does not come from gradients"):
        gradient_score("random", torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="no score 'magnitud'. Did you mean magnitude"):
        ranking_of("magnitud")


def test_every_score_has_a_ranking_and_its_own_name() -> None:
    assert tuple(RANKINGS) == get_args(Score)
    assert all(ranking.weight or ranking.gradient or ranking.of is None for ranking in RANKINGS.values())
    assert set(DENSE) == {name for name, ranking in RANKINGS.items() if ranking.gradient}


def test_a_mask_of_no_batch(llama: PreTrainedModel) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="sparse", density=DENSITY))
    with pytest.raises(ValueError, match=r"mask.score mean_squared needs gradients and batches has none"):
        rosa_ds.compute_mask(llama, [])


def test_zero_weights_are_not_divided_by() -> None:
    """Gradients as float16 collects them, times a loss scale: the largest comes first among entries of zero weight."""
    ranking = RANKINGS["gradient_over_magnitude"]
    assert ranking.of is not None
    gradient = torch.tensor([3.0, 2.0**17, 1.0, 2.0**16])
    scores = ranking.of(gradient, torch.tensor([0.0, 0.0, 2.0**-24, 1.0], dtype=torch.float16))
    assert torch.isfinite(scores).all()
    assert scores.argsort(descending=True).tolist() == [1, 0, 2, 3]


def test_saved_mask_loads_and_wrong_ones_do_not(llama: PreTrainedModel, tmp_path: Path) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="sparse", density=DENSITY))
    mask = rosa_ds.compute_mask(llama, [], score="random")
    path = tmp_path / "mask.safetensors"
    rosa_ds.save_mask(mask, path, {"score": "random"})
    loaded = rosa_ds.load_mask(path)
    assert loaded.keys() == mask.keys()
    assert all(torch.equal(loaded[name], mask[name]) for name in mask)
    name = next(iter(mask))
    for change, message in (
        (mask[name][:-1], "expected"),
        (mask[name].long(), "torch.int64 given"),
        (mask[name].flip(0), "not sorted"),
        (mask[name] + 2**20, "indices from"),
    ):
        with pytest.raises(ValueError, match=message):
            rosa_ds.set_mask(llama, mask | {name: change})
    with pytest.raises(ValueError, match="the mask has nothing for"):
        rosa_ds.set_mask(llama, {key: value for key, value in mask.items() if key != name})
    with pytest.raises(ValueError, match="which has no sparse part here. Did you mean"):
        rosa_ds.set_mask(llama, mask | {"model.layers.0.self_attn.q_prj.weight": mask[name]})
    assert not any(layer.mask_known for layer in rosa_ds.adapted_layers(llama).values())
    save_file(mask, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a mask"):
        rosa_ds.load_mask(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no such file"):
        rosa_ds.load_mask(tmp_path / "nothing.safetensors")


def test_needs_a_sparse_part(llama: PreTrainedModel) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="lora", rank=2))
    with pytest.raises(ValueError, match="no layer of this model has a sparse part"):
        rosa_ds.compute_mask(llama, batches(1))

"""Draws of one weight and of a model in one process, against SVD and dense autograd."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import rosa_ds
from rosa_ds.adapters import subspace
from rosa_ds.adapters.low_rank import draw_generator
from rosa_ds.adapters.subspace import choose, join_bits, project_moments, singular_directions, split_bits, split_off
from rosa_ds.config.schema import AdapterConfig, DrawSettings, RunConfig
from rosa_kernels.testing import relative_rms

SHAPES = [(40, 40), (24, 60), (60, 24)]
DIRECTIONS = ["random", "window", "top", "bottom", "projection"]


def make(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A float64 matrix whose singular values fall from 1 to 1/min(rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(torch.randn(rows, columns, generator=generator).double(), full_matrices=False)
    count = min(rows, columns)
    return U @ torch.diag(1 / torch.arange(1, count + 1).double()) @ Vh


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("sigma", ["A", "B", "even"])
def test_the_sum_is_the_weight_again(shape: tuple[int, int], directions: Any, sigma: Any) -> None:
    weight = make(*shape)
    drawn = split_off(weight, 5, DrawSettings(directions=directions, sigma=sigma), generator(), torch.float64)
    assert drawn.A.shape == (5, shape[1])
    assert drawn.B.shape == (shape[0], 5)
    assert relative_rms(drawn.rest + drawn.B @ drawn.A, weight) < 1e-15
    assert torch.linalg.matrix_rank(drawn.B @ drawn.A) == 5
    lengths = drawn.A.norm(dim=1) * drawn.B.norm(dim=0)
    expected = {"A": torch.ones(5).double(), "B": lengths, "even": lengths.sqrt()}[sigma]
    torch.testing.assert_close(drawn.B.norm(dim=0), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", ["random", "window", "top", "bottom"])
@pytest.mark.parametrize("factorization", ["gram", "svd"])
def test_components_are_those_of_the_svd(shape: tuple[int, int], directions: Any, factorization: Any) -> None:
    """``B A = U_c Σ_c V_cᵀ``, and the rest has the other singular values."""
    weight = make(*shape)
    settings = DrawSettings(directions=directions, factorization=factorization)
    drawn = split_off(weight, 4, settings, generator(3), torch.float64)
    chosen = choose(directions, min(shape), 4, generator(3))
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    assert relative_rms(drawn.B @ drawn.A, U[:, chosen] @ torch.diag(S[chosen]) @ Vh[chosen]) < 1e-9
    left = torch.linalg.svdvals(drawn.rest)[: min(shape) - 4]
    others = torch.tensor([index not in chosen for index in range(min(shape))])
    torch.testing.assert_close(left, S[others])


def test_projection_is_the_weight_seen_along_a_random_basis() -> None:
    weight = make(24, 60)
    drawn = split_off(weight, 4, DrawSettings(directions="projection", sigma="B"), generator(), torch.float64)
    torch.testing.assert_close(drawn.A @ drawn.A.T, torch.eye(4).double(), atol=1e-6, rtol=0)  # drawn in float32
    torch.testing.assert_close(drawn.B, weight @ drawn.A.T, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(drawn.rest @ drawn.A.T, torch.zeros(24, 4).double(), atol=1e-6, rtol=0)


def test_random_is_a_uniform_subset() -> None:
    """Also the last direction, and not a contiguous run of them; the same from the same seed."""
    counts, runs = torch.zeros(10), 0
    for number in range(4000):
        chosen = choose("random", 10, 3, draw_generator(0, "layer", number))
        assert len(set(chosen.tolist())) == 3
        counts[chosen] += 1
        runs += int(chosen[2] - chosen[0] == 2)
    assert (counts / 4000 - 0.3).abs().max() < 0.03  # four standard deviations
    assert abs(runs / 4000 - 8 / 120) < 0.016
    again = [choose("random", 100, 7, draw_generator(5, "q_proj", 2)).tolist() for _ in range(2)]
    assert again[0] == again[1]
    others = [draw_generator(5, "k_proj", 2), draw_generator(5, "q_proj", 3), draw_generator(6, "q_proj", 2)]
    assert all(choose("random", 100, 7, other).tolist() != again[0] for other in others)


def test_other_choices() -> None:
    starts = {choose("window", 6, 4, generator(seed)).tolist()[0] for seed in range(60)}
    assert starts == {0, 1, 2}  # the last direction is in one of them
    assert choose("top", 6, 2, generator()).tolist() == [0, 1]
    assert choose("bottom", 6, 2, generator()).tolist() == [4, 5]


def test_factors_are_numbers_of_the_models_type() -> None:
    """Then the base makes up for rounding them."""
    weight = make(40, 40).float()
    drawn = split_off(weight, 5, DrawSettings(), generator(), torch.bfloat16)
    for factor in (drawn.A, drawn.B):
        assert torch.equal(factor, factor.bfloat16().float())
    assert relative_rms(drawn.rest + drawn.B @ drawn.A, weight) < 1e-7


def test_a_weight_without_some_directions_is_still_drawn() -> None:
    weight = torch.zeros(12, 20)
    weight[:2] = torch.randn(2, 20, generator=generator())
    for sigma in ("A", "B", "even"):
        drawn = split_off(weight, 6, DrawSettings(directions="bottom", sigma=sigma), generator(), torch.float32)
        assert torch.isfinite(drawn.A).all()
        assert torch.isfinite(drawn.B).all()
        assert bool((drawn.A.norm(dim=1) + drawn.B.norm(dim=0) > 0.5).all()), "a component that never learns"
        torch.testing.assert_close(drawn.rest + drawn.B @ drawn.A, weight)


@pytest.mark.parametrize("failure", ["raises", "skewed", "nan"])
def test_a_failed_factorisation_is_done_again_in_float64(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    eigh, calls = torch.linalg.eigh, []

    def broken(gram: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(gram.dtype)
        values, vectors = eigh(gram)
        if gram.dtype == torch.float64:
            return values, vectors
        if failure == "raises":
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return values, vectors * (1.01 if failure == "skewed" else float("nan"))

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    weight = make(24, 60).float()
    basis, failed = singular_directions(weight, torch.tensor([0, 3]), "gram")
    assert (calls, failed, basis.dtype) == ([torch.float32, torch.float64], 1, torch.float32)
    U = torch.linalg.svd(weight.double())[0][:, [0, 3]]
    torch.testing.assert_close((basis.double().T @ U).abs(), torch.eye(2).double(), atol=1e-6, rtol=0)
    assert "factorisation gram in float32 on cpu" in caplog.text


def test_a_weight_of_zeros_has_no_error() -> None:
    weight = torch.zeros(6, 8)
    drawn = split_off(weight, 2, DrawSettings(directions="projection"), generator(), torch.float32)
    assert drawn.error(drawn.rest, weight) == 0


SETTINGS_OF_TF32 = {
    "older": "torch.set_float32_matmul_precision('high')",
    "older, a flag": "torch.backends.cuda.matmul.allow_tf32 = True",
    "newer, all": "torch.backends.fp32_precision = 'tf32'",
    "newer, one": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "none": "pass",
}


@pytest.mark.parametrize("setting", SETTINGS_OF_TF32.values(), ids=SETTINGS_OF_TF32)
def test_either_setting_of_tf32_is_put_aside(setting: str) -> None:
    """In a process of its own: torch does not go back from the newer settings to the older."""
    if "fp32_precision" in setting and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch has these settings since 2.9")
    script = f"""if True:
        import torch
        from rosa_ds.adapters.low_rank import float32_products, low_rank_delta
        products = torch.backends.cuda.matmul
        {setting}
        before = getattr(products, "fp32_precision", "")
        with float32_products():
            assert not products.allow_tf32
            assert getattr(products, "fp32_precision", "ieee") == "ieee"
        assert getattr(products, "fp32_precision", "") == before
        low_rank_delta(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_products_are_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process allows it, as in NVIDIA's containers; what it allows is so again afterwards."""
    seen: list[str] = []
    true = subspace._factorise

    def factorise(*arguments: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return true(*arguments)

    monkeypatch.setattr(subspace, "_factorise", factorise)
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        split_off(make(24, 60).float(), 4, DrawSettings(), generator(), torch.float32)
        with pytest.raises(ValueError, match="cannot be factorised"):
            split_off(torch.full((4, 4), float("nan")), 2, DrawSettings(), generator(), torch.float32)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert len(seen) > 1
    assert set(seen) == {"highest"}


def test_the_last_resort_is_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gram: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("failed")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    _, failed = singular_directions(make(24, 60).float(), torch.tensor([1]), "gram")
    assert failed == 2


def test_a_weight_that_is_not_finite_is_refused(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"up_proj: its weight is not finite"):
        rosa_ds.inject(llama, AdapterConfig(method="subspace", rank=2))


@given(st.integers(0, 2**32 - 1), st.integers(1, 64))
def test_two_halves_are_the_float_again(seed: int, count: int) -> None:
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator(seed), dtype=torch.int64).to(torch.int32)
    whole = bits.view(torch.float32)
    whole = torch.where(whole.abs() < 3e38, whole, 1.0)
    high, low = split_bits(whole)
    assert torch.equal(join_bits(high, low), whole)
    nearest = (whole - whole.bfloat16().float()).abs()
    assert torch.equal((whole - high.float()).abs(), nearest), "another bfloat16 is nearer"


def test_projected_moments_are_those_of_the_same_gradients() -> None:
    """New directions within the old ones, rotated and scaled: the first moment is what the new factor would have seen."""
    random = generator()
    old_B, G = (torch.randn(*shape, generator=random).double() for shape in ((30, 4), (30, 20)))
    turn = torch.randn(4, 4, generator=random).double()
    new_B = old_B @ turn
    first, second = project_moments(old_B.T @ G, (old_B.T @ G).square(), new_B, old_B)
    torch.testing.assert_close(first, new_B.T @ G)
    torch.testing.assert_close(second, turn.T.square() @ (old_B.T @ G).square())


def test_moments_of_directions_that_were_there_are_kept_and_others_begin_at_the_mean() -> None:
    basis = torch.linalg.qr(torch.randn(30, 6, generator=generator()).double())[0]
    zeros = project_moments(torch.zeros(2, 7), torch.zeros(2, 7), basis[:, :2].float(), torch.zeros(30, 2))
    assert not any(moment.any() for moment in zeros)  # after a restart the old directions are zero
    old, new = basis[:, :4], basis[:, [2, 0, 4, 5]]
    first, second = torch.randn(4, 7).double(), torch.rand(4, 7).double()
    moved_first, moved_second = project_moments(first, second, new, old)
    torch.testing.assert_close(moved_first, torch.cat([first[[2, 0]], torch.zeros(2, 7).double()]))
    torch.testing.assert_close(moved_second[:2], second[[2, 0]])
    torch.testing.assert_close(moved_second[2:], second.mean(0).expand(2, 7))


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("method", ["subspace", "robust-subspace"])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_draws_do_not_change_the_function(
    model: PreTrainedModel, batch: dict[str, Tensor], method: Any, directions: str
) -> None:
    """With trained factors and a sparse part, which stays what it is."""
    model.float()
    before = model(**batch).logits
    rosa_ds.inject(model, AdapterConfig(method=method, rank=3, density=0.05), seed=1, draw=DrawSettings())
    assert relative_rms(model(**batch).logits, before) < 1e-5
    if method == "robust-subspace":
        rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    with torch.no_grad():
        for layer in rosa_ds.adapted_layers(model).values():
            for part in (layer.A, layer.B, layer.values):
                if part is not None:
                    part += 0.05 * torch.randn(part.shape, generator=generator(2))
    before = model(**batch).logits
    values = {
        name: layer.values.detach().clone()
        for name, layer in rosa_ds.adapted_layers(model).items()
        if layer.values is not None
    }
    factors = {name: layer.A.detach().clone() for name, layer in rosa_ds.adapted_layers(model).items()}
    for number in range(1, 4):
        rosa_ds.draw(model, directions=directions, seed=1, number=number)
    assert relative_rms(model(**batch).logits, before) < 1e-5
    for name, layer in rosa_ds.adapted_layers(model).items():
        assert not torch.allclose(layer.A, factors[name])
        if name in values:
            assert torch.equal(layer.values, values[name])
    merged = rosa_ds.merge(model)
    assert relative_rms(merged(**batch).logits, before) < 1e-5


def test_gradients_are_those_of_the_dense_factors(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Every gradient, float64, against autograd through ``W + B A`` put together densely."""
    plain = copy.deepcopy(model)
    rosa_ds.inject(model, AdapterConfig(method="subspace", rank=3), seed=4)
    model(**batch).loss.backward()
    factors = {}
    for name, layer in rosa_ds.adapted_layers(model).items():
        A, B = (p.detach().double().requires_grad_() for p in (layer.A, layer.B))
        weight = plain.get_submodule(name).weight
        rest = layer.weight.detach()
        delta = (B @ A).T if layer.transposed else B @ A
        module = plain.get_submodule(name)
        del module._parameters["weight"]
        module.weight = rest + delta
        torch.testing.assert_close(module.weight.detach(), weight.detach(), atol=1e-6, rtol=1e-6)
        factors[name] = (A, B)
    plain(**batch).loss.backward()
    for name, layer in rosa_ds.adapted_layers(model).items():
        for found, expected in zip((layer.A, layer.B), factors[name], strict=True):
            assert relative_rms(found.grad, expected.grad) < 1e-6, name


def test_a_saved_adapter_brings_its_base(model: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    rosa_ds.inject(model, AdapterConfig(method="subspace", rank=3), seed=4)
    with torch.no_grad():
        for layer in rosa_ds.adapted_layers(model).values():
            layer.B += 0.1
    rosa_ds.draw(model, seed=4, number=1)
    rosa_ds.save_adapter(model, tmp_path / "adapter")
    rosa_ds.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(**batch).logits, model(**batch).logits)


def test_each_draw_takes_new_directions(llama: PreTrainedModel) -> None:
    """Without a number, too; the same number gives the same ones."""
    llama.float()
    rosa_ds.inject(llama, AdapterConfig(method="subspace", rank=3), seed=1)
    layer = rosa_ds.adapted_layers(llama)["model.layers.0.mlp.up_proj"]
    B = layer.B.detach()
    seen = [B.clone()]
    for _ in range(3):
        rosa_ds.draw(llama, seed=1)
        shared = [float((B.T @ other).square().sum()) / 3 for other in seen]
        assert max(shared) < 0.9, shared
        seen.append(B.clone())
    rosa_ds.draw(llama, seed=1, number=3)
    assert float((B.T @ seen[3]).square().sum()) / 3 > 0.999


def test_a_magnitude_mask_sees_the_whole_matrix(model: PreTrainedModel) -> None:
    plain = copy.deepcopy(model)
    config = {"rank": 8, "density": 0.1}
    rosa_ds.inject(model, AdapterConfig(method="robust-subspace", **config), draw=DrawSettings(directions="top"))
    rosa_ds.inject(plain, AdapterConfig(method="robust", **config))
    found, expected = (rosa_ds.compute_mask(m, [], score="magnitude") for m in (model, plain))
    for name, positions in expected.items():
        shared = len(set(positions.tolist()) & set(found[name].tolist()))
        assert shared >= 0.99 * len(positions), name


def test_a_layer_of_rank_0_is_not_drawn(llama: PreTrainedModel, batch: dict[str, Tensor], tmp_path: Path) -> None:
    base = copy.deepcopy(llama)
    config = AdapterConfig(method="robust-subspace", rank=3, density=0.05, rank_pattern={"k_proj": 0})
    rosa_ds.inject(llama, config)
    rosa_ds.draw(llama)
    rosa_ds.save_adapter(llama, tmp_path / "adapter")
    rosa_ds.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(**batch).logits, llama(**batch).logits)


def test_a_refused_injection_changes_nothing(llama: PreTrainedModel) -> None:
    before = [type(module) for module in llama.modules()]
    with pytest.raises(ValueError, match="takes all 16 directions"):
        rosa_ds.inject(llama, AdapterConfig(method="subspace", rank=2, rank_pattern={r"1.*v_proj": 16}))
    with torch.device("meta"):
        empty = type(llama)(llama.config)
    with pytest.raises(ValueError, match="inject it with draw=None"):
        rosa_ds.inject(empty, AdapterConfig(method="subspace", rank=2))
    assert [type(module) for module in llama.modules()] == before
    assert not rosa_ds.adapted_layers(empty)
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_what_cannot_be_drawn(llama: PreTrainedModel) -> None:
    config = AdapterConfig(method="subspace", rank=16, rank_pattern={"k_proj": 40})
    with pytest.raises(ValueError, match=r"rank 40 of model\.layers\.0\.self_attn\.k_proj takes all 16 directions"):
        rosa_ds.inject(copy.deepcopy(llama), config)
    with pytest.raises(ValueError, match="injected with one of the methods robust-subspace, subspace"):
        rosa_ds.draw(llama)
    rosa_ds.inject(llama, AdapterConfig(method="lora", rank=2))
    with pytest.raises(ValueError, match="this one has lora"):
        rosa_ds.draw(llama)
    for every in ("often", "0 steps", "1.5 epochs", "-3 steps"):
        with pytest.raises(ValueError, match=r"100 steps"):
            DrawSettings(every=every)
    assert [DrawSettings(every=text).steps(30) for text in ("7 steps", "1 step", "2 epochs", "never")] == [7, 1, 60, 0]
    with pytest.raises(ValueError, match="checkpoint.format deepspeed leaves out the base"):
        RunConfig(method="subspace", checkpoint={"format": "deepspeed"})


def test_orthonormality_is_really_looked_at() -> None:
    basis = torch.linalg.qr(torch.randn(20, 4, generator=generator()))[0]
    assert subspace._defect(basis) < 1e-6
    assert subspace._defect(basis * 1.001) > subspace.ORTHONORMAL
    assert subspace._defect(basis * float("nan")) == float("inf")

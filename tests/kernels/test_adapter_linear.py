"""The fused layer: output and every gradient against dense autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rosa_kernels
from rosa_kernels.adapter_linear.reference import adapter_linear_reference
from rosa_kernels.low_rank.dropout import dropout_factors
from rosa_kernels.testing import CASES, assert_rel_close, random_positions

PARTS = ("low-rank", "sparse", "both", "neither")


def make(case: tuple[int, int, int, float, str], dtype: torch.dtype, parts: str) -> dict[str, Any]:
    tokens, rows, columns, density, _ = case
    generator = torch.Generator().manual_seed(0)
    rank = 3
    one_sign = case[:3] == (1, 1, 1)  # a single number in which terms cancel has no relative bound

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return (numbers.abs() if one_sign else numbers).to(dtype).requires_grad_()

    positions = random_positions(rows, columns, density)
    given: dict[str, Any] = {
        "x": leaf(tokens, columns),
        "weight": leaf(rows, columns, scale=columns**-0.5).detach(),
        "bias": leaf(rows),
    }
    if parts in ("low-rank", "both"):
        given |= {"A": leaf(rank, columns, scale=columns**-0.5), "B": leaf(rows, rank), "scale": 0.7}
    if parts in ("sparse", "both"):
        given |= {"values": leaf(positions.numel()), "positions": positions}
    return given


def run(
    function: Any, given: dict[str, Any], names: dict[str, str] | None = None, rounded_to: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """Output and gradients of all leaves, by name; the upstream gradient holds numbers of ``rounded_to``."""
    names = names or {}
    y = function(**{names.get(key, key): value for key, value in given.items()})
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(rounded_to).view(y.shape).to(y.dtype)
    leaves = {key: value for key, value in given.items() if torch.is_tensor(value) and value.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


REFERENCE_NAMES = {
    "weight": "weight_NM",
    "bias": "bias_N",
    "A": "A_RM",
    "B": "B_NR",
    "values": "values_Z",
    "positions": "positions_Z",
}


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().double().requires_grad_(value.requires_grad)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for key, value in given.items()
    }


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[-1])
def test_output_and_every_gradient(case: tuple[int, int, int, float, str], dtype: torch.dtype, parts: str) -> None:
    given = make(case, dtype, parts)
    expected = run(adapter_linear_reference, in_float64(given), REFERENCE_NAMES, dtype)
    actual = run(rosa_kernels.adapter_linear, given, rounded_to=dtype)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == dtype
        assert_rel_close(name, value, expected[name], dtype, terms=max(case[:3]))


@pytest.mark.parametrize("parts", PARTS)
def test_transposed_weight(parts: str) -> None:
    given = make(CASES[2], torch.float64, parts)
    rows, columns = given["weight"].shape
    expected = run(adapter_linear_reference, given, REFERENCE_NAMES)
    turned = dict(given, weight=given["weight"].T.contiguous(), transposed=True)
    order = None
    if "positions" in given:
        flat = given["positions"].long()
        turned_positions = (flat % columns) * rows + flat // columns
        order = turned_positions.argsort()
        turned["positions"] = turned_positions[order].to(torch.int32)
        turned["values"] = given["values"].detach()[order].requires_grad_()
    actual = run(rosa_kernels.adapter_linear, turned)
    for name, value in actual.items():
        wanted = expected[name][order] if name == "values" else expected[name]
        assert_rel_close(name, value, wanted, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_separate_sparse_product(transposed: bool, dtype: torch.dtype) -> None:
    given = make(CASES[2], dtype, "both")
    expected = run(adapter_linear_reference, in_float64(given), REFERENCE_NAMES, dtype)
    given |= {"sparse_product": "separate", "transposed": transposed}
    order = torch.arange(given["positions"].numel())
    if transposed:
        rows, columns = given["weight"].shape
        flat = given["positions"].long()
        flat = (flat % columns) * rows + flat // columns
        order = flat.argsort()
        given |= {"weight": given["weight"].T.contiguous(), "positions": flat[order].to(torch.int32)}
        given["values"] = given["values"].detach()[order].requires_grad_()
    actual = run(rosa_kernels.adapter_linear, given, rounded_to=dtype)
    for name, value in actual.items():
        wanted = expected[name][order] if name == "values" else expected[name]
        assert_rel_close(name, value, wanted, dtype, terms=65)


def test_separate_product_sees_values_that_a_16_bit_weight_rounds_away() -> None:
    x, weight = torch.ones(1, 4, dtype=torch.bfloat16), torch.full((1, 4), 0.5, dtype=torch.bfloat16)
    positions, values = torch.arange(4, dtype=torch.int32), torch.full((4,), 2**-10)
    written = rosa_kernels.adapter_linear(x, weight, values=values, positions=positions)
    separate = rosa_kernels.adapter_linear(
        x, torch.cat([weight[:, :2], -weight[:, 2:]], 1), values=values, positions=positions, sparse_product="separate"
    )
    assert written.item() == 2.0  # 0.5 + 2^-10 is 0.5 in bfloat16
    assert separate.item() == 2**-8


@pytest.mark.parametrize("sparse_product", ["scatter", "separate"])
def test_dequantised_base(sparse_product: str) -> None:
    """The stored form is dequantised in forward and again in backward, and never changed."""
    given = make(CASES[0], torch.float32, "both")
    scale = given["weight"].abs().amax() / 127
    stored = (given["weight"] / scale).round().to(torch.int8)
    before, calls = stored.clone(), []

    def dequantize(weight: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return weight.float() * scale

    expected = run(adapter_linear_reference, in_float64(given | {"weight": stored * scale}), REFERENCE_NAMES)
    given |= {"weight": stored, "dequantize": dequantize, "sparse_product": sparse_product}
    for name, value in run(rosa_kernels.adapter_linear, given).items():
        assert_rel_close(name, value, expected[name], torch.float32)
    assert len(calls) == 2
    assert torch.equal(stored, before)


def test_no_gradient_where_none_is_needed() -> None:
    given = make(CASES[0], torch.float64, "both")
    for name in ("x", "A", "values"):
        given[name] = given[name].detach()
    actual, expected = run(rosa_kernels.adapter_linear, given), run(adapter_linear_reference, given, REFERENCE_NAMES)
    assert actual.keys() == expected.keys() == {"y", "bias", "B"}
    for name, value in actual.items():
        assert_rel_close(name, value, expected[name], torch.float64)


def test_gradcheck() -> None:
    given = make(CASES[0], torch.float64, "both")
    keys = ("x", "bias", "A", "B", "values")

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        return rosa_kernels.adapter_linear(**(given | dict(zip(keys, leaves, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(given[key] for key in keys))


def test_a_second_derivative_is_refused() -> None:
    given = make(CASES[0], torch.float64, "both")
    y = rosa_kernels.adapter_linear(**given)
    (grad,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_plan_of_another_matrix_is_refused() -> None:
    given = make(CASES[0], torch.float32, "both")
    given["plan"] = rosa_kernels.make_plan(given["positions"], 20, 12, torch.float32)
    with pytest.raises(ValueError, match=r"the plan is of a \(20, 12\) matrix, the weight \(12, 20\)"):
        rosa_kernels.adapter_linear(**given)


def test_three_dimensions_and_float32_parts_on_a_16_bit_base() -> None:
    given = make((6, 12, 20, 0.2, ""), torch.float32, "both")
    given |= {"x": given["x"].detach().view(2, 3, 20).bfloat16().requires_grad_(), "weight": given["weight"].bfloat16()}
    given["bias"] = given["bias"].detach().bfloat16()
    actual = run(rosa_kernels.adapter_linear, given, rounded_to=torch.bfloat16)
    expected = run(adapter_linear_reference, in_float64(given), REFERENCE_NAMES, torch.bfloat16)
    assert actual["y"].shape == (2, 3, 12)
    for name, value in actual.items():
        assert value.dtype == given[name].dtype if name != "y" else value.dtype == torch.bfloat16
        assert_rel_close(name, value, expected[name], torch.bfloat16)


def test_saves_one_input_and_leaves_the_weight_alone() -> None:
    given = make(CASES[0], torch.float32, "both")
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    before = given["weight"].clone()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = rosa_kernels.adapter_linear(**given, dropout=0.5)
    assert [tensor.shape for tensor in saved] == [given["x"].shape, (given["x"].shape[0], given["A"].shape[0])]
    y.sum().backward()
    assert torch.equal(given["weight"], before)


def test_values_sleep_without_positions() -> None:
    given = make(CASES[0], torch.float64, "both")
    del given["positions"]
    without = {key: value for key, value in given.items() if key != "values"}
    actual, expected = run(rosa_kernels.adapter_linear, given), run(rosa_kernels.adapter_linear, without)
    assert torch.equal(actual.pop("values"), torch.zeros_like(given["values"]))
    for name, value in actual.items():
        assert torch.equal(value, expected[name])


def test_collect_gives_the_dense_gradient() -> None:
    given = make(CASES[0], torch.float64, "both")
    seen: list[torch.Tensor] = []
    y = rosa_kernels.adapter_linear(**given, collect=lambda grad, x: seen.append(grad.T @ x))
    y.square().sum().backward()
    dense = in_float64(given)
    dense["weight"].requires_grad_()
    y = adapter_linear_reference(**{REFERENCE_NAMES.get(key, key): value for key, value in dense.items()})
    y.square().sum().backward()
    assert_rel_close("weight", seen[0], dense["weight"].grad, torch.float64)


def test_dropout_is_the_same_in_backward() -> None:
    given = make((64, 12, 20, 0.2, ""), torch.float64, "low-rank")
    torch.manual_seed(5)
    actual = run(lambda **arguments: rosa_kernels.adapter_linear(**arguments, dropout=0.25), given)
    torch.manual_seed(5)
    factors = dropout_factors(given["x"], 0.25, int(torch.randint(2**62, (1,))))
    assert factors is not None

    def reference(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias) + scale * ((x * factors) @ A.T @ B.T)

    expected = run(reference, given)
    for name, value in actual.items():
        assert_rel_close(name, value, expected[name], torch.float64)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_dropout_rate_and_scale(probability: float) -> None:
    x = torch.ones(400, 501)
    factors = dropout_factors(x, probability, 3)
    assert factors is not None
    assert torch.equal(factors, dropout_factors(x, probability, 3))
    assert not torch.equal(factors, dropout_factors(x, probability, 4))
    dropped = float((factors == 0).double().mean())
    # four standard deviations of the share of 200,400 independent entries
    assert abs(dropped - probability) < 4 * (probability * (1 - probability) / x.numel()) ** 0.5
    assert float(factors.max()) == pytest.approx(1 / (1 - probability), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 5)}, "x has 5 features, the weight takes 20"),
        ({"x": torch.ones(2, 20).double()}, "cast one of them"),
        ({"A": None}, "A and B belong together"),
        ({"A": torch.ones(3, 7)}, "do not fit a layer of 20 to 12 features"),
        ({"values": None}, "positions without values"),
        ({"sparse_product": "both"}, "is scatter or separate, given 'both'"),
    ],
    ids=["features", "dtype", "half a pair", "shape", "values", "product"],
)
def test_rejects(change: dict[str, Any], message: str) -> None:
    given = make(CASES[0], torch.float32, "both") | change
    with pytest.raises(ValueError, match=message):
        rosa_kernels.adapter_linear(**given)

"""Every Triton kernel against float64: compiled on a GPU with ``-m gpu``, and in Triton's interpreter otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rosa_kernels
from rosa_kernels import limits
from rosa_kernels.dispatch import on_device_of
from rosa_kernels.low_rank import op as low_rank
from rosa_kernels.low_rank import triton_kernel as low_rank_code
from rosa_kernels.low_rank.reference import backward_reference, down_reference
from rosa_kernels.pattern import triton_kernel as columns_code
from rosa_kernels.pattern.csr import CompactPlan
from rosa_kernels.pattern.plan import Plan
from rosa_kernels.pattern.tiles import TILE, TilePlan, tile_plan
from rosa_kernels.scatter.reference import scatter_add_reference
from rosa_kernels.sddmm import triton_kernel as sddmm_code
from rosa_kernels.sddmm.reference import sddmm_reference
from rosa_kernels.spmm.reference import spmm_reference
from rosa_kernels.testing import CASES, assert_rel_close, random_positions

pytestmark = pytest.mark.gpu(or_interpreter=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Case = tuple[int, int, int, float, str]


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROSA_KERNELS", "triton")


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def clustered_positions(rows: int, columns: int, density: float) -> Tensor:
    """A mask as training finds them: some rows and columns hold most entries, many hold none."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(rows, generator=generator).pow(6)[:, None] * torch.rand(columns, generator=generator).pow(6)
    score = (weight * torch.rand(rows, columns, generator=generator)).flatten()
    return score.topk(max(1, round(score.numel() * density))).indices.sort().values.to(torch.int32).to(DEVICE)


@pytest.mark.parametrize("least", [0, 100, 10**9], ids=["all tiles", "both", "all gathered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sddmm_with_a_plan(dtype: torch.dtype, least: int) -> None:
    grad, x = randn(150, 200, dtype=dtype), randn(150, 300, dtype=dtype, seed=1)
    positions = clustered_positions(200, 300, 0.02)
    plan = tile_plan(positions, 200, 300, dtype, least)
    assert (plan.heavy_entries == 0, plan.heavy_entries == plan.entries) == (least == 10**9, least == 0)
    values = rosa_kernels.sddmm(grad, x, positions, plan)
    assert values.dtype == torch.float32
    assert_rel_close("values", values, sddmm_reference(grad.double(), x.double(), positions), torch.float32, terms=150)


@pytest.mark.parametrize(
    "plan_of", [tile_plan, rosa_kernels.make_plan, lambda *given: None], ids=["tiles", "plan", "no plan"]
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[-1])
def test_sddmm_shapes(case: Case, dtype: torch.dtype, plan_of: Callable[..., Plan | None]) -> None:
    tokens, rows, columns, density, _ = case
    grad, x = randn(tokens, rows, dtype=dtype), randn(tokens, columns, dtype=dtype, seed=1)
    positions = random_positions(rows, columns, density).to(DEVICE)
    values = rosa_kernels.sddmm(grad, x, positions, plan_of(positions, rows, columns, dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert values.dtype == wide
    assert_rel_close("values", values, sddmm_reference(grad.double(), x.double(), positions), wide, terms=tokens)


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no plan"])
def test_sddmm_splits_and_blocks_of_tokens_add_up(planned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(limits, "LEAST_TOKENS", 300)
    grad, x = randn(700, 70, dtype=torch.float32), randn(700, 90, dtype=torch.float32, seed=1)
    positions = clustered_positions(70, 90, 0.05)
    plan = tile_plan(positions, 70, 90, torch.float32) if planned else None
    values = rosa_kernels.sddmm(grad, x, positions, plan)
    expected = sddmm_reference(grad.double(), x.double(), positions)
    assert_rel_close("values", values, expected, torch.float32, terms=700)
    assert torch.equal(values, rosa_kernels.sddmm(grad, x, positions, plan))


def test_sddmm_strides_wide_positions_and_nothing_to_do() -> None:
    wide, tall = randn(40, 60, dtype=torch.bfloat16), randn(50, 40, dtype=torch.bfloat16, seed=1)
    grad, x = wide[:, ::2], tall.T  # (40, 30) and (40, 50)
    positions = random_positions(30, 50, 0.3).to(DEVICE).long()
    expected = sddmm_reference(grad.double(), x.double(), positions)
    planned = [make(positions, 30, 50, torch.bfloat16) for make in (tile_plan, rosa_kernels.make_plan)]
    for plan in (None, *planned):
        assert_rel_close("values", rosa_kernels.sddmm(grad, x, positions, plan), expected, torch.float32)
    none = positions[:0]
    assert rosa_kernels.sddmm(grad, x, none, rosa_kernels.make_plan(none, 30, 50, torch.bfloat16)).shape == (0,)
    assert not rosa_kernels.sddmm(grad[:0], x[:0], positions).any()


@pytest.mark.parametrize("code", [sddmm_code.sddmm_gather_kernel, columns_code.gather_columns_kernel])
def test_examples_of_the_docstrings(code: object) -> None:
    grad, x = torch.tensor([[1.0, 2.0]], device=DEVICE), torch.tensor([[3.0, 4.0, 5.0]], device=DEVICE)
    if code is sddmm_code.sddmm_gather_kernel:
        positions = torch.tensor([2, 3], dtype=torch.int32, device=DEVICE)
        assert rosa_kernels.sddmm(grad, x, positions).tolist() == [5.0, 6.0]
    else:
        order = torch.tensor([2, 0, -1], dtype=torch.int32, device=DEVICE)
        assert columns_code.gather_columns(x, order).tolist() == [[5.0, 3.0, 0.0]]


@pytest.mark.parametrize("limit", [columns_code.SHARED_ROW_BYTES, 0], ids=["shared memory", "cache"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_columns(dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_code, "SHARED_ROW_BYTES", limit)
    source = randn(77, 5, dtype=dtype).T  # strided
    order = torch.tensor([3, -1, 76, 0, 3], dtype=torch.int32, device=DEVICE)
    expected = source[:, order.clamp_min(0).long()] * (order >= 0)
    assert torch.equal(columns_code.gather_columns(source, order), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[-1])
def test_scatter(case: Case, dtype: torch.dtype) -> None:
    _, rows, columns, density, _ = case
    weight, positions = randn(rows, columns, dtype=dtype), random_positions(rows, columns, density).to(DEVICE)
    values = randn(positions.numel(), dtype=torch.float32, seed=2)
    before = weight.clone()
    old = rosa_kernels.scatter_add_into(weight, values, positions)
    assert torch.equal(weight, scatter_add_reference(before, values, positions))
    assert torch.equal(old, before.flatten()[positions.long()])
    rosa_kernels.restore_into(weight, old, positions)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, (100, 150, 200, 0.02, "several tiles")], ids=lambda case: case[-1])
def test_spmm(case: Case, dtype: torch.dtype, transpose: bool) -> None:
    tokens, rows, columns, density, why = case
    make = clustered_positions if why == "several tiles" else random_positions
    positions = make(rows, columns, density).to(DEVICE)
    values = randn(positions.numel(), dtype=torch.float32, seed=2)
    if positions.numel() == 1:
        values = values.abs()
    x = randn(tokens, rows if transpose else columns, dtype=dtype)
    y = randn(tokens, columns if transpose else rows, dtype=dtype, seed=1)
    expected = y.double() + spmm_reference(x.double(), values.double(), positions, (rows, columns), transpose)
    plan = rosa_kernels.make_plan(positions, rows, columns, dtype)
    rosa_kernels.spmm_add_into(y, x, values, positions, (rows, columns), transpose, plan)
    assert_rel_close("y", y, expected, dtype, terms=max(rows, columns))


def test_spmm_in_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(limits, "LEAST_TOKENS", 32)
    positions = clustered_positions(70, 90, 0.05)
    x, y = randn(75, 90, dtype=torch.float32), randn(75, 70, dtype=torch.float32, seed=1)
    values = randn(positions.numel(), dtype=torch.float32, seed=2)
    expected = y.double() + spmm_reference(x.double(), values.double(), positions, (70, 90), False)
    plan = rosa_kernels.make_plan(positions, 70, 90, torch.float32)
    rosa_kernels.spmm_add_into(y, x, values, positions, (70, 90), plan=plan)
    assert_rel_close("y", y, expected, torch.float32)


@pytest.mark.parametrize(("tokens", "features", "rank"), [(70, 150, 3), (1, 1, 1), (300, 40, 20), (33, 257, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_with_dropout(dtype: torch.dtype, tokens: int, features: int, rank: int) -> None:
    probability, seed = 0.25, torch.tensor([2**61 + 7])
    one = torch.ones(tokens, 1, dtype=torch.float32, device=DEVICE)
    factors = torch.zeros(tokens, features, device=DEVICE)  # backward's own: grad_h = A = 1 adds the factors to 0
    low_rank.backward(factors, one, factors.clone(), torch.ones_like(factors[:1]), probability, seed)
    kept = factors != 0
    assert torch.allclose(factors[kept], torch.tensor(1 / 0.75, device=DEVICE))
    if tokens * features > 5000:
        assert abs(kept.double().mean() - 0.75) < 4 * (0.1875 / kept.numel()) ** 0.5
    x, A = randn(tokens, features, dtype=dtype), randn(rank, features, dtype=dtype, seed=1)
    grad_h, grad_x = randn(tokens, rank, dtype=dtype, seed=2), randn(tokens, features, dtype=dtype, seed=3)
    wide = [tensor.double() for tensor in (grad_h, x, A, factors)]
    more, expected_A = backward_reference(*wide)
    expected_x = grad_x.double() + more
    h = low_rank.down(x, A, probability, seed)
    assert_rel_close("h", h, down_reference(wide[1], wide[2], wide[3]), dtype, terms=features)
    grad_A = low_rank.backward(grad_x, grad_h, x, A, probability, seed)
    assert grad_A.dtype == dtype
    assert_rel_close("grad_A", grad_A, expected_A, dtype, terms=tokens)
    assert_rel_close("grad_x", grad_x, expected_x, dtype, terms=rank)
    assert torch.equal(grad_A, low_rank.backward(None, grad_h, x, A, probability, seed))


def test_plan_of_a_known_mask() -> None:
    rows, columns = 200, 130
    dense = torch.zeros(rows, columns, dtype=torch.bool)
    dense[7, ::2] = True  # a row of 65
    dense[::50, 129] = True  # and a column of 4
    positions = dense.flatten().nonzero().squeeze(1).to(torch.int32).to(DEVICE)
    plan = tile_plan(positions, rows, columns, torch.bfloat16)
    assert plan.row_order[:5].tolist() == [7, 0, 50, 100, 150]
    assert plan.row_order[5:].tolist() == [-1] * (TILE - 5)
    assert plan.column_order[:2].tolist() == [129, 0]
    # one block of rows; the 66 columns are two blocks: 67 entries, and 2 that are not worth a tile
    assert plan.tiles.tolist() == [[0, 0], [0, 1]]
    assert plan.starts.tolist() == [0, 67, 69]
    assert (plan.heavy, plan.heavy_entries, plan.heavy_blocks) == (1, 67, (1, 1))
    assert plan.slots.sort().values.tolist() == list(range(69))
    tile, row, column = plan.cells // TILE**2, plan.cells // TILE % TILE, plan.cells % TILE
    blocks = plan.tiles[tile.long()].long()
    there = plan.row_order[blocks[:, 0] * TILE + row] * columns + plan.column_order[blocks[:, 1] * TILE + column]
    assert torch.equal(there, positions[plan.slots.long()])


def test_cells_beyond_int32_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "iinfo", lambda dtype: type("Info", (), {"max": 10}))
    with pytest.raises(ValueError, match="spreads over too many tiles"):
        tile_plan(torch.tensor([0, 100], dtype=torch.int32), 20, 20, torch.float32)


@pytest.mark.parametrize("sparse_product", ["scatter", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_layer_agrees_with_torch(
    dtype: torch.dtype, sparse_product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = clustered_positions(80, 70, 0.05)

    def run(dropout: float) -> dict[str, Tensor]:
        given = {"x": randn(2, 9, 70, dtype=dtype), "A": randn(4, 70, dtype=torch.float32, seed=1)}
        given |= {"B": randn(80, 4, dtype=torch.float32, seed=2)}
        given["values"] = randn(positions.numel(), dtype=torch.float32, seed=3)
        for tensor in given.values():
            tensor.requires_grad_()
        torch.manual_seed(0)
        y = rosa_kernels.adapter_linear(
            weight=randn(80, 70, dtype=dtype, seed=4),
            positions=positions,
            plan=rosa_kernels.make_plan(positions, 80, 70, dtype),
            sparse_product=sparse_product,
            dropout=dropout,
            **given,
        )
        grads = torch.autograd.grad(y, list(given.values()), randn(2, 9, 80, dtype=dtype, seed=5))
        return {"y": y.detach()} | dict(zip(given, grads, strict=True))

    actual, dropped = run(0.0), run(0.5)
    seed = torch.Generator().manual_seed(0)
    seed_of_run = torch.randint(2**62, (1,), generator=seed)
    factors = torch.zeros(18, 70, device=DEVICE)
    low_rank.backward(
        factors, torch.ones_like(factors[:, :1]), factors.clone(), torch.ones_like(factors[:1]), 0.5, seed_of_run
    )
    monkeypatch.setenv("ROSA_KERNELS", "torch")
    expected = run(0.0)
    for name, value in actual.items():
        assert_rel_close(name, value, expected[name], torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, 80)
    x, A, B = (
        randn(18, 70, dtype=dtype).double(),
        *(randn(*size, dtype=torch.float32, seed=i).double() for i, size in ((1, (4, 70)), (2, (80, 4)))),
    )
    g = randn(2, 9, 80, dtype=dtype, seed=5).double().view(18, 80)
    more, grad_A = backward_reference(g @ B, x, A, factors.double())
    less, grad_A_kept = backward_reference(g @ B, x, A, torch.ones_like(factors).double())
    h, h_kept = (down_reference(x, A, f) for f in (factors.double(), torch.ones_like(factors).double()))
    changes = {
        "y": (h - h_kept) @ B.T,
        "x": more - less,
        "A": grad_A - grad_A_kept,
        "B": g.T @ (h - h_kept),
        "values": torch.zeros_like(expected["values"]),
    }
    for name, change in changes.items():
        wanted = expected[name].double() + change.view_as(expected[name])
        assert_rel_close(
            f"dropped {name}", dropped[name], wanted, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, 800
        )


def test_plan_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    x = randn(3, 4, dtype=torch.float32)
    plan = rosa_kernels.make_plan(positions, 4, 4, torch.float32)
    assert isinstance(plan, TilePlan)
    assert plan.device.type == DEVICE
    expected = rosa_kernels.sddmm(x, x, positions, plan)
    monkeypatch.setenv("ROSA_KERNELS", "torch")
    assert torch.allclose(rosa_kernels.sddmm(x, x, positions, plan), expected)  # torch has no use for tiles
    compact = rosa_kernels.make_plan(positions, 4, 4, torch.float32)
    assert isinstance(compact, CompactPlan)
    monkeypatch.setenv("ROSA_KERNELS", "sddmm=torch,spmm=triton")
    assert isinstance(rosa_kernels.make_plan(positions, 4, 4, torch.float32), TilePlan)
    monkeypatch.setenv("ROSA_KERNELS", "triton")
    with pytest.raises(ValueError, match="a CompactPlan of 2 entries .* under the same ROSA_KERNELS"):
        rosa_kernels.sddmm(x, x, positions, compact)
    with pytest.raises(ValueError, match="a CompactPlan of 2 entries"):
        rosa_kernels.adapter_linear(
            x, torch.ones_like(x[:1]).expand(4, 4).clone(), values=expected, positions=positions, plan=compact
        )


def test_entries_that_are_not_contiguous() -> None:
    positions = torch.tensor([0, 9, 2, 9, 5, 9], dtype=torch.int32, device=DEVICE)[::2]
    grad, x = randn(3, 2, dtype=torch.float32), randn(3, 4, dtype=torch.float32, seed=1)
    expected = sddmm_reference(grad.double(), x.double(), positions)
    assert_rel_close("values", rosa_kernels.sddmm(grad, x, positions), expected, torch.float32)
    weight, values = torch.zeros(2, 4, device=DEVICE), torch.ones((), device=DEVICE).expand(3)
    old = rosa_kernels.scatter_add_into(weight, values, positions)
    assert weight.flatten().tolist() == [1, 0, 1, 0, 0, 1, 0, 0]
    rosa_kernels.restore_into(weight, torch.stack([old, old + 7], 1)[:, 0], positions)
    assert not weight.any()


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must lie on one device, given \['cpu', 'meta'\]"):
        on_device_of(torch.ones(1), None, torch.ones(1, device="meta"))


def test_spmm_in_triton_needs_a_plan() -> None:
    y = x = randn(3, 4, dtype=torch.float32)
    positions = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="takes a plan .* given torch.float32 without a plan"):
        rosa_kernels.spmm_add_into(y, x, randn(2, dtype=torch.float32), positions, (4, 4))


@pytest.mark.parametrize(
    ("dtype", "parts"), [(torch.float32, [32] * 9 + [16]), (torch.bfloat16, [64] * 5)], ids=["float32", "bfloat16"]
)
def test_large_ranks_in_parts(dtype: torch.dtype, parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward of more ranks at once would spill registers in float32, and take five times as many instructions in 16 bits."""
    padded, blocks = [], low_rank_code.backward_launch

    def launch(itemsize: int, rank: int) -> dict[str, int]:
        padded.append(blocks(itemsize, rank)["RANK"])
        return blocks(itemsize, rank)

    monkeypatch.setattr(low_rank_code, "backward_launch", launch)
    monkeypatch.setattr(low_rank_code, "DOWN_RANKS", {2: 128, 4: 256})
    probability, seed = 0.25, torch.tensor([5])
    one = torch.ones(20, 1, dtype=torch.float32, device=DEVICE)
    factors = torch.zeros(20, 40, device=DEVICE)
    low_rank.backward(factors, one, factors.clone(), torch.ones_like(factors[:1]), probability, seed)
    x, A = randn(20, 40, dtype=dtype), randn(300, 40, dtype=dtype, seed=1)
    grad_h, grad_x = randn(20, 300, dtype=dtype, seed=2), randn(20, 40, dtype=dtype, seed=3)
    wide = [tensor.double() for tensor in (grad_h, x, A, factors)]
    more, expected_A = backward_reference(*wide)
    expected_x = grad_x.double() + more
    h = low_rank.down(x, A, probability, seed)
    assert h.is_contiguous()
    assert_rel_close("h", h, down_reference(wide[1], wide[2], wide[3]), dtype)
    grad_A = low_rank.backward(grad_x, grad_h, x, A, probability, seed)
    assert_rel_close("grad_A", grad_A, expected_A, dtype)
    assert_rel_close("grad_x", grad_x, expected_x, dtype)
    assert padded[1:] == parts

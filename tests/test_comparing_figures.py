"""The numbers behind a study's tables and pictures, against cases worked out by hand and by other means."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import rosa_ds
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.comparing.planned import PlannedRun
from rosa_ds.comparing.plots import lowest_by_value, mean_and_range, plot_losses, plot_masks, plot_metric
from rosa_ds.comparing.report import number, spread, table
from rosa_ds.comparing.results import Results, RunResult, choose_trials
from rosa_ds.comparing.statistics import Summary, compare_rows, compare_seeds, summarise
from rosa_ds.comparing.study import Study
from rosa_ds.comparing.updates import Changes, LayerMask, cumulated_shares, middle_layers, read_changes
from rosa_ds.config.methods import Method
from rosa_ds.config.schema import AdapterConfig, ModelSettings, RunConfig
from rosa_ds.models.load import identify, load_model


def test_mean_and_spread() -> None:
    assert summarise([1.0, 2.0, 3.0, 4.0]) == Summary(4, 2.5, pytest.approx(math.sqrt(5 / 3)))
    assert summarise([0.3]) == Summary(1, 0.3, None)


def test_paired_seeds_of_three() -> None:
    """Differences 1, 2, 3: t = 2 / (1 / √3) with two degrees of freedom, whose two-sided p is 1 - t / √(t² + 2)."""
    found = compare_seeds({1: 2.0, 2: 4.0, 3: 6.0, 9: 0.0}, {3: 3.0, 2: 2.0, 1: 1.0, 8: 5.0})
    assert found is not None
    assert found.differences == {1: 1.0, 2: 2.0, 3: 3.0}
    assert found.summary == Summary(3, 2.0, 1.0)
    t = 2 * math.sqrt(3)
    assert found.t_p == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-12)
    assert found.sign_p == pytest.approx(2 / 8)  # no other signs give as large a sum


def test_signs_are_tried_all() -> None:
    """3, 2 and -1 sum to 4; of the eight sums 6, 4, 2, 0, 0, -2, -4, -6 two are as large and two as small."""
    found = compare_seeds({1: 3.0, 2: 2.0, 3: -1.0}, {1: 0.0, 2: 0.0, 3: 0.0})
    assert found is not None
    assert found.sign_p == pytest.approx(4 / 8)


def test_p_values_need_three_pairs_and_a_spread() -> None:
    two = compare_seeds({1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.4, 3: 0.1})
    assert two is not None
    assert two.t_p is two.sign_p is None
    assert two.summary.mean == pytest.approx(0.15)
    alike = compare_seeds({1: 0.3, 2: 0.4, 3: 0.5}, {1: 0.2, 2: 0.3, 3: 0.4})  # equal but for rounding
    assert alike is not None
    assert alike.t_p is None
    assert alike.sign_p == pytest.approx(0.25)
    same = compare_seeds({1: 0.3, 2: 0.4, 3: 0.5}, {1: 0.3, 2: 0.4, 3: 0.5})
    assert same is not None
    assert same.t_p is same.sign_p is None
    assert compare_seeds({1: 0.5}, {2: 0.5}) is None


def test_rows_drawn_again_have_the_binomials_quantiles() -> None:
    """Right in 30 of 100 rows where the reference is in none: the mean of drawn rows is binomial."""
    ours = [1.0] * 30 + [0.0] * 70
    found = compare_rows({1: ours, 2: ours}, {1: [0.0] * 100, 2: [0.0] * 100})
    assert found is not None
    assert (found.rows, found.seeds) == (100, 2)
    assert found.mean == pytest.approx(0.3)
    low, high = stats.binom.ppf([0.025, 0.975], 100, 0.3) / 100
    assert found.low == pytest.approx(low, abs=0.0101)  # a step of the distribution
    assert found.high == pytest.approx(high, abs=0.0101)


def test_rows_keep_their_seeds() -> None:
    """What one seed wins on a row and the other loses is no difference of that row."""
    found = compare_rows({1: [1, 0, 1, 0], 2: [0, 1, 0, 1]}, {1: [0, 1, 0, 1], 2: [1, 0, 1, 0]})
    assert found is not None
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    single = compare_rows({1: [1]}, {1: [0]})
    assert single is not None
    assert (single.low, single.high) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"different numbers of rows"):
        compare_rows({1: [1, 0]}, {1: [1]})


POSITIONS = torch.tensor([0, 1, 2, 5, 9], dtype=torch.int32)  # of a (3, 4) matrix: three in row 0, one in rows 1 and 2


def test_where_a_masks_entries_lie() -> None:
    mask = LayerMask(POSITIONS, (3, 4))
    assert [count.tolist() for count in mask.counts] == [[3, 1, 1], [1, 3, 1, 0]]
    assert mask.empty_shares == (0.0, 0.25)
    assert cumulated_shares(mask.counts[1]).tolist() == pytest.approx([0.6, 0.8, 1.0, 1.0])
    assert mask.pooled().tolist() == [[1, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert mask.pooled(2).tolist() == [[1, 1], [1, 0]]


def test_layers_of_the_middle_block() -> None:
    names = [f"model.layers.{block}.{part}" for block in range(5) for part in ("q", "k", "v", "o", "down")]
    assert middle_layers(["model.embed", *names]) == ["model.layers.2.q", "model.layers.2.v", "model.layers.2.down"]
    assert middle_layers(["only"]) == ["only"]


@pytest.mark.parametrize("method", ["lora", "robust", "subspace", "full"])
def test_singular_values_are_those_of_the_merged_difference(method: Method, tmp_path: Path) -> None:
    model = load_model(ModelSettings(), torch.float32)
    layer = "model.layers.2.mlp.down_proj"
    before = model.get_parameter(f"{layer}.weight").detach().clone()
    rosa_ds.inject(model, AdapterConfig(method=method, rank=3, density=0.01), seed=0)
    generator = torch.Generator().manual_seed(0)
    if method == "robust":
        rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    rosa_ds.save_adapter(model, tmp_path / "adapter", identify(ModelSettings()))
    positions = {name: found.positions for name, found in adapted_layers(model).items()}
    rosa_ds.merge(model)
    difference = model.get_parameter(f"{layer}.weight").detach().double() - before.double()
    expected = np.linalg.svd(difference.numpy(), compute_uv=False)
    found = read_changes(tmp_path, [layer])
    assert found.singular_values[layer] == pytest.approx(expected / expected[0], abs=1e-5)  # merged in float32
    if method == "lora":
        assert found.singular_values[layer][3] < 1e-12  # the rank is exact where nothing is merged
    assert bool(found.masks) == (method == "robust")
    if found.masks:
        mask = found.masks[f"{layer}.weight"]
        assert mask.shape == tuple(before.shape)
        assert torch.equal(mask.positions, positions[layer])


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    model = load_model(ModelSettings(), torch.float32)
    rosa_ds.inject(model, AdapterConfig(method="lora", rank=1), seed=0)
    rosa_ds.save_adapter(model, tmp_path / "adapter", identify(ModelSettings()))
    layer = "model.layers.2.mlp.down_proj"
    assert read_changes(tmp_path, [layer]).singular_values == {}  # B is zero: nothing has changed
    with pytest.raises(ValueError, match=r"layers: model\.layers\.2\.down_proj is no layer of tiny\. Did you mean"):
        read_changes(tmp_path, ["model.layers.2.down_proj"])


LR = "adapter.low_rank_lr"


def _result(variant: str, seed: int, match: float, losses: list[float], **choice: float) -> RunResult:
    run = PlannedRun(variant, f"final-seed{seed}", seed, dict(choice), Path(f"{variant}{seed}"), {}, RunConfig(), "")
    curve = list(enumerate(losses, start=1))
    figures = {"exact_match": match, "validation loss": losses[-1]}
    return RunResult(run, "finished", trained=100 * seed, training=curve, evaluation=curve, figures=figures)


def _results() -> Results:
    study = Study(name="s", variants={"a": {}, "b": {}}, tune={LR: [0.1, 0.2]}, seeds=[1, 2])
    finals = [_result("a", 1, 0.2, [3, 1]), _result("a", 2, 0.4, [5, 2, 1]), _result("b", 1, 0.9, [4, 3])]
    trials = [
        _result("a", 1, 0, [2.0], **{LR: 0.1}),
        _result("a", 1, 0, [1.5], **{LR: 0.1}),
        _result("a", 1, 0, [3.0], **{LR: 0.2}),
        _result("b", 1, 0, [math.nan], **{LR: 0.2}),
    ]
    return Results(study, trials, finals)


def test_points_of_the_metric_plot() -> None:
    panel = plot_metric(_results(), "exact_match").axes[0]
    points = [scatter.get_offsets().tolist() for scatter in panel.collections]
    assert points[0] == [[100, 0.2], [200, 0.4]]
    assert points[1] == [[150, pytest.approx(0.3)]]
    assert points[2] == points[3] == [[100, 0.9]]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("trained parameters", "exact_match")


@pytest.mark.parametrize("count", [3, 16, 30])
def test_each_of_many_variants_has_a_color_of_its_own(count: int) -> None:
    names = [f"v{number}" for number in range(count)]
    study = Study(name="s", variants={name: {} for name in names}, seeds=[1])
    panel = plot_metric(Results(study, [], [_result(name, 1, 0.1, [1.0]) for name in names]), "exact_match").axes[0]
    colors = {tuple(scatter.get_facecolor()[0][:3]) for scatter in panel.collections}
    assert len(colors) == count
    legend = panel.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == names


def test_curves_are_means_at_common_steps() -> None:
    assert mean_and_range([[(1, 3.0), (2, 1.0)], [(1, 5.0), (2, 2.0), (3, 1.0)]]).tolist() == [
        [1, 4, 3, 5],
        [2, 1.5, 1, 2],
    ]
    assert mean_and_range([]).shape == (0, 4)
    training, evaluation = plot_losses(_results()).axes
    for panel in (training, evaluation):
        assert [line.get_ydata().tolist() for line in panel.lines] == [[4, 1.5], [4, 3]]
        assert [line.get_label() for line in panel.lines] == ["a", "b"]


def test_the_mask_plot_shows_mask_and_curves() -> None:
    changes = {"a": Changes({}, {"x.weight": LayerMask(POSITIONS, (3, 4))})}
    picture, rows, columns = plot_masks(changes, ["x"], {"a": "C0"}).axes
    assert picture.images[0].get_array().tolist() == [[1, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert picture.get_xlabel() == "0% of rows, 25% of columns empty"
    assert rows.lines[0].get_ydata().tolist() == pytest.approx([0.6, 0.8, 1.0])
    assert columns.lines[0].get_xdata().tolist() == [0.25, 0.5, 0.75, 1.0]


def test_a_trial_without_a_loss_is_never_chosen() -> None:
    results = _results()
    assert lowest_by_value(results.trials, LR) == [(0.1, 1.5), (0.2, 3.0)]
    tunings = choose_trials(results.study, results.trials)
    assert tunings["a"].best is results.trials[1]
    assert tunings["a"].edges == [LR]
    assert tunings["b"].best is None


def test_cells_of_tables() -> None:
    assert table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
    assert [number(value) for value in (None, math.inf, 0.123456, 1234.5, 1.8e-17)] == ["–", "–", "0.1235", "1234", "0"]
    assert spread(Summary(2, 0.5, 0.25)) == "0.5 ± 0.25"
    assert spread(Summary(1, 0.5, None)) == "0.5"

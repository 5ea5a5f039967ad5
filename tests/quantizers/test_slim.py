"""SliM-LLM: widths against brute force, the scale search against its own objective, one-bit groups with their mean."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.formats import QuantFormat
from cptquant.packing.quantized_weight import decode, encode
from cptquant.packing.segments import SegmentedWeight
from cptquant.quantizers.descent import Rounded
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.grid import fit_grid
from cptquant.quantizers.hessian_factor import factor_hessian
from cptquant.quantizers.salience import group_salience, salience
from cptquant.quantizers.slim import PUBLISHED, Slim
from cptquant.quantizers.slim_allocation import allocate_bits, widths_for
from cptquant.quantizers.slim_loop import SegmentLoop
from cptquant.quantizers.slim_scale import ScaleSearch, fit_scale, objective
from tests.quantizers.test_gptq import correlated_inputs, output_error

GROUP = 32


def layer(rows: int, groups: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Weights, Hessian and inputs of a layer whose groups of inputs differ a lot in size."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(groups, generator=generator).mul(4).exp().repeat_interleave(GROUP) / 20
    inputs = correlated_inputs(12 * GROUP * groups, GROUP * groups, seed) * size
    weight = torch.randn(rows, GROUP * groups, generator=generator) / GROUP**0.5
    return weight, inputs.t() @ inputs / len(inputs), list(inputs[:60].split(20))


# Salience


def test_salience_is_the_error_that_later_columns_cannot_take_back() -> None:
    """OBS: w^2 / U_jj^2 is the least error of setting column j to 0 with all later columns free."""
    weight, hessian, _ = layer(4, 2, seed=0)
    pivots = factor_hessian(hessian, 0.01, by_activation=False).pivots
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))).double()
    for column in (0, 17, 40, 63):
        later = slice(column + 1, None)
        cost = damped[column, column]
        if column + 1 < len(damped):
            cost = cost - damped[column, later] @ torch.linalg.solve(damped[later, later], damped[later, column])
        expected = weight[:, column].double().square() * cost
        torch.testing.assert_close(salience(weight, pivots)[:, column].double(), expected, rtol=1e-3, atol=1e-9)
    means = group_salience(weight, pivots, GROUP)
    torch.testing.assert_close(means[1], salience(weight, pivots)[:, GROUP:].mean())


# SBA


@settings(deadline=None, max_examples=200)
@given(st.permutations(range(9)), st.integers(0, 4), st.integers(2, 7))
def test_widths_average_exactly_n(ranking: list[int], pairs: int, bits: int) -> None:
    widths = widths_for(ranking, pairs, bits)
    assert sum(widths) == bits * len(ranking)
    assert [group for group in ranking if widths[group] < bits] == ranking[:pairs]
    assert [group for group in ranking if widths[group] > bits] == ranking[len(ranking) - pairs :]


def plainly_rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """One group after the other, min-max scales, one bit by mean and mean distance."""
    values = torch.empty_like(weight)
    for start in range(0, weight.shape[1], GROUP):
        rows = weight[:, start : start + GROUP]
        if bits == 1:
            mean = rows.mean(dim=1, keepdim=True)
            alpha = (rows - mean).abs().mean(dim=1, keepdim=True)
            values[:, start : start + GROUP] = mean + alpha * torch.where(rows >= mean, 1.0, -1.0)
        else:
            fmt = QuantFormat(code_bits=bits, granularity=GROUP)
            grid = fit_grid(rows, fmt, torch.float32, clip_search=False)
            values[:, start : start + GROUP] = grid.value(grid.round(rows))
    return values


def brute_force(weight, bias, inputs, ranking, bits: int, kind: str) -> list[float]:
    """The objective of every p from whole matrices, in float64."""
    scores = []
    rounded = {width: plainly_rounded(weight, width) for width in (bits - 1, bits, bits + 1)}
    for pairs in range(len(ranking) // 2 + 1):
        widths = widths_for(ranking, pairs, bits)
        values = torch.cat([rounded[w][:, g * GROUP : (g + 1) * GROUP] for g, w in enumerate(widths)], dim=1)
        per_sequence = []
        for tokens in inputs:
            true, found = (tokens.double() @ m.double().t() + bias.double() for m in (weight, values))
            if kind == "mse":
                per_sequence.append((true - found).square().mean())
            else:
                p, q = true.softmax(1), found.softmax(1)
                per_sequence.append((p * (p / q).log()).sum(1).mean())
        scores.append(float(torch.stack(per_sequence).mean()))
    return scores


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize(("bits", "groups", "seed"), [(2, 6, 0), (2, 5, 1), (3, 6, 2), (4, 3, 3), (3, 1, 4)])
def test_pairs_are_those_of_brute_force(bits: int, groups: int, seed: int, kind: str) -> None:
    weight, hessian, inputs = layer(24, groups, seed)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(seed))
    pivots = factor_hessian(hessian, 0.01, by_activation=False).pivots
    ranking = torch.argsort(group_salience(weight, pivots, GROUP)).tolist()
    fmt = QuantFormat.parse(f"slim{bits}-g{GROUP}")
    found = allocate_bits(weight, bias, inputs, ranking, fmt, objective=kind)
    expected = brute_force(weight, bias, inputs, ranking, bits, kind)
    # One-bit scales are stored with five bits of mantissa: the scores differ a little, the choice does not.
    assert found.scores == pytest.approx(expected, rel=5e-2 if bits == 2 else 1e-3)
    assert found.pairs == expected.index(min(expected))
    assert found.widths == widths_for(ranking, found.pairs, bits)
    assert len(found.scores) == groups // 2 + 1


def test_p_is_positive_where_groups_differ_and_zero_where_they_do_not() -> None:
    weight, hessian, inputs = layer(24, 6, seed=0)
    fmt = QuantFormat.parse(f"slim3-g{GROUP}")
    assert Slim()(weight, hessian, fmt, torch.float16, inputs=inputs).weight.pairs > 0
    same = torch.randn(24, 6 * GROUP, generator=torch.Generator().manual_seed(5)) / GROUP**0.5
    tokens = torch.randn(400, 6 * GROUP, generator=torch.Generator().manual_seed(6))
    moments = tokens.t() @ tokens / len(tokens)
    assert Slim()(same, moments, fmt, torch.float16, inputs=list(tokens.split(50))).weight.pairs == 0


def test_the_bias_counts_on_both_sides() -> None:
    """A bias that puts nearly all probability on one output makes the others' errors count less."""
    weight, _, inputs = layer(8, 4, seed=1)
    fmt, ranking = QuantFormat.parse(f"slim2-g{GROUP}"), [0, 1, 2, 3]
    plain = allocate_bits(weight, None, inputs, ranking, fmt).scores
    zero = allocate_bits(weight, torch.zeros(8), inputs, ranking, fmt).scores
    peaked = allocate_bits(weight, torch.tensor([30.0] + [0.0] * 7), inputs, ranking, fmt).scores
    assert zero == plain
    assert max(peaked) < 0.01 * min(plain)


def test_inputs_are_needed() -> None:
    with pytest.raises(ValueError, match="choosing the number of pairs needs inputs"):
        allocate_bits(torch.ones(2, GROUP), None, [], [0], QuantFormat.parse(f"slim2-g{GROUP}"))


# SQC

SEARCHES = st.builds(
    ScaleSearch,
    start=st.sampled_from(["minmax", "search"]),
    steps=st.integers(1, 12),
    salient_weight=st.sampled_from([1.0, 2.0, 5.0, 10.0]),
    exponent=st.sampled_from([2.0, 2.4]),
    diagonal_importance=st.booleans(),
)


@settings(deadline=None, max_examples=120)
@given(SEARCHES, st.integers(1, 4), st.integers(0, 1000))
def test_search_is_never_worse_than_the_unscaled_grid(search: ScaleSearch, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, GROUP, generator=generator) * torch.rand(6, 1, generator=generator)
    saliences = rows.square() * torch.rand(GROUP, generator=generator)
    importance = torch.rand(GROUP, generator=generator)
    weights = torch.ones(GROUP) if not search.diagonal_importance else importance
    mask = saliences > saliences.mean() + 3 * saliences.std(correction=0)
    weights = torch.where(mask, search.salient_weight, 1.0) * weights
    unscaled = fit_scale(
        rows, bits, torch.float16, replace(search, steps=0), saliences=saliences, importance=importance
    )
    scaled = fit_scale(rows, bits, torch.float16, search, saliences=saliences, importance=importance)
    before, after = (objective(rows, grid, weights, search.exponent) for grid in (unscaled, scaled))
    assert (after <= before * (1 + 1e-6)).all()


def test_search_finds_the_best_multiple() -> None:
    """Against a plain loop over tau and rows."""
    rows = torch.randn(5, GROUP, generator=torch.Generator().manual_seed(0))
    saliences = rows.square()
    search = ScaleSearch(start="minmax", steps=8, salient_weight=5.0, exponent=2.4, diagonal_importance=False)
    start = fit_scale(rows, 3, torch.float16, replace(search, steps=0), saliences=saliences)
    found = fit_scale(rows, 3, torch.float16, search, saliences=saliences)
    mask = saliences > saliences.mean() + 3 * saliences.std(correction=0)
    assert mask.any()
    for row in range(5):
        errors = {}
        for step in range(-8, 9):
            scale = float((start.scales[row] * (1 + 0.1 * step / 8)).to(torch.float16))
            values = (rows[row] / scale).round().clamp(-4, 3) * scale
            errors[scale] = float(((values - rows[row]).abs() ** 2.4 * torch.where(mask[row], 5.0, 1.0)).sum())
        assert float(found.scales[row]) == min(errors, key=errors.__getitem__)


def test_weight_one_is_the_plain_error() -> None:
    """As published, the mask decides nothing: salient and other weights partition the group."""
    rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    spiky = rows.square() * torch.rand(64, generator=torch.Generator().manual_seed(4)) ** 8
    for bits in (1, 2, 3):
        plain = fit_scale(rows, bits, torch.float16, ScaleSearch(salient_weight=1.0))
        masked = fit_scale(rows, bits, torch.float16, ScaleSearch(salient_weight=1.0), saliences=spiky)
        # A weight of 1 put on the salient elements by hand, through the path that other weights take.
        nearly = fit_scale(rows, bits, torch.float16, ScaleSearch(salient_weight=1.0 + 1e-12), saliences=spiky)
        heavy = fit_scale(rows, bits, torch.float16, ScaleSearch(salient_weight=50.0), saliences=spiky)
        assert torch.equal(plain.scales, masked.scales) and torch.equal(plain.scales, nearly.scales)
        assert not torch.equal(plain.scales, heavy.scales)
        error = (plain.value(plain.round(rows)) - rows).square().sum(dim=1)
        torch.testing.assert_close(objective(rows, plain, None, 2.0), error)


def test_a_weight_without_saliences_is_refused() -> None:
    with pytest.raises(ValueError, match="a weight for salient errors needs the saliences"):
        fit_scale(torch.ones(2, 32), 2, torch.float16, ScaleSearch(salient_weight=2.0))


# One-bit groups


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.7, 1.9, 40.0])
def test_one_bit_groups_keep_their_mean(shift: float) -> None:
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) + shift
    grid = fit_scale(rows, 1, torch.float16, ScaleSearch(steps=0, diagonal_importance=False))
    levels = torch.stack([grid.value(torch.full((50,), float(code))) for code in (-1, 0)])
    assert grid.zeros is not None and grid.round(rows).unique().tolist() in ([-1.0, 0.0], [-1.0], [0.0])
    mean, alpha = rows.mean(dim=1), (rows - rows.mean(dim=1, keepdim=True)).abs().mean(dim=1)
    if abs(shift) < 1.5:  # the mean's range is twice the levels' distance from it
        torch.testing.assert_close(levels.mean(dim=0), mean, rtol=0, atol=float(alpha.max()) / 25)
        torch.testing.assert_close((levels[1] - levels[0]) / 2, alpha, rtol=1 / 32, atol=1e-4)
    error = (grid.value(grid.round(rows)) - rows).square().sum(dim=1)
    without = (rows.abs().mean(dim=1, keepdim=True) * rows.sign() - rows).square().sum(dim=1)  # equation 2, no mean
    if shift < 40:
        assert error.sum() < without.sum()
    else:  # far beyond the range of the stored mean one level lies on it, as far as five bits of mantissa let it
        assert error.sum() < 1.3 * without.sum()


def test_one_bit_groups_survive_the_file_and_the_descent() -> None:
    weight, hessian, inputs = layer(12, 4, seed=2)
    weight += torch.linspace(-0.3, 0.3, 12)[:, None]  # means far from 0
    fmt = QuantFormat.parse(f"slim2-g{GROUP}")
    for rounds in (0, 3):
        found = replace(Slim(), fixed_pairs=2, descent_rounds=rounds)(
            weight, hessian, fmt, torch.bfloat16, inputs=inputs
        )
        stored = found.weight
        assert isinstance(stored, SegmentedWeight) and sorted(stored.widths.tolist()) == [1, 1, 3, 3]
        back = decode(encode(stored), fmt, stored.shape)
        assert torch.equal(back.dequantize(), stored.dequantize())
        assert found.relative_output_error == pytest.approx(
            output_error(weight, stored.dequantize(), hessian), rel=1e-4
        )
        narrow = int(torch.where(stored.widths == 1)[0][0])
        values = stored.dequantize()[:, narrow * GROUP : (narrow + 1) * GROUP]
        assert max(len(row.unique()) for row in values) == 2
        assert stored.means is not None and stored.means[:, narrow].abs().max() > 3


# The whole


@pytest.mark.parametrize("name", ["slim2-g32", "slim3-g32", "slim2-g32-sorted"])
def test_descent_lowers_the_error(name: str) -> None:
    weight, hessian, inputs = layer(24, 6, seed=0)
    fmt = QuantFormat.parse(name)
    plain = replace(Slim(), descent_rounds=0)(weight, hessian, fmt, torch.float16, inputs=inputs)
    better = Slim()(weight, hessian, fmt, torch.float16, inputs=inputs)
    assert better.relative_output_error < plain.relative_output_error


def test_without_pairs_it_is_gptq() -> None:
    """p = 0 and no scale search of its own: the same integers as uniform GPTQ."""
    weight, hessian, inputs = layer(16, 4, seed=3)
    for bits in (2, 3):
        slim = replace(Slim(), fixed_pairs=0, scale=ScaleSearch(steps=0))
        mixed = slim(weight, hessian, QuantFormat.parse(f"slim{bits}-g32"), torch.float16, inputs=inputs)
        uniform = Gptq()(weight, hessian, QuantFormat.parse(f"int{bits}-g32"), torch.float16)
        assert torch.equal(mixed.weight.codes, uniform.weight.codes)
        assert torch.equal(mixed.weight.scales, uniform.weight.scales)


def test_better_than_uniform_where_groups_differ() -> None:
    for bits, factor in ((2, 0.8), (3, 0.6)):
        ratio = []
        for seed in range(3):
            weight, hessian, inputs = layer(32, 8, seed=seed)
            mixed = Slim()(weight, hessian, QuantFormat.parse(f"slim{bits}-g32"), torch.float16, inputs=inputs)
            uniform = Gptq()(weight, hessian, QuantFormat.parse(f"int{bits}-g32"), torch.float16)
            ratio.append(mixed.relative_output_error / uniform.relative_output_error)
        assert sum(ratio) / 3 < factor


def test_published_options_are_the_papers() -> None:
    assert not PUBLISHED.search_clip and PUBLISHED.descent_rounds == 0
    assert (PUBLISHED.scale.reach, PUBLISHED.scale.steps, PUBLISHED.scale.salient_weight) == (0.1, 50, 1.0)


def test_wrong_formats_are_refused() -> None:
    weight, hessian, inputs = layer(4, 2, seed=0)
    with pytest.raises(ValueError, match="int2-g32 has one width: use Gptq"):
        Slim()(weight, hessian, QuantFormat.parse("int2-g32"), torch.float16, inputs=inputs)
    with pytest.raises(ValueError, match="slim2-g96 needs whole groups: 96 columns do not divide a row of 64"):
        Slim()(weight, hessian, QuantFormat.parse("slim2-g96"), torch.float16, inputs=inputs)


# Halves


@pytest.mark.parametrize("name", ["slim3-g32-halves", "slim3-g32-sorted-halves"])
def test_halves_give_four_bits_to_the_salient_columns_of_all_matrices_of_an_input(name: str) -> None:
    weight, hessian, _ = layer(12, 6, seed=3)
    fmt, parts = QuantFormat.parse(name), [weight[:5], weight[5:]]
    found = Slim().quantize_together(parts, hessian, fmt, torch.float16)
    whole = Slim()(weight, hessian, fmt, torch.float16)
    assert torch.equal(torch.cat([part.weight.dequantize() for part in found]), whole.weight.dequantize())
    first = found[0].weight
    assert isinstance(first, SegmentedWeight) and torch.equal(first.stored_order(), found[1].weight.stored_order())
    assert sorted(first.widths.tolist()) == [2] * 3 + [4] * 3
    for part, result in zip(parts, found, strict=True):
        expected = output_error(part, result.weight.dequantize(), hessian)
        assert result.relative_output_error == pytest.approx(expected, rel=1e-3)
    wide = first.stored_order()[len(hessian) // 2 :]
    assert hessian.diagonal()[wide].mean() > 3 * hessian.diagonal().mean() / 2  # the large inputs
    narrow = Gptq()(weight, hessian, QuantFormat.parse("int2-g32"), torch.float16).weight.dequantize()
    assert output_error(weight, whole.weight.dequantize(), hessian) < output_error(weight, narrow, hessian) / 2


def test_tall_matrices_with_halves_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, _ = layer(11, 4, seed=5)
    fmt, parts = QuantFormat.parse("slim3-g32-sorted-halves"), [weight[:4], weight[4:]]
    whole = Slim().quantize_together(parts, hessian, fmt, torch.float16)
    heights: list[int] = []
    run = SegmentLoop.run

    def seen(loop: SegmentLoop) -> Rounded:
        rounded = run(loop)
        heights.append(rounded.shifted.shape[1])
        return rounded

    monkeypatch.setattr(SegmentLoop, "run", seen)
    monkeypatch.setattr("cptquant.quantizers.gptq.ROWS_ENTRIES", 3 * weight.shape[1])
    monkeypatch.setattr("cptquant.quantizers.slim.ROWS_ENTRIES", 3 * weight.shape[1])
    pieces = Slim().quantize_together(parts, hessian, fmt, torch.float16)
    assert heights == [3, 3, 3, 2]
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.weight.dequantize(), other.weight.dequantize())
        assert one.relative_output_error == pytest.approx(other.relative_output_error, rel=1e-4)

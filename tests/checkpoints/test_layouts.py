import math

import pytest
import torch

from difftune.checkpoints.layouts import (
    adjacent_to_half_rotary,
    fold_norm_weight,
    groups_to_halves,
    half_to_adjacent_rotary,
    halves_to_groups,
    join_interleaved_pair,
    join_pair,
    pair_columns,
    split_interleaved_pair,
    split_pair,
)
from difftune.ops import rotate


@pytest.mark.parametrize("rows", [torch.randn(12, 5), torch.randn(12)], ids=["weight", "bias"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_value_rows_survive_the_round_trip(rows: torch.Tensor, groups: int) -> None:
    assert torch.equal(groups_to_halves(halves_to_groups(rows, groups), groups), rows)
    assert torch.equal(halves_to_groups(groups_to_halves(rows, groups), groups), rows)


def test_value_rows_of_a_group_are_its_two_halves() -> None:
    head_dim, groups = 4, 3
    rows = torch.arange(2 * groups * head_dim)
    heads = rows.view(2 * groups, head_dim)
    ours = halves_to_groups(rows, groups).view(groups, 2 * head_dim)
    for group in range(groups):
        assert torch.equal(ours[group], torch.cat([heads[group], heads[group + groups]]))


def test_pair_survives_the_round_trip() -> None:
    fused = torch.randn(8, 3)
    first, second = split_pair(fused)
    assert torch.equal(first, fused[:4])
    assert torch.equal(second, fused[4:])
    assert torch.equal(join_pair(first, second), fused)


@pytest.mark.parametrize("rows", [torch.randn(24, 5), torch.randn(24)], ids=["weight", "bias"])
@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_interleaved_pair_survives_the_round_trip(rows: torch.Tensor, pairs: int) -> None:
    first, second = split_interleaved_pair(rows, pairs)
    assert torch.equal(join_interleaved_pair(first, second, pairs), rows)
    heads = rows.unflatten(0, (2 * pairs, -1))
    for pair in range(pairs):
        assert torch.equal(first.unflatten(0, (pairs, -1))[pair], heads[2 * pair])
        assert torch.equal(second.unflatten(0, (pairs, -1))[pair], heads[2 * pair + 1])


@pytest.mark.parametrize("rows", [torch.randn(24, 5), torch.randn(24)], ids=["weight", "bias"])
@pytest.mark.parametrize("head_dim", [2, 6, 12])
def test_rotary_order_survives_the_round_trip(rows: torch.Tensor, head_dim: int) -> None:
    assert torch.equal(half_to_adjacent_rotary(adjacent_to_half_rotary(rows, head_dim), head_dim), rows)
    assert torch.equal(adjacent_to_half_rotary(half_to_adjacent_rotary(rows, head_dim), head_dim), rows)


def test_turning_halves_of_reordered_rows_is_turning_adjacent_dimensions() -> None:
    head_dim, heads, tokens = 10, 3, 7
    rows = torch.randn(heads * head_dim, 5, dtype=torch.float64)
    x = torch.randn(tokens, 5, dtype=torch.float64)
    angles = torch.outer(torch.arange(tokens), math.pi * torch.rand(head_dim // 2, dtype=torch.float64))
    adjacent = torch.view_as_complex((x @ rows.T).view(tokens, heads, head_dim // 2, 2))
    expected = adjacent * torch.polar(torch.ones_like(angles), angles)[:, None]
    twice = torch.cat([angles, angles], dim=-1)[None]
    halves = (x @ adjacent_to_half_rotary(rows, head_dim).T).view(1, tokens, heads, head_dim)
    actual = rotate(halves, twice.cos(), twice.sin())[0]
    torch.testing.assert_close(actual[..., : head_dim // 2], expected.real)
    torch.testing.assert_close(actual[..., head_dim // 2 :], expected.imag)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_norm_weight_computes_the_same(dtype: torch.dtype) -> None:
    x, o_weight, norm_weight = (torch.randn(*s, dtype=dtype) for s in ((7, 3, 8), (5, 24), (8,)))
    expected = (x * norm_weight).flatten(1) @ o_weight.T
    folded = fold_norm_weight(o_weight, norm_weight)
    assert folded.dtype == dtype
    torch.testing.assert_close(x.flatten(1) @ folded.T, expected)


def test_folding_rounds_once() -> None:
    """The product in float64, rounded to the weights' dtype: no fold in float32 can be closer."""
    o_weight, norm_weight = torch.randn(64, 48), 1 + torch.randn(12)
    product = o_weight.double() * norm_weight.double().repeat(4)
    assert torch.equal(fold_norm_weight(o_weight, norm_weight), product.float())
    assert torch.equal(fold_norm_weight(o_weight.double(), norm_weight.double()), product)


def test_folding_bfloat16_weights_is_exact() -> None:
    o_weight, norm_weight = torch.randn(5, 16).bfloat16(), torch.randn(8).bfloat16()
    folded = fold_norm_weight(o_weight, norm_weight)
    assert torch.equal(folded.double(), o_weight.double() * norm_weight.double().repeat(2))


def test_a_norm_weight_of_ones_changes_nothing() -> None:
    o_weight = torch.randn(5, 16).bfloat16()
    folded = fold_norm_weight(o_weight, torch.ones(8))
    assert folded.dtype == torch.bfloat16 and torch.equal(folded, o_weight)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="10 rows do not divide into 3 x 2 heads"):
        split_interleaved_pair(torch.zeros(10), 3)
    with pytest.raises(ValueError, match="10 rows are not a whole number of heads of 4, which must be even"):
        adjacent_to_half_rotary(torch.zeros(10), 4)
    with pytest.raises(ValueError, match="9 rows are not a whole number of heads of 3, which must be even"):
        half_to_adjacent_rotary(torch.zeros(9), 3)
    with pytest.raises(ValueError, match="even number of rows, got 3"):
        split_pair(torch.zeros(3))
    with pytest.raises(ValueError, match=r"differ in shape: \(2,\), \(3,\)"):
        join_pair(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="10 rows do not divide into 2 x 3 heads"):
        halves_to_groups(torch.zeros(10), 3)
    with pytest.raises(ValueError, match="10 columns, not a whole number of heads of 4"):
        fold_norm_weight(torch.zeros(1, 10), torch.zeros(4))


def test_columns_of_paired_heads_stand_side_by_side() -> None:
    groups, members, head_dim = 3, 2, 4
    heads = torch.arange(groups * 2 * members * head_dim).view(groups, 2, members, head_dim)
    ours = pair_columns(heads.reshape(1, -1), groups, members).view(groups, members, 2 * head_dim)
    for group in range(groups):
        for member in range(members):
            assert torch.equal(ours[group, member], torch.cat([heads[group, 0, member], heads[group, 1, member]]))
    with pytest.raises(ValueError, match="10 columns do not divide into 2 pairs of 3 heads"):
        pair_columns(torch.zeros(1, 10), 2, 3)
